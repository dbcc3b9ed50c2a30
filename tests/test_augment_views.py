"""The contract and the reference; what the compiled forms must reach stands beside it as they come."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from photos import NAMES, photo, within_one_level
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import functional as F

from scrl_fast.config.schema import ViewsConfig
from scrl_fast.data.views import draw_views
from scrl_fast.ops.augment_views import augment_views
from scrl_fast.ops.view_table import GAUSSIAN_BLUR, RESIZE_BLUR, VIEW_DTYPE, PackedImages, blurred_side, pack_images

CONFIG = ViewsConfig()
UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # values in 0..1 come out, so that pixels can be told


def one_view(**fields: Any) -> np.ndarray:
    """A table of one view of image 0: crop (20, 30, 200, 260), nothing else unless given."""
    row = np.zeros(1, VIEW_DTYPE)
    row["y"], row["x"], row["h"], row["w"] = 20, 30, 200, 260
    row["order"] = range(4)
    row["brightness"] = row["contrast"] = row["saturation"] = 1
    for name, value in fields.items():
        row[name] = value
    return row


def pixels(table: np.ndarray, images: PackedImages, size: int = 112, **options: Any) -> np.ndarray:
    """Views as uint8 `[V, size, size, 3]`."""
    views = augment_views(images, table, size=size, backend="reference", **UNIT, **options)
    return np.rint(views.permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def cat() -> PackedImages:
    return pack_images([photo("cat")])


@pytest.fixture(scope="module")
def cropped() -> Image.Image:
    """What torchvision's transforms see after crop and resize."""
    return F.resized_crop(Image.fromarray(photo("cat")), 20, 30, 200, 260, [112, 112], v1.InterpolationMode.BICUBIC)


# ---- each transform against torchvision's own ----


@pytest.mark.parametrize(
    "fields, theirs",
    [
        ({}, lambda x: x),
        ({"flip": 1}, F.hflip),
        ({"jitter": 1, "brightness": 1.3}, lambda x: F.adjust_brightness(x, 1.3)),
        ({"jitter": 1, "contrast": 0.7}, lambda x: F.adjust_contrast(x, 0.7)),
        ({"jitter": 1, "saturation": 1.4}, lambda x: F.adjust_saturation(x, 1.4)),
        ({"jitter": 1, "hue": -0.07}, lambda x: F.adjust_hue(x, -0.07)),
        ({"jitter": 0, "brightness": 1.3, "hue": 0.2}, lambda x: x),
        (
            {"jitter": 1, "order": (3, 1, 0, 2), "brightness": 1.3, "contrast": 0.6, "saturation": 0.8, "hue": 0.1},
            lambda x: F.adjust_saturation(F.adjust_brightness(F.adjust_contrast(F.adjust_hue(x, 0.1), 0.6), 1.3), 0.8),
        ),
        ({"grayscale": 1}, lambda x: F.to_grayscale(x, 3)),
        ({"solarize": 1}, lambda x: F.solarize(x, 128)),
        ({"blur": RESIZE_BLUR, "blur_amount": 1.5}, lambda x: resized(resized(x, 74), 112)),
        ({"blur": GAUSSIAN_BLUR, "blur_amount": 1.3}, lambda x: F.gaussian_blur(x, [23, 23], [1.3, 1.3])),
        ({"flip": 1, "grayscale": 1, "solarize": 1}, lambda x: F.solarize(F.to_grayscale(F.hflip(x), 3), 128)),
        (
            {"blur": RESIZE_BLUR, "blur_amount": 1.2, "solarize": 1},
            lambda x: F.solarize(resized(resized(x, 93), 112), 128),
        ),
    ],
    ids=lambda value: "-".join(value) or "crop" if isinstance(value, dict) else "",
)
def test_transform(fields: dict[str, Any], theirs: Any, cat: PackedImages, cropped: Image.Image) -> None:
    ours, expected = pixels(one_view(**fields), cat)[0], np.asarray(theirs(cropped))
    assert within_one_level(ours, expected)  # its blur is a convolution: the last bit depends on the processor
    if fields and fields.get("jitter") != 0:
        assert not np.array_equal(ours, np.asarray(cropped))


def resized(image: Image.Image, side: int) -> Image.Image:
    return image.resize((side, side), Image.Resampling.BICUBIC)


def test_small_crops_are_enlarged_and_taps_stay_inside(cat: PackedImages) -> None:
    image = photo("cat").copy()
    alone = pixels(one_view(y=50, x=60, h=30, w=40), pack_images([image]))
    image[:50], image[80:], image[:, :60], image[:, 100:] = 0, 255, 0, 255
    assert np.array_equal(alone, pixels(one_view(y=50, x=60, h=30, w=40), pack_images([image])))


def test_solarize_threshold(cat: PackedImages, cropped: Image.Image) -> None:
    ours = pixels(one_view(solarize=1), cat, solarize_threshold=60)[0]
    sure = np.abs(np.asarray(cropped).astype(int) - 60) > 1  # of a level at the threshold, one more or less decides
    assert sure.mean() > 0.9 and within_one_level(ours[sure], np.asarray(F.solarize(cropped, 60))[sure])


def test_blurred_side_is_the_floor_whatever_the_rounding_of_the_factor() -> None:
    for size in (64, 96, 112, 224):
        for factor in (1.1, 1.2, 1.5):
            assert blurred_side(size, float(np.float32(factor))) == int(size / factor)


# ---- the whole recipe ----


@pytest.fixture(scope="module")
def batch() -> tuple[PackedImages, np.ndarray]:
    """Six photographs of several sizes and their two views."""
    images = pack_images([photo(name) for name in NAMES])
    sizes = np.stack([images.heights, images.widths], axis=1)
    return images, draw_views(CONFIG, sizes, seed=3, epoch=0, keys=np.arange(len(NAMES)))


def test_rows_are_views_in_the_order_of_the_table(batch: tuple[PackedImages, np.ndarray]) -> None:
    images, table = batch
    views = augment_views(images, table, size=48, mean=CONFIG.mean, std=CONFIG.std, backend="reference")
    assert views.shape == (12, 3, 48, 48) and views.dtype == torch.float32
    for row in (0, 5, 6, 11):
        picked = table.reshape(-1)[[row]]
        alone = augment_views(images, picked, size=48, mean=CONFIG.mean, std=CONFIG.std, backend="reference")
        assert torch.equal(views[row], alone[0])


def test_normalisation(batch: tuple[PackedImages, np.ndarray]) -> None:
    images, table = batch
    views = augment_views(images, table, size=48, mean=CONFIG.mean, std=CONFIG.std, backend="reference")
    plain = torch.from_numpy(pixels(table, images, 48)).permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (CONFIG.mean, CONFIG.std))
    assert torch.allclose(views.double(), (plain - mean) / std, rtol=0, atol=1e-6)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layouts_and_dtypes(batch: tuple[PackedImages, np.ndarray], dtype: torch.dtype, channels_last: bool) -> None:
    images, table = batch
    options = {"size": 32, "mean": CONFIG.mean, "std": CONFIG.std, "backend": "reference"}
    exact = augment_views(images, table, **options)
    views = augment_views(images, table, dtype=dtype, channels_last=channels_last, **options)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert views.dtype == dtype and views.is_contiguous(memory_format=layout)
    assert torch.equal(views, exact.to(dtype))
    out = torch.full((14, 3, 32, 32), torch.nan, dtype=dtype).contiguous(memory_format=layout)
    part = out[1:13]
    assert augment_views(images, table, out=part, **options) is part
    assert torch.equal(part, views) and out[0].isnan().all() and out[13].isnan().all()


def test_no_views(cat: PackedImages) -> None:
    assert augment_views(cat, np.zeros((2, 0), VIEW_DTYPE), size=8, **UNIT).shape == (0, 3, 8, 8)
    assert augment_views(pack_images([]), np.zeros((2, 0), VIEW_DTYPE), size=8, **UNIT).shape == (0, 3, 8, 8)


def test_packing_keeps_every_pixel() -> None:
    images = [photo(name)[: 50 + 10 * index, : 70 + index] for index, name in enumerate(NAMES)]
    packed = pack_images(images)
    assert len(packed.buffer) == sum(image.size for image in images)
    for index, image in enumerate(images):
        assert np.array_equal(packed.image(index), image)


# ---- wrong input ----


@pytest.mark.parametrize(
    "field, value",
    [
        ("image", 1),
        ("image", -1),
        ("y", -1),
        ("x", 10_000),
        ("h", 0),
        ("w", -5),
        ("h", 281),
        ("w", 422),
        ("order", (0, 1, 2, 2)),
        ("order", (0, 1, 2, 4)),
        ("brightness", -0.1),
        ("contrast", np.nan),
        ("saturation", np.inf),
        ("hue", 0.51),
        ("hue", np.nan),
        ("blur", 3),
    ],
)
def test_bad_rows_are_named(field: str, value: Any, cat: PackedImages) -> None:
    table = np.concatenate([one_view(), one_view(**{field: value})])
    with pytest.raises(ValueError, match=rf"table row 1: .*{field}"):
        augment_views(cat, table, size=8, **UNIT)


@pytest.mark.parametrize("blur, amount", [(RESIZE_BLUR, 0.9), (RESIZE_BLUR, np.nan), (GAUSSIAN_BLUR, 0.0)])
def test_bad_blur_amount(blur: int, amount: float, cat: PackedImages) -> None:
    with pytest.raises(ValueError, match="blur_amount"):
        augment_views(cat, one_view(blur=blur, blur_amount=amount), size=8, **UNIT)


@pytest.mark.parametrize(
    "change, error, named",
    [
        ({"table": np.zeros((2, 3))}, TypeError, "table"),
        ({"size": 0}, ValueError, "size"),
        ({"std": (1.0, 0.0, 1.0)}, ValueError, "std"),
        ({"mean": (1.0,)}, ValueError, "mean"),
        ({"dtype": torch.int32}, TypeError, "dtype"),
        ({"out": torch.zeros(2, 3, 8, 8)}, ValueError, "out"),
        ({"out": torch.zeros(1, 3, 8, 16)[..., ::2]}, ValueError, "out"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], named: str, cat: PackedImages) -> None:
    arguments = {"images": cat, "table": one_view(), "size": 8, **UNIT, **change}
    with pytest.raises(error, match=named):
        augment_views(**arguments)


def test_images_outside_the_buffer(cat: PackedImages) -> None:
    for change in ({"offsets": cat.offsets + 1}, {"offsets": cat.offsets - 1}, {"heights": cat.heights * 0}):
        with pytest.raises(ValueError, match="image 0"):
            augment_views(cat._replace(**change), one_view(), size=8, **UNIT)


def test_pack_refuses_other_arrays() -> None:
    good = np.zeros((4, 4, 3), np.uint8)
    for bad in (good.astype(np.float32), good[:, :, :1], good[0]):
        with pytest.raises(ValueError, match="image 1"):
            pack_images([good, bad])
