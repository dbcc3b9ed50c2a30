"""What the photographs' evidence is shown as: rows, the tables, and what is missing in them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evidence_photos_plan import BUDGETS, CELLS, CONTINUED, METHODS, SCRATCH, SHORT, Group, Stage

from scrl_fast.run.start_tables import difference_cell, difference_values
from scrl_fast.run.statistics import paired_difference

NAMES = {"random": "random", "byol": "BYOL", "scrl": "SCRL", "supervised": "supervised"}
HEADS = {
    "scratch": "from scratch",
    "short": "from scratch",
    "cells": "from scratch, 7 x 7 cells",
    "continued": "EfficientNet-Lite0",
}
PAIRS = {
    "scratch": (("byol", "random"), ("scrl", "random"), ("scrl", "byol")),
    "cells": (("scrl", "byol"),),
    "continued": (("byol", "supervised"), ("scrl", "supervised")),
}
"""The differences that are shown."""
VALUES = {"held": "accuracy", "roi": "accuracy", "dense": "retrieval"}
Column = tuple[str, Mapping[str, Any]]
COLUMNS: dict[str, Column] = {
    "RoI linear": ("value", {"measure": "roi"}),
    "mean over classes": ("mean_class", {"measure": "roi"}),
    "dense retrieval": ("value", {"measure": "dense"}),
    "VOC AP, 10 %": ("value", {"measure": "ap", "data": "voc", "share": 0.1}),
    "VOC AP, 100 %": ("value", {"measure": "ap", "data": "voc", "share": 1.0}),
    "Aquarium AP, 10 %": ("value", {"measure": "ap", "data": "aquarium", "share": 0.1}),
    "Aquarium AP, 100 %": ("value", {"measure": "ap", "data": "aquarium", "share": 1.0}),
}
"""Which field of which rows."""
FEW_LABELS: dict[str, Column] = {
    f"{name} {share:.0%}, {said}".replace("%", " %"): (field, {"measure": "few", "data": data, "share": share})
    for name, data, share in (("VOC", "voc", 0.1), ("Aquarium", "aquarium", 0.1), ("Aquarium", "aquarium", 1.0))
    for said, field in (("top-1", "value"), ("mean over classes", "mean_class"))
}
"""The same of RoI linear with a share of the labels."""


def report(
    budget: str, stages: Sequence[Stage], results: Mapping[str, Any], environment: Mapping[str, Any]
) -> dict[str, Any]:
    """What is saved. results: of each stage by its name, None where it is open."""
    finished = [stage for stage in stages if results[stage.name]]
    rows = [row for stage in finished if (row := row_of(stage, results[stage.name]))]
    return {
        "data": "voc",
        "budget": budget,
        "environment": dict(environment),
        "rows": rows,
        "differences": differences(rows, {**COLUMNS, **FEW_LABELS}),
        "open": [stage.name for stage in stages if not results[stage.name]],
        "stages": [results[stage.name] for stage in finished],
    }


def row_of(stage: Stage, result: Mapping[str, Any]) -> dict[str, Any] | None:
    """A measured value and what it is of, in percent but for RankMe; None for stages that measure nothing."""
    facts = dict(stage.facts)
    if facts["measure"] in VALUES:
        facts["value"] = 100 * result["result"][VALUES[facts["measure"]]]
        if facts["measure"] == "roi":
            facts["mean_class"] = 100 * result["result"]["mean_class_accuracy"]
    elif facts["measure"] == "pretrain" and facts["group"] == SHORT.name:
        facts |= {"measure": "rankme", "value": result["result"]["rankme"]}
    elif facts["measure"] == "few":
        (line,) = result["result"]["table"]
        facts |= {"value": 100 * line["accuracy"]["mean"], "mean_class": 100 * line["mean_class_accuracy"]["mean"]}
    elif facts["measure"] == "ap":
        row = result["result"]["rows"][0]
        facts |= {"value": row["AP"], "AP50": row["AP50"]}
    else:
        return None
    return facts


def by_seed(rows: Sequence[Mapping[str, Any]], group: str, start: str, column: Column) -> dict[int, float]:
    """The values of a start in a column."""
    field, wanted = column[0], {"group": group, "start": start, **column[1]}
    found = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    return {row.get("seed", 0): row[field] for row in found}


def differences(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Column]) -> list[dict[str, Any]]:
    """Of each pair of starts and column: mean and interval of the difference, paired over the seeds of both."""
    found = []
    for group, pairs in PAIRS.items():
        for start, other in pairs:
            for name, column in columns.items():
                each = [by_seed(rows, group, of, column) for of in (other, start)]
                if difference := paired_difference(*each):
                    facts = {"group": group, "start": start, "minus": other, "column": name}
                    found.append(facts | difference_values(difference))
    return found


def named(document: Mapping[str, Any], group: str, start: str) -> str:
    """A start with its passes over the photographs."""
    lengths = {each.name: each.epochs for each in (SCRATCH, SHORT, CELLS, CONTINUED)}
    epochs = getattr(BUDGETS[document["budget"]], lengths[group])
    return NAMES[start] + f", {epochs} epochs" * (start in METHODS)


@dataclass(frozen=True)
class Table:
    """head: names of the first cells of a line; two of them are one in the terminal. lines: those cells, the others."""

    head: tuple[str, ...]
    columns: Sequence[str]
    lines: Sequence[tuple[tuple[str, ...], Sequence[str]]]


def tables(document: Mapping[str, Any]) -> list[Table]:
    """Starts, differences, the same with few labels, and the settings that were tried; none without lines."""
    rows = document["rows"]
    settings = ("RoI linear, held", "RoI linear", "dense retrieval", "RankMe")
    few = [(head, texts) for head, texts in _starts(document, (SCRATCH,), FEW_LABELS) if set(texts) != {"-"}]
    found = [
        Table(("", ""), list(COLUMNS), _starts(document, (SCRATCH, SHORT, CELLS, CONTINUED), COLUMNS)),
        Table(("difference",), list(COLUMNS), _differing(rows, COLUMNS)),
        Table(("RoI linear with few labels", ""), list(FEW_LABELS), few),
        Table(("difference",), list(FEW_LABELS), _differing(rows, FEW_LABELS)),
        Table(("settings", "lr, EMA"), settings, [((start, setting), texts) for start, setting, texts in tuned(rows)]),
    ]
    return [each for each in found if each.lines]


def _starts(
    document: Mapping[str, Any], groups: Sequence[Group], columns: Mapping[str, Column]
) -> list[tuple[tuple[str, ...], list[str]]]:
    """A line of each start. Of the grid's settings, the one that held photographs choose."""
    rows = document["rows"]
    shown = [row for row in rows if row["group"] != SHORT.name]
    shown += [row for row in rows if row["group"] == SHORT.name and _setting(row) == best(rows).get(row["start"])]
    lines = []
    for group in groups:
        if group is CELLS and not any(row["group"] == group.name for row in rows):
            continue  # an experiment beside the comparison: no line before it has begun
        starts = dict.fromkeys((*(row["start"] for row in shown if row["group"] == group.name), *group.starts))
        for start in sorted(starts, key=("random", "supervised", "byol", "scrl").index):
            found = [by_seed(shown, group.name, start, column) for column in columns.values()]
            head = (HEADS[group.name], named(document, group.name, start))
            lines.append((head, [_shown(list(values.values())) for values in found]))
    return lines


def _differing(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Column]
) -> list[tuple[tuple[str, ...], list[str]]]:
    """A line of each pair of starts with anything to compare."""
    lines: dict[str, dict[str, str]] = {}
    for found in differences(rows, columns):
        head = f"{HEADS[found['group']]}: {NAMES[found['start']]} - {NAMES[found['minus']]}"
        lines.setdefault(head, {})[found["column"]] = difference_cell(found, 1)
    return [((head,), [texts.get(name, "-") for name in columns]) for head, texts in lines.items()]


def best(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The setting of each method with the best RoI linear accuracy on held photographs, of those measured so far."""
    held = sorted((row for row in rows if row["measure"] == "held"), key=lambda row: row["value"])
    return {row["start"]: _setting(row) for row in held}


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
    lines = []
    for each in tables(document):
        rows = [[", ".join(filter(None, head)), *texts] for head, texts in ((each.head, each.columns), *each.lines)]
        first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
        lines += [
            f"{row[0]:{first}}" + "".join(f"  {t:>{w}}" for t, w in zip(row[1:], widths, strict=True)) for row in rows
        ]
        lines.append("")
    return [*lines, missing(document)]


def markdown(document: Mapping[str, Any]) -> str:
    """For docs/evidence.md: the tables and what they are made of."""
    lines = []
    for each in tables(document):
        head, *rest = ([*head, *texts] for head, texts in ((each.head, each.columns), *each.lines))
        lines += ["|" + "|".join(f" {text} " if text else " " for text in head) + "|", "|---" * len(head) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rest]
        lines.append("")
    where, budget = document["environment"], BUDGETS[document["budget"]]
    commits = ", ".join(dict.fromkeys(stage["commit"] or "unknown" for stage in document["stages"]))
    processors = [stage.get("device_name") or "an unknown processor" for stage in document["stages"]]
    devices = ", ".join(dict.fromkeys(processors)) or where["device_name"]
    said = f"{devices}, torch {where['torch']}, commits {commits}; `{document['command']}`."
    how = (
        "several values as mean ± deviation (number), differences with a 95 % interval, paired over seeds (Student's t)"
    )
    if budget.continued_seeds == 1:
        how += ". EfficientNet-Lite0 was continued once, so its AP has seeds of fine-tuning alone"
    return "\n".join([*lines, f"Percent; {how}. {missing(document)}. {said}"])


def tuned(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[str]]]:
    """Method, setting, and its measures on held and on test photographs, and RankMe of its projections at the end."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["group"] == SHORT.name:
            found.setdefault((row["start"], _setting(row)), {})[row["measure"]] = row["value"]
    names = ("held", "roi", "dense", "rankme")
    texts = {key: [f"{each[name]:.1f}" if name in each else "-" for name in names] for key, each in found.items()}
    return [(NAMES[start], setting, texts[start, setting]) for start, setting in sorted(texts)]


def _setting(row: Mapping[str, Any]) -> str:
    return f"{row['lr']:g}, {row['ema']:g}"
