"""The passes of BatchNorm [+ residual] [+ ReLU] in plain PyTorch, and statistics of several processes merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def update_running(running_mean: Tensor, running_var: Tensor, statistics: Tensor, momentum: float | Tensor) -> None:
    """Moves the running statistics by ``momentum``, in place, unless the batch had no row; decided on the device.

    statistics: ``[2C + 1]``, mean, biased variance and number of values a channel.
    """
    mean, var, count = split_statistics(statistics)
    share = (count > 0).to(running_mean.dtype) * momentum
    running_mean.lerp_(mean.to(running_mean.dtype), share)
    running_var.lerp_((var * (count / (count - 1).clamp(min=1))).to(running_var.dtype), share.to(running_var.dtype))


def split_statistics(statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mean ``[C]``, biased variance ``[C]`` and count ``[1]`` of ``[2C + 1]``, as views; rows before them stay."""
    channels = statistics.shape[-1] // 2
    mean, var, count = statistics.split([channels, channels, 1], -1)
    return mean, var, count


def gather_statistics(statistics: Tensor, group: Any = None) -> Tensor:
    """``[2C + 1]`` of this process to that of all processes of ``group``, by one collective."""
    processes = dist.get_world_size(group)
    rows = statistics.new_empty(processes * statistics.numel())
    dist.all_gather_into_tensor(rows, statistics, group=group)
    return merge_statistics(rows.view(processes, -1))


def merge_statistics(rows: Tensor) -> Tensor:
    """``[processes, 2C + 1]`` to ``[2C + 1]`` (Chan et al. 1979)."""
    means, variances, counts = split_statistics(rows)
    total = counts.sum(0)
    shares = counts / total.clamp(min=1)
    mean = (shares * means).sum(0)
    var = (shares * (variances + (means - mean).square())).sum(0)
    return torch.cat([mean, var, total])


def wide(tensor: Tensor) -> Tensor:
    """In the dtype of accumulation: float32, or float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def in_axes(values: Tensor, input: Tensor) -> Tensor:
    """One value a channel, ``[C]``, to be broadcast over ``[N, C, ...]``."""
    return values.view([1, -1] + [1] * (input.dim() - 2))


def all_but_channels(input: Tensor) -> list[int]:
    """The axes that a channel's statistics are taken over."""
    return [0, *range(2, input.dim())]


def batch_norm_act_reference(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    statistics: Tensor,
    eps: float,
    relu: bool,
) -> Tensor:
    """The operation in plain PyTorch, for given statistics ``[2C + 1]``, through which any derivative flows."""
    mean, var, _ = split_statistics(statistics)
    scale = (var + eps).rsqrt() * (1.0 if weight is None else weight.to(var.dtype))
    output = (wide(input) - in_axes(mean, input)) * in_axes(scale, input)
    if bias is not None:
        output = output + in_axes(bias.to(var.dtype), input)
    if residual is not None:
        output = output + wide(residual)
    return (F.relu(output) if relu else output).to(input.dtype)


def batch_norm_statistics_reference(input: Tensor) -> Tensor:
    """``[2C + 1]``: mean, biased variance and number of values a channel; zeros without rows."""
    values, channels = wide(input), input.shape[1]
    if not input.numel():
        return values.new_zeros(2 * channels + 1)
    var, mean = torch.var_mean(values, all_but_channels(input), correction=0)
    return torch.cat([mean, var, var.new_full((1,), input.numel() // channels)])


def _reference_apply(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> Tensor:
    return batch_norm_act_reference(input, weight, bias, residual, *rest)


def _reference_backward_sums(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    mean, var, _ = split_statistics(statistics)
    masked = _masked(grad, input, output, weight, bias, statistics, eps, relu)
    centred = (wide(input) - in_axes(mean, input)) * in_axes((var + eps).rsqrt(), input)
    axes = all_but_channels(input)
    sums = torch.stack([wide(masked).sum(axes), (wide(masked) * centred).sum(axes)])
    return sums, masked if output is not None else grad.new_empty(0)


def _masked(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    eps: float,
    relu: bool,
) -> Tensor:
    """The gradient before the ReLU."""
    if not relu:
        return grad
    if output is None:
        output = batch_norm_act_reference(wide(input), weight, bias, None, statistics, eps, False)
    return torch.where(output <= 0, 0, grad)


def _reference_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    sums: Tensor,
    eps: float,
    relu: bool,
) -> Tensor:
    mean, var, count = split_statistics(statistics)
    dy = wide(_masked(grad, input, None, weight, bias, statistics, eps, relu))
    invstd = (var + eps).rsqrt()
    centred = (wide(input) - in_axes(mean, input)) * in_axes(invstd, input)
    share = torch.where(count > 0, 1 / count.clamp(min=1), 0)
    dx = dy - in_axes(sums[0] * share, input) - centred * in_axes(sums[1] * share, input)
    return (dx * in_axes(invstd * (1.0 if weight is None else weight.to(var.dtype)), input)).to(input.dtype)


class Passes(NamedTuple):
    """The four passes over a map of one backend; csrc/cpu/batch_norm_act.cpp has their contracts."""

    statistics: Callable[..., Tensor]
    apply: Callable[..., Tensor]
    backward_sums: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Tensor]


REFERENCE = Passes(batch_norm_statistics_reference, _reference_apply, _reference_backward_sums, _reference_backward)
