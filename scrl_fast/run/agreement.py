"""What the processes of one run must have in common, compared once at the start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from scrl_fast._version import __version__
from scrl_fast.distributed.world import World
from scrl_fast.errors import UsageError
from scrl_fast.run.resume import flatten

OWN_OPTIONS = (
    *("run.dir", "resume", "init", "json"),  # process 0 decides these for all
    *("data.root", "data.workers", "data.prefetch", "data.decode_memory"),
    *("train.device", "train.threads", "train.keep_memory"),
)
"""Options that may differ from machine to machine."""
MAX_LISTED = 4  # differences that the error names


def check_same_everywhere(world: World, config: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """Raises UsageError in every process unless all of them have the same options and the same of ``more``.

    Else they would train different networks, or wait for each other for good.
    """
    if not world.is_distributed:
        return
    options = {name: value for name, value in flatten(config).items() if not name.startswith(OWN_OPTIONS)}
    backend = os.environ.get("SCRL_FAST_BACKEND", "")
    everyone = world.all_gather_objects({**options, **more, "SCRL_FAST_BACKEND": backend, "scrl_fast": __version__})
    differences = []
    for name in dict.fromkeys(name for facts in everyone for name in facts):
        values = [facts.get(name) for facts in everyone]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            differences.append(_difference(name, values[0], values[other], other))
    if differences:
        left = f" and {len(differences) - MAX_LISTED} more" if len(differences) > MAX_LISTED else ""
        raise UsageError(f"the processes of this run disagree: {'; '.join(differences[:MAX_LISTED])}{left}")


def _difference(name: str, first: Any, value: Any, rank: int) -> str:
    if name == "names":  # a hash, which says nothing to people
        return f"the images have other names or another order in process {rank} than in process 0"
    return f"{name} is {first} in process 0, {value} in process {rank}"
