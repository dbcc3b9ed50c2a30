from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from scrl_fast.config.schema import ViewsConfig
from scrl_fast.data.views import VIEW_DTYPE, crops_of, draw_views

CONFIG = ViewsConfig()
MANY = 20_000


def draw(config: ViewsConfig = CONFIG, size: tuple[int, int] = (375, 500), count: int = MANY, **where: int):
    sizes = np.tile(size, (count, 1))
    return draw_views(config, sizes, **{"seed": 0, "epoch": 0, "keys": np.arange(count), **where})


def near(share: float, expected: float, count: int = MANY) -> bool:
    """Within four standard deviations of a share."""
    return abs(share - expected) <= 4 * (expected * (1 - expected) / count) ** 0.5


# ---- crops ----


@pytest.mark.parametrize("size", [(375, 500), (96, 96), (60, 400), (400, 60), (3, 5), (1, 1)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0), (0.9, 1.0)])
def test_crops_follow_torchvision(size: tuple[int, int], scale: tuple[float, float]) -> None:
    count = 4000
    ours = crops_of(draw(replace(CONFIG, scale=scale), size, count))[0, :, :4]
    torch.manual_seed(0)
    picture = torch.empty(3, *size)
    theirs = np.array([RandomResizedCrop.get_params(picture, scale, CONFIG.ratio) for _ in range(count)])
    # the margins alone would not see a crop whose place or shape depends wrongly on its size
    measures = {name: lambda crop, column=column: crop[:, column] for column, name in enumerate("yxhw")}
    measures["area"] = lambda crop: crop[:, 2] * crop[:, 3]
    measures["ratio"] = lambda crop: crop[:, 3] / crop[:, 2]
    measures["bottom"] = lambda crop: crop[:, 0] + crop[:, 2]
    for name, measure in measures.items():
        a, b = np.sort(measure(ours)), np.sort(measure(theirs))
        # two-sample Kolmogorov-Smirnov, p about 1e-5
        grid = np.union1d(a, b)
        distance = abs(np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")).max() / count
        assert distance < 2.5 * (2 / count) ** 0.5, f"{name}: {distance}"


def test_crops_lie_inside_and_the_fallback_is_central() -> None:
    for size in [(375, 500), (20, 2000), (2000, 20), (1, 9), (9, 1)]:
        y, x, h, w, _ = np.moveaxis(crops_of(draw(size=size, count=500)), -1, 0)
        assert (y >= 0).all() and (x >= 0).all() and (h > 0).all() and (w > 0).all()
        assert (y + h <= size[0]).all() and (x + w <= size[1]).all()
    wide = crops_of(draw(replace(CONFIG, scale=(0.9, 1.0)), (20, 2000), 10))[0]
    assert np.array_equal(wide[:, :4], np.tile([0, (2000 - 27) // 2, 20, 27], (10, 1)))


# ---- the other draws ----


def test_simclr_probabilities_and_ranges() -> None:
    table = draw()
    for view in (0, 1):
        rows = table[view]
        assert (
            near(rows["flip"].mean(), 0.5) and near(rows["jitter"].mean(), 0.8) and near(rows["grayscale"].mean(), 0.2)
        )
        assert near((rows["blur"] == 1).mean(), CONFIG.blur_probability[view]) and (rows["blur"] <= 1).all()
        assert near(rows["solarize"].mean(), CONFIG.solarize_probability[view])
        for factor in (1.1, 1.2, 1.5):
            assert near((rows["blur_amount"] == np.float32(factor)).mean(), 1 / 3)
        for name, low, high in [
            ("brightness", 0.6, 1.4),
            ("contrast", 0.6, 1.4),
            ("saturation", 0.8, 1.2),
            ("hue", -0.1, 0.1),
        ]:
            values = rows[name]
            assert low <= values.min() < low + 0.001 and high - 0.001 < values.max() <= high + 1e-6
            assert abs(values.mean() - (low + high) / 2) < (high - low) * 4 / (12 * MANY) ** 0.5
        orders, counts = np.unique(rows["order"], axis=0, return_counts=True)
        assert len(orders) == 24 and all(near(count / MANY, 1 / 24) for count in counts)


def test_draws_are_independent() -> None:
    table = draw()
    columns = [table[view][name].astype(float) for view in (0, 1) for name in ("y", "h", "brightness", "hue", "flip")]
    columns += [table[0]["jitter"].astype(float), table[1]["solarize"].astype(float), table[1]["blur"].astype(float)]
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    correlation[[0, 1, 5, 6], [1, 0, 6, 5]] = 0  # a high crop has little room to move
    assert abs(correlation).max() < 0.04


def test_gaussian_blur() -> None:
    rows = draw(replace(CONFIG, blur="gaussian", blur_sigma=(0.5, 1.5)))[0]
    assert (rows["blur"] == 2).all()
    assert 0.5 <= rows["blur_amount"].min() < 0.51 and 1.49 < rows["blur_amount"].max() <= 1.5


def test_strong_jitter_never_gives_negative_factors() -> None:
    assert draw(replace(CONFIG, brightness=1.7))["brightness"].min() >= 0


def test_recipe_simple_crops_and_flips_only() -> None:
    simple, full = draw(replace(CONFIG, recipe="simple")), draw()
    assert np.array_equal(crops_of(simple), crops_of(full))
    for name in ("jitter", "grayscale", "blur", "solarize"):
        assert not simple[name].any()


def test_recipe_none_is_the_central_crop_of_evaluation() -> None:
    table = draw(replace(CONFIG, recipe="none"), (256, 400), 3)
    assert np.array_equal(crops_of(table), np.tile([16, 88, 224, 224, 0], (2, 3, 1)))


# ---- what draws depend on ----


def test_a_view_depends_on_seed_epoch_and_key_only() -> None:
    keys = np.array([4, 8, 15, 16, 23, 42])
    sizes = np.array([[100 + key, 200] for key in keys])
    table = draw_views(CONFIG, sizes, seed=1, epoch=2, keys=keys)
    part = draw_views(CONFIG, sizes[[3, 1]], seed=1, epoch=2, keys=keys[[3, 1]])
    assert part["image"].tolist() == [[0, 1], [0, 1]]
    part["image"] = [3, 1]
    assert np.array_equal(table[:, [3, 1]], part)


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"keys": np.arange(50, 100)}])
def test_other_seed_epoch_or_key_gives_other_views(change: dict) -> None:
    before, after = crops_of(draw(count=50)), crops_of(draw(count=50, **change))
    assert (before == after).all(axis=2).mean() < 0.05


def test_the_views_of_an_image_differ() -> None:
    table = draw(count=200)
    assert (crops_of(table[0]) == crops_of(table[1])).all(axis=1).mean() < 0.05


def test_empty_batch() -> None:
    table = draw(count=0)
    assert table.shape == (2, 0) and table.dtype == VIEW_DTYPE and crops_of(table).shape == (2, 0, 5)


@pytest.mark.parametrize(
    "sizes, keys, named",
    [([[3, 4]], [0, 1], "keys"), ([3, 4], [0, 1], "sizes"), ([[3, 4, 5]], [0], "sizes"), ([[0, 4]], [0], "sizes")],
)
def test_wrong_input(sizes: list, keys: list, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        draw_views(CONFIG, sizes, seed=0, epoch=0, keys=keys)
