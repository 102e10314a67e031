"""What changed in the shipped catalogue beside metrics' names, which say themselves what they were (`renamed_from`).

A label, a value or a metric that disappears has a row here: without one `rkmetrics catalogue diff` calls its removal
unexplained. `assets check` says what to write instead, and `assets migrate` rewrites labels and values.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["DROPPED", "LABELS", "VALUES"]

# Metric that is gone -> the query that answers its question now, or why nothing does.
DROPPED: Mapping[str, str] = {}

# (metric by its name of today, old label) -> label; "" for one that is gone.
LABELS: Mapping[tuple[str, str], str] = {}

# (metric by its name of today, label by its name of today, old value) -> value; "" for one that is gone.
VALUES: Mapping[tuple[str, str, str], str] = {}
