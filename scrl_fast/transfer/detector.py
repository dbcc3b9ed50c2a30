"""torchvision's detectors on an encoder of ours: feature pyramid, normalisation, RoIAlign and anchors as configured."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from scrl_fast import weights
from scrl_fast.errors import UsageError
from scrl_fast.models import Encoder, build_encoder
from scrl_fast.ops import roi_align
from scrl_fast.transfer.config import DETECTORS, DetectorConfig

SUPERVISED = "torchvision"
STEM = ("conv1", "bn1")
CANONICAL_SIDE, CANONICAL_STRIDE = 224, 16  # a box of 224 pixels belongs to stride 16 (FPN, arXiv 1612.03144, eq. 1)


def build_detector(
    detector: str,
    classes: int,
    *,
    backbone: str = "resnet50",
    init: str | weights.Weights | Encoder = weights.RANDOM,
    branch: str = "online",
    keypoints: int = 17,
    config: DetectorConfig | None = None,
    **options: Any,
) -> nn.Module:
    """A torchvision detection network whose backbone has the weights of ``init``.

    detector: faster_rcnn, mask_rcnn, keypoint_rcnn, retinanet or fcos.
    classes: without background. Labels in targets and detections count from 1 for the R-CNNs, from 0 for the other two
        (`first_label`).
    backbone, init, branch: an encoder of `scrl_fast.models.build_encoder` (its ResNet family), and weights for it:
        "random", "torchvision" (supervised on ImageNet), a path for `scrl_fast.weights.read`, what that gave, or an
        encoder, whose weights are copied.
    config: every other number, by default the published ones; ``options`` are its fields, such as short_side=(96, 96)
        (one int stands for both, and for test_short_side, too).
    The report of the weights is in ``network.init_report``. Raises ValueError naming the argument and its value,
    WeightsError when the weights do not fill the backbone.
    """
    if detector not in DETECTORS:
        raise ValueError(f"detector must be one of {', '.join(DETECTORS)}, got {detector!r}")
    if classes < 1:
        raise ValueError(f"classes must be at least 1, got {classes}")
    side = options.get("short_side")
    if isinstance(side, int):
        options |= {"short_side": (side, side), "test_short_side": options.get("test_short_side", side)}
    options |= {"detector": detector, "backbone": backbone, "branch": branch}
    chosen = replace(config or DetectorConfig(), **options)
    pyramid, strides, report = build_pyramid(chosen, init)
    network = _BUILDERS[detector](chosen, pyramid, strides, classes, keypoints)
    # torchvision keeps one list of sides and takes the last in evaluation
    network.transform = EvaluationSide(
        chosen.short_sides(), chosen.long_side, list(chosen.mean), list(chosen.std), chosen.test_short_side
    )
    network.init_report, network.first_label = report, int(detector.endswith("rcnn"))
    return network


class EvaluationSide(torchvision.models.detection.transform.GeneralizedRCNNTransform):
    """torchvision's resizing and normalising, with a side of its own for evaluation."""

    def __init__(
        self, sides: tuple[int, ...], long_side: int, mean: list[float], std: list[float], test_side: int
    ) -> None:
        super().__init__(sides, long_side, mean, std)  # type: ignore[arg-type]
        self.sides, self.test_side = sides, test_side

    def train(self, mode: bool = True) -> EvaluationSide:
        super().train(mode)
        self.min_size = self.sides if mode else (self.test_side,)
        return self


# ---- backbone ----


def build_pyramid(config: DetectorConfig, init: Any) -> tuple[BackboneWithFPN, list[int], weights.Report]:
    """The encoder under a feature pyramid, with the stride of every level of it, and the report of its weights."""
    encoder = build_encoder(config.backbone)
    if encoder.name.startswith("timm:"):
        raise UsageError(f"model.backbone={encoder.name}: transfer takes resnet10_tiny and torchvision's ResNet family")
    report = initialise(encoder, init, config.branch)
    body = encoder.body
    stages = [n for n in ("layer1", "layer2", "layer3", "layer4") if not isinstance(getattr(body, n), nn.Identity)]
    strides = {name: encoder.stride >> (len(stages) - 1 - i) for i, name in enumerate(stages)}
    freeze(body, [STEM[0], *stages], config.frozen_stages)
    if config.norm == "frozen":
        freeze_norms(body)
    dense = config.detector in ("retinanet", "fcos")  # they look at three stages and two levels above
    used = stages[1:] if dense else stages
    channels = [_channels(getattr(body, name)) for name in used]
    above = LastLevelP6P7(config.fpn_channels, config.fpn_channels) if dense else LastLevelMaxPool()
    pyramid = BackboneWithFPN(
        body,
        {name: str(level) for level, name in enumerate(used)},
        channels,
        config.fpn_channels,
        extra_blocks=above,
        norm_layer=_norm_of_heads(config),
    )
    extra = [strides[used[-1]] << (i + 1) for i in range(2 if dense else 1)]
    return pyramid, [strides[name] for name in used] + extra, report


def initialise(encoder: Encoder, init: Any, branch: str) -> weights.Report:
    """Weights of ``init`` into the encoder. Raises UsageError when torchvision's cannot be had."""
    if isinstance(init, Encoder):
        own = {f"encoder.body.{name}": tensor for name, tensor in init.body.state_dict().items()}
        init = weights.Weights(init.name, "an encoder", {"online": own, "target": own})
    if init != SUPERVISED:
        return weights.load_into(encoder, init, branch="target" if branch == "target" else "online")
    try:
        chosen = torchvision.models.get_model_weights(encoder.name)["IMAGENET1K_V1"]
        state = chosen.get_state_dict(progress=False, check_hash=True)
    except (ValueError, KeyError) as error:
        raise UsageError(f"init=torchvision: torchvision has no ImageNet weights of {encoder.name}") from error
    except OSError as error:
        raise UsageError(
            f"init=torchvision: the weights of {encoder.name} cannot be downloaded ({error}); give a file instead"
        ) from error
    body = {f"encoder.body.{name}": tensor for name, tensor in state.items()}
    return weights.load_into(encoder, weights.Weights(str(chosen), "torchvision", {"online": body}))


def freeze(body: nn.Module, stages: list[str], count: int) -> None:
    """No gradient for the first ``count`` of the stem and the stages; their norms keep their statistics.

    torchvision's own ``trainable_backbone_layers`` is ignored where no weights of torchvision's are asked for.
    """
    for name in stages[:count]:
        for part in (name, "bn1") if name == STEM[0] else (name,):
            getattr(body, part).requires_grad_(False)
            if part == "bn1":
                setattr(body, part, _frozen(body.bn1))
            else:
                freeze_norms(getattr(body, part))


def freeze_norms(module: nn.Module) -> None:
    """BatchNorm inside the module becomes a fixed affine map."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, _frozen(child))
        else:
            freeze_norms(child)


def _frozen(norm: Any) -> FrozenBatchNorm2d:
    if isinstance(norm, FrozenBatchNorm2d):
        return norm
    frozen = FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
    frozen.load_state_dict(norm.state_dict())
    return frozen


def _channels(stage: nn.Module) -> int:
    return [module for module in stage.modules() if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d))][
        -1
    ].weight.numel()


def _norm_of_heads(config: DetectorConfig) -> type[nn.Module] | None:
    return nn.BatchNorm2d if config.norm_in_heads and config.norm != "frozen" else None


# ---- RoIAlign ----


class PyramidRoIAlign(MultiScaleRoIAlign):
    """torchvision's pooler with our RoIAlign: deterministic, in the features' own dtype, aligned by option.

    strides: of the levels it reads, the finest first. Boxes are assigned to levels by FPN's rule.
    """

    def __init__(self, strides: list[int], output_size: int, sampling_ratio: int, aligned: bool) -> None:
        super().__init__([str(level) for level in range(len(strides))], output_size, max(sampling_ratio, 0))
        self.strides, self.ratio, self.aligned = strides, sampling_ratio, aligned

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: Any) -> Tensor:
        """Features by level name and boxes ``[n, 4]`` of each image to ``[N, C, size, size]``, in the boxes' order."""
        rows = torch.cat([torch.cat([torch.full_like(b[:, :1], image), b], 1) for image, b in enumerate(boxes)]).float()
        levels = level_of(rows[:, 1:], self.strides)
        order, pooled = [], []
        for level, stride in enumerate(self.strides):
            chosen = torch.where(levels == level)[0]
            features = x[str(level)]
            order.append(chosen)
            pooled.append(
                roi_align(features, rows[chosen], self.output_size, 1.0 / stride, self.ratio, aligned=self.aligned)
            )
        return torch.cat(pooled)[torch.argsort(torch.cat(order))]


def level_of(boxes: Tensor, strides: list[int]) -> Tensor:
    """Index of the level that each box ``[n, 4]`` is pooled from."""
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp_min(0).sqrt()
    finest = math.log2(strides[0])
    level = torch.floor(math.log2(CANONICAL_STRIDE) + torch.log2(sides / CANONICAL_SIDE) + 1e-6) - finest
    return level.clamp(0, len(strides) - 1).long()


def _pooler(config: DetectorConfig, strides: list[int], size: int) -> MultiScaleRoIAlign:
    levels = strides[:-1]  # the last one is the extra level, which only the RPN looks at
    if config.roi_align == "scrl_fast":
        return PyramidRoIAlign(levels, size, config.roi_sampling_ratio, config.roi_aligned)
    names = [str(level) for level in range(len(levels))]
    return MultiScaleRoIAlign(names, output_size=size, sampling_ratio=max(config.roi_sampling_ratio, 0))


# ---- detectors ----


def _rcnn_options(config: DetectorConfig, pyramid: Any, strides: list[int], classes: int) -> dict[str, Any]:
    anchors = AnchorGenerator(
        tuple((round(config.anchor_scale * stride),) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides)
    )
    return {
        "backbone": pyramid,
        "rpn_anchor_generator": anchors,
        "rpn_pre_nms_top_n_train": config.proposals_before_nms[0],
        "rpn_pre_nms_top_n_test": config.proposals_before_nms[1],
        "rpn_post_nms_top_n_train": config.proposals[0],
        "rpn_post_nms_top_n_test": config.proposals[1],
        "box_roi_pool": _pooler(config, strides, 7),
        "box_head": TwoMLPHead(config.fpn_channels * 49, config.head_channels),
        "box_predictor": FastRCNNPredictor(config.head_channels, classes + 1),
        "box_score_thresh": config.score_threshold,
        "box_nms_thresh": config.nms_threshold,
        "box_detections_per_img": config.detections,
        "box_batch_size_per_image": config.rois_per_image,
    }


def _faster_rcnn(config: DetectorConfig, pyramid: Any, strides: list[int], classes: int, keypoints: int) -> nn.Module:
    return FasterRCNN(**_rcnn_options(config, pyramid, strides, classes))


def _mask_rcnn(config: DetectorConfig, pyramid: Any, strides: list[int], classes: int, keypoints: int) -> nn.Module:
    width = config.mask_channels
    return MaskRCNN(
        **_rcnn_options(config, pyramid, strides, classes),
        mask_roi_pool=_pooler(config, strides, 14),
        mask_head=MaskRCNNHeads(config.fpn_channels, (width,) * 4, 1, norm_layer=_norm_of_heads(config)),
        mask_predictor=MaskRCNNPredictor(width, width, classes + 1),
    )


def _keypoint_rcnn(config: DetectorConfig, pyramid: Any, strides: list[int], classes: int, keypoints: int) -> nn.Module:
    width = config.keypoint_channels
    return KeypointRCNN(
        **_rcnn_options(config, pyramid, strides, classes),
        keypoint_roi_pool=_pooler(config, strides, 14),
        keypoint_head=KeypointRCNNHeads(config.fpn_channels, (width,) * 8),
        keypoint_predictor=DenseKeypointPredictor(width, keypoints),
    )


class DenseKeypointPredictor(KeypointRCNNPredictor):
    """torchvision's, whose loss takes a ``view`` that channels_last heat maps do not have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).contiguous()


def _retinanet(config: DetectorConfig, pyramid: Any, strides: list[int], classes: int, keypoints: int) -> nn.Module:
    octaves = [2 ** (third / 3) for third in range(3)]
    sides = tuple(tuple(round(config.anchor_scale / 2 * stride * o) for o in octaves) for stride in strides)
    anchors = AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * len(sides))
    norm = _norm_of_heads(config)
    head = RetinaNetHead(config.fpn_channels, anchors.num_anchors_per_location()[0], classes, norm_layer=norm)
    return RetinaNet(
        pyramid,
        classes,
        anchor_generator=anchors,
        head=head,
        score_thresh=config.score_threshold,
        nms_thresh=config.nms_threshold,
        detections_per_img=config.detections,
    )


def _fcos(config: DetectorConfig, pyramid: Any, strides: list[int], classes: int, keypoints: int) -> nn.Module:
    if config.fpn_channels % 32:
        raise ValueError(f"fpn_channels must be a multiple of 32 for FCOS (GroupNorm), got {config.fpn_channels}")
    anchors = AnchorGenerator(tuple((stride,) for stride in strides), ((1.0,),) * len(strides))
    return FCOS(
        pyramid,
        classes,
        anchor_generator=anchors,
        score_thresh=config.score_threshold,
        nms_thresh=config.nms_threshold,
        detections_per_img=config.detections,
    )


_BUILDERS: dict[str, Any] = OrderedDict(
    faster_rcnn=_faster_rcnn, mask_rcnn=_mask_rcnn, keypoint_rcnn=_keypoint_rcnn, retinanet=_retinanet, fcos=_fcos
)
