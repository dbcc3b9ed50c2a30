"""BatchNorm, a residual and ReLU as one operation: a map is read twice and written once in each direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scrl_fast.ops import _native
from scrl_fast.ops._arguments import check_flag, check_number
from scrl_fast.ops._autograd import differentiated_otherwise, refuse_double_backward, transformed
from scrl_fast.ops._triton import define_triton
from scrl_fast.ops.backends import Backend, Operation, register
from scrl_fast.ops.batch_norm_reference import (
    REFERENCE,
    Passes,
    batch_norm_act_reference,
    batch_norm_statistics_reference,
    gather_statistics,
    update_running,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def batch_norm_act(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
    synchronized: bool = False,
    group: Any = None,
    backend: Backend | None = None,
) -> Tensor:
    """``relu(batch_norm(input) + residual)``; residual and ReLU are optional.

    input: ``[N, C]`` or ``[N, C, ...]``, float32, float64, bfloat16 or float16. residual: of the shape, dtype and
    device of input. weight, bias, running_mean, running_var: ``[C]`` of a floating dtype. Statistics are accumulated in
    float32 (float64 for float64 input) and merged in a fixed order: the same bits for any number of threads.
    training: normalise by the statistics of the batch, and move the running statistics towards them by ``momentum``;
    otherwise normalise by the running statistics. A batch without rows gives an empty output and zero gradients, and
    the running statistics stay. synchronized: the batch is that of all processes of ``group`` (default: all), by one
    collective forward and one backward; every process must call, also one without rows.
    ``[N, C]`` and channels_last maps ``[N, C, H, W]`` have compiled forms; other layouts take the reference.
    Returns a tensor of the shape, dtype and layout of input. Differentiable once with respect to input, weight, bias
    and residual; a second derivative raises RuntimeError. torch.func's transforms take the reference.
    Raises TypeError or ValueError naming the argument. Source: BatchNorm, arXiv 1502.03167; merged statistics, Chan et
    al. 1979.
    """
    _check(input, {"residual": residual})
    for name, values in (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        _check_channels(name, values, input)
    training, relu = check_flag("training", training), check_flag("relu", relu)
    synchronized = check_flag("synchronized", synchronized)
    momentum, eps = check_number("momentum", momentum, 0, 1), check_number("eps", eps, 0)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given together")
    if not training and running_mean is None:
        raise ValueError("running_mean must be given with training=False")
    if training and not synchronized and input.numel() == input.shape[1]:
        raise ValueError(f"input must have more than one value a channel in training, got shape {list(input.shape)}")
    normalize = _OPERATION.resolve(input.device.type, backend)
    output, statistics = normalize(
        input, weight, bias, residual, running_mean, running_var, training, eps, relu, synchronized, group
    )
    if training and running_mean is not None and running_var is not None:
        update_running(running_mean, running_var, statistics, momentum)
    return output


def _check(input: Tensor, others: dict[str, Tensor | None]) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor, got {type(input).__name__}")
    if input.dtype not in DTYPES:
        raise TypeError(f"input must be float32, float64, bfloat16 or float16, got {input.dtype}")
    if input.dim() < 2:
        raise ValueError(f"input must be [N, C, ...], got {list(input.shape)}")
    for name, tensor in others.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype != input.dtype:
            raise TypeError(f"{name} must have the dtype of input, {input.dtype}, got {tensor.dtype}")
        if tensor.shape != input.shape:
            raise ValueError(f"{name} must have the shape of input, {list(input.shape)}, got {list(tensor.shape)}")
        if tensor.device != input.device:
            raise ValueError(f"{name} must be on {input.device} like input, got {tensor.device}")


def _check_channels(name: str, values: Tensor | None, input: Tensor) -> None:
    if values is None:
        return
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(values).__name__}")
    if not values.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {values.dtype}")
    if values.shape != input.shape[1:2]:
        raise ValueError(f"{name} must be [{input.shape[1]}], one value a channel of input, got {list(values.shape)}")
    if values.device != input.device:
        raise ValueError(f"{name} must be on {input.device} like input, got {values.device}")


def _constant_statistics(running_mean: Tensor, running_var: Tensor, input: Tensor) -> Tensor:
    """``[2C + 1]`` of running statistics; the count of 0 says that nothing flows through them."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    return torch.cat([running_mean.to(dtype), running_var.to(dtype), running_mean.new_zeros(1, dtype=dtype)])


def _plain_reference(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    synchronized: bool,
    group: Any,
) -> tuple[Tensor, Tensor]:
    if training and synchronized:
        return _NormalizeAct.apply(input, weight, bias, residual, None, eps, relu, (group,), REFERENCE)
    if training:
        statistics = batch_norm_statistics_reference(input)
    else:
        assert running_mean is not None and running_var is not None
        statistics = _constant_statistics(running_mean, running_var, input)
    return batch_norm_act_reference(input, weight, bias, residual, statistics, eps, relu), statistics.detach()


# ---- compiled forms ----


def _rows_lie_dense(input: Tensor) -> bool:
    """Whether compiled forms take the layout: [N, C], or [N, C, H, W] whose channels are adjacent."""
    if input.dim() == 4:
        return input.is_contiguous(memory_format=torch.channels_last) or input.stride(1) == 1
    return input.dim() == 2


def _dense(tensor: Tensor) -> Tensor:
    layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    return tensor.contiguous(memory_format=layout)


def _dispatch_to(suffix: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The implementation that calls ``torch.ops.scrl_fast.<pass><suffix>``."""
    operators: list[Any] = [getattr(torch.ops.scrl_fast, name + suffix, None) for name in _NAMES]
    passes = Passes(*operators)

    def normalize(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        eps: float,
        relu: bool,
        synchronized: bool,
        group: Any,
    ) -> tuple[Tensor, Tensor]:
        tensors = [each for each in (input, weight, bias, residual) if each is not None]
        if not _rows_lie_dense(input) or differentiated_otherwise(*tensors) or transformed(*tensors):
            return _plain_reference(
                input, weight, bias, residual, running_mean, running_var, training, eps, relu, synchronized, group
            )
        statistics = None
        if not training:
            assert running_mean is not None and running_var is not None
            statistics = _constant_statistics(running_mean, running_var, input)
        where = (group,) if synchronized else None
        return _NormalizeAct.apply(input, weight, bias, residual, statistics, eps, relu, where, passes)

    return normalize


class _NormalizeAct(torch.autograd.Function):
    """(output, statistics [2C + 1]); the statistics, of all processes where there are several, have no gradient.

    Where a residual stands between norm and ReLU, the output, which the next layer keeps anyway, tells the ReLU's mask.
    Elsewhere the mask is computed again from the input. Nothing else is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        statistics: Tensor | None,
        eps: float,
        relu: bool,
        processes: tuple[Any] | None,
        passes: Passes,
    ) -> tuple[Tensor, Tensor]:
        ctx.synchronized = processes if statistics is None else None
        ctx.options, ctx.passes, ctx.had_residual = (eps, relu), passes, residual is not None
        ctx.dtypes = [None if values is None else values.dtype for values in (weight, bias)]
        input = input if passes is REFERENCE else _dense(input)
        residual = residual if residual is None or passes is REFERENCE else _dense(residual)
        affine = [None if values is None else _values(values, input) for values in (weight, bias)]
        if statistics is None:
            statistics = passes.statistics(input)
            if ctx.synchronized:
                statistics = gather_statistics(statistics, *ctx.synchronized)
        output = passes.apply(input, residual, *affine, statistics, eps, relu)
        masks = relu and residual is not None
        ctx.save_for_backward(input, *affine, statistics, output if masks else None)
        ctx.mark_non_differentiable(statistics)
        return output, statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, statistics, output = ctx.saved_tensors
        eps, relu = ctx.options
        incoming, passes = grad, ctx.passes
        grad = grad if passes is REFERENCE else _dense(grad)
        sums, masked = passes.backward_sums(grad, input, output, weight, bias, statistics, eps, relu)
        if output is not None:
            grad, relu = masked, False
        of_input, of_weight, of_bias, of_residual = ctx.needs_input_grad[:4]
        total = sums
        if ctx.synchronized:
            total = sums.clone()
            dist.all_reduce(total, group=ctx.synchronized[0])
        grads = [
            passes.backward(grad, input, weight, bias, statistics, total, eps, relu) if of_input else None,
            sums[1].to(ctx.dtypes[0]) if of_weight else None,
            sums[0].to(ctx.dtypes[1]) if of_bias else None,
            grad if of_residual else None,
        ]
        if torch.is_grad_enabled():  # create_graph=True
            sources = (incoming, input, weight, bias)
            return *refuse_double_backward("batch_norm_act", grads, sources), *[None] * 5
        return *grads, *[None] * 5


def _values(values: Tensor, input: Tensor) -> Tensor:
    return values.to(torch.promote_types(input.dtype, torch.float32)).contiguous()


def _fake_statistics(input: Tensor) -> Tensor:
    return input.new_empty(2 * input.shape[1] + 1, dtype=torch.promote_types(input.dtype, torch.float32))


def _fake_apply(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    eps: float,
    relu: bool,
) -> Tensor:
    return torch.empty_like(input)


def _fake_backward_sums(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    masked = torch.empty_like(input) if output is not None else input.new_empty(0)
    return statistics.new_empty((2, input.shape[1])), masked


def _fake_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    sums: Tensor,
    eps: float,
    relu: bool,
) -> Tensor:
    return torch.empty_like(input)


def _launch(name: str) -> Callable[..., Any]:
    def launch(*arguments: Any) -> Any:
        import scrl_fast.kernels.batch_norm_act as kernels  # imports triton, only when it runs

        return getattr(kernels, name)(*arguments)

    return launch


_NAMES = ("batch_norm_statistics", "batch_norm_act", "batch_norm_act_backward_sums", "batch_norm_act_backward")
_FAKES: tuple[Callable[..., Any], ...] = (_fake_statistics, _fake_apply, _fake_backward_sums, _fake_backward)
for _name, _fake in zip(_NAMES, _FAKES, strict=True):
    define_triton(f"{_name}_triton", _fake, _launch(_name))
    if not _native.load_failure("_ops"):
        torch.library.register_fake(f"scrl_fast::{_name}", _fake)

_OPERATION = register(
    Operation(
        "batch_norm_act",
        reference=_plain_reference,
        native=_dispatch_to(""),
        native_failure=lambda device_type: _native.op_failure("batch_norm_act", device_type),
        native_on=("cpu",),
        triton=_dispatch_to("_triton"),
    )
)
