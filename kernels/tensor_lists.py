"""Lists of tensors for Triton kernels: a table of chunks in device memory, by their addresses."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Addresses = tuple[tuple[int, ...], ...]
"""For each tensor of a launch where it lies in each list (0 where it is absent), and last its number of elements."""

_TABLES: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
_TABLES_AT_MOST = 32
_KEPT: list[Tensor] = []  # tables that a CUDA graph reads for as long as it lives


def chunk_table(tensors: Addresses, itemsize: int, chunk: int, device: torch.device) -> Tensor:
    """int64 ``[chunks, lists + 3]`` on device: the addresses of each chunk's first elements, their count, and the range
    [first, last) of its tensor's chunks.

    Built once for a list of tensors and kept: gradients usually come back to the memory they had a step before. A table
    that is used while a CUDA graph is captured is never given up; one that is built there belongs to the graph alone,
    because nothing is in it before the graph runs.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    key = (tensors, itemsize, chunk, device)
    table = _TABLES.get(key)
    if table is None:
        table = _to_device(_rows(tensors, itemsize, chunk), device, capturing)
        if not capturing:
            _TABLES[key] = table
    if not capturing:
        _TABLES.move_to_end(key)
        while len(_TABLES) > _TABLES_AT_MOST:
            _TABLES.popitem(last=False)
    else:
        _KEPT.append(table)
    return table


def _rows(tensors: Addresses, itemsize: int, chunk: int) -> NDArray[np.int64]:
    rows = np.array(tensors, dtype=np.int64)
    sizes = rows[:, -1]
    counts = -(-sizes // chunk)
    owner = np.repeat(np.arange(len(rows)), counts)
    begin = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * chunk
    table = rows[owner]
    table[:, :-1] += np.where(table[:, :-1] != 0, begin[:, None] * itemsize, 0)
    table[:, -1] = np.minimum(sizes[owner] - begin, chunk)
    last = np.cumsum(counts)
    return np.column_stack([table, (last - counts)[owner], last[owner]])


def _to_device(table: NDArray[np.int64], device: torch.device, capturing: bool) -> Tensor:
    here = torch.from_numpy(table)
    if device.type == "cpu":
        return here
    here = here.pin_memory()  # the copy does not wait for the GPU, and a graph may hold it
    if capturing:
        _KEPT.append(here)
    return here.to(device, non_blocking=True)


def on_device(numbers: Tensor | None, device: torch.device) -> Tensor | None:
    """numbers on device. Those of a host tensor are read now and filled in there: a copy would wait for the GPU, and
    cannot be captured in a CUDA graph."""
    if numbers is None:
        return None
    if numbers.device.type == device.type:
        return numbers.to(device)  # from another GPU too
    filled = [torch.full((), number, dtype=numbers.dtype, device=device) for number in numbers.reshape(-1).tolist()]
    return torch.stack(filled).reshape(numbers.shape)


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
