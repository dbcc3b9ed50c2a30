"""Which run a command line goes on with: its folder and its options. Nothing here imports torch until it must."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"


def folder_of(path: str | os.PathLike[str]) -> Path | None:
    """The run folder that a path names or lies in: the folder itself, its config, its checkpoints or one of them.

    None for a file outside any run, such as a checkpoint that was copied away.
    """
    path = Path(path)
    if path.is_dir():
        return path.parent if path.name == CHECKPOINTS else path
    if path.name == CONFIG:
        return path.parent if (path.parent / CHECKPOINTS).is_dir() else None
    return path.parent.parent if path.parent.name == CHECKPOINTS else None


def value_of(tokens: Sequence[str], option: str) -> str:
    """What ``--option=value`` or ``--option value`` last gave among the tokens; '' without one."""
    value = ""
    for k, token in enumerate(tokens):
        if token.startswith(f"--{option}="):
            value = token.partition("=")[2]
        elif token == f"--{option}" and k + 1 < len(tokens):
            value = tokens[k + 1]
    return value


def own_options(resume: str, run_dir: str) -> tuple[dict[str, Any] | Path | None, str]:
    """(the options of the run that ``resume`` goes on with: the path of their YAML or a dict; where they are from).

    They are the base of a resumed run for which no ``--config`` was given: the demo's would make another run of it.
    None where no run can be told.
    """
    folder = folder_of(resume) if resume not in ("", "auto") else Path(run_dir) if resume and run_dir else None
    if folder is not None and (folder / CONFIG).is_file():
        return folder / CONFIG, str(folder / CONFIG)
    if resume not in ("", "auto") and Path(resume).is_file():
        from scrl_fast.run import checkpoint  # torch

        return checkpoint.load(resume, expect=checkpoint.CHECKPOINT_KEYS)["config"], resume
    return None, ""


def moved_to(config_file: str, named: str) -> str:
    """Where a run lies whose own config file still names another folder, ``named``; '' where nothing has moved."""
    folder = folder_of(config_file) if Path(config_file).name == CONFIG else None
    if folder is None or (Path(named).exists() and folder.samefile(named)):
        return ""
    return str(folder)
