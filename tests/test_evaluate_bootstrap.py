"""The paired bootstrap of a comparison against a plain loop over its draws, and against answers that are known."""

from __future__ import annotations

import numpy as np
import pytest

from scrl_fast.evaluate.bootstrap import MEASURES, NORMAL, PairedBootstrap
from scrl_fast.run.statistics import t_quantile


def boxes(images=40, classes=4, seed=0):
    """Labels and images of test boxes: 1 to 9 in an image; the numbers of images have gaps."""
    rng = np.random.default_rng(seed)
    found = np.repeat(np.arange(images) * 3, rng.integers(1, 10, images))
    return rng.integers(0, classes, len(found)), found, rng


def slow_measure(right, labels, measure):
    if measure == "accuracy":
        return right.mean()
    return np.mean([right[labels == label].mean() for label in np.unique(labels)])


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("seeds", [1, 3])
def test_it_is_the_loop_over_its_draws(measure, seeds):
    labels, images, rng = boxes()
    first, other = ([rng.random(len(labels)) < share for _ in range(seeds)] for share in (0.5, 0.6))
    made = PairedBootstrap(labels, images, seeds, draws=120, seed=4)
    rows = [np.flatnonzero(images == image) for image in np.unique(images)]
    values = []
    for drawn_images, drawn_seeds in zip(made.image_draws, made.seed_draws, strict=True):
        chosen = np.concatenate([rows[image] for image in drawn_images])
        values.append(
            np.mean(
                [
                    slow_measure(other[s][chosen], labels[chosen], measure)
                    - slow_measure(first[s][chosen], labels[chosen], measure)
                    for s in drawn_seeds
                ]
            )
        )
    by_seed = [
        slow_measure(b, labels, measure) - slow_measure(a, labels, measure) for a, b in zip(first, other, strict=True)
    ]
    found, mean = made.difference(first, other, measure), np.mean(by_seed)
    assert found.mean == pytest.approx(mean, abs=1e-12) and found.pairs == seeds
    total, of_seeds = np.var(values), 0.0
    freedom = len(rows) - 1
    if seeds > 1:
        of_seeds = min(np.var(by_seed, ddof=1) / seeds, total)
        freedom = int(total**2 / (of_seeds**2 / (seeds - 1) + (total - of_seeds) ** 2 / (len(rows) - 1)))
    wider = t_quantile(0.975, max(1, freedom)) / NORMAL
    expected = [mean + wider * (np.quantile(values, tail) - mean) for tail in (0.025, 0.975)]
    assert found.interval == pytest.approx(expected, abs=1e-12)
    assert made.means(first, measure) == pytest.approx([slow_measure(a, labels, measure) for a in first])


def test_equal_starts_never_differ():
    labels, images, rng = boxes()
    right = [rng.random(len(labels)) < 0.7 for _ in range(5)]
    for measure in MEASURES:
        found = PairedBootstrap(labels, images, 5).difference(right, right, measure)
        assert found.interval == (0, 0) and found.mean == 0 and not found.beyond_chance


def test_boxes_of_one_image_are_no_independent_evidence():
    """Every box copied ten times within its image says no more; as boxes of images of their own they would."""
    labels, images, rng = boxes(30)
    pair = [[rng.random(len(labels)) < share] for share in (0.5, 0.55)]

    def width(labels, images, pair):
        low, high = PairedBootstrap(labels, images, 1).difference(*pair, "accuracy").interval
        return high - low

    copied = [[np.tile(right[0], 10)] for right in pair]
    alone = width(labels, images, pair)
    assert width(np.tile(labels, 10), np.tile(images, 10), copied) == pytest.approx(alone)
    assert width(np.tile(labels, 10), np.arange(10 * len(labels)), copied) < 0.6 * alone


def test_a_difference_that_few_seeds_disagree_on_is_within_chance():
    labels, images, rng = boxes(200)
    base = rng.random(len(labels))
    first = [base < 0.5] * 3
    same_way, both_ways = [base < 0.6] * 3, [base < share for share in (0.75, 0.62, 0.42)]
    made = PairedBootstrap(labels, images, 3)
    assert made.difference(first, same_way, "accuracy").beyond_chance
    disagreeing = made.difference(first, both_ways, "accuracy")
    assert disagreeing.mean == pytest.approx(0.1, abs=0.03) and not disagreeing.beyond_chance


@pytest.mark.parametrize("seeds, spread", [(1, 0.0), (5, 0.0), (5, 0.3)])
def test_the_interval_holds_the_truth_as_often_as_it_says(seeds, spread):
    """Two starts of the same true accuracy, 150 times: about 95 % of the intervals hold zero."""
    rng, held = np.random.default_rng(7), 0
    for _ in range(150):
        images = np.repeat(np.arange(60), rng.integers(1, 12, 60))
        pair = []
        for _start in range(2):
            skill = rng.normal(0, 0.5, 60)[images] + rng.normal(0, 1, len(images))
            pair.append([skill + rng.normal(0, spread) + rng.normal(0, 0.3, len(images)) > 0 for _ in range(seeds)])
        draws = PairedBootstrap(np.zeros(len(images), int), images, seeds, draws=500)
        held += not draws.difference(*pair, "accuracy").beyond_chance
    assert 0.88 <= held / 150 <= 1


def test_the_same_rows_give_the_same_bits():
    labels, images, rng = boxes()
    pair = [[rng.random(len(labels)) < share for _ in range(2)] for share in (0.5, 0.6)]
    one, two = (PairedBootstrap(labels, images, 2).difference(*pair, "accuracy") for _ in range(2))
    assert one == two
    assert PairedBootstrap(labels, images, 2, seed=1).difference(*pair, "accuracy").interval != one.interval


@pytest.mark.parametrize("images, seeds", [([0, 0, 0], 1), ([0, 0, 0], 5), ([0, 1], 1)])
def test_images_that_cannot_tell_an_interval_give_none(images, seeds):
    """One image; or two whose draws all agree on a difference."""
    labels, images = np.zeros(len(images), int), np.array(images)
    none, all_right = [np.zeros(len(images), bool)] * seeds, [np.ones(len(images), bool)] * seeds
    found = PairedBootstrap(labels, images, seeds).difference(none, all_right, "accuracy")
    assert found.mean == 1 and found.interval is None and not found.beyond_chance
