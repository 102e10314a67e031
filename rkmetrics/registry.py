"""The registry: sets bound to actor names, and the snapshot of them all.

`bind` hands out cells once; updates never come here again. `collect` copies memory: for each metric the same slice of
each block, without a lock, without touching a Python object for each series. Tables change by single dictionary
operations (see guard.py), so bind, release and collect may run in any thread, finaliser or signal handler.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from rkmetrics.cells import CounterCell, existing, gather, peaks
from rkmetrics.collection import Collect, CollectorFailure, Guarded
from rkmetrics.errors import RegistryError
from rkmetrics.guard import ActorNames, Budget, Overflow, Overflows, budget
from rkmetrics.health import Health
from rkmetrics.memory import Exemplars, Memory, PrivateMemory
from rkmetrics.metricset import Column, MetricSet, RegisteredCells
from rkmetrics.model import Exemplar, Family, ForeignFamily, MetricFamily, MetricType
from rkmetrics.settings import Settings

if TYPE_CHECKING:
    from rkmetrics.actor import ActorMetrics
    from rkmetrics.catalogue.exporter import Exporter
    from rkmetrics.catalogue.node import Node
    from rkmetrics.collectors.vitals import Vitals

__all__ = ["BUILTIN", "Access", "Document", "Registry"]

SetT = TypeVar("SetT", bound=MetricSet)
PartT = TypeVar("PartT")

logger = logging.getLogger("rkmetrics")

# What a registry measures by itself: a module with install(registry), named and not imported, as it is an outer ring
# and needs psutil, which `import rkmetrics` does not load.
BUILTIN = "rkmetrics.collectors"


class Access:
    """Who may read metrics: `Access.token()` (METRICS_ENABLED and METRICS_TOKEN decide) or `Access.open()`
    (everybody)."""

    __slots__ = ("mode",)

    def __init__(self, mode: str) -> None:
        self.mode = mode

    @classmethod
    def token(cls) -> Access:
        """A bearer token opens the gate; without one it stays closed."""
        return cls("token")

    @classmethod
    def open(cls) -> Access:
        """No token is asked for. Said in code, so that nobody does it by leaving a variable empty."""
        return cls("open")

    def applied(self, settings: Settings) -> Settings:
        """The settings with this access in them."""
        changes: dict[str, Any] = {"metrics_access": self.mode}
        if self.mode == "open":
            changes["metrics_enabled"] = True
        return dataclasses.replace(settings, **changes)


class Document(Protocol):
    """What a part of the program shows at a route, for HTTP to serve without knowing the part.

    Both may be called in any thread, at once, and neither waits or raises. etag() is asked first: a change in between
    then gives a newer body under an older tag, which the next request puts right; the other way round nothing would.
    """

    def etag(self) -> bytes:
        """Return the entity tag of the state as it is, with its quotes (RFC 9110, 8.8.3)."""
        ...

    def render(self) -> bytes:
        """Return the body, JSON."""
        ...


class Registry:
    """Holds bound metric sets, and answers snapshots of them.

    settings: by default from the environment (SettingsError names what is wrong there). strict: raise where
    production counts "__other__"; for tests. serverless: "no link yet" is healthy. access: overrides METRICS_ACCESS.
    builtin: also measure this process (process_*, runtime, node vitals).
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        strict: bool = False,
        serverless: bool = False,
        access: Access | None = None,
        builtin: bool = True,
        memory: Memory | None = None,
    ) -> None:
        settings = Settings.from_env(os.environ) if settings is None else settings
        self.settings = access.applied(settings) if access else settings
        self.strict, self.serverless = strict, serverless
        self.health = Health(serverless=serverless)
        self._memory: Memory = memory or PrivateMemory()
        self._sets: dict[type[MetricSet], None] = {}
        self._single: dict[type[MetricSet], Any] = {}  # sets without actor_name
        self._owners: dict[str, type[MetricSet]] = {}
        self._overflows = Overflows(self._count_overflow, strict=strict)
        self._names = ActorNames(self.settings.max_actor_names, self._overflows, strict=strict)
        self._refreshers: dict[Callable[[], object], None] = {}
        self._collectors: dict[str, Guarded] = {}
        self._documents: dict[str, Document] = {}
        self._parts: dict[object, object] = {}
        self._limit: tuple[int, int] = (0, 0)
        self._dropped: CounterCell | None = None
        # All that a bind, an update or a collection needs is loaded and bound now: they run in finalisers and signal
        # handlers, and a child forked while some thread imports a module would wait for that import for ever.
        self._load(builtin)

    def _load(self, builtin: bool) -> None:
        from rkmetrics import catalogue
        from rkmetrics.actor import ActorMetrics
        from rkmetrics.catalogue.actors import ActorKv, Actors
        from rkmetrics.catalogue.exporter import Exporter

        self._new_actor, self._builtin = ActorMetrics, builtin
        self._actor_sets: tuple[type[MetricSet], ...] = (Actors, ActorKv)
        self.exporter: Exporter = self.bind(Exporter)
        self._dropped = self.exporter.exemplars_dropped
        self.exporter.build_info[catalogue.version(), catalogue.catalog_version()].set(1)
        if builtin:
            import_module(BUILTIN).install(self)

    # --- binding ------------------------------------------------------------------------------------------------------

    def add_set(self, set_class: type[MetricSet]) -> None:
        """Make a set known: it counts in the budget, and no other set may use its names. `bind` does so by itself.

        Raises RegistryError naming both sets where a sample name is taken.
        """
        if set_class in self._sets:
            return
        given: object = set_class
        if not isinstance(given, type) or not issubclass(given, MetricSet) or given is MetricSet:
            raise RegistryError(f"{set_class!r} is not a set of metrics; derive a class from rk.MetricSet")
        names = [(d.name, name) for d in set_class.definitions() for name in d.sample_names()]
        for metric, name in names:
            owner = self._owners.get(name, set_class)
            if owner is not set_class:
                raise RegistryError(f"{metric} of {set_class.__name__} is taken by {owner.__name__} ({name})")
        self._owners.update({name: set_class for _, name in names})
        self._sets.setdefault(set_class, None)

    def bind(self, set_class: type[SetT], *, actor_name: str | None = None) -> SetT:
        """The cells of a set for one actor name; the same object each time.

        A name past the limit binds "__other__". Raises ActorNameError for a name that can never be admitted,
        TypeError where the set has no actor_name label and one is given, or the reverse.
        """
        self.add_set(set_class)
        if not set_class.per_actor:
            if actor_name is not None:
                raise TypeError(f"{set_class.__name__} has no actor_name label; bind it without one")
            return self._bound(set_class, self._single, "")
        if actor_name is None:
            raise TypeError(
                f"{set_class.__name__} is labelled by actor_name; pass actor_name='...' (there is no default)"
            )
        admission = self._names.get(actor_name) or self._names.admit(actor_name)
        return self._bound(set_class, admission.bound, admission.name)

    def _bound(self, set_class: type[SetT], bound: dict[type[MetricSet], Any], name: str) -> SetT:
        found: SetT | None = bound.get(set_class)
        if found is not None:
            return found
        exemplars = Exemplars(self._dropped) if self._dropped else None  # none for the exporter itself
        block = self._memory.block(f"{set_class.__name__}/{name}", set_class.layout.image, exemplars)
        new = set_class._bind(name, block, exemplars, self._overflows, time.time())
        return cast("SetT", bound.setdefault(set_class, new))

    def actor(self, actor_name: str) -> ActorMetrics:
        """The built-in metrics of one kind of actor, with the helpers that keep them right."""
        admission = self._names.get(actor_name) or self._names.admit(actor_name)
        if admission.actor:
            return cast("ActorMetrics", admission.actor[0])
        cells: list[Any] = []
        for set_class in self._actor_sets:
            self.add_set(set_class)
            cells.append(self._bound(set_class, admission.bound, admission.name))
        admission.actor.append(self._new_actor(admission.name, *cells))
        return cast("ActorMetrics", admission.actor[0])  # another thread may have been first

    def release(self, actor_name: str) -> bool:
        """End an actor name: its series leave, its place is free. Cells still held count on, seen by nobody.

        False when the name was not admitted.
        """
        return self._names.release(actor_name)

    def renew(self, set_class: type[SetT]) -> SetT:
        """Bind a set without actor_name to fresh cells; for what must not go on from a parent's numbers after a
        fork."""
        self._single.pop(set_class, None)
        return self.bind(set_class)

    # --- what is known ------------------------------------------------------------------------------------------------

    def actor_names(self) -> tuple[str, ...]:
        """The admitted actor names, oldest first."""
        return self._names.all()

    def sets(self) -> tuple[type[MetricSet], ...]:
        """The sets that are known, in the order of their coming."""
        return tuple(self._sets)

    def budget(self) -> Budget:
        """The worst case of series and sample lines of every known set, for each actor name and in total."""
        sets = list(self._sets)
        return budget((d for known in sets for d in known.definitions()), self._names.limit)

    def overflows(self) -> Mapping[tuple[str, str], Overflow]:
        """(metric, label) to how many values counted as "__other__", with samples; metric "*" for actor names."""
        return self._overflows.table()

    @property
    def catalog_version(self) -> str:
        """The version of the metrics that rkmetrics ships: a digest of their definitions."""
        from rkmetrics.catalogue import catalog_version

        return catalog_version()

    @property
    def node(self) -> Node:
        """The vitals of this process, as a set that the middleware and the collectors keep."""
        from rkmetrics.catalogue.node import Node

        return self.bind(Node)

    def vitals(self) -> Vitals:
        """The vitals of this process, refreshed at most once a second."""
        read: Callable[[Registry], Vitals] = import_module("rkmetrics.collectors.vitals").read
        return read(self)

    def watch_loop(self) -> None:
        """Measure the lag of the running event loop; nothing without one, or where this registry has builtin=False."""
        if self._builtin:
            with suppress(RuntimeError):  # another kind of loop than asyncio's
                import_module(f"{BUILTIN}.eventloop").watch(self)

    def part(self, make: Callable[[Registry], PartT]) -> PartT:
        """The one object of a kind that belongs to this registry, made when it is first asked for."""
        found = self._parts.get(make)
        return cast("PartT", found if found is not None else self._parts.setdefault(make, make(self)))

    # --- collection ---------------------------------------------------------------------------------------------------

    def add_refresher(self, refresh: Callable[[], object]) -> None:
        """Call a cheap, trusted function before each collection; what it raises is counted and logged."""
        self._refreshers.setdefault(refresh, None)

    def remove_refresher(self, refresh: Callable[[], object]) -> bool:
        """Forget a refresher. False when there is none."""
        return self._refreshers.pop(refresh, self) is None

    def add_collector(self, collect: Collect, *, name: str, timeout_seconds: float = 1.0) -> None:
        """Collect from elsewhere at each scrape, in a thread of its own and for at most `timeout_seconds`.

        collect: sets cells and returns None, or returns families (rkmetrics.model); may be a coroutine function. If
        it raises or is late, the scrape goes on without it, counted in rkmetrics_collector_errors_total. Raises
        RegistryError for a name in use.
        """
        if not callable(collect):
            raise RegistryError(f"collector {name!r}: {collect!r} cannot be called; pass a function without arguments")
        if not 0 < timeout_seconds <= 60:
            raise RegistryError(
                f"collector {name!r}: timeout_seconds={timeout_seconds!r}: expected more than 0, at most 60"
            )
        guarded = Guarded(name, collect, timeout_seconds, self._collector_failed)
        if self._collectors.setdefault(name, guarded) is not guarded:
            raise RegistryError(f"a collector named {name!r} is there already; choose another name, or remove that one")
        for reason in CollectorFailure:
            self.exporter.collector_errors[name, reason].inc(0)  # so that increase() sees the first failure

    def remove_collector(self, name: str) -> bool:
        """Forget a collector. False when there is none of that name."""
        return self._collectors.pop(name, None) is not None

    def sample_names(self) -> Collection[str]:
        """The names that the known sets use, for whoever must not clash with them."""
        return frozenset(self._owners)

    def collect(self, names: Collection[str] | None = None) -> tuple[Family, ...]:
        """A snapshot: one immutable family for each metric, in the order of their declaration.

        names: only families with one of these names (a family's, or one of its samples'). Never raises because of a
        collector.
        """
        self._overflows.say()
        foreign = self._foreign()
        for refresh in list(self._refreshers):
            self._refresh(refresh)
        self._describe(self.exporter)
        own = self.snapshot()
        wanted = own if names is None else [family for family in own if _wanted(family, names)]
        return (*wanted, *(family for family in foreign if names is None or _wanted(family, names)))

    def snapshot(self) -> tuple[MetricFamily, ...]:
        """The same of this registry's own cells as they stand: no collector runs, nothing waits."""
        return tuple(family for known in list(self._sets) for family in self._families(known))

    def _refresh(self, refresh: Callable[[], object]) -> None:
        try:
            refresh()
        except Exception:
            logger.exception("refreshing metrics failed: %r", refresh)
            self._collector_failed(getattr(refresh, "__name__", "refresher"), CollectorFailure.RAISED)

    def _foreign(self) -> tuple[Family, ...]:
        collectors = list(self._collectors.values())
        runs = [(guarded, time.monotonic() + guarded.timeout_seconds, guarded.start()) for guarded in collectors]
        return tuple(family for guarded, deadline, run in runs for family in guarded.finish(run, deadline))

    def _describe(self, exporter: Exporter) -> None:
        """Bring what the exporter says about itself up to date."""
        known = len(self._sets)
        if self._limit[0] != known:
            self._limit = (known, self.budget().series)
            self._start_overflows()
        exporter.series_limit.set(self._limit[1])
        exporter.actor_names.set(len(self._names))
        exporter.actor_names_limit.set(self._names.limit)
        for status, value in self.health.one_hot().items():
            exporter.health_state[status].set(value)
        if exporter.series.value is None:
            exporter.series.set(0)  # so that it counts itself from the first time on
        exporter.series.set(sum(self._count_series(known) for known in list(self._sets)))

    def _start_overflows(self) -> None:
        """Start what counts overflows at zero, so that increase() sees the first one."""
        definitions = (definition for known in list(self._sets) for definition in known.definitions())
        labels = [(d.name, label.name) for d in definitions if not d.dynamic for label in d.labels]
        for key in (("*", "actor_name"), *labels):
            self.exporter.label_overflow[key].inc(0)

    def _all(self, known: type[MetricSet]) -> list[Any]:
        """Where a set is bound."""
        if not known.per_actor:
            return [self._single[known]] if known in self._single else []
        return [bound for each in self._names.admissions() if (bound := each.bound.get(known)) is not None]

    def _count_series(self, known: type[MetricSet]) -> int:
        blocks = [bound._block for bound in self._all(known)]
        return sum(
            existing(blocks, column.offset, column.count, column.shape.width)
            for column in known.layout.columns.values()
            if column.count and not column.definition.window_seconds
        )

    def _families(self, known: type[MetricSet]) -> list[MetricFamily]:
        bound = self._all(known)
        if not bound:
            return []
        names = tuple(each.actor_name for each in bound)
        blocks = tuple(each._block for each in bound)
        starts = tuple(each.start_time for each in bound)
        carry = any(each._exemplars and each._exemplars.latest for each in bound)
        families: list[MetricFamily] = []
        for attribute, column in known.layout.columns.items():
            if column.definition.dynamic:
                cells: RegisteredCells = getattr(bound[0], attribute)
                families.append(cells.family(starts[0]))
                continue
            if column.definition.window_seconds:
                numbers = peaks(blocks, column.offset, column.peak, time.monotonic())
            else:
                numbers = gather(blocks, column.offset, column.count)
            exemplars = _exemplars(bound, column) if carry else {}
            families.append(MetricFamily(column.shape, names, memoryview(numbers).cast("d"), starts, exemplars))
        return families

    # --- what other parts show --------------------------------------------------------------------------------------

    def offer_document(self, name: str, document: Document | None) -> None:
        """Show a document at the route of that name ("kv_metrics"), in place of the one before; None: none."""
        if document is None:
            self._documents.pop(name, None)
        else:
            self._documents[name] = document

    def document(self, name: str) -> Document | None:
        """The document of that name, None where nobody offers one."""
        return self._documents.get(name)

    # --- what went wrong ----------------------------------------------------------------------------------------------

    def _count_overflow(self, metric: str, label: str) -> None:
        self.exporter.label_overflow[metric, label].inc()

    def _collector_failed(self, name: str, reason: CollectorFailure) -> None:
        self.exporter.collector_errors[name, reason].inc()

    def __repr__(self) -> str:
        return f"<Registry: {len(self._sets)} sets, {len(self._names)} of {self._names.limit} actor names>"


def _wanted(family: Family, names: Collection[str]) -> bool:
    if isinstance(family, ForeignFamily):
        return family.name in names or any(sample.name in names for sample in family.samples)
    name = family.name
    if name in names or (family.shape.type is MetricType.COUNTER and name.removesuffix("_total") in names):
        return True
    suffixes = ("_bucket", "_sum", "_count") if family.shape.type is MetricType.HISTOGRAM else ()
    return any(name + suffix in names for suffix in suffixes)


def _exemplars(bound: list[Any], column: Column) -> dict[int, Exemplar]:
    """The exemplars of one column, by position in the family's values."""
    found: dict[int, Exemplar] = {}
    for i, each in enumerate(bound):
        for offset, exemplar in dict(each._exemplars.latest).items():
            if column.offset <= offset < column.offset + column.count:
                found[i * column.count + offset - column.offset] = exemplar
    return found
