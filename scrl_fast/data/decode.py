"""From the bytes of an image file to RGB pixels: the fastest decoder at hand for JPEG, Pillow for everything else.

All JPEG decoders here give the same pixels bit for bit (libjpeg-turbo with its exact transform), so that a run does
not depend on which one is installed. Every picture's size is checked from its header before a pixel is decoded, and the
EXIF orientation is applied in one place for all.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # what a file may hold, whatever it is called
_ORIENTATION = 0x0112
# what Pillow and the JPEG decoders raise on files that are cut, damaged, too large or no images at all
_DECODE_ERRORS = (OSError, RuntimeError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


class BadImage(Exception):
    """An image that cannot be read: carries its name and the cause."""

    def __init__(self, name: str, cause: str) -> None:
        super().__init__(f"{name}: {cause}")
        self.name, self.cause = name, cause


def read_image(path: str, *, max_pixels: int, name: str | None = None) -> Pixels:
    """The file at path as uint8 `[H, W, 3]`; see `decode`. Raises BadImage also when it cannot be opened."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise BadImage(name or path, error.strerror or str(error)) from error
    return decode(data, max_pixels=max_pixels, name=name or path)


def decode(data: bytes, *, max_pixels: int, name: str = "image") -> Pixels:
    """Decode to RGB, uint8 `[H, W, 3]`, turned upright by its EXIF orientation.

    Grey is repeated, alpha is dropped, palette and CMYK are converted, 16 bits become their upper 8.
    Raises BadImage(name, cause) for an empty, damaged or cut file, for one that is no image, and for one with more than
    max_pixels pixels, which is refused before it is decoded.
    """
    if not data:
        raise BadImage(name, "the file is empty")
    try:
        picture = Image.open(io.BytesIO(data), formats=_FORMATS)  # reads the header only
        width, height = picture.size
        if width * height > max_pixels:
            raise BadImage(name, f"{width} x {height} pixels are more than data.max_pixels={max_pixels}")
        orientation = picture.getexif().get(_ORIENTATION, 1)
        if picture.format in ("JPEG", "MPO") and picture.mode in ("RGB", "L"):
            pixels = jpeg_decoder()(data)
        else:
            pixels = _rgb(picture)
    except Image.UnidentifiedImageError:
        raise BadImage(name, "not an image of a known format") from None
    except _DECODE_ERRORS as error:
        raise BadImage(name, str(error) or type(error).__name__) from error
    return _upright(pixels, orientation)


def _rgb(picture: Image.Image) -> Pixels:
    if picture.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip instead of scale
        grey = np.asarray(picture)
        grey = (grey.astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.asarray(picture.convert("RGB"))


_TURNS: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: image.transpose(1, 0, 2)[:, ::-1],
    7: lambda image: image[::-1, ::-1].transpose(1, 0, 2),
    8: lambda image: image.transpose(1, 0, 2)[::-1],
}


def _upright(image: Pixels, orientation: int) -> Pixels:
    turn = _TURNS.get(orientation)
    return np.ascontiguousarray(turn(image) if turn else image)


def _simplejpeg() -> Callable[[bytes], Pixels]:
    import simplejpeg

    return simplejpeg.decode_jpeg


def _torchvision() -> Callable[[bytes], Pixels]:
    import torch
    import torchvision.io  # noqa: F401  (loads the operators)

    # the operator itself: the Python function above it warns of its removal on every call
    operator = torch.ops.image.decode_jpeg.default

    def run(data: bytes) -> Pixels:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return operator(encoded, 3, False).permute(1, 2, 0).numpy()

    return run


def _pillow() -> Callable[[bytes], Pixels]:
    return lambda data: np.asarray(Image.open(io.BytesIO(data), formats=_FORMATS).convert("RGB"))


_JPEG_DECODERS: dict[str, Callable[[], Callable[[bytes], Pixels]]] = {
    # fastest first: 0.94, 0.98 and 1.51 ms for 500 x 375 at quality 90 on one core of an EPYC
    "simplejpeg": _simplejpeg,
    "torchvision": _torchvision,
    "pillow": _pillow,
}


def jpeg_decoder() -> Callable[[bytes], Pixels]:
    """The JPEG decoder in use, chosen once. SCRL_FAST_JPEG forces one, and raises RuntimeError if that cannot run."""
    return _choose(os.environ.get("SCRL_FAST_JPEG", ""))[0]


def decoders() -> dict[str, str]:
    """Every JPEG decoder, fastest first: 'in use', or why not."""
    return dict(_choose(os.environ.get("SCRL_FAST_JPEG", ""))[1])


@functools.cache
def _choose(forced: str) -> tuple[Callable[[bytes], Pixels], dict[str, str]]:
    if forced and forced not in _JPEG_DECODERS:
        raise ValueError(f"SCRL_FAST_JPEG={forced} is unknown; choose one of {', '.join(_JPEG_DECODERS)}")
    chosen, said = None, {}
    for name, load in _JPEG_DECODERS.items():
        try:
            candidate = load()
            _try_out(candidate)
        except Exception as error:  # a broken installation may raise anything; it must not take the others down
            said[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if chosen is None and forced in ("", name):
            chosen, said[name] = candidate, "in use"
        else:
            said[name] = "not chosen by SCRL_FAST_JPEG" if chosen is None else "works, slower than the one in use"
    if chosen is None:
        raise RuntimeError(f"SCRL_FAST_JPEG={forced} cannot be used: {said[forced]}")
    return chosen, said


def _try_out(candidate: Callable[[bytes], Pixels]) -> None:
    file, picture = io.BytesIO(), Image.new("RGB", (9, 7), (200, 30, 90))
    picture.save(file, "JPEG")
    if candidate(file.getvalue()).shape != (7, 9, 3):
        raise RuntimeError("gives a picture of the wrong shape")
