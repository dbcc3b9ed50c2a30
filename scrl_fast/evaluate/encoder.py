"""What is evaluated: an encoder with weights from anywhere, and how images are brought to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scrl_fast import weights
from scrl_fast.config.backbones import TIMM_WEIGHTS, TORCHVISION_WEIGHTS
from scrl_fast.config.defaults import BACKBONE, IMAGENET_MEAN, IMAGENET_STD, VIEW_SIZE
from scrl_fast.config.schema import ViewsConfig
from scrl_fast.distributed.rendezvous import device_of
from scrl_fast.errors import UsageError
from scrl_fast.evaluate.config import Common, RegionOptions
from scrl_fast.evaluate.images import has_untrained_batch_norm
from scrl_fast.models import Encoder, build_encoder
from scrl_fast.weights.load import LARGEST_VIEW
from scrl_fast.weights.tensor_values import check_values


@dataclass(frozen=True)
class EvaluatedEncoder:
    """An encoder, and what its file of weights says of it."""

    encoder: Encoder
    name: str
    """For the line of result: the file, or ``random``."""
    report: str
    """Which tensors of the file were used."""
    size: int = VIEW_SIZE
    """The side of the views of training, as the file states it."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    training: dict[str, Any] = field(default_factory=dict)
    """The configuration of training, where the file holds it (our checkpoints)."""
    probe: dict[str, Tensor] | None = None
    """weight and bias of the online probe, where the file holds one."""
    untrained: bool = False
    normalized: bool = True
    """Whether the weights say how images were normalised; else mean and std are ImageNet's."""

    def measures_batchnorm(self, options: Common) -> bool:
        """Whether the tasks other than roi-linear measure BatchNorm statistics anew."""
        return options.batchnorm == "measured" or (options.batchnorm == "auto" and self.untrained)

    def view_size(self, given: int = 0, option: str = "--size") -> int:
        """The side of the images that it is shown: ``given`` where that is above 0, else that of training.

        Raises WeightsError where the file states a side above `LARGEST_VIEW`: no file decides on so much memory.
        """
        if given or self.size <= LARGEST_VIEW:
            return given or self.size
        raise weights.WeightsError(
            f"{self.name}: the views of training had a side of {self.size} pixels, and at most {LARGEST_VIEW} is "
            f"taken from a file: give the size, {option}={self.size}"
        )


def load_evaluated(options: Common) -> EvaluatedEncoder:
    """The encoder that the options name, on their device.

    Raises UsageError (WeightsError) for weights that are missing, damaged, or do not fit the backbone.
    """
    device = device_of(options.device)
    if options.checkpoint == weights.RANDOM:
        torch.manual_seed(options.seed)
        encoder = build_encoder(options.backbone or BACKBONE).to(device)
        return EvaluatedEncoder(encoder, "random", f"random {encoder.name}", untrained=True, normalized=False)
    zoo = options.checkpoint in (TORCHVISION_WEIGHTS, TIMM_WEIGHTS)
    source = weights.read_initial(options.checkpoint, options.backbone or BACKBONE)
    backbone = options.backbone or (BACKBONE if zoo else weights.guess_backbone(source))
    encoder = build_encoder(backbone, size=weights.view_size(source))
    report = weights.load_into(encoder, source, branch=options.branch)
    training = source.metadata.get("config") or {}
    said = training.get("views") or {n: v for n, v in source.metadata.items() if n in ("mean", "std")}
    views = _views_of(said, source.path)
    return EvaluatedEncoder(
        encoder.to(device),
        source.path,
        str(report),
        size=views.size,
        mean=views.mean,
        std=views.std,
        training=training,
        probe=source.parts.get("probe"),
        untrained=has_untrained_batch_norm(encoder),
        normalized=options.checkpoint == TORCHVISION_WEIGHTS or "mean" in said,
    )


def normalization(evaluated: EvaluatedEncoder, options: RegionOptions) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """mean and std of the encoder's images: as its weights say, else as the options say."""
    if evaluated.normalized:
        return evaluated.mean, evaluated.std
    return options.mean, options.std


def _views_of(said: dict[str, Any], path: str) -> ViewsConfig:
    """Side and normalisation of the views that a file's options hold.

    Raises WeightsError naming the file where they cannot be used.
    """
    try:
        return ViewsConfig(
            size=said.get("size", VIEW_SIZE), mean=said.get("mean", IMAGENET_MEAN), std=said.get("std", IMAGENET_STD)
        )
    except UsageError as error:
        raise weights.WeightsError(f"{path}: the options in it cannot be used: {error}") from error


def probe_of(evaluated: EvaluatedEncoder, classes: int, where: str) -> torch.nn.Linear:
    """The checkpoint's online probe as a layer.

    Raises UsageError when there is none, or when it has another number of classes than the data in ``where``.
    """
    probe, width = evaluated.probe, evaluated.encoder.out_channels
    if not probe:
        raise UsageError(f"{evaluated.name} holds no online probe: --head=train trains classifiers")
    layer = torch.nn.Linear(width, classes)
    shapes = {name: list(tensor.shape) for name, tensor in probe.items()}
    if shapes.keys() != {"weight", "bias"} or shapes["weight"][1:] != [width] or shapes["bias"] != shapes["weight"][:1]:
        raise UsageError(f"the online probe of {evaluated.name} is {shapes}, no linear layer of {width} features")
    if (known := shapes["bias"][0]) != classes:
        raise UsageError(f"the online probe of {evaluated.name} knows {known} classes, but {where} has {classes}")
    check_values(f"{evaluated.name}: probe", probe, layer.state_dict())
    layer.load_state_dict(probe)
    return layer.to(next(evaluated.encoder.parameters()).device)
