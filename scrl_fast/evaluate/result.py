"""What every evaluation task takes besides its options, and what it returns."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from scrl_fast.distributed.world import World
from scrl_fast.evaluate.batches import Say, silent


@dataclass(frozen=True)
class TaskContext:
    """Where a task's lines go, and the processes that share its work."""

    say: Say = silent
    world: World = field(default_factory=World)

    @property
    def only_helps(self) -> bool:
        """Whether this process extracts features for rank 0, which alone goes on with them."""
        return self.world.rank > 0


@dataclass(frozen=True)
class TaskResult:
    """One line for people, and the numbers for ``--json``."""

    line: str
    values: dict[str, Any]


NO_RESULT = TaskResult("", {})
"""What a task returns in ranks above 0."""


def save_plot(path: str, draw: Callable[[str], bool], say: Say) -> None:
    """Draw to ``path``, and say where the picture is or why there is none."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    replaced = " (in place of the file that was there)" if os.path.exists(path) else ""
    if draw(path):
        say(f"drawn: {path}{replaced}")
    else:
        say("matplotlib is not installed: no picture (pip install matplotlib brings it)")
