"""Names of encoders: ours, timm's, and those that name code of the user's. Nothing here imports torch.

Code is imported only where the command line, or the program that makes a config, names it. A name that stands in a file
alone (YAML, a run's config.yaml, a checkpoint, an export) is refused until the command line repeats it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from scrl_fast.config.defaults import BACKBONE_STRIDES
from scrl_fast.errors import UsageError, did_you_mean

TIMM_PREFIX = "timm:"
TORCHVISION_WEIGHTS, TIMM_WEIGHTS, HUB_PREFIX = "torchvision", "timm", "hf-hub:"
"""What ``init`` may be beside a path: weights by name."""
RANDOM = "random"
"""What stands for weights that nothing trained."""
_CODE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_GIVEN = re.compile(r"<[^<>]+>")


def is_code(name: object) -> bool:
    """Whether a name is ``package.module:function``, whose import runs code."""
    return isinstance(name, str) and not name.startswith(TIMM_PREFIX) and _CODE.fullmatch(name) is not None


def is_given(name: object) -> bool:
    """Whether a name, ``<ClassName>``, stands for a network that a program handed over as ``encoder=``."""
    return isinstance(name, str) and _GIVEN.fullmatch(name) is not None


def has_own_names(name: object) -> bool:
    """Whether an encoder's tensors have names of the user's own, not torchvision's or timm's."""
    return is_code(name) or is_given(name)


def is_zoo(init: str) -> bool:
    """Whether ``init`` names weights of a zoo and not a file."""
    return init in (TORCHVISION_WEIGHTS, TIMM_WEIGHTS) or init.startswith(HUB_PREFIX)


def is_named(start: str) -> bool:
    """Whether a start is no path: random, or the weights of a zoo."""
    return start == RANDOM or is_zoo(start)


def code_arguments(name: str) -> list[str]:
    """What a command that resumes a run has to repeat: code is never taken from the run's files."""
    return [f"--model.backbone={name}"] if is_code(name) else []


def backbone_fault(name: str) -> str:
    """What is wrong with the name of an encoder; '' for one that may exist."""
    if name in BACKBONE_STRIDES or name.startswith(TIMM_PREFIX) or has_own_names(name):
        return ""
    known, hint = ", ".join(BACKBONE_STRIDES), did_you_mean(name, BACKBONE_STRIDES)
    return f"must be one of {known}, timm:NAME, or package.module:function{hint}"


def check_code_is_asked_for(options: Mapping[str, Any], tokens: Sequence[str], origins: Sequence[str]) -> None:
    """Raises UsageError where files name code to import and the command line does not.

    options: nested, of the files. tokens: of the command line. origins: names of the files.
    """
    section = options.get("model")
    values = {"model.backbone": section.get("backbone") if isinstance(section, Mapping) else None}
    values["backbone"] = options.get("backbone")
    for option, name in values.items():
        said = any(token == f"--{option}" or token.startswith(f"--{option}=") for token in tokens)
        if is_code(name) and not said:
            raise UsageError(
                f"{', '.join(filter(None, origins))} names code to import, {option}={name}, which no file may ask for "
                f"alone: if you trust it, say --{option}={name} on the command line too (in Python: set it in the "
                "config, or give encoder= to the trainer)"
            )
