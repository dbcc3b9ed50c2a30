"""What LARS and AdamW share: skipped steps, and the target network's moving average in the same call."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from scrl_fast.ops._arguments import check_scalar


class EmaOptimizer(Optimizer):
    """An optimizer whose ``step(ema_momentum=m)`` also moves the targets of its ``attach_ema``.

    average: what ``attach_ema`` keeps; false while nothing is attached.
    """

    def __init__(self, params: ParamsT, defaults: dict[str, Any], average: Any) -> None:
        super().__init__(params, defaults)
        device = next((p.device for group in self.param_groups for p in group["params"]), None)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._average = average

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles; the base class names what it keeps
        return super().__getstate__() | {"_skipped": self._skipped, "_average": self._average}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
            self._check_params(self.param_groups[-1]["params"])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @staticmethod
    @abstractmethod
    def _check_group(group: dict[str, Any]) -> None:
        """Raises TypeError or ValueError naming a number of the group and its value."""

    @staticmethod
    @abstractmethod
    def _check_params(params: list[Tensor]) -> None:
        """Raises TypeError or ValueError naming a parameter that is not taken."""

    @property
    def skipped(self) -> Tensor:
        """How many steps were skipped for a gradient that was not finite: int64, on the parameters' device."""
        return self._skipped

    @overload
    def step(self, closure: None = None, ema_momentum: float | Tensor | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], ema_momentum: float | Tensor | None = None) -> float: ...
    @torch.no_grad()
    def step(
        self, closure: Callable[[], float] | None = None, ema_momentum: float | Tensor | None = None
    ) -> float | None:
        """One update; returns what closure (which recomputes loss and gradients) returned.

        ema_momentum: momentum, in [0, 1], of the average attached by ``attach_ema``; None leaves the average alone.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if ema_momentum is not None:
            check_scalar("ema_momentum", ema_momentum, 0, 1)
            if not self._average:
                raise ValueError(f"ema_momentum is {ema_momentum}, but attach_ema was not called")
        self._update(ema_momentum)
        return loss

    @abstractmethod
    def _update(self, ema_momentum: float | Tensor | None) -> None:
        """The update of the parameters, and of the average where a momentum is given; both are checked."""
