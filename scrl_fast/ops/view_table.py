"""What every form of `augment_views` reads: the table of views, packed images, and the numbers of a normalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

VIEW_DTYPE = np.dtype(
    [
        ("image", "i4"),  # which of the packed images
        ("y", "i4"), ("x", "i4"), ("h", "i4"), ("w", "i4"),  # crop, in pixels of the original image
        ("flip", "u1"),
        ("jitter", "u1"),  # 0: the next five fields are ignored
        ("order", "u1", (4,)),  # 0 brightness, 1 contrast, 2 saturation, 3 hue, in the order they are applied
        ("brightness", "f4"), ("contrast", "f4"), ("saturation", "f4"),  # factors >= 0, 1 changes nothing
        ("hue", "f4"),  # shift in turns of the colour circle, -0.5 to 0.5, 0 changes nothing
        ("grayscale", "u1"),
        ("blur", "u1"),  # NO_BLUR, RESIZE_BLUR or GAUSSIAN_BLUR
        ("blur_amount", "f4"),  # factor >= 1 by which the view shrinks and grows again, or sigma > 0 in view pixels
        ("solarize", "u1"),
    ],
    align=True,  # the layout of the C struct with the same fields
)  # fmt: skip
"""One view: what is cut out of which image and what is done to it, in the order of the fields."""

NO_BLUR, RESIZE_BLUR, GAUSSIAN_BLUR = 0, 1, 2
GAUSSIAN_TAPS = 23
_CPU = torch.device("cpu")


class PackedImages(NamedTuple):
    """Images of any sizes in one buffer.

    buffer: uint8 `[bytes]`, an array, or a tensor on a GPU. Image b is RGB: `heights[b]` rows of `widths[b]` pixels, no
    gaps, from byte `offsets[b]`. offsets, heights, widths: int64 `[B]`, arrays.
    """

    buffer: NDArray[np.uint8] | Tensor
    offsets: NDArray[np.int64]
    heights: NDArray[np.int64]
    widths: NDArray[np.int64]

    @property
    def device(self) -> torch.device:
        """Where the pixels lie."""
        return self.buffer.device if isinstance(self.buffer, Tensor) else _CPU

    def to(self, device: torch.device | str) -> PackedImages:
        """The images on a device; the copy of a pinned buffer does not wait."""
        buffer = self.buffer if isinstance(self.buffer, Tensor) else torch.from_numpy(self.buffer)
        return self._replace(buffer=buffer.to(device, non_blocking=True))

    def numpy(self) -> PackedImages:
        """The images in an array on the CPU."""
        return self._replace(buffer=self.buffer.cpu().numpy() if isinstance(self.buffer, Tensor) else self.buffer)

    def image(self, index: int) -> Any:
        """Image `index` as `[H, W, 3]`, a view into the buffer."""
        start, height, width = int(self.offsets[index]), int(self.heights[index]), int(self.widths[index])
        return self.buffer[start : start + height * width * 3].reshape(height, width, 3)


def pack_images(images: Sequence[NDArray[np.uint8]]) -> PackedImages:
    """uint8 `[H, W, 3]` arrays behind one another, copied; one contiguous array alone is taken as it is.

    Raises ValueError naming the first that is something else.
    """
    for index, image in enumerate(images):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"image {index} must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    if len(images) == 1:
        height, width, _ = images[0].shape
        return PackedImages(images[0].reshape(-1), np.zeros(1, np.int64), np.array([height]), np.array([width]))
    sizes = np.array([image.size for image in images], np.int64)
    buffer = np.concatenate([image.reshape(-1) for image in images]) if images else np.empty(0, np.uint8)
    shapes = np.array([image.shape[:2] for image in images], np.int64).reshape(-1, 2)
    return PackedImages(buffer, np.cumsum(sizes) - sizes, shapes[:, 0].copy(), shapes[:, 1].copy())


def normalization(mean: Sequence[float], std: Sequence[float]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scale and shift that turn a level 0..255 into a normalised value: `level * scale + shift`."""
    scale = 1.0 / (255.0 * np.asarray(std, np.float64))
    return scale.astype(np.float32), (-np.asarray(mean, np.float64) / np.asarray(std)).astype(np.float32)


def blurred_side(size: int, factor: float) -> int:
    """Side to which the resize blur shrinks: floor(size / factor), where 96 / float32(1.2) still counts as 80."""
    return max(1, math.floor(size / factor + 1e-3))
