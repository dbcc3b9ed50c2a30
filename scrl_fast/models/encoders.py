"""Encoders by name: networks from images to feature maps.

torchvision's ResNet family keeps torchvision's parameter names (without ``fc``), so trained weights load strictly into
torchvision, timm and detection backbones.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet as torchvision_resnet

from scrl_fast.errors import UsageError

TORCHVISION_NAMES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
TINY_NAME = "resnet10_tiny"
TIMM_PREFIX = "timm:"


class Encoder(nn.Module):
    """Images ``[B, 3, H, W]`` to a feature map ``[B, out_channels, ceil(H / stride), ceil(W / stride)]``.

    ``body`` is the plain torchvision ResNet (``fc`` is Identity) or timm model that holds the weights.
    """

    def __init__(self, name: str, body: nn.Module, out_channels: int, stride: int) -> None:
        super().__init__()
        self.name = name
        self.body = body
        self.out_channels = out_channels
        self.stride = stride
        self._checkpointing = False

    @property
    def checkpointing(self) -> bool:
        """Whether the backward pass recomputes each block from its input, to save memory."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        self._checkpointing = on

    def forward(self, images: Tensor) -> Tensor:
        body: Any = self.body
        x = body.maxpool(body.relu(body.bn1(body.conv1(images))))
        if self._checkpointing and torch.is_grad_enabled():
            return _checkpointed(x, (body.layer1, body.layer2, body.layer3, body.layer4))
        return body.layer4(body.layer3(body.layer2(body.layer1(x))))

    def extra_repr(self) -> str:
        return f"name={self.name!r}, out_channels={self.out_channels}, stride={self.stride}"


def _checkpointed(x: Tensor, stages: Iterable[nn.Module]) -> Tensor:
    for stage in stages:
        for block in stage.children():
            contexts = lambda block=block: (nullcontext(), _untracked(block))  # noqa: E731
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    return x


@contextmanager
def _untracked(module: nn.Module) -> Iterator[None]:
    """Keep running statistics as they are: the first forward pass has updated them, the recomputed one must not."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, values in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = values


class TimmEncoder(Encoder):
    """The last feature map of a timm model built with ``features_only=True``."""

    @property
    def checkpointing(self) -> bool:
        return False

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        if on:
            raise UsageError(f"train.checkpoint_activations works with torchvision's backbones, not with {self.name!r}")

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)[-1]
        if features.shape[1] != self.out_channels:  # Swin gives channels last
            features = features.permute(0, 3, 1, 2)
        return features


def encoder_names() -> tuple[str, ...]:
    """Names that `build_encoder` takes without timm; with timm installed, it takes ``timm:NAME`` too."""
    return (TINY_NAME, *TORCHVISION_NAMES)


def build_encoder(name: str) -> Encoder:
    """Encoder with random weights, drawn from torch's global generator.

    name: one of `encoder_names`, or ``timm:NAME`` for any timm model that offers feature maps.
    Raises ValueError for an unknown name (with the nearest known ones), for a timm name without timm installed, and for
    a timm model without feature maps.
    """
    if name.startswith(TIMM_PREFIX):
        return _timm_encoder(name)
    if name == TINY_NAME:
        body = _resnet10_tiny()
        return Encoder(name, body, out_channels=_channels(body.layer3), stride=8)
    if name not in TORCHVISION_NAMES:
        raise UsageError(_unknown(name, encoder_names(), also=f", or {TIMM_PREFIX}NAME for a model of timm"))
    body = getattr(torchvision_resnet, name)(weights=None)
    channels = body.fc.in_features
    body.fc = nn.Identity()
    return Encoder(name, body, out_channels=channels, stride=32)


def _resnet10_tiny(width: int = 16) -> torchvision_resnet.ResNet:
    """torchvision's ResNet cut down for 64-pixel views on a CPU: three stages of one BasicBlock, widths 16, 32, 64.

    A 3x3 stem without max-pool and no fourth stage leave a stride of 8: 8x8 cells in a view of 64.
    """
    body = torchvision_resnet.ResNet(torchvision_resnet.BasicBlock, [1, 1, 1, 1])
    body.inplanes = width
    body.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=2, padding=1, bias=False)
    body.bn1 = nn.BatchNorm2d(width)
    body.maxpool = nn.Identity()  # type: ignore[assignment]
    body.layer1 = body._make_layer(torchvision_resnet.BasicBlock, width, 1)
    body.layer2 = body._make_layer(torchvision_resnet.BasicBlock, 2 * width, 1, stride=2)
    body.layer3 = body._make_layer(torchvision_resnet.BasicBlock, 4 * width, 1, stride=2)
    body.layer4 = nn.Identity()  # type: ignore[assignment]
    body.fc = nn.Identity()  # type: ignore[assignment]
    for module in body.modules():  # torchvision's own initialisation, for the layers replaced above
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return body


def _channels(stage: nn.Module) -> int:
    return [m for m in stage.modules() if isinstance(m, nn.BatchNorm2d)][-1].num_features


def _timm_encoder(name: str) -> Encoder:
    try:
        import timm
    except ImportError as error:
        raise UsageError(f"backbone {name!r} needs timm: pip install timm") from error
    model_name = name.removeprefix(TIMM_PREFIX)
    if not timm.is_model(model_name.split(".")[0]):
        raise UsageError(_unknown(name, [TIMM_PREFIX + other for other in timm.list_models()]))
    try:
        body: Any = timm.create_model(model_name, pretrained=False, features_only=True)
    except (RuntimeError, AttributeError, AssertionError, NotImplementedError, TypeError) as error:
        raise UsageError(f"backbone {name!r}: this timm model offers no feature maps ({error})") from error
    return TimmEncoder(
        name, body, out_channels=body.feature_info.channels()[-1], stride=body.feature_info.reduction()[-1]
    )


def _unknown(name: str, known: Any, also: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(encoder_names())}{also}"
    return f"unknown backbone {name!r}; {hint}"
