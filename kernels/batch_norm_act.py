"""Triton form of `batch_norm_act`: statistics, apply, and the two passes backward, over rows of adjacent channels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 64  # channels of a program: 128 adjacent bytes of each row in 16 bits
ROWS = 32  # rows that a program holds at once
SPLITS = 512  # programs that share the rows of a group of channels, at most: the partial results to be merged


@triton.jit(do_not_specialize=["rows", "rows_a_split"])
def block_statistics(
    input_ptr, mean_ptr, deviations_ptr, rows, channels, rows_a_split, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """input [rows, channels] -> mean, summed squared deviations [splits, channels] of each split's rows.

    Each tile's deviations are taken about its own mean, and tiles are merged (Chan et al. 1979): a sum of squares about
    zero would lose the digits of a variance that is small beside the mean.
    """
    real = tl.float64 if WIDE else tl.float32
    split = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    first = split * rows_a_split
    last = tl.minimum(first + rows_a_split, rows)
    inside = column < channels
    mean = tl.zeros([CHANNELS], real)
    deviations = tl.zeros([CHANNELS], real)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & inside[None, :]
        x = tl.load(input_ptr + row[:, None] * channels + column[None, :], mask, other=0.0).to(real)
        here = tl.minimum(last - start, ROWS).to(real)
        before = (start - first).to(real)
        tile_mean = tl.sum(x, 0) / here
        centred = tl.where(mask, x - tile_mean[None, :], 0.0)
        apart = tile_mean - mean
        share = here / (before + here)
        deviations += tl.sum(centred * centred, 0) + apart * apart * (before * share)
        mean += apart * share
    tl.store(mean_ptr + split * channels + column, mean, inside)
    tl.store(deviations_ptr + split * channels + column, deviations, inside)


@triton.jit(do_not_specialize=["rows", "splits", "rows_a_split"])
def merged_statistics(
    mean_ptr, deviations_ptr, merged_ptr, rows, channels, splits, rows_a_split, CHANNELS: tl.constexpr
):
    """mean, deviations [splits, channels] -> merged [2 * channels + 1]: mean, biased variance, count (Chan et al.)."""
    column = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = column < channels
    mean = tl.zeros([CHANNELS], tl.float64)
    deviations = tl.zeros([CHANNELS], tl.float64)
    for split in range(splits):
        before = split * rows_a_split
        here = tl.minimum(rows_a_split, rows - before).to(tl.float64)
        other = tl.load(mean_ptr + split * channels + column, inside, other=0.0).to(tl.float64)
        more = tl.load(deviations_ptr + split * channels + column, inside, other=0.0).to(tl.float64)
        apart = other - mean
        share = here / (before + here)
        deviations += more + apart * apart * (before * share)
        mean += apart * share
    count = tl.zeros([CHANNELS], tl.float64) + rows
    tl.store(merged_ptr + column, mean.to(merged_ptr.dtype.element_ty), inside)
    tl.store(merged_ptr + channels + column, (deviations / count).to(merged_ptr.dtype.element_ty), inside)
    tl.store(merged_ptr + 2 * channels + column, count.to(merged_ptr.dtype.element_ty), column < 1)


@triton.jit
def _affine(weight_ptr, bias_ptr, statistics_ptr, column, channels, eps, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
            WIDE: tl.constexpr):  # fmt: skip
    """mean, 1 / sqrt(var + eps), scale and bias of these channels."""
    inside = column < channels
    mean = tl.load(statistics_ptr + column, inside, other=0.0)
    var = tl.load(statistics_ptr + channels + column, inside, other=1.0)
    invstd = 1.0 / (tl.sqrt(var + eps) if WIDE else tl.sqrt_rn(var + eps))
    scale = invstd
    if WEIGHT:
        scale = invstd * tl.load(weight_ptr + column, inside, other=0.0)
    bias = tl.zeros_like(mean)
    if BIAS:
        bias = tl.load(bias_ptr + column, inside, other=0.0)
    return mean, invstd, scale, bias


@triton.jit(do_not_specialize=["rows"])
def apply_rows(
    input_ptr, residual_ptr, weight_ptr, bias_ptr, statistics_ptr, output_ptr, rows, channels, eps: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, RESIDUAL: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    RELU: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """input, residual [rows, channels] -> output [rows, channels]; statistics [2 * channels + 1]."""
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mean, _, scale, bias = _affine(weight_ptr, bias_ptr, statistics_ptr, column, channels, eps, WEIGHT, BIAS, WIDE)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * channels + column[None, :]
    mask = (row < rows)[:, None] & (column < channels)[None, :]
    y = tl.load(input_ptr + at, mask, other=0.0).to(mean.dtype)
    y = (y - mean[None, :]) * scale[None, :] + bias[None, :]
    if RESIDUAL:
        y += tl.load(residual_ptr + at, mask, other=0.0).to(mean.dtype)
    if RELU:
        y = tl.where(y < 0, 0.0, y)
    tl.store(output_ptr + at, y.to(output_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows", "rows_a_split"])
def block_backward_sums(
    grad_ptr, input_ptr, output_ptr, weight_ptr, bias_ptr, statistics_ptr, masked_ptr, sum_ptr, cross_ptr,
    rows, channels, rows_a_split, eps: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUT: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    RELU: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """grad, input, output [rows, channels] -> sums of dy and of dy xhat [splits, channels]; dy itself with OUTPUT."""
    split = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mean, invstd, scale, bias = _affine(weight_ptr, bias_ptr, statistics_ptr, column, channels, eps, WEIGHT, BIAS, WIDE)
    first = split * rows_a_split
    last = tl.minimum(first + rows_a_split, rows)
    total = tl.zeros_like(mean)
    cross = tl.zeros_like(mean)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        at = row[:, None] * channels + column[None, :]
        mask = (row < last)[:, None] & (column < channels)[None, :]
        x = tl.load(input_ptr + at, mask, other=0.0).to(mean.dtype) - mean[None, :]
        dy = tl.load(grad_ptr + at, mask, other=0.0).to(mean.dtype)
        if RELU:
            if OUTPUT:
                y = tl.load(output_ptr + at, mask, other=0.0).to(mean.dtype)
            else:
                y = x * scale[None, :] + bias[None, :]
            dy = tl.where(y <= 0, 0.0, dy)
        if OUTPUT:
            tl.store(masked_ptr + at, dy.to(masked_ptr.dtype.element_ty), mask)
        dy = tl.where(mask, dy, 0.0)
        total += tl.sum(dy, 0)
        cross += tl.sum(tl.where(mask, dy * x, 0.0), 0)
    tl.store(sum_ptr + split * channels + column, total, column < channels)
    tl.store(cross_ptr + split * channels + column, cross * invstd, column < channels)


@triton.jit(do_not_specialize=["rows"])
def backward_rows(
    grad_ptr, input_ptr, weight_ptr, bias_ptr, statistics_ptr, sums_ptr, result_ptr, rows, channels, eps: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """grad, input [rows, channels], sums [2, channels] -> gradient of the input [rows, channels]."""
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mean, invstd, scale, bias = _affine(weight_ptr, bias_ptr, statistics_ptr, column, channels, eps, WEIGHT, BIAS, WIDE)
    count = tl.load(statistics_ptr + 2 * channels)
    share = tl.where(count > 0, 1.0 / tl.maximum(count, 1.0), 0.0)  # 0: the statistics are constants
    offset = tl.load(sums_ptr + column, column < channels, other=0.0) * share
    slope = tl.load(sums_ptr + channels + column, column < channels, other=0.0) * share * invstd
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * channels + column[None, :]
    mask = (row < rows)[:, None] & (column < channels)[None, :]
    x = tl.load(input_ptr + at, mask, other=0.0).to(mean.dtype) - mean[None, :]
    dy = tl.load(grad_ptr + at, mask, other=0.0).to(mean.dtype)
    if RELU:
        dy = tl.where(x * scale[None, :] + bias[None, :] <= 0, 0.0, dy)
    dx = (dy - offset[None, :] - x * slope[None, :]) * scale[None, :]
    tl.store(result_ptr + at, dx.to(result_ptr.dtype.element_ty), mask)


def _sizes(input: Tensor) -> tuple[int, int, int, int]:
    """rows, channels, rows of a split, splits; they follow from the sizes alone, and with them the order of sums."""
    channels = input.shape[1]
    rows = input.numel() // max(channels, 1)
    rows_a_split = ROWS * max(triton.cdiv(rows, ROWS * SPLITS), 4)
    return rows, channels, rows_a_split, triton.cdiv(rows, rows_a_split)


def _wide(input: Tensor) -> torch.dtype:
    return torch.promote_types(input.dtype, torch.float32)


def batch_norm_statistics(input: Tensor) -> Tensor:
    """The operator `scrl_fast::batch_norm_statistics_triton`; see csrc/cpu/batch_norm_act.cpp for its contract."""
    rows, channels, rows_a_split, splits = _sizes(input)
    merged = input.new_empty(2 * channels + 1, dtype=_wide(input))
    if not rows:
        return merged.zero_()
    partials = input.new_empty((2, splits, channels), dtype=_wide(input))
    groups, wide = triton.cdiv(channels, CHANNELS), input.dtype is torch.float64
    with torch.cuda.device_of(input):  # Triton launches on the current device
        block_statistics[(splits, groups)](
            input, partials[0], partials[1], rows, channels, rows_a_split, ROWS=ROWS, CHANNELS=CHANNELS, WIDE=wide
        )
        merged_statistics[(groups,)](
            partials[0], partials[1], merged, rows, channels, splits, rows_a_split, CHANNELS=CHANNELS
        )
    return merged


def batch_norm_act(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    eps: float,
    relu: bool,
) -> Tensor:
    """The operator `scrl_fast::batch_norm_act_triton`; see csrc/cpu/batch_norm_act.cpp for its contract."""
    rows, channels, _, _ = _sizes(input)
    output = torch.empty_like(input)
    if not rows:
        return output
    with torch.cuda.device_of(input):
        apply_rows[(triton.cdiv(rows, ROWS), triton.cdiv(channels, CHANNELS))](
            input, residual, weight, bias, statistics, output, rows, channels, eps, ROWS=ROWS, CHANNELS=CHANNELS,
            RESIDUAL=residual is not None, WEIGHT=weight is not None, BIAS=bias is not None, RELU=relu,
            WIDE=input.dtype is torch.float64,
        )  # fmt: skip
    return output


def batch_norm_act_backward_sums(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """The operator `scrl_fast::batch_norm_act_backward_sums_triton`."""
    rows, channels, rows_a_split, splits = _sizes(input)
    masked = torch.empty_like(input) if output is not None else input.new_empty(0)
    if not rows:
        return statistics.new_zeros((2, channels)), masked
    partials = statistics.new_empty((2, splits, channels))
    with torch.cuda.device_of(input):
        block_backward_sums[(splits, triton.cdiv(channels, CHANNELS))](
            grad, input, output, weight, bias, statistics, masked, partials[0], partials[1],
            rows, channels, rows_a_split, eps, ROWS=ROWS, CHANNELS=CHANNELS, OUTPUT=output is not None,
            WEIGHT=weight is not None, BIAS=bias is not None, RELU=relu,
            WIDE=input.dtype is torch.float64,
        )  # fmt: skip
    return partials.sum(1), masked


def batch_norm_act_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    sums: Tensor,
    eps: float,
    relu: bool,
) -> Tensor:
    """The operator `scrl_fast::batch_norm_act_backward_triton`."""
    rows, channels, _, _ = _sizes(input)
    result = torch.empty_like(input)
    if not rows:
        return result
    with torch.cuda.device_of(input):
        backward_rows[(triton.cdiv(rows, ROWS), triton.cdiv(channels, CHANNELS))](
            grad, input, weight, bias, statistics, sums, result, rows, channels, eps, ROWS=ROWS, CHANNELS=CHANNELS,
            WEIGHT=weight is not None, BIAS=bias is not None, RELU=relu,
            WIDE=input.dtype is torch.float64,
        )  # fmt: skip
    return result
