"""Encoders by name: networks from images to feature maps.

torchvision's ResNet family keeps torchvision's parameter names (without ``fc``), so trained weights load strictly into
torchvision, timm and detection backbones.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet

from scrl_fast.config.backbones import TIMM_PREFIX, is_code, is_given
from scrl_fast.config.defaults import VIEW_SIZE
from scrl_fast.errors import UsageError, did_you_mean
from scrl_fast.models.custom import import_module_encoder
from scrl_fast.models.encoder import Encoder, WholeEncoder

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


class TimmEncoder(WholeEncoder):
    """The last feature map of a timm model built with ``features_only=True``."""

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)[-1]
        if features.shape[1] != self.out_channels:  # Swin gives channels last
            features = features.permute(0, 3, 1, 2)
        return features


def encoder_names() -> tuple[str, ...]:
    """Names that `build_encoder` takes without timm; with timm installed, it takes ``timm:NAME`` too."""
    return (TINY_NAME, *TORCHVISION_NAMES)


def build_encoder(name: str, *, size: int = VIEW_SIZE) -> Encoder:
    """Encoder with random weights, drawn from torch's global generator.

    name: one of `encoder_names`, ``timm:NAME`` for any timm model that offers feature maps, or
        ``package.module:function``, which is imported and called: never pass on such a name from a file.
    size: side of the images, in pixels, by which a network of the user's own is tried.
    Raises ValueError for an unknown name (with the nearest known ones), for a timm name without timm installed, for a
    timm model without feature maps, and for a function that makes no encoder.
    """
    if is_code(name):
        return import_module_encoder(name, size=size)
    if is_given(name):
        raise UsageError(
            f"backbone {name}: the encoder of this run was handed over in Python; hand it over again as encoder=, or "
            "name a function that makes it, package.module:function"
        )
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
    hint = did_you_mean(name, known) or f"; known: {', '.join(encoder_names())}{also}"
    return f"unknown backbone {name!r}{hint}"
