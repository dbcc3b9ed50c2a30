"""The augmentation recipe: draws what happens to each view; the pixels are made by ``ops.augment_views``.

Everything random about a view is one row of a table, drawn before any pixel is read: the box sampler needs the crops,
and a row can be replayed or compared. Source: SCRL (arXiv 2103.06122) section 4, BYOL (arXiv 2006.07733) appendix B;
crops follow torchvision's RandomResizedCrop.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scrl_fast.config.schema import ViewsConfig
from scrl_fast.ops.philox import uniforms
from scrl_fast.ops.view_table import GAUSSIAN_BLUR, NO_BLUR, RESIZE_BLUR, VIEW_DTYPE

__all__ = ["VIEW_DTYPE", "crops_of", "draw_views"]

RESIZE_BLUR_FACTORS = (1.1, 1.2, 1.5)
CROP_TRIES = 10
_CENTRE_SHARE = 224 / 256  # recipe none: the usual evaluation crop, whatever the size of the view
_PURPOSE = 0x76696577
_ORDERS = np.array(list(permutations(range(4))), np.uint8)

# Places in a view's row of uniform numbers. New ones go to the end: a place that moves changes every seeded run.
_AREA, _ASPECT = slice(0, CROP_TRIES), slice(CROP_TRIES, 2 * CROP_TRIES)
_TOP, _LEFT, _FLIP, _JITTER, _ORDER = range(20, 25)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GRAYSCALE, _BLUR, _AMOUNT, _SOLARIZE = range(25, 33)
_COUNT = 33


def draw_views(config: ViewsConfig, sizes: ArrayLike, *, seed: int, epoch: int, keys: ArrayLike) -> np.ndarray:
    """Draw both views of every image: a table `[2, B]` of VIEW_DTYPE, row 0 view 1, row 1 view 2.

    sizes: `[B, 2]` height and width of the images in pixels. keys: `[B]`, identifies each image: its two views depend
    on (seed, epoch, key) only, wherever in whatever batch it lies. `image` counts 0..B-1.
    Raises ValueError naming an ill-shaped argument or an image without pixels.
    """
    sizes, keys = np.asarray(sizes, np.int64), np.asarray(keys, np.int64)
    if sizes.ndim != 2 or sizes.shape[1] != 2 or keys.shape != sizes.shape[:1]:
        raise ValueError(f"sizes must be [B, 2] and keys [B], got {list(sizes.shape)} and {list(keys.shape)}")
    if sizes.size and not sizes.min() > 0:
        raise ValueError(f"sizes must be positive, got {sizes.min()}")
    table = np.zeros((2, len(keys)), VIEW_DTYPE)
    for view, rows in enumerate(table):
        rows["image"] = np.arange(len(keys))
        rows["order"] = _ORDERS[0]
        rows["brightness"] = rows["contrast"] = rows["saturation"] = 1
        if config.recipe == "none":
            _centre_crop(rows, sizes)
            continue
        u = uniforms(seed, epoch, keys, _COUNT, stream=view, purpose=_PURPOSE)
        _random_resized_crop(rows, sizes, u, config)
        rows["flip"] = u[:, _FLIP] < config.flip
        if config.recipe == "simclr":
            _photometric(rows, u, config, view)
    return table


def crops_of(table: np.ndarray) -> NDArray[np.int64]:
    """The crops of a table as `sample_box_pairs` takes them: int64 `[..., 5]`, rows (y, x, h, w, flip)."""
    crops = np.empty((*table.shape, 5), np.int64)
    for place, name in enumerate(("y", "x", "h", "w", "flip")):
        crops[..., place] = table[name]
    return crops


def _centre_crop(rows: np.ndarray, sizes: NDArray[np.int64]) -> None:
    side = np.maximum(np.rint(sizes.min(axis=1) * _CENTRE_SHARE), 1).astype(np.int64)
    rows["h"] = rows["w"] = side
    rows["y"], rows["x"] = ((sizes - side[:, None]) // 2).T


def _random_resized_crop(rows: np.ndarray, sizes: NDArray[np.int64], u: np.ndarray, config: ViewsConfig) -> None:
    """torchvision's rule: the first of ten random shapes that fits, at a random place, else the largest central crop
    whose ratio is in range. All ten are computed at once; hardly any image needs more than two."""
    height, width = sizes.T
    area = (height * width)[:, None] * _between(u[:, _AREA], *config.scale)
    aspect = np.exp(_between(u[:, _ASPECT], *np.log(config.ratio)))
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    found = fits.any(axis=1)
    first = np.arange(len(sizes)), fits.argmax(axis=1)
    central_h, central_w = _largest_in_ratio(height, width, *config.ratio)
    rows["h"], rows["w"] = np.where(found, h[first], central_h), np.where(found, w[first], central_w)
    free_y, free_x = height - rows["h"], width - rows["w"]
    rows["y"] = np.where(found, np.floor(u[:, _TOP] * (free_y + 1)), free_y // 2)
    rows["x"] = np.where(found, np.floor(u[:, _LEFT] * (free_x + 1)), free_x // 2)


def _largest_in_ratio(height: np.ndarray, width: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    narrow, wide = width / height < low, width / height > high
    # at least one pixel: an image of 1 x 9 would otherwise give a crop of height 0
    h = np.where(narrow, np.minimum(np.maximum(np.rint(width / low), 1), height), height)
    w = np.where(wide, np.minimum(np.maximum(np.rint(height * high), 1), width), width)
    return h, w


def _photometric(rows: np.ndarray, u: np.ndarray, config: ViewsConfig, view: int) -> None:
    rows["jitter"] = u[:, _JITTER] < config.jitter
    rows["order"] = _ORDERS[(u[:, _ORDER] * len(_ORDERS)).astype(np.int64)]
    for name, place in (("brightness", _BRIGHTNESS), ("contrast", _CONTRAST), ("saturation", _SATURATION)):
        strength = getattr(config, name)
        rows[name] = _between(u[:, place], max(0.0, 1 - strength), 1 + strength)
    rows["hue"] = _between(u[:, _HUE], -config.hue, config.hue)
    rows["grayscale"] = u[:, _GRAYSCALE] < config.grayscale
    blurred = u[:, _BLUR] < config.blur_probability[view]
    if config.blur == "resize":
        rows["blur"] = np.where(blurred, RESIZE_BLUR, NO_BLUR)
        rows["blur_amount"] = np.array(RESIZE_BLUR_FACTORS)[(u[:, _AMOUNT] * len(RESIZE_BLUR_FACTORS)).astype(np.int64)]
    else:
        rows["blur"] = np.where(blurred, GAUSSIAN_BLUR, NO_BLUR)
        rows["blur_amount"] = _between(u[:, _AMOUNT], *config.blur_sigma)
    rows["solarize"] = u[:, _SOLARIZE] < config.solarize_probability[view]


def _between(u: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + u * (high - low)
