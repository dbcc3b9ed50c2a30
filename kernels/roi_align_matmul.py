"""RoIAlign of small 16-bit maps as matrix products, for tensor cores: timed beside `roi_align`'s forms, never chosen.

Of an image: result[bins of its boxes, channels] = weights[bins, cells] map[cells, channels], and the map's gradient by
the transpose. Weights are in two halves of 16 bits, high + low, so that rounding them costs no more than the result's
own rounding. A product would carry an infinity or NaN from any cell into every bin (0 x inf): where one arrives, bins
are summed cell by cell instead, with weights of 0 left out as `roi_align` leaves them out.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scrl_fast.kernels.roi_align_boxes import BOXES, BoxWeights, boxes_of_images, strip_length

# Of a product: cells of the map, pairs of a box and a bin, channels. `pool` takes 93 registers for an H100, with 128
# channels 183, with 32 pairs 181.
CELLS, PAIRS, CHANNELS = 64, 16, 64


@triton.jit
def _cell_weights(strips_ptr, bins_ptr, k, bins, bin, size, cell, mask):
    """Of rows of boxes k and their bins: weights [rows, cells] of an axis, 0 beyond the cells that a bin reads."""
    made = bins_ptr + (k * (bins + 1) + bin) * 3
    first = tl.load(made, mask, other=0)[:, None]
    last = tl.load(made + 1, mask, other=0)[:, None]
    at = (k * strip_length(size, bins) + tl.load(made + 2, mask, other=0))[:, None] + cell[None, :]
    return tl.load(strips_ptr + at, (cell[None, :] >= first) & (cell[None, :] < last), other=0.0)


@triton.jit
def dense_weights(
    y_ptr, x_ptr, y_bins_ptr, x_bins_ptr, out_ptr, rows, height, width, pooled_height, pooled_width,
    CELLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Strips and bins of `box_weights` -> out [2, rows, CELLS], high and low halves of the products of both axes; rows:
    of boxes and bins."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cell = tl.arange(0, CELLS)
    bins = pooled_height * pooled_width
    k = row.to(tl.int64) // bins
    known = row < rows
    y = _cell_weights(y_ptr, y_bins_ptr, k, pooled_height, row % bins // pooled_width, height, cell // width, known)
    x = _cell_weights(x_ptr, x_bins_ptr, k, pooled_width, row % pooled_width, width, cell % width, known)
    weight = y * x
    high = weight.to(out_ptr.dtype.element_ty)
    out = out_ptr + row.to(tl.int64)[:, None] * CELLS + cell[None, :]
    tl.store(out, high, known[:, None])
    low = (weight - high.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out + tl.cast(rows, tl.int64) * CELLS, low, known[:, None])


@triton.jit
def _product(a, b, sums, WIDEN: tl.constexpr):
    """sums + a b. WIDEN: in float32 throughout, for the interpreter, whose products of bfloat16 are wrong."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    return tl.dot(a, b, sums)


@triton.jit
def _is_finite(values):
    wide = values.to(tl.float32)
    return tl.sum(tl.sum((wide - wide != 0).to(tl.int32), 1), 0) == 0


@triton.jit
def _fill_unknown(fine_ptr, out_ptr, count, channels, bins, channel, BOXES: tl.constexpr):
    """NaN for the boxes that cannot be sampled."""
    for start in range(0, count, BOXES):
        place = start + tl.arange(0, BOXES)
        if tl.min(tl.load(fine_ptr + place, place < count, other=1).to(tl.int32), 0) == 0:
            for k in range(start, tl.minimum(start + BOXES, count)):
                if tl.load(fine_ptr + k) == 0:
                    for bin in range(bins):
                        out = out_ptr + (tl.cast(k, tl.int64) * channels + channel) * bins + bin
                        tl.store(out, channel * 0.0 + float("nan"), channel < channels)


@triton.jit
def _pairs(start, end, order_ptr, fine_ptr, out_ptr, channels, bins, PAIRS: tl.constexpr):
    """Of the pairs from start on: which are to be stored, their rows of weights, where their first channels go."""
    pair = start + tl.arange(0, PAIRS)
    k = tl.load(order_ptr + pair // bins, pair < end, other=0).to(tl.int64)
    mine = (pair < end) & (tl.load(fine_ptr + k) != 0)
    return mine, k * bins + pair % bins, out_ptr + k * channels * bins + pair % bins


@triton.jit
def pool(
    map_ptr, weights_ptr, fine_ptr, order_ptr, first_ptr, out_ptr,
    images, count, channels, cells, width, bins, image_stride, row_stride, column_stride,
    CELLS: tl.constexpr, PAIRS: tl.constexpr, CHANNELS: tl.constexpr, BOXES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """map [N, C, H, W] with channels side by side, weights [2, count * bins, CELLS], boxes of the images as
    `group_by_image` has them -> out [count, C, bins]. A program: CHANNELS channels of an image and all of its boxes;
    behind the last image, of the boxes that cannot be sampled."""
    n = tl.program_id(1)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    if n == images:
        _fill_unknown(fine_ptr, out_ptr, count, channels, bins, channel, BOXES)
    else:
        begin = tl.load(first_ptr + n) * bins
        end = tl.load(first_ptr + n + 1) * bins
        if begin < end:
            cell = tl.arange(0, CELLS)
            source = map_ptr + n.to(tl.int64) * image_stride + channel
            at = cell // width * row_stride + cell % width * column_stride
            inside = (cell < cells)[:, None] & (channel < channels)[None, :]
            tile = tl.load(source[None, :] + at[:, None], inside, other=0.0)
            low_half = tl.cast(count, tl.int64) * bins * CELLS
            for start in tl.range(begin, end, PAIRS, num_stages=1):
                mine, row, out = _pairs(start, end, order_ptr, fine_ptr, out_ptr, channels, bins, PAIRS)
                weights = weights_ptr + row[:, None] * CELLS + cell[None, :]
                sums = tl.zeros([PAIRS, CHANNELS], tl.float32)
                sums = _product(tl.load(weights + low_half, mine[:, None], other=0.0), tile, sums, WIDEN)
                sums = _product(tl.load(weights, mine[:, None], other=0.0), tile, sums, WIDEN)
                if not _is_finite(sums):  # an infinity or NaN of the tile is in all sums of its channel
                    sums = tl.zeros([PAIRS, CHANNELS], tl.float32)
                    for c in range(cells):
                        weight = tl.load(weights_ptr + row * CELLS + c, mine, other=0.0).to(tl.float32)
                        weight += tl.load(weights_ptr + row * CELLS + c + low_half, mine, other=0.0).to(tl.float32)
                        values = source + c // width * row_stride + c % width * column_stride
                        value = tl.load(values, channel < channels, other=0.0).to(tl.float32)
                        sums += tl.where(weight[:, None] != 0, weight[:, None] * value[None, :], 0.0)
                made = out[:, None] + (channel * bins)[None, :]
                tl.store(made, sums.to(out_ptr.dtype.element_ty), mine[:, None] & (channel < channels)[None, :])


@triton.jit
def pool_backward(
    grad_ptr, weights_ptr, order_ptr, first_ptr, out_ptr,
    count, channels, cells, width, bins, image_stride, row_stride, column_stride,
    CELLS: tl.constexpr, PAIRS: tl.constexpr, CHANNELS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """grad [count, C, bins], weights and boxes as in `pool` -> out [N, C, H, W] with channels side by side.

    A program: CHANNELS channels of an image. Boxes without weights (not fine) add nothing."""
    n = tl.program_id(1)
    begin = tl.load(first_ptr + n) * bins
    end = tl.load(first_ptr + n + 1) * bins
    cell = tl.arange(0, CELLS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    low_half = tl.cast(count, tl.int64) * bins * CELLS
    total = tl.zeros([CELLS, CHANNELS], tl.float32)
    for start in tl.range(begin, end, PAIRS, num_stages=1):
        pair = start + tl.arange(0, PAIRS)
        mine = pair < end
        k = tl.load(order_ptr + pair // bins, mine, other=0).to(tl.int64)
        source = grad_ptr + (k * channels * bins + pair % bins)[:, None] + (channel * bins)[None, :]
        grad = tl.load(source, mine[:, None] & (channel < channels)[None, :], other=0.0)
        if _is_finite(grad):
            weights = weights_ptr + ((k * bins + pair % bins) * CELLS)[:, None] + cell[None, :]
            total = _product(tl.trans(tl.load(weights + low_half, mine[:, None], other=0.0)), grad, total, WIDEN)
            total = _product(tl.trans(tl.load(weights, mine[:, None], other=0.0)), grad, total, WIDEN)
        else:
            for one in range(start, tl.minimum(start + PAIRS, end)):
                box = tl.load(order_ptr + one // bins).to(tl.int64)
                row = weights_ptr + (box * bins + one % bins) * CELLS + cell
                weight = tl.load(row).to(tl.float32) + tl.load(row + low_half).to(tl.float32)
                of_box = grad_ptr + box * channels * bins + one % bins
                value = tl.load(of_box + channel * bins, channel < channels, other=0.0).to(tl.float32)
                total += tl.where(weight[:, None] != 0, weight[:, None] * value[None, :], 0.0)
    at = (cell // width * row_stride + cell % width * column_stride)[:, None] + channel[None, :]
    inside = (cell < cells)[:, None] & (channel < channels)[None, :]
    tl.store(out_ptr + n.to(tl.int64) * image_stride + at, total.to(out_ptr.dtype.element_ty), inside)


class _Boxes:
    """Dense weights of boxes ``[K, 5]`` in the dtype of a map, and the boxes of each image.

    It allocates 256 bytes a bin, as much as the result of 128 channels, beside what `BoxWeights` does.
    """

    def __init__(
        self, boxes: Tensor, dtype: torch.dtype, size: tuple[int, ...], bins: tuple[int, int], options: tuple[Any, ...]
    ) -> None:
        images, _, height, width = size
        axes = BoxWeights(boxes, images, (height, width), bins, options)
        self.fine, count = axes.fine, len(boxes)
        rows = count * bins[0] * bins[1]
        self.weights = boxes.new_empty((2, rows, CELLS), dtype=dtype)
        self.order, self.first = boxes_of_images(axes.boxes, images)
        if rows:
            dense_weights[(triton.cdiv(rows, PAIRS),)](
                *axes.tensors(), self.weights, rows, height, width, *bins, CELLS=CELLS, ROWS=PAIRS, num_warps=4
            )


def failure(map: Tensor) -> str:
    """'' for a map ``[N, C, H, W]`` that this form takes, else why not."""
    if map.dtype not in (torch.bfloat16, torch.float16):
        return f"16-bit maps only, not {map.dtype}"
    if map.shape[2] * map.shape[3] > CELLS:
        return f"maps of at most {CELLS} cells only, not {map.shape[2]} x {map.shape[3]}"
    return "" if map.stride(1) == 1 else "channels_last maps only"


def roi_align(
    input: Tensor,
    boxes: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """As `scrl_fast.kernels.roi_align.roi_align`. Raises ValueError for a map that `failure` does not take."""
    if why := failure(input):
        raise ValueError(why)
    images, channels, height, width = input.shape
    count, bins = len(boxes), (pooled_height, pooled_width)
    out = input.new_empty((count, channels, *bins))
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(input):  # Triton launches on the current device
        made = _Boxes(boxes, input.dtype, tuple(input.shape), bins, (spatial_scale, sampling_ratio, aligned))
        pool[(triton.cdiv(channels, CHANNELS), images + 1)](
            input, made.weights, made.fine, made.order, made.first, out,
            images, count, channels, height * width, width, bins[0] * bins[1],
            input.stride(0), input.stride(2), input.stride(3),
            CELLS=CELLS, PAIRS=PAIRS, CHANNELS=CHANNELS, BOXES=BOXES, WIDEN=not input.is_cuda, num_warps=4,
        )  # fmt: skip
    return out


def roi_align_backward(
    grad: Tensor, boxes: Tensor, spatial_scale: float, sampling_ratio: int, aligned: bool, size: tuple[int, ...]
) -> Tensor:
    """The gradient of a channels_last map of this size. Raises ValueError as `roi_align`."""
    out = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    if why := failure(out):
        raise ValueError(why)
    if out.numel() == 0:
        return out
    images, channels, height, width = size
    bins = (grad.shape[2], grad.shape[3])
    with torch.cuda.device_of(grad):
        made = _Boxes(boxes, grad.dtype, size, bins, (spatial_scale, sampling_ratio, aligned))
        pool_backward[(triton.cdiv(channels, CHANNELS), images)](
            grad.contiguous(), made.weights, made.order, made.first, out,
            len(boxes), channels, height * width, width, bins[0] * bins[1],
            out.stride(0), out.stride(2), out.stride(3),
            CELLS=CELLS, PAIRS=PAIRS, CHANNELS=CHANNELS, WIDEN=not grad.is_cuda, num_warps=4,
        )  # fmt: skip
    return out
