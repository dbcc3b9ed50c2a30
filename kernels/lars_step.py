"""Triton form of `lars_step_`: one launch for the norms of a dtype, then one update for each group of settings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scrl_fast.kernels.ema_update import address, lerp, number
from scrl_fast.kernels.tensor_lists import Addresses, aligned, by_dtype, chunk_table, on_device, pair

CHUNK = 16384
BLOCK = 1024
PARTIALS = 1024  # sums of chunks that a program of `update_chunk` adds up at a time
ADAPT, PLAIN_BY_LR = 1.0, 2.0  # modes: the last of the settings
SETTINGS = 7  # lr, momentum, weight_decay, trust_coefficient, eps, grad_scale, mode


@triton.jit
def squares_of_chunk(
    table_ptr, like_ptr, partials_ptr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr
):
    """table [chunks, 7] -> partials [chunks, 2] = (sum p^2, sum g^2) of each chunk, in float64.

    Rows of the table: addresses of parameter, buffer, target (0: none) and gradient, count of elements, first and last
    chunk of the tensor. like: any tensor of the dtype.
    """
    chunk = tl.program_id(0).to(tl.int64)
    row = table_ptr + chunk * 7
    params = address(row, 0, like_ptr, ALIGNED)
    gradients = address(row, 3, like_ptr, ALIGNED)
    count = tl.load(row + 4).to(tl.int32)
    i = tl.arange(0, BLOCK)
    param_squares = tl.zeros([BLOCK], tl.float64)
    gradient_squares = tl.zeros([BLOCK], tl.float64)
    if count == CHUNK:  # no mask, so that loads take 16 bytes
        for start in range(0, CHUNK, BLOCK):
            p = tl.load(params + start + i).to(tl.float64)
            g = tl.load(gradients + start + i).to(tl.float64)
            param_squares += p * p
            gradient_squares += g * g
    else:
        for start in range(0, count, BLOCK):
            p = tl.load(params + start + i, start + i < count, other=0.0).to(tl.float64)
            g = tl.load(gradients + start + i, start + i < count, other=0.0).to(tl.float64)
            param_squares += p * p
            gradient_squares += g * g
    tl.store(partials_ptr + chunk * 2, tl.sum(param_squares, 0))
    tl.store(partials_ptr + chunk * 2 + 1, tl.sum(gradient_squares, 0))


@triton.jit
def sum_of_partials(partials_ptr, first, last, PARTIALS: tl.constexpr):
    """Of rows [first, last) of partials [chunks, 2], the column that partials_ptr points at."""
    i = tl.arange(0, PARTIALS)
    total = tl.zeros([PARTIALS], tl.float64)
    for start in range(first, last, PARTIALS):
        total += tl.load(partials_ptr + (start + i).to(tl.int64) * 2, start + i < last, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def update_block(
    params, buffers, targets, gradients, i, mask, factor, decay, momentum, lr, weight, TARGET: tl.constexpr
):
    """Elements i of a chunk: params, buffers, targets, gradients [chunk], numbers of `update_chunk` as scalars."""
    real: tl.constexpr = weight.dtype
    p = tl.load(params + i, mask).to(real)
    b = tl.load(buffers + i, mask).to(real)
    g = tl.load(gradients + i, mask).to(real)
    b = momentum * b + (factor * g + decay * p)
    p = (p - lr * b).to(params.dtype.element_ty)
    if TARGET:
        t = tl.load(targets + i, mask).to(real)
        tl.store(
            targets + i, lerp(t, p.to(real), weight).to(params.dtype.element_ty), mask
        )  # with the parameter as it was rounded
    tl.store(buffers + i, b.to(params.dtype.element_ty), mask)
    tl.store(params + i, p, mask)


@triton.jit
def update_chunk(
    table_ptr, like_ptr, partials_ptr, all_partials_ptr, all_chunks, counter_ptr,
    lr_high, lr_low, lr_ptr, momentum_high, momentum_low, momentum_ptr, decay_high, decay_low, trust_high, trust_low,
    eps_high, eps_low, scale_high, scale_low, ema_high, ema_low, ema_ptr,
    ADAPT: tl.constexpr, BY_LR: tl.constexpr, TARGET: tl.constexpr, FIRST: tl.constexpr, WIDE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PARTIALS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """b = momentum b + a (g + decay p);  p = p - lr b;  t = lerp(t, p, 1 - ema),
    a = trust |p| / (|g| + decay |p| + eps); without ADAPT b = momentum b + scale g + decay p, scale being lr if BY_LR.

    table [chunks of this launch, 7]: rows as for `squares_of_chunk`, of tensors that share the numbers below.
    like: any tensor of the dtype. partials [chunks of the dtype, 2], all_partials [all_chunks, 2]: where there is a
    counter [1], the gradients of all chunks must be finite, else nothing changes and the launch with FIRST counts.
    *_high + *_low: one float64 in two float32, of lr, momentum, weight decay, trust coefficient, eps, gradient scale
    and the average's momentum; where lr, momentum or ema has a pointer [1], times what lies there.
    ADAPT, BY_LR: the mode of these tensors. TARGET: they have an average. WIDE: float64. CHUNK, BLOCK: elements of a
    chunk and of a step through it. PARTIALS: sums added up at a time. ALIGNED: addresses are multiples of 16 bytes.
    """
    real: tl.constexpr = tl.float64 if WIDE else tl.float32
    row = table_ptr + tl.program_id(0).to(tl.int64) * 7
    count = tl.load(row + 4).to(tl.int32)
    if counter_ptr is not None:
        total = sum_of_partials(all_partials_ptr + 1, 0, all_chunks, PARTIALS)
        good = total - total == 0.0
        count = tl.where(good, count, 0)
        if FIRST and tl.program_id(0) == 0:
            tl.store(counter_ptr, tl.load(counter_ptr) + tl.where(good, 0, 1))
    lr = number(lr_high, lr_low, lr_ptr)
    decay = number(decay_high, decay_low, None)
    factor = lr if BY_LR else number(scale_high, scale_low, None)
    if ADAPT:
        first = tl.load(row + 5).to(tl.int32)
        last = tl.load(row + 6).to(tl.int32)
        param_norm = tl.sqrt(sum_of_partials(partials_ptr, first, last, PARTIALS))
        gradient_norm = tl.sqrt(sum_of_partials(partials_ptr + 1, first, last, PARTIALS))
        below = gradient_norm + decay * param_norm + number(eps_high, eps_low, None)
        no_direction = (param_norm == 0.0) | (gradient_norm == 0.0)
        ratio = number(trust_high, trust_low, None) * param_norm / tl.where(no_direction, 1.0, below)
        factor = tl.where(no_direction, 1.0, ratio)
        decay = decay * factor
    factor = factor.to(real)
    decay = decay.to(real)
    momentum = number(momentum_high, momentum_low, momentum_ptr).to(real)
    lr = lr.to(real)
    weight = (1.0 - number(ema_high, ema_low, ema_ptr)).to(real)

    params = address(row, 0, like_ptr, ALIGNED)
    buffers = address(row, 1, like_ptr, ALIGNED)
    targets = address(row, 2, like_ptr, ALIGNED)
    gradients = address(row, 3, like_ptr, ALIGNED)
    i = tl.arange(0, BLOCK)
    if count == CHUNK:
        for start in range(0, CHUNK, BLOCK):
            update_block(
                params,
                buffers,
                targets,
                gradients,
                start + i,
                None,
                factor,
                decay,
                momentum,
                lr,
                weight,
                TARGET,
            )
    else:
        for start in range(0, count, BLOCK):
            update_block(
                params, buffers, targets, gradients, start + i, start + i < count,
                factor, decay, momentum, lr, weight, TARGET,
            )  # fmt: skip


def lars_step_(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    ema_targets: Sequence[Tensor],
    grads: Sequence[Tensor],
    ema_places: Sequence[int],
    settings: Sequence[float],
    setting_of: Sequence[int],
    ema_momentum: float,
    lr: Tensor | None,
    momentum: Tensor | None,
    ema_momentum_tensor: Tensor | None,
    skip_counter: Tensor | None,
) -> None:
    """The operator `scrl_fast::lars_step_triton_`: the tensors at one place lie alike and dense."""
    if not params:
        return
    device = params[0].device
    numbers = [on_device(n, device) for n in (lr, momentum, ema_momentum_tensor)]
    moves = ema_momentum != 1 or ema_momentum_tensor is not None
    targets = dict(zip(ema_places, ema_targets, strict=True)) if moves else {}
    lists = [_Lists(dtype, places, params, momentum_buffers, targets, grads, setting_of, device)
             for dtype, places in by_dtype(params).items()]  # fmt: skip
    partials = torch.empty((sum(ones.chunks for ones in lists), 2), dtype=torch.float64, device=device)
    parts = partials.split([ones.chunks for ones in lists])
    with torch.cuda.device_of(params[0]):  # Triton launches on the current device
        for ones, part in zip(lists, parts, strict=True):
            ones.launch_squares(part)
        first = True
        for ones, part in zip(lists, parts, strict=True):
            for begin, end, row, has_target in ones.groups:
                update_chunk[(end - begin,)](
                    ones.table[begin:end],
                    ones.like,
                    part,
                    partials,
                    len(partials),
                    skip_counter,
                    *_numbers(settings[SETTINGS * row : SETTINGS * (row + 1)], row, ema_momentum, *numbers),
                    TARGET=has_target,
                    FIRST=first,
                    PARTIALS=PARTIALS,
                    WIDE=ones.like.dtype is torch.float64,
                    **ones.constants,
                )
                first = False


class _Lists:
    """The tensors of one dtype, those that share settings side by side."""

    def __init__(
        self,
        dtype: torch.dtype,
        places: list[int],
        params: Sequence[Tensor],
        buffers: Sequence[Tensor],
        targets: dict[int, Tensor],
        grads: Sequence[Tensor],
        setting_of: Sequence[int],
        device: torch.device,
    ) -> None:
        places = sorted(places, key=lambda i: (setting_of[i], i in targets))
        addresses: Addresses = tuple(
            (
                params[i].data_ptr(),
                buffers[i].data_ptr(),
                targets[i].data_ptr() if i in targets else 0,
                grads[i].data_ptr(),
                params[i].numel(),
            )
            for i in places
        )
        self.table = chunk_table(addresses, dtype.itemsize, CHUNK, device)
        self.chunks = len(self.table)
        self.like = params[places[0]]
        self.constants: dict[str, Any] = {
            "CHUNK": CHUNK, "BLOCK": BLOCK, "ALIGNED": aligned(addresses),
            "num_warps": 4, "enable_fp_fusion": True,
        }  # fmt: skip
        self.groups: list[tuple[int, int, int, bool]] = []
        """(first chunk, last chunk, row of settings, with target)."""
        end = 0
        for (row, has_target), members in itertools.groupby(places, key=lambda i: (setting_of[i], i in targets)):
            begin, end = end, end + sum(triton.cdiv(params[i].numel(), CHUNK) for i in members)
            self.groups.append((begin, end, row, has_target))

    def launch_squares(self, partials: Tensor) -> None:
        squares_of_chunk[(self.chunks,)](self.table, self.like, partials, **self.constants)


def _numbers(
    row: Sequence[float],
    place: int,
    ema_momentum: float,
    lr: Tensor | None,
    momentum: Tensor | None,
    ema: Tensor | None,
) -> tuple[Any, ...]:
    """Arguments of `update_chunk` from lr_high to BY_LR."""
    (lr_factor, momentum_factor), others, mode = row[:2], row[2:-1], row[-1]
    at_row = [n if n is None or n.numel() == 1 else n[place : place + 1] for n in (lr, momentum)]
    pairs = [half for number in others for half in pair(number)]
    numbers = (*pair(lr_factor), at_row[0], *pair(momentum_factor), at_row[1], *pairs, *pair(ema_momentum), ema)
    return *numbers, mode == ADAPT, mode == PLAIN_BY_LR
