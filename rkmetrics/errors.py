"""The exceptions of rkmetrics.

    RkMetricsError
    ├── DefinitionError      (ValueError)  a metric or label was declared wrongly; raised at import
    ├── RegistryError        (ValueError)  a set, collector or source clashes with one that is registered
    ├── ActorNameError       (ValueError)  an actor name is empty, too long, not UTF-8, or past the limit (strict)
    ├── LabelValueError      (KeyError)    a label value is not one of those declared (strict)
    ├── SettingsError        (ValueError)  a setting has a bad value, or is unknown
    ├── MissingExtraError    (ImportError) a feature needs a package of an extra that is not installed
    └── ServeError           (OSError)     a server cannot start

Each takes fields and writes its own sentence: what, the value, what is wrong with it, what was expected, what to do.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "ActorNameError",
    "DefinitionError",
    "LabelValueError",
    "MissingExtraError",
    "RegistryError",
    "RkMetricsError",
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
