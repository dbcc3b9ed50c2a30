"""The rows and the table of a comparison of frozen encoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from scrl_fast.evaluate.bootstrap import DRAWS, MEASURES, PairedBootstrap, Right
from scrl_fast.evaluate.config import CompareOptions
from scrl_fast.run import start_tables
from scrl_fast.run.start_tables import chance_note, difference_values, markdown_table, percent
from scrl_fast.run.statistics import CONFIDENCE, Difference, Spread, spread

TITLES = {"accuracy": "top-1", "mean_class_accuracy": "mean over classes"}
FEW_SEEDS, FEW_IMAGES = 5, 20


@dataclass(frozen=True)
class Row:
    """One classifier. right: which test boxes it names rightly. Measures are shares, 0 to 1."""

    start: str
    share: float
    seed: int
    accuracy: float
    mean_class_accuracy: float
    boxes: int
    train_boxes: int
    right: Right = field(repr=False, compare=False)

    def values(self) -> dict[str, Any]:
        """The row for ``--json``."""
        return {name: value for name, value in vars(self).items() if name != "right"}


@dataclass
class StartResults:
    """The rows so far. seeds: by share; draws: by the number of seeds."""

    seeds: dict[float, tuple[int, ...]]
    draws: dict[int, PairedBootstrap]
    images: int
    boxes: int
    untaught: tuple[int, int]
    """Test boxes, and their classes, of which no training image has a box."""
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def of(cls, taught: Tensor, labels: Tensor, images: Tensor, options: CompareOptions) -> StartResults:
        """None yet. taught: labels of the training boxes. labels, images: ``[n]`` of the test boxes."""
        new = labels[~torch.isin(labels, taught)]
        seeds = {share: options.seeds_of(share) for share in options.shares}
        counts = set(map(len, seeds.values()))
        draws = {n: PairedBootstrap(labels.numpy(), images.numpy(), n, seed=options.seed) for n in counts}
        return cls(seeds, draws, len(images.unique()), len(labels), (len(new), len(new.unique())))

    @property
    def starts(self) -> list[str]:
        """The starts, the first one first."""
        return list(dict.fromkeys(row.start for row in self.rows))

    @property
    def shares(self) -> tuple[float, ...]:
        """Shares of the training images, the smallest first."""
        return tuple(self.seeds)

    def add(self, start: str, share: float, seed: int, right: Right, train_boxes: int) -> None:
        """A classifier is finished."""
        draws = self.draws[len(self.seeds[share])]
        accuracy, over_classes = (draws.means([right], measure)[0] for measure in MEASURES)
        self.rows.append(Row(start, share, seed, accuracy, over_classes, self.boxes, train_boxes, right))

    def of_start(self, start: str, share: float) -> list[Row]:
        """The rows of a start and a share, in the order of seeds."""
        return [row for row in self.rows if (row.start, row.share) == (start, share)]

    def spreads(self, start: str, measure: str, scale: float = 1) -> dict[float, Spread]:
        """Mean and deviation of a measure by share."""
        found = {share: [scale * getattr(row, measure) for row in self.of_start(start, share)] for share in self.shares}
        return {share: spread(values) for share, values in found.items()}

    def difference(self, start: str, share: float, measure: str) -> Difference:
        """A start's difference to the first one."""
        first, other = ([row.right for row in self.of_start(name, share)] for name in (self.starts[0], start))
        return self.draws[len(first)].difference(first, other, measure)


def summary_of(results: StartResults) -> list[dict[str, Any]]:
    """A dict for each share and start: mean and deviation of each measure, and the difference to the first start."""
    lines = []
    for share in results.shares:
        for start in results.starts:
            rows = results.of_start(start, share)
            line: dict[str, Any] = {"share": share, "start": start, "seeds": len(rows)}
            line |= {measure: asdict(results.spreads(start, measure)[share]) for measure in MEASURES}
            if start != results.starts[0]:
                found = {measure: results.difference(start, share, measure) for measure in MEASURES}
                line["difference"] = {measure: difference_values(each) for measure, each in found.items()}
                line["verdict"] = {m: _verdict(each, results.starts[0]) for m, each in found.items()}
            lines.append(line)
    return lines


def _verdict(difference: Difference, first: str) -> str:
    if difference.interval is None:
        return "not known: too few images"
    return start_tables.verdict(difference, first)


def markdown(title: str, results: StartResults, lines: Sequence[dict[str, Any]], notes: Sequence[str] = ()) -> str:
    """The table as text, with what it says and what it does not below. lines: its `summary_of`."""
    first = results.starts[0]
    head = ["labels", "start", "seeds", *TITLES.values()]
    head += [text for measure in TITLES.values() for text in (f"{measure} - {first}", "beyond chance?")]
    cells = [head, *map(_cells, lines)]
    return "\n".join(
        [f"# {title}", "", *markdown_table(cells), "", *(f"- {note}" for note in (*_notes(results), *notes))]
    )


def _cells(line: dict[str, Any]) -> list[str]:
    means = [line[measure] for measure in MEASURES]
    measured = [
        start_tables.mean_cell(100 * each["mean"], each["deviation"] and 100 * each["deviation"]) for each in means
    ]
    cells = [percent(line["share"]), line["start"], str(line["seeds"]), *measured]
    for measure in MEASURES:
        found = line.get("difference", {}).get(measure)
        scaled = found and {
            "mean": 100 * found["mean"],
            "interval": found["interval"] and [100 * end for end in found["interval"]],
        }
        cells += [start_tables.difference_cell(scaled), line.get("verdict", {}).get(measure, "-")]
    return cells


def _notes(results: StartResults) -> list[str]:
    others, drawn = len(results.starts) - 1, [len(seeds) for share, seeds in results.seeds.items() if share < 1]
    notes = [
        "Percent of the test boxes that a linear classifier names rightly from frozen features, and the mean over "
        "classes: mean ± standard deviation over seeds."
    ]
    if others:
        notes.append(
            f"In brackets: {CONFIDENCE:.0%} interval of the difference, {DRAWS:,} draws of test images and seeds, "
            "paired over starts; beyond chance where it leaves zero out."
        )
        notes += chance_note(others * len(results.shares) * len(MEASURES))
    if others and results.images < FEW_IMAGES:
        notes.append(f"{results.images} test images are few: intervals are less sure than they say.")
    if results.untaught[0]:
        boxes, classes = results.untaught
        notes.append(f"{boxes} test boxes, of {classes} classes without a training box, count as named wrongly.")
    if others and drawn and drawn[0] == 1:
        notes.append("One seed: what the choice of training images does is in no interval; give --seeds=5 or more.")
    elif others and drawn and drawn[0] < FEW_SEEDS:
        notes.append(f"{drawn[0]} seeds are few: intervals are wide, and less sure than they say; give --seeds=5.")
    notes.append(
        "Features are compared as they are, not detectors trained from them (python -m scrl_fast.transfer compare)."
    )
    return notes
