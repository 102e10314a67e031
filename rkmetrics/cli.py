"""The command line: arguments in, one library call, text or JSON out.

Findings go to stdout, trouble to stderr. Exit codes: 0 fine, 1 findings (something differs, is closed, is not current),
2 wrong use, a setting that cannot be used, or an output that cannot be written. A command is a row in COMMANDS and a
function in commands.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rkmetrics import commands
from rkmetrics.commands import Arguments
from rkmetrics.errors import (
    RkMetricsError,
    ServeError,
    SettingsError,
)
from rkmetrics.settings import SETTINGS, Parser, Settings, seconds, whole

__all__ = ["COMMANDS", "Command", "main"]


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Run one command; return its exit code."""
    environ = os.environ if environ is None else environ
    try:
        try:
            return _run(argv, environ)
        finally:  # here, where a failure can still be told; argparse ends with SystemExit
            print(end="", flush=True)
    except (ServeError, SettingsError) as error:
        return commands.trouble(commands.WRONG_USE, error, *getattr(error, "__notes__", ()))
    except RkMetricsError as error:
        return commands.trouble(commands.FINDINGS, error)
    except BrokenPipeError:  # `rkmetrics catalogue | head`: nobody reads on
        _drop_output()
        return commands.FINE
    except OSError as error:
        _drop_output()
        where = f"{error.filename}: " if error.filename else ""
        return commands.trouble(commands.WRONG_USE, f"{where}{error.strerror or error}; the output is not complete")


def _run(argv: Sequence[str] | None, environ: Mapping[str, str]) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.run is None:
        parser.print_help(sys.stderr)
        return commands.WRONG_USE
    return int(arguments.run(arguments, Settings.from_env(environ), environ))


def _drop_output() -> None:
    """Send what is still in the buffer nowhere, since the interpreter tries to write it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    return _reader(next(setting.parser for setting in SETTINGS if setting.field == field))


def _reader(parser: Parser) -> Callable[[str], Any]:
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


def _renaming(text: str) -> tuple[str, str]:
    match = re.fullmatch(r"([A-Za-z_]\w*)=([A-Za-z_]\w*)", text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected OLD=NEW, such as model_name=actor_name")
    return match[1], match[2]


# Kubernetes, "Object Names and IDs" and "Labels and Selectors".
_DNS = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_LABEL = re.compile(
    r"([A-Za-z0-9.-]+/)?[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?=([A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?)?", re.A
)


def _endpoint(text: str) -> str:
    if not re.fullmatch(r"([A-Za-z0-9_-]+\.){1,2}[A-Za-z0-9_-]+", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r}: expected COMPONENT.ENDPOINT or NAMESPACE.COMPONENT.ENDPOINT")
    return text


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None


def _id(text: str) -> int:
    if not re.fullmatch(r"[0-9a-fA-F]{1,16}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected an id in hexadecimal, as `rpc instances` prints it")
    return int(text, 16)


def _label(text: str) -> tuple[str, str]:
    if not _LABEL.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected KEY=VALUE, such as release=monitoring")
    key, _, value = text.partition("=")
    return key, value


def _choice(flag: str, pattern: str, expected: str, metavar: str, about: str) -> Argument:
    return (flag,), {"type": _matching(pattern, expected), "metavar": metavar, "help": about}


def _optional(word: str) -> Argument:
    """The second word of a command that has only one so far."""
    return (("what",), {"nargs": "?", "choices": (word,), "default": word, "help": argparse.SUPPRESS})


FILES: Argument = (
    ("files",),
    {"nargs": "+", "type": Path, "metavar": "FILE", "help": "dashboards, rule files, folders"},
)
JSON: Argument = (("--json",), {"action": "store_true", "help": "print JSON"})
APP: Argument = (("--app",), {"metavar": "MODULE:REGISTRY", "help": "an application's registry, instead of our own"})
ENDPOINT: Argument = (("endpoint",), {"type": _endpoint, "metavar": "ENDPOINT", "help": "such as backend.generate"})
INSTANCES: Argument = (
    ("--instances",),
    {
        "action": "append",
        "metavar": "HOST:PORT",
        "help": "ask this one, not etcd or load balancers; host:port, a URL or a subject; may be repeated",
    },
)

COMMANDS: tuple[Command, ...] = (
    Command(
        ("serve",),
        commands.serve,
        (
            APP,
            (("--demo",), {"action": "store_true", "help": "simulate a fleet of actors and an LLM worker"}),
            (("--open",), {"action": "store_true", "help": "serve metrics without a token; loopback addresses only"}),
            (("--host",), {"type": _as_setting("host"), "help": "address to bind (RKMETRICS_HOST)"}),
            (("--port",), {"type": _as_setting("port"), "help": "port to bind, 0 for a free one (RKMETRICS_PORT)"}),
            (
                ("--discovery-lb",),
                {
                    "dest": "load_balancers",
                    "metavar": "HOST:PORT,...",
                    "type": _as_setting("load_balancers"),
                    "help": "load balancers to announce this node to (RKMETRICS_LOAD_BALANCERS)",
                },
            ),
            (
                ("--metrics-port",),
                {
                    "type": _as_setting("metrics_port"),
                    "help": "metrics port to announce, and to bind unless --port names another",
                },
            ),
            (
                ("--advertise",),
                {
                    "dest": "advertise_address",
                    "metavar": "HOST[:PORT]",
                    "type": _as_setting("advertise_address"),
                    "help": "address to announce (RKMETRICS_ADVERTISE_ADDRESS)",
                },
            ),
        ),
    ),
    Command(
        ("lb",),
        commands.lb,
        (
            (("--open",), {"action": "store_true", "help": "no token is asked for; loopback addresses only"}),
            (("--host",), {"type": _as_setting("host"), "help": "address to bind (RKMETRICS_HOST)"}),
            (
                ("--port",),
                {"type": _as_setting("balancer_port"), "help": "port to bind, 0 for a free one (RKMETRICS_LB_PORT)"},
            ),
        ),
    ),
    Command(
        ("preview",),
        commands.preview,
        (
            (
                ("files",),
                {"nargs": "*", "type": Path, "metavar": "DASHBOARD", "help": "Grafana JSON, or folders of it"},
            ),
            (
                ("--prometheus",),
                {"type": _as_setting("prometheus_url"), "metavar": "URL", "help": "(RKMETRICS_PROMETHEUS_URL)"},
            ),
            (("--host",), {"type": _as_setting("host"), "default": "127.0.0.1", "help": "to bind (%(default)s)"}),
            (("--port",), {"type": _as_setting("port"), "default": 0, "help": "to bind; a free one by default"}),
            (("--open",), {"action": "store_true", "help": "open it in the browser"}),
            (
                ("--scrape-interval",),
                {"type": _reader(seconds(0.1, 3_600)), "default": 15.0, "metavar": "SECONDS", "help": "(%(default)s)"},
            ),
            (
                ("--name",),
                {"action": "append", "default": [], "metavar": "HOST", "help": "a further name of this server"},
            ),
            (
                ("--prefix",),
                {
                    "default": "",
                    "type": _matching(r"(/[A-Za-z0-9._~-]+)*/?", "a path such as /preview"),
                    "help": "path under which a proxy passes requests on, if it leaves it in place",
                },
            ),
        ),
    ),
    Command(("info",), commands.info, (JSON,)),
    Command(
        ("catalogue",),
        commands.catalogue,
        (
            (("what",), {"nargs": "?", "choices": ("list", "diff"), "default": "list", "help": "list, or diff A B"}),
            (
                ("files",),
                {"nargs": "*", "type": Path, "metavar": "FILE", "help": "of diff: what --json printed, then and now"},
            ),
            APP,
            JSON,
        ),
    ),
    Command(("budget",), commands.budget, (APP, JSON)),
    Command(("settings",), commands.show_settings, (_optional("show"), JSON)),
    Command(
        ("scrape-config",),
        commands.scrape_config,
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
        ("kv", "watch"),
        commands.kv_watch,
        (
            (("url",), {"nargs": "*", "metavar": "URL", "help": "poll /kv_metrics there, with METRICS_TOKEN"}),
            (("--once",), {"action": "store_true", "help": "print one table and end; exit 1 when nobody is heard"}),
            JSON,
        ),
    ),
    Command(
        ("kv", "publish"),
        commands.kv_publish,
        (
            (
                ("--worker-id",),
                {"type": _reader(whole(0, 2**64 - 1)), "metavar": "ID", "help": "a random one by default"},
            ),
            (
                ("--blocks",),
                {"type": _reader(whole(1, 2**40)), "default": 1000, "help": "of its KV cache (%(default)s)"},
            ),
            (("--count",), {"type": _reader(whole(0, 2**40)), "default": 0, "help": "publications; 0 for no end"}),
            (
                ("--interval",),
                {"type": _reader(seconds(0.001, 3_600)), "default": 0.1, "metavar": "SECONDS", "help": "(%(default)s)"},
            ),
        ),
    ),
    Command(
        ("rpc", "call"),
        commands.rpc_call,
        (
            ENDPOINT,
            (("request",), {"type": _json, "metavar": "JSON", "help": "what is asked"}),
            INSTANCES,
            (("--to",), {"type": _id, "metavar": "ID", "help": "the instance that is asked, in hexadecimal"}),
            (
                ("--timeout",),
                {"type": _reader(seconds(0.001, 86_400)), "metavar": "SECONDS", "help": "for all of the answer"},
            ),
        ),
    ),
    Command(("rpc", "instances"), commands.rpc_instances, (ENDPOINT, INSTANCES, JSON)),
    Command(
        ("assets", "docs"),
        commands.docs,
        (
            (("--check",), {"action": "store_true", "help": "write nothing; exit 1 when a page is not current"}),
            (("folder",), {"nargs": "?", "type": Path, "help": "where they are; docs in the repository"}),
        ),
    ),
    Command(
        ("assets", "check"),
        commands.assets_check,
        (
            FILES,
            APP,
            (
                ("--format",),
                {
                    "choices": ("text", "json", "sarif", "github"),
                    "default": "text",
                    "help": "of the report (%(default)s)",
                },
            ),
            (("--json",), {"dest": "format", "action": "store_const", "const": "json", "help": "--format json"}),
            (
                ("--label",),
                {
                    "action": "append",
                    "default": [],
                    "metavar": "NAME",
                    "help": "a label that your relabelling attaches",
                },
            ),
            (
                ("--table",),
                {
                    "action": "append",
                    "default": [],
                    "metavar": "TABLE",
                    "help": "report the old names of this table too",
                },
            ),
            (("--ignore",), {"action": "append", "default": [], "metavar": "CHECK", "help": "leave a check out"}),
        ),
    ),
    Command(
        ("assets", "migrate"),
        commands.assets_migrate,
        (
            FILES,
            APP,
            (
                ("--table",),
                {
                    "action": "append",
                    "default": [],
                    "metavar": "TABLE",
                    "help": "catalogue, dynamo, vllm, rivetkit:B-C, ...",
                },
            ),
            (
                ("--label",),
                {
                    "action": "append",
                    "default": [],
                    "metavar": "OLD=NEW",
                    "type": _renaming,
                    "help": "what a label without a successor shall become",
                },
            ),
            (("--diff",), {"action": "store_true", "help": "write nothing, print what would change"}),
            (("--check",), {"action": "store_true", "help": "write nothing, name the files that would change"}),
        ),
    ),
    Command(
        ("assets", "aliases"),
        commands.assets_aliases,
        (
            APP,
            (
                ("--keep",),
                {"type": _reader(whole(1, 1000)), "default": 2, "metavar": "N", "help": "minor versions (%(default)s)"},
            ),
            (
                ("--version",),
                {
                    "type": _matching(r"[0-9]+(\.[0-9]+)*\S*", "a version such as 1.4.0"),
                    "help": "leave out what has ended by this version; the one that runs by default",
                },
            ),
        ),
    ),
    Command(
        ("assets", "export"),
        commands.assets_export,
        (
            (("target",), {"choices": ("files", "grafana-provisioning", "configmap", "prometheusrule")}),
            (("--output", "-o"), {"type": Path, "metavar": "FOLDER", "help": "where to write; printed by default"}),
            (("--force",), {"action": "store_true", "help": "overwrite what differs"}),
            _choice("--datasource", r"[\w-]{1,40}", "a uid", "UID", "of Grafana's data source, instead of a variable"),
            _choice("--selector", r".*\S.*", "matchers", "MATCHERS", 'for every query, such as: cluster="eu"'),
            _choice("--runbooks", r"https?://\S+", "a URL", "URL", "of the folder that holds docs/, for runbook_url"),
            _choice("--namespace", _DNS, "a namespace", "NAME", "of the objects"),
            (
                ("--label",),
                {
                    "dest": "labels",
                    "action": "append",
                    "default": [],
                    "metavar": "KEY=VALUE",
                    "type": _label,
                    "help": "of the objects; may be repeated",
                },
            ),
            _choice("--folder", r".*\S.*", "a name", "NAME", "of the dashboards in Grafana (rkmetrics)"),
            _choice("--path", r"/\S*", "a path", "PATH", "where Grafana will read the dashboards"),
        ),
    ),
    Command(("version",), commands.version, (JSON,)),
)


# What a first word with several second ones is about.
GROUPS: Mapping[str, str] = {
    "assets": "Dashboards, rules and pages: check them, migrate them, export them, write them.",
    "kv": "Metrics of LLM workers: watch them, publish them.",
    "rpc": "Request planes: call an endpoint, list who serves it.",
}


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
            group = groups[path].add_parser(word, help=GROUPS.get(word, summary), description=GROUPS.get(word))
            group.set_defaults(run=None)
            groups[*path, word] = group.add_subparsers(metavar="COMMAND", required=True)
        path = (*path, word)
    leaf = groups[path].add_parser(command.words[-1], help=summary, description=summary)
    leaf.set_defaults(run=command.run)
    for names, options in command.arguments:
        leaf.add_argument(*names, **options)


if __name__ == "__main__":
    sys.exit(main())
