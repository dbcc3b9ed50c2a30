"""The table of a comparison in words and as values; the same rows give the same text, however they were made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from scrl_fast.run import start_tables
from scrl_fast.run.start_tables import (
    chance_note,
    difference_cell,
    difference_values,
    markdown_table,
    mean_cell,
    percent,
)
from scrl_fast.run.statistics import CONFIDENCE, Difference, paired_difference, spread, t_quantile
from scrl_fast.transfer.compare.config import LABELLED
from scrl_fast.transfer.compare.rows import Row

MIN_SEEDS = 5  # seeds; with fewer the interval is so wide that the table says it
MEASURES = ("AP", "AP50")
MIN_AP = 1.0  # points; where no row reaches it, detectors have learned next to nothing yet


@dataclass
class Results:
    """What there is of a comparison so far.

    rows: planned. values: by `Row.name`, as `rows.values_of` makes them. failed: by the same name, the error.
    """

    rows: Sequence[Row]
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def by_seed(self, label: str, share: float, measure: str) -> dict[int, float]:
        """The values of a start and a share by seed."""
        chosen = [row for row in self.rows if (row.label, row.share) == (label, share) and row.name in self.values]
        found = {row.seed: self.values[row.name].get(measure) for row in chosen}
        return {seed: value for seed, value in found.items() if value is not None}

    @property
    def labels(self) -> list[str]:
        """The starts, the first one first."""
        return list(dict.fromkeys(row.label for row in self.rows))

    @property
    def shares(self) -> list[float]:
        return sorted({row.share for row in self.rows})

    @property
    def open(self) -> list[Row]:
        """Rows that are neither finished nor failed."""
        return [row for row in self.rows if row.name not in self.values and row.name not in self.failed]


def summary_of(results: Results) -> list[dict[str, Any]]:
    """A dict for each share and start: mean and deviation of each measure, and the difference to the first start."""
    first = results.labels[0]
    lines = []
    for share in results.shares:
        for label in results.labels:
            found = {name: results.by_seed(label, share, name) for name in MEASURES}
            line: dict[str, Any] = {"share": share, "start": label, "seeds": len(found["AP"])}
            line |= {name: asdict(spread(list(v.values()))) for name, v in found.items() if v}
            if label != first:
                difference = paired_difference(results.by_seed(first, share, "AP"), found["AP"])
                line["difference"] = difference and difference_values(difference)
                line["verdict"] = verdict(difference, first)
            lines.append(line)
    return lines


def verdict(difference: Difference | None, first: str) -> str:
    """Whether a start differs from the first one, in words."""
    if difference is None:
        return "no seed in common yet"
    if difference.interval is None:
        return "cannot be told: one seed"
    return f"{start_tables.verdict(difference, first)}, of {difference.pairs} seeds"


def markdown(title: str, results: Results, seen: Mapping[str, tuple[str, str]], notes: Sequence[str] = ()) -> str:
    """The table as text. seen: of each start, and of the labelled images, the validation images in it: short, and said.

    notes: sentences for below the table.
    """
    first = results.labels[0]
    head = ["labels", "start", "AP", "AP50", "seeds", f"AP - {first}", "beyond chance?", "validation images seen"]
    cells = [head, *([*_cells(line), seen[line["start"]][0]] for line in summary_of(results))]
    said = [f"- {note}" for note in (*_explained(results), *_seen(seen), *_missing(results), *notes)]
    return "\n".join([f"# {title}", "", *markdown_table(cells), "", *said, ""])


def _cells(line: Mapping[str, Any]) -> list[str]:
    measured = [_mean(line.get(name)) for name in MEASURES]
    compared = [difference_cell(line.get("difference")), line.get("verdict", "-")]
    return [percent(line["share"]), line["start"], *measured, str(line["seeds"]), *compared]


def _mean(found: Mapping[str, Any] | None) -> str:
    return "-" if found is None else mean_cell(found["mean"], found["deviation"])


def _explained(results: Results) -> list[str]:
    notes = ["Points from 0 to 100: mean ± standard deviation over seeds."]
    others, pairs = len(results.labels) - 1, [len(_seeds(results, share)) for share in results.shares]
    if others:
        notes.append(
            f"In brackets: {CONFIDENCE:.0%} interval of the difference, paired over seeds (Student's t); beyond chance "
            "where it leaves zero out."
        )
    reached = [value["AP"] or 0.0 for value in results.values.values()]
    if reached and max(reached) < MIN_AP:
        notes.append(
            f"No row reaches an AP of {MIN_AP:g}: train longer, or at a higher --optim.lr with --optim.clip_norm=5, "
            "before anything is concluded from this."
        )
    few = max(pairs, default=0)
    if others and 1 < few < MIN_SEEDS:
        factor = t_quantile(0.5 + CONFIDENCE / 2, few - 1) / math.sqrt(few)
        notes.append(
            f"{few} seeds are few: a difference counts only above {factor:.1f} times its own deviation over seeds, and "
            "smaller true differences are missed. More --seeds may be added to this comparison."
        )
    if others and few < 2:
        notes.append("One seed tells nothing about chance: give --seeds=3 or more.")
    notes += chance_note(others * len(results.shares))
    notes.append(
        "A seed repeats the fine-tuning: the images of a share, their order, the new layers. Pre-training is not "
        "repeated, so the table compares these weights, not the methods that made them."
    )
    return notes


def _seeds(results: Results, share: float) -> set[int]:
    return {row.seed for row in results.rows if row.share == share and row.name in results.values}


def _seen(seen: Mapping[str, tuple[str, str]]) -> list[str]:
    return [f"{seen_line(name, said)}." for name, (_, said) in seen.items()]


def seen_line(name: str, said: str) -> str:
    """What a start, or the labelled images, share with the validation images."""
    return f"{name[0].upper()}{name[1:]}: {said}" if name == LABELLED else f"Pre-training of {name}: {said}"


def _missing(results: Results) -> list[str]:
    alike: dict[tuple[str, str], list[Row]] = {}
    for row in results.rows:
        if row.name in results.failed:
            alike.setdefault((row.label, results.failed[row.name]), []).append(row)
    notes = [
        f"Failed: {rows[0].describe() if len(rows) == 1 else f'{label}, {len(rows)} rows'}: {error}"
        for (label, error), rows in alike.items()
    ]
    if results.open:
        notes.append(f"Not finished: {len(results.open)} of {len(results.rows)} rows.")
    return notes
