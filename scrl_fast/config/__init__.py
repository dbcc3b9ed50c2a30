"""The options of a run: names, types, defaults and ranges, and how they are read; nothing here imports torch."""

from scrl_fast.config.schema import (
    BoxesConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    ViewsConfig,
)

__all__ = [
    "BoxesConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "TrainConfig",
    "ViewsConfig",
]
