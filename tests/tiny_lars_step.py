"""What the tests of lars_step_ share: lists drawn from a seed, a step over them, and the same step in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import implementations
from torch import Tensor

from scrl_fast.ops import lars_step_

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SHAPES = [(), (0,), (1,), (3,), (17, 5), (8, 3, 3, 3), (4, 0, 2), (16384,), (40013,)]
COUNT = len(SHAPES)
ADAPT = [True, True, False, True, True, True, True, False, True]
DECAY = [1e-2 * i for i in range(COUNT)]
everywhere = pytest.mark.parametrize("device, backend", implementations("lars_step_"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


class Lists:
    """Parameters, gradients, buffers and targets (None for every third) of one step."""

    def __init__(
        self, dtype: torch.dtype, device: str = "cpu", shapes: Sequence[tuple[int, ...]] = tuple(SHAPES)
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(scale: float) -> list[Tensor]:
            values = [scale * torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
            return [value.to(device, dtype) for value in values]

        self.params, self.grads, self.buffers = draw(1), draw(0.1), draw(0.5)
        self.targets: list[Tensor | None] = [None if i % 3 == 2 else t for i, t in enumerate(draw(1))]

    def written(self) -> list[Tensor]:
        return [*self.params, *self.buffers, *(t for t in self.targets if t is not None)]

    def copy(self) -> Lists:
        other = object.__new__(Lists)
        for name, tensors in vars(self).items():
            setattr(other, name, [None if t is None else t.clone() for t in tensors])
        return other

    def step(self, backend: str | None = None, **options: Any) -> Lists:
        """This very object after a step."""
        options = {"lr": 0.3, "weight_decay": DECAY, "adapt": ADAPT, "ema_momentum": 0.9} | options
        options.setdefault("ema_targets", self.targets)
        lars_step_(self.params, self.grads, self.buffers, backend=backend, **options)
        return self

    def exact(self, lr: float = 0.3, momentum: float = 0.9, ema_momentum: float = 0.9, **other: Any) -> Lists:
        """A step in float64, tensor by tensor, on copies."""
        result = self.copy()
        for i in range(len(self.params)):
            p, g, b = (tensors[i].double() for tensors in (self.params, self.grads, self.buffers))
            if (other.get("adapt") or ADAPT)[i]:
                d = plain_ratio(p, g, DECAY[i], **other.get("numbers", {})) * (g + DECAY[i] * p)
            else:
                d = other.get("grad_scale", 1.0) * g + DECAY[i] * p
            result.buffers[i] = momentum * b + d
            result.params[i] = p - lr * result.buffers[i]
            if self.targets[i] is not None:
                rounded = result.params[i].to(self.params[i].dtype).double()
                result.targets[i] = ema_momentum * self.targets[i].double() + (1 - ema_momentum) * rounded
        return result


def plain_ratio(p: Tensor, g: Tensor, decay: float, trust: float = 1e-3, eps: float = 1e-8) -> float:
    p_norm, g_norm = p.square().sum().sqrt().item(), g.square().sum().sqrt().item()
    return 1.0 if p_norm == 0 or g_norm == 0 else trust * p_norm / (g_norm + decay * p_norm + eps)


def assert_same_bits(a: Lists, b: Lists) -> None:
    for ours, theirs in zip(a.written(), b.written(), strict=True):
        assert torch.equal(ours, theirs)
