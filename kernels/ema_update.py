"""Triton form of `ema_update_`: one launch over the chunks of all tensors of a dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from scrl_fast.kernels.tensor_lists import aligned, by_dtype, chunk_table, on_device, pair

CHUNK = 8192
BLOCK = 1024


@triton.jit
def number(high, low, tensor_ptr):
    """high + low, times the tensor's element if there is one, in float64."""
    value = tl.full([], high, tl.float64) + tl.full([], low, tl.float64)
    if tensor_ptr is not None:
        value *= tl.load(tensor_ptr).to(tl.float64)
    return value


@triton.jit
def address(row, place: tl.constexpr, like_ptr, ALIGNED: tl.constexpr):
    """Entry of a row of the chunk table, as a pointer of like_ptr's type."""
    pointer = tl.load(row + place).to(like_ptr.dtype)
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def lerp(target, source, weight):
    """target + weight * (source - target), from whichever end is nearer; exactly the target where weight is 0."""
    near = weight < 0.5
    moved = tl.where(near, target, source) + tl.where(near, weight, weight - 1.0) * (source - target)
    return tl.where(weight == 0.0, target, moved)


@triton.jit
def ema_block(targets, sources, i, mask, weight):
    """Elements i of a chunk: targets, sources [chunk]; weight: 1 - momentum."""
    target = tl.load(targets + i, mask).to(weight.dtype)
    source = tl.load(sources + i, mask).to(weight.dtype)
    tl.store(targets + i, lerp(target, source, weight).to(targets.dtype.element_ty), mask)


@triton.jit
def ema_chunk(
    table_ptr, like_ptr, momentum_high, momentum_low, momentum_ptr,
    WIDE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """target = lerp(target, source, 1 - momentum) for one chunk.

    table [chunks, 5]: rows of `chunk_table` for targets and sources. momentum: high + low, times [1] at its pointer, if
    there is one. like: any tensor of their dtype. WIDE: it is float64.
    """
    weight = (1.0 - number(momentum_high, momentum_low, momentum_ptr)).to(tl.float64 if WIDE else tl.float32)
    row = table_ptr + tl.program_id(0).to(tl.int64) * 5
    targets = address(row, 0, like_ptr, ALIGNED)
    sources = address(row, 1, like_ptr, ALIGNED)
    count = tl.load(row + 2).to(tl.int32)
    i = tl.arange(0, BLOCK)
    if count == CHUNK:  # no mask, so that loads and stores take 16 bytes
        for start in range(0, CHUNK, BLOCK):
            ema_block(targets, sources, start + i, None, weight)
    else:
        for start in range(0, count, BLOCK):
            ema_block(targets, sources, start + i, start + i < count, weight)


def ema_update_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float, momentum_tensor: Tensor | None = None
) -> None:
    """The operator `scrl_fast::ema_update_triton_`: tensors of a pair lie alike and dense."""
    for dtype, places in by_dtype(targets).items():
        addresses = tuple((targets[i].data_ptr(), sources[i].data_ptr(), targets[i].numel()) for i in places)
        device = targets[places[0]].device
        table = chunk_table(addresses, dtype.itemsize, CHUNK, device)
        with torch.cuda.device_of(targets[places[0]]):  # Triton launches on the current device
            ema_chunk[(table.shape[0],)](
                table,
                targets[places[0]],
                *pair(momentum),
                on_device(momentum_tensor, device),
                WIDE=dtype is torch.float64,
                CHUNK=CHUNK,
                BLOCK=BLOCK,
                ALIGNED=aligned(addresses),
                num_warps=4,
                enable_fp_fusion=True,
            )
