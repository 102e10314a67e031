"""Settings: one row for each, and the frozen value that the rest of the package is handed.

A value is checked wherever it comes from, a variable or a call. `Settings.from_env(mapping)` is pure; only `runtime.py`
and `cli.py` (and a Registry made without settings) pass it the environment. Names and help stand in SETTINGS, defaults
and types in the dataclass: the manual's page, the errors and `rkmetrics settings show` are made from the two. An empty
or blank value counts as unset, since compose files and charts pass variables on that way. Written by hand because the
libraries for it cost 50 to 120 ms at import, and their errors name either the variable or the value, not both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any, Literal, NamedTuple, cast

from rkmetrics.errors import SettingsError

__all__ = [
    "GROUPS",
    "SETTINGS",
    "SUBJECT_TOKEN",
    "Parser",
    "Secret",
    "Setting",
    "Settings",
    "host_and_port",
    "joined",
    "many",
    "mask",
    "one_of",
    "ratio",
    "seconds",
    "server",
    "url",
    "whole",
]

PREFIX = "RKMETRICS_"
TRUE = frozenset({"1", "true", "yes", "on"})
FALSE = frozenset({"0", "false", "no", "off"})
# In a URL, or before a host that stands without a scheme.
CREDENTIALS = re.compile(r"(?:(?<=://)|(?<![^\s,]))[^/@\s,]+@")
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ms|s|m|h|)", re.ASCII)
DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
DAY_SECONDS = 86_400


class Secret:
    """Bytes that no repr, str, format or log shows; only `reveal()` hands them out. Text becomes its UTF-8 bytes."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes | str) -> None:
        # memoryview: bytes(5) is no error, but five zero bytes.
        self._value = value.encode() if isinstance(value, str) else bytes(memoryview(value))

    def reveal(self) -> bytes:
        """Return the secret itself; the caller keeps it out of logs and answers."""
        return self._value

    def __repr__(self) -> str:
        return "<secret>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        from hmac import compare_digest  # imports hashlib: kept off the path of `import rkmetrics`

        return compare_digest(self._value, other._value)

    def __hash__(self) -> int:
        return hash(self._value)


# --- parsers: text in, value out; a ValueError becomes a SettingsError that says `expected` ---------------------------


class Parser(NamedTuple):
    """How the text of one variable becomes a value, which values there are, and how to say what is expected.

    holds: whether a value made in code is one of them. in_code: what to write there, where that is not what is said of
    the text.
    """

    expected: str
    parse: Callable[[str], Any]
    holds: Callable[[object], bool]
    in_code: str = ""


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def _is(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kind)


def _is_text(parse: Callable[[str], str]) -> Callable[[object], bool]:
    """Make the check for values that are text themselves: what the variable may say, the field may hold."""

    def holds(value: object) -> bool:
        if not isinstance(value, str):
            return False
        try:
            parse(value)
        except ValueError:
            return False
        return True

    return holds


def _flag(text: str) -> bool:
    lowered = text.lower()
    _require(lowered in TRUE or lowered in FALSE)
    return lowered in TRUE


def _text(text: str) -> str:
    _require(CONTROL.search(text) is None)
    return text


def _word(text: str) -> str:
    _require(not any(character.isspace() for character in text))
    return _text(text)


def _secret(text: str) -> Secret:
    # The bytes of the environment as they are: os.environ decodes with surrogateescape.
    return Secret(_text(text).encode("utf-8", "surrogateescape"))


def _url_path(text: str) -> str:
    _require(text.startswith("/"))
    return "/" + _word(text).strip("/")


def one_of(*values: str) -> Parser:
    """One of a few words, in any case."""

    def parse(text: str) -> str:
        _require(text.lower() in values)
        return text.lower()

    def holds(value: object) -> bool:
        return value in values

    return Parser(f"one of: {', '.join(values)}", parse, holds)


def whole(low: int, high: int) -> Parser:
    """A whole number from low to high, in ASCII digits."""

    def parse(text: str) -> int:
        _require(text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) <= high)
        return int(text)

    def holds(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return Parser(f"a whole number from {low} to {high}", parse, holds)


def seconds(low: float, high: float) -> Parser:
    """A duration: a number of seconds, or a number with ms, s, m or h."""

    def parse(text: str) -> float:
        match = DURATION.fullmatch(text.lower())
        _require(match is not None)
        assert match is not None
        value = float(match[1]) * DURATION_UNITS[match[2]]
        _require(low <= value <= high)
        return value

    def holds(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high

    span = f"seconds from {low:g} to {high:g}"
    return Parser(f"{span} (or with a unit: 500ms, 30s, 2m)", parse, holds, f"a number of {span}")


def url(*schemes: str) -> Parser:
    """A URL of one of the schemes, with a host."""

    def parse(text: str) -> str:
        scheme, separator, rest = _word(text).partition("://")
        _require(bool(separator) and scheme.lower() in schemes and not rest.startswith(("/", ":")) and rest != "")
        return text.rstrip("/")

    return Parser(f"a URL such as {schemes[0]}://host:port", parse, _is_text(parse))


def server(scheme: str, *more: str) -> Parser:
    """A URL of one of the schemes, or host:port, which stands for a URL of the first."""
    whole_url = url(scheme, *more)

    def parse(text: str) -> str:
        if "://" in text:
            return cast("str", whole_url.parse(text))
        _require(re.fullmatch(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}", text) is not None)
        return f"{scheme}://{text}"

    return Parser(f"host:port, or a URL such as {scheme}://host:port", parse, _is_text(parse))


PLACE = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]/@\s]+))(?::([0-9]{1,5}))?", re.ASCII)
BARE_IPV6 = re.compile(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*", re.ASCII)


def host_and_port(text: str) -> tuple[str, int | None]:
    """Read host, host:port, [IPv6]:port or a bare IPv6 address. Raises ValueError."""
    if BARE_IPV6.fullmatch(text):
        return text, None
    found = PLACE.fullmatch(text)
    if found is None:
        raise ValueError
    return found[1] or found[2], None if found[3] is None else int(found[3])


def ratio() -> Parser:
    """A part of a whole, from 0 to 1."""

    def parse(text: str) -> float:
        _require(re.fullmatch(r"[0-9]*\.?[0-9]+", text, re.ASCII) is not None and len(text) < 20 and float(text) <= 1)
        return float(text)

    def holds(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1

    return Parser("a number from 0 to 1", parse, holds)


def _network(text: str) -> str:
    from ipaddress import ip_network  # kept off the path of `import rkmetrics`

    return str(ip_network(text))  # strict: 10.0.0.1/8 is a mistake


def _ports(text: str) -> str:
    low, dash, high = text.partition("-")
    ports = [int(part) for part in ((low, high) if dash else (low,)) if re.fullmatch(r"[0-9]{1,5}", part, re.ASCII)]
    _require(len(ports) == 1 + bool(dash) and 1 <= ports[0] <= ports[-1] <= 65_535)
    return "-".join(map(str, ports))


def _static_backend(text: str) -> str:
    address, _, metrics_port = text.partition("/")
    _require(1 <= int(metrics_port) <= 65_535 and re.fullmatch(r".+:[0-9]{1,5}", address, re.ASCII) is not None)
    return _word(text)


def _advertised(text: str) -> str:
    host, port = host_and_port(text)
    _require(host not in ("0.0.0.0", "::", "0") and (port is None or 1 <= port <= 65_535))
    return text


def many(parser: Parser) -> Parser:
    """Several, separated by commas."""

    def parse(text: str) -> tuple[Any, ...]:
        return tuple(parser.parse(part.strip()) for part in text.split(",") if part.strip())

    def holds(value: object) -> bool:
        return isinstance(value, tuple) and all(map(parser.holds, cast("tuple[object, ...]", value)))

    expected = f"{parser.expected}, several separated by commas"
    return Parser(expected, parse, holds, f"a tuple, each of it {parser.expected}")


def joined(parser: Parser) -> Parser:
    """Several in one text, separated by commas, where what comes of it is passed on as it stands."""

    def parse(text: str) -> str:
        parts = [parser.parse(part.strip()) for part in text.split(",") if part.strip()]
        _require(bool(parts))
        return ",".join(parts)

    return Parser(f"{parser.expected}, several separated by commas", parse, _is_text(parse))


def _subject_token(text: str) -> str:
    _require(re.fullmatch(r"[A-Za-z0-9_-]+", text, re.ASCII) is not None)
    return text


FLAG = Parser("1, true, yes or on; 0, false, no or off", _flag, _is(bool), in_code="True or False")
TEXT = Parser("text without control characters", _text, _is_text(_text))
HOST = Parser("a host name or an IP address", _word, _is_text(_word))
ADVERTISED = Parser(
    "host or host:port that others can reach, never 0.0.0.0, [::] or port 0", _advertised, _is_text(_advertised)
)
NETWORK = Parser("a network such as 10.0.0.0/8, or an address", _network, _is_text(_network))
PORTS = Parser("a port, or two with - between them", _ports, _is_text(_ports))
STATIC_BACKEND = Parser(
    "host:port/metrics_port, such as 10.0.1.5:3000/9090", _static_backend, _is_text(_static_backend)
)
SUBJECT_TOKEN = Parser("letters, digits, _ and -", _subject_token, _is_text(_subject_token))
SECRET = Parser(
    "one line without control characters",
    _secret,
    _is(Secret),
    in_code="Secret(...) around it, which keeps it out of every repr",
)
URL_PATH = Parser("a path that begins with /", _url_path, _is_text(_url_path))
PORT = whole(0, 65_535)
COUNT = whole(1, 1_000_000)
TIMEOUT = seconds(0.001, 3_600)


# --- the values -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the package is run with; `Settings()` is the defaults, `Settings.from_env(os.environ)` the environment's.

    None: not set, where the absence means something (a host is then detected, NATS is left alone in tcp mode).
    """

    metrics_enabled: bool = False
    metrics_token: Secret | None = None
    metrics_token_previous: Secret | None = None
    metrics_token_file: str | None = None
    metrics_access: Literal["token", "open"] = "token"
    inspect_token: Secret | None = None
    host: str = "127.0.0.1"
    port: int = 9090
    shared_dir: str | None = None
    max_actor_names: int = 200
    pure_python: bool = False
    kv_plane: Literal["auto", "nats", "off"] = "auto"
    request_plane: Literal["tcp", "http", "nats"] = "tcp"
    wire: Literal["0.7", "0.8", "0.9"] = "0.8"
    namespace: str = "dynamo"
    nats_server: str | None = dataclass_field(default=None, repr=False)  # URLs may carry credentials
    nats_username: str | None = None
    nats_password: Secret | None = None
    nats_token: Secret | None = None
    nats_nkey: Secret | None = None
    nats_credentials_file: str | None = None
    nats_ca_file: str | None = None
    etcd_endpoints: tuple[str, ...] = dataclass_field(default=(), repr=False)
    tcp_rpc_host: str | None = None
    tcp_rpc_port: int = 0
    tcp_max_message_size_bytes: int = 33_554_432
    tcp_request_timeout_seconds: float = 10.0
    tcp_pool_size: int = 50
    tcp_connect_timeout_seconds: float = 3.0
    tcp_channel_buffer: int = 100
    http_rpc_host: str | None = None
    http_rpc_port: int = 8888
    http_rpc_root_path: str = "/v1/rpc"
    http_request_timeout_seconds: float = 5.0
    http2_max_frame_size_bytes: int = 1_048_576
    http2_max_concurrent_streams: int = 1_000
    http2_pool_max_idle_per_host: int = 100
    http2_pool_idle_timeout_seconds: float = 90.0
    http2_keep_alive_interval_seconds: float = 30.0
    http2_keep_alive_timeout_seconds: float = 10.0
    http2_adaptive_window: bool = True
    http2_prior_knowledge: bool = False
    load_balancers: tuple[str, ...] = dataclass_field(default=(), repr=False)
    advertise_address: str | None = None
    registration_token: Secret | None = None
    announce_interval_seconds: float = 30.0
    metrics_port: int | None = None
    health_check_interval_seconds: float = 5.0
    health_check_timeout_seconds: float = 2.0
    health_check_path: str = "/metrics"
    balancer_port: int = 8080
    health_check_rise: int = 2
    health_check_fall: int = 2
    registration_access: Literal["token", "open"] = "token"
    registration_token_previous: Secret | None = None
    registration_rate: int = 20
    allowed_networks: tuple[str, ...] = ()
    allowed_ports: tuple[str, ...] = ("80", "443", "1024-65535")
    static_backends: tuple[str, ...] = ()
    max_backends: int = 10_000
    max_backends_per_caller: int = 1_024
    backend_expiry_seconds: float = 90.0
    panic_ratio: float = 0.5
    prometheus_url: str = dataclass_field(default="http://localhost:9090", repr=False)  # URLs may carry credentials
    prometheus_token: Secret | None = None
    prometheus_username: str | None = None
    prometheus_password: Secret | None = None

    def __post_init__(self) -> None:
        """Raise SettingsError unless each value is one that its variable could have given."""
        _raise_first(setting.refusal(self) for setting in SETTINGS)

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read the variables of a mapping. Raises SettingsError on a bad value or an unknown RKMETRICS_* name.

        The error is of the first; its notes (`__notes__`) are the sentences of the others.
        """
        values: dict[str, Any] = {}
        refused: list[SettingsError] = [*_unknown(environ)]
        for setting in SETTINGS:
            if found := setting.find(environ):
                try:
                    values[setting.field] = setting.read(*found)
                except SettingsError as error:
                    refused.append(error)
        _raise_first(refused)
        return cls(**values)

    @property
    def nats_url(self) -> str:
        """Where NATS is when it is wanted; ask `nats_server is not None` to know whether somebody named it."""
        return self.nats_server or "nats://localhost:4222"


class Setting(NamedTuple):
    """One row: field of Settings, variable, how it is read, and what the manual says about it."""

    field: str
    variable: str
    parser: Parser
    help: str
    group: str
    aliases: tuple[str, ...] = ()

    @property
    def default(self) -> Any:
        return Settings.__dataclass_fields__[self.field].default

    @property
    def unit(self) -> str:
        """The unit that the field's name ends in, or an empty string."""
        last = self.field.rpartition("_")[2]
        return last if last in ("seconds", "bytes") else ""

    @property
    def secret(self) -> bool:
        return self.parser is SECRET

    def find(self, environ: Mapping[str, str]) -> tuple[str, str] | None:
        """Return the variable that sets this and its text; the name itself wins over an alias."""
        for name in (self.variable, *self.aliases):
            if text := environ.get(name, "").strip():
                return name, text
        return None

    def read(self, name: str, text: str) -> Any:
        try:
            return self.parser.parse(text)
        except ValueError:
            # From None: the ValueError of a parser could carry a part of a secret.
            raise SettingsError(name, mask(text), self.parser.expected, secret=self.secret) from None

    def refusal(self, settings: Settings) -> SettingsError | None:
        """Return the error of a value that this setting cannot have."""
        value = getattr(settings, self.field)
        if self.parser.holds(value) or (value is None and self.default is None):
            return None
        shown = [mask(str(part)) for part in value] if isinstance(value, list | tuple) else value  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        shown = mask(value) if isinstance(value, str) else shown
        expected = self.parser.in_code or self.parser.expected
        return SettingsError(self.field, shown, expected, "Settings(...)", secret=self.secret)

    def show(self, settings: Settings) -> str:
        """Return the value as a person may see it: secrets and the credentials of URLs masked."""
        value = getattr(settings, self.field)
        if value is None:
            return ""
        if isinstance(value, bool):
            return "1" if value else "0"
        if isinstance(value, tuple):
            return mask(",".join(str(part) for part in value))  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        return f"{value:g}" if isinstance(value, float) else mask(str(value))


def mask(text: str) -> str:
    """Hide the user and password of each URL in text."""
    return CREDENTIALS.sub("<secret>@", text)


class _UnknownSettingError(SettingsError):
    """A name that begins as ours do, and is none of ours."""

    def __init__(self, name: str, mend: str) -> None:
        super().__init__(name, None, mend, secret=True)

    def __str__(self) -> str:  # the value may be a secret under a misspelt name, so there is not even a place for it
        return f"{self.name}: unknown setting; {self.expected} ({self.where})"


def _unknown(environ: Iterable[str]) -> Iterable[SettingsError]:
    known = {name for setting in SETTINGS for name in (setting.variable, *setting.aliases)}
    for name in environ:
        if name.startswith(PREFIX) and name not in known:
            from difflib import get_close_matches

            near = get_close_matches(name, sorted(known), n=1)
            yield _UnknownSettingError(
                name, f"did you mean {near[0]}?" if near else "`rkmetrics settings show` lists the names"
            )


def _raise_first(refused: Iterable[SettingsError | None]) -> None:
    """Raise the first of the errors, with the others as its notes: who mends one wants to know of all."""
    errors = [error for error in refused if error is not None]
    for error in errors[1:]:
        errors[0].add_note(str(error))
    if errors:
        raise errors[0]


# Group to what the manual says above its table.
GROUPS: Mapping[str, str] = {
    "Access to metrics": "Who may read `/metrics` and what is behind the same gate.",
    "Exporter": "Where the exporter listens and what it holds.",
    "Request plane": (
        "How requests travel from `rk.rpc.router` to `rk.rpc.server`, and where those find each other "
        "([planes.md](planes.md)). The mode also decides where KV metrics and events go ([kv.md](kv.md))."
    ),
    "NATS": "Where KV metrics and events of LLM workers go, and how to log in there. URLs may carry credentials too.",
    "Discovery": "How a backend makes itself known, and how it is checked ([discovery.md](discovery.md)).",
    "Balancer": "What `rkmetrics lb` lets in, and when a backend comes and goes ([discovery.md](discovery.md)).",
    "Preview": "The Prometheus that `rkmetrics preview` asks, and how it logs in there ([preview.md](preview.md)).",
}
_ACCESS, _EXPORTER, _PLANE, _NATS, _DISCOVERY, _BALANCER, _PREVIEW = GROUPS

SETTINGS: tuple[Setting, ...] = (
    Setting(
        "metrics_enabled",
        "METRICS_ENABLED",
        FLAG,
        "Serve metrics. They stay closed without a usable token.",
        _ACCESS,
        aliases=("RIVETKIT_METRICS_ENABLED",),
    ),
    Setting(
        "metrics_token",
        "METRICS_TOKEN",
        SECRET,
        "The bearer token that a scraper shows.",
        _ACCESS,
        aliases=("RIVETKIT_METRICS_TOKEN",),
    ),
    Setting(
        "metrics_token_previous",
        "METRICS_TOKEN_PREVIOUS",
        SECRET,
        "A second token that is still valid while tokens are rotated.",
        _ACCESS,
    ),
    Setting(
        "metrics_token_file",
        "METRICS_TOKEN_FILE",
        TEXT,
        "A file with the token on its first line and, during rotation, the previous one on its second; "
        "read again when it changes.",
        _ACCESS,
    ),
    Setting(
        "metrics_access",
        "METRICS_ACCESS",
        one_of("token", "open"),
        "`open` serves metrics to everybody, without a token.",
        _ACCESS,
    ),
    Setting(
        "inspect_token",
        "RKMETRICS_INSPECT_TOKEN",
        SECRET,
        "The token of the inspect routes; they are not part of this release.",
        _ACCESS,
    ),
    Setting("host", "RKMETRICS_HOST", HOST, "The address that `rkmetrics serve` and `rk.serve()` bind.", _EXPORTER),
    Setting("port", "RKMETRICS_PORT", PORT, "Its port; 0 takes a free one.", _EXPORTER),
    Setting(
        "shared_dir",
        "RKMETRICS_SHARED_DIR",
        TEXT,
        "A folder in which the worker processes of one service share their cells; not part of this release.",
        _EXPORTER,
    ),
    Setting(
        "max_actor_names",
        "RKMETRICS_MAX_ACTOR_NAMES",
        COUNT,
        "How many actor names get series of their own; later ones are counted as `__other__`.",
        _EXPORTER,
    ),
    Setting(
        "pure_python",
        "RKMETRICS_PURE_PYTHON",
        FLAG,
        "Use the Python cells even where the native ones are built.",
        _EXPORTER,
    ),
    Setting(
        "request_plane", "DYN_REQUEST_PLANE", one_of("tcp", "http", "nats"), "The plane of servers and clients.", _PLANE
    ),
    Setting(
        "kv_plane",
        "RKMETRICS_KV_PLANE",
        one_of("auto", "nats", "off"),
        "Whether KV metrics and events go to NATS: `auto` follows the request plane (on in nats mode, off in http, "
        "in tcp on where NATS_SERVER is set), `nats` and `off` overrule it.",
        _NATS,
    ),
    Setting("wire", "DYN_WIRE", one_of("0.7", "0.8", "0.9"), "The Dynamo version whose wire forms are spoken.", _PLANE),
    Setting(
        "namespace",
        "DYN_NAMESPACE",
        SUBJECT_TOKEN,
        "The Dynamo namespace; it becomes part of etcd keys and NATS subjects.",
        _PLANE,
    ),
    Setting(
        "nats_server",
        "NATS_SERVER",
        joined(url("nats", "tls", "ws", "wss")),
        "The NATS server; nats mode takes nats://localhost:4222 when it is unset, tcp mode then uses no NATS at all.",
        _NATS,
    ),
    Setting("nats_username", "NATS_AUTH_USERNAME", TEXT, "The user at NATS; needs NATS_AUTH_PASSWORD.", _NATS),
    Setting("nats_password", "NATS_AUTH_PASSWORD", SECRET, "The user's password.", _NATS),
    Setting("nats_token", "NATS_AUTH_TOKEN", SECRET, "A token for NATS, where there is no user.", _NATS),
    Setting("nats_nkey", "NATS_AUTH_NKEY", SECRET, "The seed of an NKey, where there is neither.", _NATS),
    Setting(
        "nats_credentials_file", "NATS_AUTH_CREDENTIALS_FILE", TEXT, "A .creds file, where none of them is.", _NATS
    ),
    Setting(
        "nats_ca_file",
        "NATS_TLS_CA_CERT_PATH",
        TEXT,
        "The authorities (PEM) that may have signed the certificate of a tls:// server. Unset: the system's.",
        _NATS,
    ),
    Setting(
        "etcd_endpoints",
        "ETCD_ENDPOINTS",
        many(url("http", "https")),
        "The etcd servers, where servers are listed and routers find them, as Dynamo's are. Unset: etcd is not used, "
        "and the load balancers of RKMETRICS_LOAD_BALANCERS are.",
        _PLANE,
    ),
    Setting("tcp_rpc_host", "DYN_TCP_RPC_HOST", HOST, "The address that the tcp plane binds. Unset: detected.", _PLANE),
    Setting("tcp_rpc_port", "DYN_TCP_RPC_PORT", PORT, "Its port; 0 takes a free one, which is then announced.", _PLANE),
    Setting(
        "tcp_max_message_size_bytes",
        "DYN_TCP_MAX_MESSAGE_SIZE",
        whole(1_024, 2**31 - 1),
        "The largest message of the tcp and http planes: of a request, and of one item of an answer.",
        _PLANE,
    ),
    Setting(
        "tcp_request_timeout_seconds",
        "DYN_TCP_REQUEST_TIMEOUT",
        TIMEOUT,
        "How long a call over tcp or nats may wait until its answer begins.",
        _PLANE,
    ),
    Setting(
        "tcp_pool_size",
        "DYN_TCP_POOL_SIZE",
        COUNT,
        "Connections to each instance, at most; more than one are opened while acknowledgements are slow.",
        _PLANE,
    ),
    Setting("tcp_connect_timeout_seconds", "DYN_TCP_CONNECT_TIMEOUT", TIMEOUT, "How long connecting may take.", _PLANE),
    Setting(
        "tcp_channel_buffer",
        "DYN_TCP_CHANNEL_BUFFER",
        COUNT,
        "Requests that may wait for their acknowledgement on one connection.",
        _PLANE,
    ),
    Setting("http_rpc_host", "DYN_HTTP_RPC_HOST", HOST, "The address of the http plane. Unset: detected.", _PLANE),
    Setting(
        "http_rpc_port", "DYN_HTTP_RPC_PORT", PORT, "Its port; 0 takes a free one, which is then announced.", _PLANE
    ),
    Setting(
        "http_rpc_root_path", "DYN_HTTP_RPC_ROOT_PATH", URL_PATH, "The path under which endpoints are served.", _PLANE
    ),
    Setting(
        "http_request_timeout_seconds",
        "DYN_HTTP_REQUEST_TIMEOUT",
        TIMEOUT,
        "How long a call over http may wait until its answer begins.",
        _PLANE,
    ),
    # RFC 9113, section 6.5.2: a frame is between 2**14 and 2**24 - 1 bytes, a stream count fits in 31 bits.
    Setting(
        "http2_max_frame_size_bytes",
        "DYN_HTTP2_MAX_FRAME_SIZE",
        whole(2**14, 2**24 - 1),
        "The largest HTTP/2 frame that is taken; what is sent keeps to what the other end takes.",
        _PLANE,
    ),
    Setting(
        "http2_max_concurrent_streams",
        "DYN_HTTP2_MAX_CONCURRENT_STREAMS",
        whole(1, 2**31 - 1),
        "HTTP/2 requests at once on one connection of a server.",
        _PLANE,
    ),
    Setting(
        "http2_pool_max_idle_per_host",
        "DYN_HTTP2_POOL_MAX_IDLE_PER_HOST",
        whole(0, 1_000_000),
        "Idle connections that a client keeps to each server, over HTTP/1.1 too.",
        _PLANE,
    ),
    Setting(
        "http2_pool_idle_timeout_seconds",
        "DYN_HTTP2_POOL_IDLE_TIMEOUT_SECS",
        seconds(0.001, DAY_SECONDS),
        "When a client closes one of those.",
        _PLANE,
    ),
    Setting(
        "http2_keep_alive_interval_seconds",
        "DYN_HTTP2_KEEP_ALIVE_INTERVAL_SECS",
        seconds(0.001, DAY_SECONDS),
        "After how long a silence an HTTP/2 connection is pinged, by both ends.",
        _PLANE,
    ),
    Setting(
        "http2_keep_alive_timeout_seconds",
        "DYN_HTTP2_KEEP_ALIVE_TIMEOUT_SECS",
        TIMEOUT,
        "How long the answer to that may take, until the connection is given up.",
        _PLANE,
    ),
    Setting(
        "http2_adaptive_window",
        "DYN_HTTP2_ADAPTIVE_WINDOW",
        FLAG,
        "Let a server's HTTP/2 windows grow to 16 MiB, so that large bodies come without a pause. Off: 65,535 bytes.",
        _PLANE,
    ),
    Setting(
        "http2_prior_knowledge",
        "DYN_HTTP2_PRIOR_KNOWLEDGE",
        FLAG,
        "Let the http plane's client speak HTTP/2 at once. Unset: HTTP/1.1, as Dynamo's own clients do.",
        _PLANE,
    ),
    Setting(
        "load_balancers",
        "RKMETRICS_LOAD_BALANCERS",
        many(server("http", "https")),
        "The load balancers to which this process announces itself.",
        _DISCOVERY,
    ),
    Setting(
        "advertise_address",
        "RKMETRICS_ADVERTISE_ADDRESS",
        ADVERTISED,
        "The address that is announced, for traffic. Unset: the address that is bound; of all of them, the first that "
        "is not loopback.",
        _DISCOVERY,
    ),
    Setting(
        "registration_token",
        "RKMETRICS_REGISTRATION_TOKEN",
        SECRET,
        "The bearer token of registrations: shown by who announces, asked for by a balancer.",
        _DISCOVERY,
    ),
    Setting(
        "announce_interval_seconds",
        "RKMETRICS_ANNOUNCE_INTERVAL",
        seconds(0.1, DAY_SECONDS),
        "How often it does, give or take the jitter.",
        _DISCOVERY,
    ),
    Setting(
        "metrics_port",
        "RKMETRICS_METRICS_PORT",
        whole(1, 65_535),
        "The metrics port that is announced. Unset: the one that is bound.",
        _DISCOVERY,
    ),
    Setting(
        "health_check_interval_seconds",
        "RKMETRICS_HEALTH_CHECK_INTERVAL",
        seconds(0.1, DAY_SECONDS),
        "How often a balancer checks each backend.",
        _DISCOVERY,
    ),
    Setting(
        "health_check_timeout_seconds",
        "RKMETRICS_HEALTH_CHECK_TIMEOUT",
        TIMEOUT,
        "How long a check may take.",
        _DISCOVERY,
    ),
    Setting(
        "health_check_path", "RKMETRICS_HEALTH_CHECK_PATH", URL_PATH, "The path that a check asks for.", _DISCOVERY
    ),
    Setting(
        "balancer_port", "RKMETRICS_LB_PORT", PORT, "The port that `rkmetrics lb` binds; 0 takes a free one.", _BALANCER
    ),
    Setting(
        "health_check_rise",
        "RKMETRICS_HEALTH_CHECK_RISE",
        whole(1, 100),
        "Good checks in a row after which a backend that has left is back in the pool.",
        _BALANCER,
    ),
    Setting(
        "health_check_fall",
        "RKMETRICS_HEALTH_CHECK_FALL",
        whole(1, 100),
        "Checks without an answer, in a row, after which a backend leaves the pool.",
        _BALANCER,
    ),
    Setting(
        "registration_access",
        "RKMETRICS_REGISTRATION_ACCESS",
        one_of("token", "open"),
        "`open` lets everybody register who is inside the allowed networks, without a token.",
        _BALANCER,
    ),
    Setting(
        "registration_token_previous",
        "RKMETRICS_REGISTRATION_TOKEN_PREVIOUS",
        SECRET,
        "A second registration token that is still valid while tokens are rotated.",
        _BALANCER,
    ),
    Setting(
        "registration_rate",
        "RKMETRICS_REGISTRATION_RATE",
        COUNT,
        "Registrations a second that one caller may send, after five times as many at once.",
        _BALANCER,
    ),
    Setting(
        "allowed_networks",
        "RKMETRICS_ALLOWED_NETWORKS",
        many(NETWORK),
        "Where backends may be. Unset: at the address of who registers them, and no special one (loopback, link-local, "
        "metadata).",
        _BALANCER,
    ),
    Setting(
        "allowed_ports",
        "RKMETRICS_ALLOWED_PORTS",
        many(PORTS),
        "Ports that backends may have, for traffic and for vitals.",
        _BALANCER,
    ),
    Setting(
        "static_backends",
        "RKMETRICS_STATIC_BACKENDS",
        many(STATIC_BACKEND),
        "Backends that are always known; they are checked like the others.",
        _BALANCER,
    ),
    Setting("max_backends", "RKMETRICS_MAX_BACKENDS", COUNT, "How many backends are known at most.", _BALANCER),
    Setting(
        "max_backends_per_caller",
        "RKMETRICS_MAX_BACKENDS_PER_CALLER",
        COUNT,
        "How many of them one caller may have registered.",
        _BALANCER,
    ),
    Setting(
        "backend_expiry_seconds",
        "RKMETRICS_BACKEND_EXPIRY",
        seconds(1, DAY_SECONDS),
        "When a backend is forgotten that is down and has not announced itself again; at least three of its announce "
        "intervals.",
        _BALANCER,
    ),
    Setting(
        "panic_ratio",
        "RKMETRICS_PANIC_RATIO",
        ratio(),
        "When fewer than this part of the pool can be heard, those that fell silent stay listed; 0 never keeps them.",
        _BALANCER,
    ),
    Setting(
        "prometheus_url",
        "RKMETRICS_PROMETHEUS_URL",
        url("http", "https"),
        "Its address, with the path in front of `/api/v1` if there is one.",
        _PREVIEW,
    ),
    Setting("prometheus_token", "RKMETRICS_PROMETHEUS_TOKEN", SECRET, "A bearer token for it.", _PREVIEW),
    Setting(
        "prometheus_username",
        "RKMETRICS_PROMETHEUS_USERNAME",
        TEXT,
        "The user at it, where it asks for basic authentication.",
        _PREVIEW,
    ),
    Setting("prometheus_password", "RKMETRICS_PROMETHEUS_PASSWORD", SECRET, "The user's password.", _PREVIEW),
)
