"""What every evaluation task returns, and how it tells where its picture went."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Say = Callable[[str], None]
"""Takes a line for the terminal."""


@dataclass(frozen=True)
class TaskResult:
    """One line for people, and the numbers for ``--json``."""

    line: str
    values: dict[str, Any]


def save_plot(path: str, draw: Callable[[str], bool], say: Say) -> None:
    """Draw to ``path``, and say where the picture is or why there is none."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    if draw(path):
        say(f"drawn: {path}")
    else:
        say("matplotlib is not installed: no picture (pip install matplotlib brings it)")
