"""The loss of SCRL and BYOL: squared distance of L2-normalised vectors, ``2 - 2 cos`` a row, in 0 to 4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from scrl_fast.ops import _native
from scrl_fast.ops._arguments import FLOAT_DTYPES, check_room, shown
from scrl_fast.ops._autograd import (
    below_autograd,
    differentiated_otherwise,
    is_plain_one,
    refuse_double_backward,
    transformed,
)
from scrl_fast.ops._triton import define_triton
from scrl_fast.ops.backends import Backend, Operation, register

Reduction = Literal["none", "sum", "mean"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)


_MANY = 1 << 28  # elements from which the machine's memory is asked for


def normalized_mse_loss(
    input: Tensor, target: Tensor, reduction: Reduction = "mean", *, backend: Backend | None = None
) -> Tensor:
    """``2 - 2 cos(input row, target row)``: the squared distance of the two rows after L2 normalisation.

    input, target: ``[..., D]`` of one shape, dtype (float32, float64, bfloat16, float16) and device. A row shorter than
    1e-12 is divided by 1e-12 instead of its length, as torch.nn.functional.normalize does: a zero row costs 2.
    reduction: "none" gives ``[...]``, "mean" and "sum" a scalar; all in the dtype of input, accumulated in float32 or
    wider. No rows at all: 0, not NaN, so that a batch without boxes trains on.
    Differentiable once, with respect to input, and to target only if it requires a gradient; a second derivative raises
    RuntimeError. torch.func.grad, vjp and jvp and forward mode take the reference, which any derivative goes through.
    Raises TypeError or ValueError naming the argument. Source: BYOL, arXiv 2006.07733, eq. 2.
    """
    _check("input", input, "target", target)
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {shown(reduction)}")
    return _ROWS.resolve(input.device.type, backend)(input, target, reduction)


def two_view_loss(online: Tensor, target: Tensor, *, backend: Backend | None = None) -> Tensor:
    """The training loss: each view's prediction against the other view's target, summed, mean over N pairs; 0 to 8.

    online, target: ``[2N, D]`` of one dtype (float32, float64, bfloat16, float16) and device; rows 0..N-1 are view 1,
    rows N..2N-1 view 2 of the same N regions. Online row i meets target row i + N, and i + N meets i, without a copy.
    Returns a scalar: float32, or float64 for float64 rows, since it is what gets logged and scaled. N = 0 gives 0 with
    a zero gradient. Gradients and errors as `normalized_mse_loss`. Source: SCRL, arXiv 2103.06122, eq. 3.
    """
    _check("online", online, "target", target)
    if online.dim() != 2 or online.shape[0] % 2:
        raise ValueError(f"online must be [2N, D], view 1 then view 2, got {list(online.shape)}")
    return _TWO_VIEW.resolve(online.device.type, backend)(online, target)


def _check(input_name: str, input: Tensor, target_name: str, target: Tensor) -> None:
    for name, tensor in ((input_name, input), (target_name, target)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if input.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{input_name} must be float32, float64, bfloat16 or float16, got {input.dtype}")
    if target.dtype != input.dtype:
        raise TypeError(f"{target_name} must have the dtype of {input_name}, {input.dtype}, got {target.dtype}")
    if not input.dim():
        raise ValueError(f"{input_name} must have at least one dimension, got a scalar")
    if target.shape != input.shape:
        raise ValueError(
            f"{target_name} must have the shape of {input_name}, {list(input.shape)}, got {list(target.shape)}"
        )
    if target.device != input.device:
        raise ValueError(f"{target_name} must be on {input.device} like {input_name}, got {target.device}")
    if (elements := input.numel()) > _MANY:
        check_room(input_name, elements, input.itemsize, input.device.type)


# ---- reference ----


def normalized_mse_loss_reference(input: Tensor, target: Tensor, reduction: Reduction = "mean") -> Tensor:
    losses = _row_losses(input, target)
    if reduction != "none":
        losses = losses.sum() / (max(losses.numel(), 1) if reduction == "mean" else 1)
    return losses.to(input.dtype)


def two_view_loss_reference(online: Tensor, target: Tensor) -> Tensor:
    pairs = online.shape[0] // 2
    return _row_losses(online, target.roll(pairs, 0)).sum() / max(pairs, 1)


def _row_losses(input: Tensor, target: Tensor) -> Tensor:
    wide = torch.promote_types(input.dtype, torch.float32)
    return 2 - 2 * (F.normalize(input.to(wide), dim=-1) * F.normalize(target.to(wide), dim=-1)).sum(-1)


# ---- compiled ----
# Between passes over megabytes the processor's caches have forgotten Python's own data, and each small thing done here
# takes 2 to 15 us instead of 0.1 to 1. So these functions are few, and look up little.

_MEAN = REDUCTIONS.index("mean")


def _rows(tensor: Tensor) -> Tensor:
    """``[rows, D]`` with the elements of a row adjacent; copied only where it lies otherwise."""
    rows = tensor if tensor.dim() == 2 else tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])
    return rows if rows.is_contiguous() or rows.shape[1] < 2 or rows.stride(1) == 1 else rows.contiguous()


def _dispatch_rows_to(operator: Any) -> Callable[..., Tensor]:
    """The implementation of `normalized_mse_loss` that calls the operator."""

    def rows(input: Tensor, target: Tensor, reduction: Reduction) -> Tensor:
        if differentiated_otherwise(input, target):
            return normalized_mse_loss_reference(input, target, reduction)
        loss = _call(operator, _rows(input), _rows(target), False, REDUCTIONS.index(reduction))
        return (loss if reduction != "none" else loss.reshape(input.shape[:-1])).to(input.dtype)

    return rows


def _dispatch_two_views_to(operator: Any) -> Callable[..., Tensor]:
    """The implementation of `two_view_loss` that calls the operator."""

    def two_views(online: Tensor, target: Tensor) -> Tensor:
        if differentiated_otherwise(online, target):
            return two_view_loss_reference(online, target)
        return _call(operator, _rows(online), _rows(target), True, _MEAN)

    return two_views


def _call(operator: Any, input: Tensor, target: Tensor, two_views: bool, reduction: int) -> Tensor:
    if not torch.is_grad_enabled():
        return operator(input, target, two_views, reduction, False, False)[0]
    if transformed(input, target):  # torch.func.vmap, inside which no tensor tells that a gradient will be wanted of it
        return operator(input, target, two_views, reduction, True, True)[0]
    of_input, of_target = input.requires_grad, target.requires_grad
    if (of_input or of_target) and not torch.compiler.is_compiling():
        return _Eager.apply(input, target, operator, two_views, reduction, of_input, of_target)
    return operator(input, target, two_views, reduction, of_input, of_target)[0]


class _Eager(torch.autograd.Function):
    """The operator's own autograd formula with less around it. Compilers and torch.func.vmap take the operator's.

    A call of 8 rows, forward and backward, takes 39 us through this and 64 through torch.library's formula (two Xeon
    cores); a Function that does nothing takes 25.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, operator: Any, *options: Any) -> Tensor:
        with below_autograd():  # past the formula, which would only find that nothing is wanted
            loss, *grads = operator(input, target, *options)
        _remember(ctx, input, target, options, grads)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grads[0]), None, None, None, None, None


def _fake(
    input: Tensor, target: Tensor, two_views: bool, reduction: int, grad_input: bool, grad_target: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(input.dtype, torch.float32)
    loss = input.new_empty(() if reduction else input.shape[:1], dtype=wide)
    of_input, of_target = (input.new_empty(input.shape if wanted else (0,)) for wanted in (grad_input, grad_target))
    return loss, of_input, of_target


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, target, *options = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    _remember(ctx, input, target, options, output[1:])


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, grad_loss), None, None, None, None


def _remember(ctx: Any, input: Tensor, target: Tensor, options: Sequence[Any], grads: Sequence[Tensor]) -> None:
    two_views, reduction, of_input, of_target = options
    ctx.made = of_input, of_target
    # the rows themselves are kept so that a second derivative can be refused
    ctx.save_for_backward(*grads, input if of_input else None, target if of_target else None)
    divided_later = input.dtype is torch.float16 and reduction == _MEAN
    ctx.divisor = max(input.shape[0] // (2 if two_views else 1), 1) if divided_later else 1


def _gradients(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients that the forward pass has made, multiplied by the incoming gradient."""
    *made, input, target = ctx.saved_tensors
    if grad_loss is None:
        return None, None
    as_made = ctx.divisor == 1 and is_plain_one(grad_loss)  # a pass over the data saved
    grads: list[Tensor | None] = [None, None]
    for k, wanted in enumerate(ctx.needs_input_grad[:2]):
        if wanted:
            if not ctx.made[k]:
                raise RuntimeError("normalized_mse_loss: grad_input and grad_target must ask for the gradients wanted")
            grads[k] = made[k] if as_made else _scaled(made[k], grad_loss, ctx.divisor)
    if torch.is_grad_enabled():  # create_graph=True
        return refuse_double_backward("normalized_mse_loss", grads, (grad_loss, input, target))
    return tuple(grads)


def _scaled(grad: Tensor, factor: Tensor, divisor: int) -> Tensor:
    factor = factor / divisor if divisor > 1 else factor
    return grad * factor if not factor.dim() else (grad * factor.unsqueeze(-1)).to(grad.dtype)


def _triton_impl(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from scrl_fast.kernels.normalized_mse_loss import normalized_mse_loss as launch  # imports triton only when it runs

    return launch(*args)


def _register_autograd(op: str) -> None:
    torch.library.register_autograd(f"scrl_fast::{op}", _backward, setup_context=_setup_context)


define_triton("normalized_mse_loss_triton", _fake, _triton_impl)
_register_autograd("normalized_mse_loss_triton")
_triton, _native_operator = torch.ops.scrl_fast.normalized_mse_loss_triton.default, None
if not _native.load_failure("_ops"):  # or there is no such operator, which native_failure says
    torch.library.register_fake("scrl_fast::normalized_mse_loss", _fake)
    _register_autograd("normalized_mse_loss")
    _native_operator = torch.ops.scrl_fast.normalized_mse_loss.default

_ROWS, _TWO_VIEW = (
    register(
        Operation(
            name,
            reference=reference,
            native=dispatch_to(_native_operator),
            native_failure=lambda device_type: _native.op_failure("normalized_mse_loss", device_type),
            triton=dispatch_to(_triton),
        )
    )
    for name, reference, dispatch_to in (
        ("normalized_mse_loss", normalized_mse_loss_reference, _dispatch_rows_to),
        ("two_view_loss", two_view_loss_reference, _dispatch_two_views_to),
    )
)
