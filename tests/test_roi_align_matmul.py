"""RoIAlign as matrix products: accuracy, infinities and NaN as in the other forms, tensor cores when compiled."""

from __future__ import annotations

import pytest
import torch
from aot import GPUS, Kernel, compile_for_gpus, needs_compiler
from conftest import assert_as_accurate, triton_devices
from torch import Tensor

from scrl_fast.ops.roi_align import roi_align_reference

on_triton = pytest.mark.parametrize("device", triton_devices())
MODULE = "scrl_fast.kernels.roi_align_matmul"
INF = float("inf")


def boxes_of(images: int, side: float) -> Tensor:
    """Seven boxes out of their images' order, none of image 1; one has an infinite edge, one is of no image."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(7, 2, generator=generator) * side * 0.8 - 0.1 * side
    extent = torch.rand(7, 2, generator=generator) * side * 0.7
    image = torch.tensor([2, 0, 0, 2, 2, 0, 2]).float()[:, None]
    boxes = torch.cat([image, corner, corner + extent], 1)
    boxes[3, 2] = INF
    boxes[5, 0] = images
    return boxes


def laid(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last)


@on_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size, bins, channels", [((7, 7), (1, 1), 136), ((8, 8), (2, 3), 20), ((4, 9), (1, 2), 3)])
def test_numbers(device: str, dtype: torch.dtype, size: tuple[int, int], bins: tuple[int, int], channels: int) -> None:
    from scrl_fast.kernels import roi_align_matmul as form

    map = laid(torch.randn(3, channels, *size, generator=torch.Generator().manual_seed(1)).to(dtype))
    boxes = boxes_of(3, 32.0 * min(size))
    fine = boxes.isfinite().all(1) & (boxes[:, 0] < 3)
    exact_map = map.double().requires_grad_()
    exact = roi_align_reference(exact_map, boxes[fine].double(), bins, 1 / 32)
    same = map.detach().clone().requires_grad_()
    plain = roi_align_reference(same, boxes[fine], bins, 1 / 32)
    made = form.roi_align(map.to(device), boxes.to(device), 1 / 32, *bins, -1, False).cpu()
    assert made[~fine].isnan().all()
    assert_as_accurate(made[fine], plain, exact, "output")

    grad = torch.randn(7, channels, *bins, generator=torch.Generator().manual_seed(2)).to(dtype)
    (exact_grad,) = torch.autograd.grad(exact, exact_map, grad[fine].double())
    (plain_grad,) = torch.autograd.grad(plain, same, grad[fine])
    made = form.roi_align_backward(grad.to(device), boxes.to(device), 1 / 32, -1, False, tuple(map.shape))
    assert made.stride() == map.stride()
    assert_as_accurate(made.cpu(), plain_grad, exact_grad, "gradient")


@on_triton
@pytest.mark.parametrize("wrong", [INF, -INF, float("nan")])
def test_what_is_not_finite_stays_in_the_boxes_that_read_it(device: str, wrong: float) -> None:
    from scrl_fast.kernels import roi_align as today
    from scrl_fast.kernels import roi_align_matmul as form

    boxes = boxes_of(3, 224.0).to(device)
    map = laid(torch.randn(3, 5, 7, 7, generator=torch.Generator().manual_seed(1)).half())
    map[2, 1, 1, 2] = wrong
    map[1] = wrong  # no box lies there
    map = map.to(device)
    made = form.roi_align(map, boxes, 1 / 32, 2, 2, -1, False)
    expected = today.roi_align(map, boxes, 1 / 32, 2, 2, -1, False)
    torch.testing.assert_close(made, expected, equal_nan=True, rtol=2e-3, atol=2e-3)
    assert made[boxes[:, 0] == 2].isfinite().sum() > made.numel() // 4

    grad = torch.randn(7, 5, 2, 2, generator=torch.Generator().manual_seed(2)).half()
    grad[4, 3, 1, 0] = wrong
    grad[3] = wrong  # of a box that cannot be sampled
    grad = grad.to(device)
    expected = today.roi_align_backward(grad, boxes, 1 / 32, -1, False, list(map.shape), True)
    made = form.roi_align_backward(grad, boxes, 1 / 32, -1, False, tuple(map.shape))
    torch.testing.assert_close(made, expected, equal_nan=True, rtol=4e-3, atol=4e-3)
    assert 0 < (~made.isfinite()).sum() < 49


@on_triton
def test_maps_that_it_does_not_take_and_no_boxes(device: str) -> None:
    from scrl_fast.kernels import roi_align_matmul as form

    boxes = torch.zeros(0, 5, device=device)
    for map in (torch.zeros(1, 2, 7, 7), torch.zeros(1, 2, 7, 7).half(), laid(torch.zeros(1, 2, 8, 9).half())):
        with pytest.raises(ValueError, match="only"):
            form.roi_align(map.to(device), boxes, 1.0, 1, 1, -1, False)
    map = laid(torch.zeros(1, 2, 7, 7).half()).to(device)
    assert form.roi_align(map, boxes, 1.0, 1, 1, -1, False).shape == (0, 2, 1, 1)
    made = form.roi_align_backward(torch.zeros(0, 2, 1, 1).half().to(device), boxes, 1.0, -1, False, (2, 2, 7, 7))
    assert not made.any()


def kernels(dtype: str, one_row: bool = False) -> list[Kernel]:
    """As the launchers call them for one bin a box; Triton compiles a number of 1 in."""
    lists = {"order_ptr": "*i32", "first_ptr": "*i32"}
    sizes = dict.fromkeys(("channels", "cells", "width", "image_stride", "row_stride", "column_stride"), "i32")
    tile = {"bins": 1, "CELLS": 64, "PAIRS": 16, "CHANNELS": 64, "WIDEN": False}
    unknown = ("height", "width") if one_row else ("rows", "height", "width")
    pool = {"map_ptr": f"*{dtype}", "weights_ptr": f"*{dtype}", "fine_ptr": "*i8", **lists, "out_ptr": f"*{dtype}"}
    back = {"grad_ptr": f"*{dtype}", "weights_ptr": f"*{dtype}", **lists, "out_ptr": f"*{dtype}"}
    aligned = ("channels", "image_stride", "row_stride", "column_stride")
    return [
        Kernel(
            f"{MODULE}:pool",
            {**pool, "images": "i32", "count": "i32", **sizes},
            {**tile, "BOXES": 1024},
            divisible_by_16=(*pool, *aligned),
        ),
        Kernel(
            f"{MODULE}:dense_weights",
            {"y_ptr": "*fp32", "x_ptr": "*fp32", "y_bins_ptr": "*i32", "x_bins_ptr": "*i32", "out_ptr": f"*{dtype}"}
            | dict.fromkeys(unknown, "i32"),
            {"pooled_height": 1, "pooled_width": 1, "CELLS": 64, "ROWS": 16} | ({"rows": 1} if one_row else {}),
        ),
        Kernel(f"{MODULE}:pool_backward", {**back, "count": "i32", **sizes}, tile, divisible_by_16=(*back, *aligned)),
    ]


@needs_compiler
def test_compiles_to_tensor_cores_for_gpus_that_are_not_here() -> None:
    for kernel, gpu, made in compile_for_gpus(kernels("bf16") + kernels("fp16", one_row=True), (80, 90)):
        case = f"{kernel.function} on {GPUS[gpu]}: {made}"
        products = "mma.sync" in made.ptx or "wgmma.mma_async" in made.ptx
        assert products or kernel.function.endswith("dense_weights"), case
        assert made.stack_bytes == 0 and made.registers <= 128, case  # four blocks a multiprocessor
