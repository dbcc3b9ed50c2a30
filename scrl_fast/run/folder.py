"""Which folder a run has, and that it can be written to; decided once for all processes and restarts."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from scrl_fast.config.backbones import is_zoo
from scrl_fast.config.run_folder import (
    CHECKPOINTS,
    CURVES,
    METRICS,
    RUN_FILES,
    folder_of,
    is_run,
    is_step_file,
    step_in_name,
)
from scrl_fast.distributed.rendezvous import get_or_set_in_store
from scrl_fast.distributed.world import World
from scrl_fast.errors import UsageError
from scrl_fast.run.lock import hold_folder, release_folder

Options = TypeVar("Options", bound=Any)
WRITTEN = (*RUN_FILES, f"{METRICS}.damaged", "bad_files*.jsonl", "reading*.txt", f"{Path(CURVES).stem}.tmp", ".*.tmp")
"""Names and patterns of the files that a run writes into its folder."""
RESTART_PATIENCE = 60.0  # seconds after a restart by torchrun in which the process before this one may still end


def choose_folder(config: Any, kind: str, known: Sequence[str] = ("random",)) -> str:
    """``run.dir``; without one, the folder of the run that ``resume`` points into, or a new one under ``runs/``.

    config: has ``run``, ``resume`` and ``init``. kind: first words of a new folder's name. known: what ``init`` may be
    beside a path and the weights of a zoo.
    Raises UsageError for ``resume=auto`` without ``run.dir``, and for a checkpoint that is not there.
    """
    for option in ("resume", "init"):
        path = getattr(config, option)
        if option == "init" and config.resume and (config.resume != "auto" or newest_checkpoint(config.run.dir)):
            continue  # not read where there is a checkpoint to go on from, and perhaps gone by now
        if option == "init" and is_zoo(path):
            continue
        if path not in ("", *(known if option == "init" else ("auto",))) and not os.path.exists(path):
            raise UsageError(f"{option}={path}: there is no such checkpoint or run folder")
    if config.run.dir:
        return config.run.dir
    if config.resume == "auto":
        raise UsageError("resume=auto continues the run in run.dir, which is empty: name the folder with --run.dir")
    if config.resume and (folder := folder_of(config.resume)):
        return str(folder)
    return f"runs/{kind}-{time.strftime('%Y%m%d-%H%M%S')}"


def place_run(config: Options, world: World, kind: str, known: Sequence[str] = ("random",)) -> Options:
    """The options with the run folder in them, which now exists; process 0 decides for all.

    config, kind, known: as for `choose_folder`.
    After a restart by ``torchrun --max-restarts`` it is the folder of the first attempt, to be resumed as soon as an
    attempt has saved a checkpoint; until then every attempt begins, or is refused, as the first one.
    Raises UsageError as `choose_folder` and `prepare_folder` do.
    """

    def begin() -> str:
        folder = choose_folder(config, kind, known)
        prepare_folder(folder, resume=bool(config.resume))
        return f"{newest_checkpoint(folder)}/{folder}"

    def place() -> tuple[str, str, str]:
        decided, again = get_or_set_in_store("run.dir", begin)
        found, _, folder = decided.partition("/")
        if again:
            prepare_folder(folder, resume=True, patience=RESTART_PATIENCE)
            if newest_checkpoint(folder) != found:
                return folder, "auto", ""
        return folder, config.resume, config.init

    folder, resume, init = world.broadcast_from_rank0(place)
    return replace(config, run=replace(config.run, dir=folder), resume=resume, init=init)


def newest_checkpoint(folder: str) -> str:
    """Name and time of the newest checkpoint in a run folder, damaged or not; empty without one or without folder."""
    found = filter(is_step_file, Path(folder, CHECKPOINTS).glob("*.pt")) if folder else ()
    newest = max(found, key=step_in_name, default=None)
    return f"{newest.name} {newest.stat().st_mtime_ns}" if newest else ""


def prepare_folder(path: str | os.PathLike[str], *, resume: bool, patience: float = 0.0) -> Path:
    """Makes the run folder, proves that it can be written to, and takes it for this process, before anything expensive.

    resume: whether this run continues the one that the folder holds; without it a folder that already holds
        checkpoints or metrics is refused, so that no run silently overwrites another.
    patience: seconds to wait for another process that holds the folder.
    Raises UsageError naming ``run.dir`` and the reason.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable-"):
            pass
    except OSError as error:
        raise UsageError(f"run.dir {str(folder)!r} cannot be written to: {error.strerror or error}") from error
    lock = hold_folder(folder, patience)
    try:
        _check_content(folder, resume)
    except UsageError:
        release_folder(lock)
        raise
    return folder


def _check_content(folder: Path, resume: bool) -> None:
    for path in (path for path in sorted(folder.iterdir()) if any(fnmatchcase(path.name, name) for name in WRITTEN)):
        if path.is_symlink():  # what is written would go into another file, outside a folder from elsewhere
            raise UsageError(f"run.dir {str(folder)!r}: {path.name} there is a link: remove it, or copy its file there")
        if not path.is_file():
            raise UsageError(f"run.dir {str(folder)!r}: {path.name} there is no regular file")
    checkpoints = folder / CHECKPOINTS
    if checkpoints.is_symlink() and is_run(checkpoints.resolve().parent):  # a link to a larger disk is none
        raise UsageError(f"run.dir {str(folder)!r}: {CHECKPOINTS} there is a link to those of another run: remove it")
    used = [name for name in (METRICS, CHECKPOINTS) if _holds_something(folder / name)]
    if used and not resume:
        raise UsageError(
            f"run.dir {str(folder)!r} already holds a run ({', '.join(used)}): continue it with --resume=auto, "
            "or choose another folder with --run.dir=NEW"
        )


def _holds_something(path: Path) -> bool:
    """Whether a file has content or a folder files: what failed before its first row and checkpoint was no run yet."""
    return any(path.iterdir()) if path.is_dir() else path.exists() and path.stat().st_size > 0
