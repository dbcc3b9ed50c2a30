from __future__ import annotations

import numpy as np
import pytest

from scrl_fast.data.sources.demo import NUM_DIGITS, DemoScenes, _backgrounds, _drawn, _load_digits

COUNT = 300


@pytest.fixture(scope="module")
def train() -> DemoScenes:
    return DemoScenes(COUNT)


@pytest.fixture(scope="module")
def held_out() -> DemoScenes:
    return DemoScenes(COUNT, split="test")


def same(a: DemoScenes, b: DemoScenes) -> bool:
    return np.array_equal(a.images, b.images) and all(
        np.array_equal(a.boxes(i), b.boxes(i)) and np.array_equal(a.labels(i), b.labels(i)) for i in range(len(a))
    )


def test_the_digits_are_those_of_the_public_set() -> None:
    from sklearn.datasets import load_digits

    images, labels = _load_digits()
    known = load_digits()
    assert np.array_equal(images, known.images) and np.array_equal(labels, known.target)


def test_scenes(train: DemoScenes) -> None:
    assert train.images.shape == (COUNT, 96, 96, 3) and train.images.dtype == np.uint8
    assert train.label(0) == -1 and train.num_classes == 0 and "7" in train.name_of(7)
    assert np.array_equal(train.read(5), train.images[5])
    with pytest.raises(ValueError, match="read-only"):
        train.read(0)[0, 0, 0] = 1
    counts = [len(train.labels(index)) for index in range(COUNT)]
    assert 2 <= np.mean(counts) <= 5 and min(counts) >= 1
    labels = np.concatenate([train.labels(index) for index in range(COUNT)])
    assert (np.bincount(labels, minlength=NUM_DIGITS) > len(labels) / 20).all()


def test_boxes_lie_inside_and_apart(train: DemoScenes) -> None:
    sides = []
    for index in range(COUNT):
        boxes = train.boxes(index)
        assert boxes.shape == (len(train.labels(index)), 4) and boxes.dtype == np.float32
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= 96).all()
        sides += list(boxes[:, 2:] - boxes[:, :2])
        for a in range(len(boxes)):
            for b in range(a):
                shared = np.minimum(boxes[a, 2:], boxes[b, 2:]) - np.maximum(boxes[a, :2], boxes[b, :2])
                assert (shared <= 0).any()
    sides = np.array(sides)
    assert (sides[:, 0] == sides[:, 1]).all() and sides.min() == 16 and sides.max() == 32


def test_digits_are_where_the_boxes_say() -> None:
    scenes, plain = DemoScenes(40), DemoScenes(40, digits=(1, 1), texture=0.0)
    for index in range(len(plain)):
        x0, y0, x1, y1 = plain.boxes(index)[0].astype(int)
        image = plain.read(index).astype(int)
        changed = np.abs(image - image[-1 if y0 > 0 else 0, -1 if x0 > 0 else 0]).sum(axis=2) > 30
        changed[y0:y1, x0:x1] = False
        assert not changed.any()
    assert (scenes.images.reshape(40, -1, 3).std(axis=1) > 5).all()  # textured: no plain colour anywhere


def test_train_and_test_share_no_digit_and_no_background(
    train: DemoScenes, held_out: DemoScenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[str, set[int]] = {"train": set(), "test": set()}
    seen: dict[str, set[bytes]] = {"train": set(), "test": set()}
    for split in used:

        def drawn(digit: int, side: int, split: str = split) -> np.ndarray:
            used[split].add(digit)
            return _drawn(digit, side)

        def backgrounds(u: np.ndarray, size: int, texture: float, split: str = split) -> np.ndarray:
            seen[split].update(row.tobytes() for row in u[:, :8])
            return _backgrounds(u, size, texture)

        monkeypatch.setattr("scrl_fast.data.sources.demo._drawn", drawn)
        monkeypatch.setattr("scrl_fast.data.sources.demo._backgrounds", backgrounds)
        DemoScenes(COUNT, split=split)  # type: ignore[arg-type]
    assert max(used["train"]) < 1200 <= min(used["test"]) and len(used["train"]) > 300
    assert len(seen["train"]) == len(seen["test"]) == COUNT and not seen["train"] & seen["test"]


def test_a_scene_depends_on_seed_split_and_place_only(train: DemoScenes) -> None:
    assert same(DemoScenes(50), DemoScenes(50))
    few = DemoScenes(50)
    assert np.array_equal(few.images, train.images[:50]) and np.array_equal(few.boxes(9), train.boxes(9))
    assert not np.array_equal(DemoScenes(1, seed=1).images, train.images[:1])


def test_parameters() -> None:
    scenes = DemoScenes(60, 64, digits=(1, 2), digit_size=(16, 20))
    assert scenes.images.shape == (60, 64, 64, 3)
    assert {len(scenes.labels(index)) for index in range(60)} == {1, 2}
    sides = np.concatenate([scenes.boxes(index)[:, 2] - scenes.boxes(index)[:, 0] for index in range(60)])
    assert sides.min() >= 16 and sides.max() <= 20
    plain = DemoScenes(5, 32, digits=(1, 1), texture=0.0).images[:, 0]
    assert (plain.std(axis=1) < 60).all()


@pytest.mark.parametrize(
    "named, options",
    [
        ("data.demo_images", {"count": 0}),
        ("data.demo_size", {"size": 8}),
        ("split", {"split": "val"}),
        ("digits", {"digits": (0, 2)}),
        ("digits", {"digits": (3, 2)}),
        ("digit_size", {"digit_size": (4, 20)}),
        ("digit_size", {"digit_size": (20, 97)}),
        ("texture", {"texture": 1.5}),
    ],
)
def test_wrong_parameters(named: str, options: dict) -> None:
    with pytest.raises(ValueError, match=named):
        DemoScenes(**{"count": 2, **options})
