"""Checks and layout for operations over lists of tensors (`ema_update_`, `lars_step_`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_lists(**lists: Sequence[Tensor | None]) -> None:
    """The lists are of one length, and in each place shape, dtype and device agree with the first list's tensor.

    The first list holds tensors of DTYPES; where ``ema_targets`` holds None, nothing is compared. Raises TypeError or
    ValueError naming the first place that does not fit.
    """
    (first, tensors), *others = lists.items()
    for name, other in others:
        if len(other) != len(tensors):
            raise ValueError(f"{name} has {len(other)} tensors, {first} has {len(tensors)}: one for each is needed")
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{first}[{i}] must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{first}[{i}] has dtype {tensor.dtype}: float32, float64, bfloat16 and float16 are known")
        if tensor.device != tensors[0].device:  # type: ignore[union-attr]
            raise ValueError(f"{first}[{i}] is on {tensor.device}, {first}[0] on {tensors[0].device}")  # type: ignore[union-attr]
        for name, other in others:
            _check_pair(i, first, tensor, name, other[i])


def _check_pair(i: int, first: str, tensor: Tensor, name: str, other: Tensor | None) -> None:
    if other is None and name == "ema_targets":
        return
    if not isinstance(other, Tensor):
        raise TypeError(f"{name}[{i}] must be a tensor, got {type(other).__name__}")
    if other.shape != tensor.shape:
        raise ValueError(f"{name}[{i}] has shape {list(other.shape)}, {first}[{i}] has {list(tensor.shape)}")
    if other.dtype != tensor.dtype:
        raise TypeError(f"{name}[{i}] has dtype {other.dtype}, {first}[{i}] has {tensor.dtype}")
    if other.device != tensor.device:
        raise ValueError(f"{name}[{i}] is on {other.device}, {first}[{i}] on {tensor.device}")


def check_number(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> float:
    """value as a float. Raises TypeError for what is no number, ValueError outside [low, high] and for NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value}")
    return float(value)


def check_scalar(
    name: str, value: float | Tensor, low: float = -math.inf, high: float = math.inf
) -> tuple[float, Tensor | None]:
    """A number as (number, None), a tensor of one element as (1.0, tensor). Tensors are not read: no range check."""
    if not isinstance(value, Tensor):
        return check_number(name, value, low, high), None
    if value.numel() != 1:
        raise ValueError(f"{name} must have one element, got shape {list(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a float tensor, got {value.dtype}")
    return 1.0, value if value.dtype in (torch.float32, torch.float64) else value.float()


@contextmanager
def one_layout(written: Sequence[list[Any]], read: Sequence[list[Any]]) -> Iterator[bool]:
    """Lets kernels treat tensors as flat memory: inside the context, the tensors at one place of all lists lie alike.

    The first list of ``written`` leads. A tensor that lies differently (a contiguous gradient of a channels_last
    weight, a slice with gaps) is replaced in its list by a copy; copies of written tensors are written back at the end.
    Yields whether there was any such tensor.
    """
    copies, differed = [], False
    for i, leader in enumerate(written[0]):
        strides = _dense_strides(leader)
        for place, tensors in enumerate((*written, *read)):
            tensor = tensors[i]
            if tensor is not None and not _has_strides(tensor, strides):
                tensors[i] = tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)
                differed = True
                if place < len(written):
                    copies.append((tensor, tensors[i]))
    yield differed
    for tensor, copy in copies:
        tensor.copy_(copy)


def _dense_strides(tensor: Tensor) -> list[int]:
    """The tensor's own strides where it is dense, else those of its axes in the same order without gaps."""
    strides, step = [0] * tensor.ndim, 1
    for axis in sorted(range(tensor.ndim), key=lambda axis: (tensor.stride(axis), tensor.shape[axis])):
        strides[axis] = step
        step *= max(tensor.shape[axis], 1)
    return strides


def _has_strides(tensor: Tensor, strides: list[int]) -> bool:
    return tensor.numel() < 2 or all(
        size == 1 or own == other for size, own, other in zip(tensor.shape, tensor.stride(), strides, strict=True)
    )


def bump_versions(tensors: Sequence[Tensor]) -> None:
    """Tells autograd that these changed, as PyTorch's own in-place operations do."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


def call_on_flat(
    call: Callable[..., None],
    written: Mapping[str, Sequence[Tensor | None]],
    read: Mapping[str, Sequence[Tensor]],
    checks_itself: bool,
) -> None:
    """Runs ``call(*written, *read)``, a compiled operation that treats tensors as flat memory, whatever their layout.

    checks_itself: the operation compares the lists before it touches memory. 700 tensors compared in Python cost 0.6 ms
        a step, in C++ 20 us: then only when it fails are the lists looked at here, to say what is wrong or to copy
        what lies differently. Lists that fit and lie alike were not refused: it may have failed after it wrote, so it
        is never run again, and its error is raised as it is.
    """
    failure = None
    if checks_itself and not torch.compiler.is_compiling():
        try:
            call(*written.values(), *read.values())
            return
        except RuntimeError as error:
            failure = error
    check_lists(**written, **read)
    flat_written: list[list[Any]] = [list(t) for t in written.values()]
    flat_read: list[list[Any]] = [list(t) for t in read.values()]
    with one_layout(flat_written, flat_read) as differed:
        if failure is not None and not differed:
            raise failure
        call(*flat_written, *flat_read)
