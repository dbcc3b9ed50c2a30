"""Exponential moving average of parameters: the target network follows the online one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from scrl_fast.ops import _native
from scrl_fast.ops._arguments import check_scalar, check_sequence
from scrl_fast.ops._tensor_lists import bump_versions, call_on_flat, check_lists, check_memory, check_number_device
from scrl_fast.ops._triton import define_triton
from scrl_fast.ops.backends import Backend, Operation, register


@torch.no_grad()
def ema_update_(
    targets: Iterable[Tensor], sources: Iterable[Tensor], momentum: float | Tensor, *, backend: Backend | None = None
) -> None:
    """In place ``target = momentum * target + (1 - momentum) * source`` over two lists of tensors, in one launch.

    targets, sources: lists or generators of one length, the tensors at one place of equal shape, dtype (float32,
        float64, bfloat16, float16) and device, in any strided layout; dense tensors that lie alike are read as they
        are, others are copied. A target shares memory with no other tensor; it may be its own source.
    momentum: a number in [0, 1]; 1 leaves targets as they are, whatever the sources hold. Or a tensor of one float
        element on the CPU or the targets' device, whose range is not checked. On a GPU the kernel reads it: nothing
        synchronises, CUDA graphs may hold it.
    Arithmetic is float32, float64 for float64. Not differentiable. Raises ValueError or TypeError naming the first
    tensor that does not fit. Source: BYOL, arXiv 2006.07733, section 3.1.
    """
    check_scalar("momentum", momentum, 0, 1)
    targets, sources = check_sequence("targets", targets), check_sequence("sources", sources)
    if len(targets) == 0 and len(sources) == 0:
        return
    if len(targets) == 0 or not isinstance(targets[0], Tensor):
        check_lists(targets=targets, sources=sources)
    check_number_device("momentum", momentum, "targets", targets[0].device)
    _OPERATION.resolve(targets[0].device.type, backend)(targets, sources, momentum)


def ema_update_reference(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float | Tensor) -> None:
    """Plain PyTorch: ``_foreach_lerp_``, by which number or one-element tensor alike."""
    check_lists(targets=targets, sources=sources)
    check_memory({"targets": targets}, {"sources": sources}, in_place=True)
    if not isinstance(momentum, Tensor):
        if momentum < 1:  # lerp by 0 would let a NaN of the source through
            torch._foreach_lerp_(list(targets), list(sources), 1.0 - momentum)
        return
    for target, source in zip(targets, sources, strict=True):
        weight = (1.0 - momentum.to(target.device, torch.float64)).reshape(())
        moved = torch.lerp(target.double(), source.double(), weight).to(target.dtype)
        target.copy_(torch.where(weight > 0, moved, target))


def _dispatch_to(op: str) -> Callable[..., None]:
    """The operation by torch.ops.scrl_fast.<op>."""

    def ema_update(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float | Tensor) -> None:
        number, tensor = check_scalar("momentum", momentum, 0, 1)

        def call(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
            getattr(torch.ops.scrl_fast, op)(targets, sources, number, tensor)

        call_on_flat(call, {"targets": targets}, {"sources": sources}, op == "ema_update_", in_place=True)
        bump_versions(targets)

    return ema_update


def _fake(
    targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float, momentum_tensor: Tensor | None = None
) -> None:
    check_lists(targets=targets, sources=sources)


def _triton(*args: Any) -> None:
    from scrl_fast.kernels.ema_update import ema_update_ as launch  # imports triton only when it runs

    launch(*args)


define_triton("ema_update_triton_", _fake, _triton, written=("targets",))
if not _native.load_failure("_ops"):
    torch.library.register_fake("scrl_fast::ema_update_", _fake)

_OPERATION = register(
    Operation(
        "ema_update_",
        reference=ema_update_reference,
        native=_dispatch_to("ema_update_"),
        native_failure=lambda device_type: _native.op_failure("ema_update_", device_type),
        triton=_dispatch_to("ema_update_triton_"),
    )
)
