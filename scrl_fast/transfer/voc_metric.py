"""Pascal VOC's average precision, from the definition of its development kit.

A detection is right when its IoU with a box of its class that no better-scored detection has taken reaches the
threshold; one that lies on a difficult object counts neither way. Source: Everingham et al., IJCV 2010, section 4.2;
AP averaged over thresholds 0.5 to 0.95, as COCO does, is what the paper's VOC row gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scrl_fast.transfer.coco_metric import IOU_THRESHOLDS
from scrl_fast.transfer.detections import Detections


def voc_average_precision(found: Sequence[Detections], source: Any) -> dict[str, float]:
    """AP (mean over the thresholds), AP50, AP75 by the eleven-point rule of VOC 2007, and AP50 by the area (2010 on).

    Means over the classes that have an object to find; 0 to 1, -1 where no class has.
    """
    eleven = np.full((len(IOU_THRESHOLDS), len(source.classes)), np.nan)
    area = np.full(len(source.classes), np.nan)
    for label in range(len(source.classes)):
        candidates = _sorted(found, label)
        for row, threshold in enumerate(IOU_THRESHOLDS):
            right, wrong, total = _judge(candidates, source, found, label, threshold)
            if total:
                recall, precision = _curve(right, wrong, total)
                eleven[row, label] = eleven_point(recall, precision)
                if threshold == 0.5:
                    area[label] = area_under(recall, precision)
    if np.isnan(eleven).all():
        return dict.fromkeys(("AP", "AP50", "AP75", "AP50_area"), -1.0)
    by_threshold = np.nanmean(eleven, axis=1)
    return {
        "AP": float(by_threshold.mean()),
        "AP50": float(by_threshold[IOU_THRESHOLDS.index(0.5)]),
        "AP75": float(by_threshold[IOU_THRESHOLDS.index(0.75)]),
        "AP50_area": float(np.nanmean(area)),
    }


def _sorted(found: Sequence[Detections], label: int) -> list[tuple[float, int, NDArray[np.float32]]]:
    rows = [
        (float(score), image.index, box)
        for image in found
        for box, score, its in zip(image.boxes, image.scores, image.labels, strict=True)
        if its == label
    ]
    return sorted(rows, key=lambda row: -row[0])


def _judge(
    candidates: Sequence[tuple[float, int, NDArray[np.float32]]],
    source: Any,
    found: Sequence[Detections],
    label: int,
    threshold: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """For every detection whether it is right and whether it is wrong, and the number of objects to find."""
    truth = {}
    total = 0
    for image in found:
        objects = source.objects[image.index]
        chosen = objects.labels == label
        truth[image.index] = (objects.boxes[chosen], objects.difficult[chosen], np.zeros(chosen.sum(), bool))
        total += int((~objects.difficult[chosen]).sum())
    right, wrong = np.zeros(len(candidates)), np.zeros(len(candidates))
    for row, (_, index, box) in enumerate(candidates):
        boxes, difficult, taken = truth[index]
        overlaps = iou(box, boxes)
        best = int(overlaps.argmax()) if len(overlaps) else -1
        if best < 0 or overlaps[best] < threshold:
            wrong[row] = 1
        elif not difficult[best]:
            right[row], wrong[row] = (0, 1) if taken[best] else (1, 0)
            taken[best] = True
    return right, wrong, total


def iou(box: NDArray[np.float32], boxes: NDArray[np.float32]) -> NDArray[np.float64]:
    """IoU of one box with ``[n, 4]`` others; far edges not included, so no pixel is added."""
    corner = np.maximum(boxes[:, :2], box[:2])
    sides = np.clip(np.minimum(boxes[:, 2:], box[2:]) - corner, 0, None)
    shared = sides.prod(1).astype(np.float64)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return shared / np.maximum(areas + (box[2:] - box[:2]).prod() - shared, 1e-12)


def _curve(
    right: NDArray[np.float64], wrong: NDArray[np.float64], total: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    right, wrong = right.cumsum(), wrong.cumsum()
    return right / total, right / np.maximum(right + wrong, 1e-12)


def eleven_point(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    """Mean of the best precision at recalls 0, 0.1, ..., 1 and beyond."""
    points = [precision[recall >= t - 1e-12].max(initial=0.0) for t in np.linspace(0, 1, 11)]
    return float(np.mean(points))


def area_under(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    """Area under the curve once precision is made to fall with recall."""
    recall = np.concatenate([[0.0], recall, [1.0]])
    precision = np.concatenate([[0.0], precision, [0.0]])
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.flatnonzero(recall[1:] != recall[:-1])
    return float(((recall[steps + 1] - recall[steps]) * precision[steps + 1]).sum())
