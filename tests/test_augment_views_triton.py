"""The Triton form of augment_views: its numbers under the interpreter (or on a GPU), its compilation for GPUs.

The interpreter takes about half a second a view, so views and crops are small here; the table holds every transform.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from aot import GPUS, Kernel, compile_for_gpus, needs_compiler
from conftest import DEVICES, available_backends
from photos import NAMES, photo
from test_augment_views_compiled import TRANSFORMS, assert_close

from scrl_fast.config.schema import ViewsConfig
from scrl_fast.ops.augment_views import augment_views
from scrl_fast.ops.augment_views_triton import colour_steps
from scrl_fast.ops.view_table import VIEW_DTYPE, PackedImages, pack_images

CONFIG = ViewsConfig()
NORMALIZE = {"mean": CONFIG.mean, "std": CONFIG.std}
DEVICE = DEVICES[-1]
needs_triton = pytest.mark.skipif(
    "triton" not in available_backends("augment_views", DEVICE),
    reason="no Triton, or neither a GPU nor its interpreter",
)


@pytest.fixture(scope="module")
def crops() -> PackedImages:
    """Pieces of real photographs, of several sizes."""
    sizes = [(26, 31), (23, 21), (19, 19), (34, 17), (16, 29), (25, 27)]
    return pack_images([photo(name)[100 : 100 + h, 150 : 150 + w] for name, (h, w) in zip(NAMES, sizes, strict=True)])


def whole(images: PackedImages, count: int) -> np.ndarray:
    """Views of whole images but for a pixel at each side, with nothing done to them."""
    rows = np.zeros(count, VIEW_DTYPE)
    rows["image"] = np.arange(count) % len(images.offsets)
    rows["y"], rows["x"] = 1, 2
    rows["h"], rows["w"] = images.heights[rows["image"]] - 2, images.widths[rows["image"]] - 3
    rows["order"] = range(4)
    rows["brightness"] = rows["contrast"] = rows["saturation"] = 1
    return rows


def made(images: PackedImages, rows: np.ndarray, size: int, **options: Any) -> torch.Tensor:
    views = augment_views(images.to(DEVICE), rows, size=size, backend="triton", **NORMALIZE, **options)
    assert views.device.type == DEVICE
    return views.cpu()


def levels(views: torch.Tensor) -> np.ndarray:
    return views.permute(0, 2, 3, 1).numpy()


@needs_triton
def test_every_transform(crops: PackedImages, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr("scrl_fast.kernels.augment_views.TILE", 64)  # a view is one tile: quicker to interpret
    rows = whole(crops, len(TRANSFORMS))
    for row, fields in zip(rows, TRANSFORMS.values(), strict=True):
        for field, value in fields.items():
            row[field] = value
    ours = levels(made(crops, rows, 17, dtype=torch.uint8))
    expected = levels(augment_views(crops, rows, size=17, dtype=torch.uint8, backend="reference", **NORMALIZE))
    for name, view, wanted in zip(TRANSFORMS, ours, expected, strict=True):
        off = np.abs(view.astype(int) - wanted)
        # of 289 pixels a few may fall beside a threshold; the promise is for photographs, and counted over all below
        assert off.mean() <= 0.4 and (off > 4).mean() <= 0.007, (name, off.mean(), off.max())
    assert_close(ours, expected)


@needs_triton
@pytest.mark.parametrize("channels_last", [True, False])
def test_tiles_layouts_and_dtypes(channels_last: bool, crops: PackedImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scrl_fast.kernels.augment_views.TILE", 16)  # several to a view, and the last ones cut off
    rows = whole(crops, 2)
    rows["jitter"], rows["contrast"], rows["hue"], rows["flip"] = 1, 0.7, 0.1, (0, 1)
    rows["blur"], rows["blur_amount"] = (1, 0), 1.2
    rows["solarize"] = (0, 1)
    dtype = torch.bfloat16 if channels_last else torch.float32
    ours = made(crops, rows, 19, dtype=dtype, channels_last=channels_last)
    assert ours.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    exact = augment_views(crops, rows, size=19, dtype=torch.float32, backend="reference", **NORMALIZE)
    off = (ours.float() - exact).abs() * 255 * torch.tensor(CONFIG.std).view(3, 1, 1)
    assert off.mean() <= 0.5 and (off > 4).float().mean() <= 0.005


def test_steps_that_change_nothing_are_left_out() -> None:
    rows = np.zeros(3, VIEW_DTYPE)
    rows["order"] = (2, 1, 3, 0)
    rows["jitter"] = (1, 0, 1)
    rows["brightness"], rows["contrast"], rows["saturation"], rows["hue"] = 1.5, (0.5, 0.5, 1.0), 1.0, 0.1
    rows["grayscale"] = (0, 1, 1)
    kinds, amounts, count = colour_steps(rows)
    assert count.tolist() == [3, 1, 3]
    assert [row[:n].tolist() for row, n in zip(kinds, count, strict=True)] == [[1, 3, 0], [4], [3, 0, 4]]
    assert amounts[0, :3].tolist() == [0.5, np.float32(0.1), 1.5] and amounts[1, 0] == 0


@needs_triton
def test_on_a_gpu_it_is_the_one_that_is_chosen(crops: PackedImages) -> None:
    from scrl_fast.ops.backends import OPERATIONS

    operation = OPERATIONS["augment_views"]
    assert operation.failure("native", "cuda") == "augment_views has no native form for cuda"
    if DEVICE == "cuda":
        assert operation.resolve("cuda") is operation.triton


def kernels() -> list[Kernel]:
    from scrl_fast.kernels.augment_views import AMOUNTS, PLAN, TILE, TILE_WARPS

    module = "scrl_fast.kernels.augment_views"
    rest = {"plan_ptr": "*i64", "amounts_ptr": "*fp32", "norm_ptr": "*fp32", "size": "i32", "threshold": "i32"}
    planes = {"source_ptr": "*u8", "out_ptr": "*u8", "which_ptr": "*i32", "plan_ptr": "*i64", "size": "i32"}
    tile = {"FIELDS": len(PLAN), "ROWS": TILE, "COLUMNS": TILE}
    result = {"AMOUNTS": AMOUNTS, "LAST": True, "LEVELS": False}
    warps = {"num_warps": TILE_WARPS}
    made = [Kernel(f"{module}:resize_along", planes, {"PASS": 0, **tile}, **warps)]
    down = {"source_ptr": "*u8", "sums_ptr": "*i32", "which_ptr": "*i32", **rest}
    for number, out in ((0, "*u8"), (2, "*bf16")):
        made.append(
            Kernel(f"{module}:resize_down", {**down, "out_ptr": out}, {"PASS": number, **tile, **result}, **warps)
        )
    colour = {"picture_ptr": "*u8", "out_ptr": "*bf16", "sums_ptr": "*i32", **rest, "tiles": "i32"}
    sizes = {"FIELDS": len(PLAN), "TILES": 64, "PIXELS": 1024}
    made.append(Kernel(f"{module}:colour", colour, {**sizes, **result}))
    blur = {"which_ptr": "*i32", **rest, "half": "i32"}
    blur = {"source_ptr": "*fp32", "out_ptr": "*fp16", **blur}
    made.append(Kernel(f"{module}:gaussian", blur, {"PASS": 1, **tile, **result}, **warps))
    return made


@needs_compiler
def test_compiles_for_gpus_that_are_not_here() -> None:
    for kernel, gpu, compiled in compile_for_gpus(kernels()):
        assert compiled.stack_bytes == 0 and compiled.registers <= 128, (kernel, GPUS[gpu], compiled)
