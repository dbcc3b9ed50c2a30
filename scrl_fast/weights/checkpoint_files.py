"""Reading checkpoint files: which one a path means, whether it is whole, and what it holds.

No code of a file is run (`scrl_fast.weights.torch_files`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scrl_fast import atomic_files
from scrl_fast.config.run_folder import BEST, CHECKPOINTS, LAST, is_step_file, step_in_name
from scrl_fast.weights.errors import CheckpointError
from scrl_fast.weights.file_kinds import check_regular, other_kind, start_of
from scrl_fast.weights.torch_files import read_torch
from scrl_fast.weights.zip_archive import ArchiveError, ZipArchive, is_zip

CHECKPOINT_KEYS = ("model", "optimizer", "step", "epoch", "config", "rng", "loader", "version")
"""What a training checkpoint holds."""


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint of a folder that is whole; None when the folder holds none at all.

    Each damaged one on the way is named in a warning. Raises CheckpointError when there are checkpoints and all of
    them are damaged: to start again from nothing is for the user to decide.
    """
    candidates = _candidates(folder)
    for path in candidates:
        try:
            verify(path)
            return path
        except CheckpointError as error:
            warnings.warn(f"{error}; trying the one before", RuntimeWarning, stacklevel=3)
    if candidates:
        raise CheckpointError(f"{folder}: all {len(candidates)} checkpoints are damaged")
    return None


def step_files(folder: Path) -> list[Path]:
    """The ``step_NNNNNNNN.pt`` of a folder, newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if is_step_file(path)]
    return sorted(found, key=step_in_name, reverse=True)


def _candidates(folder: Path) -> list[Path]:
    """Newest first, each file once: the newest step, last.pt, the older steps, best.pt."""
    steps = step_files(folder)
    order = [*steps[:1], folder / LAST, *steps[1:], folder / BEST]
    files: dict[tuple[int, int], Path] = {}
    for path in filter(os.path.lexists, order):  # a pipe, a folder or a dead link under such a name is told, too
        status = path.stat() if path.exists() else path.lstat()
        files.setdefault((status.st_dev, status.st_ino), path)
    return list(files.values())


def find(path: str | os.PathLike[str]) -> Path:
    """The checkpoint file that ``path`` means: a file itself, or the newest good one of a run folder.

    Raises CheckpointError naming the folder when it holds none.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for folder in (path / CHECKPOINTS, path):
        found = newest_good(folder)
        if found is not None:
            return found
    raise CheckpointError(f"no checkpoint in {path}: expected {path / CHECKPOINTS / LAST} or step_*.pt there")


def load(path: str | os.PathLike[str], *, expect: Sequence[str] = ()) -> dict[str, Any]:
    """The dict stored in a checkpoint file, all tensors on the CPU; no code of the file is run.

    path: a file, or a run folder, of which the newest good checkpoint is taken.
    expect: keys that must be there, such as `CHECKPOINT_KEYS`. A file without its ``.sha256`` is then read with a
        warning; without ``expect`` silently, since weights from elsewhere have none.
    Raises CheckpointError naming the path when it is missing, damaged or foreign.
    """
    path = find(path)
    verify(path, quiet=not expect)
    state = _read(path)
    missing = [key for key in expect if key not in state]
    if missing:
        held = ", ".join(map(str, list(state)[:8])) or "nothing"
        lacks = ", ".join(missing)
        raise CheckpointError(f"{path} is no training checkpoint of scrl_fast: it lacks {lacks} (it holds {held})")
    return state


def verify(path: str | os.PathLike[str], *, quiet: bool = False) -> None:
    """Raise CheckpointError unless the file is whole, by its ``.sha256`` or, lacking that, its zip checksums.

    quiet: no warning when the ``.sha256`` is absent.
    """
    path = Path(path)
    check_regular(path, "checkpoint", CheckpointError)
    expected = atomic_files.expected_digest(path)
    if expected is None:
        _check_without_digest(path)
        if not quiet:
            warnings.warn(
                f"{path} has no .sha256 beside it: checked by its zip checksums", RuntimeWarning, stacklevel=3
            )
    elif atomic_files.digest_of(path) != expected:
        raise CheckpointError(f"{path} is damaged: its content does not match {atomic_files.sidecar_of(path).name}")


def _check_without_digest(path: Path) -> None:
    """Check each entry's CRC-32, which torch writes; the older format has none and is read instead."""
    start = start_of(path)
    if not is_zip(start):
        _read(path)
        return
    try:
        with ZipArchive(path) as archive:
            archive.check()
    except (ArchiveError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cannot be checked: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    start = start_of(path)
    if kind := other_kind(start):
        raise CheckpointError(f"cannot load {path}: {kind}")
    return read_torch(path, start)
