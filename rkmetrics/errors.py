"""The exceptions of rkmetrics.

    RkMetricsError
    ├── DefinitionError      (ValueError)  a metric or label was declared wrongly; raised at import
    ├── RegistryError        (ValueError)  a set, collector or source clashes with one that is registered
    ├── ActorNameError       (ValueError)  an actor name is empty, too long, not UTF-8, or past the limit (strict)
    ├── LabelValueError      (KeyError)    a label value is not one of those declared (strict)
    ├── SettingsError        (ValueError)  a setting has a bad value, or is unknown
    ├── MissingExtraError    (ImportError) a feature needs a package of an extra that is not installed
    ├── ServeError           (OSError)     a server cannot start
    ├── KvValueError         (ValueError)  a metric, event or name handed to the KV plane cannot be used
    ├── BackendError         (ValueError)  what is said of a backend, to discovery, cannot be used
    ├── PayloadError         (ValueError)  bytes of a peer are not what they should be
    ├── PromqlError          (ValueError)  a query cannot be read
    ├── AssetError           (ValueError)  a dashboard, rule file or catalogue cannot be read
    ├── FetchError           (OSError)     a request got no answer, or none that can be used; `reason` says which
    ├── RpcError             (OSError)     a call over a request plane failed; `delivered`: the handler may have run
    │   ├── NoInstancesError               nobody is known who serves the endpoint
    │   ├── BusyError                      everybody who serves it is past the threshold
    │   ├── RpcUnreachableError            no connection to the instance
    │   ├── RpcRefusedError                the instance took the request and will not serve it
    │   ├── RpcTimeoutError  (TimeoutError) no acknowledgement, no answer, or silence in the middle of one
    │   ├── RpcClosedError                 the answer ended before its end: the instance died, or left
    │   ├── RpcProtocolError               the instance said what nobody understands
    │   └── RpcRemoteError                 the handler raised; `reason` is what it said
    └── EtcdError            (OSError)     etcd says no; `code` is gRPC's
        ├── EtcdUnavailableError           no endpoint answered, or none could do it now
        ├── LeaseLostError                 the lease ended, or was revoked
        └── CompactedError                 the revision asked for is gone; list again, then watch

Each takes fields and writes its own sentence: what, the value, what is wrong with it, what was expected, what to do.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "ActorNameError",
    "AssetError",
    "BackendError",
    "BusyError",
    "CompactedError",
    "DefinitionError",
    "EtcdError",
    "EtcdUnavailableError",
    "FetchError",
    "KvValueError",
    "LabelValueError",
    "LeaseLostError",
    "MissingExtraError",
    "NoInstancesError",
    "PayloadError",
    "PromqlError",
    "RegistryError",
    "RkMetricsError",
    "RpcClosedError",
    "RpcError",
    "RpcProtocolError",
    "RpcRefusedError",
    "RpcRemoteError",
    "RpcTimeoutError",
    "RpcUnreachableError",
    "ServeError",
    "SettingsError",
]


class RkMetricsError(Exception):
    """The root of all exceptions that rkmetrics raises."""


class DefinitionError(RkMetricsError, ValueError):
    """A declaration breaks a rule; `metric` names it, `rule` says which rule, `mend` what to write instead."""

    def __init__(self, metric: str, rule: str, mend: str) -> None:
        self.metric, self.rule, self.mend = metric, rule, mend
        super().__init__(f"{metric}: {rule}; {mend}")


class RegistryError(RkMetricsError, ValueError):
    """What was handed to a registry clashes with what it already holds."""


class ActorNameError(RkMetricsError, ValueError):
    """An actor name cannot be admitted."""

    def __init__(self, actor_name: object, reason: str, mend: str) -> None:
        self.actor_name, self.reason, self.mend = actor_name, reason, mend
        super().__init__(f"actor_name={actor_name!r}: {reason}; {mend}")


class LabelValueError(RkMetricsError, KeyError):
    """A label value is not one of the declared ones."""

    def __init__(self, metric: str, label: str, value: object, expected: Iterable[str]) -> None:
        self.metric, self.label, self.value, self.expected = metric, label, value, tuple(expected)
        super().__init__(f"{metric}: {label}={value!r} is not declared; expected one of: {', '.join(self.expected)}")

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would print the repr


class SettingsError(RkMetricsError, ValueError):
    """A setting has a value that cannot be used; a secret's value is never part of the sentence."""

    def __init__(
        self, name: str, value: object, expected: str, where: str = "environment", *, secret: bool = False
    ) -> None:
        self.name, self.expected, self.where = name, expected, where
        shown = "<secret>" if secret else repr(value)
        super().__init__(f"{name}={shown}: expected {expected} ({where})")


class MissingExtraError(RkMetricsError, ImportError):
    """A feature needs packages that come with an extra."""

    def __init__(self, feature: str, extra: str, missing: str) -> None:
        self.feature, self.extra, self.missing = feature, extra, missing
        super().__init__(f"{feature} needs the package {missing!r}; install it with: pip install 'rkmetrics[{extra}]'")


class ServeError(RkMetricsError, OSError):
    """A server cannot start: the port is taken, the address is not ours, or the gate would be open by accident."""


def _shown(value: object, characters: int = 80) -> str:
    """The value as text, or the beginning of it: it may be anything, also a number that Python does not write out."""
    try:
        text = repr(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= characters else f"{text[:characters]}..."


class KvValueError(RkMetricsError, ValueError):
    """What was handed to the KV plane cannot be used."""

    def __init__(self, what: str, value: object, expected: str) -> None:
        self.what, self.value, self.expected = what, value, expected
        super().__init__(f"{what}={_shown(value)}: expected {expected}")


class BackendError(RkMetricsError, ValueError):
    """What is said of a backend cannot be used. Shows the beginning of a value only: it may come from a peer."""

    SHOWN_CHARACTERS = 80

    def __init__(self, what: str, value: object, expected: str) -> None:
        self.what, self.expected = what, expected
        shown = repr(value[: self.SHOWN_CHARACTERS] if isinstance(value, str) else value)
        super().__init__(f"{what}={shown}: expected {expected}")


class PayloadError(RkMetricsError, ValueError):
    """Bytes of a peer are not what they should be. Shows the first of them only: they may be anything."""

    SHOWN_BYTES, REASON_CHARACTERS = 40, 200

    def __init__(self, what: str, data: bytes, reason: str) -> None:
        self.what, self.reason = what, reason[: self.REASON_CHARACTERS]
        shown = repr(bytes(data[: self.SHOWN_BYTES])) + ("..." if len(data) > self.SHOWN_BYTES else "")
        super().__init__(f"not {what}: {self.reason} (in {len(data)} bytes that begin {shown})")


class PromqlError(RkMetricsError, ValueError):
    """A query cannot be read; `position` is where, counted in characters from 0."""

    SHOWN_CHARACTERS = 40

    def __init__(self, text: str, position: int, expected: str) -> None:
        self.text, self.position, self.expected = text, position, expected
        rest = text[position:]
        shown = repr(rest[: self.SHOWN_CHARACTERS]) + ("..." if len(rest) > self.SHOWN_CHARACTERS else "")
        super().__init__(f"query: {expected}; found {shown if rest else 'the end'} (character {position + 1})")


class AssetError(RkMetricsError, ValueError):
    """A dashboard, rule file or catalogue cannot be read; line and column count from 1."""

    def __init__(self, file: str, line: int, column: int, reason: str) -> None:
        self.file, self.line, self.column, self.reason = file, line, column, reason
        super().__init__(f"{file}:{line}:{column}: {reason}")


class FetchError(RkMetricsError, OSError):
    """A request got no answer, or none that can be used."""

    def __init__(self, url: str, reason: str, detail: str, *, method: str = "GET") -> None:
        self.url, self.reason, self.detail, self.method = url, reason, detail, method
        super().__init__(f"{method} {url}: {reason}: {detail}")


class RpcError(RkMetricsError, OSError):
    """A call failed. delivered: whether the handler may have run; where it did not, the call may be made again.

    instance: where it went, as a transport's address or a number; "" where it went nowhere.
    """

    REASON_CHARACTERS = 1_000
    delivered = False

    def __init__(self, endpoint: str, reason: str, *, instance: str = "", delivered: bool | None = None) -> None:
        self.endpoint, self.instance = endpoint, instance
        self.reason = reason if len(reason) <= self.REASON_CHARACTERS else f"{reason[: self.REASON_CHARACTERS]}..."
        if delivered is not None:
            self.delivered = delivered
        super().__init__(f"{endpoint}{f' at {instance}' if instance else ''}: {self.reason}")


class NoInstancesError(RpcError):
    """Nobody is known who serves the endpoint, or the instance that was asked for is not there."""


class BusyError(RpcError):
    """Everybody who serves the endpoint is past the threshold; try later, or elsewhere."""


class RpcUnreachableError(RpcError):
    """There is no connection to the instance, or it ended before it took the request."""


class RpcRefusedError(RpcError):
    """The instance took the request and will not serve it; `reason` says why. Nothing was run."""


class RpcTimeoutError(RpcError, TimeoutError):
    """Time ran out: for the acknowledgement, for the answer's beginning, between two items, or for all of it."""

    delivered = True


class RpcClosedError(RpcError):
    """The answer ended before its end: the instance died, or the network between."""

    delivered = True


class RpcProtocolError(RpcError):
    """The instance said what nobody understands."""

    delivered = True


class RpcRemoteError(RpcError):
    """The handler raised; `reason` is what the instance said of it."""

    delivered = True


class EtcdError(RkMetricsError, OSError):
    """etcd answered that it does not do what was asked."""

    def __init__(self, call: str, endpoint: str, code: int, message: str) -> None:
        self.call, self.endpoint, self.code, self.message = call, endpoint, code, message
        super().__init__(f"etcd {call} at {endpoint}: {message} (code {code})")


class EtcdUnavailableError(EtcdError):
    """No endpoint answered in time, or none could do it now; try again later."""


class LeaseLostError(EtcdError):
    """The lease ended or was revoked, and its keys with it; grant it again and put them."""


class CompactedError(EtcdError):
    """The revision asked for is gone from the store's history."""

    def __init__(self, call: str, endpoint: str, code: int, message: str, revision: int = 0) -> None:
        super().__init__(call, endpoint, code, message)
        self.revision = revision
