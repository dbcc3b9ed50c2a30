"""The metric of each task, in points from 0 to 100 as papers give it; -1 where there is nothing to find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scrl_fast.transfer.coco_metric import Kind, coco_average_precision, ground_truth
from scrl_fast.transfer.detections import Detections

KINDS: dict[str, tuple[Kind, ...]] = {
    "detection": ("bbox",),
    "coco10": ("bbox",),
    "instance": ("bbox", "segm"),
    "keypoints": ("bbox", "keypoints"),
}


def measure(task: str, found: Sequence[Detections], source: Any) -> dict[str, float]:
    """The task's average precisions: of COCO ``bbox_AP``, ``segm_AP``, ``keypoints_AP``, ...; of others AP, ....

    custom: COCO's of what the detector gives (masks and keypoints beside boxes), against the objects as they were read.
    """
    if task == "voc":
        from scrl_fast.transfer.voc_metric import voc_average_precision

        return points(voc_average_precision(found, source))
    if task == "cityscapes":
        from scrl_fast.transfer.cityscapes_metric import cityscapes_average_precision

        return points(cityscapes_average_precision(found, source))
    result: dict[str, float] = {}
    own = task == "custom"
    for kind in kinds_of(found) if own else KINDS[task]:
        truth = ground_truth(source, kind, ignore_difficult=True) if own else source.annotation_file
        numbers = coco_average_precision(truth, found, source, kind)
        result |= {f"{kind}_{name}": value for name, value in numbers.items()}
    return points(result)


def kinds_of(found: Sequence[Detections]) -> tuple[Kind, ...]:
    """What these detections can be measured by."""
    kinds: list[Kind] = ["bbox"]
    if any(image.masks is not None for image in found):
        kinds.append("segm")
    if any(image.keypoints is not None for image in found):
        kinds.append("keypoints")
    return tuple(kinds)


def points(numbers: dict[str, float]) -> dict[str, float]:
    """Shares of one as points of a hundred; -1 stays."""
    return {name: -1.0 if value < 0 else 100 * value for name, value in numbers.items()}
