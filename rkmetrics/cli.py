"""The command line: arguments in, one library call, text or JSON out.

Findings go to stdout, trouble to stderr. Exit codes: 0 fine, 1 findings (something differs, is closed, is not current),
2 wrong use, a setting that cannot be used, or an output that cannot be written. A command is a row in COMMANDS and a
function of (arguments, settings, environment).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rkmetrics.errors import RkMetricsError, ServeError, SettingsError
from rkmetrics.settings import SETTINGS, Settings

if TYPE_CHECKING:
    from rkmetrics.guard import Budget
    from rkmetrics.metricset import MetricSet
    from rkmetrics.runtime import Node

__all__ = [
    "COMMANDS",
    "Command",
    "budget",
    "catalogue",
    "docs",
    "info",
    "main",
    "scrape_config",
    "serve",
    "show_settings",
    "version",
]

FINE, FINDINGS, WRONG_USE = 0, 1, 2

Arguments = argparse.Namespace


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Run one command; return its exit code."""
    environ = os.environ if environ is None else environ
    try:
        try:
            return _run(argv, environ)
        finally:  # here, where a failure can still be told; argparse ends with SystemExit
            print(end="", flush=True)
    except (ServeError, SettingsError) as error:
        return _trouble(WRONG_USE, error, *getattr(error, "__notes__", ()))
    except RkMetricsError as error:
        return _trouble(FINDINGS, error)
    except BrokenPipeError:  # `rkmetrics catalogue | head`: nobody reads on
        _drop_output()
        return FINE
    except OSError as error:
        _drop_output()
        where = f"{error.filename}: " if error.filename else ""
        return _trouble(WRONG_USE, f"{where}{error.strerror or error}; the output is not complete")


def _run(argv: Sequence[str] | None, environ: Mapping[str, str]) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.run is None:
        parser.print_help(sys.stderr)
        return WRONG_USE
    return int(arguments.run(arguments, Settings.from_env(environ), environ))


def _trouble(code: int, *sentences: object) -> int:
    for sentence in sentences:
        print(f"rkmetrics: {sentence}", file=sys.stderr)
    return code


def _drop_output() -> None:
    """Send what is still in the buffer nowhere, since the interpreter tries to write it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- serve ------------------------------------------------------------------------------------------------------------


def serve(arguments: Arguments, settings: Settings, environ: Mapping[str, str]) -> int:
    """Run a node until SIGINT or SIGTERM, then stop it in order."""
    from rkmetrics.runtime import Plan, running, stop_signal

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    host = settings.host if arguments.host is None else arguments.host
    port = settings.port if arguments.port is None else arguments.port
    plan = Plan(
        dataclasses.replace(settings, host=host, port=port),
        app=arguments.app,
        demo=arguments.demo,
        open=arguments.open,
        any_port=arguments.demo and arguments.port is None and settings.port == Settings().port,
        environ=environ,
    )
    with stop_signal() as wait:
        with running(plan) as node:
            print("\n".join(_greeting(node, opened=arguments.open)), flush=True)
            print(f"{wait()}: draining, then shutting down", file=sys.stderr, flush=True)
    print("stopped", file=sys.stderr)
    return FINE


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
    """Print the metrics of the sets that ship, or of an application's registry."""
    definitions = [definition for known in _sets(arguments.app) for definition in known.definitions()]
    rows = [
        {
            "name": definition.name,
            "type": definition.type.value,
            "labels": {label.name: list(label.values) or label.described for label in definition.labels},
            "per_actor_name": definition.per_actor,
            "across": definition.across,
            "help": definition.help,
            "renamed_from": [rename.name for rename in definition.renamed_from],
        }
        for definition in definitions
    ]
    return _print(arguments, rows, (_catalogue_line(row) for row in rows))


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
        return _trouble(WRONG_USE, "RKMETRICS_PORT=0 takes a free port: name it with --target HOST:PORT")
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
    from rkmetrics.assets.docs import PAGES, stale, write

    folder = arguments.folder or Path("docs")
    if arguments.folder is None and not any((folder / name).is_file() for name in PAGES):
        page = folder / next(iter(PAGES))
        return _trouble(WRONG_USE, f"there is no {page} in {Path.cwd()}; go to the repository, or name a folder")
    if not folder.is_dir():
        return _trouble(WRONG_USE, f"{folder} is no folder; make it first, or name one that is there")
    changed = (stale if arguments.check else write)(folder)
    for name in changed:
        print(folder / name)
    return FINDINGS if changed and arguments.check else FINE


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


# --- the arguments ----------------------------------------------------------------------------------------------------

Run = Callable[[Arguments, Settings, Mapping[str, str]], int]
Argument = tuple[tuple[str, ...], dict[str, Any]]


class Command(NamedTuple):
    """One command: its words, what runs, and its arguments as argparse takes them."""

    words: tuple[str, ...]
    run: Run
    arguments: tuple[Argument, ...] = ()


def _as_setting(field: str) -> Callable[[str], Any]:
    """Make the reader of an argument that stands in for a setting."""
    parser = next(setting.parser for setting in SETTINGS if setting.field == field)

    def read(text: str) -> Any:
        try:
            return parser.parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {parser.expected}") from None

    return read


def _matching(pattern: str, expected: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if not (re.fullmatch(pattern, text) and text.isprintable()):
            raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
        return text

    return read


def _target(text: str) -> str:
    """Take host:port as Prometheus does: no scheme, no path, an IPv6 address in brackets."""
    host, _, port = text.rpartition(":")
    named = re.fullmatch(r"[^\s:/@?#\[\],]+|\[[0-9A-Fa-f:.]+\]", host)
    if not (named and text.isprintable() and re.fullmatch(r"[0-9]{1,5}", port) and 1 <= int(port) <= 65_535):
        raise argparse.ArgumentTypeError(f"{text!r}: expected HOST:PORT, such as node-2:9090 or [::1]:9090")
    return text


def _optional(word: str) -> Argument:
    """The second word of a command that has only one so far."""
    return (("what",), {"nargs": "?", "choices": (word,), "default": word, "help": argparse.SUPPRESS})


JSON: Argument = (("--json",), {"action": "store_true", "help": "print JSON"})
APP: Argument = (("--app",), {"metavar": "MODULE:REGISTRY", "help": "an application's registry, instead of our own"})

COMMANDS: tuple[Command, ...] = (
    Command(
        ("serve",),
        serve,
        (
            APP,
            (("--demo",), {"action": "store_true", "help": "simulate a fleet of actors and an LLM worker"}),
            (("--open",), {"action": "store_true", "help": "serve metrics without a token; loopback addresses only"}),
            (("--host",), {"type": _as_setting("host"), "help": "address to bind (RKMETRICS_HOST)"}),
            (("--port",), {"type": _as_setting("port"), "help": "port to bind, 0 for a free one (RKMETRICS_PORT)"}),
        ),
    ),
    Command(("info",), info, (JSON,)),
    Command(("catalogue",), catalogue, (_optional("list"), APP, JSON)),
    Command(("budget",), budget, (APP, JSON)),
    Command(("settings",), show_settings, (_optional("show"), JSON)),
    Command(
        ("scrape-config",),
        scrape_config,
        (
            (
                ("--target",),
                {"action": "append", "default": [], "metavar": "HOST:PORT", "type": _target, "help": "may be repeated"},
            ),
            (("--job",), {"default": "rkmetrics", "type": _matching(r".*\S.*", "a name"), "help": "job_name"}),
            (
                ("--prefix",),
                {
                    "default": "",
                    "type": _matching(r"(/[^\s?#]*)?", "a path that begins with /"),
                    "help": "path under which the routes are mounted",
                },
            ),
            (("--credentials-file",), {"metavar": "FILE", "help": "file from which Prometheus reads the token"}),
        ),
    ),
    Command(
        ("assets", "docs"),
        docs,
        (
            (("--check",), {"action": "store_true", "help": "write nothing; exit 1 when a page is not current"}),
            (("folder",), {"nargs": "?", "type": Path, "help": "where they are; docs in the repository"}),
        ),
    ),
    Command(("version",), version, (JSON,)),
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rkmetrics", description="Metrics for actor fleets and LLM workers.")
    parser.set_defaults(run=None)
    groups: dict[tuple[str, ...], Any] = {(): parser.add_subparsers(metavar="COMMAND", required=False)}
    for command in COMMANDS:
        _add(groups, command)
    return parser


def _add(groups: dict[tuple[str, ...], Any], command: Command) -> None:
    """Add a command under its first word; a command of two words makes that a group."""
    summary = str(command.run.__doc__)
    path: tuple[str, ...] = ()
    for word in command.words[:-1]:
        if (*path, word) not in groups:
            group = groups[path].add_parser(word, help=summary)
            group.set_defaults(run=None)
            groups[*path, word] = group.add_subparsers(metavar="COMMAND", required=True)
        path = (*path, word)
    leaf = groups[path].add_parser(command.words[-1], help=summary, description=summary)
    leaf.set_defaults(run=command.run)
    for names, options in command.arguments:
        leaf.add_argument(*names, **options)


if __name__ == "__main__":
    sys.exit(main())
