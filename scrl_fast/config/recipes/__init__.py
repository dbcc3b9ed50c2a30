"""Recipes: named sets of options, each a YAML file in this folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scrl_fast.config.schema import Config

FOLDER = Path(__file__).parent
DEFAULT = "demo"


def names() -> tuple[str, ...]:
    """The recipes' names, as ``--config`` takes them."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def load_recipe(name: str) -> Config:
    """Config of a recipe by name (``demo``, ``scrl_200ep``, ...) or of a YAML file by path.

    Raises UsageError naming the nearest recipe when there is neither.
    """
    from scrl_fast.config.schema import Config

    return Config.from_yaml(name)
