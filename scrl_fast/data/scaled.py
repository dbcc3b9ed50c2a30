"""Large JPEGs decoded at a fraction of their size, where both views are made from crops that stay large enough.

libjpeg makes 1/2, 1/4 and 1/8 of a picture by leaving out the high frequencies of each block: less work than all of
them, and the pixels that a view of 224 would average away are never made. A photograph of 4032 x 3024 on one core:
decoding 43 ms instead of 90, its two views 3 ms instead of 77; their pixels differ from those of full decoding and the
same crop by 0.4 to 0.8 of 255 levels in the mean (three photographs, at most 1.5 in a view). 500 x 375 is never shrunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scrl_fast.config import Config
from scrl_fast.data.decode import SHRINKS, Room
from scrl_fast.data.source import EncodedImages, Source
from scrl_fast.views import crops_of, draw_views


class Decoded(NamedTuple):
    """pixels: uint8 `[h, w, 3]`; size: (height, width) of the image in its file; shrink: 1, or what it was divided by.
    Pixel (i, j) covers rows from i * shrink on, columns from j * shrink on."""

    pixels: NDArray[np.uint8]
    size: tuple[int, int]
    shrink: int = 1


def decode_for_views(
    source: Source, index: int, config: Config, *, seed: int, epoch: int, room: Room | None = None
) -> Decoded:
    """Image `index`, shrunk as far as both of its views in this epoch allow, in `room` if it can lie there."""
    if not (config.data.scaled_decode and isinstance(source, EncodedImages)):
        pixels = source.read(index)
        return Decoded(pixels, pixels.shape[:2])
    encoded = source.open(index)
    size, least = (encoded.height, encoded.width), config.views.size
    shrink = 1
    if min(size) >= SHRINKS[-1] * least and encoded.can_shrink(SHRINKS[-1]):  # else no crop can be large enough
        # a view depends on (seed, epoch, index) only: these are the rows that the batch draws again
        table = draw_views(config.views, [size], seed=seed, epoch=epoch, keys=[index])
        shrink = next((s for s in SHRINKS if encoded.can_shrink(s) and _is_enough(table, s, least)), 1)
    return Decoded(encoded.decode(shrink, room), size, shrink)


def fit_to_shrunk(table: np.ndarray, shrinks: Sequence[int]) -> tuple[np.ndarray, NDArray[np.int64]]:
    """The table `[2, B]` for images divided by `shrinks` `[B]`, and the crops int64 `[2, B, 5]` in original pixels.

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
    crops[..., :4] = np.stack([y, x, h, w], axis=-1) * factor[:, None]
    return table, crops


def _is_enough(table: np.ndarray, shrink: int, least: int) -> bool:
    _, _, h, w = _shrunk_crop(table, np.array([shrink]))
    return bool(min(h.min(), w.min()) >= least)


def _shrunk_crop(table: np.ndarray, factor: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
    """The whole pixels of the shrunk image that lie inside the crop: y, x, h, w."""
    y, x, h, w = (table[name].astype(np.int64) for name in ("y", "x", "h", "w"))
    top, left = -(-y // factor), -(-x // factor)
    return top, left, (y + h) // factor - top, (x + w) // factor - left
