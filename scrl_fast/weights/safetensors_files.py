"""Reads safetensors files: a JSON header with the place of each tensor, then their bytes, without gap or overlap."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from scrl_fast.weights.errors import WeightsError
from scrl_fast.weights.metadata import unflattened

MAX_HEADER = 16 << 20
"""Bytes of the header; a hundred take one tensor."""
MAX_DIMENSIONS = 64

_DTYPES = {
    "BOOL": "bool",
    **{f"{kind}{bits}": f"{name}{bits}" for kind, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64"},
}


def read_safetensors(path: Path) -> dict[str, Any]:
    """Tensors by name, and the file's metadata under ``__metadata__``.

    Raises WeightsError naming the path for a header that is no header, and for tensors that do not fill the file.
    """
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
                raise ValueError(f"its header of {length} bytes does not fit the file of {size}, or {MAX_HEADER} bytes")
            header = json.loads(file.read(length), object_pairs_hook=_without_repeats, parse_constant=_no_constant)
            if not isinstance(header, dict):
                raise ValueError("its header is no JSON object")
            metadata = _checked_metadata(header.pop("__metadata__", {}))
            _check_places(header, size - 8 - length)
            tensors = {name: _tensor(file, 8 + length, name, header[name]) for name in header}
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise WeightsError(f"cannot load {path}: {str(error)[:200] or type(error).__name__}") from error
    return {**tensors, "__metadata__": unflattened(metadata)}


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header has a name twice")
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"its header holds {text}")


def _checked_metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not text by name")
    return metadata


def _check_places(header: dict[str, Any], room: int) -> None:
    """Raises ValueError unless the tensors, each as large as its shape, fill ``room`` bytes one after the other."""
    free = 0
    for name, entry in sorted(header.items(), key=lambda item: _place(*item)):
        start, end = _place(name, entry)
        if start != free or end < start or end > room:
            raise ValueError(f"tensor {name!r:.80} at bytes {start} to {end}: an overlap, a gap, or outside the file")
        dtype, shape = entry.get("dtype"), entry.get("shape")
        if not isinstance(dtype, str) or not hasattr(torch, _DTYPES.get(dtype, "?")):
            raise ValueError(f"tensor {name!r:.80} has the unknown dtype {dtype!r:.40}")
        if (
            not isinstance(shape, list)
            or len(shape) > MAX_DIMENSIONS
            or any(type(n) is not int or n < 0 for n in shape)
        ):
            raise ValueError(f"tensor {name!r:.80} has the shape {shape!s:.60}")
        count = math.prod(shape)
        if count * getattr(torch, _DTYPES[dtype]).itemsize != end - start or math.prod(max(n, 1) for n in shape) >> 60:
            raise ValueError(f"tensor {name!r:.80} of shape {shape!s:.60} and dtype {dtype} has {end - start} bytes")
        free = end
    if free != room:
        raise ValueError(f"its tensors fill {free} of {room} bytes")


def _place(name: str, entry: Any) -> tuple[int, int]:
    place = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(place, list) or len(place) != 2 or any(type(n) is not int or n < 0 for n in place):
        raise ValueError(f"tensor {name!r:.80} has no place in the file")
    return place[0], place[1]


def _tensor(file: IO[bytes], start: int, name: str, entry: dict[str, Any]) -> Tensor:
    dtype, (begin, end) = getattr(torch, _DTYPES[entry["dtype"]]), entry["data_offsets"]
    if begin == end:
        return torch.zeros(entry["shape"], dtype=dtype)
    data = torch.empty(end - begin, dtype=torch.uint8)
    file.seek(start + begin)
    if file.readinto(data.numpy().data) != end - begin:  # type: ignore[attr-defined]
        raise ValueError(f"it became shorter while tensor {name!r:.80} was read")
    return data.view(dtype).reshape(entry["shape"])
