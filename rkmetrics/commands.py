"""What each command does: (arguments, settings, environment) in, one library call, text or JSON out, an exit code back.

cli.py has their table and their arguments. Findings go to stdout, trouble to stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkmetrics.errors import (
    AssetError,
    BackendError,
    KvValueError,
    PromqlError,
)
from rkmetrics.settings import SETTINGS, Secret, Settings

if TYPE_CHECKING:
    from rkmetrics.definition import MetricDefinition
    from rkmetrics.guard import Budget
    from rkmetrics.kv.aggregator import KvTotal, WorkerState
    from rkmetrics.metricset import MetricSet
    from rkmetrics.runtime import Node

__all__ = [
    "FINDINGS",
    "FINE",
    "WRONG_USE",
    "Arguments",
    "assets_aliases",
    "assets_check",
    "assets_export",
    "assets_migrate",
    "budget",
    "catalogue",
    "docs",
    "info",
    "kv_publish",
    "kv_watch",
    "lb",
    "preview",
    "rpc_call",
    "rpc_instances",
    "scrape_config",
    "serve",
    "show_settings",
    "trouble",
    "version",
]

FINE, FINDINGS, WRONG_USE = 0, 1, 2

Arguments = argparse.Namespace


def trouble(code: int, *sentences: object) -> int:
    """Say what is wrong, and return the exit code."""
    for sentence in sentences:
        print(f"rkmetrics: {sentence}", file=sys.stderr)
    return code


# --- serve ------------------------------------------------------------------------------------------------------------


def serve(arguments: Arguments, settings: Settings, environ: Mapping[str, str]) -> int:
    """Run a node until SIGINT or SIGTERM, then stop it in order."""
    from rkmetrics.runtime import Plan, running, stop_signal

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    host = settings.host if arguments.host is None else arguments.host
    told_port = arguments.metrics_port if arguments.port is None else arguments.port
    told = {field: getattr(arguments, field) for field in ANNOUNCED if getattr(arguments, field) is not None}
    port = settings.port if told_port is None else told_port
    plan = Plan(
        dataclasses.replace(settings, host=host, port=port, **told),
        app=arguments.app,
        demo=arguments.demo,
        open=arguments.open,
        any_port=arguments.demo and told_port is None and settings.port == Settings().port,
        environ=environ,
    )
    with stop_signal() as wait:
        with running(plan) as node:
            print("\n".join(_greeting(node, opened=arguments.open)), flush=True)
            print(f"{wait()}: draining, then shutting down", file=sys.stderr, flush=True)
    print("stopped", file=sys.stderr)
    return FINE


def lb(arguments: Arguments, settings: Settings, environ: Mapping[str, str]) -> int:
    """Run a balancer: it takes registrations, checks backends, and lists those that are up."""
    from rkmetrics.runtime import Plan, balancing, stop_signal

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    host = settings.host if arguments.host is None else arguments.host
    port = settings.balancer_port if arguments.port is None else arguments.port
    plan = Plan(dataclasses.replace(settings, host=host, port=port), open=arguments.open, environ=environ)
    with stop_signal() as wait:
        with balancing(plan) as node:
            print("\n".join(_balancer_greeting(node, opened=arguments.open)), flush=True)
            print(f"{wait()}: shutting down", file=sys.stderr, flush=True)
    print("stopped", file=sys.stderr)
    return FINE


def _balancer_greeting(node: Node, *, opened: bool) -> Iterable[str]:
    settings = node.registry.settings
    yield f"rkmetrics balances at {node.url}"
    for path, what in BALANCER_SHOWN:
        yield f"  {node.url}{path:<20} {what}"
    networks = ", ".join(settings.allowed_networks) or ("this host" if opened else "the address of who registers")
    yield f"Backends may be at: {networks}. They are checked each {settings.health_check_interval_seconds:g} s."
    yield OPENED if opened else ACCESS[True, settings.metrics_access]
    yield "Ctrl-C stops it."


BALANCER_SHOWN = (
    ("/register", "POST: where backends announce themselves"),
    ("/backends", "the addresses that get traffic, as JSON"),
    ("/backends?details=1", "all backends, with state and vitals"),
    ("/sd", "metrics ports for Prometheus (http_sd_configs)"),
    ("/metrics", "its own metrics"),
    ("/health", "whether it runs"),
)
ANNOUNCED = ("load_balancers", "metrics_port", "advertise_address")  # flags of serve that stand in for settings


def _greeting(node: Node, *, opened: bool) -> Iterable[str]:
    from rkmetrics import __version__
    from rkmetrics.cells import IMPLEMENTATION

    settings = node.registry.settings
    yield from node.notes
    bound = f" (bound to {node.server.url.removeprefix('http://')}, all addresses)" if node.everywhere else ""
    yield f"rkmetrics {__version__} ({IMPLEMENTATION} cells) serves at {node.url}{bound}"
    for path, what in SHOWN:
        yield f"  {node.url}{path:<12} {what}"
    yield OPENED if opened else ACCESS[settings.metrics_enabled, settings.metrics_access]
    yield "Ctrl-C stops it."


SHOWN = (
    ("/metrics", "Prometheus text, OpenMetrics or protobuf; JSON when asked for"),
    ("/health", "whether it should get traffic"),
    ("/vitals", "its vitals as JSON"),
    ("/metadata", "version, actor names, catalogue"),
    ("/telemetry", "the discovery protocol's nine families"),
    ("/kv_metrics", "the latest state of each LLM worker here"),
)
OPENED = "Metrics are open to this host, without a token."
ACCESS: Mapping[tuple[bool, str], str] = {
    (
        False,
        "token",
    ): "Metrics are closed (403). To open them: METRICS_ENABLED=1 METRICS_TOKEN=..., or --open on loopback.",
    (False, "open"): "Metrics are closed (403). To open them to everybody set METRICS_ENABLED=1 as well.",
    (True, "token"): 'Metrics ask for the token: curl -H "Authorization: Bearer $METRICS_TOKEN" ...',
    (True, "open"): "Metrics are open to whoever reaches this address.",
}


def preview(arguments: Arguments, settings: Settings, environ: Mapping[str, str]) -> int:
    """Show dashboards in a browser, against a Prometheus; by default those that ship."""
    from rkmetrics.runtime import dialable, previewing, stop_signal

    if wrong := _missing(arguments.files):
        return trouble(WRONG_USE, wrong)
    told = {} if arguments.prometheus is None else {"prometheus_url": arguments.prometheus}
    served = previewing(
        dataclasses.replace(settings, **told),
        arguments.files,
        host=arguments.host,
        port=arguments.port,
        names=arguments.name,
        prefix=arguments.prefix.rstrip("/"),
        scrape_interval_seconds=arguments.scrape_interval,
    )
    try:
        with stop_signal() as wait, served as server:
            url = f"http://{dialable(server.host, server.port)}{arguments.prefix.rstrip('/')}/"
            print(f"The dashboards are at {url}\nCtrl-C stops it.", flush=True)
            if arguments.open:
                import webbrowser

                webbrowser.open(url)
            wait()
    except AssetError as error:  # a file that is no dashboard
        return trouble(WRONG_USE, error)
    return FINE


# --- what is known ----------------------------------------------------------------------------------------------------


def info(arguments: Arguments, settings: Settings, environ: Mapping[str, str]) -> int:
    """Print what is installed and which cells run."""
    from platform import platform, python_version

    from rkmetrics import __version__
    from rkmetrics.catalogue import catalog_version
    from rkmetrics.cells import IMPLEMENTATION
    from rkmetrics.runtime import extras

    found = {
        "version": __version__,
        "cells": IMPLEMENTATION,
        "catalog": catalog_version(),
        "python": python_version(),
        "platform": platform(),
    }
    there = {extra: "installed" if installed else "missing" for extra, installed in extras().items()}
    lines = {**found, "extras": ", ".join(" ".join(pair) for pair in there.items())}
    return _print(arguments, {**found, "extras": there}, (f"{name:<9} {value}" for name, value in lines.items()))


def catalogue(arguments: Arguments, settings: Settings, environ: Mapping[str, str]) -> int:
    """Print the metrics of the sets that ship, or of an application's registry; or what changed between two lists."""
    if arguments.what == "diff":
        return _catalogue_diff(arguments)
    if arguments.files:
        return trouble(
            WRONG_USE, f"unexpected {str(arguments.files[0])!r}: files go with `rkmetrics catalogue diff A B`"
        )
    definitions = [definition for known in _sets(arguments.app) for definition in known.definitions()]
    rows = [
        {
            "name": definition.name,
            "type": definition.type.value,
            "labels": {label.name: list(label.values) or label.described for label in definition.labels},
            "per_actor_name": definition.per_actor,
            "across": definition.across,
            **({"buckets": list(definition.bounds)} if definition.bounds else {}),
            "help": definition.help,
            "renamed_from": [rename.name for rename in definition.renamed_from],
        }
        for definition in definitions
    ]
    return _print(arguments, rows, (_catalogue_line(row) for row in rows))


def _catalogue_diff(arguments: Arguments) -> int:
    from rkmetrics.assets.catalogue_diff import BREAKS, UNEXPLAINED, diff, load

    if len(arguments.files) != 2:
        return trouble(WRONG_USE, "expected two files, old and new, that `rkmetrics catalogue --json` printed")
    try:
        old, new = (load(path.read_text(encoding="utf-8"), str(path)) for path in arguments.files)
    except (AssetError, OSError, UnicodeDecodeError) as error:
        return trouble(WRONG_USE, error)
    changes = diff(old, new)
    _print(
        arguments, [dataclasses.asdict(change) for change in changes], map(str, changes) if changes else ("no change",)
    )
    return FINDINGS if any(change.effect in (BREAKS, UNEXPLAINED) for change in changes) else FINE


def _catalogue_line(row: Mapping[str, Any]) -> str:
    labels = [*(["actor_name"] if row["per_actor_name"] else []), *row["labels"]]
    name = f"{row['name']}{{{','.join(labels)}}}" if labels else row["name"]
    return f"{row['type']:<9} {name}  {row['help']}"


def _sets(app: str | None) -> Iterable[type[MetricSet]]:
    if app is None:
        from rkmetrics.catalogue import sets

        return sets()
    from rkmetrics.runtime import load_registry

    return load_registry(app).sets()


def budget(arguments: Arguments, settings: Settings, environ: Mapping[str, str]) -> int:
    """Print the worst case of series and sample lines, before anything runs."""
    from rkmetrics.guard import budget as add_up

    definitions = [definition for known in _sets(arguments.app) for definition in known.definitions()]
    total = add_up(definitions, settings.max_actor_names)
    found = {
        "actor_names": total.actor_names,
        "per_actor_name": {"series": total.series_per_name, "lines": total.lines_per_name},
        "total": {"series": total.series, "lines": total.lines},
        "metrics": [dataclasses.asdict(metric) for metric in total.metrics],
    }
    return _print(arguments, found, _budget_lines(total))


def _budget_lines(total: Budget) -> Iterable[str]:
    yield f"{'metric':<60} {'series/name':>11} {'lines/name':>11} {'series':>9} {'lines':>9}"
    for metric in sorted(total.metrics, key=lambda metric: -metric.lines):
        yield (
            f"{metric.metric:<60} {metric.series_per_name or '':>11} {metric.lines_per_name or '':>11} "
            f"{metric.series:>9} {metric.lines:>9}"
        )
    yield f"{'total':<60} {total.series_per_name:>11} {total.lines_per_name:>11} {total.series:>9} {total.lines:>9}"
    yield f"at {total.actor_names} actor names (RKMETRICS_MAX_ACTOR_NAMES) and __other__ beside them"


def show_settings(arguments: Arguments, settings: Settings, environ: Mapping[str, str]) -> int:
    """Print every setting in force, where it comes from, and nothing secret."""
    rows = [
        {"name": setting.variable, "value": setting.show(settings), "from": (setting.find(environ) or ("default",))[0]}
        for setting in SETTINGS
    ]
    return _print(arguments, rows, (f"{row['name']:<36} {row['value']:<30} {row['from']}".rstrip() for row in rows))


# --- what is written --------------------------------------------------------------------------------------------------


def scrape_config(arguments: Arguments, settings: Settings, environ: Mapping[str, str]) -> int:
    """Print the Prometheus configuration that fits the settings."""
    from rkmetrics.assets.scrape_config import scrape_config as write
    from rkmetrics.runtime import dialable

    if not arguments.target and settings.port == 0:
        return trouble(WRONG_USE, "RKMETRICS_PORT=0 takes a free port: name it with --target HOST:PORT")
    targets = tuple(arguments.target) or (dialable(settings.host, settings.port),)
    closed = _why_closed(settings)
    print(f"# Metrics are closed: {closed} where the node runs.\n" if closed else "", end="")
    if settings.metrics_access == "token":
        print(ONE_LINE)
    text = write(
        dataclasses.replace(settings, metrics_enabled=True),  # what keeps them closed is said above
        targets,
        job=arguments.job,
        path=f"{arguments.prefix.rstrip('/')}/metrics",
        credentials_file=arguments.credentials_file,
    )
    print(text, end="")
    return FINDINGS if closed else FINE


ONE_LINE = "# credentials_file holds one line, the token: of a METRICS_TOKEN_FILE with two lines, the first."


def _why_closed(settings: Settings) -> str:
    """Return what is wrong and what to set; "" for a gate that can open."""
    from rkmetrics.runtime import why_no_token

    reason = why_no_token(settings)
    missing = [] if settings.metrics_enabled else ["METRICS_ENABLED=1"]
    if reason:
        missing.append("METRICS_TOKEN or METRICS_TOKEN_FILE")
    return f"{reason and f'{reason}; '}set {' and '.join(missing)}" if missing else ""


def docs(arguments: Arguments, settings: Settings, environ: Mapping[str, str]) -> int:
    """Write the generated pages, or with --check only say which are not current."""
    from rkmetrics.assets import stamp
    from rkmetrics.assets.docs import PAGES, stale, write

    folder = arguments.folder or Path("docs")
    if arguments.folder is None and not any((folder / name).is_file() for name in PAGES):
        page = folder / next(iter(PAGES))
        return trouble(WRONG_USE, f"there is no {page} in {Path.cwd()}; go to the repository, or name a folder")
    if not folder.is_dir():
        return trouble(WRONG_USE, f"{folder} is no folder; make it first, or name one that is there")
    changed = [folder / name for name in (stale if arguments.check else write)(folder)]
    changed += (stamp.stale if arguments.check else stamp.write)(folder.parent / "alerts")
    for path in changed:
        print(path)
    return FINDINGS if changed and arguments.check else FINE


# --- dashboards and rules ---------------------------------------------------------------------------------------------


def assets_check(arguments: Arguments, settings: Settings, environ: Mapping[str, str]) -> int:
    """Check the queries of dashboards and rule files against the catalogue."""
    from rkmetrics.assets.checking import check_files
    from rkmetrics.assets.report import FORMATS
    from rkmetrics.assets.rules import CHECKS, SYNTAX, UNREADABLE
    from rkmetrics.assets.tables import names

    wrong = _unknown("--ignore", arguments.ignore, [*(check.name for check in CHECKS), SYNTAX, UNREADABLE])
    wrong = wrong or _unknown("--table", arguments.table, names()) or _missing(arguments.files)
    if wrong:
        return trouble(WRONG_USE, wrong)
    found = check_files(
        arguments.files,
        _definitions(arguments.app),
        tables=arguments.table,
        labels=arguments.label,
        ignore=arguments.ignore,
    )
    print(FORMATS[arguments.format](found), end="")
    print(f"{found.queries} queries in {found.files} files: {len(found)} problems", file=sys.stderr)
    return FINDINGS if found else FINE


def assets_migrate(arguments: Arguments, settings: Settings, environ: Mapping[str, str]) -> int:
    """Rewrite old names in dashboards and rule files, in place; say what cannot be rewritten."""
    from rkmetrics.assets.migrate import write
    from rkmetrics.assets.migrating import migrate_files, unified
    from rkmetrics.assets.report import as_text
    from rkmetrics.assets.tables import names

    tables = arguments.table or ["catalogue"]
    if wrong := _unknown("--table", tables, names()) or _missing(arguments.files):
        return trouble(WRONG_USE, wrong)
    left = queries = files = 0
    for each in migrate_files(arguments.files, tables, dict(arguments.label), _definitions(arguments.app)):
        queries, files, left = queries + each.queries, files + each.changed, left + len(each.problems)
        if arguments.diff:
            print(unified(each), end="")
        elif each.changed and arguments.check:
            print(each.file)
        elif each.changed:
            write(Path(each.file), each.text)
        print(as_text(each.problems), end="", file=sys.stderr)
    dry = arguments.diff or arguments.check
    done = "to rewrite" if dry else "rewritten"
    print(f"{queries} queries {done} in {files} files; {left} that cannot be", file=sys.stderr)
    return FINDINGS if left or (dry and files) else FINE


def assets_aliases(arguments: Arguments, settings: Settings, environ: Mapping[str, str]) -> int:
    """Print recording rules that keep old names alive until the version that ends each."""
    from rkmetrics import __version__
    from rkmetrics.assets.aliases import aliases, rule_file

    version = arguments.version or __version__
    definitions = [definition for known in _sets(arguments.app) for definition in known.definitions()]
    print(rule_file(aliases(definitions, version, keep=arguments.keep), version), end="")
    return FINE


def assets_export(arguments: Arguments, settings: Settings, environ: Mapping[str, str]) -> int:
    """Write the dashboards and rules that ship for Grafana, Prometheus or Kubernetes, with your choices in them."""
    from rkmetrics.assets import export

    names = [field.name for field in dataclasses.fields(export.Choices) if field.name != "labels"]
    told: dict[str, Any] = {name: getattr(arguments, name) or "" for name in names}
    choices = export.Choices(labels=dict(arguments.labels), **told)
    if wrong := export.unused(arguments.target, choices):
        return trouble(WRONG_USE, wrong)
    try:
        files = export.export(arguments.target, choices)
    except (AssetError, PromqlError) as error:
        return trouble(WRONG_USE, error)
    if arguments.output is None:
        print(export.stream(files), end="")
        return FINE
    if not arguments.force and (taken := export.conflicts(files, arguments.output)):
        return trouble(WRONG_USE, *(f"{path}: is there already, and differs; --force overwrites it" for path in taken))
    print(*export.write(files, arguments.output), sep="\n")
    return FINE


def _definitions(app: str | None) -> list[MetricDefinition]:
    """An application's own metrics, which come beside those that ship."""
    return [definition for known in _sets(app) for definition in known.definitions()] if app else []


def _unknown(flag: str, given: Iterable[str], known: Sequence[str]) -> str:
    wrong = next((name for name in given if name not in known), None)
    return "" if wrong is None else f"{flag} {wrong}: expected one of: {', '.join(known)}"


def _missing(paths: Iterable[Path]) -> str:
    gone = next((path for path in paths if not path.exists()), None)
    return "" if gone is None else f"{gone}: no such file or folder"


def version(arguments: Arguments, settings: Settings, environ: Mapping[str, str]) -> int:
    """Print the version."""
    from rkmetrics import __version__

    return _print(arguments, {"version": __version__}, (__version__,))


def _print(arguments: Arguments, found: object, lines: Iterable[str]) -> int:
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(lines))
    return FINE


# --- KV metrics -------------------------------------------------------------------------------------------------------


def kv_watch(arguments: Arguments, settings: Settings, environ: Mapping[str, str]) -> int:
    """Show LLM workers as a live table: those at URLs by polling, or else those that publish over NATS."""
    import asyncio

    from rkmetrics.kv.watch import document, frame, watch
    from rkmetrics.registry import Registry

    registry = Registry(settings, builtin=False)
    if not arguments.url and (why := _why_without_nats(settings)):
        return trouble(WRONG_USE, f"{why}: name URLs to poll, or set NATS_SERVER")
    clear = "\x1b[H\x1b[J" if sys.stdout.isatty() and not arguments.once else ""

    def show(states: list[WorkerState], total: KvTotal) -> None:
        text = json.dumps(document(states, total)) if arguments.json else frame(states, total)
        print(f"{clear}{text}", flush=True)

    watching = watch(registry, show, urls=arguments.url, token=_first_token(settings), once=arguments.once)
    try:
        return FINE if asyncio.run(watching) else FINDINGS
    except KvValueError as error:  # of a URL
        return trouble(WRONG_USE, error)
    except KeyboardInterrupt:
        return FINE


def kv_publish(arguments: Arguments, settings: Settings, environ: Mapping[str, str]) -> int:
    """Publish the states of a worker that is not there over NATS, for trying out."""
    import asyncio

    from rkmetrics.kv.plane import KvPlane
    from rkmetrics.kv.publisher import WorkerMetricsPublisher
    from rkmetrics.kv.watch import simulate
    from rkmetrics.registry import Registry

    if why := _why_without_nats(settings):
        return trouble(WRONG_USE, f"{why}: nobody would hear of it; set NATS_SERVER, or RKMETRICS_KV_PLANE=nats")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    registry = Registry(settings, builtin=False)
    publisher = WorkerMetricsPublisher(registry, actor_name="trial", worker_id=arguments.worker_id)
    print(f"worker {publisher.worker_id} of namespace {settings.namespace}, wire {settings.wire}", flush=True)
    with suppress(KeyboardInterrupt):
        asyncio.run(
            simulate(publisher, blocks=arguments.blocks, count=arguments.count, interval_seconds=arguments.interval)
        )
    plane = KvPlane.of(registry)
    plane.close()
    return FINE if plane.sent else trouble(FINDINGS, "nothing was sent: NATS was not reached")


def rpc_call(arguments: Arguments, settings: Settings, environ: Mapping[str, str]) -> int:
    """Call an endpoint of a request plane, and print the items of its answer as lines of JSON."""
    import asyncio

    from rkmetrics.cli_rpc import call

    def show(line: str) -> None:
        print(line, flush=True)

    calling = call(
        settings,
        arguments.endpoint,
        arguments.request,
        show,
        instances=arguments.instances,
        instance_id=arguments.to,
        timeout_seconds=arguments.timeout,
    )
    try:
        asyncio.run(calling)
    except BackendError as error:  # of --instances
        return trouble(WRONG_USE, error)
    except KeyboardInterrupt:
        return FINDINGS
    return FINE


def rpc_instances(arguments: Arguments, settings: Settings, environ: Mapping[str, str]) -> int:
    """List who serves an endpoint, of all planes; exit 1 when nobody does."""
    import asyncio

    from rkmetrics.cli_rpc import list_instances

    try:
        found = asyncio.run(list_instances(settings, arguments.endpoint, instances=arguments.instances))
    except BackendError as error:
        return trouble(WRONG_USE, error)
    _print(arguments, found, (f"{row['instance']:>16}  {row['plane']:<5} {row['place']}" for row in found))
    return FINE if found else FINDINGS


def _why_without_nats(settings: Settings) -> str | None:
    from rkmetrics.kv.plane import why_without_nats

    return why_without_nats(settings)


def _first_token(settings: Settings) -> Secret | None:
    """The token that the targets know as well, if this environment is theirs."""
    if settings.metrics_token_file is None:
        return settings.metrics_token
    lines = Path(settings.metrics_token_file).read_bytes().split()
    return Secret(lines[0]) if lines else settings.metrics_token
