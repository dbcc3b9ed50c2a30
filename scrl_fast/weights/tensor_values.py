"""What the tensors of a file may be where they fill those of a network: real floats, finite, in any format of file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from scrl_fast.weights.errors import WeightsError

BATCH_COUNTER = "num_batches_tracked"
"""The buffer of a BatchNorm that counts batches; some formats leave it out."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Types that are cast to a network's own. Floats of eight bits are quantized: their scale is elsewhere."""
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def value_fault(name: str, value: Any, wanted: torch.dtype) -> str:
    """What keeps ``value`` from filling a tensor of a network; "" where nothing does. Shapes are not looked at.

    name: of the tensor; a ``running_var`` must not be negative, since BatchNorm takes its root.
    wanted: the dtype of the network's tensor. Whole numbers, such as counters, may stand as floats.
    """
    if not isinstance(value, Tensor):
        return f"must be a tensor, is {shown(value)}"
    if value.layout is not torch.strided:
        return f"is sparse ({value.layout}), must be dense"
    if not wanted.is_floating_point:
        return "" if value.dtype == wanted else _count_fault(name, value)
    if value.dtype not in FLOATS:
        return f"is {_short(value.dtype)}, must be floats ({', '.join(map(_short, FLOATS))})"
    if wrong := _not_finite(value.to(wanted)):
        beyond = f" as {_short(wanted)}" if not _not_finite(value) else ""
        return f"holds {wrong} of {value.numel()} values that are NaN or infinite{beyond}"
    if name.endswith("running_var") and value.numel() and (least := value.min().item()) < 0:
        return f"holds the variance {least:g}, must be at least 0"
    return ""


def check_values(source: object, state: Mapping[str, Any], own: Mapping[str, Tensor]) -> None:
    """Raises WeightsError, naming source and tensor, for the first that cannot fill the one of ``own`` by its name.

    A tensor of ``own`` that holds infinite values itself, such as a mask, is filled with whatever the file has.
    """
    held = {
        name: own[name].dtype for name in own if name in state and (own[name].is_meta or not _not_finite(own[name]))
    }
    _refuse_first(source, ((name, state[name], dtype) for name, dtype in held.items()))


def check_floats(source: object, state: Mapping[str, Any], counters: str) -> None:
    """`check_values` where no network is there to compare: all are floats but names that end with ``counters``."""
    kinds = {True: torch.int64, False: torch.float32}
    _refuse_first(source, ((name, value, kinds[name.endswith(counters)]) for name, value in state.items()))


def _refuse_first(source: object, values: Iterable[tuple[str, Any, torch.dtype]]) -> None:
    for name, value, wanted in values:
        if fault := value_fault(name, value, wanted):
            raise WeightsError(f"{source}: tensor {name:.120} {fault}")


def shown(value: Any) -> str:
    """A plain value for a message; of anything else its type."""
    if isinstance(value, (str, int, float, bool, type(None))):
        return f"{value!r:.60}"
    return f"a {type(value).__name__}"


def _count_fault(name: str, value: Tensor) -> str:
    if value.dtype in _INTEGERS:
        return ""
    if value.dtype not in FLOATS:
        return f"is {_short(value.dtype)}, must be whole numbers"
    if _not_finite(value) or (value.numel() and value.min() < 0):
        return "holds counts that are negative, NaN or infinite"
    average = name.endswith(BATCH_COUNTER)  # an average over steps, of counters too, is between whole numbers
    return "" if average or bool((value == value.round()).all()) else f"is {_short(value.dtype)}, must be whole numbers"


def _not_finite(value: Tensor) -> int:
    return value.numel() - int(torch.isfinite(value).sum())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
