"""Triton form of `roi_align`: weights of every box and axis first, then pooling; backward gathers image by image.

Beside its result a call allocates what `BoxWeights`, `boxes_of_images` and `boxes_of_strips` do. That memory grows with
boxes x (height + width + bins of an axis), never with boxes x cells or bins x cells. No atomics: every program owns
what it writes and visits boxes in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from scrl_fast.kernels.roi_align_boxes import (
    BoxWeights,
    boxes_of_images,
    boxes_of_strips,
    load_bin,
    load_reach,
    strip_length,
)

CELLS, CHANNELS = 16, 64  # of the map's gradient that a program of `pool_backward` owns: 79 registers for an H100


@triton.jit
def pool(
    map_ptr, boxes_ptr, y_ptr, x_ptr, y_bins_ptr, x_bins_ptr, fine_ptr, out_ptr,
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
    first_row, last_row, y_shift = load_bin(y_bins_ptr, k, pooled_height, p)
    y = y_ptr + k * strip_length(height, pooled_height) + y_shift
    for q in range(pooled_width):
        first_column, last_column, x_shift = load_bin(x_bins_ptr, k, pooled_width, q)
        x = x_ptr + k * strip_length(width, pooled_width) + x_shift
        total = tl.zeros([BLOCK], real)
        for i in range(first_row.to(tl.int64), last_row.to(tl.int64)):
            weight_y = tl.load(y + i)
            if weight_y != 0:
                for j in range(first_column.to(tl.int64), last_column.to(tl.int64)):
                    weight = weight_y * tl.load(x + j)
                    if weight != 0:
                        cell = source + i * row_stride + j * column_stride
                        total += weight * tl.load(cell, channel < channels, other=0.0).to(real)
        total = tl.where(fine, total, float("nan"))
        tl.store(out + q, total.to(out_ptr.dtype.element_ty), channel < channels)


@triton.jit
def pool_backward(
    grad_ptr, y_ptr, x_ptr, y_bins_ptr, x_bins_ptr, lists_ptr, first_ptr, ends_ptr, out_ptr,
    count, blocks_a_strip, channels, height, width, pooled_height, pooled_width,
    image_stride, channel_stride, row_stride, column_stride,
    CELLS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """grad [K, C, pooled_height, pooled_width], weights of the boxes, their lists by strips -> out [N, C, H, W]:

    out[image, channel, i, j] = sum over its boxes, p and q of y[box, p, i] x[box, q, j] grad[box, channel, p, q].

    A program owns CELLS consecutive cells (row by row) of CHANNELS channels of an image. It visits the boxes that reach
    its strip, and of those the bins that reach its cells.
    """
    real = tl.float64 if WIDE else tl.float32
    cells = height * width
    blocks = tl.cdiv(cells, CELLS)
    n = tl.program_id(0).to(tl.int64) // blocks
    block = tl.program_id(0) % blocks
    cell = block * CELLS + tl.arange(0, CELLS)
    i = cell // width
    j = cell % width
    final_cell = tl.minimum(block * CELLS + CELLS, cells) - 1
    first_row = block * CELLS // width
    last_row = final_cell // width
    first_column = tl.where(first_row == last_row, block * CELLS % width, 0)
    last_column = tl.where(first_row == last_row, final_cell % width, width - 1)
    channel = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([CELLS, CHANNELS], real)
    strip = block // blocks_a_strip
    lists = lists_ptr + strip.to(tl.int64) * count
    end = tl.load(ends_ptr + n * tl.cdiv(blocks, blocks_a_strip) + strip)
    for entry in range(tl.load(first_ptr + n), end):
        k = tl.load(lists + entry).to(tl.int64)
        box_top, box_bottom = load_reach(y_bins_ptr, k, pooled_height)
        box_left, box_right = load_reach(x_bins_ptr, k, pooled_width)
        rows_meet = (box_top <= last_row) & (box_bottom > first_row)
        if rows_meet & (box_left <= last_column) & (box_right > first_column):
            for p in range(pooled_height):
                top, bottom, y_shift = load_bin(y_bins_ptr, k, pooled_height, p)
                if (top <= last_row) & (bottom > first_row):
                    y = y_ptr + k * strip_length(height, pooled_height) + y_shift
                    weight_y = tl.load(y + i, (i >= top) & (i < bottom), other=0.0)
                    for q in range(pooled_width):
                        left, right, x_shift = load_bin(x_bins_ptr, k, pooled_width, q)
                        if (left <= last_column) & (right > first_column):
                            x = x_ptr + k * strip_length(width, pooled_width) + x_shift
                            weight_x = tl.load(x + j, (j >= left) & (j < right), other=0.0)
                            grad = grad_ptr + ((k * channels + channel) * pooled_height + p) * pooled_width + q
                            g = tl.load(grad, channel < channels, other=0.0).to(real)
                            weight = (weight_y * weight_x)[:, None]  # 0 x inf is no part of a cell's sum
                            total += tl.where(weight != 0, weight * g[None, :], 0.0)
    out = out_ptr + n * image_stride + channel[None, :] * channel_stride
    out += i.to(tl.int64)[:, None] * row_stride + j.to(tl.int64)[:, None] * column_stride
    tl.store(out, total.to(out_ptr.dtype.element_ty), (cell < cells)[:, None] & (channel < channels)[None, :])


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
        weights = BoxWeights(
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
        weights = BoxWeights(boxes, images, (height, width), pooled, (spatial_scale, sampling_ratio, aligned))
        order, first = boxes_of_images(weights.boxes, images)
        lists, ends, blocks_a_strip = boxes_of_strips(weights, order, first, (height, width), CELLS)
        pool_backward[(images * triton.cdiv(height * width, CELLS), triton.cdiv(channels, CHANNELS))](
            grad.contiguous(), *weights.tensors(), lists, first, ends, out,
            boxes.shape[0], blocks_a_strip, channels, height, width, *pooled, *out.stride(),
            CELLS=CELLS, CHANNELS=CHANNELS, WIDE=weights.wide, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out
