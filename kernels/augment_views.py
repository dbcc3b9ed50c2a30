"""Triton form of `augment_views`: three launches for all views, four more where views are blurred by resizing, two by
Gaussian, whatever their number.

Between the launches a picture is a plane of bytes a channel. A program makes a tile of one view; what differs from view
to view (crop, flip, order and strength of the colours, blur) it reads from the view's row of a plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from scrl_fast.kernels.photometric import coloured, luma, nearest_level

TILE = 32  # rows and columns of a program's tile
TILE_WARPS = 8  # four pixels of three channels a thread: half the registers that four warps need

PLAN = (
    *("corner", "stride", "height", "width"),  # of the crop: first byte, bytes from row to row, pixels
    *(
        "narrow",
        "flip",
        "contrast",
        "steps",
        "kinds",
    ),  # first byte of its narrowed rows; steps before the contrast, all
    *("blur", "small", "solarize"),  # small: side to which the resize blur shrinks
)
"""Columns of the plan, int64 `[V, len(PLAN)]`, which kernels name by place. Beside it goes what the steps' amounts and
sigma are, float32 `[V, 6]`."""
AMOUNTS = 6


@triton.jit
def bicubic(x):
    """a = -0.5; x >= 0."""
    inner = (1.5 * x - 2.5) * x * x + 1.0
    outer = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return tl.where(x < 1.0, inner, tl.where(x < 2.0, outer, 0.0))


@triton.jit
def bicubic_taps(i, source, to):
    """Pillow's rule for results i of `to` from `source` pixels: the first pixel of each, its place relative to the
    filter's centre, the taps of all, by what to shrink. Integers split the centre into whole pixels and a rest."""
    scale = source.to(tl.float32) / to.to(tl.float32)
    stretch = tl.maximum(scale, 1.0)
    taps = tl.minimum(source, tl.ceil(4.0 * stretch).to(tl.int32))
    centre = (2 * i + 1).to(tl.int64) * source
    whole = (centre // (2 * to)).to(tl.int32)
    part = (centre - whole.to(tl.int64) * (2 * to)).to(tl.float32) / (2 * to).to(tl.float32)
    low = whole + tl.floor(part - 2.0 * stretch + 0.5).to(tl.int32)
    first = tl.minimum(tl.maximum(low, 0), source - taps)
    return first, (first - whole).to(tl.float32) + 0.5 - part, taps, 1.0 / stretch


@triton.jit
def inverse_sum(offset, taps, shrink):
    total = tl.zeros_like(offset)
    for t in range(0, taps):
        total += bicubic(tl.abs((offset + t) * shrink))
    return 1.0 / total


@triton.jit
def store_planes(out, at, plane, mask, r, g, b):
    tl.store(out + at, r.to(tl.uint8), mask)
    tl.store(out + plane + at, g.to(tl.uint8), mask)
    tl.store(out + 2 * plane + at, b.to(tl.uint8), mask)


@triton.jit
def finish_channel(out, value, solarized, threshold, scale, shift, mask, LEVELS: tl.constexpr):
    value = tl.where(solarized & (value >= threshold), 255.0 - value, value)
    if LEVELS:
        tl.store(out, value.to(tl.uint8), mask)
    else:
        tl.store(out, (value * scale + shift).to(out.dtype.element_ty), mask)


@triton.jit
def finish(out, view, pixel, size, mask, r, g, b, solarized, threshold, norm, LAST: tl.constexpr, LEVELS: tl.constexpr):
    """Solarise, normalise, store in the layout of the result. norm: scale and shift of each channel."""
    base = out + view.to(tl.int64) * 3 * size * size
    place = base + (pixel * 3 if LAST else pixel)
    step = 1 if LAST else size * size
    finish_channel(place, r, solarized, threshold, tl.load(norm), tl.load(norm + 3), mask, LEVELS)
    finish_channel(place + step, g, solarized, threshold, tl.load(norm + 1), tl.load(norm + 4), mask, LEVELS)
    finish_channel(place + 2 * step, b, solarized, threshold, tl.load(norm + 2), tl.load(norm + 5), mask, LEVELS)


@triton.jit(do_not_specialize=["size"])
def resize_along(
    source_ptr, out_ptr, which_ptr, plan_ptr, size,
    PASS: tl.constexpr, FIELDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows become as wide as the result: of crops (PASS 0), of whole views to the blur's small side (1), and back (2).

    source: bytes of the crops, or planes [V, 3, size, size]; out: planes [3, rows, size] of each crop, or
    [blurred, 3, size, size]; plan [V, FIELDS]. which [blurred]: the views with a blur; their intermediate pictures lie
    side by side in that order.
    """
    slot = tl.program_id(0)
    square = size * size
    if PASS == 0:
        row = plan_ptr + slot.to(tl.int64) * FIELDS
        rows, width, to = tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.int32), size
        source = source_ptr + tl.load(row + 0)
        stride, pixel, channel = tl.load(row + 1).to(tl.int32), 3, 1
        out = out_ptr + tl.load(row + 4)
        flip = tl.load(row + 5) != 0
    else:
        view = tl.load(which_ptr + slot)
        row = plan_ptr + view.to(tl.int64) * FIELDS
        small = tl.load(row + 10).to(tl.int32)
        if PASS == 1:
            rows, width, to = size, size, small
            source = source_ptr + view.to(tl.int64) * 3 * square
        else:
            rows, width, to = small, small, size
            source = source_ptr + slot.to(tl.int64) * 3 * square
        stride, pixel, channel = size, 1, square
        out = out_ptr + slot.to(tl.int64) * 3 * square
        flip = False
    top = tl.program_id(1) * ROWS
    left = tl.program_id(2) * COLUMNS
    if (top < rows) & (left < to):
        y = top + tl.arange(0, ROWS)[:, None]
        x = left + tl.arange(0, COLUMNS)[None, :]
        mask = (y < rows) & (x < to)
        i = tl.minimum(x, to - 1)
        i = tl.where(flip, to - 1 - i, i)
        first, offset, taps, shrink = bicubic_taps(i, width, to)
        inverse = inverse_sum(offset, taps, shrink)
        at = source + y * stride + first * pixel
        r = tl.zeros([ROWS, COLUMNS], tl.float32)
        g = tl.zeros([ROWS, COLUMNS], tl.float32)
        b = tl.zeros([ROWS, COLUMNS], tl.float32)
        for t in range(0, taps):
            weight = bicubic(tl.abs((offset + t) * shrink)) * inverse
            r += weight * tl.load(at + t * pixel, mask, other=0).to(tl.float32)
            g += weight * tl.load(at + t * pixel + channel, mask, other=0).to(tl.float32)
            b += weight * tl.load(at + t * pixel + 2 * channel, mask, other=0).to(tl.float32)
        plane = rows * size if PASS == 0 else square
        store_planes(out, y * size + x, plane, mask, nearest_level(r), nearest_level(g), nearest_level(b))


@triton.jit(do_not_specialize=["size", "threshold"])
def resize_down(
    source_ptr, out_ptr, sums_ptr, which_ptr, plan_ptr, amounts_ptr, norm_ptr, size, threshold,
    PASS: tl.constexpr, FIELDS: tl.constexpr, AMOUNTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    LAST: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Columns become as high as the result. PASS 0: of crops; then the colours up to the contrast, and the sum of the
    tile's greys as they then are. 1: of views to the blur's small side. 2: and back; then the result."""
    slot = tl.program_id(0)
    view = slot if PASS == 0 else tl.load(which_ptr + slot)
    row = plan_ptr + view.to(tl.int64) * FIELDS
    square = size * size
    if PASS == 0:
        source = source_ptr + tl.load(row + 4)
        height, to, columns = tl.load(row + 2).to(tl.int32), size, size
        plane = height * size
    else:
        small = tl.load(row + 10).to(tl.int32)
        source = source_ptr + slot.to(tl.int64) * 3 * square
        if PASS == 1:
            height, to, columns = size, small, small
        else:
            height, to, columns = small, size, size
        plane = square
    top = tl.program_id(1) * ROWS
    left = tl.program_id(2) * COLUMNS
    if (top < to) & (left < columns):
        y = top + tl.arange(0, ROWS)[:, None]
        x = left + tl.arange(0, COLUMNS)[None, :]
        mask = (y < to) & (x < columns)
        first, offset, taps, shrink = bicubic_taps(tl.minimum(y, to - 1), height, to)
        inverse = inverse_sum(offset, taps, shrink)
        at = source + first * size + x
        r = tl.zeros([ROWS, COLUMNS], tl.float32)
        g = tl.zeros([ROWS, COLUMNS], tl.float32)
        b = tl.zeros([ROWS, COLUMNS], tl.float32)
        for t in range(0, taps):
            weight = bicubic(tl.abs((offset + t) * shrink)) * inverse
            r += weight * tl.load(at + t * size, mask, other=0).to(tl.float32)
            g += weight * tl.load(at + t * size + plane, mask, other=0).to(tl.float32)
            b += weight * tl.load(at + t * size + 2 * plane, mask, other=0).to(tl.float32)
        r, g, b = nearest_level(r), nearest_level(g), nearest_level(b)
        if PASS == 2:
            solarized = tl.load(row + 11) != 0
            finish(out_ptr, view, y * size + x, size, mask, r, g, b, solarized, threshold, norm_ptr, LAST, LEVELS)
        else:
            if PASS == 0:
                contrast = tl.load(row + 6).to(tl.int32)
                amounts = amounts_ptr + view.to(tl.int64) * AMOUNTS
                r, g, b = coloured(r, g, b, tl.load(row + 8).to(tl.int32), amounts, 0, contrast, 0.0)
                tile = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
                tiles = tl.num_programs(1) * tl.num_programs(2)
                greys = tl.where(mask, luma(r, g, b).to(tl.int32), 0)
                tl.store(sums_ptr + view.to(tl.int64) * tiles + tile, tl.sum(tl.sum(greys, 1), 0))
            store_planes(out_ptr + slot.to(tl.int64) * 3 * square, y * size + x, square, mask, r, g, b)


@triton.jit(do_not_specialize=["size", "threshold", "tiles"])
def colour(
    picture_ptr, out_ptr, sums_ptr, plan_ptr, amounts_ptr, norm_ptr, size, threshold, tiles,
    FIELDS: tl.constexpr, AMOUNTS: tl.constexpr, TILES: tl.constexpr, PIXELS: tl.constexpr,
    LAST: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """picture [V, 3, size, size], sums [V, tiles], plan [V, FIELDS], amounts [V, AMOUNTS], norm [6] -> out.

    The colours from the contrast on, towards the mean grey; then the result, or the picture that gets a blur."""
    view = tl.program_id(0)
    row = plan_ptr + view.to(tl.int64) * FIELDS
    square = size * size
    tile = tl.arange(0, TILES)
    sums = tl.load(sums_ptr + view.to(tl.int64) * tiles + tile, tile < tiles, other=0)
    mean_grey = ((2 * tl.sum(sums.to(tl.int64), 0) + square) // (2 * square)).to(tl.float32)  # rounded
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    mask = pixel < square
    picture = picture_ptr + view.to(tl.int64) * 3 * square
    r = tl.load(picture + pixel, mask, other=0).to(tl.float32)
    g = tl.load(picture + square + pixel, mask, other=0).to(tl.float32)
    b = tl.load(picture + 2 * square + pixel, mask, other=0).to(tl.float32)
    amounts = amounts_ptr + view.to(tl.int64) * AMOUNTS
    begin, end = tl.load(row + 6).to(tl.int32), tl.load(row + 7).to(tl.int32)
    r, g, b = coloured(r, g, b, tl.load(row + 8).to(tl.int32), amounts, begin, end, mean_grey)
    if tl.load(row + 9) == 0:
        solarized = tl.load(row + 11) != 0
        finish(out_ptr, view, pixel, size, mask, r, g, b, solarized, threshold, norm_ptr, LAST, LEVELS)
    else:
        store_planes(picture, pixel, square, mask, r, g, b)


@triton.jit
def reflected(at, size):
    at = tl.abs(at)
    return tl.where(at >= size, 2 * (size - 1) - at, at)


@triton.jit(do_not_specialize=["size", "threshold", "half"])
def gaussian(
    source_ptr, out_ptr, which_ptr, plan_ptr, amounts_ptr, norm_ptr, size, threshold, half,
    PASS: tl.constexpr, FIELDS: tl.constexpr, AMOUNTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    LAST: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """2 half + 1 taps exp(-k^2 / 2 sigma^2) / sum along the rows (PASS 0, into floats) or down the columns (1, into the
    result), the picture reflected at its edges."""
    slot = tl.program_id(0)
    view = tl.load(which_ptr + slot)
    row = plan_ptr + view.to(tl.int64) * FIELDS
    square = size * size
    sigma = tl.load(amounts_ptr + view.to(tl.int64) * AMOUNTS + (AMOUNTS - 1))
    total = 1.0
    for k in range(1, half + 1):
        total += 2.0 * tl.exp(-0.5 * (k / sigma) * (k / sigma))
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    x = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (y < size) & (x < size)
    if PASS == 0:
        source = source_ptr + view.to(tl.int64) * 3 * square
    else:
        source = source_ptr + slot.to(tl.int64) * 3 * square
    r = tl.zeros([ROWS, COLUMNS], tl.float32)
    g = tl.zeros([ROWS, COLUMNS], tl.float32)
    b = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(-half, half + 1):
        weight = tl.exp(-0.5 * (k / sigma) * (k / sigma)) / total
        if PASS == 0:
            at = source + y * size + reflected(tl.minimum(x, size - 1) + k, size)
        else:
            at = source + reflected(tl.minimum(y, size - 1) + k, size) * size + x
        r += weight * tl.load(at, mask, other=0).to(tl.float32)
        g += weight * tl.load(at + square, mask, other=0).to(tl.float32)
        b += weight * tl.load(at + 2 * square, mask, other=0).to(tl.float32)
    if PASS == 0:
        out = out_ptr + slot.to(tl.int64) * 3 * square + y * size + x
        tl.store(out, r, mask)
        tl.store(out + square, g, mask)
        tl.store(out + 2 * square, b, mask)
    else:
        r, g, b = nearest_level(r), nearest_level(g), nearest_level(b)
        solarized = tl.load(row + 11) != 0
        finish(out_ptr, view, y * size + x, size, mask, r, g, b, solarized, threshold, norm_ptr, LAST, LEVELS)


def make_views(
    buffer: Tensor,
    plan: np.ndarray,
    amounts: np.ndarray,
    out: Tensor,
    normalization: Sequence[float],
    threshold: int,
    gaussian_half: int,
) -> None:
    """Views into `out` `[V, 3, S, S]`, dense in either layout, from uint8 `buffer` on the same device.

    plan: int64 `[V, len(PLAN)]`, amounts: float32 `[V, AMOUNTS]`; see `scrl_fast.ops.augment_views_triton.make_plan`.
    normalization: three scales, three shifts; not used for uint8. threshold: of solarisation.
    """
    views, size, device = len(plan), out.shape[-1], out.device
    plan_, amounts_, norm = (
        _there(values, device) for values in (plan, amounts, np.asarray(normalization, np.float32))
    )
    narrow = _bytes(out, int(plan[-1, PLAN.index("narrow")] + 3 * size * plan[-1, PLAN.index("height")]))
    picture = _bytes(out, 3 * size * size * views)
    side = triton.cdiv(size, TILE)
    tiles = side * side
    sums = out.new_empty(views * tiles, dtype=torch.int32)
    tile: dict[str, Any] = {"FIELDS": len(PLAN), "ROWS": TILE, "COLUMNS": TILE, "num_warps": TILE_WARPS}
    result: dict[str, Any] = {
        "AMOUNTS": AMOUNTS, "LAST": not out.is_contiguous(), "LEVELS": out.dtype is torch.uint8,
    }  # fmt: skip
    highest = triton.cdiv(int(plan[:, PLAN.index("height")].max()), TILE)
    resize_along[(views, highest, side)](buffer, narrow, plan_, plan_, size, PASS=0, **tile)
    rest = (plan_, amounts_, norm, size, threshold)
    resize_down[(views, side, side)](narrow, picture, sums, plan_, *rest, PASS=0, **tile, **result)
    colour[(views, triton.cdiv(size * size, 1024))](
        picture, out, sums, *rest, tiles, FIELDS=len(PLAN), TILES=triton.next_power_of_2(tiles), PIXELS=1024, **result
    )
    blur = plan[:, PLAN.index("blur")]
    if len(which := np.flatnonzero(blur == 1)):
        chosen, grid = _there(which.astype(np.int32), device), (len(which), side, side)
        first, second = (_bytes(out, 3 * size * size * len(which)) for _ in range(2))
        resize_along[grid](picture, first, chosen, plan_, size, PASS=1, **tile)
        resize_down[grid](first, second, sums, chosen, *rest, PASS=1, **tile, **result)
        resize_along[grid](second, first, chosen, plan_, size, PASS=2, **tile)
        resize_down[grid](first, out, sums, chosen, *rest, PASS=2, **tile, **result)
    if len(which := np.flatnonzero(blur == 2)):
        chosen, grid = _there(which.astype(np.int32), device), (len(which), side, side)
        floats = out.new_empty(3 * size * size * len(which), dtype=torch.float32)
        gaussian[grid](picture, floats, chosen, *rest, gaussian_half, PASS=0, **tile, **result)
        gaussian[grid](floats, out, chosen, *rest, gaussian_half, PASS=1, **tile, **result)


def _bytes(like: Tensor, count: int) -> Tensor:
    return like.new_empty(count, dtype=torch.uint8)


def _there(values: np.ndarray, device: torch.device) -> Tensor:
    """On the device; from pinned memory, so that the copy waits for nothing."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
