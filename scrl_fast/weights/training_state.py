"""The structure of a training checkpoint: the kinds of value that its sections may hold, whatever the file's origin."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from scrl_fast.weights.errors import CheckpointError
from scrl_fast.weights.tensor_values import shown, value_fault

LARGEST_STEP = 1 << 53
"""Steps are counted in numbers that a float64 holds exactly."""
LARGEST_THREADS = 4096
"""CPU threads that a run goes on with; more are a mistake in the file."""
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
_AVERAGES = ("momentum_buffer", "exp_avg", "exp_avg_sq")
_PLAIN = (str, int, float, bool, type(None))


def check_training_state(path: object, state: Mapping[str, Any]) -> None:
    """Raises CheckpointError, naming the file, the place and the value, unless a run can go on from ``state``.

    Checked are types and ranges: counters, options, tensors by name, the optimizer's numbering, generator states, the
    loader's place and the log's numbers. Shapes are for the network and the optimizer to check, which know them.
    """
    checks: dict[str, Callable[[Any], str]] = {
        "step": _count,
        "epoch": _count,
        "version": lambda value: "" if type(value) is str else "must be text",
        "config": _config,
        "data": _data,
        "model": _model,
        "optimizer": _optimizer,
        "rng": _generators,
        "loader": _loader,
        "log": _log,
        "categories": _categories,
    }
    for section, fault_of in checks.items():
        if section in state and (fault := fault_of(state[section])):
            raise CheckpointError(f"{path}: the checkpoint's {section} cannot be used: {fault}")


def _count(value: Any, least: int = 0) -> str:
    good = type(value) is int and least <= value < LARGEST_STEP
    return "" if good else f"must be a whole number from {least} on, is {shown(value)}"


def _in(place: str, fault: str) -> str:
    return f"{place} {fault}" if fault else ""


def _first(faults: Any) -> str:
    return next((fault for fault in faults if fault), "")


def _named(value: Any, fault_of: Callable[[Any], str], names: type = str) -> str:
    """The fault of a dict: its names must be of one type, its values pass ``fault_of``."""
    if not isinstance(value, dict):
        return f"must be a dict, is {shown(value)}"
    if wrong := [name for name in value if type(name) is not names]:
        return f"has the key {shown(wrong[0])}, where keys are of type {names.__name__}"
    return _first(_in(f"{name!r:.60}", fault_of(item)) for name, item in value.items())


def _config(value: Any) -> str:
    if fault := _options(value):
        return fault
    train = value.get("train", {})
    if not isinstance(train, dict):
        return f"train must be a dict, is {shown(train)}"
    threads, precision = train.get("threads", 0), train.get("precision", PRECISIONS[0])
    if type(threads) is not int or not 0 <= threads <= LARGEST_THREADS:
        return f"train.threads must be a whole number from 0 to {LARGEST_THREADS}, is {shown(threads)}"
    good = type(precision) is str and precision in PRECISIONS
    return "" if good else f"train.precision must be one of {', '.join(PRECISIONS)}, is {shown(precision)}"


def _data(value: Any) -> str:
    """The images of the run: empty, or their number and a hash of their names."""
    if not isinstance(value, dict):
        return f"must be a dict, is {shown(value)}"
    if fault := _in("images", _count(value["images"]) if "images" in value else ""):
        return fault
    names = value.get("names", "")
    return "" if type(names) is str else f"names must be text, is {shown(names)}"


def _options(value: Any) -> str:
    return _named(value, _option)


def _option(value: Any) -> str:
    if isinstance(value, dict):
        return _options(value)
    if isinstance(value, (list, tuple)):
        return _first(_option(item) for item in value)
    return "" if type(value) in _PLAIN else f"must be a plain value, is {shown(value)}"


def _tensor(value: Any) -> str:
    return "" if isinstance(value, Tensor) else f"must be a tensor, is {shown(value)}"


def _model(value: Any) -> str:
    """Tensors by name, or those of several networks, some of which may be None."""
    if isinstance(value, dict) and not any(isinstance(item, Tensor) for item in value.values()):
        return _named(value, lambda part: "" if part is None else _named(part, _tensor))
    return _named(value, _tensor)


def _optimizer(value: Any) -> str:
    if not isinstance(value, dict) or not {"state", "param_groups"} <= value.keys():
        return "must be a dict of 'state' and 'param_groups'"
    groups = value["param_groups"]
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return "'param_groups' must be a list of dicts"
    for group in groups:
        numbers = group.get("params")
        if not isinstance(numbers, list) or any(_count(number) for number in numbers):
            return "'params' of a group must be a list of numbers"
    return _in("'state'", _named(value["state"], _parameter_state, int))


def _parameter_state(value: Any) -> str:
    plain = lambda item: "" if isinstance(item, (Tensor, *_PLAIN)) else f"is {shown(item)}"  # noqa: E731
    if fault := _named(value, plain):
        return fault
    return _first(_in(repr(name), value_fault(name, value[name], torch.float32)) for name in _AVERAGES if name in value)


def _generators(value: Any) -> str:
    if not isinstance(value, dict):
        return f"must be a dict, is {shown(value)}"
    if "torch" in value:
        try:
            torch.Generator().set_state(value["torch"])
        except (RuntimeError, TypeError, ValueError):
            return f"'torch' must be a state of torch's generator on a CPU, is {shown(value['torch'])}"
    if "scaler" in value:
        return _in("'scaler'", _named(value["scaler"], _number))
    return ""


def _number(value: Any) -> str:
    good = type(value) in (int, float) and math.isfinite(value)
    return "" if good else f"must be a finite number, is {shown(value)}"


def _loader(value: Any) -> str:
    if not isinstance(value, dict):
        return f"must be a dict, is {shown(value)}"
    counters = {"epoch": 0, "batch": 0, "world_size": 1}
    if fault := _first(_in(name, _count(value[name], least)) for name, least in counters.items() if name in value):
        return fault
    processes = value.get("processes", [])
    if not isinstance(processes, list) or not all(isinstance(process, dict) for process in processes):
        return "'processes' must be a list of dicts"
    names = lambda item: "" if isinstance(item, list) and all(type(n) is str for n in item) else "must be names"  # noqa: E731
    return _first(_in("'bad'", _named(process.get("bad", {}), names, int)) for process in [*processes, value])


def _categories(value: Any) -> str:
    """The classes of a detector: as many numbers as names."""
    if not isinstance(value, dict) or not {"names", "ids"} <= value.keys():
        return "must be a dict of 'names' and 'ids'"
    names, ids = value["names"], value["ids"]
    if not isinstance(names, list) or any(type(name) is not str for name in names):
        return "'names' must be a list of text"
    if not isinstance(ids, list) or len(ids) != len(names) or any(type(number) not in (int, str) for number in ids):
        return "'ids' must be a list of as many numbers or texts as there are names"
    return ""


def _log(value: Any) -> str:
    if not isinstance(value, dict):
        return f"must be a dict, is {shown(value)}"
    rows, scores, best = value.get("pending", []), value.get("scores", []), value.get("best", 0.0)
    if not isinstance(rows, list) or not all(isinstance(row, (list, dict)) for row in rows):
        return "'pending' must be a list of rows"
    numbers = [number for row in rows for number in (row.values() if isinstance(row, dict) else row)]
    if not isinstance(scores, list) or any(type(number) not in (int, float) for number in [*numbers, *scores, best]):
        return "'pending', 'scores' and 'best' must hold numbers"
    return ""
