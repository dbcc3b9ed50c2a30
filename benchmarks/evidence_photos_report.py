"""What the photographs' evidence is shown as: rows, the tables, and what is missing in them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from evidence_photos_plan import GROUPS, LONG, Stage

NAMES = {"random": "random", "byol": "BYOL", "scrl": "SCRL", "supervised": "supervised"}
HEADS = {"scratch": "from scratch", "long": "from scratch, longer", "continued": "ImageNet weights"}
VALUES = {"roi": "accuracy", "dense": "retrieval"}
COLUMNS = {
    "RoI linear": {"measure": "roi"},
    "dense retrieval": {"measure": "dense"},
    "VOC AP, 10 %": {"measure": "ap", "data": "voc", "share": 0.1},
    "VOC AP, 100 %": {"measure": "ap", "data": "voc", "share": 1.0},
    "Aquarium AP, 10 %": {"measure": "ap", "data": "aquarium", "share": 0.1},
    "Aquarium AP, 100 %": {"measure": "ap", "data": "aquarium", "share": 1.0},
}


def report(
    budget: str, stages: Sequence[Stage], results: Mapping[str, Any], environment: Mapping[str, Any]
) -> dict[str, Any]:
    """What is saved. results: of each stage by its name, None where it is open."""
    finished = [stage for stage in stages if results[stage.name]]
    return {
        "data": "voc",
        "budget": budget,
        "environment": dict(environment),
        "rows": [row for stage in finished if (row := row_of(stage, results[stage.name]))],
        "open": [stage.name for stage in stages if not results[stage.name]],
        "stages": [results[stage.name] for stage in finished],
    }


def row_of(stage: Stage, result: Mapping[str, Any]) -> dict[str, Any] | None:
    """A measured value and what it is of, in percent; None for stages that measure nothing by themselves."""
    facts = dict(stage.facts)
    if facts["measure"] in VALUES:
        facts["value"] = 100 * result["result"][VALUES[facts["measure"]]]
    elif facts["measure"] == "ap":
        row = result["result"]["rows"][0]
        facts |= {"value": row["AP"], "AP50": row["AP50"]}
    else:
        return None
    return facts


def cell(rows: Sequence[Mapping[str, Any]], group: str, start: str, column: Mapping[str, Any]) -> list[float]:
    """The values of a start in a column, one a seed."""
    wanted = {"group": group, "start": start, **column}
    return [row["value"] for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def cells(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[str]]]:
    """Group, start and the text of every column; a start without any value is left out but for those of the plan."""
    lines = []
    for group in (*GROUPS, LONG):
        starts = dict.fromkeys(row["start"] for row in rows if row["group"] == group.name)
        starts |= dict.fromkeys(group.starts if group in GROUPS else ())
        order = ("random", "supervised", "byol", "scrl")
        for start in sorted(starts, key=order.index):
            found = [cell(rows, group.name, start, column) for column in COLUMNS.values()]
            lines.append((group.name, start, [_shown(values) for values in found]))
    return lines


def _shown(values: Sequence[float]) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f} ({len(values)})"


def missing(document: Mapping[str, Any]) -> str:
    """How much of the plan is behind the table."""
    done, left = len(document["stages"]), len(document["open"])
    return f"{done} of {done + left} stages are finished" + ("; - is not measured yet" if left else "")


def table(document: Mapping[str, Any]) -> list[str]:
    """For the terminal."""
    lines = [f"{'percent':30}" + "".join(f"{name:>20}" for name in COLUMNS)]
    for group, start, texts in cells(document["rows"]):
        lines.append(f"{HEADS[group] + ', ' + NAMES[start]:30}" + "".join(f"{text:>20}" for text in texts))
    lines += [f"tuning {NAMES[row['start']]}: {_setting(row)}: {row['value']:.1f}" for row in _tuned(document)]
    return [*lines, missing(document)]


def markdown(document: Mapping[str, Any]) -> str:
    """For docs/evidence.md: both tables and what they are made of."""
    lines = [f"| | | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for group, start, texts in cells(document["rows"]):
        lines.append(f"| {HEADS[group]} | {NAMES[start]} | {' | '.join(texts)} |")
    if tuned := _tuned(document):
        lines += ["", "| tuning | lr, EMA | RoI linear, held photographs |", "|---|---|---|"]
        lines += [f"| {NAMES[row['start']]} | {row['lr']:g}, {row['ema']:g} | {row['value']:.1f} |" for row in tuned]
    where = document["environment"]
    commits = ", ".join(dict.fromkeys(stage["commit"] or "unknown" for stage in document["stages"]))
    said = f"{where['device_name']}, torch {where['torch']}, commits {commits}; `{document['command']}`."
    return "\n".join([*lines, "", f"Percent; several values as mean ± deviation (number). {missing(document)}. {said}"])


def _tuned(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted((row for row in document["rows"] if row["group"] == "tuning"), key=lambda row: row["start"])


def _setting(row: Mapping[str, Any]) -> str:
    return f"lr {row['lr']:g}, EMA {row['ema']:g}"
