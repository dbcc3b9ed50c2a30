"""From a table of views to the plan that the Triton form of `augment_views` reads; see kernels/augment_views.py."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scrl_fast.ops.view_table import GAUSSIAN_TAPS, RESIZE_BLUR, PackedImages, blurred_side, normalization

_TO_GREY = 4
_CONTRAST = 1
_MOST_BYTES = 2**31 - 1
_MOST_ROWS = 65535 * 32  # of a launch: tiles of 32 rows along the grid's second axis
_STEPS = 5  # four colours and grey
_NEUTRAL = np.array([1, 1, 1, 0], np.float32)  # brightness, contrast, saturation, hue that change nothing


def triton_augment_views(
    images: PackedImages,
    rows: np.ndarray,
    out: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    solarize_threshold: int = 128,
    threads: int = 1,
) -> None:
    """The views on the device where buffer and out lie; arguments checked by `augment_views`, threads not used."""
    from scrl_fast.kernels.augment_views import make_views

    size = out.shape[-1]
    buffer = images.buffer if isinstance(images.buffer, Tensor) else torch.from_numpy(images.buffer)
    plan, amounts = make_plan(images, rows, size)
    scale, shift = normalization(mean, std)
    half = min(GAUSSIAN_TAPS, 2 * size - 1) // 2
    spaced = not (out.is_contiguous() or out.is_contiguous(memory_format=torch.channels_last))
    views = torch.empty(out.shape, dtype=out.dtype, device=out.device) if spaced else out
    with torch.cuda.device_of(out):  # Triton launches on the current device
        make_views(buffer, plan, amounts, views, [*scale.tolist(), *shift.tolist()], solarize_threshold, half)
    if spaced:
        out.copy_(views)


def make_plan(images: PackedImages, rows: np.ndarray, size: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Plan int64 `[V, len(PLAN)]` and amounts float32 `[V, 6]` of the views of `size` pixels."""
    from scrl_fast.kernels.augment_views import PLAN

    kinds, amounts, count = colour_steps(rows)
    place = np.arange(_STEPS)
    contrast = np.where((kinds == _CONTRAST) & (place < count[:, None]), place, _STEPS).min(axis=1)
    stride = images.widths[rows["image"]] * 3
    narrow = 3 * size * rows["h"].astype(np.int64)
    if len(rows) and max((rows["h"] * stride).max(), narrow.max()) > _MOST_BYTES:  # the kernels' places are 32 bits
        raise ValueError(f"views of regions over {_MOST_BYTES} bytes are not made by the triton form; use native")
    if len(rows) and rows["h"].max() > _MOST_ROWS:
        raise ValueError(f"views of regions over {_MOST_ROWS} rows are not made by the triton form; use native")
    factors = np.where(rows["blur"] == RESIZE_BLUR, rows["blur_amount"], 1.0)
    columns = {
        "corner": images.offsets[rows["image"]] + rows["y"] * stride + rows["x"] * 3,
        "stride": stride,
        "height": rows["h"],
        "width": rows["w"],
        "narrow": np.cumsum(narrow) - narrow,
        "flip": rows["flip"],
        "contrast": np.where(contrast < _STEPS, contrast, 0),  # without one, all steps come after the mean
        "steps": count,
        "kinds": (kinds << (3 * place)).sum(axis=1),
        "blur": rows["blur"],
        "small": [blurred_side(size, float(factor)) for factor in factors],
        "solarize": rows["solarize"],
    }
    plan = np.stack([np.asarray(columns[name]).astype(np.int64) for name in PLAN], axis=1)
    return plan, np.concatenate([amounts, rows["blur_amount"][:, None]], axis=1)


def colour_steps(rows: np.ndarray) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """What changes the picture, in order: kinds `[V, 5]`, amounts `[V, 5]`, and how many of them count `[V]`.

    The way to hue and back alone would move pixels by one or two, so what is neutral is left out.
    """
    strength = np.stack([rows[name] for name in ("brightness", "contrast", "saturation", "hue")], axis=1)
    order = rows["order"].astype(np.int64)
    amounts = np.take_along_axis(strength, order, axis=1)
    wanted = (rows["jitter"] != 0)[:, None] & (amounts != _NEUTRAL[order])
    wanted = np.concatenate([wanted, (rows["grayscale"] != 0)[:, None]], axis=1)
    kinds = np.concatenate([order, np.full((len(rows), 1), _TO_GREY)], axis=1)
    amounts = np.concatenate([amounts, np.zeros((len(rows), 1), np.float32)], axis=1)
    front = np.argsort(~wanted, axis=1, kind="stable")
    kinds, amounts = (np.take_along_axis(values, front, axis=1) for values in (kinds, amounts))
    return kinds, amounts.astype(np.float32), wanted.sum(axis=1)
