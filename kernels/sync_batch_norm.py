"""What `SyncBatchNorm` does between its collective and its normalisation on a GPU, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 128  # a program


@triton.jit(do_not_specialize=["processes", "eps", "momentum"])
def merge(
    rows_ptr, mean_ptr, invstd_ptr, counts_ptr, running_mean_ptr, running_var_ptr, batches_ptr,
    processes, channels, eps, momentum,
    TRACK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """rows [processes, 2 channels + 1]: mean and 1 / sqrt(variance + eps) of each channel, number of values.

    mean, invstd [channels]: of all processes together (Chan et al. 1979), in the order of the processes. counts
    [processes] int32. To track: running_mean, running_var [channels] and batches [1] move on, unless no process had a
    value.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = channel < channels
    width = 2 * channels + 1
    real = rows_ptr.dtype.element_ty
    mean = tl.zeros([CHANNELS], real)
    squares = tl.zeros([CHANNELS], real)
    total = tl.load(rows_ptr + 2 * channels) * 0  # of a count, which is always finite: a mean may not be
    for process in range(processes):
        row = rows_ptr + process * width
        count = tl.load(row + 2 * channels)
        if count > 0:
            own = tl.load(row + channel, mask, other=0.0)
            invstd = tl.load(row + channels + channel, mask, other=1.0)
            variance = tl.maximum(1.0 / (invstd * invstd) - eps, 0.0)
            share = count / (total + count)
            apart = own - mean
            mean += share * apart
            squares += count * (variance + (1.0 - share) * apart * apart)
            total += count
        if tl.program_id(0) == 0:
            tl.store(counts_ptr + process, count.to(tl.int32))
    variance = squares / tl.maximum(total, 1.0)
    tl.store(mean_ptr + channel, mean, mask)
    tl.store(invstd_ptr + channel, 1.0 / tl.sqrt(variance + eps), mask)
    if TRACK:  # noqa: SIM102 (one is decided when the kernel is compiled)
        if total > 0:
            unbiased = squares / tl.maximum(total - 1.0, 1.0)
            was = tl.load(running_mean_ptr + channel, mask, other=0.0).to(real)
            moved = was + momentum * (mean - was)
            tl.store(running_mean_ptr + channel, moved.to(running_mean_ptr.dtype.element_ty), mask)
            was = tl.load(running_var_ptr + channel, mask, other=0.0).to(real)
            moved = was + momentum * (unbiased - was)
            tl.store(running_var_ptr + channel, moved.to(running_var_ptr.dtype.element_ty), mask)
            if tl.program_id(0) == 0:
                tl.store(batches_ptr, tl.load(batches_ptr) + 1)


def merge_statistics(
    rows: Tensor, eps: float, tracked: tuple[Tensor, Tensor, Tensor, float] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, invstd, counts) of all processes from the rows that they gathered; see `merge`.

    tracked: running mean, running variance, number of batches, momentum; changed in place.
    """
    processes, channels = rows.shape[0], rows.shape[1] // 2
    mean, invstd = rows.new_empty(channels), rows.new_empty(channels)
    counts = rows.new_empty(processes, dtype=torch.int32)
    running_mean, running_var, batches, momentum = tracked or (mean, mean, counts, 0.0)
    with torch.cuda.device_of(rows):  # Triton launches on the current device
        merge[(triton.cdiv(channels, CHANNELS),)](
            rows, mean, invstd, counts, running_mean, running_var, batches,
            processes, channels, eps, momentum,
            TRACK=tracked is not None, CHANNELS=CHANNELS, num_warps=CHANNELS // 32, enable_fp_fusion=True,
        )  # fmt: skip
    return mean, invstd, counts
