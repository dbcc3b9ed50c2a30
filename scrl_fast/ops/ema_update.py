"""Exponential moving average of parameters: the target network follows the online one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scrl_fast import _native
from scrl_fast.backends import Backend, Operation, register


def ema_update_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float, *, backend: Backend | None = None
) -> None:
    """In place ``target = momentum * target + (1 - momentum) * source`` over two lists of tensors, in one launch."""
    if targets:
        _OPERATION.resolve(targets[0].device.type, backend)(targets, sources, momentum)


def ema_update_reference(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float) -> None:
    torch._foreach_lerp_(list(targets), list(sources), 1.0 - momentum)


def _native_ema_update_(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float) -> None:
    torch.ops.scrl_fast.ema_update_(list(targets), list(sources), momentum)


_OPERATION = register(
    Operation(
        "ema_update_",
        reference=ema_update_reference,
        native=_native_ema_update_,
        native_failure=lambda device_type: _native.op_failure("ema_update_", device_type),
    )
)
