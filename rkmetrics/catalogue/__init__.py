"""The metrics that rkmetrics ships, and their version. Declarations live in the modules beside; SETS lists them.

`catalog_version` is a digest of every definition: two exporters with the same one mean the same thing by each name,
and a rule file can say for which one it was written.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from rkmetrics.metricset import MetricSet

__all__ = ["SETS", "catalog_version", "sets", "version"]

# Module and class of each set that ships. By name, so that a program loads the sets that it uses.
SETS: tuple[tuple[str, str], ...] = (
    ("rkmetrics.catalogue.actors", "Actors"),
    ("rkmetrics.catalogue.actors", "ActorKv"),
    ("rkmetrics.catalogue.kv", "KvCache"),
    ("rkmetrics.catalogue.kv", "KvPublishing"),
    ("rkmetrics.catalogue.kv", "Nats"),
    ("rkmetrics.catalogue.kv", "KvAggregation"),
    ("rkmetrics.catalogue.kv", "KvIndexing"),
    ("rkmetrics.catalogue.planes", "RpcServing"),
    ("rkmetrics.catalogue.planes", "RpcIntake"),
    ("rkmetrics.catalogue.planes", "RpcCalling"),
    ("rkmetrics.catalogue.planes", "RpcRouting"),
    ("rkmetrics.catalogue.announcing", "Announcing"),
    ("rkmetrics.catalogue.discovery", "Balancing"),
    ("rkmetrics.catalogue.etcd", "Etcd"),
    ("rkmetrics.catalogue.node", "Node"),
    ("rkmetrics.catalogue.runtime", "Process"),
    ("rkmetrics.catalogue.runtime", "Runtime"),
    ("rkmetrics.catalogue.exporter", "Exporter"),
    ("rkmetrics.catalogue.otlp", "Otlp"),
)


def sets() -> tuple[type[MetricSet], ...]:
    """Every set that ships, loaded."""
    return tuple(getattr(import_module(module), name) for module, name in SETS)


@cache
def catalog_version() -> str:
    """Eight hex digits over the definitions of all sets that ship: names, types, labels, values, bounds,
    aggregation."""
    from hashlib import sha256

    lines = sorted(
        repr(
            (
                d.name,
                d.type.value,
                [(label.name, label.values) for label in d.labels],
                d.bounds,
                d.native,
                d.across,
                d.per_actor,
            )
        )
        for each in sets()
        for d in each.definitions()
    )
    return sha256("\n".join(lines).encode()).hexdigest()[:8]


@cache
def version() -> str:
    """The version of the installed package."""
    from rkmetrics import __version__

    return __version__
