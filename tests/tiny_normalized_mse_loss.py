"""What the tests of the losses share: rows drawn from a seed, the losses in plain PyTorch, a loss and its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import implementations
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [(2, 3), (6, 16), (10, 37), (34, 256), (18, 300), (4, 4100)]
REDUCTIONS = ["none", "sum", "mean"]
everywhere = pytest.mark.parametrize("device, backend", implementations("normalized_mse_loss"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def rows(count: int, width: int, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0) -> Tensor:
    """Rows of lengths 0.1 to 10, reproducible on every device."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, width, generator=generator, dtype=torch.float64)
    lengths = 10 ** (2 * torch.rand(count, 1, generator=generator, dtype=torch.float64) - 1)
    return (values * lengths).to(device, dtype).requires_grad_()


def plain_rows(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """As PyTorch's own users write it; a second opinion beside the reference in the package."""
    losses = 2 - 2 * (F.normalize(input, dim=-1) * F.normalize(target, dim=-1)).sum(-1)
    return losses if reduction == "none" else getattr(losses, reduction)()


def plain_two_views(online: Tensor, target: Tensor) -> Tensor:
    (p1, p2), (z1, z2) = online.chunk(2), target.chunk(2)
    return (plain_rows(p1, z2, "none") + plain_rows(p2, z1, "none")).mean()


def gradients(loss: Tensor, *inputs: Tensor, seed: int = 1) -> tuple[Tensor, ...]:
    """Loss and its gradients for a random cotangent, the same one for every dtype."""
    cotangent = torch.randn(loss.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return loss, *torch.autograd.grad(loss, inputs, cotangent.to(loss.device, loss.dtype))
