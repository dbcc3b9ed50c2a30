"""SCRL and BYOL pre-training that costs what its backbone costs.

``import scrl_fast`` imports nothing heavy: every name below is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from scrl_fast._lazy import loader_of
from scrl_fast._version import __version__

if TYPE_CHECKING:
    from scrl_fast import models as models
    from scrl_fast import ops as ops
    from scrl_fast import optim as optim
    from scrl_fast.api import PretrainResult as PretrainResult
    from scrl_fast.api import embed as embed
    from scrl_fast.api import pretrain as pretrain
    from scrl_fast.config.schema import Config as Config
    from scrl_fast.config.schema import load_recipe as load_recipe
    from scrl_fast.trainer import SCRLTrainer as SCRLTrainer
    from scrl_fast.weights import load_encoder as load_encoder

__getattr__ = loader_of(
    __name__,
    {
        "Config": "scrl_fast.config.schema",
        "PretrainResult": "scrl_fast.api",
        "SCRLTrainer": "scrl_fast.trainer",
        "embed": "scrl_fast.api",
        "load_encoder": "scrl_fast.weights",
        "load_recipe": "scrl_fast.config.schema",
        "models": "scrl_fast.models",
        "ops": "scrl_fast.ops",
        "optim": "scrl_fast.optim",
        "pretrain": "scrl_fast.api",
    },
)

__all__ = [
    "Config",
    "PretrainResult",
    "SCRLTrainer",
    "__version__",
    "embed",
    "load_encoder",
    "load_recipe",
    "models",
    "ops",
    "optim",
    "pretrain",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
