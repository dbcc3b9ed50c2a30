"""YAML of options as data: read under limits, since a file may come from anywhere, and written in one style."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import yaml

from scrl_fast.errors import UsageError, irregular_kind

MAX_BYTES = 1 << 18
"""Largest file of options; one with every option has 4 kB."""
MAX_DEPTH = 16
"""Deepest nesting of a file of options; ours has 3 levels."""
MAX_VALUES = 10_000
"""Most values of a file of options, with every alias counted as often as it is used."""
MAX_DIGITS = 40
"""Longest whole number."""


def read_yaml(path: Path) -> Any:
    """The document in a YAML file.

    Raises UsageError naming the file, and the line where one is known, for what is no YAML, no regular file or beyond
    the limits above; FileNotFoundError and other errors of opening.
    """
    return parse_yaml(read_text(path), str(path))


def parse_yaml(text: str, origin: str) -> Any:
    """The document of a YAML text. origin: names it in errors. Raises UsageError as `read_yaml` does."""
    try:
        _check_events(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count_values(node, {}, ())
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{origin}{line}: {error.problem or error.context}") from error
    except UsageError as error:
        raise UsageError(f"{origin}: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{origin} is not YAML: {shortened(error)}") from error
    except Exception as error:  # a tag whose text does not fit, such as !!bool 7 or a 40th of May
        raise UsageError(f"{origin}: a value that YAML cannot read: {shortened(error)}") from error


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """The text of a small regular file, without a byte order mark.

    Raises UsageError naming the file when it is something else, too large or no UTF-8; OSError when it cannot be read.
    """
    _check_regular(path, os.stat(path).st_mode)  # before it is opened: opening a device can have effects
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    with open(handle, "rb") as file:
        found = os.fstat(handle)
        _check_regular(path, found.st_mode)
        data = file.read(limit + 1) or b""  # None: a file of the kernel with nothing to say yet
    if len(data) > limit:
        size = max(found.st_size, len(data))
        raise UsageError(f"{path}: {size} bytes are too many for a file of options, at most {limit}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not YAML: no UTF-8 text from byte {error.start} on") from error


def dump(options: dict[str, Any]) -> str:
    """YAML of nested options, in their order, one a line."""
    return yaml.dump(options, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=120, allow_unicode=True)


def as_yaml(value: Any) -> str:
    """One value on one line, as YAML and the command line take it."""
    if isinstance(value, str):
        return value
    return yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=1000).strip().removesuffix("\n...")


def is_small(value: Any) -> bool:
    """Whether a value is within the limits of a file of options: one out of a checkpoint may be anything."""
    rest, count = [(value, 0)], 0
    while rest:
        found, depth = rest.pop()
        count += 1
        if count > MAX_VALUES or depth > MAX_DEPTH or (isinstance(found, int) and found.bit_length() > 4 * MAX_DIGITS):
            return False
        if isinstance(found, dict):
            found = [part for pair in found.items() for part in pair]
        if isinstance(found, (list, tuple, set, frozenset)):
            rest += [(part, depth + 1) for part in found]
    return True


def shortened(value: object, limit: int = 120) -> str:
    """The text of a value on one line, its middle left out where it is long."""
    text = " ".join(str(value).split())
    return text if len(text) <= limit else f"{text[: limit - 20]} ... {text[-15:]}"


def _check_regular(path: Path, mode: int) -> None:
    kind = irregular_kind(mode)
    if kind and not stat.S_ISDIR(mode):  # opening a folder has a message of its own
        raise UsageError(f"{path} is {kind}, not a file")


def _check_events(text: str) -> None:
    """Depth and number of values, before anything is built of them."""
    depth = values = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        values += isinstance(event, yaml.NodeEvent)
        if depth > MAX_DEPTH:
            raise UsageError(f"nested more than {MAX_DEPTH} deep in line {event.start_mark.line + 1}")
        if values > MAX_VALUES:
            raise UsageError(f"more than {MAX_VALUES} values")


def _count_values(node: yaml.Node, known: dict[int, int], above: tuple[int, ...]) -> int:
    """The values in a node, those of an alias in every place of it."""
    if id(node) in above:
        raise UsageError(f"an alias in line {node.start_mark.line + 1} names what it lies in")
    if len(above) > MAX_DEPTH:
        raise UsageError(f"aliases nested more than {MAX_DEPTH} deep")
    if id(node) not in known:
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        known[id(node)] = 1 + sum(_count_values(part, known, (*above, id(node))) for part in inner)
    if known[id(node)] > MAX_VALUES:
        raise UsageError(f"its aliases stand for more than {MAX_VALUES} values")
    return known[id(node)]


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, and numbers that would take long to read or to show."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"'{shortened(key.value)}' stands twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MAX_DIGITS:
            problem = f"a number of {len(node.value)} digits"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


class _Dumper(yaml.SafeDumper):
    """Blocks for sections, ``[a, b]`` for lists."""


def _flow_list(dumper: yaml.SafeDumper, value: Any) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)


_Dumper.add_representer(list, _flow_list)
_Dumper.add_representer(tuple, _flow_list)
