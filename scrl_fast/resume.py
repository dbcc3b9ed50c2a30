"""What a checkpoint of a run holds, and how a run goes on from one."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scrl_fast import checkpoint, weights
from scrl_fast._version import __version__

if TYPE_CHECKING:
    from scrl_fast.trainer import SCRLTrainer

HARMLESS = ("run.", "eval.", "resume", "init", "data.workers", "data.prefetch", "train.max_steps", "train.device")
"""Options that may change between stop and resume without changing what is computed."""


def training_state(trainer: SCRLTrainer) -> dict[str, Any]:
    """All that the run needs to go on as if it had never stopped (DESIGN, "Conventions", and ``log``)."""
    epoch, done = divmod(trainer.step, trainer.steps_per_epoch)
    train = trainer.config.train
    return {
        "model": trainer.model.state(),
        "optimizer": trainer.optimizer.state_dict(),
        "step": trainer.step,
        "epoch": epoch,
        "config": trainer.config.to_dict(),
        "rng": {"torch": torch.get_rng_state()},  # every step seeds it anew; here for whoever goes on by other means
        "loader": {"epoch": epoch, "batch": done * train.accumulate, "world_size": trainer.world_size},
        "version": __version__,
        "log": {"pending": trainer.pending, "scores": trainer.scores, "best": trainer.best},
    }


def restore(trainer: SCRLTrainer) -> list[str]:
    """Loads what ``resume`` or ``init`` asks for into the trainer; returns what there is to say about it.

    Raises CheckpointError for one that is missing, damaged or foreign, ValueError for one that does not fit.
    """
    config = trainer.config
    with warnings.catch_warnings(record=True) as caught:  # names of damaged checkpoints that were passed over
        warnings.simplefilter("always")
        newest = trainer.checkpoints.newest_good() if config.resume else None
        path = newest if config.resume == "auto" else checkpoint.find(config.resume) if config.resume else None
        state = checkpoint.load(path, expect=checkpoint.CHECKPOINT_KEYS) if path else None
    notes = [str(warning.message) for warning in caught]
    if state is not None:
        if newest is not None and step_in_name(newest) > state["step"]:
            raise ValueError(
                f"resume={config.resume}: run.dir {str(trainer.folder)!r} holds a newer checkpoint, {newest.name}; to "
                "branch off from an older one, give the new run its own --run.dir"
            )
        load_training_state(trainer, state)
        notes.append(f"resumed from {path} at step {trainer.step}")
        if changed := changed_options(state["config"], config.to_dict()):
            notes.append(f"not the same run any more, these options have changed: {', '.join(changed)}")
    elif config.resume:
        notes.append(f"resume=auto: no checkpoint in {trainer.checkpoints.folder} yet, starting from the beginning")
    if state is None and config.init:
        notes += initialise(trainer, config.init)
    return notes


def initialise(trainer: SCRLTrainer, path: str) -> list[str]:
    """Fills the networks (and with ``init_momentum`` the optimizer's buffers) from a file of any known layout."""
    if path == weights.RANDOM:
        return ["random weights"]
    source = weights.read(path)
    notes = [f"init: {weights.load_into_scrl(trainer.model, source)}"]
    if trainer.config.init_momentum:
        filled = weights.load_momentum(trainer.model, trainer.optimizer, source)
        if not filled:
            raise ValueError(f"init_momentum=True: {path} ({source.layout}) holds no optimizer state that fits")
        notes.append(f"momentum of {filled} parameters taken from it")
    return notes


def load_training_state(trainer: SCRLTrainer, state: Mapping[str, Any]) -> None:
    """Puts a checkpoint into the trainer; the options stay those of the trainer's configuration."""
    trainer.model.load_state(state["model"])
    options = [{k: v for k, v in group.items() if k != "params"} for group in trainer.optimizer.param_groups]
    trainer.optimizer.load_state_dict(state["optimizer"])
    for group, mine in zip(trainer.optimizer.param_groups, options, strict=True):
        group.update(mine)
    torch.set_rng_state(state["rng"]["torch"])
    trainer.step = state["step"]
    log = state.get("log", {})
    trainer.pending = [list(row) for row in log.get("pending", [])]
    trainer.scores, trainer.best = list(log.get("scores", [])), log.get("best", trainer.best)


def changed_options(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """``name old -> new`` for every option that differs and matters."""
    old, new = flatten(before), flatten(after)
    names = [name for name in new if not name.startswith(HARMLESS) and old.get(name) != new[name]]
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


def step_in_name(path: Path) -> int:
    """The step of ``step_NNNNNNNN.pt``; -1 for another name."""
    match = re.fullmatch(r"step_(\d+)\.pt", path.name)
    return int(match[1]) if match else -1
