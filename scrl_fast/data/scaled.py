"""Large JPEGs decoded at a fraction of their size, where both views are made from crops that stay large enough.

libjpeg makes 1/2, 1/4 and 1/8 of a picture by leaving out the high frequencies of each block: less work than all of
them, and the pixels that a view of 224 would average away are never made. A photograph of 4032 x 3024 on one core:
decoding 43 ms instead of 90, its two views 3 ms instead of 77; their pixels differ from those of full decoding and the
same crop by 0.4 to 0.8 of 255 levels in the mean (three photographs, at most 1.5 in a view). 500 x 375 is never shrunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from scrl_fast.data.decode import Encoded, PixelBuffer
from scrl_fast.data.jpeg import SHRINKS
from scrl_fast.data.sources.base import EncodedImages, Source
from scrl_fast.data.views import crops_of


class Opened(Protocol):
    """An image of which the size is known and the pixels are not wanted yet: an `Encoded` or a `DecodedImage`."""

    height: int
    width: int
    decoding_bytes: int

    def can_shrink(self, shrink: int) -> bool: ...

    def decode(self, shrink: int = 1, buffer: PixelBuffer | None = None) -> Any: ...


class DecodedImage:
    """Pixels `[H, W, 3]` that are there already, an array or a tensor."""

    def __init__(self, pixels: Any) -> None:
        self.data, (self.height, self.width) = pixels, pixels.shape[:2]
        self.decoding_bytes = 0

    def can_shrink(self, shrink: int) -> bool:
        return shrink == 1

    def decode(self, shrink: int = 1, buffer: PixelBuffer | None = None) -> Any:
        return self.data


def open_image(source: Source, index: int) -> Encoded | DecodedImage:
    """Image `index` of any source. Raises BadImage."""
    return source.open(index) if isinstance(source, EncodedImages) else DecodedImage(source.read(index))


def largest_shrink(image: Opened, rows: np.ndarray, least: int) -> int:
    """By how much an image may be divided so that each crop in its rows stays `least` pixels high and wide."""
    if min(image.height, image.width) < SHRINKS[-1] * least:  # then no crop can be large enough
        return 1
    return next((shrink for shrink in SHRINKS if image.can_shrink(shrink) and _is_enough(rows, shrink, least)), 1)


def fit_to_shrunk(table: np.ndarray, shrinks: int | Sequence[int]) -> tuple[np.ndarray, NDArray[np.int64]]:
    """The table `[2, B]` for images divided by `shrinks` `[B]`, and the crops int64 `[2, B, 5]` in original pixels; or
    the rows `[2]` of one image, and its crops `[2, 5]`.

    Edges of a crop move inwards to the next whole pixel of the shrunk image, by less than shrink original pixels; the
    crops say where they came to lie, so boxes match in both views as exactly as without shrinking.
    """
    crops = crops_of(table)
    factor = np.asarray(shrinks, np.int64)
    if (factor == 1).all():
        return table, crops
    y, x, h, w = _shrunk_crop(table, factor)
    table = table.copy()
    table["y"], table["x"], table["h"], table["w"] = y, x, h, w
    crops[..., :4] = np.stack([y, x, h, w], axis=-1) * factor[..., None]
    return table, crops


def _is_enough(table: np.ndarray, shrink: int, least: int) -> bool:
    _, _, h, w = _shrunk_crop(table, np.array([shrink]))
    return bool(min(h.min(), w.min()) >= least)


def _shrunk_crop(table: np.ndarray, factor: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
    """The whole pixels of the shrunk image that lie inside the crop: y, x, h, w."""
    y, x, h, w = (table[name].astype(np.int64) for name in ("y", "x", "h", "w"))
    top, left = -(-y // factor), -(-x // factor)
    return top, left, (y + h) // factor - top, (x + w) // factor - left
