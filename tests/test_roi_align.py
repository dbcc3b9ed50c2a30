"""roi_align: every backend against torchvision and against a float64 reference written out sample by sample."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from conftest import assert_as_accurate, guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_roi_align import (
    LAYOUTS,
    OPTIONS,
    dtypes,
    everywhere,
    feature_map,
    interpreted,
    run,
    small_work,
    some_boxes,
)
from torch import Tensor
from torchvision.ops import RoIAlign as TorchvisionRoIAlign
from torchvision.ops import roi_align as torchvision_roi_align

from scrl_fast.ops import RoIAlign, _native, roi_align
from scrl_fast.ops.roi_align import roi_align_reference


def by_samples(input: Tensor, boxes: Tensor, size: tuple[int, int], scale: float, ratio: int, aligned: bool) -> Tensor:
    """SPEC in loops: each sample of each bin fetched on its own. A second oracle, independent of both libraries."""
    _, c, h, w = input.shape
    out = input.new_zeros(len(boxes), c, *size)
    for k, (image, x0, y0, x1, y1) in enumerate(boxes.tolist()):
        shift = 0.5 if aligned else 0.0
        left, top = x0 * scale - shift, y0 * scale - shift
        width, height = x1 * scale - shift - left, y1 * scale - shift - top
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        bin_h, bin_w = height / size[0], width / size[1]
        rows, columns = (ratio, ratio) if ratio > 0 else (math.ceil(bin_h), math.ceil(bin_w))
        for by, bx, sy, sx in itertools.product(range(size[0]), range(size[1]), range(rows), range(columns)):
            y, x = top + by * bin_h + (sy + 0.5) * bin_h / rows, left + bx * bin_w + (sx + 0.5) * bin_w / columns
            if not (-1 <= y <= h and -1 <= x <= w):
                continue
            y, x = min(max(y, 0.0), h - 1), min(max(x, 0.0), w - 1)
            i, j = int(y), int(x)
            i2, j2, fy, fx = min(i + 1, h - 1), min(j + 1, w - 1), y - int(y), x - int(x)
            corner = input[int(image)]
            above = corner[:, i, j] * (1 - fx) + corner[:, i, j2] * fx
            below = corner[:, i2, j] * (1 - fx) + corner[:, i2, j2] * fx
            out[k, :, by, bx] += (above * (1 - fy) + below * fy) / (rows * columns)
    return out


# ---- numbers ----


@everywhere
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_the_definition(device: str, backend: str, options) -> None:
    size, ratio, aligned = options
    pair = (size, size) if isinstance(size, int) else size
    input, boxes = feature_map(c=3), some_boxes(12)
    expected = by_samples(input.detach(), boxes, pair, 1 / 32, ratio, aligned)
    output, _ = run(input.detach().to(device).requires_grad_(), boxes.to(device), options, backend=backend)
    torch.testing.assert_close(output.cpu(), expected, rtol=1e-12, atol=1e-12)


@everywhere
@dtypes
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_as_accurate_as_torchvision(device: str, backend: str, dtype: torch.dtype, options) -> None:
    count = 6 if interpreted(device, backend) else 25
    input = feature_map(**small_work(device, backend), dtype=dtype, device=device)
    boxes = some_boxes(count).to(device)
    ours = run(input, boxes, options, backend=backend)
    exact = run(input.detach().double().requires_grad_(), boxes, options, function=torchvision_roi_align)
    if dtype == torch.bfloat16:  # torchvision has none on the CPU: what a user does is to cast there and back
        there = run(input.detach().float().requires_grad_(), boxes.float(), options, function=torchvision_roi_align)
        pytorch = tuple(t.to(dtype) for t in there)
    else:
        pytorch = run(input, boxes.to(dtype).to(dtype), options, function=torchvision_roi_align)
        if dtype == torch.float16:  # it also rounds the boxes to float16; the geometry here is float32
            there = run(input.detach().float().requires_grad_(), boxes.float(), options, function=torchvision_roi_align)
            pytorch = tuple(t.to(dtype) for t in there)
    assert ours[0].dtype == ours[1].dtype == dtype
    for name, *values in zip(("output", "gradient"), ours, pytorch, exact, strict=True):
        assert_as_accurate(*values, name)


@everywhere
@pytest.mark.parametrize("h, w, c", [(1, 1, 5), (1, 13, 16), (32, 3, 33), (17, 40, 64), (7, 7, 257)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sizes(device: str, backend: str, h: int, w: int, c: int, layout: str) -> None:
    slow = interpreted(device, backend)
    input = LAYOUTS[layout](feature_map(2, min(c, 17) if slow else c, h, w).detach()).to(device).requires_grad_()
    boxes = some_boxes(3 if slow else 9, 2, h, w).to(device)
    for options in ((1, -1, False), ((2, 3) if slow else (7, 5), -1, True)):
        ours = run(input, boxes, options, backend=backend)
        exact = run(input, boxes, options, function=torchvision_roi_align)
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@everywhere
@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: str, backend: str, dtype: torch.dtype, layout: str) -> None:
    count = 6 if interpreted(device, backend) else 25
    input = feature_map(**small_work(device, backend), dtype=dtype, device=device)
    boxes = some_boxes(count).to(device)
    expected = run(input, boxes, ((2, 2), -1, False), backend=backend)
    laid = LAYOUTS[layout](input.detach()).requires_grad_()
    made = run(laid, boxes, ((2, 2), -1, False), backend=backend)
    eps = torch.finfo(dtype).eps
    for a, b in zip(made, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=4 * eps, atol=8 * eps)
    if layout in ("contiguous", "channels_last") and backend != "reference":
        assert made[1].stride() == laid.stride()


@everywhere
def test_gradient_arrives_in_any_layout(device: str, backend: str) -> None:
    input, boxes = feature_map(device=device), some_boxes().to(device)
    output = roi_align(input, boxes, 2, 1 / 32, backend=backend)
    cotangent = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, input, cotangent, retain_graph=True)
    for laid in (cotangent.contiguous(memory_format=torch.channels_last), cotangent.mT.contiguous().mT):
        (made,) = torch.autograd.grad(output, input, laid, retain_graph=True)
        torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)
    (ones,) = torch.autograd.grad(output.sum(), input)  # an expanded gradient, stride 0
    assert math.isclose(ones.sum().item(), torch.autograd.grad(
        torchvision_roi_align(input, boxes, 2, 1 / 32).sum(), input)[0].sum().item(), rel_tol=1e-10)  # fmt: skip


# ---- boxes ----


@everywhere
def test_boxes_as_a_list_and_as_rows_of_any_dtype(device: str, backend: str) -> None:
    input = feature_map(dtype=torch.float32, device=device)
    each = [some_boxes(count, 1)[:, 1:].to(device) for count in (2, 0, 3)]
    rows = torch.cat([torch.cat([torch.full((len(b), 1), float(i), device=device).double(), b], 1)
                      for i, b in enumerate(each)])  # fmt: skip
    expected = roi_align(input, rows, 2, 1 / 32, backend=backend)
    assert torch.equal(roi_align(input, each, 2, 1 / 32, backend=backend), expected)
    assert torch.equal(roi_align(input, rows.float(), (2, 2), 1 / 32, backend=backend), expected)
    ours, theirs = (kind((2, 2), 1 / 32, -1, True) for kind in (RoIAlign, TorchvisionRoIAlign))
    torch.testing.assert_close(ours(input, each), theirs(input, [b.float() for b in each]), rtol=1e-5, atol=1e-5)


@everywhere
def test_order_of_boxes_changes_nothing(device: str, backend: str) -> None:
    input, boxes = feature_map(c=4, device=device, dtype=torch.float32), some_boxes(40).to(device)
    output = roi_align(input, boxes, 1, 1 / 32, backend=backend)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3)).to(device)
    assert torch.equal(roi_align(input, boxes[order], 1, 1 / 32, backend=backend), output[order])


@everywhere
@dtypes
def test_empty(device: str, backend: str, dtype: torch.dtype) -> None:
    input = feature_map(dtype=dtype, device=device)
    for boxes in (torch.zeros(0, 5, device=device), [torch.zeros(0, 4, device=device)] * 3):
        output = roi_align(input, boxes, (2, 3), backend=backend)
        (grad,) = torch.autograd.grad(output.sum(), input)
        assert output.shape == (0, 20, 2, 3) and output.dtype == dtype and grad.shape == input.shape and not grad.any()
    no_image = torch.zeros(0, 20, 7, 7, dtype=dtype, device=device)
    assert roi_align(no_image, torch.zeros(0, 5, device=device), 1, backend=backend).shape == (0, 20, 1, 1)
    no_channel = torch.zeros(1, 0, 7, 7, dtype=dtype, device=device)
    assert roi_align(no_channel, torch.zeros(2, 5, device=device), 1, backend=backend).shape == (2, 0, 1, 1)


@everywhere
@pytest.mark.parametrize("ratio", [-1, 2])
@pytest.mark.parametrize("aligned", [False, True])
def test_boxes_without_area(device: str, backend: str, ratio: int, aligned: bool) -> None:
    """Clamped to a cell, empty, or sampled in one point: as torchvision in all four cases."""
    input = feature_map(1, 3, device=device)
    boxes = torch.tensor([[0, 70.0, 70, 70, 70], [0, 96, 40, 96, 100], [0, 90, 90, 40, 50]], device=device).double()
    for options in ((1, ratio, aligned), ((2, 2), ratio, aligned)):
        ours = run(input, boxes, options, backend=backend)
        theirs = run(input, boxes, options, function=torchvision_roi_align)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@everywhere
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 3])
def test_boxes_that_are_not_finite_touch_nothing(device: str, backend: str, bad: float, column: int, size) -> None:
    """torchvision's CPU form reads wild memory here (vision issue 9273), so it is not asked."""
    input, boxes = feature_map(c=4, device=device, dtype=torch.float32), some_boxes(6).to(device)
    boxes[2, column] = bad
    with guarded(input) as (laid,):
        laid.requires_grad_()
        output, grad = run(laid, boxes, (size, -1, False), backend=backend)
    others = [0, 1, 3, 4, 5]
    assert output[2].isnan().all()
    good = run(input, boxes[others], (size, -1, False), backend=backend)[0]
    assert torch.equal(output[others], good) and grad.isfinite().all()


@everywhere
def test_any_boxes_are_safe(device: str, backend: str) -> None:
    """Whatever the numbers: no crash, no read or write outside, and finite boxes as in float64 plain PyTorch."""
    count = 8 if interpreted(device, backend) else 60
    check = partial(any_boxes, device, backend)
    settings(max_examples=count, deadline=None, derandomize=True)(given(st.data())(lambda data: check(data)))()


def any_boxes(device: str, backend: str, data) -> None:
    edge = st.one_of(st.floats(-400, 700, width=32), st.floats(width=32), st.sampled_from([0.0, -32.0, 224.0, 1e30]))
    rows = data.draw(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), edge, edge, edge, edge), max_size=5))
    size, ratio, aligned = data.draw(st.sampled_from(OPTIONS))
    boxes = torch.tensor(rows, dtype=torch.float32, device=device).reshape(-1, 5)
    input = feature_map(2, 5, 4, 6, torch.float32, device)
    with guarded(input, boxes) as (laid, laid_boxes):
        output, grad = run(laid.requires_grad_(), laid_boxes, (size, ratio, aligned), backend=backend)
    finite = boxes[:, 1:].isfinite().all(1)
    assert output[~finite].isnan().all() and grad.isfinite().all()
    usual = finite & (boxes[:, 1:].abs() < 1e6).all(1)
    exact = roi_align_reference(input.detach().double(), boxes[usual].double(), size, 1 / 32, ratio, aligned)
    torch.testing.assert_close(output[usual].double(), exact, rtol=1e-3, atol=2e-3)


@everywhere
@pytest.mark.parametrize("image", [-1.0, 3.0, math.nan, 1e9])
def test_image_index_outside_the_batch(device: str, backend: str, image: float) -> None:
    boxes = some_boxes(4).to(device)
    boxes[2, 0] = image
    input = feature_map(device=device)
    if device == "cpu":
        with pytest.raises(ValueError, match=r"boxes: row 2 has image index .* outside 0\.\.2"):
            roi_align(input, boxes, 1, backend=backend)
    elif backend != "reference":
        assert roi_align(input, boxes, 1, backend=backend)[2].isnan().all()


@everywhere
def test_most_samples(device: str, backend: str) -> None:
    """A box on one spot, which takes every sample, and one that is turned round: as with few samples; and no more."""
    input, most = feature_map(1, 2, device=device), 80 if interpreted(device, backend) else 4096
    spot = torch.tensor([[0, 96.0, 96, 96, 96]], device=device).double()
    exact = roi_align(input, spot, 1, 1 / 32, 1, True, backend="reference")
    ours = roi_align(input, spot, 1, 1 / 32, most, True, backend=backend)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
    turned = torch.tensor([[0, 96.0, 96, 40, 40]], device=device).double()
    pair = [roi_align(input, b, 1, 1 / 32, most, True, backend=backend) for b in (turned, turned[:, [0, 3, 4, 1, 2]])]
    torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"sampling_ratio must be at most 4096, or -1 .* got 4097"):
        roi_align(input, spot, 1, 1 / 32, 4097, True, backend=backend)


@pytest.mark.parametrize("name", ["roi_align", "roi_align_triton"])
def test_operators_refuse_a_walk_without_end(name: str) -> None:
    """Calls that bypass the public function: nothing would stop 2^31 samples on one spot."""
    if name == "roi_align" and _native.load_failure("_cpu"):
        pytest.skip("the compiled library is not here")
    map, box = torch.zeros(1, 1, 4, 4), torch.tensor([[0, 1.0, 1, 1, 1]])
    with pytest.raises((RuntimeError, ValueError), match="sampling_ratio must be at most"):
        getattr(torch.ops.scrl_fast, name)(map, box, 1.0, 1, 1, 1 << 31, True)
    with pytest.raises((RuntimeError, ValueError), match="sampling_ratio must be at most"):
        getattr(torch.ops.scrl_fast, f"{name}_backward")(map[..., :1, :1], box, 1.0, 1 << 31, True, [1, 1, 4, 4], False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_operators_refuse_tensors_on_several_devices() -> None:
    map, box = torch.zeros(1, 1, 4, 4), torch.tensor([[0, 1.0, 1, 1, 1]])
    for mixed in ((map.cuda(), box), (map, box.cuda())):
        with pytest.raises(RuntimeError, match="on one GPU"):
            torch.ops.scrl_fast.roi_align(*mixed, 1.0, 1, 1, -1, True)
        with pytest.raises(RuntimeError, match="on one GPU"):
            torch.ops.scrl_fast.roi_align_backward(mixed[0][..., :1, :1], mixed[1], 1.0, -1, True, [1, 1, 4, 4], False)


# ---- wrong input ----


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"input": torch.zeros(3, 4, 4)}, ValueError, r"input must be \[N, C, H, W\], got shape \[3, 4, 4\]"),
        ({"input": torch.zeros(1, 3, 4, 4, dtype=torch.int32)}, TypeError, "input must be .* got torch.int32"),
        ({"input": "x"}, TypeError, "input must be .* got str"),
        ({"boxes": torch.zeros(2, 4)}, ValueError, r"boxes must be \[K, 5\] .* got shape \[2, 4\]"),
        ({"boxes": torch.zeros(2, 5).long()}, TypeError, "boxes must be floating point, got torch.int64"),
        ({"boxes": [torch.zeros(2, 4)] * 2}, ValueError, "one tensor an image: 2 tensors for 1 images"),
        ({"boxes": [torch.zeros(2, 5)]}, ValueError, r"boxes\[0\] must be \[L, 4\], got shape \[2, 5\]"),
        ({"boxes": 7}, TypeError, "boxes must be a tensor or a list of tensors, got int"),
        ({"output_size": 0}, ValueError, "output_size must be one or two positive integers, got 0"),
        ({"output_size": (2, 2, 2)}, ValueError, "output_size must be"),
        ({"spatial_scale": math.nan}, ValueError, "spatial_scale must be positive and finite, got nan"),
        ({"spatial_scale": 0}, ValueError, "spatial_scale must be positive and finite, got 0"),
        ({"sampling_ratio": True}, TypeError, "sampling_ratio must be an integer, got True"),
        ({"sampling_ratio": 2.0}, TypeError, "sampling_ratio must be an integer, got 2.0"),
        ({"backend": "fast"}, ValueError, "backend 'fast' is unknown"),
    ],
)
def test_wrong_input_is_named(change, error, message: str) -> None:
    arguments = {"input": torch.zeros(1, 3, 4, 4), "boxes": torch.zeros(1, 5), "output_size": 1} | change
    with pytest.raises(error, match=message):
        roi_align(**arguments)
