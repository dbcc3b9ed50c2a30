"""Triton form of `roi_align`: weights of every box and axis first, then pooling; backward gathers image by image.

Weights lie in global memory, O(boxes x (height + width)) a bin row, never boxes x cells. No atomics: every program owns
what it writes and visits boxes in their order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BOXES = 1024  # whose image indices a program of `group_by_image` looks at together
CELLS, CHANNELS = 16, 64  # of the map's gradient that a program of `pool_backward` owns: 96 registers, 32 cells 233


@triton.jit
def _divide(a, b, WIDE: tl.constexpr):
    """Rounded to nearest: the sample count is the ceiling of a quotient."""
    return a / b if WIDE else tl.div_rn(a, b)


@triton.jit
def _axis(
    box, weight_ptr, range_ptr, scale, bins, size, sampling_ratio, fine,
    LOW: tl.constexpr, ALIGNED: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """box [5] -> weight [bins, size] of the axis whose low edge is box[LOW], range [bins + 1, 2]; and whether the edges
    are finite."""
    real = tl.float64 if WIDE else tl.float32
    offset = 0.5 if ALIGNED else 0.0
    low = tl.load(box + LOW).to(real) * scale - offset
    extent = (tl.load(box + LOW + 2).to(real) * scale - offset) - low
    fine = fine & (low - low == 0) & (extent - extent == 0)  # finite
    if not ALIGNED:
        extent = tl.maximum(extent, 1.0)
    bin_size = _divide(extent, tl.cast(bins, real), WIDE)
    samples = tl.where(sampling_ratio > 0, sampling_ratio.to(real), tl.ceil(bin_size))
    samples = tl.where(fine & (samples >= 1) & (samples <= 2147483648.0), samples, 0.0)
    half = samples * 0 + 0.5
    cell = tl.arange(0, SIZE)
    box_first = size
    box_last = size * 0
    for bin in range(bins):
        first = low + bin * bin_size
        begin = samples * 0
        end = samples
        if (samples > 64) & (bin_size > 0):  # a huge box: only the samples near the map, whatever its size
            per_cell = samples / bin_size
            slack = 3.0 + samples * 1e-6
            begin = tl.minimum(tl.maximum((-1.0 - first) * per_cell - slack, 0.0), samples)
            end = tl.minimum(tl.maximum((size - first) * per_cell + slack, 0.0), samples)
        weight = tl.zeros([SIZE], real)
        for sample in range(begin.to(tl.int64), end.to(tl.int64)):
            position = first + _divide((sample + half) * bin_size, samples, WIDE)
            inside = (position >= -1) & (position <= size)
            position = tl.minimum(tl.maximum(position, 0.0), tl.cast(size - 1, real))
            weight += tl.where(inside, tl.maximum(1.0 - tl.abs(position - cell), 0.0), 0.0)
        weight = weight / tl.maximum(samples, 1.0)
        tl.store(weight_ptr + bin * size + cell, weight, cell < size)
        bin_first = tl.min(tl.where(weight > 0, cell, size), 0)
        bin_last = tl.max(tl.where(weight > 0, cell + 1, 0), 0)
        tl.store(range_ptr + 2 * bin, bin_first)
        tl.store(range_ptr + 2 * bin + 1, bin_last)
        box_first = tl.minimum(box_first, bin_first)
        box_last = tl.maximum(box_last, bin_last)
    tl.store(range_ptr + 2 * bins, box_first)
    tl.store(range_ptr + 2 * bins + 1, box_last)
    return fine


@triton.jit(do_not_specialize=["images", "scale", "sampling_ratio", "pooled_height", "pooled_width"])
def box_weights(
    boxes_ptr, y_ptr, x_ptr, y_range_ptr, x_range_ptr, fine_ptr,
    images, scale, height, width, pooled_height, pooled_width, sampling_ratio,
    ALIGNED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """boxes [K, 5] -> y [K, pooled_height, height], x [K, pooled_width, width], y_range [K, pooled_height + 1, 2],
    x_range [K, pooled_width + 1, 2], fine [K]. A program a box.

    Of a box and axis: weight[bin, cell] = sum over the bin's samples s of max(0, 1 - |clamp(p_s) - cell|) / samples
    where p_s = start + bin_size (bin + (s + 1/2) / samples) lies in [-1, size].

    range[box, bin] = (first cell, last cell + 1) with a weight, range[box, bins] the same of all bins. fine[box]: 0 for
    a box with a non-finite edge or an image index outside the batch; it has no weights.
    """
    k = tl.program_id(0).to(tl.int64)
    box = boxes_ptr + k * 5
    image = tl.load(box)
    fine = (image >= 0) & (image < images)
    y_range = y_range_ptr + k * 2 * (pooled_height + 1)
    x_range = x_range_ptr + k * 2 * (pooled_width + 1)
    # Both axes must be finite before either may have weights: the first look at x only asks.
    x_extent = tl.load(box + 3) * scale - tl.load(box + 1) * scale
    fine = fine & (x_extent - x_extent == 0)
    fine = _axis(
        box, y_ptr + k * pooled_height * height, y_range, scale, pooled_height, height, sampling_ratio, fine,
        2, ALIGNED, HEIGHT, WIDE,
    )  # fmt: skip
    fine = _axis(
        box, x_ptr + k * pooled_width * width, x_range, scale, pooled_width, width, sampling_ratio, fine,
        1, ALIGNED, WIDTH, WIDE,
    )  # fmt: skip
    tl.store(fine_ptr + k, fine.to(tl.int8))


@triton.jit
def pool(
    map_ptr, boxes_ptr, y_ptr, x_ptr, y_range_ptr, x_range_ptr, fine_ptr, out_ptr,
    channels, height, width, pooled_height, pooled_width, image_stride, channel_stride, row_stride, column_stride,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """map [N, C, H, W] by its strides, boxes [K, 5] and their weights -> out [K, C, pooled_height, pooled_width]:

    out[box, channel, p, q] = sum_ij y[box, p, i] x[box, q, j] map[image, channel, i, j]; NaN where not fine.

    A program owns BLOCK channels of one row p of a box's bins.
    """
    real = tl.float64 if WIDE else tl.float32
    k = tl.program_id(0).to(tl.int64) // pooled_height
    p = tl.program_id(0) % pooled_height
    fine = tl.load(fine_ptr + k) != 0
    channel = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    image = tl.where(fine, tl.load(boxes_ptr + k * 5), 0.0).to(tl.int64)
    source = map_ptr + image * image_stride + channel * channel_stride
    out = out_ptr + ((k * channels + channel) * pooled_height + p) * pooled_width
    y_range = y_range_ptr + (k * (pooled_height + 1) + p) * 2
    first_row = tl.load(y_range).to(tl.int64)
    last_row = tl.load(y_range + 1).to(tl.int64)
    y = y_ptr + (k * pooled_height + p) * height
    for q in range(pooled_width):
        x_range = x_range_ptr + (k * (pooled_width + 1) + q) * 2
        first_column = tl.load(x_range).to(tl.int64)
        last_column = tl.load(x_range + 1).to(tl.int64)
        x = x_ptr + (k * pooled_width + q) * width
        total = tl.zeros([BLOCK], real)
        for i in range(first_row, last_row):
            weight_y = tl.load(y + i)
            if weight_y != 0:
                for j in range(first_column, last_column):
                    weight = weight_y * tl.load(x + j)
                    if weight != 0:
                        cell = source + i * row_stride + j * column_stride
                        total += weight * tl.load(cell, channel < channels, other=0.0).to(real)
        total = tl.where(fine, total, float("nan"))
        tl.store(out + q, total.to(out_ptr.dtype.element_ty), channel < channels)


@triton.jit(do_not_specialize=["count", "images"])
def group_by_image(boxes_ptr, order_ptr, first_ptr, count, images, BOXES: tl.constexpr):
    """boxes [K, 5] -> order [K], first [N + 1]:

    order[first[n] : first[n + 1]] = the boxes of image n in their order. A program an n; the last has no image."""
    n = tl.program_id(0)
    before = 0
    for start in range(0, count, BOXES):
        k = start + tl.arange(0, BOXES)
        image = tl.load(boxes_ptr + k.to(tl.int64) * 5, k < count, other=-1.0)
        before += tl.sum(((image >= 0) & (image < n)).to(tl.int32), 0)
    tl.store(first_ptr + n, before)
    for start in range(0, count, BOXES):
        k = start + tl.arange(0, BOXES)
        image = tl.load(boxes_ptr + k.to(tl.int64) * 5, k < count, other=-1.0)
        mine = (image >= n) & (image < tl.minimum(n + 1, images))
        place = before + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(order_ptr + place, k, mine)
        before += tl.sum(mine.to(tl.int32), 0)


@triton.jit
def pool_backward(
    grad_ptr, y_ptr, x_ptr, y_range_ptr, x_range_ptr, order_ptr, first_ptr, out_ptr,
    channels, height, width, pooled_height, pooled_width, image_stride, channel_stride, row_stride, column_stride,
    CELLS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """grad [K, C, pooled_height, pooled_width], weights of the boxes, order [K], first [N + 1] -> out [N, C, H, W]:

    out[image, channel, i, j] = sum over its boxes, p and q of y[box, p, i] x[box, q, j] grad[box, channel, p, q].

    A program owns CELLS consecutive cells (row by row) of CHANNELS channels of an image.
    """
    real = tl.float64 if WIDE else tl.float32
    blocks = tl.cdiv(height * width, CELLS)
    n = tl.program_id(0).to(tl.int64) // blocks
    cell = tl.program_id(0) % blocks * CELLS + tl.arange(0, CELLS)
    in_map = cell < height * width
    i = cell // width
    j = cell % width
    first_row = tl.program_id(0) % blocks * CELLS // width
    last_row = tl.minimum(tl.program_id(0) % blocks * CELLS + CELLS - 1, height * width - 1) // width
    channel = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([CELLS, CHANNELS], real)
    for entry in range(tl.load(first_ptr + n), tl.load(first_ptr + n + 1)):
        k = tl.load(order_ptr + entry).to(tl.int64)
        y_range = y_range_ptr + k * (pooled_height + 1) * 2
        box_range = y_range + pooled_height * 2
        if (tl.load(box_range) <= last_row) & (tl.load(box_range + 1) > first_row):
            for p in range(pooled_height):
                if (tl.load(y_range + 2 * p) <= last_row) & (tl.load(y_range + 2 * p + 1) > first_row):
                    weight_y = tl.load(y_ptr + (k * pooled_height + p) * height + i, in_map, other=0.0)
                    for q in range(pooled_width):
                        weight_x = tl.load(x_ptr + (k * pooled_width + q) * width + j, in_map, other=0.0)
                        grad = grad_ptr + ((k * channels + channel) * pooled_height + p) * pooled_width + q
                        g = tl.load(grad, channel < channels, other=0.0).to(real)
                        weight = (weight_y * weight_x)[:, None]  # 0 x inf is no part of a cell's sum
                        total += tl.where(weight != 0, weight * g[None, :], 0.0)
    out = out_ptr + n * image_stride + channel[None, :] * channel_stride
    out += i.to(tl.int64)[:, None] * row_stride + j.to(tl.int64)[:, None] * column_stride
    tl.store(out, total.to(out_ptr.dtype.element_ty), in_map[:, None] & (channel < channels)[None, :])


class _Weights:
    """What `box_weights` makes for boxes ``[K, 5]`` on a map of height x width cells."""

    def __init__(
        self, boxes: Tensor, images: int, size: tuple[int, int], pooled: tuple[int, int], options: tuple[Any, ...]
    ) -> None:
        scale, sampling_ratio, aligned = options
        self.wide = boxes.dtype is torch.float64
        if self.wide and scale != 1:  # numbers reach a kernel as float32
            boxes, scale = torch.cat([boxes[:, :1], boxes[:, 1:] * scale], 1), 1.0
        self.boxes = boxes.contiguous()
        (height, width), (pooled_height, pooled_width), count = size, pooled, boxes.shape[0]
        self.y = boxes.new_empty((count, pooled_height, height))
        self.x = boxes.new_empty((count, pooled_width, width))
        self.y_range = boxes.new_empty((count, pooled_height + 1, 2), dtype=torch.int32)
        self.x_range = boxes.new_empty((count, pooled_width + 1, 2), dtype=torch.int32)
        self.fine = boxes.new_empty(count, dtype=torch.int8)
        if count:
            box_weights[(count,)](
                self.boxes, *self.tensors(), self.fine,
                images, scale, height, width, pooled_height, pooled_width, sampling_ratio,
                ALIGNED=aligned, HEIGHT=triton.next_power_of_2(height), WIDTH=triton.next_power_of_2(width),
                WIDE=self.wide, num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip

    def tensors(self) -> tuple[Tensor, ...]:
        return self.y, self.x, self.y_range, self.x_range


def roi_align(
    input: Tensor,
    boxes: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """The operator `scrl_fast::roi_align_triton`: reads any strides."""
    images, channels, height, width = input.shape
    count = boxes.shape[0]
    out = input.new_empty((count, channels, pooled_height, pooled_width))
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(input):
        weights = _Weights(
            boxes, images, (height, width), (pooled_height, pooled_width), (spatial_scale, sampling_ratio, aligned)
        )
        block = min(512 // input.element_size(), triton.next_power_of_2(channels))  # 16 bytes a lane
        pool[(count * pooled_height, triton.cdiv(channels, block))](
            input, weights.boxes, *weights.tensors(), weights.fine, out,
            channels, height, width, pooled_height, pooled_width, *input.stride(),
            BLOCK=block, WIDE=weights.wide, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def roi_align_backward(
    grad: Tensor,
    boxes: Tensor,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    size: list[int],
    channels_last: bool,
) -> Tensor:
    """The operator `scrl_fast::roi_align_triton_backward`."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=layout)
    if out.numel() == 0:
        return out
    images, channels, height, width = size
    pooled = (grad.shape[2], grad.shape[3])
    with torch.cuda.device_of(grad):
        weights = _Weights(boxes, images, (height, width), pooled, (spatial_scale, sampling_ratio, aligned))
        count = boxes.shape[0]
        order = boxes.new_empty(count, dtype=torch.int32)
        first = boxes.new_empty(images + 1, dtype=torch.int32)
        group_by_image[(images + 1,)](weights.boxes, order, first, count, images, BOXES=BOXES, num_warps=4)
        pool_backward[(images * triton.cdiv(height * width, CELLS), triton.cdiv(channels, CHANNELS))](
            grad.contiguous(), *weights.tensors(), order, first, out,
            channels, height, width, *pooled, *out.stride(),
            CELLS=CELLS, CHANNELS=CHANNELS, WIDE=weights.wide, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out
