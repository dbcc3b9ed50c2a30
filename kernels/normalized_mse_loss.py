"""Triton form of `normalized_mse_loss` and `two_view_loss`: one launch.

Each program stores the sum of its rows. The one that finishes last adds up these sums, in their order whichever program
it is. An atomic counter tells it that it is the last; no number is added atomically.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WHOLE_ROW = 4096  # columns up to which a row's piece stays in registers between its dot products and its gradient
TILE = 2048  # elements of each operand a program holds: 16 a thread, two 16-byte loads in bfloat16
SUMS = 1024  # of programs that the last one adds up together


@triton.jit
def add_up(sums_ptr, total_ptr, arrived_ptr, total, SUMS: tl.constexpr):
    """Stores this program's total in sums [programs]; the last program to do so writes the sum of all to total [1], and
    arrived [1] back to the 0 that it was."""
    programs = tl.num_programs(0)
    tl.store(sums_ptr + tl.program_id(0), total)
    tl.debug_barrier()  # the thread that counts must not overtake the one that stores
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1:
        place = tl.arange(0, SUMS)
        sums = tl.zeros([SUMS], total.dtype)
        for start in range(0, programs, SUMS):
            sums += tl.load(sums_ptr + start + place, start + place < programs, other=0.0, cache_modifier=".cg")
        tl.store(total_ptr, tl.sum(sums, 0))
        tl.store(arrived_ptr, 0)


@triton.jit(do_not_specialize=["rows", "shift", "divisor", "gradient_divisor"])  # vary from step to step
def row_losses(
    input_ptr,
    target_ptr,
    loss_ptr,
    sums_ptr,
    arrived_ptr,
    grad_input_ptr,
    grad_target_ptr,
    rows,
    columns,
    input_stride,
    target_stride,
    shift,
    divisor,
    gradient_divisor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    REDUCE: tl.constexpr,
    GRAD_INPUT: tl.constexpr,
    GRAD_TARGET: tl.constexpr,
    WIDE: tl.constexpr,
    SUMS: tl.constexpr,
):
    """input, target [rows, columns] with rows input_stride and target_stride apart -> loss [1] to reduce, else [rows];
    grad_input, grad_target [rows, columns] dense, where wanted. sums [programs], arrived [1] of 0: for the sum.

    With x^ = x / max(|x|, eps), t^ likewise:  loss = 2 - 2 x^.t^,
    d/dx = across t + from_input x,  d/dt = across x + from_target t,
    across = -2 / (max(|x|, eps) max(|t|, eps)),  from_input = 2 x^.t^ / |x|^2, or 0 where |x| < eps.

    Row i of input meets row (i + shift) % rows of target. A program owns ROWS rows.
    """
    real = tl.float64 if WIDE else tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    partner = row + shift
    partner = tl.where(partner >= rows, partner - rows, partner)
    in_rows = (row < rows)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    x_row = input_ptr + row[:, None] * input_stride
    t_row = target_ptr + partner[:, None] * target_stride

    xx = tl.zeros([ROWS], real)
    tt = tl.zeros([ROWS], real)
    xt = tl.zeros([ROWS], real)
    if ONE_TILE:
        mask = in_rows & (column < columns)
        x = tl.load(x_row + column, mask, other=0.0).to(real)
        t = tl.load(t_row + column, mask, other=0.0).to(real)
        xx += tl.sum(x * x, 1)
        tt += tl.sum(t * t, 1)
        xt += tl.sum(x * t, 1)
    else:
        for start in range(0, columns, COLUMNS):
            mask = in_rows & (column + start < columns)
            x = tl.load(x_row + start + column, mask, other=0.0).to(real)
            t = tl.load(t_row + start + column, mask, other=0.0).to(real)
            xx += tl.sum(x * x, 1)
            tt += tl.sum(t * t, 1)
            xt += tl.sum(x * t, 1)

    x_norm = tl.sqrt(xx) if WIDE else tl.sqrt_rn(xx)
    t_norm = tl.sqrt(tt) if WIDE else tl.sqrt_rn(tt)
    x_small = x_norm < 1e-12
    t_small = t_norm < 1e-12
    x_inverse = 1.0 / tl.where(x_small, 1e-12, x_norm)
    t_inverse = 1.0 / tl.where(t_small, 1e-12, t_norm)
    across = x_inverse * t_inverse
    cosine = xt * across
    loss = 2.0 - 2.0 * cosine
    if not REDUCE:
        tl.store(loss_ptr + row, loss, row < rows)

    if GRAD_INPUT or GRAD_TARGET:
        twice = tl.full([ROWS], 2.0, real) / gradient_divisor
        p = (-twice * across)[:, None]
        from_input = tl.where(x_small, 0.0, twice * cosine * x_inverse * x_inverse)[:, None]
        from_target = tl.where(t_small, 0.0, twice * cosine * t_inverse * t_inverse)[:, None]
        x_out = grad_input_ptr + row[:, None] * columns
        t_out = grad_target_ptr + partner[:, None] * columns
        if ONE_TILE:
            mask = in_rows & (column < columns)
            if GRAD_INPUT:
                tl.store(x_out + column, (p * t + from_input * x).to(grad_input_ptr.dtype.element_ty), mask)
            if GRAD_TARGET:
                tl.store(t_out + column, (p * x + from_target * t).to(grad_target_ptr.dtype.element_ty), mask)
        else:
            for start in range(0, columns, COLUMNS):
                mask = in_rows & (column + start < columns)
                x = tl.load(x_row + start + column, mask, other=0.0).to(real)
                t = tl.load(t_row + start + column, mask, other=0.0).to(real)
                if GRAD_INPUT:
                    tl.store(x_out + start + column, (p * t + from_input * x).to(grad_input_ptr.dtype.element_ty), mask)
                if GRAD_TARGET:
                    tl.store(
                        t_out + start + column, (p * x + from_target * t).to(grad_target_ptr.dtype.element_ty), mask
                    )
    if REDUCE:  # last, when the rows' registers are free
        add_up(sums_ptr, loss_ptr, arrived_ptr, tl.sum(tl.where(row < rows, loss, 0.0) / divisor, 0), SUMS)


def normalized_mse_loss(
    input: Tensor, target: Tensor, two_views: bool, reduction: int, grad_input: bool, grad_target: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `scrl_fast::normalized_mse_loss_triton`; see csrc/cpu/normalized_mse_loss.cpp for its contract."""
    rows, columns = input.shape
    wide = torch.promote_types(input.dtype, torch.float32)
    shift = rows // 2 if two_views else 0
    divisor = max(rows - shift, 1) if reduction == 2 else 1
    block_columns = min(triton.next_power_of_2(max(columns, 1)), WHOLE_ROW)
    block_rows = max(TILE // block_columns, 1)
    programs = triton.cdiv(rows, block_rows)
    loss = input.new_empty(() if reduction else rows, dtype=wide)
    sums = input.new_empty(programs if reduction else 0, dtype=wide)
    # of each call: a tensor that is kept would belong to whichever graph was captured first
    arrived = input.new_zeros(1 if reduction else 0, dtype=torch.int32)
    grads = [input.new_empty(input.shape if wanted else (0,)) for wanted in (grad_input, grad_target)]
    if not rows:
        return loss.zero_(), grads[0], grads[1]
    with torch.cuda.device_of(input):  # Triton launches on the current device
        row_losses[(programs,)](
            input,
            target,
            loss,
            sums,
            arrived,
            *grads,
            rows,
            columns,
            input.stride(0),
            target.stride(0),
            shift,
            divisor,
            1 if input.dtype is torch.float16 else divisor,
            ROWS=block_rows,
            COLUMNS=block_columns,
            ONE_TILE=columns <= block_columns,
            REDUCE=reduction != 0,
            GRAD_INPUT=grad_input,
            GRAD_TARGET=grad_target,
            WIDE=input.dtype is torch.float64,
            num_warps=4 if block_rows * block_columns <= TILE else 8,
            SUMS=SUMS,
            enable_fp_fusion=True,
        )
    return loss, grads[0], grads[1]
