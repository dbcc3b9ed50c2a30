"""NumPy arrays and scalars of a pickle, built as tensors from checked dtype names, shapes and bytes.

NumPy's own constructors take no part: with a state of the file's choice they follow its bytes as pointers.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scrl_fast.weights.pickles import Constructor, Named, Pending, PickleError, PickleReader

MAX_DIMENSIONS = 64
_NUMBER = re.compile(r"([<>=|]?)([fiub])([1248])|(\?)")
_TEXT = re.compile(r"([<>=|]?)([US])(\d{1,9})")


class Dtype(Pending):
    """``numpy.dtype(name, align, copy)`` with the byte order of its BUILD state."""

    def __init__(self, name: Any) -> None:
        if type(name) is not str or not (_NUMBER.fullmatch(name) or _TEXT.fullmatch(name)):
            raise PickleError(f"arrays of dtype {str(name)[:40]!r} are not read, only of plain numbers")
        self.name = name

    def build(self, reader: PickleReader, state: Any) -> None:
        """``(version, byte order, None, None, None, size, alignment, flags)``; flags name objects, so only 0 passes."""
        order = state[1] if type(state) is tuple and len(state) >= 8 else None
        if type(order) is bytes:
            order = order.decode("latin-1")
        fields, flags = state[2:5] if order else (), state[7] if order else None
        if order not in ("<", ">", "=", "|") or any(field is not None for field in fields) or flags not in (0, 8):
            raise PickleError(f"a dtype {self.name!r} with a state of another kind")
        if flags == 8 and not _TEXT.fullmatch(self.name):
            raise PickleError(f"a dtype {self.name!r} with the flags {flags}")
        self.name = order + self.name.lstrip("<>=|")

    def numbers(self) -> np.dtype[Any]:
        """NumPy's dtype; refuses text."""
        if not _NUMBER.fullmatch(self.name):
            raise PickleError(f"arrays of dtype {self.name!r} are not read, only of plain numbers")
        return np.dtype(self.name)

    def value(self) -> str:
        return self.name


class Array(Pending):
    """``_reconstruct(ndarray, (0,), b"b")``, and the tensor once its BUILD state has come."""

    tensor: Tensor | None = None

    def build(self, reader: PickleReader, state: Any) -> None:
        """``(version, shape, dtype, Fortran order, bytes)``; version may be missing."""
        if type(state) is not tuple or len(state) not in (4, 5):
            raise PickleError("an array with a state of another kind")
        shape, dtype, fortran, data = state[-4:]
        self.tensor = tensor_of(reader, data, dtype, shape, "F" if fortran else "C")

    def value(self) -> Tensor:
        if self.tensor is None:
            raise PickleError("an array without content")
        return self.tensor


def tensor_of(reader: PickleReader, data: Any, dtype: Any, shape: Any, order: Any) -> Tensor:
    """The tensor of raw bytes. Raises PickleError unless dtype and shape ask for exactly these bytes."""
    if type(data) is str:  # Python 2's bytes
        data = data.encode("latin-1")
    if type(dtype) is not Dtype or type(data) is not bytes or order not in ("C", "F"):
        raise PickleError("an array of something other than numbers")
    kind, sizes = dtype.numbers(), checked_shape(shape)
    if math.prod(sizes) * kind.itemsize != len(data):
        raise PickleError(f"an array of shape {list(sizes)} and dtype {kind} with {len(data)} bytes of content")
    reader.spend(len(data) + 64)
    array = np.frombuffer(data, kind).reshape(sizes, order=order)
    return torch.from_numpy(array.astype(kind.newbyteorder("="), order="C", copy=True))


def checked_shape(shape: Any) -> tuple[int, ...]:
    """A tuple of sizes. Raises PickleError for anything else, and for more than an int64 can count."""
    if type(shape) is not tuple or len(shape) > MAX_DIMENSIONS or any(type(n) is not int or n < 0 for n in shape):
        raise PickleError(f"a shape of {str(shape)[:60]}")
    if math.prod(max(n, 1) for n in shape) >= 1 << 60:
        raise PickleError(f"a shape of {str(shape)[:60]}")
    return shape


def _new_dtype(reader: PickleReader, arguments: tuple[Any, ...]) -> Dtype:
    return Dtype(arguments[0])


def _new_array(reader: PickleReader, arguments: tuple[Any, ...]) -> Array:
    if type(arguments[0]) is not Named or arguments[0].name != "numpy.ndarray":
        raise PickleError("an array of another class than numpy.ndarray")
    return Array()


def _array_from_buffer(reader: PickleReader, arguments: tuple[Any, ...]) -> Tensor:
    return tensor_of(reader, *arguments)


def _scalar(reader: PickleReader, arguments: tuple[Any, ...]) -> Any:
    """A NumPy number as a tensor of shape [], NumPy text as text."""
    dtype, data = arguments
    if type(data) is str:
        data = data.encode("latin-1")
    if type(dtype) is Dtype and type(data) is bytes and (text := _TEXT.fullmatch(dtype.name)):
        codec = "latin-1" if text[2] == "S" else "utf-32-be" if text[1] == ">" else "utf-32-le"
        reader.spend(len(data))
        return data.decode(codec, "replace").rstrip("\0")
    return tensor_of(reader, data, dtype, (), "C")


def _constructors() -> dict[str, Constructor]:
    table: dict[str, Constructor] = {"numpy.dtype": _new_dtype}
    for core in ("core", "_core"):
        table[f"numpy.{core}.multiarray._reconstruct"] = _new_array
        table[f"numpy.{core}.multiarray.scalar"] = _scalar
        table[f"numpy.{core}.numeric._frombuffer"] = _array_from_buffer
    return table


ARRAYS = _constructors()
"""Constructors of arrays for `scrl_fast.weights.pickles.PickleReader`."""
