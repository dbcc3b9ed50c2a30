"""Weights of our checkpoints, the published layout, torchvision, timm, detectron2, mmdet, safetensors and ONNX.

``load_into(encoder, PATH)`` fills an encoder, ``load_into_scrl(model, PATH)`` all networks of a run. Both report the
tensors that matched and refuse a file without the whole encoder. No code of a file is run.
"""

from scrl_fast.weights.errors import WeightsError
from scrl_fast.weights.layouts import Weights, read
from scrl_fast.weights.load import (
    RANDOM,
    LoadReport,
    check_fit,
    encoder_of,
    guess_backbone,
    load_encoder,
    load_into,
    load_into_scrl,
    view_size,
)
from scrl_fast.weights.momentum import load_momentum
from scrl_fast.weights.zoo import normalization_notes, read_initial

Report = LoadReport
"""The report's former name."""

__all__ = [
    "RANDOM",
    "LoadReport",
    "Report",
    "Weights",
    "WeightsError",
    "check_fit",
    "encoder_of",
    "guess_backbone",
    "load_encoder",
    "load_into",
    "load_into_scrl",
    "load_momentum",
    "normalization_notes",
    "read",
    "read_initial",
    "view_size",
]
