"""What the backward formulas of several operations share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad

# bound once: each look-up would show in a small call
_modes = torch._C._len_torch_dispatch_stack
_transformed = torch._C._are_functorch_transforms_active
_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


def differentiated_otherwise() -> bool:
    """Whether torch.func.grad, vjp, jvp or forward mode is at work: a backward formula cannot serve these.

    torch.library's formulas raise below torch.func's transforms and lose the tangent of forward mode in silence, in a
    graph that is compiled, too; who asks takes the reference implementation instead. torch.func.vmap alone needs none
    of this.
    """
    if forward_ad._current_level >= 0:
        return True
    if not _transformed():
        return False
    vmap = torch._C._functorch.TransformType.Vmap
    if torch.compiler.is_compiling():  # which can ask for the innermost transform only; the outermost has level 1
        innermost = retrieve_current_functorch_interpreter()
        return innermost.key() != vmap or innermost.level() > 1
    return any(each.key() != vmap for each in torch._C._functorch.get_interpreter_stack() or ())


def is_plain_one(factor: Tensor) -> bool:
    """Whether what comes in is the 1 of a plain ``loss.backward()``, so that gradients at hand can be handed out.

    False wherever looking would synchronise or the value is traced or batched; and where the graph stays: who writes
    into the gradient handed out would spoil the next pass over it.
    """
    return (
        type(factor) is Tensor
        and factor.is_cpu
        and not factor.dim()
        and not _keeps_graph()
        and not _modes()  # modes: make_fx, fake tensors
        and not _transformed()
        and not _legacy_batched(factor)  # torch.autograd.grad(is_grads_batched=True)
        and factor.item() == 1
    )


def refuse_double_backward(
    operation: str, grads: Sequence[Tensor | None], sources: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients that a backward formula returns, made so that differentiating them raises RuntimeError.

    sources: what the gradients depend on. The refusal is part of the graph between these and the gradients, so that
    every way to a second derivative meets it: one that is silently missing would be worse than none.
    For calls under ``create_graph=True``, where a backward formula finds ``torch.is_grad_enabled()``.
    """
    return tuple(None if grad is None else _Refuse.apply(grad.detach(), operation, *sources) for grad in grads)


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(grad: Tensor, operation: str, *sources: Tensor | None) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.operation = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{ctx.operation} is differentiable once: double backward is not implemented")
