"""Boxes, scores and anchors of torchvision's detectors in float32 under autocast; layers stay in half precision.

torchvision computes anchors in the features' dtype, and proposals, regression targets and detections in the heads'. A
bf16 coordinate between 512 and 1024 pixels is a multiple of 4, so targets would be wrong by up to 2 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead

LAST_LAYERS = (RPNHead, RetinaNetHead, FCOSHead, FastRCNNPredictor, MaskRCNNPredictor, KeypointRCNNPredictor)
HALF = (torch.bfloat16, torch.float16)


def keep_boxes_in_float32(network: nn.Module) -> None:
    """Registers hooks that widen what the heads return and the anchors; float32 networks compute as before."""
    for module in network.modules():
        if isinstance(module, LAST_LAYERS):
            module.register_forward_hook(lambda _, args, output: widened(output))
        elif isinstance(module, AnchorGenerator):
            module.register_forward_pre_hook(lambda _, args: (args[0], [_in_float32(each) for each in args[1]]))


def widened(value: Any) -> Any:
    """Tensors of half precision in lists, tuples and dicts as float32."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALF else value
    if isinstance(value, Mapping):
        return {name: widened(each) for name, each in value.items()}
    return type(value)(map(widened, value))


def _in_float32(features: Tensor) -> Tensor:
    """A tensor of the same shape and device without memory of its own: the anchors need no values."""
    if features.dtype not in HALF:
        return features
    return features.new_zeros((), dtype=torch.float32).expand(features.shape)
