"""Lists of tensors for Triton kernels: a table of chunks in device memory, by their addresses."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Addresses = tuple[tuple[int, ...], ...]
"""For each tensor of a launch where it lies in each list (0 where it is absent), and last its number of elements."""

_KEPT: list[Tensor] = []  # tables that a CUDA graph reads for as long as it lives


def chunk_table(tensors: Addresses, itemsize: int, chunk: int, device: torch.device) -> Tensor:
    """int64 ``[chunks, lists + 3]`` on device: the addresses of each chunk's first elements, their count, and the range
    [first, last) of its tensor's chunks.

    Built once for a list of tensors and kept: gradients usually come back to the memory they had a step before. A table
    that is used while a CUDA graph is captured is never given up.
    """
    table = _chunk_table(tensors, itemsize, chunk, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _KEPT.append(table)
    return table


@functools.lru_cache(maxsize=32)
def _chunk_table(tensors: Addresses, itemsize: int, chunk: int, device: torch.device) -> Tensor:
    rows = np.array(tensors, dtype=np.int64)
    sizes = rows[:, -1]
    counts = -(-sizes // chunk)
    owner = np.repeat(np.arange(len(rows)), counts)
    begin = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * chunk
    table = rows[owner]
    table[:, :-1] += np.where(table[:, :-1] != 0, begin[:, None] * itemsize, 0)
    table[:, -1] = np.minimum(sizes[owner] - begin, chunk)
    last = np.cumsum(counts)
    return _to_device(np.column_stack([table, (last - counts)[owner], last[owner]]), device)


def _to_device(table: np.ndarray, device: torch.device) -> Tensor:
    here = torch.from_numpy(table)
    if device.type == "cpu":
        return here
    here = here.pin_memory()  # the copy does not wait for the GPU, and a graph may hold it
    if torch.cuda.is_current_stream_capturing():
        _KEPT.append(here)
    return here.to(device, non_blocking=True)


def by_dtype(tensors: Sequence[Tensor]) -> dict[torch.dtype, list[int]]:
    """Places of the tensors that have elements, by dtype: a launch takes one dtype."""
    places: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.numel():
            places.setdefault(tensor.dtype, []).append(i)
    return places


def aligned(addresses: Addresses) -> bool:
    """Whether loads of 16 bytes may start where the tensors do."""
    return all(address % 16 == 0 for row in addresses for address in row[:-1])


def pair(number: float) -> tuple[float, float]:
    """number as the sum of two float32, which is what Triton takes a Python float for: 48 of its 53 bits."""
    high = float(np.float32(number))
    return high, float(np.float32(number - high))
