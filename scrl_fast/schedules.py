"""Learning rate and target momentum as functions of the step: no state, so a resumed run needs nothing from here."""

from __future__ import annotations

import math


def learning_rate(step: int, *, base: float, steps_per_epoch: int, epochs: float, warmup_epochs: float = 0.0) -> float:
    """Learning rate of one optimizer step: linear warm-up, then a cosine to 0, both moving at every step.

    step: 0-based index of the update. The ramp counts from 1, so the first update already moves
        (``base / warm-up steps``) and the last one of the plan ends at 0.
    base: the peak, already scaled by the global batch.
    epochs, warmup_epochs: may be fractions; a warm-up of 0 starts at the top of the cosine, one of ``epochs`` or
        longer never leaves the ramp.
    Raises ValueError for a negative step, warm-up, or a plan without steps. Source: SCRL section 4 (BYOL appendix).
    """
    check_plan(step, steps_per_epoch, epochs)
    if not warmup_epochs >= 0:
        raise ValueError(f"warmup_epochs must be at least 0, got {warmup_epochs}")
    epoch = (step + 1) / steps_per_epoch
    if epoch <= warmup_epochs:
        return base * epoch / warmup_epochs
    if epoch >= epochs:  # past the plan a cosine would rise again
        return 0.0
    return base * 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


def ema_momentum(step: int, *, base: float, total_steps: int) -> float:
    """Momentum of the target network after one optimizer step: ``base`` at step 0, rising to 1 on a cosine.

    step: 0-based index of the update. total_steps: updates in the whole plan; beyond it the momentum stays 1.
    base: in [0, 1]. Raises ValueError naming the argument out of range. Source: BYOL, arXiv 2006.07733, section 3.3.
    """
    check_plan(step, total_steps, 1)
    if not 0.0 <= base <= 1.0:
        raise ValueError(f"base must be in [0, 1], got {base}")
    progress = min(step / total_steps, 1.0)
    return 1.0 - (1.0 - base) * (math.cos(math.pi * progress) + 1.0) / 2.0


def check_plan(step: int, steps: int, epochs: float) -> None:
    """Raises ValueError when the step is negative or the plan has no steps."""
    if not step >= 0:
        raise ValueError(f"step must be at least 0, got {step}")
    if not (steps >= 1 and epochs > 0):
        raise ValueError(f"a schedule needs at least one step, got {steps} steps and {epochs} epochs")
