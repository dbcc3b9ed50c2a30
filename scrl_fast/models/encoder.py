"""The encoder that all networks are to the rest of the package: a body, its channels, its stride."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from scrl_fast.errors import UsageError


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


class WholeEncoder(Encoder):
    """An encoder whose blocks are not known, so that none can be recomputed."""

    @property
    def checkpointing(self) -> bool:
        return False

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        if on:
            raise UsageError(f"train.checkpoint_activations works with torchvision's backbones, not with {self.name!r}")


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
