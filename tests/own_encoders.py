"""Encoders as users write them, named in tests as ``own_encoders:NAME``."""

from __future__ import annotations

import pathlib

import torch
from torch import Tensor, nn

MARK = "SCRL_FAST_TEST_MARK"


def _layer(inside: int, outside: int, stride: int = 2, padding: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inside, outside, 3, stride, padding, bias=False), nn.BatchNorm2d(outside), nn.ReLU(inplace=True)]


def six_layers() -> nn.Sequential:
    """Strides 2, 4, 4, 8, 16, 32."""
    plan = [(3, 8, 2), (8, 12, 2), (12, 12, 1), (12, 16, 2), (16, 24, 2), (24, 32, 2)]
    return nn.Sequential(*(layer for inside, outside, stride in plan for layer in _layer(inside, outside, stride)))


def stride_8() -> nn.Sequential:
    return nn.Sequential(*_layer(3, 8), *_layer(8, 12), *_layer(12, 16))


def unpadded() -> nn.Sequential:
    return nn.Sequential(*_layer(3, 8, 2, 0), *_layer(8, 12, 2, 0), *_layer(12, 16, 2, 0))


class Csp(nn.Module):
    """The block of YOLO's backbones: half of the channels go through a residual bottleneck, half around it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*_layer(channels, channels, 1))
        self.bottleneck = nn.Sequential(*_layer(channels // 2, channels // 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        around, through = self.conv1(x).chunk(2, 1)
        return torch.cat([around, through + self.bottleneck(through)], 1)


class YoloLike(nn.Module):
    """A CSP-Darknet: a stem named as other libraries name theirs, and the maps of strides 8, 16 and 32 in a tuple."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv1 = nn.Conv2d(3, width, 3, 2, 1)
        self.stages = nn.ModuleList(
            nn.Sequential(*_layer(width << i, width << (i + 1)), Csp(width << (i + 1))) for i in range(4)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x, maps = self.stem.conv1(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return tuple(maps[1:])


class Random(nn.Module):
    """Draws in its forward pass, counts there, and drops out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.norm(self.conv(x)) + torch.rand(())


def fixed_size() -> nn.Module:
    """Takes 32 x 32 pixels only."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.place = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.zeros(1, 8, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.place

    return Fixed()


def marking() -> nn.Module:
    """Leaves a file behind when it is called, by which tests see that it was."""
    import os

    pathlib.Path(os.environ[MARK]).touch()
    return six_layers()


def no_module() -> int:
    return 3


def failing() -> nn.Module:
    raise OSError("no such weights")


number = 7


class Colours(nn.Module):
    """Three channels of stride 4, linear in the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


colours = Colours
