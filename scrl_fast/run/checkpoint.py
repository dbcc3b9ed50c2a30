"""Checkpoints that a crash, a full disk or a flipped bit cannot turn into a silent loss.

A file appears under its final name only when it is whole on disk (`scrl_fast.run.atomic_files`), and a ``.sha256`` file
beside it tells later whether it still is. Loading never runs code from the file (``weights_only=True``).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch

from scrl_fast.errors import UsageError
from scrl_fast.run import atomic_files as durable

CHECKPOINT_KEYS = ("model", "optimizer", "step", "epoch", "config", "rng", "loader", "version")
"""What a training checkpoint holds."""

_STEP_FILE = re.compile(r"step_(\d{8,})\.pt")
_PLAIN = (str, bytes, bool, int, float, complex, type(None), torch.Size, torch.dtype, torch.device)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(UsageError):
    """A checkpoint that is missing, damaged, or not what was asked for."""


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; the ones before it are as they were."""


class CheckpointManager:
    """Writes and finds the checkpoints of one run.

    folder: made when the first checkpoint is written.
    keep: how many step files stay, the newest ones; at least 2, since with one a fault in the newest file loses the
        run. ``best.pt`` stays beside them.
    Files: ``step_NNNNNNNN.pt``, and ``last.pt`` and ``best.pt``, which are hard links to step files (copies where the
    file system has none): no symbolic link that breaks when the run folder moves, no second write of the same bytes.
    Only one process may write to a folder.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2) -> None:
        if keep < 2:
            raise ValueError(f"keep={keep} checkpoints: at least 2, since the newest may be damaged")
        self.folder = Path(folder)
        self.keep = keep

    def save(self, state: dict[str, Any], step: int, best: bool = False) -> Path:
        """Write ``state`` as the checkpoint of ``step``; return the path of ``step_NNNNNNNN.pt``.

        state: nested dict, list, tuple, set of tensors, numbers, strings, bytes and None. Anything else would not
            survive a safe load, so it is a TypeError here, with the place named, before anything is written.
        best: also make it ``best.pt``.
        Raises CheckpointWriteError when the disk is full or refuses; the checkpoints before it are untouched.
        """
        if step < 0:
            raise ValueError(f"step={step}: must not be negative")
        _check_plain(state)
        path = self.folder / f"step_{step:08d}.pt"
        temporary = durable.temporary_name(path)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep_temporaries()
            digest = durable.write_synced(temporary, lambda file: torch.save(state, cast(IO[bytes], file)))
            durable.publish(temporary, path, digest)
            for name in ("last.pt", "best.pt") if best else ("last.pt",):
                durable.link_or_copy(path, temporary)
                durable.publish(temporary, self.folder / name, digest)
        except OSError as error:
            self._sweep_temporaries()
            raise _write_error(path, state, error) from error
        self._prune()
        return path

    def newest_good(self) -> Path | None:
        """The newest checkpoint that is whole; None when the folder holds none at all.

        Each damaged one on the way is named in a warning. Raises CheckpointError when there are checkpoints and all
        of them are damaged: to start again from nothing is for the user to decide.
        """
        candidates = self._candidates()
        for path in candidates:
            try:
                verify(path)
                return path
            except CheckpointError as error:
                warnings.warn(f"{error}; trying the one before", RuntimeWarning, stacklevel=2)
        if candidates:
            raise CheckpointError(f"{self.folder}: all {len(candidates)} checkpoints are damaged")
        return None

    def holds(self, path: str | os.PathLike[str]) -> bool:
        """Whether a checkpoint is one of this run and not another's."""
        return Path(path).resolve().parent == self.folder.resolve()

    def _candidates(self) -> list[Path]:
        """Newest first, each file once: the newest step, last.pt, the older steps, best.pt."""
        steps = [path for _, path in sorted(self._steps(), reverse=True)]
        order = [*steps[:1], self.folder / "last.pt", *steps[1:], self.folder / "best.pt"]
        seen: set[tuple[int, int]] = set()
        result = []
        for path in order:
            if path.is_file():
                status = path.stat()
                if (status.st_dev, status.st_ino) not in seen:
                    seen.add((status.st_dev, status.st_ino))
                    result.append(path)
        return result

    def _steps(self) -> Iterator[tuple[int, Path]]:
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if match := _STEP_FILE.fullmatch(path.name):
                    yield int(match[1]), path

    def _prune(self) -> None:
        for _, path in sorted(self._steps(), reverse=True)[self.keep :]:
            path.unlink(missing_ok=True)
            durable.sidecar_of(path).unlink(missing_ok=True)

    def _sweep_temporaries(self) -> None:
        """Remove what a full disk, or an earlier process that was killed while writing, left behind."""
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)


def find(path: str | os.PathLike[str]) -> Path:
    """The checkpoint file that ``path`` means: a file itself, or the newest good one of a run folder.

    Raises CheckpointError naming the folder when it holds none.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for folder in (path / "checkpoints", path):
        found = CheckpointManager(folder).newest_good()
        if found is not None:
            return found
    raise CheckpointError(f"no checkpoint in {path}: expected {path / 'checkpoints' / 'last.pt'} or step_*.pt there")


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
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    expected = durable.expected_digest(path)
    if expected is None:
        _check_without_digest(path)
        if not quiet:
            warnings.warn(
                f"{path} has no .sha256 beside it: checked by its zip checksums", RuntimeWarning, stacklevel=3
            )
    elif durable.digest_of(path) != expected:
        raise CheckpointError(f"{path} is damaged: its content does not match {durable.sidecar_of(path).name}")


def _check_without_digest(path: Path) -> None:
    """The zip container keeps a CRC-32 of each tensor, which torch writes but does not compare when it loads."""
    if not zipfile.is_zipfile(path):
        _read(path)  # torch's older format, or no checkpoint at all: only torch can tell
        return
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if broken is not None:
        raise CheckpointError(f"{path} is damaged: checksum of {broken}")


def _read(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types here; each means that the file is not ours
        if "weights_only" in str(error):
            reason = "it holds objects other than tensors and plain values, and unpickling those could run code"
        else:
            reason = (
                f"damaged or no checkpoint ({str(error).strip().partition(chr(10))[0][:120] or type(error).__name__})"
            )
        raise CheckpointError(f"cannot load {path}: {reason}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"cannot load {path}: it holds a {type(state).__name__}, not a dict")
    return state


def _check_plain(value: Any, place: str = "state") -> None:
    kind = type(value)  # exact types: numpy.float64 is a float to isinstance, and refused by a safe load
    if kind in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"{place}, key {key!r},")
            _check_plain(item, f"{place}[{key!r}]")
    elif kind in (list, tuple, set):
        for index, item in enumerate(value):
            _check_plain(item, f"{place}[{index}]")
    elif kind not in _PLAIN and not isinstance(value, torch.Tensor):
        name = f"{kind.__module__}.{kind.__qualname__}"
        raise TypeError(f"{place} is a {name}; a checkpoint holds tensors, numbers, strings, bytes and containers")


def _write_error(path: Path, state: dict[str, Any], error: OSError) -> CheckpointWriteError:
    reason = error.strerror or str(error)
    if error.errno in _NO_SPACE:
        folder = next(parent for parent in path.parents if parent.exists())
        free = shutil.disk_usage(folder).free
        reason += f" (disk full? {free} bytes free, about {_size(state)} needed)"
    return CheckpointWriteError(f"cannot write {path}: {reason}; the checkpoints before it are untouched")


def _size(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_size, value))
    return 0
