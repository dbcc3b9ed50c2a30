"""What a checkpoint of a run holds, and how a run goes on from one."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scrl_fast import build as prepare
from scrl_fast import weights
from scrl_fast._version import __version__
from scrl_fast.run import checkpoint

if TYPE_CHECKING:
    from scrl_fast.trainer import SCRLTrainer

HARMLESS = (
    *("run.", "eval.", "resume", "init", "data.workers", "data.prefetch", "data.timeout"),
    *("train.max_steps", "train.device", "train.keep_memory", "train.checkpoint_activations"),
)
"""Options that may change between stop and resume without changing what is computed."""
SPREAD = ("train.batch_size", "train.accumulate", "train.threads")
"""Options that change with the number of processes, for the same global batch."""


def training_state(trainer: SCRLTrainer, loaders: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All that the run needs to go on as if it had never stopped (DESIGN, "Conventions", and ``log``).

    loaders: what `Loader.state_dict` gave in each process.
    """
    epoch, done = divmod(trainer.step, trainer.steps_per_epoch)
    train = trainer.config.train
    return {
        "model": trainer.model.state(),
        "optimizer": trainer.optimizer.state_dict(),
        "step": trainer.step,
        "epoch": epoch,
        "config": trainer.config.to_dict(),
        "rng": {"torch": torch.get_rng_state()},  # every step seeds it anew; here for whoever goes on by other means
        "loader": {
            **{"epoch": epoch, "batch": done * train.accumulate, "world_size": trainer.world.size},
            "processes": list(loaders),
        },
        "version": __version__,
        "log": {"pending": trainer.pending, "scores": trainer.scores, "best": trainer.best},
    }


def restore(trainer: SCRLTrainer) -> list[str]:
    """Loads what ``resume`` or ``init`` asks for into the trainer; returns what there is to say about it.

    Raises CheckpointError for one that is missing, damaged or foreign, ValueError for one that does not fit.
    """
    config = trainer.config
    newest, path, own, notes = trainer.world.from_first(lambda: choose(config.resume, trainer.checkpoints))
    if path is not None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state = checkpoint.load(path, expect=checkpoint.CHECKPOINT_KEYS)
        notes += [str(warning.message) for warning in caught]
        if newest is not None and step_in_name(newest) > state["step"]:
            raise ValueError(
                f"resume={config.resume}: run.dir {str(trainer.folder)!r} holds a newer checkpoint, {newest.name}; to "
                "branch off from an older one, give the new run its own --run.dir"
            )
        load_training_state(trainer, state)
        trainer.saved = trainer.step if own else 0
        notes.append(f"resumed from {path} at step {trainer.step}")
        before, now = state["loader"].get("world_size", 1), trainer.world.size
        if before != now:
            notes.append(f"{now} processes instead of {before}: the same images, views and boxes in every step")
        if changed := changed_options(
            state["config"], trainer.config.to_dict(), besides=SPREAD if before != now else ()
        ):
            notes.append(f"not the same run any more, these options have changed: {', '.join(changed)}")
    elif config.resume:
        notes.append(f"resume=auto: no checkpoint in {trainer.checkpoints.folder} yet, starting from the beginning")
    if path is None and config.init:
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


def choose(asked: str, checkpoints: checkpoint.CheckpointManager) -> tuple[Path | None, Path | None, bool, list[str]]:
    """For ``resume=asked``: the run folder's newest good checkpoint, the one to load, whether it is one of the run's,
    what was passed over.
    """
    if not asked:
        return None, None, False, []
    with warnings.catch_warnings(record=True) as caught:  # names of damaged checkpoints that were passed over
        warnings.simplefilter("always")
        newest = checkpoints.newest_good()
        path = newest if asked == "auto" else checkpoint.find(asked)
    own = path is not None and checkpoints.holds(path)
    return newest, path, own, [str(warning.message) for warning in caught]


def load_training_state(trainer: SCRLTrainer, state: Mapping[str, Any]) -> None:
    """Puts a checkpoint into the trainer; the options stay those of the trainer's configuration.

    In a checkpoint from before every process kept its own count (no ``loader.processes``), the bad images are those of
    process 0 alone, and several processes share them as if they were all.

    Raises ValueError when the global batch is another one: step numbers and schedules would mean something else.
    """
    check_batch(trainer, state)
    if not trainer.threads_asked and state["loader"].get("world_size", 1) == trainer.world.size:
        free = replace(trainer.config, train=replace(trainer.config.train, threads=0))
        trainer.config = prepare.set_threads(free, trainer.device, before=state["config"]["train"].get("threads", 0))
    trainer.model.load_state(state["model"])
    options = [{k: v for k, v in group.items() if k != "params"} for group in trainer.optimizer.param_groups]
    trainer.optimizer.load_state_dict(state["optimizer"])
    for group, mine in zip(trainer.optimizer.param_groups, options, strict=True):
        group.update(mine)
    torch.set_rng_state(state["rng"]["torch"])
    trainer.step = state["step"]
    trainer.loader.load_state_dict(state["loader"].get("processes", [state["loader"]]))
    log = state.get("log", {})
    trainer.pending = [list(row) for row in log.get("pending", [])]
    trainer.scores, trainer.best = list(log.get("scores", [])), log.get("best", trainer.best)


def check_batch(trainer: SCRLTrainer, state: Mapping[str, Any]) -> None:
    """Raises ValueError unless the checkpoint's images per step are those of now, in whatever number of processes."""
    was, now = state["config"]["train"], trainer.config.train
    before = was["batch_size"], was["accumulate"], state["loader"].get("world_size", 1)
    if math.prod(before) != trainer.global_batch:
        raise ValueError(
            f"train.batch_size={now.batch_size} x train.accumulate={now.accumulate} x {trainer.world.size} processes "
            f"makes {trainer.global_batch} images a step, but the checkpoint was made with "
            f"{' x '.join(map(str, before))} = {math.prod(before)}: choose them so that the product stays, or start a "
            "new run from the weights with --init"
        )


def changed_options(before: Mapping[str, Any], after: Mapping[str, Any], besides: tuple[str, ...] = ()) -> list[str]:
    """``name old -> new`` for every option that differs and matters."""
    old, new = flatten(before), flatten(after)
    names = [name for name in new if not name.startswith(HARMLESS + besides) and old.get(name) != new[name]]
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
