"""The backbone that the starts of a detector state, for commands that name none."""

from __future__ import annotations

from collections.abc import Sequence

from scrl_fast.config.backbones import is_code, is_named
from scrl_fast.config.files import Settings
from scrl_fast.errors import UsageError


def backbone_of_starts(inits: Sequence[str]) -> Settings | None:
    """``model.backbone`` as the files of weights among the starts state it, as a default; None where none does.

    A backbone that is code is never taken from a file. A file that cannot be read is refused where it is loaded.
    Raises UsageError where two files state different ones: one detector is compared from all starts.
    """
    stated: dict[str, str] = {}
    for init in inits:
        if not is_named(init) and (name := _stated_by(init)):
            stated.setdefault(name, init)
    if len(stated) > 1:
        said = ", ".join(f"{init} is of {name}" for name, init in stated.items())
        raise UsageError(f"inits: {said}; a comparison has one backbone, so leave out the starts of others")
    return next((Settings({"model": {"backbone": name}}, init) for name, init in stated.items()), None)


def _stated_by(init: str) -> str:
    from scrl_fast import weights  # torch, only once the options are known to be right

    try:
        name = str(weights.read(init).metadata.get("backbone") or "")
    except (UsageError, OSError):
        return ""
    return "" if is_code(name) else name
