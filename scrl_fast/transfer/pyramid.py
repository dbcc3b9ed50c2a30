"""One of our encoders under a feature pyramid: its weights, its frozen stages, the maps that the pyramid uses."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from scrl_fast import weights
from scrl_fast.errors import UsageError
from scrl_fast.models import Encoder, ModuleEncoder, build_encoder
from scrl_fast.models.custom import maps_in_dry_run
from scrl_fast.models.encoders import TimmEncoder
from scrl_fast.transfer.config import DetectorConfig
from scrl_fast.transfer.levels import level_maps

STEM, ALL_STAGES = ("conv1", "bn1"), 5
TIMM_STRIDES = [4, 8, 16, 32]
ODD_SIZE = (64, 96)  # pixels


def build_pyramid(config: DetectorConfig, init: Any) -> tuple[nn.Module, list[int], weights.LoadReport]:
    """The encoder under a feature pyramid, with the stride of every level of it, and the report of its weights.

    Raises UsageError for a backbone of timm, or of the user's own, that has no such levels, WeightsError for weights
    that do not fill it.
    """
    encoder = copy.deepcopy(init) if isinstance(init, ModuleEncoder) else build_encoder(config.backbone)
    report = load_backbone(encoder, init, config)
    dense = config.detector in ("retinanet", "fcos")  # they look at three stages and two levels above
    below = encoder.out_channels if config.detector == "retinanet" else config.fpn_channels  # C5; FCOS: P5
    extra = LastLevelP6P7(below, config.fpn_channels) if dense else LastLevelMaxPool()
    options = {"extra_blocks": extra, "norm_layer": head_norm_layer(config)}
    if isinstance(encoder, ModuleEncoder):
        pyramid, strides = _module_pyramid(encoder, config, int(dense), options)
    elif isinstance(encoder, TimmEncoder):
        pyramid, strides = _timm_pyramid(encoder, config, int(dense), options)
    else:
        pyramid, strides = _torchvision_pyramid(encoder, config, int(dense), options)
    return pyramid, strides + [strides[-1] << (i + 1) for i in range(2 if dense else 1)], report


def _torchvision_pyramid(
    encoder: Encoder, config: DetectorConfig, skip: int, options: dict[str, Any]
) -> tuple[nn.Module, list[int]]:
    body = encoder.body
    stages = [n for n in ("layer1", "layer2", "layer3", "layer4") if not isinstance(getattr(body, n), nn.Identity)]
    strides = [encoder.stride >> (len(stages) - 1 - i) for i in range(len(stages))]
    freeze_stages(body, [STEM[0], *stages], config.frozen_stages)
    if config.norm == "frozen":
        freeze_batch_norms(body)
    channels = [_channels(getattr(body, name)) for name in stages]
    levels = {name: str(level) for level, name in enumerate(stages[skip:])}
    return BackboneWithFPN(body, levels, channels[skip:], config.fpn_channels, **options), strides[skip:]


def _timm_pyramid(
    encoder: TimmEncoder, config: DetectorConfig, skip: int, options: dict[str, Any]
) -> tuple[nn.Module, list[int]]:
    body: Any = encoder.body
    strides, channels = body.feature_info.reduction(), body.feature_info.channels()
    if not set(TIMM_STRIDES) <= set(strides):
        raise UsageError(
            f"model.backbone={encoder.name}: its feature maps have strides {strides}, and a feature pyramid needs "
            f"{TIMM_STRIDES}, as ResNet, RegNet, ResNeSt, EfficientNet or ConvNeXt have them"
        )
    _check_any_size(encoder)
    if freezes_all(config):
        body.requires_grad_(False)
    if freezes_all(config) or config.norm == "frozen":
        from timm.utils.model import freeze_batch_norm_2d

        freeze_batch_norm_2d(body)
    places = [strides.index(stride) for stride in TIMM_STRIDES[skip:]]
    fpn = FeaturePyramidNetwork([channels[place] for place in places], config.fpn_channels, **options)
    return TimmPyramid(body, places, fpn, config.fpn_channels), TIMM_STRIDES[skip:]


def _module_pyramid(
    encoder: ModuleEncoder, config: DetectorConfig, skip: int, options: dict[str, Any]
) -> tuple[nn.Module, list[int]]:
    """The levels are the maps that the network gives or, where it gives one, outputs of layers inside it."""
    frozen = freezes_all(config)
    maps_in_dry_run(encoder.body, encoder.name, ODD_SIZE)  # a detector's images differ in size
    body, channels = level_maps(encoder.body, encoder.name, TIMM_STRIDES)
    if frozen:
        body.requires_grad_(False)
    if frozen or config.norm == "frozen":
        freeze_batch_norms(body)
    fpn = FeaturePyramidNetwork(channels[skip:], config.fpn_channels, **options)
    places = list(range(len(TIMM_STRIDES)))[skip:]
    return TimmPyramid(body, places, fpn, config.fpn_channels), TIMM_STRIDES[skip:]


def _check_any_size(encoder: TimmEncoder) -> None:
    """Raise UsageError for a backbone that takes images of one size only: a detector's differ."""
    training = encoder.training
    try:
        with torch.no_grad():
            encoder.eval()(torch.zeros(1, 3, *ODD_SIZE))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UsageError(f"model.backbone={encoder.name}: a detector's images differ in size, and {error}") from error
    finally:
        encoder.train(training)


class TimmPyramid(nn.Module):
    """`BackboneWithFPN` for a network that gives several feature maps: level ``i`` is made of its map ``places[i]``."""

    def __init__(self, body: nn.Module, places: list[int], fpn: FeaturePyramidNetwork, out_channels: int) -> None:
        super().__init__()
        self.body, self.places, self.fpn, self.out_channels = body, places, fpn, out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images ``[B, 3, H, W]`` to maps by name, the finest first."""
        maps = self.body(x)
        return self.fpn(OrderedDict((str(level), maps[place]) for level, place in enumerate(self.places)))


def load_backbone(encoder: Encoder, init: Any, config: DetectorConfig) -> weights.LoadReport:
    """Load the weights of ``init`` into the encoder; the report notes a normalisation that differs from the detector's.

    Raises WeightsError, a UsageError, when a zoo's weights cannot be downloaded.
    """
    if isinstance(init, Encoder):
        own = {f"encoder.body.{name}": tensor for name, tensor in init.body.state_dict().items()}
        init = weights.Weights(init.name, "an encoder", {"online": own, "target": own})
    known = init == weights.RANDOM or isinstance(init, weights.Weights)
    source = init if known else weights.read_initial(os.fspath(init), encoder.name)
    report = weights.load_into(encoder, source, branch=config.branch)
    if isinstance(source, weights.Weights):
        notes = weights.normalization_notes(source, {"mean": config.mean, "std": config.std}, "model")
        report = replace(report, notes=[*report.notes, *notes])
    return report


def freeze_stages(body: nn.Module, stages: list[str], count: int) -> None:
    """Stop gradients of the first ``count`` of stem and stages; their norms keep their statistics.

    torchvision ignores its own ``trainable_backbone_layers`` unless its pre-trained weights are loaded.
    """
    for name in stages[:count]:
        for part in (name, "bn1") if name == STEM[0] else (name,):
            getattr(body, part).requires_grad_(False)
            if part == "bn1":
                setattr(body, part, _frozen(body.bn1))
            else:
                freeze_batch_norms(getattr(body, part))


def freezes_all(config: DetectorConfig) -> bool:
    """Whether the whole backbone stays as it is; UsageError for a part of one without torchvision's stages."""
    if config.frozen_stages not in (0, ALL_STAGES):
        raise UsageError(
            f"model.frozen_stages={config.frozen_stages}: only torchvision's backbones have stages to count, "
            f"{config.backbone} takes 0 (none) or {ALL_STAGES} (all)"
        )
    return config.frozen_stages == ALL_STAGES


def freeze_batch_norms(module: nn.Module) -> None:
    """Replace every BatchNorm inside the module by FrozenBatchNorm."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, _frozen(child))
        else:
            freeze_batch_norms(child)


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


def head_norm_layer(config: DetectorConfig) -> type[nn.Module] | None:
    """Normalisation in feature pyramid and convolutional heads, if any."""
    return nn.BatchNorm2d if config.norm_in_heads and config.norm != "frozen" else None
