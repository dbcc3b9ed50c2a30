"""Checks and layout for operations over lists of tensors (`ema_update_`, `lars_step_`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scrl_fast.ops._arguments import FLOAT_DTYPES


def check_lists(**lists: Sequence[Tensor | None]) -> None:
    """The lists are of one length, and in each place shape, dtype and device agree with the first list's tensor.

    The first list holds strided tensors of FLOAT_DTYPES; where ``ema_targets`` holds None, nothing is compared. Raises
    TypeError or ValueError naming the first place that does not fit.
    """
    (first, tensors), *others = lists.items()
    for name, other in others:
        if len(other) != len(tensors):
            raise ValueError(f"{name} has {len(other)} tensors, {first} has {len(tensors)}: one for each is needed")
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{first}[{i}] must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{first}[{i}] has dtype {tensor.dtype}: float32, float64, bfloat16 and float16 are known")
        _check_layout(first, i, tensor)
        if tensor.device != tensors[0].device:  # type: ignore[union-attr]
            raise ValueError(f"{first}[{i}] is on {tensor.device}, {first}[0] on {tensors[0].device}")  # type: ignore[union-attr]
        for name, other in others:
            _check_pair(i, first, tensor, name, other[i])


def _check_layout(name: str, i: int, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}[{i}] is sparse ({tensor.layout}): only strided tensors are taken")


def _check_pair(i: int, first: str, tensor: Tensor, name: str, other: Tensor | None) -> None:
    if other is None and name == "ema_targets":
        return
    if not isinstance(other, Tensor):
        raise TypeError(f"{name}[{i}] must be a tensor, got {type(other).__name__}")
    _check_layout(name, i, other)
    if other.shape != tensor.shape:
        raise ValueError(f"{name}[{i}] has shape {list(other.shape)}, {first}[{i}] has {list(tensor.shape)}")
    if other.dtype != tensor.dtype:
        raise TypeError(f"{name}[{i}] has dtype {other.dtype}, {first}[{i}] has {tensor.dtype}")
    if other.device != tensor.device:
        raise ValueError(f"{name}[{i}] is on {other.device}, {first}[{i}] on {tensor.device}")


def check_number_device(name: str, number: Any, first: str, device: torch.device | None) -> None:
    """Raises ValueError for a number in a tensor that is neither on the CPU nor on the device of the lists."""
    if isinstance(number, Tensor) and number.device != device and number.device.type != "cpu":
        raise ValueError(f"{name} is on {number.device}, {first} on {device}")


# ---- memory ----


class _Range(NamedTuple):
    """Addresses of a tensor's elements, and which tensor of which list it is."""

    begin: int
    end: int
    written: bool
    name: str
    place: int
    tensor: Tensor


def check_memory(
    written: Mapping[str, Sequence[Tensor | None]],
    read: Mapping[str, Sequence[Tensor | None]],
    *,
    in_place: bool = False,
) -> None:
    """No tensor that is written shares memory with itself or with another: threads write in no order.

    in_place: a tensor that is read may be the very tensor that is written at its place. Raises ValueError naming the
    first two.
    """
    if torch.compiler.is_compiling():
        return
    found = _ranges(written, True) + _ranges(read, False)
    ranges = sorted((each.begin, order) for order, each in enumerate(found))
    reach: list[int] = []  # those that may still overlap what comes
    for begin, current in ranges:
        reach = [each for each in reach if found[each].end > begin]
        for other in reach:
            first, second = found[min(current, other)], found[max(current, other)]  # written ones come first
            if first.written and not (in_place and _same(first, second)):
                _refuse_shared(first, second)
        reach.append(current)


def _ranges(lists: Mapping[str, Sequence[Tensor | None]], written: bool) -> list[_Range]:
    found = []
    for name, tensors in lists.items():
        for place, tensor in enumerate(tensors):
            if tensor is None or tensor.numel() == 0 or not (begin := _address(tensor)):
                continue
            if written and not tensor.is_contiguous() and _overlaps_itself(tensor):
                raise ValueError(f"{name}[{place}] overlaps itself: several of its elements lie at one place in memory")
            end = begin + _extent(tensor) * tensor.element_size()
            found.append(_Range(begin, end, written, name, place, tensor))
    return found


def _address(tensor: Tensor) -> int:
    """0 for a tensor without memory: of device meta, or fake."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def _extent(tensor: Tensor) -> int:
    if tensor.is_contiguous():
        return tensor.numel()
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _overlaps_itself(tensor: Tensor) -> bool:
    axes = sorted((stride, n) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)
    extent = 1
    for stride, n in axes:
        if stride < extent:  # mostly an overlap: only a count can tell
            marks = torch.arange(_extent(tensor)).as_strided(tensor.shape, tensor.stride())
            return stride == 0 or marks.unique().numel() < tensor.numel()
        extent += (n - 1) * stride
    return False


def _same(a: _Range, b: _Range) -> bool:
    return a.place == b.place and a.begin == b.begin and a.tensor.stride() == b.tensor.stride()


def _refuse_shared(a: _Range, b: _Range) -> None:
    """Raises unless the elements lie between one another, as columns of one matrix do."""
    if not (a.tensor.is_contiguous() and b.tensor.is_contiguous()):
        low = min(a.begin, b.begin)
        marks = torch.zeros(max(a.end, b.end) - low, dtype=torch.bool)
        _bytes_of(a, marks, low).fill_(True)
        if not _bytes_of(b, marks, low).any():
            return
    raise ValueError(
        f"{b.name}[{b.place}] shares memory with {a.name}[{a.place}], which is written: each tensor must lie by itself"
    )


def _bytes_of(each: _Range, marks: Tensor, low: int) -> Tensor:
    size = each.tensor.element_size()
    strides = [size * stride for stride in each.tensor.stride()]
    return marks.as_strided([*each.tensor.shape, size], [*strides, 1], each.begin - low)


# ---- layout ----


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
    *,
    in_place: bool = False,
) -> None:
    """Runs ``call(*written, *read)``, a compiled operation that treats tensors as flat memory, whatever their layout.

    checks_itself: the operation compares the lists before it touches memory. 700 tensors compared in Python cost 0.6 ms
        a step, in C++ 20 us: then only when it fails are the lists looked at here, to say what is wrong or to copy
        what lies differently. Lists that fit and lie alike were not refused: it may have failed after it wrote, so it
        is never run again, and its error is raised as it is.
    in_place: as in `check_memory`.
    """
    failure = None
    if checks_itself and not torch.compiler.is_compiling():
        try:
            call(*written.values(), *read.values())
            return
        except RuntimeError as error:
            failure = error
    check_lists(**written, **read)
    check_memory(written, read, in_place=in_place)
    flat_written: list[list[Any]] = [list(t) for t in written.values()]
    flat_read: list[list[Any]] = [list(t) for t in read.values()]
    with one_layout(flat_written, flat_read) as differed:
        if failure is not None and not differed:
            raise failure
        call(*flat_written, *flat_read)
