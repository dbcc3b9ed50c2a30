"""Compiled forms of augment_views against Pillow and torchvision on real photographs, pixel by pixel."""

from __future__ import annotations

import ctypes
import mmap
import os
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from conftest import available_backends, guarded
from photos import NAMES, photo

from scrl_fast.config.schema import ViewsConfig
from scrl_fast.data.views import draw_views
from scrl_fast.ops.augment_views import augment_views
from scrl_fast.ops.view_table import GAUSSIAN_BLUR, NO_BLUR, RESIZE_BLUR, VIEW_DTYPE, PackedImages, pack_images

CONFIG = ViewsConfig()
NORMALIZE = {"mean": CONFIG.mean, "std": CONFIG.std}
COMPILED = [backend for backend in available_backends("augment_views") if backend == "native"]
pytestmark = pytest.mark.parametrize("backend", COMPILED or [pytest.param("native", marks=pytest.mark.xfail)])


def levels(images: PackedImages, table: np.ndarray, size: int, backend: str, **options: Any) -> np.ndarray:
    """Views as uint8 `[V, size, size, 3]`."""
    views = augment_views(images, table, size=size, dtype=torch.uint8, backend=backend, **NORMALIZE, **options)
    return views.permute(0, 2, 3, 1).numpy()


def assert_close(ours: np.ndarray, expected: np.ndarray, mean: float = 0.1) -> None:
    """Mean difference at most `mean` levels (promised: 1), 99.9 % of all values within 4."""
    off = np.abs(ours.astype(int) - expected)
    assert off.mean() <= mean, f"mean difference {off.mean():.3f} levels"
    assert (off > 4).mean() <= 0.001, f"{100 * (off > 4).mean():.3f} % of values are more than 4 levels off"


@pytest.fixture(scope="module")
def photos() -> PackedImages:
    return pack_images([photo(name) for name in NAMES])


def crops(images: PackedImages, count: int, seed: int = 0) -> np.ndarray:
    """Views with nothing but a crop each."""
    which = np.arange(count) % len(images.offsets)
    sizes = np.stack([images.heights[which], images.widths[which]], axis=1)
    config = ViewsConfig(recipe="simple", flip=0.0)
    rows = draw_views(config, sizes, seed=seed, epoch=0, keys=np.arange(count))[0]
    rows["image"] = which
    return rows


def recipe(images: PackedImages, count: int, **options: Any) -> np.ndarray:
    """Both views of `count` images, everything as in training unless given otherwise."""
    which = np.arange(count) % len(images.offsets)
    sizes = np.stack([images.heights[which], images.widths[which]], axis=1)
    table = draw_views(ViewsConfig(**options), sizes, seed=7, epoch=1, keys=np.arange(count))
    table["image"] = which
    return table.reshape(-1)


# ---- against the reference ----

TRANSFORMS: dict[str, dict[str, Any]] = {
    "crop": {},
    "flip": {"flip": 1},
    "brighter": {"jitter": 1, "brightness": 1.37},
    "darker": {"jitter": 1, "brightness": 0.61},
    "more contrast": {"jitter": 1, "contrast": 1.4},
    "less contrast": {"jitter": 1, "contrast": 0.63},
    "more saturation": {"jitter": 1, "saturation": 1.2},
    "less saturation": {"jitter": 1, "saturation": 0.83},
    "black": {"jitter": 1, "brightness": 0.0},
    "only grey": {"jitter": 1, "saturation": 0.0},
    "hue up": {"jitter": 1, "hue": 0.1},
    "hue down": {"jitter": 1, "hue": -0.07},
    "opposite hue": {"jitter": 1, "hue": 0.5},
    "jitter": {"jitter": 1, "brightness": 1.3, "contrast": 0.7, "saturation": 1.2, "hue": 0.05},
    "jitter, other order": {
        "jitter": 1, "order": (3, 1, 0, 2), "brightness": 0.7, "contrast": 1.4, "saturation": 0.8, "hue": -0.1,
    },
    "jitter off": {"jitter": 0, "brightness": 1.3, "contrast": 0.7, "saturation": 1.2, "hue": 0.05},
    "grayscale": {"grayscale": 1},
    "resize blur 1.1": {"blur": RESIZE_BLUR, "blur_amount": 1.1},
    "resize blur 1.5": {"blur": RESIZE_BLUR, "blur_amount": 1.5},
    "Gaussian blur 0.1": {"blur": GAUSSIAN_BLUR, "blur_amount": 0.1},
    "Gaussian blur 2": {"blur": GAUSSIAN_BLUR, "blur_amount": 2.0},
    "solarize": {"solarize": 1},
    "grey blur": {"grayscale": 1, "blur": RESIZE_BLUR, "blur_amount": 1.2},
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform(name: str, photos: PackedImages, backend: str) -> None:
    rows = crops(photos, len(NAMES))
    plain = levels(photos, rows, 160, backend)
    for field, value in TRANSFORMS[name].items():
        rows[field] = value
    ours = levels(photos, rows, 160, backend)
    assert_close(ours, levels(photos, rows, 160, "reference"))
    if name not in ("crop", "jitter off", "Gaussian blur 0.1"):
        assert not np.array_equal(ours, plain)


@pytest.mark.parametrize("size, options", [(224, {}), (96, {}), (224, {"blur": "gaussian"}), (50, {"recipe": "none"})])
def test_recipe(size: int, options: dict[str, Any], photos: PackedImages, backend: str) -> None:
    rows = recipe(photos, 2 * len(NAMES), **options)
    assert_close(levels(photos, rows, size, backend), levels(photos, rows, size, "reference"))


def test_solarize_threshold(photos: PackedImages, backend: str) -> None:
    rows = crops(photos, len(NAMES))
    rows["solarize"] = 1
    for threshold in (0, 60, 255, 256):
        options = {"solarize_threshold": threshold}
        assert_close(levels(photos, rows, 64, backend, **options), levels(photos, rows, 64, "reference", **options))


@pytest.mark.parametrize("size", [1, 2, 7, 15, 17, 96, 97])
def test_odd_sizes(size: int, backend: str) -> None:
    shapes = [(1, 1), (1, 9), (9, 1), (2, 3), (16, 16), (17, 33), (64, 5), (200, 15)]
    images = pack_images([photo(NAMES[i % 6])[100 : 100 + h, 100 : 100 + w] for i, (h, w) in enumerate(shapes)])
    rows = np.zeros(6 * len(shapes), VIEW_DTYPE)
    rows["order"] = range(4)
    rows["brightness"], rows["contrast"], rows["saturation"], rows["hue"] = 1.2, 0.8, 1.1, 0.05
    rows["blur_amount"] = 1.5
    kinds = product(range(len(shapes)), (NO_BLUR, RESIZE_BLUR, GAUSSIAN_BLUR), (0, 1))
    for row, (image, blur, coloured) in zip(rows, kinds, strict=True):
        row["image"], (row["h"], row["w"]) = image, shapes[image]
        row["blur"], row["jitter"], row["flip"], row["solarize"] = blur, coloured, coloured, coloured
    ours, expected = (levels(images, rows, size, form) for form in (backend, "reference"))
    # one level off before a threshold is far off behind it, and these few pixels are no statistics
    plain = rows["jitter"] == 0
    assert_close(ours[plain], expected[plain], mean=0.5)
    off = np.abs(ours.astype(int) - expected)
    assert off.mean() <= 2 and np.median(off) <= 1


def test_every_reduction(backend: str) -> None:
    """From fifty times smaller to fifty times larger, each axis its own way."""
    image = np.tile(photo("coffee"), (3, 2, 1))
    images = pack_images([image])
    rows = np.zeros(10, VIEW_DTYPE)
    rows["order"] = range(4)
    sides = [(1200, 1200), (1100, 4), (3, 1150), (300, 600), (20, 21), (19, 400), (700, 18), (5, 5), (24, 24), (25, 23)]
    rows["h"], rows["w"] = np.transpose(sides)
    rows["y"], rows["x"] = image.shape[0] - rows["h"], image.shape[1] - rows["w"]
    assert_close(levels(images, rows, 24, backend), levels(images, rows, 24, "reference"), mean=0.25)


# ---- formats ----


@pytest.mark.parametrize("size", [48, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_layouts(dtype: torch.dtype, size: int, photos: PackedImages, backend: str) -> None:
    rows = recipe(photos, len(NAMES))
    options = {"size": size, "backend": backend, **NORMALIZE}
    plain = augment_views(photos, rows, dtype=torch.uint8, **options).double() / 255
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (CONFIG.mean, CONFIG.std))
    exact = (plain - mean) / std
    for channels_last in (True, False):
        views = augment_views(photos, rows, dtype=dtype, channels_last=channels_last, **options)
        assert views.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        off = (views.double() - exact).abs()
        # half a unit in the last place, and what float32 lost before near zero
        assert (off <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("channels_last", [True, False])
def test_levels_do_not_depend_on_the_layout(channels_last: bool, photos: PackedImages, backend: str) -> None:
    rows = recipe(photos, 3)
    first = levels(photos, rows, 33, backend)
    assert np.array_equal(first, levels(photos, rows, 33, backend, channels_last=channels_last))


def test_half_precision_of_extreme_values(photos: PackedImages, backend: str) -> None:
    """Subnormal and infinite float16, negative zero: whatever a mean and a deviation make of a level."""
    rows = crops(photos, 2)
    for mean, std in (((0.0, 0.5, 1.0), (1e5, 3e4, 1e4)), ((-1e4, -3e3, 0.0), (0.1, 0.05, 1e-3))):
        for dtype in (torch.float16, torch.bfloat16):
            options = {"size": 40, "mean": mean, "std": std, "backend": backend}
            views = augment_views(photos, rows, dtype=dtype, **options)
            exact = augment_views(photos, rows, dtype=torch.float32, **options)
            assert torch.equal(views, exact.to(dtype))


# ---- order of work, memory ----


def test_any_number_of_threads_gives_the_same_bits(photos: PackedImages, backend: str) -> None:
    rows = recipe(photos, 20)
    options = {"size": 64, "backend": backend, **NORMALIZE}
    alone = augment_views(photos, rows, threads=1, **options)
    for threads in (2, 3, 7):
        assert torch.equal(augment_views(photos, rows, threads=threads, **options), alone)
    assert torch.equal(augment_views(photos, rows[5:6], **options), alone[5:6])
    assert torch.equal(augment_views(photos, rows[::-1], **options), alone.flip(0))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("size", [1, 7, 32, 65])  # 65 x 65 pixels are one more than whole groups
def test_nothing_beside_the_result_is_written(
    size: int, dtype: torch.dtype, channels_last: bool, photos: PackedImages, backend: str
) -> None:
    rows = recipe(photos, 3)
    expected = augment_views(photos, rows, size=size, dtype=dtype, backend=backend, **NORMALIZE)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with guarded(torch.zeros(6, 3, size, size, dtype=dtype).contiguous(memory_format=layout)) as (out,):
        assert augment_views(photos, rows, size=size, out=out, backend=backend, **NORMALIZE) is out
        assert torch.equal(out, expected)
    spaced = torch.full((9, 3, size, size), 77, dtype=dtype).contiguous(memory_format=layout)
    options = {"size": size, "backend": backend, "checked": True, **NORMALIZE}
    augment_views(photos, rows.reshape(-1)[:3], out=spaced[1::3], **options)
    assert torch.equal(spaced[1::3], expected[:3]) and (spaced[0::3] == 77).all() and (spaced[2::3] == 77).all()


def test_pixels_outside_the_crop_do_not_matter(photos: PackedImages, backend: str) -> None:
    rows = recipe(photos, 12)
    expected = levels(photos, rows, 48, backend)
    for row, view in zip(rows, expected, strict=True):
        changed = photos._replace(buffer=255 - photos.buffer)
        area = np.s_[row["y"] : row["y"] + row["h"], row["x"] : row["x"] + row["w"]]
        changed.image(row["image"])[area] = photos.image(row["image"])[area]
        assert np.array_equal(levels(changed, row.reshape(1), 48, backend)[0], view)


@pytest.mark.skipif(os.name != "posix", reason="guard pages are set through mprotect")
@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (9, 1), (2, 5), (16, 16), (17, 31), (40, 37)])
def test_no_read_beyond_the_buffer(height: int, width: int, backend: str) -> None:
    """An image between two pages that must not be touched: a read beside it ends the child process."""
    picture = photo("cat")[:height, :width]
    rows = np.zeros(2, VIEW_DTYPE)
    rows["order"], rows["h"], rows["w"] = range(4), height, width
    rows["flip"][1] = 1
    expected = levels(pack_images([picture]), rows, 24, backend)
    page = mmap.PAGESIZE
    inner = -(-picture.size // page) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    whole = np.frombuffer(memory, np.uint8)
    for start in (page, page + inner - picture.size):  # against the page before, against the page behind
        whole[start : start + picture.size] = picture.reshape(-1)
        images = PackedImages(whole[start : start + picture.size], *(np.array([n]) for n in (0, height, width)))
        child = os.fork()
        if child == 0:
            libc = ctypes.CDLL(None)
            for guard in (address, address + page + inner):
                assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
            os._exit(0 if np.array_equal(levels(images, rows, 24, backend), expected) else 3)
        assert os.waitpid(child, 0)[1] == 0
