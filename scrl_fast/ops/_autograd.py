"""What the backward formulas of several operations share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# torch keeps these to itself. They are bound once, because each look-up would show in a small call. A release may move
# or drop them: then every function below takes its public, slower path.
try:
    from torch._C import _are_functorch_transforms_active as _transformed
    from torch._C import _AutoDispatchBelowAutograd
    from torch._C import _len_torch_dispatch_stack as _modes
    from torch._C._autograd import _get_current_graph_task_keep_graph as _keeps_graph
    from torch._C._functorch import TransformType, get_interpreter_stack
    from torch._C._functorch import is_legacy_batchedtensor as _legacy_batched
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

    _ = forward_ad._current_level
    PRIVATE = True
except (ImportError, AttributeError):
    PRIVATE = False
below_autograd: Any = _AutoDispatchBelowAutograd if PRIVATE else torch.no_grad
"""A context in which an operator's own autograd formula is passed over, or finds that nothing is wanted."""


def transformed(*tensors: Tensor) -> bool:
    """Whether a transform of torch.func is at work, be it torch.func.vmap alone."""
    return _transformed() if PRIVATE else not all(map(_has_memory, tensors))


def differentiated_otherwise(*tensors: Tensor) -> bool:
    """Whether torch.func.grad, vjp, jvp or forward mode is at work: a backward formula cannot serve these.

    tensors: those that may be differentiated. torch.library's formulas raise below torch.func's transforms and lose the
    tangent of forward mode in silence, in a graph that is compiled, too; callers take the reference implementation
    instead. torch.func.vmap alone needs none of this.
    """
    if not PRIVATE:
        return not all(forward_ad.unpack_dual(tensor).tangent is None and _has_memory(tensor) for tensor in tensors)
    if forward_ad._current_level >= 0:
        return True
    if not _transformed():
        return False
    vmap = TransformType.Vmap
    if torch.compiler.is_compiling():  # which can ask for the innermost transform only; the outermost has level 1
        innermost = retrieve_current_functorch_interpreter()
        return innermost.key() != vmap or innermost.level() > 1
    return any(each.key() != vmap for each in get_interpreter_stack() or ())


def _has_memory(tensor: Tensor) -> bool:
    """False for the tensors that torch.func's transforms hand out."""
    if torch.compiler.is_compiling():
        return True
    try:
        tensor.data_ptr()
        return True
    except RuntimeError:
        return False


def is_plain_one(factor: Tensor) -> bool:
    """Whether the incoming gradient is the 1 of ``loss.backward()``.

    Then the gradients of the forward pass can be returned as they are. False where reading the value would synchronise,
    where it is traced or batched, and where the graph is kept: a write into the returned gradient would spoil the next
    pass over the graph.
    """
    return (
        PRIVATE
        and type(factor) is Tensor
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
