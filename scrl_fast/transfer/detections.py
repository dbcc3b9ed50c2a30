"""What a detector found in one image, as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass
class Detections:
    """What a detector found in one image, the best score first."""

    index: int
    """Of the image in its source."""
    boxes: NDArray[np.float32]
    """``[n, 4]`` as x0, y0, x1, y1 in pixels of the image."""
    scores: NDArray[np.float32]
    """``[n]``, 0 to 1."""
    labels: NDArray[np.int64]
    """``[n]``, 0 to classes - 1."""
    masks: list[dict[str, Any]] | None = None
    """``n`` masks as COCO's compressed run lengths; None without masks."""
    keypoints: NDArray[np.float32] | None = None
    """``[n, K, 3]`` as x, y, 1; None without keypoints."""


def to_arrays(network: nn.Module, found: Mapping[str, Tensor]) -> dict[str, Any]:
    """A network's output for one image as ``boxes``, ``scores``, ``labels``, ``masks`` and ``keypoints``.

    As `Detections` has them, but masks are bool ``[n, H, W]``; what the network does not find is None.
    """
    numbers = ("boxes", "scores", "keypoints")
    arrays = {name: found[name].float().cpu().numpy() if name in found else None for name in numbers}
    labels = found["labels"].cpu().numpy().astype(np.int64) - first_label(network)
    return arrays | {"labels": labels, "masks": hard_masks(found["masks"]).cpu().numpy() if "masks" in found else None}


def first_label(network: nn.Module) -> int:
    """The network's number for the first class: 1 where 0 is the background, else 0."""
    return int(network.first_label)  # type: ignore[arg-type]


def hard_masks(masks: Tensor) -> Tensor:
    """Soft masks ``[n, 1, H, W]`` as bool ``[n, H, W]``: a pixel belongs to the object from one half on."""
    return masks[:, 0] >= 0.5
