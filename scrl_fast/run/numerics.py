"""Settings of the process that change numbers or speed: threads, memory, determinism, the seed of a step."""

from __future__ import annotations

import ctypes
import os

import numpy as np
import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def set_threads(asked: int, device: torch.device, before: int = 0) -> int:
    """Fixes the number of torch's CPU threads and returns it; on a GPU nothing is set and ``asked`` comes back.

    asked: ``train.threads``; 0 leaves the choice to ``before``, that of the run that goes on, and then to torch.
    """
    if device.type != "cpu":
        return asked
    torch.set_num_threads(asked or before or torch.get_num_threads())
    return torch.get_num_threads()


def keep_memory() -> bool:
    """Tells malloc to keep freed memory and to reuse it for large tensors, for this process; False where it cannot.

    By default glibc maps each large block anew, and the first touch of fresh pages is slow; the encoder's outputs and
    gradients pay it in every layer (``benchmarks/memory_bench.py`` measures how much).
    """
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) and libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1))
    except (OSError, AttributeError, TypeError):  # no glibc
        return False


def set_numerics(deterministic: bool, device: torch.device) -> None:
    """torch's process-wide switches: bit-equal runs, or the fastest convolutions for shapes that never change."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by cuBLAS, read at its first call
        torch.use_deterministic_algorithms(True)
        # the switch also fills fresh memory, for debugging: a write of every output, to no use
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not deterministic


def step_seed(seed: int, step: int, rank: int) -> int:
    """A 63-bit seed for whatever torch draws in one step of one process (drop path and its like)."""
    return int(np.random.SeedSequence([seed % 2**64, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
