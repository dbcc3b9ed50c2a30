"""LARS over lists of tensors: norms, weight decay, adaptation, momentum, update and the target's average, fused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from scrl_fast.ops import _native
from scrl_fast.ops._arguments import check_number, check_scalar, check_sequence, shown
from scrl_fast.ops._tensor_lists import bump_versions, call_on_flat, check_lists, check_memory, check_number_device
from scrl_fast.ops._triton import define_triton
from scrl_fast.ops.backends import Backend, Operation, register

PLAIN, ADAPT, PLAIN_BY_LR = 0.0, 1.0, 2.0
"""How a tensor's gradient is scaled: by grad_scale, by the LARS ratio, or by the learning rate."""


class LarsSettings(NamedTuple):
    """The numbers of a step as kernels take them: rows for groups of tensors that share them, and each tensor's row."""

    rows: list[tuple[float, ...]]
    """(lr, momentum, weight_decay, trust_coefficient, eps, grad_scale, mode) of each group."""
    row_of: list[int]
    """For each tensor its place in rows."""
    ema_momentum: float
    lr_tensor: Tensor | None
    """One element for all rows or one for each, that the row's lr multiplies."""
    momentum_tensor: Tensor | None
    """Likewise."""
    ema_momentum_tensor: Tensor | None


@torch.no_grad()
def lars_step_(
    params: Iterable[Tensor],
    grads: Iterable[Tensor],
    momentum_buffers: Iterable[Tensor],
    *,
    lr: float | Tensor | Sequence[float | Tensor],
    momentum: float | Tensor | Sequence[float | Tensor] = 0.9,
    weight_decay: float | Sequence[float] = 0.0,
    trust_coefficient: float | Sequence[float] = 1e-3,
    eps: float | Sequence[float] = 1e-8,
    adapt: bool | Sequence[bool] = True,
    grad_scale: float | Literal["lr"] | Sequence[float | Literal["lr"]] = 1.0,
    ema_targets: Iterable[Tensor | None] | None = None,
    ema_momentum: float | Tensor | None = None,
    skip_counter: Tensor | None = None,
    backend: Backend | None = None,
) -> None:
    """One step of LARS with SGD momentum, in place over lists of tensors: one pass for norms, one for all the rest.

    For a tensor p with gradient g and momentum buffer b (zeros before the first step)::

        a = trust_coefficient * |p| / (|g| + weight_decay * |p| + eps), 1 where a norm is 0
        b = momentum * b + a * (g + weight_decay * p);  p = p - lr * b;  t = lerp(p, t, ema_momentum)

    params, grads, momentum_buffers: lists or generators of one length, the tensors at one place of equal shape, dtype
        (float32, float64, bfloat16, float16) and device, in any strided layout; dense tensors that lie alike are used
        as they are, others are copied. No tensor that is written shares memory with another one of the call.
        Arithmetic is float32 (float64 for float64), norms are summed in float64, in fixed order.
    lr ... grad_scale: one value for all tensors or a sequence with one for each.
    adapt: False takes plain SGD momentum instead, ``b = momentum * b + grad_scale * g + weight_decay * p``;
        grad_scale may be "lr" (the published implementation multiplies such gradients by the learning rate).
    ema_targets: for each parameter a tensor like it, or None: updated by ema_momentum, in [0, 1], with the new
        parameter, to the same bits as `ema_update_` after the step.
    skip_counter: int32 or int64 tensor of one element: a step in which any gradient is NaN or infinite (or its norm
        overflows) then changes nothing but adds 1 here.
    lr, momentum, ema_momentum may be tensors of one float element: they are not checked, and on a GPU the kernel reads
        them, so nothing synchronises and CUDA graphs may hold the step.

    Not differentiable. Raises ValueError or TypeError naming the argument, and the first tensor, that does not fit.
    Source: LARS, arXiv 1708.03888; trust coefficient and eps as in SCRL, arXiv 2103.06122.
    """
    params, grads = check_sequence("params", params), check_sequence("grads", grads)
    momentum_buffers = check_sequence("momentum_buffers", momentum_buffers)
    ema_targets = None if ema_targets is None else check_sequence("ema_targets", ema_targets)
    if ema_targets is not None and ema_momentum is None:
        raise ValueError("ema_momentum is needed with ema_targets, got None")
    settings = make_settings(
        len(params),
        params[0].device if len(params) > 0 and isinstance(params[0], Tensor) else None,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        trust_coefficient=trust_coefficient,
        eps=eps,
        adapt=adapt,
        grad_scale=grad_scale,
        ema_momentum=ema_momentum,
    )
    step_by(settings, params, grads, momentum_buffers, ema_targets, skip_counter, backend)


def step_by(
    settings: LarsSettings,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    ema_targets: Sequence[Tensor | None] | None,
    skip_counter: Tensor | None,
    backend: Backend | None = None,
) -> None:
    """`lars_step_` by numbers that are prepared already."""
    _check_counter(skip_counter, params)
    targets = [None] * len(params) if ema_targets is None else ema_targets
    if len(params) == 0 or not isinstance(params[0], Tensor) or len(targets) != len(params):
        check_lists(params=params, grads=grads, momentum_buffers=momentum_buffers, ema_targets=targets)
        return
    implementation = _OPERATION.resolve(params[0].device.type, backend)
    implementation(params, grads, momentum_buffers, targets, settings, skip_counter)


def _check_counter(counter: Tensor | None, params: Sequence[Tensor]) -> None:
    if counter is None:
        return
    if not isinstance(counter, Tensor) or counter.dtype not in (torch.int32, torch.int64):
        what = counter.dtype if isinstance(counter, Tensor) else type(counter).__name__
        raise TypeError(f"skip_counter must be an int32 or int64 tensor, got {what}")
    if counter.numel() != 1:
        raise ValueError(f"skip_counter must have one element, got shape {list(counter.shape)}")
    if len(params) > 0 and counter.device != params[0].device:
        raise ValueError(f"skip_counter is on {counter.device}, params[0] on {params[0].device}")


def make_settings(
    count: int, device: torch.device | None, *, ema_momentum: float | Tensor | None, **values: Any
) -> LarsSettings:
    """Checked hyper-parameters, each one value or a list of count of them (as `lars_step_` takes them), as rows.

    Only lists tell tensors apart: a step is prepared in little more time than it takes to walk through those.
    """
    lists = {name: value for name, value in values.items() if isinstance(value, (list, tuple))}
    for name, column in lists.items():
        if len(column) != count:
            raise ValueError(f"{name} has {len(column)} values for {count} tensors")
    single = {name: value for name, value in values.items() if name not in lists}
    _row(**(_HARMLESS | single))  # also where there is no tensor to apply it to
    row_of, firsts = _distinct(count, list(lists.values()))
    rows = [_row(**single, **{name: column[i] for name, column in lists.items()}) for i in firsts]
    ema, ema_tensor = check_scalar("ema_momentum", 1.0 if ema_momentum is None else ema_momentum, 0, 1)
    return LarsSettings(
        [numbers for numbers, _, _ in rows],
        row_of,
        ema,
        _by_row("lr", [lr for _, lr, _ in rows], device),
        _by_row("momentum", [momentum for _, _, momentum in rows], device),
        _by_row("ema_momentum", [ema_tensor], device),
    )


_HARMLESS = {
    **dict.fromkeys(("lr", "momentum", "weight_decay", "trust_coefficient", "eps"), 0.0),
    "adapt": True,
    "grad_scale": 1.0,
}


def _distinct(count: int, columns: list[Sequence[Any]]) -> tuple[list[int], list[int]]:
    """Tensors with the same values are of one row: for each tensor its row, and for each row its first tensor."""
    if not columns:
        return [0] * count, [0] if count else []
    places: dict[tuple[Any, ...], int] = {}
    row_of = [places.setdefault(key, len(places)) for key in zip(*map(_told_apart, columns), strict=True)]
    first_of = dict(zip(reversed(row_of), range(count - 1, -1, -1), strict=True))
    return row_of, [first_of[row] for row in range(len(places))]


_PLAIN_TYPES = (float, int, bool, str)


def _told_apart(column: Sequence[Any]) -> Sequence[Any]:
    """Keys of values: 1 is not True, and what is no plain value (a tensor, or wrong) is itself and nothing else."""
    kinds = {type(value) for value in column}
    if len(kinds) == 1 and kinds.issubset(_PLAIN_TYPES):
        return column
    return [(type(value), value if type(value) in _PLAIN_TYPES else id(value)) for value in column]


def _row(
    *, lr: Any, momentum: Any, weight_decay: Any, trust_coefficient: Any, eps: Any, adapt: Any, grad_scale: Any
) -> tuple[tuple[float, ...], Tensor | None, Tensor | None]:
    """The numbers of a row, and the tensors, if any, that its lr and its momentum multiply."""
    lr, lr_tensor = check_scalar("lr", lr, 0)
    momentum, momentum_tensor = check_scalar("momentum", momentum, 0)
    decay = check_number("weight_decay", weight_decay, 0)
    trust = check_number("trust_coefficient", trust_coefficient, 0)
    eps = check_number("eps", eps, 0)
    if not isinstance(adapt, bool):
        raise TypeError(f"adapt must be True or False, got {shown(adapt)}")
    by_lr = isinstance(grad_scale, str) and grad_scale == "lr"
    scale = 1.0 if by_lr else check_number("grad_scale", grad_scale)
    mode = ADAPT if adapt else PLAIN_BY_LR if by_lr else PLAIN
    return (lr, momentum, decay, trust, eps, scale, mode), lr_tensor, momentum_tensor


def _by_row(name: str, tensors: list[Tensor | None], device: torch.device | None) -> Tensor | None:
    """The rows' tensors as one: None, one element for all rows, or one element for each."""
    for tensor in tensors:
        check_number_device(name, tensor, "params", device)
    if all(tensor is tensors[0] for tensor in tensors):
        return tensors[0] if tensors else None
    one = torch.ones((), dtype=torch.float64, device=device)
    return torch.stack([one if t is None else t.reshape(()).to(device, torch.float64) for t in tensors])


def lars_step_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    ema_targets: Sequence[Tensor | None],
    settings: LarsSettings,
    skip_counter: Tensor | None,
) -> None:
    """Plain PyTorch, one tensor after the other."""
    check_lists(params=params, grads=grads, momentum_buffers=momentum_buffers, ema_targets=ema_targets)
    written = {"params": params, "momentum_buffers": momentum_buffers, "ema_targets": ema_targets}
    check_memory(written, {"grads": grads})
    if skip_counter is None:
        good = None
    else:
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in grads]
        good = torch.stack(norms).isfinite().all()
        skip_counter += (~good).to(skip_counter.dtype)
    for p, g, b, t, row in zip(params, grads, momentum_buffers, ema_targets, settings.row_of, strict=True):
        new = _reference_update(p, g, b, t, settings, row)
        for old, value in zip((p, b, t), new, strict=True):
            if old is not None:
                old.copy_(value if good is None else torch.where(good, value, old))


def _reference_update(p: Tensor, g: Tensor, b: Tensor, t: Tensor | None, settings: LarsSettings, row: int):
    lr, momentum, weight_decay, trust, eps, grad_scale, mode = settings.rows[row]
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    lr = _at_row(lr, settings.lr_tensor, row, p.device, wide)
    momentum = _at_row(momentum, settings.momentum_tensor, row, p.device, wide)
    wp, wg = p.to(wide), g.to(wide)
    if mode == ADAPT:
        p_norm = torch.linalg.vector_norm(wp, dtype=torch.float64)
        g_norm = torch.linalg.vector_norm(wg, dtype=torch.float64)
        ratio = trust * p_norm / (g_norm + weight_decay * p_norm + eps)
        d = torch.where((p_norm == 0) | (g_norm == 0), 1.0, ratio).to(wide) * (wg + weight_decay * wp)
    else:
        d = wg * (lr if mode == PLAIN_BY_LR else grad_scale) + weight_decay * wp
    new_b = momentum * b.to(wide) + d
    new_p = (wp - lr * new_b).to(p.dtype)
    if t is None:
        return new_p, new_b, None
    m: Any = settings.ema_momentum
    if settings.ema_momentum_tensor is not None:
        m = settings.ema_momentum_tensor.to(p.device, torch.float64).reshape(())
    weight = torch.as_tensor(1.0 - m, dtype=wide, device=p.device)
    moved = torch.lerp(t.to(wide), new_p.to(wide), weight)
    return new_p, new_b, torch.where(weight > 0, moved, t.to(wide))


def _at_row(number: Any, tensor: Tensor | None, row: int, device: torch.device, dtype: torch.dtype) -> Any:
    if tensor is None:
        return number
    return number * tensor.flatten()[row if tensor.numel() > 1 else 0].to(device, dtype)


def _dispatch_to(op: str) -> Callable[..., None]:
    """The operation by torch.ops.scrl_fast.<op>."""

    def lars_step(
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        momentum_buffers: Sequence[Tensor],
        ema_targets: Sequence[Tensor | None],
        settings: LarsSettings,
        skip_counter: Tensor | None,
    ) -> None:
        rows = [number for row in settings.rows for number in row]
        ema_places = [i for i, target in enumerate(ema_targets) if target is not None]

        def call(params: Any, momentum_buffers: Any, ema_targets: Any, grads: Any) -> None:
            targets = [ema_targets[i] for i in ema_places]
            getattr(torch.ops.scrl_fast, op)(
                *(params, momentum_buffers, targets, grads, ema_places, rows, settings.row_of, settings.ema_momentum),
                *(settings.lr_tensor, settings.momentum_tensor, settings.ema_momentum_tensor, skip_counter),
            )

        written = {"params": params, "momentum_buffers": momentum_buffers, "ema_targets": ema_targets}
        call_on_flat(call, written, {"grads": grads}, checks_itself=op == "lars_step_")
        bump_versions([*params, *momentum_buffers, *(target for target in ema_targets if target is not None)])

    return lars_step


def _fake(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    ema_targets: Sequence[Tensor],
    grads: Sequence[Tensor],
    ema_places: Sequence[int],
    settings: Sequence[float],
    setting_of: Sequence[int],
    ema_momentum: float,
    lr: Tensor | None,
    momentum: Tensor | None,
    ema_momentum_tensor: Tensor | None,
    skip_counter: Tensor | None,
) -> None:
    check_lists(params=params, grads=grads, momentum_buffers=momentum_buffers)
    check_lists(params=[params[i] for i in ema_places], ema_targets=ema_targets)


def _triton(*args: Any) -> None:
    from scrl_fast.kernels.lars_step import lars_step_ as launch  # imports triton only when it runs

    launch(*args)


define_triton(
    "lars_step_triton_", _fake, _triton, written=("params", "momentum_buffers", "ema_targets", "skip_counter")
)
if not _native.load_failure("_ops"):
    torch.library.register_fake("scrl_fast::lars_step_", _fake)

_OPERATION = register(
    Operation(
        "lars_step_",
        reference=lars_step_reference,
        native=_dispatch_to("lars_step_"),
        native_failure=lambda device_type: _native.op_failure("lars_step_", device_type),
        triton=_dispatch_to("lars_step_triton_"),
    )
)
