"""The encoder that the photographs' evidence trains from scratch: small enough for one CPU core."""

from __future__ import annotations

from torch import nn
from torchvision.models import resnet


def resnet10_quarter(last_stride: int = 2) -> nn.Sequential:
    """torchvision's ResNet at a quarter of its width, one BasicBlock a stage: 309,456 parameters, strides 4 to 32."""
    body = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    body.inplanes = width = 16
    body.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
    body.bn1 = nn.BatchNorm2d(width)
    strides = (1, 2, 2, last_stride)
    stages = [body._make_layer(resnet.BasicBlock, width << i, 1, stride=stride) for i, stride in enumerate(strides)]
    network = nn.Sequential(body.conv1, body.bn1, body.relu, body.maxpool, *stages)
    for module in network.modules():  # torchvision's own initialisation, for the layers replaced above
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def resnet10_quarter_stride16() -> nn.Sequential:
    """The same parameters, with a last stage that does not shrink its map: a view of 112 pixels has 7 x 7 cells."""
    return resnet10_quarter(last_stride=1)
