"""Which checkpoint a run goes on from, and what has changed since it was written."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scrl_fast.config.run_folder import step_in_name
from scrl_fast.errors import UsageError
from scrl_fast.run import checkpoint

RESUME_SAFE_OPTIONS = (
    *("run.", "eval.", "resume", "init", "json", "data.workers", "data.prefetch", "data.timeout", "data.decode_memory"),
    *("train.max_steps", "train.device", "train.keep_memory", "train.checkpoint_activations"),
)
"""Options that may change between stop and resume without changing what is computed."""


@dataclass(frozen=True)
class Found:
    """The answer to ``resume``.

    newest: the run folder's newest good checkpoint. path: the one to load; None starts from the beginning. own: it is
    one of the run's. notes: damaged checkpoints that were passed over.
    """

    newest: Path | None = None
    path: Path | None = None
    own: bool = False
    notes: tuple[str, ...] = ()


def find_checkpoint(asked: str, checkpoints: checkpoint.CheckpointManager) -> Found:
    """The checkpoint that ``resume=asked`` means. Raises CheckpointError where there is none, or all are damaged."""
    if not asked:
        return Found()
    with warnings.catch_warnings(record=True) as caught:  # names of damaged checkpoints that were passed over
        warnings.simplefilter("always")
        newest = checkpoints.newest_good()
        path = newest if asked == "auto" else checkpoint.find(asked)
    own = path is not None and checkpoints.holds(path)
    return Found(newest, path, own, tuple(str(warning.message) for warning in caught))


def read_checkpoint(found: Found, asked: str, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The state in the checkpoint that was found, and what there is to say about the file.

    Raises CheckpointError for one that is missing, damaged or foreign, UsageError where ``folder`` is ahead of it.
    """
    assert found.path is not None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = checkpoint.load_training_state(found.path)
    if found.newest is not None and step_in_name(found.newest) > state["step"]:
        raise UsageError(
            f"resume={asked}: run.dir {str(folder)!r} holds a newer checkpoint, {found.newest.name}; to "
            "branch off from an older one, give the new run its own --run.dir"
        )
    return state, [str(warning.message) for warning in caught]


def changed_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line where the images are not those of the checkpoint. before, now: counts and a hash of names, or empty."""
    if not before or not now or dict(before) == dict(now):
        return []
    was, count = before.get("images"), now["images"]
    what = f"{count} images, the checkpoint was made with {was}" if was != count else f"{count} images with other names"
    return [f"not the same data any more: {what}; batches, views and the length of an epoch follow the present ones"]


def changed_options(
    before: Mapping[str, Any], after: Mapping[str, Any], besides: tuple[str, ...] = (), *, defaults: Mapping[str, Any]
) -> list[str]:
    """``name old -> new`` for every option that differs and matters.

    defaults: of options that the earlier release did not have yet.
    """
    old, new = {**flatten(defaults), **flatten(before)}, flatten(after)
    names = [name for name in new if not name.startswith(RESUME_SAFE_OPTIONS + besides) and old.get(name) != new[name]]
    return [f"{name} {old.get(name)} -> {new[name]}" for name in names]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as ``{"optim.lr": 0.45, ...}``, lists and tuples alike."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, (list, tuple)) else value
    return flat
