"""The backbone of a detector whose command names none: of the run that goes on, or of the weights it begins with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scrl_fast.config.backbones import backbone_fault, has_own_names, is_named
from scrl_fast.config.command_line import load_run_config
from scrl_fast.config.files import Settings
from scrl_fast.errors import UsageError
from scrl_fast.transfer.config import TransferConfig


def backbone_not_named(config: TransferConfig, inits: Sequence[str]) -> Settings | None:
    """``model.backbone`` as a default where neither files nor the command line name it; None where nothing states it.

    inits: what the detectors begin with. A run that goes on from a checkpoint does not read them, and keeps its own
    backbone. A name that is code, or that the weights do not fill, is never taken from a file. A file that cannot be
    read is refused where it is loaded.
    Raises UsageError where two files state different ones: one detector is compared from all starts.
    """
    if _goes_on(config):
        return _as_default(_kept_by(config), "the run that goes on", config)
    stated: dict[str, str] = {}
    for init in inits:
        if init and not is_named(init) and (name := _stated_by(init)):
            stated.setdefault(name, init)
    if len(stated) > 1:
        said = ", ".join(f"{init} is of {name}" for name, init in stated.items())
        raise UsageError(
            f"inits: {said}; one detector is compared from all starts: leave some out, or name its backbone"
        )
    return next((_as_default(name, init, config) for name, init in stated.items()), None)


def _as_default(name: str, origin: str, config: TransferConfig) -> Settings | None:
    if not name or name == config.model.backbone:
        return None
    return Settings({"model": {"backbone": name}}, origin, (f"model.backbone={name}, as {origin} states",))


def _goes_on(config: TransferConfig) -> bool:
    """Whether ``resume`` names a checkpoint, or a run that has one."""
    if config.resume == "auto":
        from scrl_fast.run.folder import newest_checkpoint  # torch

        return bool(newest_checkpoint(config.run.dir))
    return bool(config.resume)


def _kept_by(config: TransferConfig) -> str:
    """The backbone of the run that goes on: of its ``config.yaml``, or of its checkpoint where that is lost."""
    try:
        settings = load_run_config(config.resume, config.run.dir, _checkpoint_config)
        return _usable(settings.options["model"]["backbone"]) if settings else ""
    except (UsageError, OSError, LookupError, TypeError):
        return ""  # refused, or not needed, where the run is read


def _checkpoint_config(path: str) -> dict[str, Any]:
    from scrl_fast.run.checkpoint import load_training_state  # torch

    return load_training_state(path)["config"]


def _stated_by(init: str) -> str:
    from scrl_fast import weights  # torch, only once the options are known to be right

    try:
        found = weights.read(init)
        if name := _usable(found.metadata.get("backbone")):
            weights.check_fit(found, name)
        return name
    except (UsageError, OSError):
        return ""


def _usable(name: Any) -> str:
    return name if isinstance(name, str) and not has_own_names(name) and not backbone_fault(name) else ""
