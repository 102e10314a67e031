"""Rename tables: what each old name is today, as data that `migrate`, `check` and `aliases` read.

`catalogue` is ours and follows from `renamed_from` and rkmetrics/catalogue/renames.py. RivetKit's four eras come from
rivetkit.json, which tools/rivetkit_renames.py writes from its history (github.com/rivet-dev/rivet, Apache-2.0): A-B,
B-C and C-D, their inverses, and every path from one era to another. Dynamo's and vLLM's names lead to ours; they are
written down here, from Dynamo 0.7's `prometheus_names.py` (KVSTATS) and vLLM's metrics of 0.6 to 0.11 (both
Apache-2.0).

A change has conditions rather than code: labels that the new name must be asked for (`adds`), or that the old one was
(`needs`); aggregations in which alone it is right (`only_in`). Turned round, `adds` and `needs` change places, so
each table has an inverse. What has no successor stays in the table with the reason, so that it can be said.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import Any

from rkmetrics.catalogue import sets
from rkmetrics.catalogue.renames import DROPPED, LABELS, VALUES
from rkmetrics.definition import MetricDefinition
from rkmetrics.model import MetricType

__all__ = [
    "SUFFIXES",
    "Change",
    "PrefixRule",
    "Table",
    "bases",
    "catalogue_table",
    "named",
    "names",
    "rivetkit_families",
]

SUFFIXES = ("_bucket", "_sum", "_count")

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Change:
    """What became of one metric.

    new: its name today, "" for none. histogram: whether its samples have SUFFIXES. adds: matchers that the new name is
    asked for; needs: matchers that tell which of several the old name meant. labels: old to new, "" for none. values:
    (label of today, old value) to new. only_in: aggregations outside of which the new name means something else.
    cannot: no query can be rewritten; `why` says the reason, of this and of all else that is refused.
    """

    old: str
    new: str
    histogram: bool = False
    adds: Pairs = ()
    needs: Pairs = ()
    labels: Pairs = ()
    values: tuple[tuple[str, str, str], ...] = ()
    only_in: tuple[str, ...] = ()
    cannot: bool = False
    why: str = ""

    def inverse(self) -> Change:
        """The way back."""
        old_label = {new: old for old, new in self.labels if new}
        return replace(
            self,
            old=self.new,
            new=self.old,
            adds=self.needs,
            needs=self.adds,
            labels=tuple((new, old) for old, new in self.labels if new),
            values=tuple((old_label.get(label, label), new, old) for label, old, new in self.values if new),
        )


@dataclass(frozen=True, slots=True)
class PrefixRule:
    """A prefix that other names lose, or gain. families: their names without it; known: all names of all eras.

    What has the prefix and is none of these may be anybody's.
    """

    strip: str = ""
    add: str = ""
    families: frozenset[str] = frozenset()
    known: frozenset[str] = frozenset()

    def inverse(self) -> PrefixRule:
        return PrefixRule(self.add, self.strip, self.families, self.known)

    def apply(self, name: str) -> str | None:
        """Return the new name; None for a name that the rule does not concern."""
        if self.strip and not name.startswith(self.strip):
            return None
        base = name[len(self.strip) :]
        return None if self.families.isdisjoint(bases(base)) else self.add + base

    def unknown(self, name: str) -> bool:
        """Whether a name has the prefix to lose, and nobody knows whose it is."""
        return bool(self.strip) and name.startswith(self.strip) and self.known.isdisjoint(bases(name))


@dataclass(frozen=True, slots=True)
class Table:
    """Changes from one naming to the next.

    changes: by old name; several for one that was made of several. gone, added: labels that all metrics of `changes`
    lost or gained, with the reason. dead: names that never existed, though queries have them. born: families of the
    new naming that the old one had nothing like.
    """

    name: str
    about: str
    changes: Mapping[str, tuple[Change, ...]]
    gone: Mapping[str, str] = field(default_factory=dict[str, str])
    added: Mapping[str, str] = field(default_factory=dict[str, str])
    prefix: PrefixRule | None = None
    dead: frozenset[str] = frozenset()
    born: frozenset[str] = frozenset()

    def find(self, sample: str) -> tuple[tuple[Change, ...], str]:
        """Return the changes that may concern a sample's name, and the suffix that it has beyond theirs."""
        if sample in self.changes:
            return self.changes[sample], ""
        for base in bases(sample):
            found = tuple(change for change in self.changes.get(base, ()) if change.histogram)
            if found:
                return found, sample[len(base) :]
        return (), ""

    def concerns(self, sample: str) -> bool:
        """Whether a sample's name is another today, or was never one."""
        found, _ = self.find(sample)
        if not found and sample not in self.dead:
            return self.prefix is not None and self.prefix.apply(sample) is not None
        return sample in self.dead or any(change.new != change.old for change in found)

    def inverse(self, name: str) -> Table:
        """The way back, as a table of that name."""
        changes = [change.inverse() for changes in self.changes.values() for change in changes if change.new]
        changes += [Change(name, "", histogram=True, why="nothing like it was there before") for name in self.born]
        prefix = self.prefix.inverse() if self.prefix else None
        return Table(name, f"back: {self.about}", _by_name(changes), self.added, self.gone, prefix, self.dead)


def bases(sample: str) -> Iterator[str]:
    """Yield the names of the families that a sample's name may belong to."""
    yield sample
    for suffix in SUFFIXES:
        if sample.endswith(suffix):
            yield sample.removesuffix(suffix)


def _by_name(changes: Iterable[Change]) -> dict[str, tuple[Change, ...]]:
    found: dict[str, tuple[Change, ...]] = {}
    for change in changes:
        found[change.old] = (*found.get(change.old, ()), change)
    return found


# --- ours -------------------------------------------------------------------------------------------------------------


def catalogue_table(definitions: Iterable[MetricDefinition]) -> Table:
    """Return the table of the definitions' own old names, labels and values."""
    changes = [change for definition in definitions for change in _changes_of(definition)]
    changes += [Change(old, "", why=f"removed; {instead}") for old, instead in DROPPED.items()]
    return Table("catalogue", "old names of the catalogue", _by_name(changes))


def _changes_of(definition: MetricDefinition) -> Iterator[Change]:
    name, histogram = definition.name, definition.type is MetricType.HISTOGRAM
    labels = tuple((label, new) for (metric, label), new in LABELS.items() if metric == name)
    values = tuple((label, old, new) for (metric, label, old), new in VALUES.items() if metric == name)
    for old in (rename.name for rename in definition.renamed_from):
        yield Change(old, name, histogram, labels=labels, values=values)
    if labels or values:
        yield Change(name, name, histogram, labels=labels, values=values)


# --- others -----------------------------------------------------------------------------------------------------------

_DYNAMO: Mapping[str, str] = {
    "dynamo_component_kvstats_active_blocks": "rkmetrics_kv_active_blocks",
    "dynamo_component_kvstats_total_blocks": "rkmetrics_kv_blocks",
    "dynamo_component_kvstats_gpu_cache_usage_percent": "rkmetrics_kv_cache_usage_ratio",  # 0 to 1 there too
    "dynamo_component_kvstats_gpu_prefix_cache_hit_rate": "rkmetrics_kv_prefix_cache_hit_ratio",
}
_DYNAMO_LABELS = {
    "dynamo_namespace": "no counterpart: a namespace is a scrape's business here",
    "dynamo_component": "no counterpart by itself; if actor names are its values: --label dynamo_component=actor_name",
}

_VLLM: Mapping[str, str] = {
    "vllm:gpu_cache_usage_perc": "rkmetrics_kv_cache_usage_ratio",  # until 0.10; 0 to 1
    "vllm:kv_cache_usage_perc": "rkmetrics_kv_cache_usage_ratio",
    "vllm:num_requests_running": "rkmetrics_worker_request_active_slots",
    "vllm:num_requests_waiting": "rkmetrics_worker_requests_waiting",
    "vllm:gpu_prefix_cache_hit_rate": "rkmetrics_kv_prefix_cache_hit_ratio",
    "vllm:gpu_prefix_cache_hits_total": "rkmetrics_kv_prefix_cache_hits_total",
    "vllm:gpu_prefix_cache_queries_total": "rkmetrics_kv_prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total": "rkmetrics_kv_prefix_cache_hits_total",
    "vllm:prefix_cache_queries_total": "rkmetrics_kv_prefix_cache_queries_total",
    "vllm:spec_decode_num_drafts_total": "rkmetrics_worker_spec_decode_drafts_total",
    "vllm:spec_decode_num_draft_tokens_total": "rkmetrics_worker_spec_decode_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total": "rkmetrics_worker_spec_decode_accepted_tokens_total",
}
_VLLM_GONE: Mapping[str, str] = {
    "vllm:num_requests_swapped": "vLLM itself dropped it",
    "vllm:cpu_cache_usage_perc": "vLLM itself dropped it",
}
_VLLM_LABELS = {
    "model_name": "no counterpart by itself; if your actor names are models: --label model_name=actor_name",
    "engine": "no counterpart: workers of one kind add up",
}


def _dynamo() -> Table:
    changes = [Change(old, new) for old, new in _DYNAMO.items()]
    return Table("dynamo", "Dynamo's kvstats gauges to ours", _by_name(changes), _DYNAMO_LABELS)


def _vllm() -> Table:
    changes = [Change(old, new) for old, new in _VLLM.items()]
    changes += [Change(old, "", why=why) for old, why in _VLLM_GONE.items()]
    return Table("vllm", "vLLM's KV cache and request metrics to ours", _by_name(changes), _VLLM_LABELS)


# --- RivetKit ---------------------------------------------------------------------------------------------------------

ERAS = "ABCD"


@cache
def _rivetkit() -> Mapping[str, Table]:
    """The steps between neighbouring eras, both ways."""
    data = json.loads(files("rkmetrics.assets").joinpath("rivetkit.json").read_text(encoding="utf-8"))
    found: dict[str, Table] = {}
    for old, new in pairwise(ERAS):
        table = _from_data(f"rivetkit:{old}-{new}", data[f"{old}-{new}"])
        found[table.name] = table
        back = table.inverse(f"rivetkit:{new}-{old}")
        found[back.name] = back
    rules = [table.prefix for table in found.values() if table.prefix]
    known = {name for table in found.values() for name in (*table.changes, *table.dead)}
    every = frozenset(family for rule in rules for family in rule.families)
    known |= {rule.strip + rule.add + family for rule in rules for family in every}
    return {name: _knowing(table, every, frozenset(known)) for name, table in found.items()}


def _knowing(table: Table, families: frozenset[str], known: frozenset[str]) -> Table:
    """The table with a rule that knows all eras. Any family may lose its prefix; it gains one only where it had it."""
    rule = table.prefix
    if rule is None:
        return table
    return replace(table, prefix=replace(rule, families=families if rule.strip else rule.families, known=known))


def rivetkit_families() -> frozenset[str]:
    """Return the families that RivetKit and its engine have in era C, as far as they are known."""
    prefix = _rivetkit()["rivetkit:C-D"].prefix
    return prefix.families if prefix else frozenset()


def _from_data(name: str, data: Mapping[str, Any]) -> Table:
    dead = frozenset(data.get("dead", ()))
    rule = PrefixRule(data.get("strip", ""), data.get("add", ""), frozenset(data.get("families", ())))
    return Table(
        name,
        f"RivetKit's names of era {name[-3]} to those of era {name[-1]}",
        _by_name(_change(row) for row in data["changes"]),
        data.get("gone", {}),
        data.get("added", {}),
        rule if rule.strip or rule.add else None,
        dead | {old.removeprefix(rule.strip or rule.add) for old in dead},
        frozenset(data.get("born", ())),
    )


def _change(row: Mapping[str, Any]) -> Change:
    return Change(
        row["old"],
        row["new"],
        histogram=row.get("histogram", False),
        adds=tuple((label, value) for label, value in row.get("adds", ())),
        only_in=tuple(row.get("only_in", ())),
        cannot=row.get("cannot", False),
        why=row.get("why", ""),
    )


def _steps(start: str, end: str) -> tuple[Table, ...]:
    a, b = ERAS.index(start), ERAS.index(end)
    path = ERAS[a : b + 1] if a < b else ERAS[b : a + 1][::-1]
    return tuple(_rivetkit()[f"rivetkit:{old}-{new}"] for old, new in pairwise(path))


# --- all --------------------------------------------------------------------------------------------------------------


def names() -> tuple[str, ...]:
    """Return the names of all tables. Our actors have the names of RivetKit's era C."""
    eras = tuple(f"rivetkit:{old}-{new}" for old in ERAS for new in ERAS if old != new)
    return ("catalogue", "dynamo", "vllm", *eras)


def named(name: str, definitions: Iterable[MetricDefinition] | None = None) -> tuple[Table, ...]:
    """Return the tables to go through one after the other. Raises KeyError for a name that is not among `names()`."""
    if name == "catalogue":
        known = definitions if definitions is not None else (d for each in sets() for d in each.definitions())
        return (catalogue_table(known),)
    if name not in names():
        raise KeyError(name)
    return {"dynamo": lambda: (_dynamo(),), "vllm": lambda: (_vllm(),)}.get(name, lambda: _steps(name[-3], name[-1]))()
