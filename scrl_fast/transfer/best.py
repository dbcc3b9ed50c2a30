"""The best measurement of a run so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Best:
    """name: of the metric that decides. step: of the measurement; -1 before the first one."""

    name: str = ""
    value: float = -1.0
    step: int = -1

    def improve(self, result: Mapping[str, float], step: int) -> bool:
        """Whether this measurement is better than all before it, which it then replaces."""
        name = main_metric(result)
        if self.step >= 0 and result[name] <= self.value:
            return False
        self.name, self.value, self.step = name, result[name], step
        return True

    def to_plain(self) -> dict[str, Any]:
        """What a checkpoint and a result hold: ``{"step": 400, "AP": 31.2}``, empty before the first measurement."""
        return {} if self.step < 0 else {"step": self.step, self.name: self.value}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Best:
        """From `to_plain`."""
        found = dict(plain)
        if not found:
            return cls()
        step = int(found.pop("step"))
        ((name, value),) = found.items()
        return cls(str(name), float(value), step)

    def __str__(self) -> str:
        return f"{self.name} {self.value:.2f} at step {self.step}"


def main_metric(result: Mapping[str, float]) -> str:
    """The name of the average precision by which runs of a task are compared: the first AP of its results.

    That of keypoints or masks, where a task has them, else of boxes.
    """
    for name in ("keypoints_AP", "segm_AP", "bbox_AP", "AP"):
        if name in result:
            return name
    return next(iter(result))
