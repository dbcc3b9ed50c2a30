"""RoIAlign's Triton form: the lists of boxes it makes, the memory it takes, the order in which it adds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import triton_devices
from tiny_roi_align import some_boxes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scrl_fast.ops.backends import triton_failure

on_triton = pytest.mark.parametrize("device", triton_devices())
NONE = math.nan  # an image index


def boxes_on(images: int, height: int, width: int, count: int) -> Tensor:
    """In cells; in no order of their images."""
    boxes = some_boxes(count, images + 1, height, width).float()
    return torch.cat([boxes[:, :1], boxes[:, 1:] / 32], 1)


def axis_weights(low: Tensor, high: Tensor, bins: int, size: int, ratio: int, aligned: bool) -> Tensor:
    """[bins, size] for a map at scale 1, every operation rounded as in the kernel."""
    offset = 0.5 if aligned else 0.0
    low, extent = low - offset, (high - offset) - (low - offset)
    if not aligned:
        extent = extent.clamp(min=1)
    bin_size = extent / bins
    samples = int(bin_size.ceil()) if ratio < 1 else ratio
    cells, weights = torch.arange(size), low.new_zeros(bins, size)
    for bin in range(bins):
        for sample in range(samples):
            position = (low + bin * bin_size) + (sample + 0.5) * bin_size / samples
            if -1 <= position <= size:
                weights[bin] += (1 - (position.clamp(0, size - 1) - cells).abs()).clamp(min=0)
    return weights / max(samples, 1)


def backward_in_a_loop(grad: Tensor, boxes: Tensor, ratio: int, aligned: bool, size: tuple[int, ...]) -> Tensor:
    """Box after box, bin after bin, each over the whole map."""
    total = torch.zeros(size, dtype=grad.dtype)
    for box, values in zip(boxes, grad, strict=True):
        if not (0 <= box[0] < size[0] and box.isfinite().all()):
            continue
        y = axis_weights(box[2], box[4], grad.shape[2], size[2], ratio, aligned)
        x = axis_weights(box[1], box[3], grad.shape[3], size[3], ratio, aligned)
        for p in range(grad.shape[2]):
            for q in range(grad.shape[3]):
                weight = y[p][:, None] * x[q]
                total[int(box[0])] += torch.where(weight != 0, weight * values[:, p, q, None, None], 0)
    return total


@pytest.mark.skipif(bool(triton_failure("cpu")), reason=triton_failure("cpu"))  # compiled, it adds in one rounding
@pytest.mark.parametrize("bins, ratio, aligned", [((2, 3), -1, False), ((2, 2), 2, True), ((2, 2), -1, None)], ids=str)
def test_bits_of_a_plain_loop(bins: tuple[int, int], ratio: int, aligned: bool | None) -> None:
    """Three strips whose borders lie inside rows; boxes over one and over all of them, beyond the map, turned round, of
    no image; infinite gradients where the weight is 0. Without boxes where aligned is None."""
    from scrl_fast.kernels import roi_align as form

    size = (3, 2, 23, 9)
    boxes = boxes_on(3, *size[2:], 12)
    boxes[3, 1:] = torch.tensor([-2.5, -3, 12, 40])  # over everything
    boxes[4, 1:] = torch.tensor([2.0, 30, 5, 41])  # below the map
    boxes[5, 1:] = boxes[5, [3, 4, 1, 2]]
    boxes[6, 0], boxes[7, 0], boxes[8, 3] = 3, NONE, math.inf
    boxes[9] = torch.tensor([0, -1.0, 3, -0.5, 9])  # reads the first column alone
    if aligned is None:
        boxes, aligned = boxes[:0], False
    grad = torch.randn(len(boxes), size[1], *bins, generator=torch.Generator().manual_seed(2))
    grad[3:4, 1, 0, 1] = math.inf
    made = form.roi_align_backward(grad, boxes, 1.0, ratio, aligned, list(size), True)
    expected = backward_in_a_loop(grad, boxes, ratio, aligned, size)
    assert torch.equal(made.view(torch.int32), (expected + 0.0).view(torch.int32))
    assert made.isfinite().any() and made.isinf().any() == bool(len(boxes))


@on_triton
def test_a_strip_lists_the_boxes_that_reach_it(device: str) -> None:
    from scrl_fast.kernels import roi_align_boxes as form

    images, height, width, block = 3, 64, 20, 16
    boxes = boxes_on(images, height, width, 45)
    boxes[:, 4] = boxes[:, 2] + (boxes[:, 4] - boxes[:, 2]) / 8  # an eighth as high
    boxes[0] = torch.tensor([1, 2.0, 11.5, 9, 12.5])  # reads row 12 alone, with which the second strip begins
    weights = form.BoxWeights(boxes.to(device), images, (height, width), (1, 1), (1.0, 1, False))
    order, first = form.boxes_of_images(weights.boxes, images)
    lists, ends, blocks = form.boxes_of_strips(weights, order, first, (height, width), block)
    strips, listed, image = len(lists), 0, boxes[:, 0].tolist()
    assert strips == -(-height * width // (blocks * block)) == 8
    ranges = weights.y_bins[:, -1, :2].tolist()
    for n in range(images):
        for strip in range(strips):
            rows = [cell // width for cell in range(strip * blocks * block, (strip + 1) * blocks * block)]
            wanted = [
                k for k, (begin, end) in enumerate(ranges) if image[k] == n and begin <= rows[-1] and end > rows[0]
            ]
            assert lists[strip, first[n] : ends[n, strip]].tolist() == wanted
            listed += len(wanted)
    assert 0 < listed < 2 * len(boxes) < strips * len(boxes) / 3


@on_triton
def test_a_small_map_has_one_strip_and_no_list_of_its_own(device: str) -> None:
    from scrl_fast.kernels import roi_align_boxes as form

    weights = form.BoxWeights(some_boxes(5).float().to(device), 3, (7, 7), (1, 1), (1 / 32, -1, False))
    order, first = form.boxes_of_images(weights.boxes, 3)
    lists, ends, blocks = form.boxes_of_strips(weights, order, first, (7, 7), 16)
    assert lists is order and ends.tolist() == first[1:].tolist() and blocks == 4


# ---- images ----

SORTED = torch.arange(300) // 7 * 2.0  # every second image has none
INDICES = {
    "sorted": SORTED,
    "sorted, none behind": torch.cat([SORTED, torch.tensor([90.0, NONE, 1e9, -1, math.inf])]),
    "fractions": torch.tensor([-0.5, -0.0, 0.5, 0.0, 1.9, 1.0, 2.5, 71.5, 89.5]),
    "unsorted": SORTED[torch.randperm(300, generator=torch.Generator().manual_seed(0))],
    "one out of place": torch.cat([SORTED[:256], SORTED[255:256] - 2, SORTED[256:]]),
    "none between": torch.cat([SORTED[:150], torch.tensor([NONE, -3.0, 90.0]), SORTED[150:]]),
    "no boxes": SORTED[:0],
}


def rows(image: Tensor, device: str) -> Tensor:
    return torch.cat([image[:, None], torch.zeros(len(image), 4)], 1).to(device)


@on_triton
@pytest.mark.parametrize("sort", [False, True], ids=["looks", "sort"])
@pytest.mark.parametrize("case", INDICES)
def test_boxes_of_images(device: str, case: str, sort: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from scrl_fast.kernels import roi_align_boxes as form

    if sort:
        monkeypatch.setattr(form, "MOST_LOOKS", -1)
    image, images = INDICES[case], 90
    order, first = form.boxes_of_images(rows(image, device), images)
    wanted = [[k for k, index in enumerate(image.tolist()) if n <= index < n + 1] for n in range(images)]
    assert first[0] == 0
    assert [order[first[n] : first[n + 1]].tolist() for n in range(images)] == wanted
    assert sorted(order.tolist()) == list(range(len(image))), "those of no image behind"


@on_triton
def test_sorted_boxes_are_not_looked_at_for_every_image(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from scrl_fast.kernels import roi_align_boxes as form

    class Wrong:
        """Launches the kernel on images that would spoil the order, if it looked at them."""

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda image, *rest, **options: launch[grid](image.flip(0) - 1, *rest, **options)

    launch = form.group_by_image
    monkeypatch.setattr(form, "group_by_image", Wrong())
    order, first = form.boxes_of_images(rows(SORTED, device), 86)
    assert order.tolist() == list(range(300)) and first[[0, 1, 2, 86]].tolist() == [0, 7, 7, 300]
    shuffled = rows(INDICES["unsorted"], device)
    assert form.boxes_of_images(shuffled, 86)[0].tolist() != torch.sort(shuffled[:, 0], stable=True)[1].tolist()


# ---- work and memory of sizes that do not run here ----


class Allocated(TorchDispatchMode):
    """Bytes of all that is allocated inside, which must be on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, Tensor) and not each._is_view():
                self.bytes += each.nbytes
        return result


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Names and programs of the kernels that would have been launched."""
    from scrl_fast.kernels import roi_align as form

    names: list[tuple[str, int]] = []

    def note(kernel: Any, grid: tuple[int, ...]) -> Any:
        return lambda *_, **__: names.append((kernel.__name__, math.prod(grid)))

    monkeypatch.setattr(type(form.pool), "__getitem__", note, raising=False)
    return names


@pytest.mark.skipif(bool(triton_failure("cpu")), reason=triton_failure("cpu"))
def test_weights_of_large_maps_take_little_memory(launched: list[tuple[str, int]]) -> None:
    """8,192 boxes of 14 x 14 bins on 200 x 336 cells: 246 MB, if every bin had a row of cells."""
    from scrl_fast.kernels import roi_align as form

    map, boxes = torch.empty(1, 4, 200, 336, device="meta"), torch.empty(8192, 5, device="meta")
    with Allocated() as forward:
        pooled = form.roi_align(map, boxes, 0.25, 14, 14, 2, False)
    with Allocated() as backward:
        form.roi_align_backward(pooled, boxes, 0.25, 2, False, list(map.shape), False)
    assert [name for name, _ in launched].count("box_weights") == 2
    assert 20e6 < forward.bytes - pooled.nbytes < 25e6
    assert 20e6 < backward.bytes - map.nbytes < 26e6, "and lists, an eighth of the weights of rows"


@pytest.mark.skipif(bool(triton_failure("cpu")), reason=triton_failure("cpu"))
def test_many_images_and_boxes_are_not_looked_at_in_pairs(launched: list[tuple[str, int]]) -> None:
    from scrl_fast.kernels import roi_align as form

    grad, boxes = torch.empty(40960, 4, 1, 1, device="meta"), torch.empty(40960, 5, device="meta")
    form.roi_align_backward(grad, boxes, 0.25, 2, False, [4096, 4, 7, 7], False)
    assert dict(launched) == {"box_weights": 40960, "take_order": 160, "pool_backward": 4096 * 4}
