"""What the backward formulas of several operations share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def refuse_double_backward(operation: str, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients that a backward formula returns, made so that differentiating them raises RuntimeError.

    Only under ``create_graph=True`` is anything added. A second derivative that is silently missing would be worse than
    none, so the gradients require grad even where nothing that came in does.
    """
    if not torch.is_grad_enabled():
        return grads
    return tuple(None if grad is None else _Refuse.apply(grad.detach().requires_grad_(), operation) for grad in grads)


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(grad: Tensor, operation: str) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.operation = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{ctx.operation} is differentiable once: double backward is not implemented")
