"""Pictures read by Pillow: opened without its process-wide limit, turned to RGB without holding them three times."""

from __future__ import annotations

import io
import logging
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scrl_fast.data.image_headers import claims_too_much

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # what a file may hold, whatever it is called
_ORIENTATION, _WIDTH, _HEIGHT = 0x0112, 0x0100, 0x0101
_BYTES_OF_MODE = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2}  # others take 4 bytes a pixel
_log = logging.getLogger("scrl_fast")
_BYTES_OF_WEBP = 16  # its decoder holds the canvas twice, and hands over copies
_BAND = 1 << 20  # pixels that are converted at a time


def open_picture(data: bytes) -> Image.Image:
    """The picture that a file holds, of which only the header is read: `PIL.Image.open` without Pillow's limit.

    That limit is one number for the whole process. Here data.max_pixels decides, so it must not stand in the way, nor
    can it be lifted for a moment: other threads, the user's among them, would go without it. So it is left alone, and
    Pillow's registry is asked directly. WebP and TIFF apply it once more by themselves, where they take memory.
    Raises UnidentifiedImageError, or whatever Pillow raises for a damaged header.
    """
    for kind in _FORMATS:
        if kind not in Image.OPEN:
            Image.init()
        read_header, accepts = Image.OPEN[kind]
        if accepts is None or accepts(data[:16]) is True:
            with suppress(SyntaxError, IndexError, TypeError, struct.error):  # not of this kind after all
                return read_header(io.BytesIO(data), "")
    raise Image.UnidentifiedImageError


def orientation_and_size(picture: Image.Image) -> tuple[int, int, int]:
    """EXIF's number of how to turn the loaded picture (1 for a TIFF: Pillow turns it), and its upright size."""
    orientation, (width, height) = _tag(picture), picture.size
    is_tiff = picture.format == "TIFF"
    if is_tiff:  # some releases of Pillow have turned the size already, some have not
        width, height = picture.tag_v2[_WIDTH], picture.tag_v2[_HEIGHT]  # type: ignore[attr-defined]
    height, width = (width, height) if orientation in (5, 6, 7, 8) else (height, width)
    return 1 if is_tiff else orientation, height, width


def is_turned_by_exif(picture: Image.Image) -> bool:
    """Whether the orientation stands in EXIF; it may also come from XMP, where no decoder looks but Pillow."""
    exif = Image.Exif()
    with suppress(Exception):
        exif.load(picture.info.get("exif", b""))
    return _ORIENTATION in exif


def bytes_per_pixel(picture: Image.Image) -> int:
    """Memory that decoding takes, at most and for each pixel: the picture as Pillow holds it, and its RGB."""
    if picture.format == "WEBP":
        return _BYTES_OF_WEBP
    held = _BYTES_OF_MODE.get(picture.mode, 4)
    turned = picture.format == "TIFF" and _tag(picture) != 1
    return held * (2 if turned else 1) + 3


def _tag(picture: Image.Image) -> int:
    if any(claims_too_much(exif) for exif in _exif_of(picture)):
        return 1
    try:
        # Pillow's own for PNG loads the pixels first, to look for EXIF behind them; a failure there leaves a picture
        # that seems to load the second time, with whatever came through.
        return Image.Image.getexif(picture).get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF is no reason to lose the picture
        return 1


def _exif_of(picture: Image.Image) -> Iterator[bytes]:
    """Where Pillow looks for EXIF: a block of it, and one in hexadecimal text, as ImageMagick writes it into PNG."""
    if isinstance(block := picture.info.get("exif"), bytes):
        yield block
    if isinstance(text := picture.info.get("Raw profile type exif"), str):
        with suppress(ValueError):
            yield bytes.fromhex("".join(text.split("\n")[3:]))


def to_rgb(picture: Image.Image) -> NDArray[np.uint8]:
    """The pixels as RGB, uint8 `[H, W, 3]`: a large picture in bands, since each step of converting takes its size."""
    picture.load()
    width, height = picture.size
    rows = max(1, _BAND // max(1, width))
    if rows >= height:
        return _converted(picture)
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[top:bottom] = _converted(picture.crop((0, top, width, bottom)))
    return pixels


def _converted(picture: Image.Image) -> NDArray[np.uint8]:
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers of no known range; convert it to 8 or 16 bits")
    if picture.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip instead of scale
        _tell_16_bits()
        grey = np.asarray(picture)
        grey = (grey.astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))


_SIXTEEN_BITS_UNTOLD = threading.Semaphore()


def _tell_16_bits() -> None:
    if _SIXTEEN_BITS_UNTOLD.acquire(blocking=False):  # of several threads, too, only one
        _log.warning(
            "16-bit single-channel images are read as 8-bit RGB by their upper 8 bits (value // 256); images that use "
            "only the lower 12 bits come out almost black: stretch such files to 16 bits first"
        )
