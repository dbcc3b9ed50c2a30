from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
import pytest
import torch
from photos import photo, within_one_level
from PIL import Image

from scrl_fast.config.schema import Config
from scrl_fast.data import BadImage, Loader, decoders
from scrl_fast.data.decode import SHRINKS, Encoded
from scrl_fast.data.scaled import Opened, fit_to_shrunk, largest_shrink
from scrl_fast.data.sources.base import EncodedImages
from scrl_fast.data.views import crops_of, draw_views
from scrl_fast.ops import augment_views, pack_images

JPEG_DECODERS = [name for name, said in decoders().items() if said in ("in use", "works")]


@functools.cache
def jpeg(
    height: int, width: int, name: str = "china", orientation: int = 1, kind: str = "JPEG", **options: Any
) -> bytes:
    """A photograph enlarged to this size, with smooth detail at every scale as real ones of many megapixels have."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    picture = Image.fromarray(photo(name)).resize((width, height), Image.Resampling.BICUBIC)
    picture.save(file, kind, exif=exif, **({"quality": 90} | options if kind == "JPEG" else options))
    return file.getvalue()


class Files(EncodedImages):
    num_classes, max_pixels = 0, 100_000_000

    def __init__(self, *files: bytes) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def data(self, index: int) -> bytes:
        return self.files[index]

    def label(self, index: int) -> int:
        return -1

    def name_of(self, index: int) -> str:
        return f"file {index}"


def config_of(size: int = 64, batch: int = 2, scaled: bool = True, recipe: str = "simple") -> Config:
    config = Config()
    config.views.size, config.views.recipe, config.boxes.min_size = size, recipe, 8  # type: ignore[assignment]
    config.train.batch_size, config.data.workers, config.data.scaled_decode = batch, 0, scaled
    return config


# ---- the decoders ----


@pytest.mark.parametrize("shrink", SHRINKS)
def test_every_decoder_gives_the_same_pixels(shrink: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in JPEG_DECODERS:
        monkeypatch.setenv("SCRL_FAST_JPEG", name)
        for options in ({}, {"subsampling": 0}, {"progressive": True}):
            found.append(Encoded(jpeg(397, 501, **options), max_pixels=10**6).decode(shrink))
    assert all(image.shape == (-(-397 // shrink), -(-501 // shrink), 3) for image in found)
    assert all(within_one_level(image, found[index % 3]) for index, image in enumerate(found))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shrink", SHRINKS)
def test_a_pixel_lies_where_it_is_said_to(shrink: int, orientation: int) -> None:
    whole = Encoded(jpeg(400, 600, orientation=orientation), max_pixels=10**6)
    full, small = whole.decode(), whole.decode(shrink)
    assert full.shape[:2] == (whole.height, whole.width)
    height, width = full.shape[0] // shrink, full.shape[1] // shrink
    means = full.reshape(height, shrink, width, shrink, 3).mean((1, 3))
    shifted = np.roll(means, 1, axis=1)
    error, wrong = np.abs(small - means).mean(), np.abs(small - shifted).mean()
    assert error < 1.0 and error < wrong / 3
    odd = Encoded(jpeg(397, 501, orientation=orientation), max_pixels=10**6)
    assert odd.can_shrink(shrink) == (orientation == 1)  # turned, the incomplete pixel would come first


def test_what_cannot_be_shrunk() -> None:
    for data in (jpeg(400, 600, kind="PNG"),):
        image = Encoded(data, max_pixels=10**6)
        assert image.can_shrink(1) and not image.can_shrink(2)
        with pytest.raises(ValueError, match="shrink must be 1"):
            image.decode(2)
    file = io.BytesIO()
    Image.fromarray(photo("china")).convert("CMYK").save(file, "JPEG")
    assert not Encoded(file.getvalue(), max_pixels=10**6).can_shrink(2)
    assert not Encoded(jpeg(400, 600), max_pixels=10**6).can_shrink(3)
    with pytest.raises(BadImage):
        cut = jpeg(400, 600)
        Encoded(cut[: len(cut) // 2], max_pixels=10**6).decode(4)


# ---- which shrink, and the crops ----


def shrink_of(image: Opened, config: Config, epoch: int = 0) -> int:
    table = draw_views(config.views, [(image.height, image.width)], seed=0, epoch=epoch, keys=[0])
    return largest_shrink(image, table[:, 0], config.views.size)


def test_both_crops_stay_large_enough_and_the_next_shrink_would_not_do() -> None:
    source, config = Files(jpeg(1003, 1501)), config_of()
    seen = set()
    for epoch in range(200):
        table = draw_views(config.views, [[1003, 1501]], seed=0, epoch=epoch, keys=[0])
        sides = np.minimum(table["h"], table["w"]).min()
        chosen = shrink_of(source.open(0), config, epoch) if epoch < 40 else None
        for shrink in SHRINKS:
            _, crops = fit_to_shrunk(table, [shrink])
            enough = crops[..., 2:4].min() >= 64 * shrink
            assert enough == (sides // shrink >= 64) or abs(sides - 64 * shrink) < 2 * shrink
            if enough:
                break
        else:
            shrink = 1
        if chosen is not None:
            assert chosen == shrink
            assert source.open(0).decode(shrink).shape[:2] == (-(-1003 // shrink), -(-1501 // shrink))
            seen.add(shrink)
    assert seen == {4, 8}


def test_small_images_and_other_formats_are_decoded_in_full() -> None:
    for data in (jpeg(375, 500), jpeg(1000, 447), jpeg(1000, 1000, kind="PNG")):
        assert shrink_of(Files(data).open(0), config_of(size=224)) == 1


def test_crops_move_inwards_by_less_than_a_shrunk_pixel() -> None:
    config, sizes = config_of(), np.array([[1003, 1501], [640, 517], [2000, 1999]])
    shrinks = np.array([4, 1, 8])
    for epoch in range(50):
        table = draw_views(config.views, sizes, seed=1, epoch=epoch, keys=[0, 1, 2])
        fitted, crops = fit_to_shrunk(table, shrinks)
        before = crops_of(table)
        for edge, back in ((0, 2), (1, 3)):
            start = crops[..., edge] - before[..., edge]
            end = before[..., edge] + before[..., back] - crops[..., edge] - crops[..., back]
            assert (start >= 0).all() and (start < shrinks).all() and (end >= 0).all() and (end < shrinks).all()
            assert (fitted["yx"[edge]] * shrinks == crops[..., edge]).all()
            assert (fitted["hw"[edge]] * shrinks == crops[..., back]).all()
        assert np.array_equal(fitted[:, 1], table[:, 1]) and np.array_equal(crops[..., 4], before[..., 4])
        assert (fitted["y"] + fitted["h"] <= sizes[:, 0] // shrinks).all()
    same, crops = fit_to_shrunk(table, [1, 1, 1])
    assert same is table and np.array_equal(crops, before)


# ---- what it does to pixels ----


@pytest.mark.parametrize("name", ["china", "coffee"])
def test_views_differ_little_from_those_of_full_decoding(name: str) -> None:
    source, config, errors = Files(jpeg(1203, 1801, name)), config_of(96), []
    options: dict[str, Any] = {"size": 96, "mean": [0] * 3, "std": [1 / 255] * 3}
    full = source.read(0)
    for epoch in range(8):
        shrink = shrink_of(source.open(0), config, epoch)
        assert shrink > 1
        table = draw_views(config.views, [full.shape[:2]], seed=0, epoch=epoch, keys=[0])
        fitted, crops = fit_to_shrunk(table, [shrink])
        alone = fit_to_shrunk(table[:, 0], shrink)
        assert np.array_equal(alone[0], fitted[:, 0]) and np.array_equal(alone[1], crops[:, 0])
        for place, field in enumerate("yxhw"):  # the crop that was really made
            table[field] = crops[..., place]
        ours, theirs = (
            augment_views(pack_images([p]), t, **options)
            for p, t in ((source.open(0).decode(shrink), fitted), (full, table))
        )
        errors.append(float((ours - theirs).abs().mean()))
    assert np.mean(errors) < 1.5 and max(errors) < 3, errors  # of 255 levels; measured 1.06, 2.09 (china)


def test_the_loader_uses_it_and_its_stream_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [jpeg(803, 1201, name) for name in ("china", "coffee")] + [jpeg(100, 120), b"no picture", jpeg(1001, 800)]
    source = Files(*files)
    config = config_of(recipe="simclr")
    config.data.max_bad_fraction = 0.5
    shrinks: list[int] = []
    decode = Encoded.decode
    monkeypatch.setattr(
        Encoded, "decode", lambda self, shrink=1, buffer=None: shrinks.append(shrink) or decode(self, shrink)
    )
    batches = [batch for epoch in (0, 1) for batch in Loader(source, config).epoch(epoch)]
    assert {1, 4} <= set(shrinks) | {8} and max(shrinks) > 1
    config.data.workers = 2
    loader = Loader(source, config)
    for one, other in zip(batches, (batch for epoch in (0, 1) for batch in loader.epoch(epoch)), strict=True):
        assert torch.equal(one.views, other.views) and torch.equal(one.crops, other.crops)
        assert one.boxes is not None and other.boxes is not None and torch.equal(one.boxes[1], other.boxes[1])
    loader.close()
    config.data.scaled_decode = False
    plain = [batch for epoch in (0, 1) for batch in Loader(source, config).epoch(epoch)]
    for one, other in zip(batches, plain, strict=True):
        assert torch.equal(one.keys, other.keys) and (one.crops - other.crops).abs().max() < 16
    assert any(not torch.equal(one.crops, other.crops) for one, other in zip(batches, plain, strict=True))
