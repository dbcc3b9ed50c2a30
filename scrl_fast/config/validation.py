"""Checks of option values: types from the annotations, ranges beside them, errors that name the option."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from scrl_fast.config.defaults import MAX_SAMPLES
from scrl_fast.errors import UsageError

Options = TypeVar("Options")


class OptionTypeError(UsageError, TypeError):
    """An option's value has the wrong type."""


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}
_EXAMPLES = {int: ("1", "2", "3"), float: ("0.5", "1.0", "0.25"), str: ("a", "b", "c")}


@dataclasses.dataclass(frozen=True)
class Range:
    """A set of numbers and its description in words."""

    description: str
    contains: Callable[[Any], bool]


def at_least(low: float) -> Range:
    """``low`` and more."""
    return Range(f"at least {low}", lambda value: value >= low)


def or_auto(allowed: Range) -> Range:
    """``auto`` or what ``allowed`` takes."""
    return Range(f"auto or {allowed.description}", lambda value: value == "auto" or allowed.contains(value))


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


def between(low: float, high: float) -> Range:
    """Above ``low`` and below ``high``."""
    return Range(f"above {low} and below {high}", lambda value: low < value < high)


FRACTION_RANGE = within(0, 1)
TIMEOUT_RANGE = from_above(0, 604_800)  # seconds, at most a week: timers of the system do not take any number
SAMPLES_RANGE = Range(
    f"from 1 to {MAX_SAMPLES}, or -1 (adapts)", lambda value: value == -1 or 1 <= value <= MAX_SAMPLES
)
_LARGEST = 2**63 - 1
SEED_RANGE = within(0, _LARGEST)


def check_fields(section: Any, name: str, **ranges: Range) -> None:
    """Check every field of a dataclass object against its annotation, and the named ones against a range.

    section: the object; whole numbers given for floats, and lists for tuples, are converted in place.
    name: the section's name in options, such as ``train``; empty for the root.
    ranges: a range for each field that has one; it holds for every element of a tuple.
    Raises UsageError such as ``optim.ema_momentum=1.2: must be from 0 to 1``; for a wrong type OptionTypeError.
    """
    for field, kind in field_types(type(section)).items():
        option = f"{name}.{field}" if name else field
        value = _converted(option, getattr(section, field), kind)
        setattr(section, field, value)
        if field in ranges:
            for number in value if isinstance(value, tuple) else (value,):
                if not ranges[field].contains(number):
                    raise option_error(option, value, f"must be {ranges[field].description}")


def validated(options: Options) -> Options:
    """A checked copy of a dataclass of options, sections included.

    For options that may have been changed since they were made: attributes are not checked when they are set.
    Raises UsageError as `check_fields` does.
    """
    if not dataclasses.is_dataclass(options) or isinstance(options, type):
        raise OptionTypeError(f"config={options!r}: must be an object such as scrl_fast.Config()")
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    sections = {name: validated(value) for name, value in values.items() if _is_section(value)}
    return typing.cast(Options, type(options)(**(values | sections)))


def to_plain(options: Any) -> dict[str, Any]:
    """Nested dict of a dataclass of options, tuples as lists: what YAML, JSON and a checkpoint can hold."""
    return {name: _plain(value) for name, value in dataclasses.asdict(options).items()}


def clean_paths(section: Any, *names: str) -> None:
    """Put these options of a section, which are paths, as `clean_path` makes them."""
    for name in names:
        setattr(section, name, clean_path(getattr(section, name)))


def clean_path(path: str) -> str:
    """A path as a shell hands it over: no quotes or blanks around it, no slash at its end, ``~`` and ``$NAME`` known.

    A shell expands ``~`` in ``--init ~/x`` but neither in ``--init=~/x`` nor in a YAML file. A variable is resolved at
    the start of a path only, since a name may hold a dollar sign.
    """
    path = path.strip()
    if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
        path = path[1:-1]
    path = os.path.expanduser(os.path.expandvars(path) if path.startswith("$") else path)
    return path.rstrip("/") or path[:1]


def split_places(places: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Cleaned paths: a text with commas is several, unless a file of that name is there; one alone is a text.

    Commas within braces, as in the pattern ``train-{a,b}.tar``, belong to the path.
    """
    if isinstance(places, str):
        alone = clean_path(places)
        places = (alone,) if os.path.exists(alone) else tuple(re.split(r",(?![^{}]*\})", alone))
    cleaned = tuple(filter(None, map(clean_path, places)))
    return cleaned if len(cleaned) > 1 else "".join(cleaned)


def check_device(option: str, device: str) -> None:
    """Raise UsageError for what is no name of a device."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", device):
        raise option_error(option, device, "must be auto, cpu, cuda or cuda:N")


def check_writable(option: str, path: str) -> None:
    """Raise UsageError for a file that cannot be written where it is to be: found before the work, not after it.

    Folders that are missing are made when it is written.
    """
    if not path:
        return
    if os.path.isdir(path):
        raise option_error(option, path, "is a folder; give the name of a file in it")
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise option_error(option, path, f"{folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise option_error(option, path, f"the folder {folder} cannot be written to")


def check_distinct(option: str, values: tuple[Any, ...]) -> None:
    """Raise UsageError for a list that is empty, holds a value twice, or an empty name."""
    if not values:
        raise option_error(option, values, "must name at least one")
    if len(set(values)) < len(values):
        raise option_error(option, values, "must not hold a value twice")
    if "" in values:
        raise option_error(option, values, "must not hold an empty name")


def option_error(option: str, value: object, reason: str) -> UsageError:
    """The error for one option: ``option=value: reason``."""
    shown = list(value) if isinstance(value, tuple) else value
    return UsageError(f"{option}={shown}: {reason}")


def field_types(cls: type) -> dict[str, Any]:
    """Name and type of every field of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def type_description(kind: Any) -> str:
    """The values of a type in plain words, with an example of that type for a list."""
    words, kind = _words_and_type(kind)
    if words:
        return f"{type_description(kind)} or {' or '.join(words)}"
    if isinstance(kind, types.UnionType):
        return ", or ".join(map(type_description, typing.get_args(kind)))
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        any_length = items[1:] == (...,)
        count = "" if any_length else f"{len(items)} "
        example = ", ".join((_EXAMPLES[items[0]] * len(items))[: len(items)])
        return f"a list of {count}{_PLURALS[items[0]]}, such as [{example}]"
    return _NAMES.get(kind, f"a {getattr(kind, '__name__', kind)}")


def _words_and_type(kind: Any) -> tuple[tuple[str, ...], Any]:
    """The words of a ``Literal`` and the other type of their union: ``int | Literal["auto"]``; no words elsewhere."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return (), kind
    words = next((part for part in typing.get_args(kind) if typing.get_origin(part) is typing.Literal), None)
    if words is None:
        return (), kind
    return typing.get_args(words), next(part for part in typing.get_args(kind) if part is not words)


def _is_section(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _wrong_type(option: str, value: Any, kind: Any) -> OptionTypeError:
    return OptionTypeError(f"{option}={value!r}: must be {type_description(kind)}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _converted(option: str, value: Any, kind: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        if isinstance(value, typing.cast(type, kind)):
            return value
        raise _wrong_type(option, value, kind)
    if type(value) is int and abs(value) > _LARGEST:
        raise UsageError(f"{option}: is a whole number of {value.bit_length()} bits, must be at most {_LARGEST}")
    words, other = _words_and_type(kind)
    if words:
        if value in words or type(value) is other:
            return value
        raise _wrong_type(option, value, kind)
    if isinstance(kind, types.UnionType):
        for choice in typing.get_args(kind):
            with contextlib.suppress(OptionTypeError):
                return _converted(option, value, choice)
        raise _wrong_type(option, value, kind)
    if typing.get_origin(kind) is typing.Literal:
        if value not in typing.get_args(kind):
            raise option_error(option, value, f"must be {type_description(kind)}")
        return value
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        if items[1:] == (...,) and isinstance(value, (list, tuple)) and (value or items[0] is str):
            items = items[:1] * len(value)  # each number is tried, so there is one; names may be left out
        if not isinstance(value, (list, tuple)) or len(value) != len(items):
            raise _wrong_type(option, value, kind)
        return tuple(_converted(option, item, item_kind) for item, item_kind in zip(value, items, strict=True))
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise _wrong_type(option, value, kind)
    if kind is float and not math.isfinite(value):
        raise option_error(option, value, "must be finite")
    return value
