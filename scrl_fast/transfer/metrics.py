"""The metric of each task, in points from 0 to 100 as papers give it; -1 where there is nothing to find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scrl_fast.transfer.coco_metric import Kind, coco_average_precision
from scrl_fast.transfer.detections import Detections

KINDS: dict[str, tuple[Kind, ...]] = {
    "detection": ("bbox",),
    "coco10": ("bbox",),
    "instance": ("bbox", "segm"),
    "keypoints": ("bbox", "keypoints"),
}


def measure(task: str, found: Sequence[Detections], source: Any) -> dict[str, float]:
    """The task's average precisions: of COCO ``bbox_AP``, ``segm_AP``, ``keypoints_AP``, ...; of others AP, ...."""
    if task == "voc":
        from scrl_fast.transfer.voc_metric import voc_average_precision

        return points(voc_average_precision(found, source))
    if task == "cityscapes":
        from scrl_fast.transfer.cityscapes_metric import cityscapes_average_precision

        return points(cityscapes_average_precision(found, source))
    result: dict[str, float] = {}
    for kind in KINDS[task]:
        numbers = coco_average_precision(source.annotation_file, found, source, kind)
        result |= {f"{kind}_{name}": value for name, value in numbers.items()}
    return points(result)


def points(numbers: dict[str, float]) -> dict[str, float]:
    """Shares of one as points of a hundred; -1 stays."""
    return {name: -1.0 if value < 0 else 100 * value for name, value in numbers.items()}
