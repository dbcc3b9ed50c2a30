"""Checks of single arguments, with the argument's name and value in the error."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LONGEST = 80
FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""What every operation on floats takes."""
_NO_DEVICE = 1 << 44
"""Bytes that no device has: 16 TiB."""


def check_room(name: str, elements: int, itemsize: int, device_type: str = "cpu") -> None:
    """Raises ValueError where so many elements are more than the machine's memory holds.

    An expanded tensor of one number may have 2**62 elements: what is made of it is not.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # sizes stand for others
        return
    if elements * itemsize > (_memory() if device_type == "cpu" else _NO_DEVICE):
        raise ValueError(f"{name} of {elements} elements: {elements * itemsize} bytes are more than memory holds")


@functools.cache
def _memory() -> int:
    """Bytes of memory that this process may have: of the machine, less where its control group or a limit says less."""
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # a system that does not tell
        machine = _NO_DEVICE
    return min([machine, *_group_limits("/proc/self/cgroup", "/sys/fs/cgroup"), *_process_limits()])


def _group_limits(membership: str, mounted: str) -> Iterator[int]:
    """What the control groups of a process, versions 1 and 2, and the groups around them allow."""
    try:
        lines = Path(membership).read_text().splitlines()
    except OSError:  # no Linux
        return
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (f"{mounted}/memory", "memory.limit_in_bytes") if controllers else (mounted, "memory.max")
        group = PurePosixPath(path.lstrip("/"))
        for each in (group, *group.parents):  # a container sees its own group as the root
            with suppress(OSError, ValueError):  # not mounted; "max"
                yield int(Path(root, each, name).read_text())


def _process_limits() -> Iterator[int]:
    """What ``ulimit -v`` and ``-d`` allow."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        if (soft := resource.getrlimit(kind)[0]) != resource.RLIM_INFINITY:
            yield soft


def as_integer(name: str, value: Any) -> int:
    """value as an int: Python's, NumPy's or a tensor without dimensions. Raises TypeError for what is no integer."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]  # a compiler's integer stays what it is
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    return int(value)


def check_integer(name: str, value: Any, low: int, high: int) -> int:
    """`as_integer`, and ValueError outside [low, high]."""
    value = as_integer(name, value)
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in {low}..{high}, got {shown(value)}")
    return value


def as_number(name: str, value: Any) -> float:
    """value as a float: Python's or NumPy's. Raises TypeError for what is no number, ValueError for one too large."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that a float holds, got {shown(value)}") from None


def check_number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, finite: bool = True
) -> float:
    """`as_number`, and ValueError outside [low, high], for NaN and, with ``finite``, for infinity."""
    number = as_number(name, value)
    if not low <= number <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {shown(value)}")
    if finite and math.isinf(number):
        raise ValueError(f"{name} must be finite, got {shown(value)}")
    return number


def shown(value: Any) -> str:
    """A plain value, its beginning where it is long; of anything larger its type."""
    if isinstance(value, (tuple, list)) and len(value) <= 8:
        ends = "()" if isinstance(value, tuple) else "[]"
        return f"{ends[0]}{', '.join(map(shown, value))}{ends[1]}"
    if not (value is None or isinstance(value, (str, bool, Real))):
        return type(value).__name__
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return f"a {type(value).__name__} of thousands of digits"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


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


def check_flag(name: str, value: Any) -> bool:
    """value as a bool: Python's or NumPy's, or 0 or 1. Raises TypeError for anything else."""
    if isinstance(value, bool):
        return value
    if isinstance(value, np.bool_) or (isinstance(value, Real) and value in (0, 1)):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {shown(value)}")


def check_sequence(name: str, values: Any) -> Sequence[Any]:
    """values as a sequence; a generator (``module.parameters()``) is listed. Raises TypeError for what is no list."""
    if isinstance(values, (list, tuple)):
        return values
    if isinstance(values, (Tensor, Mapping, str)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list of tensors, got {type(values).__name__}")
    return list(values)
