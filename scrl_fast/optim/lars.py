"""LARS as an ordinary PyTorch optimizer, with the target network's moving average in the same update."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import compress
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from scrl_fast.ops import ema_update_
from scrl_fast.ops._arguments import FLOAT_DTYPES, check_number, check_scalar, check_sequence, shown
from scrl_fast.ops._tensor_lists import check_lists, check_memory
from scrl_fast.ops.lars_step import LarsSettings, make_settings, step_by
from scrl_fast.optim.base import EmaOptimizer

NUMBERS = ("lr", "momentum", "weight_decay", "trust_coefficient", "eps", "adapt", "grad_scale")
"""What a group may set for itself."""


class _Matched(NamedTuple):
    """Parameters of a step beside the attached average: looked up once for as long as the same ones have a gradient."""

    key: list[int]
    """Their ids, which are nobody else's while params holds them."""
    params: list[Tensor]
    targets: list[Tensor | None]
    """One for each of params."""
    rest: list[tuple[Tensor, Tensor]]
    """Target and source where the source is none of params."""


class LARS(EmaOptimizer):
    """Layer-wise adaptive rate scaling over SGD with momentum (arXiv 1708.03888), one fused update for all parameters.

    The formula is that of `scrl_fast.ops.lars_step_`. Parameters whose gradient is None are left out; sparse gradients
    and complex parameters raise TypeError.

    params: parameters, or groups. A group may set any of the numbers below for itself, and ``adapt=False`` for plain
        SGD with momentum (biases, norm layers: see `lars_param_groups`), with ``grad_scale`` as in `lars_step_`.
    lr: number or, for CUDA graphs, a tensor of one float element, which no step reads back.
    momentum, weight_decay, trust_coefficient, eps: as in `lars_step_`.
    skip_nonfinite: a step in which any gradient is NaN or infinite changes nothing, the attached average included, and
        counts in ``skipped``; decided on the device, without synchronising.
    Raises ValueError or TypeError naming the argument and its value.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        skip_nonfinite: bool = False,
    ) -> None:
        numbers = {
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
        }
        average: dict[Tensor, Tensor] = {}  # source -> target
        super().__init__(params, {"lr": lr, **numbers, "adapt": True, "grad_scale": 1.0}, average)
        self.skip_nonfinite = skip_nonfinite
        self._matched: _Matched | None = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"skip_nonfinite": self.skip_nonfinite, "_matched": None}

    @staticmethod
    def _check_params(params: list[Tensor]) -> None:
        for i, parameter in enumerate(params):
            if parameter.is_complex():
                known = ", ".join(str(dtype) for dtype in FLOAT_DTYPES)
                raise TypeError(f"params[{i}] has dtype {parameter.dtype}: LARS takes {known}")

    @staticmethod
    def _check_group(group: dict[str, Any]) -> None:
        for name in ("lr", "momentum"):
            check_scalar(name, group[name], 0)
        for name in ("weight_decay", "trust_coefficient", "eps"):
            check_number(name, group[name], 0)
        if not isinstance(group["adapt"], bool):
            raise TypeError(f"adapt must be True or False, got {shown(group['adapt'])}")
        if not (isinstance(group["grad_scale"], str) and group["grad_scale"] == "lr"):
            check_number("grad_scale", group["grad_scale"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of another LARS over the same parameters.

        Raises ValueError naming what is missing, or foreign, in the state of another optimizer, and the first momentum
        buffer of another shape; nothing is changed then.
        """
        saved = state_dict["param_groups"]
        for k, group in enumerate(saved):
            if missing := [name for name in NUMBERS if name not in group]:
                raise ValueError(f"state_dict is not a state of LARS: param_groups[{k}] lacks {', '.join(missing)}")
            self._check_group(group)
        own = [p for group in self.param_groups for p in group["params"]]
        places = [place for group in saved for place in group["params"]]
        for place, parameter in zip(places, own, strict=False):  # another number of them is refused by the base class
            self._check_state(place, state_dict["state"].get(place), parameter)
        super().load_state_dict(state_dict)

    @staticmethod
    def _check_state(place: int, state: dict[str, Any] | None, parameter: Tensor) -> None:
        if not state:  # no step yet
            return
        if set(state) != {"momentum_buffer"}:
            raise ValueError(f"state_dict is not a state of LARS: state[{place}] holds {', '.join(map(str, state))}")
        buffer = state["momentum_buffer"]
        if not isinstance(buffer, Tensor) or buffer.shape != parameter.shape:
            got = list(buffer.shape) if isinstance(buffer, Tensor) else type(buffer).__name__
            raise ValueError(
                f"state_dict does not fit: state[{place}]['momentum_buffer'] is {got}, "
                f"the parameter {list(parameter.shape)}"
            )

    def attach_ema(self, targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
        """``step(ema_momentum=m)`` then also moves each target towards its source, after the source's own update.

        sources: usually parameters of this optimizer, whose targets are updated in the same pass over memory; other
        tensors are averaged as they are. Replaces what was attached before. Raises as `ema_update_` does, and
        ValueError where a source is listed with two targets.
        """
        targets, sources = check_sequence("targets", targets), check_sequence("sources", sources)
        check_lists(targets=targets, sources=sources)
        check_memory({"targets": list(dict.fromkeys(targets))}, {"sources": sources})
        average: dict[Tensor, Tensor] = {}
        for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
            if average.setdefault(source, target) is not target:
                first = next(k for k, other in enumerate(sources) if other is source)
                raise ValueError(f"sources[{i}] is sources[{first}], with another target: a source has one")
        self._average = average
        self._matched = None

    def _update(self, ema_momentum: float | Tensor | None) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        group_of = [k for k, group in enumerate(self.param_groups) for _ in group["params"]]
        grads = [p.grad for p in params]
        have = [grad is not None for grad in grads]
        if not all(have):
            params, group_of, grads = (list(compress(column, have)) for column in (params, group_of, grads))
        counter = self._counter(params)
        matched = None if ema_momentum is None else self._match(params)
        before = counter.clone() if counter is not None and matched and matched.rest else None
        if params:
            settings = self._settings(group_of, params[0].device, ema_momentum)
            step_by(settings, params, grads, self._buffers(params), matched and matched.targets, counter)
        if ema_momentum is not None and matched and matched.rest:
            self._average_rest(matched.rest, ema_momentum, before)

    def _settings(self, group_of: list[int], device: torch.device, ema_momentum: float | Tensor | None) -> LarsSettings:
        """Checked for each group, not for each of its parameters."""
        used = list(dict.fromkeys(group_of))
        columns = {name: [self.param_groups[k][name] for k in used] for name in NUMBERS}
        settings = make_settings(len(used), device, ema_momentum=ema_momentum, **columns)
        row_of_group = dict(zip(used, settings.row_of, strict=True))
        return settings._replace(row_of=[row_of_group[k] for k in group_of])

    def _counter(self, params: list[Tensor]) -> Tensor | None:
        if not self.skip_nonfinite:
            return None
        if params and self._skipped.device != params[0].device:
            self._skipped = self._skipped.to(params[0].device)
        return self._skipped

    def _buffers(self, params: list[Tensor]) -> list[Tensor]:
        state = self.state
        try:
            return [state[p]["momentum_buffer"] for p in params]
        except KeyError:  # of parameters that had no gradient before
            for p in params:
                if "momentum_buffer" not in state[p]:
                    state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            return self._buffers(params)

    def _match(self, params: list[Tensor]) -> _Matched:
        key = list(map(id, params))
        matched = self._matched
        if matched is None or matched.key != key:
            targets = [self._average.get(p) for p in params]
            updated = set(params)
            rest = [(target, source) for source, target in self._average.items() if source not in updated]
            matched = _Matched(key, params, targets, rest)
            if not torch.compiler.is_compiling():  # torch 2.11 cannot compile that it is kept
                self._matched = matched
        return matched

    def _average_rest(self, rest: list[tuple[Tensor, Tensor]], momentum: float | Tensor, before: Tensor | None) -> None:
        """Targets whose source had no gradient, or is no parameter of this optimizer."""
        if before is not None:  # a skipped step leaves these alone too
            if not isinstance(momentum, Tensor):  # filled in there: a copy from the host would wait for the device
                momentum = torch.full((), momentum, dtype=torch.float64, device=before.device)
            momentum = torch.where(before == self._skipped, momentum.to(before.device), 1.0)
        ema_update_([target for target, _ in rest], [source for _, source in rest], momentum)


def lars_param_groups(
    named_parameters: Iterable[tuple[str, Tensor]],
    weight_decay: float,
    compat: Literal["none", "kakaobrain"] = "none",
) -> list[dict[str, Any]]:
    """Parameters split for `LARS`: adapted and decayed, and those left out of both (biases, norm layers).

    named_parameters: as ``model.named_parameters()`` gives; those without ``requires_grad`` are passed over.
    compat: "none" leaves out every parameter with at most one axis. "kakaobrain" leaves out what the published
        implementation of SCRL does: names that hold 'bn' or 'bias', and scales the gradients of those by the learning
        rate. In its networks the BatchNorms of the stem, of the four downsample branches and of both heads have other
        names, so that these 7 weights are adapted and decayed there. The stem's, ``encoder.body.bn1`` here and
        ``encoder.1`` there, is the only one whose name differs in this respect.
    Raises ValueError for another compat.
    """
    if compat not in ("none", "kakaobrain"):
        raise ValueError(f"compat must be none or kakaobrain, got {compat!r}")
    adapted: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            left_out = _published_left_out(name) if compat == "kakaobrain" else parameter.ndim <= 1
            (plain if left_out else adapted).append(parameter)
    scale: dict[str, Any] = {"grad_scale": "lr"} if compat == "kakaobrain" else {}
    groups: list[dict[str, Any]] = [
        {"params": adapted, "weight_decay": weight_decay, "adapt": True},
        {"params": plain, "weight_decay": 0.0, "adapt": False, **scale},
    ]
    return [group for group in groups if group["params"]]


def _published_left_out(name: str) -> bool:
    published = re.sub(r"\bencoder\.body\.bn1\.", "encoder.1.", name)
    return "bn" in published or "bias" in published
