"""Cityscapes' instance-level AP, from the definition of its evaluation (cityscapes-dataset.com/benchmarks).

AP of each class is the area under precision and recall over all images, averaged over overlaps 0.5 to 0.95. Objects
below 100 pixels are not counted; an unmatched detection is ignored where enough of it lies on such an object, on a
group, or on void.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scrl_fast.data.sources.cityscapes import CLASSES, INSTANCE, VOID, class_of, instance_image, label_path
from scrl_fast.transfer.coco_metric import IOU_THRESHOLDS
from scrl_fast.transfer.detections import Detections
from scrl_fast.transfer.masks import mask_tools

MIN_PIXELS = 100


@dataclass
class _GroundTruth:
    """One object or group of a class in one image."""

    pixels: int
    counts: bool  # a single object of at least MIN_PIXELS


@dataclass
class _Prediction:
    """One detection and the labelled pixels that it covers."""

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
    table = np.full((len(IOU_THRESHOLDS), len(CLASSES)), np.nan)
    for label in range(len(CLASSES)):
        pairs = [image[label] for image in images]
        for row, overlap in enumerate(IOU_THRESHOLDS):
            table[row, label] = class_average_precision(pairs, overlap)
    by_class = [_mean(table[:, label]) for label in range(len(CLASSES))]
    result = {"AP": _mean(np.array([np.nan if v < 0 else v for v in by_class])), "AP50": _mean(table[0])}
    return result | {f"AP_{name}": value for name, value in zip(CLASSES, by_class, strict=True)}


def _mean(values: NDArray[np.float64]) -> float:
    return -1.0 if np.isnan(values).all() else float(np.nanmean(values))


def _matches(image: Detections, values: NDArray[np.int32]) -> list[tuple[list[_GroundTruth], list[_Prediction]]]:
    """For each class the truths and predictions of one image."""
    label_of = {class_id: label for label, class_id in enumerate(CLASSES.values())}
    truths: list[list[_GroundTruth]] = [[] for _ in CLASSES]
    places: dict[int, tuple[int, int]] = {}
    sizes = np.bincount(values.ravel())
    for value in np.flatnonzero(sizes).tolist():
        label = label_of.get(class_of(value))
        if label is not None:
            places[value] = label, len(truths[label])
            truths[label].append(_GroundTruth(int(sizes[value]), value >= INSTANCE and sizes[value] >= MIN_PIXELS))
    predictions: list[list[_Prediction]] = [[] for _ in CLASSES]
    tools = mask_tools()
    for mask, score, predicted in zip(image.masks or [], image.scores.tolist(), image.labels.tolist(), strict=True):
        under = np.bincount(values[tools.decode(mask).astype(bool)], minlength=1)
        pixels = int(under.sum())
        if not pixels:
            continue
        there = np.flatnonzero(under).tolist()
        prediction = _Prediction(pixels, score, sum(int(under[value]) for value in there if class_of(value) in VOID))
        for value in there:
            if value in places and places[value][0] == predicted:
                prediction.shared[places[value][1]] = int(under[value])
        predictions[predicted].append(prediction)
    return list(zip(truths, predictions, strict=True))


def class_average_precision(images: Sequence[tuple[list[_GroundTruth], list[_Prediction]]], overlap: float) -> float:
    """AP of one class at one overlap; NaN where there is nothing to find."""
    right: list[bool] = []
    scores: list[float] = []
    missed = wanted = predicted = 0
    for truths, predictions in images:
        wanted += sum(truth.counts for truth in truths)
        predicted += len(predictions)
        taken: set[int] = set()
        for place, truth in enumerate(truths):
            if truth.counts:
                missed += not _take(place, truth, predictions, overlap, taken, right, scores)
        for prediction in predictions:
            if not any(_overlap(prediction, place, truths[place]) > overlap for place in prediction.shared):
                _score_unmatched(prediction, truths, overlap, right, scores)
    if not wanted:
        return float("nan")
    return _area(np.array(right, bool), np.array(scores), missed) if predicted and scores else 0.0


def _take(
    place: int,
    truth: _GroundTruth,
    predictions: list[_Prediction],
    overlap: float,
    taken: set[int],
    right: list[bool],
    scores: list[float],
) -> bool:
    """The best-scored prediction over a truth is right, every other one over it is wrong."""
    over = [
        (prediction.score, i)
        for i, prediction in enumerate(predictions)
        if i not in taken and place in prediction.shared and _overlap(prediction, place, truth) > overlap
    ]
    for rank, (score, i) in enumerate(sorted(over, key=lambda pair: -pair[0])):
        right.append(rank == 0)
        scores.append(score)
        taken.add(i)
    return bool(over)


def _overlap(prediction: _Prediction, place: int, truth: _GroundTruth) -> float:
    shared = prediction.shared.get(place, 0)
    return shared / (prediction.pixels + truth.pixels - shared)


def _score_unmatched(
    prediction: _Prediction, truths: list[_GroundTruth], overlap: float, right: list[bool], scores: list[float]
) -> None:
    ignored = prediction.void + sum(n for place, n in prediction.shared.items() if not truths[place].counts)
    if ignored / prediction.pixels <= overlap:
        right.append(False)
        scores.append(prediction.score)


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
