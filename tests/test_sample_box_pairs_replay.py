"""The replay of NumPy's legacy stream against the published procedure, written here with `np.random` itself."""

import numpy as np
import pytest
import torch
from test_sample_box_pairs import random_crops

from scrl_fast.ops import sample_box_pairs_replay
from scrl_fast.ops.sample_box_pairs_replay import _OPERATION

BACKENDS = [name for name in ("native", "reference") if not _OPERATION.failure(name, "cpu")]


def published(crops1, crops2, *, size, least=32, boxes=10, threshold=0.5, grid=True, ratio=0.0):
    """The order of draws and the arithmetic of the published sampler, from the global NumPy state."""
    draw, rows1, rows2 = np.random.randint, [], []
    for n, (c1, c2) in enumerate(zip(crops1.tolist(), crops2.tolist(), strict=True)):
        (y1, x1, h1, w1, flip1), (y2, x2, h2, w2, flip2) = c1, c2
        left, top, right, bottom = max(x1, x2), max(y1, y2), min(x1 + w1, x2 + w2), min(y1 + h1, y2 + h2)
        if left >= right or top >= bottom:
            continue
        zoom1, zoom2 = (size / w1, size / h1), (size / w2, size / h2)
        zoom = min(zoom1[0], zoom2[0]), min(zoom1[1], zoom2[1])
        width, height = round((right - left) * zoom[0]), round((bottom - top) * zoom[1])
        if width <= least or height <= least:
            continue
        taken = []
        for k in range(boxes):
            for _ in range(50):
                if grid:
                    nx, ny = draw(1, int(width / least) + 1), draw(1, int(height / least) + 1)
                    gw, gh = width / nx, height / ny
                    gx, gy = draw(0, nx), draw(0, ny)
                    w, h = draw(least, gw + 1), draw(least, gh + 1)  # float bounds: NumPy cuts them off
                    x, y = draw(0, gw - w + 1) + int(gx * gw), draw(0, gh - h + 1) + int(gy * gh)
                else:
                    w, h = draw(least, width), draw(least, height)
                    x, y = draw(0, width - w), draw(0, height - h)
                a = place(x, y, w, h, 1 / zoom[0], 1 / zoom[1], zoom1, (left - x1, top - y1), flip1, size)
                b = place(x, y, w, h, 1 / zoom[0], 1 / zoom[1], zoom2, (left - x2, top - y2), flip2, size)
                if ratio:
                    j = np.random.uniform(1.0 - ratio, 1.0 + ratio, size=4)
                    bw, bh = b[2] - b[0], b[3] - b[1]
                    bx, by = float(b[0] + bw * (j[0] - 1)), float(b[1] + bh * (j[1] - 1))
                    b = [bx, by, float(bx + bw * j[2]), float(by + bh * j[3])]
                if k == 0 or threshold == 1.0 or max(iou(a, t) for t in taken) < threshold:
                    break
            cut = [[max(0.0, e[0]), max(0.0, e[1]), min(float(size), e[2]), min(float(size), e[3])] for e in (a, b)]
            taken.append(cut[0])
            rows1.append([n, *cut[0]])
            rows2.append([n + len(crops1), *cut[1]])
    return torch.tensor(rows1).reshape(-1, 5).numpy(), torch.tensor(rows2).reshape(-1, 5).numpy()


def place(x, y, w, h, ux, uy, zoom, shift, flip, size):
    left, top = x * ux * zoom[0] + shift[0] * zoom[0], y * uy * zoom[1] + shift[1] * zoom[1]
    right, bottom = left + w * ux * zoom[0], top + h * uy * zoom[1]
    return [size - right, top, size - left, bottom] if flip else [left, top, right, bottom]


def iou(a, b):
    shared = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    if shared == 0:
        return 0
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (224, {}),
        (224, {"grid": False}),
        (224, {"ratio": 0.1}),
        (224, {"threshold": 0.15, "boxes": 17}),
        (224, {"threshold": 1.0}),
        (97, {"least": 7, "ratio": 0.3, "threshold": 0.3}),
        (64, {"least": 1}),
    ],
)
def test_boxes_and_final_state_are_the_published_ones(backend, size, options):
    crops = random_crops(48, seed=4)
    names = {"boxes": "boxes_per_image", "least": "min_size", "threshold": "iou_threshold", "ratio": "jitter"}
    np.random.seed(11)
    expected = published(*crops, size=size, **options)
    state_after = np.random.get_state()
    ours = {names.get(key, key): value for key, value in options.items()}
    np.random.seed(11)
    boxes = sample_box_pairs_replay(*crops, view_size=size, **ours, backend=backend)
    assert len(expected[0]) > 300
    for got, want in zip(boxes, expected, strict=True):
        assert got.dtype == np.float32 and np.array_equal(got, want)
    for got, want in zip(np.random.get_state(), state_after, strict=True):
        assert np.array_equal(got, want)


@pytest.mark.skipif("native" not in BACKENDS, reason="the compiled sampler is not built")
def test_native_leaves_the_state_where_numpy_does():
    """From every place in a block of 624 words on, beyond its end included; and one draw that uses no word."""
    crops, single = random_crops(1), np.tile([0, 0, 33, 33, 0], (2, 1, 1))
    for place in [*range(500, 625, 4), 621, 622, 623]:
        for views, options in ((crops, {"view_size": 224}), (single, {"view_size": 33, "boxes_per_image": 1})):
            after = []
            for backend in ("native", "reference"):
                state = np.random.RandomState(5)
                state.set_state(("MT19937", state.get_state()[1], place))
                boxes = sample_box_pairs_replay(*views, **options, random_state=state, backend=backend)
                after.append([*boxes, *state.get_state()[1:3], state.randint(0, 1 << 30, 700)])
            for ours, theirs in zip(*after, strict=True):
                assert np.array_equal(ours, theirs), (place, options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_own_state_goes_on_and_leaves_the_global_one(backend):
    crops = torch.from_numpy(random_crops(8))
    np.random.seed(3)
    once = [sample_box_pairs_replay(*crops, view_size=224, backend=backend)[0] for _ in range(2)]
    before = np.random.get_state()[1].copy()
    state = np.random.RandomState(3)
    again = [sample_box_pairs_replay(*crops, view_size=224, random_state=state, backend=backend)[0] for _ in range(2)]
    assert all(isinstance(boxes, torch.Tensor) for boxes in again)
    assert torch.equal(once[0], again[0]) and torch.equal(once[1], again[1])
    assert not torch.equal(again[0], again[1])
    assert np.array_equal(before, np.random.get_state()[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_draw_draws_nothing(backend):
    apart = np.array([[0, 0, 50, 50, 0]]), np.array([[100, 100, 50, 50, 0]])
    state = np.random.RandomState(5)
    boxes = sample_box_pairs_replay(*apart, view_size=224, random_state=state, backend=backend)
    assert [b.shape for b in boxes] == [(0, 5), (0, 5)]
    assert state.randint(1 << 30) == np.random.RandomState(5).randint(1 << 30)


def test_wrong_input():
    crops = random_crops(2)
    with pytest.raises(TypeError, match=r"random_state must be a numpy\.random\.RandomState or None, got Generator"):
        sample_box_pairs_replay(*crops, view_size=224, random_state=np.random.default_rng(0))
    with pytest.raises(ValueError, match="min_size must not exceed view_size 16, got 32"):
        sample_box_pairs_replay(*crops, view_size=16)
    crops[1, 1, 2] = 0
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=r"crops2\[1\] is no crop"):
            sample_box_pairs_replay(*crops, view_size=224, backend=backend)
