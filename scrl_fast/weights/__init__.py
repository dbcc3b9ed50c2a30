"""Weights from anywhere: our checkpoints, the published layout, torchvision, timm, detectron2, mmdet, safetensors.

``load_into(encoder, PATH)`` fills an encoder, ``load_into_scrl(model, PATH)`` all networks of a run; both say what
matched and refuse when less than the whole encoder does. Nothing in a file is executed.
"""

from scrl_fast.weights.files import WeightsError
from scrl_fast.weights.layouts import Weights, read
from scrl_fast.weights.load import (
    RANDOM,
    Report,
    encoder_of,
    guess_backbone,
    load_encoder,
    load_into,
    load_into_scrl,
    load_momentum,
)

__all__ = [
    "RANDOM",
    "Report",
    "Weights",
    "WeightsError",
    "encoder_of",
    "guess_backbone",
    "load_encoder",
    "load_into",
    "load_into_scrl",
    "load_momentum",
    "read",
]
