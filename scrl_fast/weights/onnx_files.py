"""Reads the parameters of an ONNX graph straight from its protobuf fields; everything else in the file is skipped.

Parameters that a graph keeps in another file are read from regular files inside the graph's own folder only.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scrl_fast.weights.errors import WeightsError
from scrl_fast.weights.metadata import unflattened

MAX_FIELDS = 1_000_000
"""Fields and packed integers of one file, a second of work; raw bytes count as one."""
MAX_BYTES = 2 << 30
"""Bytes of the graph's own file, protobuf's limit."""
MAX_DIMENSIONS = 64

# ModelProto: graph 7, metadata_props 14; GraphProto: initializer 5; StringStringEntryProto: key 1, value 2
_GRAPH, _PROPERTY, _INITIALIZER = 7, 14, 5
# TensorProto
_DIMS, _TYPE, _FLOATS, _INTS, _LONGS, _NAME, _RAW, _DOUBLES, _UNSIGNED = 1, 2, 4, 5, 7, 8, 9, 10, 11
_EXTERNAL, _LOCATION = 13, 14
_STRING = 8
_DTYPES: dict[int, str] = {
    **{1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool"},
    **{10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16"},
}


def read_onnx(path: Path) -> dict[str, Any]:
    """The parameters of an ONNX graph by name, and its metadata under ``__metadata__``.

    `scrl_fast.export` keeps every parameter under its name; other exporters fold norms into convolutions, and such a
    graph then lacks them. Raises WeightsError naming the path for a damaged graph, and for data outside its folder.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES} bytes; larger graphs keep their weights in another file")
        return _Graph(path).document()
    except (OSError, ValueError, IndexError, TypeError, RuntimeError) as error:
        raise WeightsError(f"cannot load {path}: {str(error)[:200] or type(error).__name__}") from error


class _Graph:
    """One file; counts its fields."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fields_left = MAX_FIELDS
        self.external_left: dict[str, int] = {}

    def document(self) -> dict[str, Any]:
        data = memoryview(self.path.read_bytes())
        tensors: dict[str, Any] = {}
        properties: dict[str, str] = {}
        graphs = 0
        for number, value in self.fields(data):
            if number == _PROPERTY:
                key, text = self.entry(value)
                properties[key] = text
            elif number == _GRAPH:
                graphs += 1
                for inner, item in self.fields(self.message(value)):
                    if inner == _INITIALIZER:
                        self.add_initializer(tensors, self.message(item))
        if not graphs:
            raise ValueError("it holds no ONNX graph")
        return {**tensors, "__metadata__": unflattened(properties)}

    # ---- protobuf ----

    def spend(self) -> None:
        self.fields_left -= 1
        if self.fields_left < 0:
            raise ValueError(f"it has more than {MAX_FIELDS} fields")

    def varint(self, data: memoryview, position: int) -> tuple[int, int]:
        """(the unsigned number at ``position``, the position behind it)."""
        self.spend()
        value = 0
        for shift in range(0, 70, 7):
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value & (1 << 64) - 1, position
        raise ValueError("it is no ONNX file (a number of more than ten bytes)")

    def fields(self, data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
        """Numbers and values of the fields of a message: an integer, or the bytes of any other kind."""
        position = 0
        while position < len(data):
            tag, position = self.varint(data, position)
            number, kind = tag >> 3, tag & 7
            if kind == 0:
                value, position = self.varint(data, position)
                yield number, value
                continue
            if kind not in (1, 2, 5) or not number:
                raise ValueError("it is no ONNX file (a field of an unknown kind)")
            length = {1: 8, 5: 4}.get(kind, 0)
            if kind == 2:
                length, position = self.varint(data, position)
            if length > len(data) - position:
                raise ValueError("it is cut off, or no ONNX file")
            yield number, data[position : position + length]
            position += length

    def message(self, value: int | memoryview) -> memoryview:
        if isinstance(value, int):
            raise ValueError("it is no ONNX file (a number where a message must be)")
        return value

    def text(self, value: int | memoryview) -> str:
        return bytes(self.message(value)).decode("utf-8")

    def entry(self, value: int | memoryview) -> tuple[str, str]:
        found = {number: self.text(item) for number, item in self.fields(self.message(value)) if number in (1, 2)}
        return found.get(1, ""), found.get(2, "")

    def integers(self, value: int | memoryview) -> list[int]:
        """One integer of 64 bits, or several packed ones; signed."""
        found, position = ([value], 0) if isinstance(value, int) else ([], 0)
        while not isinstance(value, int) and position < len(value):
            number, position = self.varint(value, position)
            found.append(number)
        return [number - (1 << 64) if number >> 63 else number for number in found]

    # ---- tensors ----

    def add_initializer(self, tensors: dict[str, Any], data: memoryview) -> None:
        held: dict[int, Any] = {_NAME: "", _TYPE: 0, _LOCATION: 0, _DIMS: [], _EXTERNAL: {}}
        numbers: list[int] = []
        for number, value in self.fields(data):
            if number == _NAME:
                held[_NAME] = self.text(value)
            elif number in (_TYPE, _LOCATION) and isinstance(value, int):
                held[number] = value
            elif number == _DIMS:
                held[_DIMS] += self.integers(value)
            elif number == _EXTERNAL:
                held[_EXTERNAL].update([self.entry(value)])
            elif number in (_RAW, _FLOATS, _DOUBLES):
                held[number] = self.message(value)
            elif number in (_INTS, _LONGS, _UNSIGNED):
                numbers += self.integers(value)
        if held[_TYPE] == _STRING:
            return
        name, dims = held[_NAME], held[_DIMS]
        if name in tensors or name == "__metadata__":
            raise ValueError(f"it has two parameters {name!r:.80}")
        if len(dims) > MAX_DIMENSIONS or min(dims, default=0) < 0 or math.prod(max(n, 1) for n in dims) >> 60:
            raise ValueError(f"parameter {name!r:.80} has the shape {dims!s:.60}")
        tensors[name] = self.tensor(name, held, numbers)

    def tensor(self, name: str, held: dict[int, Any], numbers: list[int]) -> Tensor:
        dtype = getattr(torch, _DTYPES.get(held[_TYPE], "?"), None)
        if dtype is None:
            raise ValueError(f"parameter {name!r:.80} is of ONNX's data type {held[_TYPE]}, which is not read")
        size = math.prod(held[_DIMS]) * dtype.itemsize
        if held[_LOCATION] == 1:
            data: Any = self.external(name, held[_EXTERNAL], size)
        elif numbers:
            bits = np.array([number & (1 << 8 * dtype.itemsize) - 1 for number in numbers], np.uint64)
            data = bits.astype(f"<u{dtype.itemsize}").tobytes()
        else:
            data = next((held[field] for field in (_RAW, _FLOATS, _DOUBLES) if field in held), b"")
        if len(data) != size:
            raise ValueError(f"parameter {name!r:.80} of shape {held[_DIMS]} has {len(data)} bytes, must be {size}")
        if not size:
            return torch.zeros(held[_DIMS], dtype=dtype)
        return torch.frombuffer(bytearray(data), dtype=dtype).reshape(held[_DIMS])

    def external(self, name: str, entries: dict[str, str], size: int) -> bytes:
        """The bytes of a parameter in a file of the graph's folder."""
        place = entries.get("location", "")
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", str(size)))
        if offset < 0 or length != size:
            raise ValueError(f"parameter {name!r:.80} has {length} bytes at {offset} of {place!r:.80}, must be {size}")
        with open(checked_location(self.path.parent, place), "rb") as file:
            held = os.fstat(file.fileno()).st_size
            if offset + length > held:
                raise ValueError(f"parameter {name!r:.80} lies behind the end of {place!r:.80}")
            left = self.external_left[place] = self.external_left.get(place, held) - length
            if left < 0:
                raise ValueError(f"its parameters ask for more bytes of {place!r:.80} than it holds")
            file.seek(offset)
            return file.read(length)


def checked_location(folder: Path, place: str) -> Path:
    """The file at ``place`` below ``folder``.

    Raises ValueError for a place that is absolute or leads out, and for links: a symbolic link, or a file with a second
    hard link, could be any file of this machine.
    """
    parts = Path(place).parts
    if not place or "\0" in place or os.path.isabs(place) or ".." in parts or "\\" in place or ":" in place:
        raise ValueError(f"its external data are at {place!r:.120}, which is no name inside the graph's folder")
    path = folder
    for part in parts:
        path = path / part
        if stat.S_ISLNK(os.lstat(path).st_mode):
            raise ValueError(f"its external data {place!r:.120} are behind a link: put a copy in its place")
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        kind = "a file with another hard link" if stat.S_ISREG(status.st_mode) else "no regular file"
        raise ValueError(f"its external data {place!r:.120} are {kind}: put a copy in its place")
    return path
