"""The detections of one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


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
