"""What the options of a config may be: types from the annotations, ranges beside them, errors that name the option."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable
from typing import Any

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclasses.dataclass(frozen=True)
class Range:
    """Which numbers are allowed, and how to say so."""

    words: str
    allows: Callable[[float], bool]


def at_least(low: float) -> Range:
    """``low`` and more."""
    return Range(f"at least {low}", lambda value: value >= low)


def above(low: float) -> Range:
    """More than ``low``."""
    return Range(f"above {low}", lambda value: value > low)


def within(low: float, high: float) -> Range:
    """From ``low`` to ``high``, both included."""
    return Range(f"from {low} to {high}", lambda value: low <= value <= high)


def from_below(low: float, high: float) -> Range:
    """From ``low`` to ``high``, without ``high`` itself."""
    return Range(f"from {low} to below {high}", lambda value: low <= value < high)


def from_above(low: float, high: float) -> Range:
    """More than ``low``, up to ``high``."""
    return Range(f"above {low} and at most {high}", lambda value: low < value <= high)


SHARE = within(0, 1)
PATIENCE = from_above(0, 604_800)  # seconds, a week at most: what waits cannot count to just any number
SAMPLES = within(1, 4096)  # of a RoIAlign bin and axis; ops.roi_align refuses more


def check_fields(section: Any, name: str, **ranges: Range) -> None:
    """Check every field of a dataclass object against its annotation, and the named ones against a range.

    section: the object; whole numbers given for floats, and lists for tuples, are converted in place.
    name: how the section is called in options, as in ``train``; empty for the root.
    ranges: a range for each field that has one; it holds for every element of a tuple.
    Raises TypeError or ValueError such as ``optim.ema_momentum=1.2: must be from 0 to 1``.
    """
    for field, kind in field_types(type(section)).items():
        option = f"{name}.{field}" if name else field
        value = _converted(option, getattr(section, field), kind)
        setattr(section, field, value)
        if field in ranges:
            for number in value if isinstance(value, tuple) else (value,):
                if not ranges[field].allows(number):
                    raise refusal(option, value, f"must be {ranges[field].words}")


def refusal(option: str, value: object, reason: str) -> ValueError:
    """The error for one option: ``option=value: reason``."""
    shown = list(value) if isinstance(value, tuple) else value
    return ValueError(f"{option}={shown}: {reason}")


def field_types(cls: type) -> dict[str, Any]:
    """Name and type of every field of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def in_words(kind: Any) -> str:
    """What a value of this type is, for a reader who knows no Python."""
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        if items[1:] == (...,):
            return "a list of numbers, such as [1, 2]"
        return f"a list of {len(items)} numbers, such as [{', '.join(['0.5'] * len(items))}]"
    return _WORDS.get(kind, f"a {getattr(kind, '__name__', kind)}")


def _converted(option: str, value: Any, kind: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        if isinstance(value, typing.cast(type, kind)):
            return value
        raise TypeError(f"{option}={value!r}: must be {in_words(kind)}")
    if typing.get_origin(kind) is typing.Literal:
        if value not in typing.get_args(kind):
            raise refusal(option, value, f"must be {in_words(kind)}")
        return value
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        if items[1:] == (...,) and isinstance(value, (list, tuple)) and value:
            items = items[:1] * len(value)
        if not isinstance(value, (list, tuple)) or len(value) != len(items):
            raise TypeError(f"{option}={value!r}: must be {in_words(kind)}")
        return tuple(_converted(option, item, item_kind) for item, item_kind in zip(value, items, strict=True))
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise TypeError(f"{option}={value!r}: must be {in_words(kind)}")
    if kind is float and not math.isfinite(value):
        raise refusal(option, value, "must be finite")
    return value
