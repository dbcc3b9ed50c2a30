"""torchvision's detectors on our encoders: feature pyramid, normalisation, RoIAlign and anchors as configured."""

from __future__ import annotations

import functools
import math
import os
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import MultiScaleRoIAlign

from scrl_fast import weights
from scrl_fast.config.defaults import BACKBONE
from scrl_fast.data.sources.annotation_files import MOST_CLASSES
from scrl_fast.errors import UsageError
from scrl_fast.models import Encoder
from scrl_fast.ops import roi_align
from scrl_fast.ops._arguments import check_integer
from scrl_fast.transfer.box_precision import keep_boxes_in_float32
from scrl_fast.transfer.config import DETECTOR_DEFAULTS, DETECTORS, DetectorConfig
from scrl_fast.transfer.pyramid import build_pyramid, head_norm_layer
from scrl_fast.weights.tensor_values import check_values

CANONICAL_SIDE, CANONICAL_STRIDE = 224, 16  # a box of 224 pixels belongs to stride 16 (FPN, arXiv 1612.03144, eq. 1)


def build_detector(
    detector: str,
    classes: int,
    *,
    backbone: str = BACKBONE,
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
    backbone, init, branch: an encoder of `scrl_fast.models.build_encoder`, and weights for it:
        "random", "torchvision" (supervised on ImageNet), a path for `scrl_fast.weights.read`, what that gave, or an
        encoder, whose weights are copied.
    config: every other number, by default the detector's published ones; ``options`` are its fields, such as
        short_side=(96, 96) (one int stands for both, and for test_short_side, too).
    The report of the weights is in ``network.init_report``. Raises ValueError naming the argument and its value,
    WeightsError when the weights do not fill the backbone.
    """
    if detector not in DETECTORS:
        raise ValueError(f"detector must be one of {', '.join(DETECTORS)}, got {detector!r}")
    classes, keypoints = (
        check_integer("classes", classes, 1, MOST_CLASSES),
        check_integer("keypoints", keypoints, 1, 1000),
    )
    side = options.get("short_side")
    if isinstance(side, int):
        options |= {"short_side": (side, side), "test_short_side": options.get("test_short_side", side)}
    if config is None:
        options = {**DETECTOR_DEFAULTS.get(detector, {}).get("model", {}), **options}
    options |= {"detector": detector, "backbone": backbone, "branch": branch}
    chosen = replace(config or DetectorConfig(), **options)
    pyramid, strides, report = build_pyramid(chosen, init)
    network = _BUILDERS[detector](chosen, pyramid, strides, classes, keypoints)
    keep_boxes_in_float32(network)
    # torchvision keeps one list of sides and takes the last in evaluation
    network.transform = ResizeAndNormalize(
        chosen.short_sides(), chosen.long_side, list(chosen.mean), list(chosen.std), chosen.test_short_side
    )
    network.init_report, network.first_label = report, int(detector.endswith("rcnn"))
    return network


class ResizeAndNormalize(torchvision.models.detection.transform.GeneralizedRCNNTransform):
    """torchvision's resizing and normalising, with a separate shorter side for evaluation."""

    def __init__(
        self, sides: tuple[int, ...], long_side: int, mean: list[float], std: list[float], test_side: int
    ) -> None:
        super().__init__(sides, long_side, mean, std)  # type: ignore[arg-type]
        self.sides, self.test_side = sides, test_side

    def train(self, mode: bool = True) -> ResizeAndNormalize:
        super().train(mode)
        self.min_size = self.sides if mode else (self.test_side,)
        return self


# ---- RoIAlign ----


class PyramidRoIAlign(MultiScaleRoIAlign):
    """torchvision's pooler with our RoIAlign: deterministic, in the features' dtype, aligned or not.

    strides: of the levels that it reads, the finest first. FPN's rule assigns boxes to levels.
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


class SmoothL1Beta(TorchFunctionMode):
    """Sets ``beta`` of every ``smooth_l1_loss`` in a module's training pass: torchvision's detectors fix it."""

    def __init__(self, module: nn.Module, beta: float) -> None:
        super().__init__()
        self.beta, self.entered = beta, False
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module.training:
            self.__enter__()
            self.entered = True

    def _leave(self, *_: Any) -> None:
        if self.entered:
            self.entered = False
            self.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.smooth_l1_loss:
            kwargs = {**kwargs, "beta": self.beta}
        return func(*args, **kwargs)


def _initialize_heads(network: Any, config: DetectorConfig) -> nn.Module:
    """Box losses as configured; heads initialised as in detectron2, so that boxes and masks start near zero."""
    SmoothL1Beta(network.rpn, config.rpn_smooth_l1_beta)
    SmoothL1Beta(network.roi_heads, config.box_smooth_l1_beta)
    heads = network.roi_heads
    for layer in (heads.box_head.fc6, heads.box_head.fc7):
        nn.init.kaiming_uniform_(layer.weight, a=1)
    starts = [(heads.box_predictor.cls_score, 0.01), (heads.box_predictor.bbox_pred, 0.001)]
    if heads.mask_predictor is not None:
        starts.append((heads.mask_predictor.mask_fcn_logits, 0.001))
    for layer, deviation in starts:
        nn.init.normal_(layer.weight, std=deviation)
    for layer in (heads.box_head.fc6, heads.box_head.fc7, *(layer for layer, _ in starts)):
        nn.init.zeros_(layer.bias)
    return network


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
    return _initialize_heads(FasterRCNN(**_rcnn_options(config, pyramid, strides, classes)), config)


def _mask_rcnn(config: DetectorConfig, pyramid: Any, strides: list[int], classes: int, keypoints: int) -> nn.Module:
    width = config.mask_channels
    network = MaskRCNN(
        **_rcnn_options(config, pyramid, strides, classes),
        mask_roi_pool=_pooler(config, strides, 14),
        mask_head=MaskRCNNHeads(config.fpn_channels, (width,) * 4, 1, norm_layer=head_norm_layer(config)),
        mask_predictor=MaskRCNNPredictor(width, width, classes + 1),
    )
    return _initialize_heads(network, config)


def _keypoint_rcnn(config: DetectorConfig, pyramid: Any, strides: list[int], classes: int, keypoints: int) -> nn.Module:
    width = config.keypoint_channels
    network = KeypointRCNN(
        **_rcnn_options(config, pyramid, strides, classes),
        keypoint_roi_pool=_pooler(config, strides, 14),
        keypoint_head=KeypointRCNNHeads(config.fpn_channels, (width,) * 8),
        keypoint_predictor=DenseKeypointPredictor(width, keypoints),
    )
    return _initialize_heads(network, config)


class DenseKeypointPredictor(KeypointRCNNPredictor):
    """torchvision's predictor with contiguous heat maps, since its loss calls ``view``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).contiguous()


def _retinanet(config: DetectorConfig, pyramid: Any, strides: list[int], classes: int, keypoints: int) -> nn.Module:
    octaves = [2 ** (third / 3) for third in range(3)]
    sides = tuple(tuple(round(config.anchor_scale / 2 * stride * o) for o in octaves) for stride in strides)
    anchors = AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * len(sides))
    norm = functools.partial(PerLevelBatchNorm, levels=len(strides)) if head_norm_layer(config) else None
    head = RetinaNetHead(config.fpn_channels, anchors.num_anchors_per_location()[0], classes, norm_layer=norm)
    for branch in head.children():
        branch.register_forward_pre_hook(_restart_levels)
    network = RetinaNet(
        pyramid,
        classes,
        anchor_generator=anchors,
        head=head,
        score_thresh=config.score_threshold,
        nms_thresh=config.nms_threshold,
        detections_per_img=config.detections,
    )
    network.head.regression_head._loss_type = "smooth_l1"
    SmoothL1Beta(network, config.box_smooth_l1_beta)
    return network


class PerLevelBatchNorm(nn.Module):
    """BatchNorm of a head shared by all pyramid levels: each level has its own weights and statistics.

    The levels must be passed in turn. One norm for all levels would mix their running statistics, which do not fit any
    single level in evaluation; detectron2 has one for each level as well.
    """

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.norms, self.level = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(levels)), 0

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` of the next level, normalised."""
        norm = self.norms[self.level]
        self.level = (self.level + 1) % len(self.norms)
        return norm(x)


def _restart_levels(branch: nn.Module, args: Any) -> None:
    for module in branch.modules():  # a pass that an error ended may have stopped at any level
        if isinstance(module, PerLevelBatchNorm):
            module.level = 0


def _fcos(config: DetectorConfig, pyramid: Any, strides: list[int], classes: int, keypoints: int) -> nn.Module:
    if config.fpn_channels % 32:
        raise UsageError(f"fpn_channels must be a multiple of 32 for FCOS (GroupNorm), got {config.fpn_channels}")
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


def check_same_detector(network: nn.Module, state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Raise UsageError naming tensors when a checkpoint holds another detector, or values that are no finite floats."""
    own, found = network.state_dict(), state["model"]
    wrong = [name for name in own if name not in found or found[name].shape != own[name].shape]
    if wrong := wrong + [name for name in found if name not in own]:
        model = state["config"].get("model", {})
        said = " with ".join(str(model[key]) for key in ("detector", "backbone") if key in model)
        raise UsageError(
            f"resume={path} is no checkpoint of this detector but of {said or 'another network'}: {len(wrong)} "
            f"tensors are missing, left over or of another shape, {', '.join(wrong[:3])}, ...; give the options it "
            "was trained with (its run folder has them in config.yaml)"
        )
    check_values(f"resume={path}", found, own)
