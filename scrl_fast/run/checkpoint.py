"""Checkpoints that a crash, a full disk or a flipped bit cannot turn into a silent loss.

A file appears under its final name only when it is whole on disk (`scrl_fast.atomic_files`), and a ``.sha256`` file
beside it tells later whether it still is. `scrl_fast.weights.checkpoint_files` reads them.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch

from scrl_fast import atomic_files
from scrl_fast.config.run_folder import BEST, LAST, is_step_file, step_in_name, step_path
from scrl_fast.errors import UsageError
from scrl_fast.models import SCRL
from scrl_fast.weights.checkpoint_files import (
    CHECKPOINT_KEYS,
    CheckpointError,
    find,
    load,
    newest_good,
    step_files,
    verify,
)
from scrl_fast.weights.tensor_values import check_values
from scrl_fast.weights.training_state import check_training_state

__all__ = [
    "CHECKPOINT_KEYS",
    "CheckpointError",
    "CheckpointManager",
    "CheckpointWriteError",
    "find",
    "load",
    "load_training_state",
    "newest_good",
    "verify",
]

_PLAIN = (str, bytes, bool, int, float, complex, type(None), torch.Size, torch.dtype, torch.device)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        path = step_path(self.folder, step)
        temporary = atomic_files.temporary_name(path)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep_temporaries()
            digest = atomic_files.write_synced(temporary, lambda file: torch.save(state, cast(IO[bytes], file)))
            atomic_files.publish(temporary, path, digest)
            for name in (LAST, BEST) if best else (LAST,):
                atomic_files.link_or_copy(path, temporary)
                atomic_files.publish(temporary, self.folder / name, digest)
        except OSError as error:
            self._sweep_temporaries()
            raise _write_error(path, state, error) from error
        self._prune()
        return path

    def newest_good(self) -> Path | None:
        """`scrl_fast.weights.checkpoint_files.newest_good` of this run's folder."""
        return newest_good(self.folder)

    def check_room(self, state: dict[str, Any], groups: Sequence[dict[str, Any]], files: int) -> None:
        """Raises UsageError unless the disk reports room for ``files`` checkpoints of this size.

        state: what one checkpoint holds. groups: those of the optimizer, whose parameters get momentum.
        """
        size = _size(state)
        if not state["optimizer"].get("state"):  # before the first step: momentum comes
            size += sum(_size(group["params"]) * _averages(group) for group in groups)
        folder, needed = existing(self.folder), files * size
        disk = shutil.disk_usage(folder)
        if disk.free < needed and disk.total:  # some file systems tell nothing
            raise UsageError(
                f"{folder}: {disk.free} bytes are free, and the checkpoints of this run need {needed}: make room, or "
                "choose another folder with --run.dir"
            )

    def holds(self, path: str | os.PathLike[str]) -> bool:
        """Whether a checkpoint is one of this run and not another's."""
        return Path(path).resolve().parent == self.folder.resolve()

    def _prune(self) -> None:
        for path in step_files(self.folder)[self.keep :]:
            if path.is_dir():  # nothing that a run wrote
                continue
            path.unlink(missing_ok=True)
            atomic_files.sidecar_of(path).unlink(missing_ok=True)

    def _sweep_temporaries(self) -> None:
        """Remove what a full disk, or an earlier process that was killed while writing, left behind."""
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)


def load_training_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state in a training checkpoint, once its structure is that of one.

    Raises CheckpointError naming the file and the part.
    """
    path = find(path)
    state = load(path, expect=CHECKPOINT_KEYS)
    check_training_state(path, state)
    if is_step_file(path) and step_in_name(path) != state["step"]:
        raise CheckpointError(
            f"{path} holds step {state['step']}, not what its name says: an older file must have come back under the "
            "newest name. Remove it to go on from the checkpoint before"
        )
    return state


@contextmanager
def loading(part: str) -> Iterator[None]:
    """Turns an error of the block, which puts a part of a checkpoint to use, into a CheckpointError that names it."""
    try:
        yield
    except UsageError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, OverflowError) as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(f"the checkpoint's {part} cannot be used ({cause})") from error


def load_networks(model: SCRL, state: Mapping[str, Any]) -> None:
    """Networks of a run from a checkpoint.

    Raises UsageError naming the part and the tensor that is missing, of another shape, no floats, or not finite.
    """
    for part, own in model.state().items():
        if own is not None and isinstance(state.get(part), Mapping):
            check_values(f"checkpoint part {part!r}", state[part], own)
    model.load_state(dict(state))


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any], step: int) -> None:
    """Momentum and the like from a checkpoint; rates and other options of the groups stay as they are.

    step: updates made before the checkpoint.
    Raises CheckpointError where there is no momentum, though the optimizer has some from its first step on, and where a
    tensor, or whatever stands for momentum, does not have the shape of its parameter.
    """
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
    if step and not optimizer.state and any(group.get("momentum") for group in optimizer.param_groups):
        raise CheckpointError("the checkpoint's optimizer cannot be used (it holds no momentum)")
    for parameter, buffers in optimizer.state.items():
        for name, value in buffers.items():
            shape = value.shape if isinstance(value, torch.Tensor) else None
            if (shape or name == "momentum_buffer") and shape != parameter.shape:
                found = type(value).__name__ if shape is None else list(shape)
                shapes = f"{found} for a parameter of {list(parameter.shape)}"
                raise CheckpointError(f"the checkpoint's optimizer cannot be used ({name} is {shapes})")


def _averages(group: dict[str, Any]) -> int:
    """Tensors of a parameter's size that the optimizer keeps for each parameter of a group."""
    return 2 if "betas" in group and group["adapt"] else int(bool(group.get("momentum", True)))


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
        free = shutil.disk_usage(existing(path.parent)).free
        reason += f" (disk full? {free} bytes free, about {_size(state)} needed)"
    return CheckpointWriteError(f"cannot write {path}: {reason}; the checkpoints before it are untouched")


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _size(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_size, value))
    return 0
