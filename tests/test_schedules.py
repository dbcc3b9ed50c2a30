"""Learning rate and momentum against values worked out by hand, and their ends."""

from __future__ import annotations

import itertools
import math

import pytest

from scrl_fast.schedules import ema_momentum, learning_rate

PLAN = {"base": 2.0, "steps_per_epoch": 10, "epochs": 20, "warmup_epochs": 4}


def test_warm_up_starts_at_its_first_step_and_ends_at_the_peak():
    assert learning_rate(0, **PLAN) == pytest.approx(2.0 / 40)
    assert learning_rate(19, **PLAN) == pytest.approx(1.0)
    assert learning_rate(39, **PLAN) == 2.0


def test_cosine_moves_every_step_with_fractional_epochs_and_ends_at_zero():
    # half of the 160 steps after warm-up, then the third step of an epoch
    assert learning_rate(40 + 80 - 1, **PLAN) == pytest.approx(1.0)
    assert learning_rate(42, **PLAN) == pytest.approx(1.0 + math.cos(math.pi * 0.3 / 16))
    assert learning_rate(199, **PLAN) == 0.0
    values = [learning_rate(step, **PLAN) for step in range(39, 200)]
    assert all(a > b for a, b in itertools.pairwise(values))


def test_without_warm_up_it_starts_near_the_peak_and_never_rises():
    values = [learning_rate(step, base=2.0, steps_per_epoch=5, epochs=3, warmup_epochs=0) for step in range(15)]
    assert values[0] == pytest.approx(1.0 + math.cos(math.pi / 15))
    assert values == sorted(values, reverse=True)
    assert values[-1] == 0.0


@pytest.mark.parametrize("warmup", [3, 3.5, 100])
def test_a_warm_up_as_long_as_the_plan_only_rises(warmup):
    values = [learning_rate(step, base=1.0, steps_per_epoch=4, epochs=3, warmup_epochs=warmup) for step in range(12)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(3 / warmup)


def test_past_the_plan_nothing_rises_again():
    assert learning_rate(230, **PLAN) == 0.0
    assert ema_momentum(230, base=0.97, total_steps=200) == 1.0


def test_published_recipe_peaks_at_14_4_for_8192_images():
    # 200 epochs of ImageNet with 32 x 256 images a step: 156 steps an epoch, warm-up of 10
    peak = 0.45 * 8192 / 256
    assert learning_rate(1559, base=peak, steps_per_epoch=156, epochs=200, warmup_epochs=10) == pytest.approx(14.4)


def test_ema_momentum_starts_at_its_base_and_rises_to_one():
    assert ema_momentum(0, base=0.97, total_steps=200) == pytest.approx(0.97)
    assert ema_momentum(100, base=0.97, total_steps=200) == pytest.approx(0.985)
    assert ema_momentum(199, base=0.97, total_steps=200) == pytest.approx(
        1 - 0.03 * (math.cos(math.pi * 199 / 200) + 1) / 2
    )
    assert ema_momentum(200, base=0.97, total_steps=200) == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: learning_rate(-1, **PLAN), "step must be at least 0, got -1"),
        (lambda: learning_rate(0, base=1.0, steps_per_epoch=0, epochs=1), "0 steps"),
        (lambda: learning_rate(0, base=1.0, steps_per_epoch=1, epochs=0), "0 epochs"),
        (lambda: learning_rate(0, base=1.0, steps_per_epoch=1, epochs=1, warmup_epochs=-1), "warmup_epochs"),
        (lambda: learning_rate(0, base=1.0, steps_per_epoch=1, epochs=1, warmup_epochs=math.nan), "warmup_epochs"),
        (lambda: ema_momentum(0, base=1.5, total_steps=1), "base must be in .* got 1.5"),
        (lambda: ema_momentum(0, base=math.nan, total_steps=1), "base"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
