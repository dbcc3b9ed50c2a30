"""BatchNorm whose statistics are those of all processes' batches together, on a CPU as on a GPU.

``torch.nn.SyncBatchNorm`` refuses a CPU, reads its counts back to the host in every layer (the device idles until it
has caught up), and cannot gather from a process without rows under autocast. This one does none of that: counts stay
on the device and a process may have no rows at all. Under ``torch.compile`` it is plain arithmetic, which the compiler
joins with the ReLU and the addition behind it; PyTorch's own kernels for a GPU it can neither see into nor trace.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from scrl_fast.errors import UsageError
from scrl_fast.ops.backends import triton_failure


class RowBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d that lets a batch without rows pass: empty output, zero gradients, running statistics untouched.

    `synchronize_batch_norm` replaces it like any other BatchNorm.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[0] == 0:  # the affine part alone keeps weight and bias in the graph, as DDP expects
            return input * self.weight + self.bias
        return super().forward(input)


PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, RowBatchNorm)
ACTIVATION = ("drop", "act")  # what timm's BatchNormAct2d does after the normalisation, in this order


class SyncBatchNorm(_BatchNorm):
    """BatchNorm over the batches of all processes of ``group``; input ``[N, C, ...]``, N = 0 included.

    Every process of the group must call it, in the same order. Parameters, buffers and their names are those of
    ``nn.BatchNorm2d``. In eval mode nothing is exchanged. Equal to BatchNorm over the concatenated batches up to
    rounding; statistics are merged as means and squared deviations (Chan et al. 1979), so that a mean far from zero
    costs no digits.
    """

    group: Any = None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input must be [N, C, ...], got {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not (self.training or self.running_mean is None):
            return self._activated(super().forward(input))
        weight = torch.ones_like(self._wide(input)) if self.weight is None else self.weight
        bias = torch.zeros_like(weight) if self.bias is None else self.bias
        tracks = self.running_mean is not None and self.track_running_stats
        if _has_kernels(input):
            fused = tracks and self.momentum is not None and self.num_batches_tracked is not None
            tracked = (self.running_mean, self.running_var, self.num_batches_tracked, self.momentum) if fused else None
            if not tracks or fused:
                return self._activated(_NormalizeByKernels.apply(input, weight, bias, self.eps, self.group, tracked))
        output, mean, var, count = _Normalize.apply(input, weight, bias, self.eps, self.group)
        if tracks:
            self._track(mean, var, count)
        return self._activated(output)

    def _wide(self, input: Tensor) -> Tensor:
        return input.new_empty(self.num_features, dtype=torch.promote_types(input.dtype, torch.float32))

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Moves the running statistics, unless no process had a row; decided on the device."""
        assert self.running_mean is not None and self.running_var is not None
        share = (count > 0).to(self.running_mean.dtype)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += (count > 0).squeeze()
            if self.momentum is None:  # the plain mean over all batches
                share = share / self.num_batches_tracked.clamp(min=1)
        if self.momentum is not None:
            share = share * self.momentum
        unbiased = var * (count / (count - 1).clamp(min=1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)

    def _activated(self, output: Tensor) -> Tensor:
        for name in ACTIVATION:
            if name in self._modules:
                output = getattr(self, name)(output)
        return output


def synchronize_batch_norm(module: nn.Module, group: Any = None) -> nn.Module:
    """Replaces every BatchNorm inside ``module`` by `SyncBatchNorm`; returns the module (the new one if it is a norm).

    Parameters and buffers stay the same objects, so an optimizer made before keeps its hold on them.
    Raises ValueError naming a norm that does more than BatchNorm, and whose rest would be lost.
    """
    if isinstance(module, _BatchNorm):
        return _replaced(module, group)
    for name, child in module.named_children():
        setattr(module, name, synchronize_batch_norm(child, group))
    return module


def _replaced(norm: _BatchNorm, group: Any) -> SyncBatchNorm:
    acts = all(name in norm._modules for name in ACTIVATION)
    if type(norm) not in PLAIN and not isinstance(norm, SyncBatchNorm) and not acts:
        kind = f"{type(norm).__module__}.{type(norm).__qualname__}"
        raise UsageError(f"a norm of kind {kind} has no form for several processes: choose another --model.backbone")
    sync = SyncBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    for holder in ("_parameters", "_buffers", "_modules"):
        getattr(sync, holder).update(getattr(norm, holder))
    sync.group = group
    return sync.train(norm.training)


class _Normalize(torch.autograd.Function):
    """(output, mean, var, count) of input, weight and bias; the last three are of all processes, without gradient."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, eps: float, group: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        input = input.contiguous(memory_format=_layout(input))
        rows = _gathered(_local_statistics(input, eps), group)
        mean, var, count = _merged(rows, eps if input.is_cuda else None)
        ctx.save_for_backward(input, weight, mean, var, count)
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(mean, var, count)
        if not input.numel():
            return torch.empty_like(input), mean, var, count
        if torch.compiler.is_compiling():
            scale = weight.to(mean.dtype) * (var + eps).rsqrt()
            output = _wide(input) - _in_axes(mean, input)
            output = output * _in_axes(scale, input) + _in_axes(bias, input)
            if output.dtype != input.dtype:  # torch 2.11 loses the gradient behind a conversion to the same type
                output = output.to(input.dtype)
        elif input.is_cuda:
            output = torch.batch_norm_elemt(input, weight, bias, mean, (var + eps).rsqrt(), eps)
        else:
            output = F.batch_norm(input, mean, var, weight, bias, False, 0.0, eps)
        return output, mean, var, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, var, count = ctx.saved_tensors
        grad = grad.contiguous(memory_format=_layout(input))
        if input.is_cuda and not torch.compiler.is_compiling():
            counts, invstd = count.to(torch.int32), (var + ctx.eps).rsqrt()
            return *_backward_cuda(grad, input, weight, mean, invstd, counts, ctx.group), None, None
        differentiate = _backward_traced if torch.compiler.is_compiling() else _backward_plain
        return *differentiate(grad, input, weight, mean, var, count, ctx.eps, ctx.group), None, None


class _NormalizeByKernels(torch.autograd.Function):
    """The same for a GPU, in as few launches as can be: six and the collective forward, three and one backward.

    tracked: running mean, running variance, number of batches and momentum, or None.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, eps: float, group: Any, tracked: Any) -> Tensor:
        from scrl_fast.kernels.sync_batch_norm import merge_statistics  # imports triton only when it runs

        input = input.contiguous(memory_format=_layout(input))
        channels, wide = input.shape[1], torch.promote_types(input.dtype, torch.float32)
        if input.numel():
            count = torch.full((1,), input.numel() // channels, dtype=wide, device=input.device)
            own = torch.cat([*torch.batch_norm_stats(input, eps), count])
        else:
            own = torch.zeros(2 * channels + 1, dtype=wide, device=input.device)
        mean, invstd, counts = merge_statistics(_gathered(own, group), eps, tracked)
        ctx.save_for_backward(input, weight, mean, invstd, counts)
        ctx.group = group
        if not input.numel():
            return torch.empty_like(input)
        return torch.batch_norm_elemt(input, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, invstd, counts = ctx.saved_tensors
        grad = grad.contiguous(memory_format=_layout(input))
        return *_backward_cuda(grad, input, weight, mean, invstd, counts, ctx.group), None, None, None


def _has_kernels(input: Tensor) -> bool:
    """Not in float64: a kernel takes eps and momentum as float32."""
    plain = input.dtype != torch.float64 and not torch.compiler.is_compiling()
    return input.is_cuda and plain and not triton_failure("cuda")


def _layout(input: Tensor) -> torch.memory_format:
    if input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _wide(input: Tensor) -> Tensor:
    return input.to(torch.promote_types(input.dtype, torch.float32))


def _all_but_channels(input: Tensor) -> list[int]:
    return [0, *range(2, input.dim())]


def _in_axes(values: Tensor, input: Tensor) -> Tensor:
    """One value a channel, ``[C]``, to be broadcast over ``[N, C, ...]``."""
    return values.view([1, -1] + [1] * (input.dim() - 2))


def _local_statistics(input: Tensor, eps: float) -> Tensor:
    """``[2C + 1]``: mean, biased variance and number of values a channel; zeros without rows. float32 or wider.

    On a GPU 1 / sqrt(variance + eps) stands in place of the variance, as `_NormalizeByKernels` sends it: one process
    may run compiled and another not.
    """
    channels = input.shape[1]
    wide = torch.promote_types(input.dtype, torch.float32)
    if not input.numel():
        return torch.zeros(2 * channels + 1, dtype=wide, device=input.device)
    count = torch.full((1,), input.numel() // channels, dtype=wide, device=input.device)
    if torch.compiler.is_compiling():
        var, mean = torch.var_mean(_wide(input), _all_but_channels(input), correction=0)
        var = (var + eps).rsqrt() if input.is_cuda else var
    elif input.is_cuda:
        mean, var = torch.batch_norm_stats(input, eps)
    else:
        mean, var = torch.batch_norm_update_stats(_wide(input), None, None, 0.0)
    return torch.cat([mean, var, count])


def _gathered(statistics: Tensor, group: Any) -> Tensor:
    """``[processes, 2C + 1]``, by one collective into one tensor."""
    rows = statistics.new_empty(dist.get_world_size(group), statistics.numel())
    dist.all_gather_into_tensor(rows.view(-1), statistics, group=group)
    return rows


def _merged(rows: Tensor, eps: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, variance, count) of all processes. eps: where rows hold 1 / sqrt(variance + eps)."""
    channels = rows.shape[1] // 2
    means, variances, counts = rows.split([channels, channels, 1], dim=1)
    if eps is not None:  # 0 where a process had no rows; its count takes it out
        variances = torch.where(counts > 0, (variances.pow(-2) - eps).clamp(min=0), 0)
    total = counts.sum(0)
    shares = counts / total.clamp(min=1)
    mean = (shares * means).sum(0)
    var = (shares * (variances + (means - mean).square())).sum(0)
    return mean, var, total


def _total(one: Tensor, other: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    both = torch.stack([one, other])
    dist.all_reduce(both, group=group)
    return both[0], both[1]


def _backward_cuda(
    grad: Tensor, input: Tensor, weight: Tensor, mean: Tensor, invstd: Tensor, counts: Tensor, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """counts: int32, of one or of several processes; only their sum matters."""
    if not input.numel():
        nothing = torch.zeros_like(mean)
        _total(nothing, nothing, group)
        return torch.empty_like(input), nothing.to(weight.dtype), nothing.to(weight.dtype)
    sums = torch.batch_norm_backward_reduce(grad, input, mean, invstd, weight, True, True, True)
    sum_dy, sum_dy_xmu = _total(sums[0], sums[1], group)
    grad_input = torch.batch_norm_backward_elemt(grad, input, mean, invstd, weight, sum_dy, sum_dy_xmu, counts)
    return grad_input, sums[2], sums[3]


def _backward_traced(
    grad: Tensor, input: Tensor, weight: Tensor, mean: Tensor, var: Tensor, count: Tensor, eps: float, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """In operations that a compiler sees through; the two sums in one pass over both tensors."""
    dy, invstd = _wide(grad), (var + eps).rsqrt()
    normalized = (_wide(input) - _in_axes(mean, input)) * _in_axes(invstd, input)
    axes = _all_but_channels(input)
    dw, db = (dy * normalized).sum(axes), dy.sum(axes)
    sum_dw, sum_db = _total(dw, db, group)
    total = count.clamp(min=1)
    dx = dy - _in_axes(sum_db / total, input) - normalized * _in_axes(sum_dw / total, input)
    dx = dx * _in_axes(weight.to(mean.dtype) * invstd, input)
    return dx.to(input.dtype), dw.to(weight.dtype), db.to(weight.dtype)


def _backward_plain(
    grad: Tensor, input: Tensor, weight: Tensor, mean: Tensor, var: Tensor, count: Tensor, eps: float, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """First as if the statistics were constants, then what flows through them."""
    wide, dtype = mean.dtype, input.dtype
    grad, input, scale = grad.to(wide), input.to(wide), weight.to(wide)
    if input.numel():
        backward = torch.ops.aten.native_batch_norm_backward
        mask = [True, True, True]
        dx, dw, db = backward(grad, input, scale, mean, var, None, None, False, eps, mask)
    else:
        dx, dw, db = torch.empty_like(input), torch.zeros_like(mean), torch.zeros_like(mean)
    sum_dw, sum_db = _total(dw, db, group)
    invstd = (var + eps).rsqrt()
    scale = scale * invstd / count.clamp(min=1)
    slope = scale * invstd * sum_dw
    offset = scale * sum_db - slope * mean
    dx = dx.addcmul_(input, _in_axes(slope, input), value=-1).sub_(_in_axes(offset, input))
    return dx.to(dtype), dw.to(weight.dtype), db.to(weight.dtype)
