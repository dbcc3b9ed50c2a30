"""Matched boxes: same region in both views, same numbers on every backend, and the published sampler's statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import available_backends

from scrl_fast.ops import sample_box_pairs, sample_box_pairs_replay

BACKENDS = available_backends("sample_box_pairs")
both = pytest.mark.parametrize("backend", BACKENDS)
needs_native = pytest.mark.skipif("native" not in BACKENDS, reason="the compiled sampler is not built")
SIZE, DRAW = 224, {"view_size": 224, "seed": 5, "step": 3}


def random_crops(images: int, seed: int = 0, height: int = 375, width: int = 500) -> np.ndarray:
    """int64 `[2, images, 5]`: two random crops of 0.2-1 of the area, as RandomResizedCrop draws them."""
    rng = np.random.default_rng(seed)
    crops = np.zeros((2, images, 5), np.int64)
    for crop in crops.reshape(-1, 5):
        while True:
            area = height * width * rng.uniform(0.2, 1.0)
            ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
            if w <= width and h <= height:
                break
        crop[:] = rng.integers(height - h + 1), rng.integers(width - w + 1), h, w, rng.integers(2)
    return crops


def whole(images: int) -> np.ndarray:
    """Both views show the same SIZE x SIZE pixels, so that pixels of the views are those of the drawing."""
    return np.tile(np.array([0, 0, SIZE, SIZE, 0]), (2, images, 1))


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def sides(boxes: np.ndarray) -> np.ndarray:
    """`[N, 2]`: width and height."""
    return boxes[:, 3:5] - boxes[:, 1:3]


def in_image(boxes: np.ndarray, crops: np.ndarray, first: int) -> np.ndarray:
    """`[N, 4]` float64 x0, y0, x1, y1 in the image's own pixels, back through flip and crop."""
    top, left, h, w, flip = crops[boxes[:, 0].astype(int) - first].T
    x0, y0, x1, y1 = boxes[:, 1:].T.astype(np.float64)
    x0, x1 = np.where(flip, SIZE - x1, x0), np.where(flip, SIZE - x0, x1)
    return np.stack([left + x0 * w / SIZE, top + y0 * h / SIZE, left + x1 * w / SIZE, top + y1 * h / SIZE], axis=1)


def share_of_close(boxes: np.ndarray, count: int, threshold: float) -> float:
    """The share of boxes whose IoU with an earlier one of their image reaches the threshold."""
    b = boxes[:, 1:].reshape(-1, count, 4).astype(np.float64)
    low, high = np.maximum(b[:, :, None, :2], b[:, None, :, :2]), np.minimum(b[:, :, None, 2:], b[:, None, :, 2:])
    shared, area = (high - low).clip(0).prod(-1), (b[..., 2:] - b[..., :2]).prod(-1)
    iou = shared / (area[:, :, None] + area[:, None] - shared)
    return float((iou * np.tri(count, k=-1) >= threshold).any(-1).mean())


# ---- what is drawn ----


@both
@pytest.mark.parametrize("options", [{}, {"grid": False}, {"boxes_per_image": 3, "min_size": 60}], ids=str)
def test_both_boxes_of_a_pair_show_the_same_region(backend, options):
    crops = random_crops(60)
    boxes1, boxes2 = sample_box_pairs(*crops, **DRAW, **options, backend=backend)
    region1, region2 = in_image(boxes1, crops[0], 0), in_image(boxes2, crops[1], 60)
    ids = boxes1[:, 0].astype(int)
    larger = np.maximum(crops[0, ids, 2:4], crops[1, ids, 2:4])  # the view that shows the region smaller
    pixel = larger[:, [1, 0, 1, 0]] / SIZE
    assert (abs(region1 - region2) <= 0.51 * pixel).all(), "clipping may cut what rounding added at a view's border"
    assert (abs(region1 - region2) < 1e-3).all(1).mean() > 0.8
    assert len({tuple(row) for row in crops[:, ids, 4].T}) == 4, "all four pairs of flips were seen"


@both
@pytest.mark.parametrize(("options", "count"), [({}, 10), ({"boxes_per_image": 3}, 3), ({"grid": False}, 10)], ids=str)
def test_rows_come_by_image_and_lie_in_their_view(backend, options, count):
    boxes1, boxes2 = sample_box_pairs(*random_crops(60), **DRAW, **options, backend=backend)
    ids = np.unique(boxes1[:, 0])
    assert np.array_equal(boxes1[:, 0], np.repeat(ids, count)), "an image gives all its rows, or none"
    assert np.array_equal(boxes2[:, 0], boxes1[:, 0] + 60)
    for boxes in (boxes1, boxes2):
        assert boxes.dtype == np.float32 and boxes[:, 1:].min() >= 0 and boxes[:, 1:].max() <= SIZE
    assert np.minimum(sides(boxes1), sides(boxes2)).min() >= 32 - 0.51


@needs_native
def test_statistics_are_those_of_the_published_sampler():
    crops, state = random_crops(3000), np.random.RandomState(1)
    ours, replayed = [], []
    for step in range(8):
        ours.append(sample_box_pairs(*crops, view_size=SIZE, seed=1, step=step)[0])
        replayed.append(sample_box_pairs_replay(*crops, view_size=SIZE, random_state=state)[0])
    ours, replayed = np.concatenate(ours), np.concatenate(replayed)
    assert abs(len(ours) / (8 * 30_000) - 0.985) < 0.005 and len(ours) == len(replayed)
    kept = [share_of_close(boxes, 10, 0.5) for boxes in (ours, replayed)]  # over the threshold after all 50 tries
    assert all(0.0002 < share < 0.003 for share in kept)
    for column in (ours[:, 1] - replayed[:, 1].mean(), ours[:, 2] - replayed[:, 2].mean()):
        assert abs(column.mean()) < 0.5
    quantiles = [np.quantile(sides(boxes), np.linspace(0.05, 0.95, 19), axis=0) for boxes in (ours, replayed)]
    assert abs(quantiles[0] - quantiles[1]).max() < 1.5


@both
@pytest.mark.parametrize("threshold", [0.2, 0.5])
def test_boxes_of_an_image_keep_apart(backend, threshold):
    for grid in (True, False):
        boxes, _ = sample_box_pairs(
            *whole(40), **DRAW, boxes_per_image=5, iou_threshold=threshold, grid=grid, backend=backend
        )
        assert share_of_close(boxes, 5, threshold) == 0
        assert share_of_close(boxes, 5, threshold * 0.5) > 0.02, "nor further apart than asked for"


@both
@pytest.mark.parametrize("least", [32, 70])
def test_the_grid_sets_places_and_sizes(backend, least):
    """Each number of columns is as likely as another, then each cell, then each width from `least` to the cell's."""
    cells = [SIZE / columns for columns in range(1, SIZE // least + 1)]
    narrow = np.mean([1 / (int(cell) - least + 1) for cell in cells])
    settings = {**DRAW, "boxes_per_image": 100, "min_size": least, "iou_threshold": 1.0, "backend": backend}
    boxes, _ = sample_box_pairs(*whole(20), **settings)
    assert np.array_equal(boxes, boxes.round())
    for axis in (0, 1):
        size, start = sides(boxes)[:, axis], boxes[:, 1 + axis]
        assert abs((size == least).mean() - narrow) < 0.025
        for cell in cells[1:]:
            step = np.floor(cell * np.arange(round(SIZE / cell)))
            assert set(step) <= set(start[size <= cell]), "boxes begin in every cell"
        assert start.min() == 0 and size.min() == least and (start + size).max() == SIZE
        assert abs((start + size / 2).mean() - SIZE / 2) < 3
    free, _ = sample_box_pairs(*whole(20), **settings, grid=False)
    width = sides(free)
    assert (width == least).mean() < 0.015 and abs(width.mean() - (least + SIZE - 1) / 2) < 2
    assert width.max() == SIZE - 1 and free[:, 3:].max() == SIZE - 1


@both
def test_jitter_moves_the_box_of_view_2_alone(backend):
    settings = {**DRAW, "boxes_per_image": 50, "backend": backend}
    plain1, plain2 = sample_box_pairs(*whole(30), **settings)
    boxes1, boxes2 = sample_box_pairs(*whole(30), **settings, jitter=0.2)
    assert np.array_equal(plain1, boxes1)
    assert np.array_equal(plain1[:, 1:], plain2[:, 1:])
    free = ((boxes2[:, 1:3] > 0) & (boxes2[:, 3:] < SIZE)).all(1)  # not cut at the border
    size = sides(boxes1)[free]
    factors = np.hstack([1 + (boxes2[free, 1:3] - boxes1[free, 1:3]) / size, sides(boxes2)[free] / size])
    assert len(factors) > 500
    assert factors.min() > 0.8 - 1e-5 and factors.max() < 1.2 + 1e-5
    assert factors.min(0).max() < 0.81 and factors.max(0).min() > 1.19
    assert abs(factors.mean(0) - 1).max() < 0.02
    assert abs(np.corrcoef(factors.T) - np.eye(4)).max() < 0.1, "four numbers of their own"


@both
def test_an_overlap_of_min_size_leaves_no_room(backend):
    crops = np.tile(np.array([0, 0, SIZE, SIZE, 0]), (2, 6, 1))
    crops[1, :, :2] = [
        [0, 192],
        [0, 191],
        [192, 0],
        [-191, 0],
        [0, 224],
        [500, 500],
    ]  # overlaps: 32, 33, 32, 33, 0, none
    boxes1, boxes2 = sample_box_pairs(*crops, **DRAW, boxes_per_image=4, backend=backend)
    assert boxes1[:, 0].tolist() == [1] * 4 + [3] * 4
    assert boxes2[:, 0].tolist() == [7] * 4 + [9] * 4
    none = sample_box_pairs(*crops[:, 4:], **DRAW, backend=backend)
    assert [(boxes.shape, boxes.dtype) for boxes in none] == [((0, 5), np.float32)] * 2


# ---- what it depends on ----


@both
def test_seed_step_and_key_each_choose_the_numbers(backend):
    crops, keys = whole(3), np.array([4, 5, 6])
    call = {**DRAW, "keys": keys, "backend": backend}
    once = sample_box_pairs(*crops, **call)
    assert same(once, sample_box_pairs(*crops, **call))
    for change in ({"seed": 6}, {"seed": 5 + 2**32}, {"step": 4}, {"keys": keys + 10}, {"keys": keys + 2**32}):
        other = sample_box_pairs(*crops, **{**call, **change})
        for image in range(3):
            assert (once[0][image * 10] != other[0][image * 10]).any(), f"{change}: image {image} is the same"
    rows = once[0][:, 1:].reshape(3, 40)
    assert len(np.unique(rows, axis=0)) == 3, "images of one call differ"
    assert same(once, sample_box_pairs(*crops, **{**call, "seed": 5 - 2**64})), "64 bits of the seed count"
    counted = sample_box_pairs(*crops, **{**call, "keys": np.arange(3)})
    assert same(counted, sample_box_pairs(*crops, **{**call, "keys": None}))


@both
def test_an_image_has_the_same_boxes_wherever_it_stands(backend):
    crops, keys = random_crops(30, seed=2), np.random.default_rng(1).integers(-(2**63), 2**63, 30)
    boxes = sample_box_pairs(*crops, **DRAW, keys=keys, jitter=0.1, backend=backend)
    order = np.random.default_rng(3).permutation(30)[:20]
    part = sample_box_pairs(*crops[:, order], **DRAW, keys=keys[order], jitter=0.1, backend=backend)
    for place, image in enumerate(order):
        for view, (all_rows, rows) in enumerate(zip(boxes, part, strict=True)):
            ours = rows[rows[:, 0] == place + 20 * view]
            assert np.array_equal(ours[:, 1:], all_rows[all_rows[:, 0] == image + 30 * view][:, 1:])


@needs_native
def test_threads_change_nothing():
    crops, before = random_crops(500), torch.get_num_threads()  # with 70 boxes each: enough to wake other threads
    results = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            results.append(sample_box_pairs(*crops, **DRAW, boxes_per_image=70, jitter=0.1, backend="native"))
    finally:
        torch.set_num_threads(before)
    assert same(*results)


@needs_native
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"grid": False},
        {"jitter": 0.1},
        {"iou_threshold": 0.2},
        {"iou_threshold": 1.0},
        {"boxes_per_image": 37},
        {"boxes_per_image": 1, "min_size": 1},
        {"view_size": 97, "min_size": 8},
        {"keys": np.arange(24) * -(2**40), "seed": -1, "step": 2**32 - 1},
    ],
    ids=str,
)
def test_native_agrees_with_reference_to_the_bit(options):
    arguments = {"view_size": SIZE, "seed": 2**63 + 5, "step": 7, **options}
    native = sample_box_pairs(*random_crops(24), **arguments, backend="native")
    assert len(native[0]) > 0
    assert same(native, sample_box_pairs(*random_crops(24), **arguments, backend="reference"))


# ---- what comes in and out ----


@both
def test_tensors_give_tensors_and_arrays_arrays(backend):
    crops = random_crops(4)
    expected = sample_box_pairs(*crops, **DRAW, keys=np.arange(5, 9), backend=backend)
    tensors = torch.from_numpy(crops)
    boxes = sample_box_pairs(*tensors, **DRAW, keys=torch.arange(5, 9), backend=backend)
    assert all(isinstance(rows, np.ndarray) for rows in expected)
    assert all(isinstance(rows, torch.Tensor) and rows.dtype == torch.float32 for rows in boxes)
    assert same(expected, boxes)
    strided = np.asfortranarray(crops.astype(np.int32)[:, :, ::-1])[:, :, ::-1]
    assert same(expected, sample_box_pairs(*strided, **DRAW, keys=np.arange(5, 9, dtype=np.int16), backend=backend))
    empty = sample_box_pairs(*tensors[:, :0], **DRAW, backend=backend)
    assert [(rows.shape, rows.dtype) for rows in empty] == [((0, 5), torch.float32)] * 2


@both
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"view_size": 0}, ValueError, r"view_size must lie in 1\.\.1048575, got 0"),
        ({"view_size": 224.0}, TypeError, "view_size must be an integer, got 224.0"),
        ({"boxes_per_image": 0}, ValueError, r"boxes_per_image must lie in .*, got 0"),
        ({"boxes_per_image": True}, TypeError, "boxes_per_image must be an integer, got True"),
        ({"min_size": -1}, ValueError, r"min_size must lie in .*, got -1"),
        ({"min_size": 225}, ValueError, "min_size must not exceed view_size 224, got 225"),
        ({"iou_threshold": 0}, ValueError, r"iou_threshold must lie in \(0, 1\], got 0"),
        ({"iou_threshold": float("nan")}, ValueError, "iou_threshold must lie in .*, got nan"),
        ({"jitter": 1.0}, ValueError, r"jitter must lie in \[0, 1\), got 1.0"),
        ({"step": -1}, ValueError, r"step must lie in 0..4294967295, got -1"),
        ({"step": 2**32}, ValueError, "step must lie in .*, got 4294967296"),
        ({"keys": np.arange(2)}, ValueError, r"keys must be \[3\], one for each image, got \[2\]"),
        ({"keys": np.ones(3)}, TypeError, "keys must hold integers, got float64"),
        ({"keys": [1, 2, 3]}, TypeError, "keys must be a NumPy array or a CPU tensor, got list"),
        ({"crops1": np.zeros((3, 4), int)}, ValueError, r"crops1 must be \[B, 5\], .*, got \[3, 4\]"),
        ({"crops2": np.ones((2, 5), int)}, ValueError, "crops1 and crops2 must have as many rows, got 3 and 2"),
        ({"crops2": torch.ones(3, 5, dtype=int)}, TypeError, "must be of one kind, got ndarray and Tensor"),
        ({"crops1": np.ones((3, 5))}, TypeError, "crops1 must hold integers, got float64"),
        ({"crops1": torch.ones(3, 5, dtype=int, device="meta")}, TypeError, "crops1 must be on the CPU, got .* meta"),
        ({"crops2": np.array([[0, 0, 9, 9, 0]] * 2 + [[0, 0, 9, 0, 0]])}, ValueError, r"crops2\[2\].*\(0, 0, 9, 0\)"),
        ({"crops1": np.full((3, 5), 2**20)}, ValueError, r"crops1\[0\] is no crop.* all below 1048576"),
        ({"backend": "triton"}, RuntimeError, "triton.*cannot run on cpu"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_named_with_their_value(backend, change, kind, message):
    crops1, crops2 = whole(3)
    call = {"crops1": crops1, "crops2": crops2, **DRAW, "backend": backend, **change}
    with pytest.raises(kind, match=message):
        sample_box_pairs(call.pop("crops1"), call.pop("crops2"), **call)
