"""Matched boxes: same region in both views, same numbers on every backend, and the published sampler's statistics."""

import numpy as np
import pytest
import torch

from scrl_fast import _native
from scrl_fast.ops import sample_box_pairs
from scrl_fast.ops.sample_box_pairs import sample_box_pairs_reference  # noqa: F401

needs_native = pytest.mark.skipif(
    bool(_native.host_failure("sample_box_pairs")), reason=_native.host_failure("sample_box_pairs") or "present"
)


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
    ],
    ids=str,
)
def test_native_agrees_with_reference_to_the_bit(options):
    crops = random_crops(24)
    arguments = {"view_size": 224, "seed": 2**63 + 5, "step": 7, **options}
    native = sample_box_pairs(*crops, **arguments, backend="native")
    reference = sample_box_pairs(*crops, **arguments, backend="reference")
    assert len(native[0]) > 0
    for ours, theirs in zip(native, reference, strict=True):
        assert ours.dtype == np.float32
        assert np.array_equal(ours, theirs)


def test_tensors_in_tensors_out():
    crops = torch.from_numpy(random_crops(4))
    boxes1, boxes2 = sample_box_pairs(*crops, view_size=224, seed=1, step=2)
    assert isinstance(boxes1, torch.Tensor) and boxes1.dtype == torch.float32
    expected = sample_box_pairs(*crops.numpy(), view_size=224, seed=1, step=2)
    assert np.array_equal(boxes1, expected[0]) and np.array_equal(boxes2, expected[1])
