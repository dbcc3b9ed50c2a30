"""A transfer that is timed, and that stops when the time is up as it does on a signal: saved, to go on later."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from scrl_fast.run.signals import SignalHandler
from scrl_fast.transfer.config import TransferConfig
from scrl_fast.transfer.detections import Detections
from scrl_fast.transfer.trainer import Transfer

TIMED_STEPS = 5  # of the first row, before the first estimate; the first of them is not counted
TIMED_IMAGES = 2  # measured then, for the time of a measurement


class Deadline:
    """When ``--minutes`` are over; never for 0."""

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self.end = time.monotonic() + 60 * minutes if minutes else None

    def is_over(self) -> bool:
        return self.end is not None and time.monotonic() >= self.end

    def check(self, stop: SignalHandler) -> None:
        """Stops the work as a signal does once the time is up."""
        if self.is_over():
            stop.request_stop(f"--minutes={self.minutes:g}")

    def left(self) -> float | None:
        """Seconds; None where there is no end."""
        return None if self.end is None else max(0.0, self.end - time.monotonic())


class RowTimes:
    """Seconds of a step, of a measured image, and of what else a row takes; None before the first step."""

    def __init__(self) -> None:
        self.step: float | None = None
        self.image = self.overhead = 0.0

    def row(self, steps: int, images: int) -> float:
        """Seconds of a row of so many steps that is measured on so many images."""
        return (self.step or 0.0) * steps + self.image * images + self.overhead


class TimedTransfer(Transfer):
    """One row of a comparison. on_times: called once the first row has told how long a step and an image take."""

    def __init__(
        self,
        config: TransferConfig,
        *,
        train: Any,
        val: Any,
        val_name: str,
        deadline: Deadline,
        times: RowTimes,
        on_times: Callable[[], None],
    ) -> None:
        super().__init__(config, train=train, val=val, val_name=val_name)
        self.deadline, self.times, self.on_times = deadline, times, on_times
        self.loop.says_how_to_resume = False  # the command of the comparison goes on, and its last line says so
        self.timed: list[float] = []
        self.probing = False

    def step_note(self) -> str:
        """Nothing: the comparison tells how long its rows take."""
        return ""

    def train_step(self, batch: Sequence[Any], weight: int | None = None) -> None:
        super().train_step(batch, weight)
        if self.times.step is None:
            self.time_step()
        self.deadline.check(self.loop.stop)

    def time_step(self) -> None:
        """Takes the time of this step; with enough of them, or the last one, the times are known."""
        self.timed.append(time.monotonic())
        if len(self.timed) < TIMED_STEPS and self.step < self.last_step:
            return
        if len(self.timed) > 1:
            self.times.step = (self.timed[-1] - self.timed[0]) / (len(self.timed) - 1)
            started, self.probing = time.monotonic(), True
            images = range(min(TIMED_IMAGES, len(self.data.val)))
            for _ in self.detect(images):  # in eval mode and without gradients: it changes no weight
                pass
            self.times.image, self.probing = (time.monotonic() - started) / len(images), False
            self.on_times()

    def detect(self, indices: Sequence[int]) -> Iterator[Detections]:
        for found in super().detect(indices):
            if not self.probing:
                self.deadline.check(self.loop.stop)
            yield found
