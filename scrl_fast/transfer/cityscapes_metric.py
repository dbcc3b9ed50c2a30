"""Cityscapes' instance-level AP, from the definition of its evaluation (cityscapes-dataset.com/benchmarks).

AP of each class is the area under precision and recall over all images, averaged over overlaps 0.5 to 0.95. Objects
below 100 pixels are not looked for; a detection that finds nothing is no mistake where enough of it lies on such an
object, on a group, or on void.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scrl_fast.data.sources.cityscapes import CLASSES, INSTANCE, VOID, class_of, instance_image, label_path
from scrl_fast.transfer.detections import Detections
from scrl_fast.transfer.masks import mask_tools

OVERLAPS = tuple(np.round(np.arange(0.5, 1.0, 0.05), 2).tolist())
LEAST_PIXELS = 100


@dataclass
class _Truth:
    """One object or group of a class in one image."""

    pixels: int
    counts: bool  # an object of its own, and large enough to be looked for


@dataclass
class _Guess:
    """One detection, and what lies under it."""

    pixels: int
    score: float
    void: int
    shared: dict[int, int] = field(default_factory=dict)  # pixels by place in the image's list of truths


def cityscapes_average_precision(found: Sequence[Detections], source: Any) -> dict[str, float]:
    """AP, AP50 and each class's AP as ``AP_car``: 0 to 1, -1 for a class that no image has."""
    images = [
        _matches(image, instance_image(label_path(source.annotation_file, source.objects[image.index].file_name)))
        for image in found
    ]
    table = np.full((len(OVERLAPS), len(CLASSES)), np.nan)
    for label in range(len(CLASSES)):
        pairs = [image[label] for image in images]
        for row, overlap in enumerate(OVERLAPS):
            table[row, label] = class_average_precision(pairs, overlap)
    by_class = [_mean(table[:, label]) for label in range(len(CLASSES))]
    result = {"AP": _mean(np.array([np.nan if v < 0 else v for v in by_class])), "AP50": _mean(table[0])}
    return result | {f"AP_{name}": value for name, value in zip(CLASSES, by_class, strict=True)}


def _mean(values: NDArray[np.float64]) -> float:
    return -1.0 if np.isnan(values).all() else float(np.nanmean(values))


def _matches(image: Detections, values: NDArray[np.int32]) -> list[tuple[list[_Truth], list[_Guess]]]:
    """For each class the truths and guesses of one image."""
    label_of = {class_id: label for label, class_id in enumerate(CLASSES.values())}
    truths: list[list[_Truth]] = [[] for _ in CLASSES]
    places: dict[int, tuple[int, int]] = {}
    sizes = np.bincount(values.ravel())
    for value in np.flatnonzero(sizes).tolist():
        label = label_of.get(class_of(value))
        if label is not None:
            places[value] = label, len(truths[label])
            truths[label].append(_Truth(int(sizes[value]), value >= INSTANCE and sizes[value] >= LEAST_PIXELS))
    guesses: list[list[_Guess]] = [[] for _ in CLASSES]
    tools = mask_tools()
    for mask, score, guessed in zip(image.masks or [], image.scores.tolist(), image.labels.tolist(), strict=True):
        under = np.bincount(values[tools.decode(mask).astype(bool)], minlength=1)
        pixels = int(under.sum())
        if not pixels:
            continue
        there = np.flatnonzero(under).tolist()
        guess = _Guess(pixels, score, sum(int(under[value]) for value in there if class_of(value) in VOID))
        for value in there:
            if value in places and places[value][0] == guessed:
                guess.shared[places[value][1]] = int(under[value])
        guesses[guessed].append(guess)
    return list(zip(truths, guesses, strict=True))


def class_average_precision(images: Sequence[tuple[list[_Truth], list[_Guess]]], overlap: float) -> float:
    """AP of one class at one overlap; NaN where there is nothing to find."""
    right: list[bool] = []
    scores: list[float] = []
    missed = wanted = guessed = 0
    for truths, guesses in images:
        wanted += sum(truth.counts for truth in truths)
        guessed += len(guesses)
        taken: set[int] = set()
        for place, truth in enumerate(truths):
            if truth.counts:
                missed += not _take(place, truth, guesses, overlap, taken, right, scores)
        for guess in guesses:
            if not any(_overlap(guess, place, truths[place]) > overlap for place in guess.shared):
                _judge_unmatched(guess, truths, overlap, right, scores)
    if not wanted:
        return float("nan")
    return _area(np.array(right, bool), np.array(scores), missed) if guessed and scores else 0.0


def _take(
    place: int,
    truth: _Truth,
    guesses: list[_Guess],
    overlap: float,
    taken: set[int],
    right: list[bool],
    scores: list[float],
) -> bool:
    """The best-scored guess over a truth is right, every other one over it is wrong."""
    over = [
        (guess.score, i)
        for i, guess in enumerate(guesses)
        if i not in taken and place in guess.shared and _overlap(guess, place, truth) > overlap
    ]
    for rank, (score, i) in enumerate(sorted(over, key=lambda pair: -pair[0])):
        right.append(rank == 0)
        scores.append(score)
        taken.add(i)
    return bool(over)


def _overlap(guess: _Guess, place: int, truth: _Truth) -> float:
    shared = guess.shared.get(place, 0)
    return shared / (guess.pixels + truth.pixels - shared)


def _judge_unmatched(
    guess: _Guess, truths: list[_Truth], overlap: float, right: list[bool], scores: list[float]
) -> None:
    ignored = guess.void + sum(n for place, n in guess.shared.items() if not truths[place].counts)
    if ignored / guess.pixels <= overlap:
        right.append(False)
        scores.append(guess.score)


def _area(right: NDArray[np.bool_], scores: NDArray[np.float64], missed: int) -> float:
    """Area under the curve, by the trapezoids over recall that the official evaluation takes."""
    order = np.argsort(scores, kind="stable")
    right, scores = right[order], scores[order]
    _, first = np.unique(scores, return_index=True)  # thresholds, the lowest first
    below = np.concatenate([[0], right.cumsum()])[first]  # right ones that a threshold leaves out
    hits = right.sum() - below
    precision = np.append(hits / (len(right) - first), 1.0)
    recall = np.append(hits / (right.sum() + missed), 0.0)
    padded = np.concatenate([recall[:1], recall, [0.0]])
    return float(precision @ (0.5 * (padded[:-2] - padded[2:])))
