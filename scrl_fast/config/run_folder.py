"""The names of the files in a run folder, and which run folder a path lies in."""

from __future__ import annotations

import os
import re
from pathlib import Path

CHECKPOINTS = "checkpoints"
LAST, BEST = "last.pt", "best.pt"
CONFIG = "config.yaml"
METRICS, LOG, ENVIRONMENT = "metrics.jsonl", "log.txt", "env.json"
BOXES, CURVES = "boxes.png", "curves.png"
RUN_FILES = (METRICS, LOG, CONFIG, ENVIRONMENT, CURVES, BOXES)
_STEP_FILE = re.compile(r"step_(\d{8,})\.pt")


def step_path(folder: Path, step: int) -> Path:
    """The file of a step's checkpoint; `step_in_name` reads its name."""
    return folder / f"step_{step:08d}.pt"


def step_in_name(path: Path) -> int:
    """The step that the name of a checkpoint says; -1 for another name."""
    match = _STEP_FILE.fullmatch(path.name)
    return int(match[1]) if match else -1


def is_step_file(path: Path) -> bool:
    """Whether a path is named as a step's checkpoint."""
    return _STEP_FILE.fullmatch(path.name) is not None


def folder_of(path: str | os.PathLike[str]) -> Path | None:
    """The run folder that a path names or lies in: the folder itself, its config, its checkpoints or one of them.

    None for what lies outside any run, such as a checkpoint that was copied away, also into a folder ``checkpoints``.
    """
    path = Path(path)
    if path.is_dir():
        return path if path.name != CHECKPOINTS else path.parent if is_run(path.parent) else None
    if path.name == CONFIG:
        return path.parent if (path.parent / CHECKPOINTS).is_dir() else None
    return path.parent.parent if path.parent.name == CHECKPOINTS and is_run(path.parent.parent) else None


def is_run(folder: Path) -> bool:
    """Whether a run has written its options or its metrics into the folder."""
    return any((folder / name).is_file() for name in (CONFIG, METRICS))


def moved_to(config_file: str, named: str) -> str:
    """The folder of a run whose own config file still names another folder, ``named``; '' where nothing has moved."""
    folder = folder_of(config_file) if Path(config_file).name == CONFIG else None
    if folder is None or (Path(named).exists() and folder.samefile(named)):
        return ""
    return str(folder)
