from __future__ import annotations

import io
import re
import resource
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photos import NAMES, crop, within_one_level, write_bad, write_formats
from PIL import Image, ImageOps

from scrl_fast.data import BadImage, ImageLimits, decoders, jpeg
from scrl_fast.data.decode import Encoded, PixelBuffer, decode, read_image

LIMIT = 1_000_000
JPEG_DECODERS = [name for name, said in decoders().items() if said in ("in use", "works")]


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_every_format(tmp_path: Path) -> None:
    files = write_formats(tmp_path)
    assert len(files) == 15
    exact = np.asarray(crop(NAMES[0], 90, 120)).astype(int)
    grey = np.asarray(crop(NAMES[0], 90, 120).convert("L")).astype(int)[:, :, None]
    for name, how in files.items():
        image = read_image(str(tmp_path / name), max_pixels=LIMIT)
        assert image.shape == (90, 120, 3) and image.dtype == np.uint8 and image.flags.c_contiguous, name
        error = abs(image - (grey if how == "grey" else exact))
        if how == "exact":
            assert error.max() == 0, name
        assert error.mean() < 8, f"{name}: {error.mean()}"  # palette: 7, CMYK: 6, JPEG: 2
        if how == "grey":
            assert (image == image[:, :, :1]).all(), name
    assert abs(read_image(str(tmp_path / "sixteen.png"), max_pixels=LIMIT) - grey).max() == 0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "TIFF LZW"])  # Pillow turns a TIFF by itself
def test_exif_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"compression": "tiff_lzw"} if kind == "TIFF LZW" else {}
    data = encoded(crop(NAMES[0], 40, 64), kind.split()[0], exif=exif, **options)
    with Image.open(io.BytesIO(data)) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    image = Encoded(data, max_pixels=LIMIT)
    assert (image.height, image.width) == expected.shape[:2]
    assert within_one_level(image.decode(), expected)


@pytest.mark.parametrize("name", JPEG_DECODERS)
def test_jpeg_decoders_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    picture = crop(NAMES[2], 91, 123)
    monkeypatch.setenv("SCRL_FAST_JPEG", name)
    assert decoders()[name] == "in use"
    for options in ({"quality": 90}, {"quality": 40, "subsampling": 0}, {"progressive": True}, {"exif": exif}):
        for image in (picture, picture.convert("L"), picture.convert("CMYK")):
            data = encoded(image, **options)
            expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
            assert within_one_level(decode(data, max_pixels=LIMIT), np.asarray(expected)), (image.mode, options)


@pytest.mark.parametrize("name", JPEG_DECODERS)
def test_two_pictures_in_one_jpeg_give_the_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRL_FAST_JPEG", name)
    first, second = crop(NAMES[0], 64, 64), crop(NAMES[1], 64, 64)
    data = encoded(first, "MPO", save_all=True, append_images=[second], quality=90)  # what stereo cameras write
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert within_one_level(decode(data, max_pixels=LIMIT), expected)


@pytest.mark.parametrize("name", JPEG_DECODERS)
def test_cut_files_are_refused_at_any_length(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRL_FAST_JPEG", name)
    for kind in ("JPEG", "PNG", "WEBP", "BMP"):
        data = encoded(crop(NAMES[0], 40, 64), kind)
        for share in (0, 0.01, 0.2, 0.5, 0.9):
            with pytest.raises(BadImage):
                decode(data[: int(len(data) * share)], max_pixels=LIMIT)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow says what is damaged
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_damage_gives_a_picture_or_bad_image_and_nothing_else(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    options = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}
    data, rng = encoded(crop(NAMES[0], 24, 40), kind, **options), np.random.default_rng(0)
    refused = 0
    for attempt in range(200):
        damaged = np.frombuffer(data, np.uint8).copy()
        reach = 200 if attempt % 2 else len(data)  # headers every other time
        damaged[rng.integers(0, min(reach, len(data)), 4)] = rng.integers(0, 256, 4)
        try:
            assert decode(damaged.tobytes(), max_pixels=LIMIT).ndim == 3
        except BadImage:
            refused += 1
    assert refused


def test_a_damaged_png_is_refused_wherever_pillow_refuses_it() -> None:
    data, rng, refused = encoded(crop(NAMES[0], 40, 64), "PNG"), np.random.default_rng(1), 0
    for _ in range(50):
        damaged = bytearray(data)
        damaged[rng.integers(60, len(data) - 20)] ^= 1 << int(rng.integers(8))
        try:
            expected = np.asarray(Image.open(io.BytesIO(damaged)).convert("RGB"))
        except Exception:
            refused += 1
            with pytest.raises(BadImage):
                decode(bytes(damaged), max_pixels=LIMIT)
        else:
            assert np.array_equal(decode(bytes(damaged), max_pixels=LIMIT), expected)
    assert refused > 25


@pytest.mark.parametrize("name", JPEG_DECODERS)
@pytest.mark.parametrize("orientation", [3, 6])
def test_orientation_in_xmp_is_followed(name: str, orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRL_FAST_JPEG", name)
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>{orientation}</tiff:Orientation></x:xmpmeta>'
    data = encoded(crop(NAMES[0], 40, 64), "JPEG", quality=90, xmp=xmp.encode())
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert expected.size == ((40, 64) if orientation == 6 else (64, 40))
    assert within_one_level(decode(data, max_pixels=LIMIT), np.asarray(expected))


@pytest.mark.parametrize("name", JPEG_DECODERS)
def test_pixels_are_decoded_into_a_room_where_they_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRL_FAST_JPEG", name)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [encoded(crop(photo, 30, 44), "JPEG", quality=90) for photo in NAMES[:2]]
    turned = encoded(crop(NAMES[0], 30, 44), "JPEG", quality=90, exif=exif)
    large = encoded(crop(NAMES[0], 31, 44), "JPEG", quality=90)
    buffer = PixelBuffer(30 * 44 * 3)
    for data, fits in ((files[0], True), (turned, False), (files[1], True), (large, False)):
        pixels = Encoded(data, max_pixels=LIMIT).decode(buffer=buffer)
        assert np.array_equal(pixels, decode(data, max_pixels=LIMIT))
        assert np.shares_memory(pixels, buffer.place(30, 44)) == fits
    with pytest.raises(BadImage):
        Encoded(files[0][: len(files[0]) // 2], max_pixels=LIMIT).decode(buffer=buffer)


def test_pixels_are_not_kept_beside_the_file() -> None:
    picture = crop(NAMES[0], 30, 44)
    for data in (encoded(picture, "PNG"), encoded(picture.convert("CMYK"), "JPEG")):
        image = Encoded(data, max_pixels=LIMIT)
        pixels = image.decode()
        assert image._picture is None  # Pillow's keep what they once decoded
        assert np.array_equal(image.decode(), pixels)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}])
def test_the_short_way_to_a_jpegs_size_finds_what_pillow_finds(options: dict[str, Any]) -> None:
    picture = crop(NAMES[0], 30, 44)
    exif = Image.Exif()
    exif[0x0112] = 6
    short = jpeg.size_of_simple_jpeg
    for mode, more, simple in (
        ("RGB", {}, True),
        ("L", {"comment": "a" * 300}, True),
        ("CMYK", {}, False),
        ("RGB", {"exif": exif}, False),
        ("RGB", {"icc_profile": b"profile"}, False),
        ("RGB", {"keep_rgb": True}, False),
    ):
        file = io.BytesIO()
        picture.convert(mode).save(file, "JPEG", **options, **more)
        data = file.getvalue()
        assert short(data) == ((30, 44) if simple and not options.get("progressive") else None), (mode, more)
        for cut in range(0, 700, 7):  # no header, however damaged, is read past its end
            assert short(data[:cut]) in (None, (30, 44)) and short(data[:cut] + b"\xff" * 20) in (None, (30, 44))
    assert short(encoded(crop(NAMES[0], 30, 44), "PNG")) is None


def test_bad_files_carry_path_and_cause(tmp_path: Path) -> None:
    for path in write_bad(tmp_path):
        with pytest.raises(BadImage, match=path.name) as error:
            read_image(str(path), max_pixels=LIMIT)
        assert error.value.name == str(path) and error.value.cause
    with pytest.raises(BadImage, match=r"text\.jpg: not an image of a known format"):
        read_image(str(tmp_path / "text.jpg"), max_pixels=LIMIT)
    with pytest.raises(BadImage, match="empty"):
        read_image(str(tmp_path / "empty.png"), max_pixels=LIMIT)
    with pytest.raises(BadImage, match="No such file"):
        read_image(str(tmp_path / "gone.png"), max_pixels=LIMIT)
    with pytest.raises(BadImage, match="is a folder, not a regular file"):
        read_image(str(tmp_path), max_pixels=LIMIT)


def png_bomb(side: int) -> bytes:
    """A PNG of side x side black pixels, made without making them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(9), bytes(1 + side // 8)
    rows = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@contextmanager
def memory_for(more: int) -> Iterator[None]:
    """So many bytes beyond what the process has, and no more."""
    before, pages = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of the process is read from Linux's /proc")
@pytest.mark.parametrize("side", [16_000, 50_000])  # below and above the limit that Pillow itself has
def test_bombs_are_refused_before_they_are_decoded(side: int) -> None:
    data = png_bomb(side)
    with memory_for(256 << 20), pytest.raises(BadImage, match="pixels"):
        decode(data, max_pixels=178_000_000, name="bomb.png")
    with memory_for(256 << 20), pytest.raises(MemoryError):  # the limit would have been felt
        np.zeros((side, side, 3), np.uint8)


def test_the_limit_counts_pixels() -> None:
    data = encoded(crop(NAMES[0], 40, 64))
    assert decode(data, max_pixels=40 * 64).shape == (40, 64, 3)
    with pytest.raises(BadImage, match=r"64 x 40 pixels are more than data\.max_pixels=2559"):
        decode(data, max_pixels=40 * 64 - 1)


@pytest.mark.filterwarnings("error")  # Pillow warns of more than 89 million pixels
@pytest.mark.parametrize("side", [9_600, 15_000])  # it refuses more than 179 million
def test_the_limit_is_ours_alone(side: int) -> None:
    picture = Encoded(png_bomb(side), limits=ImageLimits(10**9, max_pixels_per_byte=10**9, max_decoded_bytes=10**10))
    assert (picture.width, picture.height) == (side, side)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("limit", [1000, 2000])  # Pillow would refuse twice the first and warn above the second
@pytest.mark.parametrize("name", JPEG_DECODERS)
def test_pillows_limit_neither_counts_nor_changes(name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = crop(NAMES[0], 40, 64)
    monkeypatch.setenv("SCRL_FAST_JPEG", name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for kind in ("JPEG", "PNG", "BMP", "GIF"):
        data = encoded(picture, kind)
        assert decode(data, max_pixels=LIMIT).shape == (40, 64, 3), kind
        if kind == "JPEG":
            assert Encoded(data, max_pixels=LIMIT).decode(2).shape == (20, 32, 3)
        with pytest.raises((Image.DecompressionBombError, Image.DecompressionBombWarning)):
            Image.open(io.BytesIO(data))  # the user's own pictures stay under the user's limit
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("kind", ["WEBP", "TIFF"])
def test_a_limit_inside_pillow_says_whose_it_is(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(crop(NAMES[0], 40, 64), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    try:
        assert decode(data, max_pixels=LIMIT).shape == (40, 64, 3)  # Pillow before 13 has none here
    except BadImage as error:
        assert re.search(r"2560 pixels.*limit of 2000.*of Pillow.*PIL\.Image\.MAX_IMAGE_PIXELS", str(error))


def test_formats_nobody_asked_for_are_not_opened() -> None:
    with pytest.raises(BadImage, match="known format"):
        decode(encoded(crop(NAMES[0], 40, 64), "PCX"), max_pixels=LIMIT)


# ---- the choice of a decoder ----


def test_exactly_one_decoder_is_in_use_and_pillow_always_works() -> None:
    said = decoders()
    assert list(said.values()).count("in use") == 1 and said["pillow"] in ("in use", "works")


def clear_caches() -> None:
    jpeg._first_working.cache_clear()
    jpeg._load.cache_clear()


def test_a_broken_decoder_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> object:
        raise ImportError("no such library")

    monkeypatch.setattr(
        jpeg,
        "_DECODERS",
        {
            "simplejpeg": broken,
            "torchvision": lambda: lambda data: np.zeros((1, 1, 3)),
            "pillow": jpeg._pillow,
        },
    )
    clear_caches()
    try:
        said = decoders()
        assert said["simplejpeg"] == "ImportError: no such library"
        assert "wrong shape" in said["torchvision"] and said["pillow"] == "in use"
        monkeypatch.setenv("SCRL_FAST_JPEG", "simplejpeg")
        with pytest.raises(RuntimeError, match="no such library"):
            decoders()
    finally:
        clear_caches()


def test_an_unknown_decoder_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRL_FAST_JPEG", "jpegger")
    with pytest.raises(ValueError, match="jpegger"):
        decoders()
