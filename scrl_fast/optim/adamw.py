"""AdamW by PyTorch's fused update, with the target network's moving average after it and skipped steps as in LARS."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from scrl_fast.ops import ema_update_
from scrl_fast.ops._arguments import check_number, check_sequence, shown
from scrl_fast.ops._tensor_lists import check_lists, check_memory
from scrl_fast.optim.base import EmaOptimizer

Matched = tuple[list[Tensor], list[Tensor]]
"""Parameters that have a gradient, and the gradients."""


class AdamW(EmaOptimizer):
    """Adam with decoupled weight decay (arXiv 1711.05101); the arithmetic is that of torch's fused kernels.

    Parameters whose gradient is None are left out. A step in which any gradient is NaN or infinite changes nothing, the
    attached average included, and counts in ``skipped``; that is decided on the device, without synchronising.

    params: dense float parameters, or groups. A group may set any of the numbers below for itself, and ``adapt=False``
        with a ``momentum`` for plain SGD with momentum and L2 decay, as the online probe is trained.
    lr: number. betas: decay rates of the two averages, each in [0, 1). eps: added to the denominator.
    weight_decay: share of ``lr`` by which a parameter shrinks in a step.
    Raises ValueError or TypeError naming the argument and its value.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        numbers = {
            "betas": tuple(betas) if isinstance(betas, list) else betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": 0.9,
        }
        # fused: by it load_state_dict brings the step counters to the device
        average: tuple[list[Tensor], ...] = ()  # targets, sources
        super().__init__(params, {"lr": lr, **numbers, "adapt": True, "fused": True}, average)

    @staticmethod
    def _check_group(group: dict[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay", "momentum"):
            check_number(name, group[name], 0)
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {shown(betas)}")
        for beta in betas:
            if not check_number("betas", beta, 0) < 1:
                raise ValueError(f"betas must be below 1, got {shown(beta)}")
        if not isinstance(group["adapt"], bool):
            raise TypeError(f"adapt must be True or False, got {shown(group['adapt'])}")

    @staticmethod
    def _check_params(params: list[Tensor]) -> None:
        for i, parameter in enumerate(params):
            if not parameter.is_floating_point() or parameter.is_sparse:
                raise TypeError(f"params[{i}] has dtype {parameter.dtype}: AdamW takes dense floating-point parameters")
            if torch.empty_like(parameter, device="meta").stride() != parameter.stride():
                raise ValueError(
                    f"params[{i}] has strides {parameter.stride()} with gaps: AdamW takes dense parameters"
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of another AdamW over the same parameters.

        Raises ValueError for the state of another optimizer and for averages of another shape; nothing is changed then.
        """
        for k, group in enumerate(state_dict["param_groups"]):
            if missing := [name for name in ("betas", "adapt") if name not in group]:
                raise ValueError(f"state_dict is not a state of AdamW: param_groups[{k}] lacks {', '.join(missing)}")
        own = [(p, group["adapt"]) for group in self.param_groups for p in group["params"]]
        places = [place for group in state_dict["param_groups"] for place in group["params"]]
        for place, (parameter, adapt) in zip(places, own, strict=False):  # another number: refused by the base class
            self._check_state(place, state_dict["state"].get(place), parameter, adapt)
        super().load_state_dict(state_dict)

    @staticmethod
    def _check_state(place: int, state: dict[str, Any] | None, parameter: Tensor, adapt: bool) -> None:
        names = {"step", "exp_avg", "exp_avg_sq"} if adapt else {"momentum_buffer"}
        if not state:  # no step yet
            return
        if set(state) != names:
            raise ValueError(f"state_dict is not a state of AdamW: state[{place}] holds {', '.join(map(str, state))}")
        for name, value in state.items():
            wanted = () if name == "step" else tuple(parameter.shape)
            if not isinstance(value, Tensor) or tuple(value.shape) != wanted:
                got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"state_dict does not fit: state[{place}]['{name}'] is {got}, must be {list(wanted)}")

    def attach_ema(self, targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
        """``step(ema_momentum=m)`` then also moves each target towards its source, after the source's own update.

        Replaces what was attached before. Raises as `ema_update_` does.
        """
        targets, sources = list(check_sequence("targets", targets)), list(check_sequence("sources", sources))
        check_lists(targets=targets, sources=sources)
        check_memory({"targets": targets}, {"sources": sources})
        self._average = (targets, sources) if targets else ()

    def _update(self, ema_momentum: float | Tensor | None) -> None:
        groups = [(group, _with_gradients(group["params"])) for group in self.param_groups]
        broken = self._count_if_broken([grad for _, (_, grads) in groups for grad in grads])
        for group, (params, grads) in groups:
            if params:
                (self._adam if group["adapt"] else self._sgd)(group, params, grads, broken)
        if ema_momentum is not None:
            # filled in on the device, since a copy from the host would wait for it
            momentum = torch.full((), float(ema_momentum), dtype=torch.float64, device=broken.device)
            targets, sources = self._average
            ema_update_(targets, sources, torch.where(broken > 0, 1.0, momentum))

    def _count_if_broken(self, grads: list[Tensor]) -> Tensor:
        """1.0 on the device where any gradient is not finite, else 0.0; counted in `skipped`."""
        grads = [grad for grad in grads if grad.numel()]
        if not grads:
            return torch.zeros((), device=self._skipped.device)
        broken = (~torch.isfinite(get_total_norm(grads, float("inf")))).float()
        self._skipped = self._skipped.to(broken.device) + broken.long()
        return broken

    def _adam(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], broken: Tensor) -> None:
        for p in params:
            if not self.state[p]:
                zeros = {name: _zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                self.state[p].update(step=torch.zeros((), dtype=torch.float32, device=p.device), **zeros)
        means, squares, steps = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = map(float, group["betas"])
        lr, weight_decay, eps = (float(group[name]) for name in ("lr", "weight_decay", "eps"))
        adamw(
            params, grads, means, squares, [], steps, fused=True, found_inf=broken, amsgrad=False, beta1=beta1,
            beta2=beta2, lr=lr, weight_decay=weight_decay, eps=eps, maximize=False,
        )  # fmt: skip

    def _sgd(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], broken: Tensor) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = _zeros_like(p)
        buffers: list[Tensor | None] = [self.state[p]["momentum_buffer"] for p in params]
        sgd(
            params, grads, buffers, fused=True, found_inf=broken, weight_decay=float(group["weight_decay"]),
            momentum=float(group["momentum"]), lr=float(group["lr"]), dampening=0.0, nesterov=False, maximize=False,
        )  # fmt: skip


def _zeros_like(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, memory_format=torch.preserve_format)


def _with_gradients(params: list[Tensor]) -> Matched:
    """The fused kernels read both lists by place in memory, so a gradient that lies otherwise is copied."""
    have = [p for p in params if p.grad is not None]
    grads: list[Tensor] = []
    for p in have:
        grad = p.grad
        assert grad is not None
        if grad.is_sparse:
            raise TypeError("a gradient is sparse: AdamW takes dense gradients")
        grads.append(grad if grad.stride() == p.stride() else torch.empty_like(p).copy_(grad))
    return have, grads
