"""The length of a run that follows its data, and how long it takes on this machine."""

from __future__ import annotations

import time
from dataclasses import replace

from scrl_fast.run.log import format_seconds
from scrl_fast.transfer.config import TransferConfig

PASSES = 36
"""Over the training images: three times detectron2's 1x schedule, as for small data sets there."""
WARMUP_SHARE, MOST_WARMUP = 0.1, 1000
LR_STEPS = (2 / 3, 8 / 9)
"""Shares of the steps after which the rate falls, as in detectron2's 1x schedule."""
TIMED = (1, 4)
"""Steps that warm up before the time is taken, and steps over which it is taken."""


def follow_data(config: TransferConfig, images: int) -> TransferConfig:
    """The options with numbers for those that follow the data (-1): train.steps, optim.lr_steps, optim.warmup_steps.

    images: number of images to train on.
    """
    train, optim = config.train, config.optim
    steps = train.steps
    if steps == -1:
        steps = steps_for(train.passes or PASSES, images, train.batch_size)
        if not train.passes:
            steps = min(max(steps, train.steps_range[0]), train.steps_range[1])
    warmup = optim.warmup_steps
    if warmup == -1:
        warmup = min(int(WARMUP_SHARE * steps), MOST_WARMUP)
    first, second = (
        int(share * steps) if given == -1 else given for given, share in zip(optim.lr_steps, LR_STEPS, strict=True)
    )
    return replace(
        config,
        train=replace(train, steps=steps),
        optim=replace(optim, warmup_steps=warmup, lr_steps=(first, second)),
    )


def steps_for(passes: float, images: int, batch_size: int) -> int:
    """Steps that show every image so often; at least one."""
    return max(1, round(passes * images / batch_size))


class Pace:
    """Tells once, after the first steps, how long the rest of a run takes here."""

    def __init__(self, last_step: int) -> None:
        self.last_step = last_step
        self.steps = 0
        self.started = 0.0

    def step_done(self, step: int) -> str:
        """A line for the log once enough steps were timed, '' before and afterwards. step: updates made so far."""
        self.steps += 1
        first, timed = TIMED
        if self.steps == first:
            self.started = time.monotonic()
        if self.steps != first + timed:
            return ""
        each = (time.monotonic() - self.started) / timed
        left = format_seconds(each * max(0, self.last_step - step))
        rest = f"{self.last_step - step:,} steps"
        return f"the remaining {rest} take about {left} here ({each:.2g} s a step), measuring not counted"
