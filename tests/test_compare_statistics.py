"""The statistics of a comparison against published values, and what its table says of them."""

from __future__ import annotations

import math

import pytest

from scrl_fast.run.statistics import paired_difference, spread, t_quantile
from scrl_fast.transfer.compare.rows import Row, values_of
from scrl_fast.transfer.compare.table import Results, markdown, summary_of, verdict


@pytest.mark.parametrize(
    "freedom, value",  # the printed tables of Student's t, two-sided 95 %
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (29, 2.045), (120, 1.980)],
)
def test_t_quantile_is_that_of_the_printed_tables(freedom, value):
    assert t_quantile(0.975, freedom) == pytest.approx(value, abs=5e-4)


def test_t_quantile_elsewhere():
    assert t_quantile(0.5, 3) == 0 or t_quantile(0.5, 3) < 1e-12
    assert t_quantile(0.9, 1) == pytest.approx(math.tan(0.4 * math.pi), rel=1e-12)  # Cauchy
    assert t_quantile(0.95, 2) == pytest.approx(0.9 / math.sqrt(2 * 0.95 * 0.05), rel=1e-12)  # closed form
    for probability, freedom in ((0.4, 3), (1.0, 3), (0.9, 0)):
        with pytest.raises(ValueError, match="must be in"):
            t_quantile(probability, freedom)


def test_spread_is_that_of_a_sample():
    assert spread([2.0, 4.0, 9.0]) == spread((9, 2, 4)) and spread([2.0, 4.0, 9.0]).mean == 5
    assert spread([2.0, 4.0, 9.0]).deviation == pytest.approx(math.sqrt(13))
    assert spread([3.0]).deviation is None


def test_the_difference_is_paired_by_seed():
    """Student's sleep data (1908): hours gained with two drugs by ten patients; the paired t of it is 4.06."""
    first = dict(enumerate([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]))
    other = dict(enumerate([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]))
    found = paired_difference(first, other)
    assert found.mean == pytest.approx(1.58) and found.pairs == 10 and found.beyond_chance
    assert found.interval == pytest.approx((0.7001, 2.4599), abs=5e-4)
    backwards = paired_difference(dict(reversed(first.items())), other)
    assert backwards == found  # by the seed, not by the order
    assert paired_difference(first, {3: 0.1, 99: 5.0}).pairs == 1


def test_few_seeds_claim_little():
    assert paired_difference({0: 1.0}, {1: 2.0}) is None
    assert paired_difference({0: 1.0}, {0: 9.0}).interval is None
    assert not paired_difference({0: 1.0}, {0: 9.0}).beyond_chance
    assert not paired_difference({0: 10.0, 1: 20.0}, {0: 15.0, 1: 28.0}).beyond_chance  # +5 and +8: two seeds only
    assert paired_difference({0: 10.0, 1: 20.0, 2: 30.0}, {0: 15.0, 1: 25.5, 2: 36.0}).beyond_chance
    assert not paired_difference({0: 4.0, 1: 4.0}, {0: 4.0, 1: 4.0}).beyond_chance
    assert verdict(None, "random") == "no seed in common yet"
    assert verdict(paired_difference({0: 1.0}, {0: 9.0}), "random") == "cannot be told: one seed"
    below = paired_difference({0: 5.0, 1: 5.1, 2: 5.2}, {0: 1.0, 1: 1.0, 2: 1.2})
    assert verdict(below, "random") == "yes: below random, of 3 seeds"


def results(count=3):
    rows = [
        Row(init, init, share, seed) for seed in range(count) for share in (0.1, 1.0) for init in ("random", "scrl")
    ]
    made = Results(rows)
    for row in rows:
        value = 10.0 + 5 * row.seed + (20 if row.share == 1 else 0)  # seeds differ more than starts do
        value += 2.0 + 0.1 * row.seed if row.init == "scrl" and row.share == 0.1 else 0.0
        made.values[row.name] = values_of(row, "voc", {"AP": value, "AP50": 2 * value})
    return made


SEEN = {"random": ("0 of 9", "nothing"), "scrl": ("2 of 9", "2 of 9 are"), "labelled images": ("0 of 9", "none")}


def test_a_difference_smaller_than_the_spread_is_found_by_its_pairs():
    lines = summary_of(results())
    small = {line["start"]: line for line in lines if line["share"] == 0.1}
    assert small["scrl"]["AP"]["deviation"] > small["scrl"]["difference"]["mean"] == pytest.approx(2.1)
    assert small["scrl"]["difference"]["beyond_chance"] and "difference" not in small["random"]
    assert not [line for line in lines if line["share"] == 1.0][1]["difference"]["beyond_chance"]
    text = markdown("voc", results(), SEEN)
    assert "| 10 %" in text and "yes: above random, of 3 seeds" in text and "| 2 of 9 " in text
    assert "no: within chance, of 3 seeds" in text and "above 2.5 times its own deviation" in text
    assert "Of 2 differences that are nothing but chance, 0.1 would pass" in text
    assert "Pre-training of scrl: 2 of 9 are." in text and "Labelled images: none." in text


def test_the_table_says_what_is_missing():
    made = results(2)
    del made.values["scrl-1-seed1"], made.values["random-1-seed1"], made.values["scrl-1-seed0"]
    made.failed = {"scrl-1-seed1": "no weights", "scrl-1-seed0": "no weights"}
    text = markdown("voc", made, SEEN, ["one more"])
    assert "- Failed: scrl, 2 rows: no weights" in text and "- Not finished: 1 of 8 rows." in text
    assert text.endswith("- one more\n") and "no seed in common yet" in text
    assert "One seed tells nothing" in markdown("voc", results(1), SEEN)
    assert "train longer" not in text
    for value in made.values.values():
        value["AP"] = 0.4 if value["seed"] else None
    assert "No row reaches an AP of 1: train longer" in markdown("voc", made, SEEN)


def test_the_ap_of_a_task_is_that_of_what_it_is_about():
    row = Row("random", "random", 0.1, 0)
    coco = {"bbox_AP": 30.0, "bbox_AP50": 50.0, "segm_AP": 20.0, "segm_AP50": 40.0, "segm_APs": -1}
    boxes = {name: value for name, value in coco.items() if name.startswith("bbox")}
    assert values_of(row, "detection", boxes)["AP"] == 30 and values_of(row, "custom", boxes)["AP50"] == 50
    assert values_of(row, "instance", coco)["AP"] == values_of(row, "custom", coco)["AP"] == 20
    assert values_of(row, "instance", coco)["segm_APs"] is None
    assert values_of(row, "voc", {"AP": 7.0})["AP"] == 7
