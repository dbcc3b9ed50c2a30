"""The backbone of a detector whose command names none: of the run that goes on, or of the weights it begins with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scrl_fast.config.backbones import backbone_fault, has_own_names, is_named
from scrl_fast.config.files import Settings, read_settings
from scrl_fast.config.run_folder import CONFIG, folder_of
from scrl_fast.errors import UsageError
from scrl_fast.transfer.config import TransferConfig


def backbone_not_named(config: TransferConfig, inits: Sequence[str]) -> Settings | None:
    """``model.backbone`` as a default where neither files nor the command line name it; None where nothing states it.

    inits: what the detectors begin with. A run that goes on does not read them, and keeps the backbone of its
    ``config.yaml``. A name that is code, or no backbone, is never taken from a file. A file that cannot be read is
    refused where it is loaded.
    Raises UsageError where two files state different ones: one detector is compared from all starts.
    """
    if kept := _kept_by(config):
        return _as_default(kept, "the run that goes on", config)
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


def _as_default(name: str, origin: str, config: TransferConfig) -> Settings:
    note = f"model.backbone={name}, as {origin} states"
    return Settings({"model": {"backbone": name}}, origin, () if name == config.model.backbone else (note,))


def _kept_by(config: TransferConfig) -> str:
    """The backbone of the run that ``resume`` names; empty where there is none yet."""
    named = config.run.dir if config.resume == "auto" else config.resume
    folder = folder_of(named) if named else None
    if folder is None or not (folder / CONFIG).is_file():
        return ""
    try:
        return _usable(read_settings(str(folder / CONFIG)).options.get("model", {}).get("backbone"))
    except (UsageError, OSError, AttributeError):
        return ""  # refused, or not needed, where the run is read


def _stated_by(init: str) -> str:
    from scrl_fast import weights  # torch, only once the options are known to be right

    try:
        return _usable(weights.read(init).metadata.get("backbone"))
    except (UsageError, OSError):
        return ""


def _usable(name: Any) -> str:
    return name if isinstance(name, str) and not has_own_names(name) and not backbone_fault(name) else ""
