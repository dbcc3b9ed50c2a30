"""Metadata as text by name, the only kind that safetensors and ONNX hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 32
"""Lists and dicts inside one another."""


_LEFT_OUT = object()


def flattened(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Text by name: values other than text as JSON, and text in quotes where it would be read as JSON."""
    plain = {name for name, value in metadata.items() if isinstance(value, str) and _from_text(value) == value}
    return {name: value if name in plain else json.dumps(value) for name, value in metadata.items()}


def unflattened(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The inverse of `flattened`: JSON numbers, lists, dicts and quoted text are read, any other text stays text."""
    return {name: _from_text(value) for name, value in metadata.items()}


def _from_text(value: str) -> Any:
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, (int, float, list, dict, str)) and not isinstance(found, bool) else value


def plain(value: Any, depth: int = 0) -> Any:
    """The value, from any source, without the items of dicts and lists that JSON cannot hold."""
    if isinstance(value, dict) and depth < MAX_DEPTH:
        kept = {name: plain(item, depth + 1) for name, item in value.items() if type(name) is str}
        return {name: item for name, item in kept.items() if item is not _LEFT_OUT}
    if isinstance(value, (list, tuple)) and depth < MAX_DEPTH:
        return [item for item in (plain(item, depth + 1) for item in value) if item is not _LEFT_OUT]
    return value if value is None or type(value) in (str, int, float, bool) else _LEFT_OUT
