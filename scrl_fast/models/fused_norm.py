"""BatchNorm, ReLU and the residual of ResNet blocks as one operation; parameters, buffers and their names stay."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet

from scrl_fast.ops import batch_norm_act


class BatchNormAct(nn.BatchNorm2d):
    """``relu(batch_norm(input) + residual)`` by `scrl_fast.ops.batch_norm_act`, ReLU and residual where there are any.

    Parameters, buffers and their names are those of ``nn.BatchNorm2d``; a norm becomes one by ``fuse_norms``.
    """

    relu: bool = False
    synchronized: bool = False
    group: Any = None

    def synchronize(self, group: Any) -> None:
        """From now on the statistics are those of all processes of ``group``."""
        self.synchronized, self.group = True, group

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        uses_batch = self.training or self.running_mean is None
        tracks = self.training and self.track_running_stats and self.running_mean is not None
        momentum = 0.0 if self.momentum is None else self.momentum
        if tracks and self.num_batches_tracked is not None and (input.numel() or self.synchronized):
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the plain mean over all batches
                momentum = 1.0 / float(self.num_batches_tracked)
        kept = tracks or not uses_batch
        return batch_norm_act(
            input,
            self.weight,
            self.bias,
            residual,
            running_mean=self.running_mean if kept else None,
            running_var=self.running_var if kept else None,
            training=uses_batch,
            momentum=momentum,
            eps=self.eps,
            relu=self.relu,
            synchronized=self.synchronized and uses_batch,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + (", relu=True" if self.relu else "")


class FusedBasicBlock(torchvision_resnet.BasicBlock):
    """torchvision's BasicBlock, whose norms do the ReLUs and the addition."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), identity)


class FusedBottleneck(torchvision_resnet.Bottleneck):
    """torchvision's Bottleneck, whose norms do the ReLUs and the addition."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        return self.bn3(self.conv3(out), identity)


BLOCKS: dict[type, type] = {
    torchvision_resnet.BasicBlock: FusedBasicBlock,
    torchvision_resnet.Bottleneck: FusedBottleneck,
}


def fuse_norms(network: nn.Module) -> int:
    """Makes BatchNorm, ReLU and residual of the network one operation where that changes no number but by rounding.

    Taken are torchvision's ResNet (stem and blocks), the blocks of timm's ResNet up to their addition, and a
    BatchNorm2d that a ReLU follows in a Sequential. Everything else, and every subclass of these, stays as it is.
    In place; names and order of parameters and buffers stay. Returns the number of norms that changed.
    """
    fused = 0
    for module in list(network.modules()):
        if type(module) in BLOCKS:
            fused += _fuse_block(module)
        elif type(module) is torchvision_resnet.ResNet:
            fused += _fuse_pair(module, "bn1", "relu")
        elif type(module) is nn.Sequential:
            names = list(module._modules)
            fused += sum(_fuse_pair(module, *pair) for pair in pairwise(names))
        elif type(module).__module__ == "timm.models.resnet":
            fused += _fuse_timm(module)
    return fused


def _fuse_block(block: Any) -> int:
    norms = [block.bn1, block.bn2] + ([block.bn3] if isinstance(block, torchvision_resnet.Bottleneck) else [])
    if not all(type(norm) is nn.BatchNorm2d for norm in norms):
        return 0
    for norm in norms:
        _fuse(norm)
    block.__class__ = BLOCKS[type(block)]
    return len(norms)


def _fuse_timm(module: Any) -> int:
    """bn1 and act1, bn2 and act2, where nothing stands between them; the addition stays timm's."""
    nothing_between = isinstance(getattr(module, "drop_block", nn.Identity()), nn.Identity)
    pairs = [("bn1", "act1")] + ([("bn2", "act2")] if hasattr(module, "bn3") else [])
    return sum(_fuse_pair(module, *pair) for pair in pairs) if nothing_between else 0


def _fuse_pair(module: nn.Module, norm_name: str, act_name: str) -> int:
    norm, act = (getattr(module, name, None) for name in (norm_name, act_name))
    if type(norm) is not nn.BatchNorm2d or type(act) is not nn.ReLU:
        return 0
    _fuse(norm)
    setattr(module, act_name, nn.Identity())
    return 1


def _fuse(norm: nn.Module) -> None:
    norm.__class__ = BatchNormAct
    norm.relu = True  # type: ignore[assignment]
