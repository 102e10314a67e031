"""Write rkmetrics/assets/rivetkit.json: RivetKit's names over four eras, as tables for `rkmetrics assets migrate`.

    python tools/rivetkit_renames.py renames.json engine-exported-families.json dashboard-breakage.json \
        catalog.json > rkmetrics/assets/rivetkit.json

The four files are facts gathered from RivetKit's history (github.com/rivet-dev/rivet, Apache-2.0): the renames with
their commits, the families that its engine exported, the names that its dashboards query but no version registered,
and its metrics' types.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]

PREFIX = "rivet_"


def change_of(row: Row, histograms: set[str]) -> Row:
    kind = row.get("kind", "rename")
    out: Row = {"old": row["from"], "new": row.get("to") or ""}
    untyped = "to" in row and "from_type" not in row and "labels_added" not in row  # engine renames: it may be one
    plain = out["new"].endswith(("_total", "_active", "_count")) or not out["new"]
    if (out["new"] in histograms and kind != "type_and_unit_changed") or (untyped and not plain):
        out["histogram"] = True
    if kind == "merged":
        out["adds"] = sorted(row["add_matchers"].items())
    elif kind == "type_same_meaning_changed":
        out["only_in"] = ["sum"]
        out["why"] = row["note"]
    elif kind == "type_and_unit_changed":
        out["cannot"] = True
        out["why"] = f"{row['from_type']} in milliseconds became a {row['to_type']} in seconds"
    elif not out["new"]:
        out["why"] = row.get("note", "removed")
    return out


def main() -> None:
    renames, families, breakage, catalog = (json.loads(Path(path).read_text()) for path in sys.argv[1:5])
    dead = next(check["missing"] for check in breakage["checks"] if check["missing"] != "all")
    registered = {
        name.removeprefix(PREFIX)
        for row in breakage["expressions"]
        for name in row["metrics"]
        if name.startswith(PREFIX) and name not in dead
    }
    later = renames["B_to_C"] + renames["B_to_C_engine_renames"]
    engine = families["2.3.5"]["families"]
    histograms = {row["name"] for row in [*engine, *catalog["metrics"]] if row["type"] == "histogram"}
    histograms |= {row["from"] for row in later if row["to"] in histograms and row.get("from_type") != "gauge"}
    exported = {family["name"] for family in engine}
    renamed, new = {row["to"] for row in later}, set(renames["new_in_C_without_predecessor"])
    current = renamed | new | registered | exported
    dropped = renames["label_rules"]["dropped"]
    added = renames["label_rules"]["added"]
    json.dump(
        {
            "source": "history of github.com/rivet-dev/rivet to 2026-09; Apache-2.0, Copyright Rivet Gaming, Inc.",
            "eras": {era["id"]: f"{era['name']}: {era['when']}" for era in renames["eras"]},
            "A-B": {
                "changes": [change_of(row, histograms) for row in renames["A_to_B"]],
                "added": dict.fromkeys(dropped, "A had one registry for each actor"),
            },
            "B-C": {
                "changes": [change_of(row, histograms) for row in later + renames["removed_without_successor"]],
                "gone": dropped,
                "added": added,
                "strip": PREFIX,
                "families": sorted((registered | exported) - renamed - new),
                "dead": sorted(dead),
                "born": sorted(new),
            },
            "C-D": {"changes": [], "add": PREFIX, "families": sorted(current), "dead": sorted(dead)},
        },
        sys.stdout,
        indent=1,
    )
    print()


if __name__ == "__main__":
    main()
