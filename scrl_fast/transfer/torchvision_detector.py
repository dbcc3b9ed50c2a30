"""A detector of scrl_fast in torchvision's own classes. This file needs torch and torchvision alone.

`scrl_fast.transfer.export_detector` copies it beside the weights, with the detector's options in place of the empty
ones below::

    network = build("detector.pth")  # in eval mode; takes a list of images [3, H, W] with values from 0 to 1
    found = network([image])[0]  # boxes, labels, scores; names: CLASSES[label - FIRST_LABEL]
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

OPTIONS: dict[str, Any] = {}
CLASSES: list[str] = OPTIONS.get("classes", [])
FIRST_LABEL = int(OPTIONS.get("detector", "").endswith("rcnn"))


def build(weights: str | None = None, options: dict[str, Any] | None = None) -> nn.Module:
    """The detector, with the tensors of the file ``weights`` where one is given."""
    o = OPTIONS if options is None else options
    network: nn.Module = _dense(o) if o["detector"] in ("retinanet", "fcos") else _rcnn(o)
    if weights is not None:
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval()


class AlignedRoIAlign(MultiScaleRoIAlign):
    """torchvision's pooler with boxes shifted by half a pixel (``aligned=True``), which it has no option for."""

    def __init__(self, strides: list[int], output_size: int, sampling_ratio: int) -> None:
        super().__init__([str(level) for level in range(len(strides))], output_size, sampling_ratio)
        self.strides = strides

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: Any) -> Tensor:
        rows = torch.cat([torch.cat([torch.full_like(b[:, :1], image), b], 1) for image, b in enumerate(boxes)])
        sides = ((rows[:, 3] - rows[:, 1]) * (rows[:, 4] - rows[:, 2])).clamp_min(0).sqrt()
        levels = torch.floor(4 + torch.log2(sides / 224) + 1e-6) - math.log2(self.strides[0])
        levels = levels.clamp(0, len(self.strides) - 1).long()
        order, pooled = [], []
        for level, stride in enumerate(self.strides):
            chosen = torch.where(levels == level)[0]
            order.append(chosen)
            pooled.append(
                roi_align(x[str(level)], rows[chosen], self.output_size, 1 / stride, self.sampling_ratio, aligned=True)
            )
        return torch.cat(pooled)[torch.argsort(torch.cat(order))]


def _backbone(o: dict[str, Any], stages: list[str], extra: Any) -> nn.Module:
    body = getattr(resnet, o["backbone"])(weights=None)
    channels = [_channels(getattr(body, stage)) for stage in stages]
    norm = nn.BatchNorm2d if o["norm_in_heads"] else None
    levels = {stage: str(level) for level, stage in enumerate(stages)}
    return BackboneWithFPN(body, levels, channels, o["fpn_channels"], extra_blocks=extra, norm_layer=norm)


def _channels(stage: nn.Module) -> int:
    return [module for module in stage.modules() if isinstance(module, nn.BatchNorm2d)][-1].num_features


def _image_options(o: dict[str, Any]) -> dict[str, Any]:
    return {"min_size": o["min_size"], "max_size": o["max_size"], "image_mean": o["mean"], "image_std": o["std"]}


def _rcnn(o: dict[str, Any]) -> nn.Module:
    strides = [4, 8, 16, 32, 64]
    backbone = _backbone(o, ["layer1", "layer2", "layer3", "layer4"], LastLevelMaxPool())
    sizes = tuple((round(o["anchor_scale"] * stride),) for stride in strides)
    classes = len(o["classes"]) + 1  # 0 is background
    options: dict[str, Any] = {
        **_image_options(o),
        "rpn_anchor_generator": AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        "rpn_pre_nms_top_n_test": o["proposals_before_nms"],
        "rpn_post_nms_top_n_test": o["proposals"],
        "box_roi_pool": _pooler(o, strides[:-1], 7),
        "box_head": TwoMLPHead(o["fpn_channels"] * 49, o["head_channels"]),
        "box_predictor": FastRCNNPredictor(o["head_channels"], classes),
        "box_score_thresh": o["score_threshold"],
        "box_nms_thresh": o["nms_threshold"],
        "box_detections_per_img": o["detections"],
    }
    if o["detector"] == "faster_rcnn":
        return FasterRCNN(backbone, **options)
    pool = _pooler(o, strides[:-1], 14)
    if o["detector"] == "mask_rcnn":
        width, norm = o["mask_channels"], nn.BatchNorm2d if o["norm_in_heads"] else None
        head = MaskRCNNHeads(o["fpn_channels"], (width,) * 4, 1, norm_layer=norm)
        predictor = MaskRCNNPredictor(width, width, classes)
        return MaskRCNN(backbone, mask_roi_pool=pool, mask_head=head, mask_predictor=predictor, **options)
    width = o["keypoint_channels"]
    points = KeypointRCNNPredictor(width, o["keypoints"])
    layers = KeypointRCNNHeads(o["fpn_channels"], (width,) * 8)
    return KeypointRCNN(backbone, keypoint_roi_pool=pool, keypoint_head=layers, keypoint_predictor=points, **options)


def _pooler(o: dict[str, Any], strides: list[int], size: int) -> MultiScaleRoIAlign:
    ratio = max(o["sampling_ratio"], 0)
    if o["aligned"]:
        return AlignedRoIAlign(strides, size, ratio)
    return MultiScaleRoIAlign([str(level) for level in range(len(strides))], size, ratio)


def _dense(o: dict[str, Any]) -> nn.Module:
    strides, width, classes = [8, 16, 32, 64, 128], o["fpn_channels"], len(o["classes"])
    retinanet = o["detector"] == "retinanet"
    deepest = _channels(getattr(resnet, o["backbone"])(weights=None).layer4)
    backbone = _backbone(o, ["layer2", "layer3", "layer4"], LastLevelP6P7(deepest if retinanet else width, width))
    options: dict[str, Any] = {
        **_image_options(o),
        "score_thresh": o["score_threshold"],
        "nms_thresh": o["nms_threshold"],
        "detections_per_img": o["detections"],
    }
    if not retinanet:
        anchors = AnchorGenerator(tuple((stride,) for stride in strides), ((1.0,),) * len(strides))
        return FCOS(backbone, classes, anchor_generator=anchors, **options)
    thirds = [2 ** (third / 3) for third in range(3)]
    sizes = tuple(tuple(round(o["anchor_scale"] / 2 * stride * third) for third in thirds) for stride in strides)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    head = RetinaNetHead(width, anchors.num_anchors_per_location()[0], classes)
    return RetinaNet(backbone, classes, anchor_generator=anchors, head=head, **options)
