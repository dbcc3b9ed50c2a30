"""From the bytes of an image file to RGB pixels: the fastest decoder at hand for JPEG, Pillow for everything else.

All JPEG decoders here give the same pixels bit for bit (libjpeg-turbo with its exact transform), so that a run does
not depend on which one is installed. Every picture's size is checked from its header before a pixel is decoded, and the
EXIF orientation is applied in one place for all.
"""

from __future__ import annotations

import functools
import io
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Pixels = NDArray[np.uint8]
JpegDecoder = Callable[[bytes], Pixels]
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # what a file may hold, whatever it is called
_ORIENTATION = 0x0112
SHRINKS = (8, 4, 2)  # divisors that libjpeg's inverse transform makes for nothing


class BadImage(Exception):
    """An image that cannot be read: carries its name and the cause."""

    def __init__(self, name: str, cause: str) -> None:
        super().__init__(f"{name}: {cause}")
        self.name, self.cause = name, cause


def read_image(path: str, *, max_pixels: int, name: str | None = None) -> Pixels:
    """The file at path as uint8 `[H, W, 3]`; see `decode`. Raises BadImage also when it cannot be opened."""
    return decode(read_file(path, name), max_pixels=max_pixels, name=name or path)


def read_file(path: str, name: str | None = None) -> bytes:
    """The bytes of a file. Raises BadImage(name, cause) when they cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadImage(name or path, error.strerror or str(error)) from error


def decode(data: bytes, *, max_pixels: int, name: str = "image") -> Pixels:
    """Decode to RGB, uint8 `[H, W, 3]`, turned upright by its EXIF orientation.

    Grey is repeated, alpha is dropped, palette and CMYK are converted, 16 bits become their upper 8.
    Raises BadImage(name, cause) for an empty, damaged or cut file, for one that is no image, and for one with more than
    max_pixels pixels, which is refused before it is decoded.
    """
    return Encoded(data, max_pixels=max_pixels, name=name).decode()


class PixelBuffer:
    """Memory for the pixels of one image after the other: always the same, so it stays in the processor's cache.

    size: bytes. A larger image is decoded into memory of its own.
    """

    def __init__(self, size: int) -> None:
        self._memory = np.empty(size, np.uint8)

    def place(self, height: int, width: int) -> Pixels | None:
        """Where an image of that size lies, over the one before; None when it does not fit."""
        size = height * width * 3
        return self._memory[:size].reshape(height, width, 3) if size <= self._memory.size else None


class Encoded:
    """An image file in memory of which the header is known and no pixel is decoded yet.

    height, width: in pixels, upright. data: the file. is_upright_baseline_jpeg: every decoder takes the file as it is,
    and quickly. Raises BadImage as `decode` does.
    """

    def __init__(self, data: bytes, *, max_pixels: int, name: str = "image") -> None:
        self.name, self.data = name, data
        if not data:
            raise BadImage(name, "the file is empty")
        self._picture: Image.Image | None = None
        if size := _size_of_simple_jpeg(data):
            height, width = size
            self._orientation, self._plain_jpeg, self.is_upright_baseline_jpeg = 1, True, True
        else:
            with _bad_image(name):
                self._picture = _open(data)
                width, height = self._picture.size
                self._orientation = _orientation(self._picture)
            self._plain_jpeg = self._picture.format in ("JPEG", "MPO") and self._picture.mode in ("RGB", "L")
            progressive = self._picture.info.get("progressive")
            self.is_upright_baseline_jpeg = self._plain_jpeg and self._orientation == 1 and not progressive
        if width * height > max_pixels:
            raise BadImage(name, f"{width} x {height} pixels are more than data.max_pixels={max_pixels}")
        self.height, self.width = (width, height) if self._orientation in (5, 6, 7, 8) else (height, width)

    def can_shrink(self, shrink: int) -> bool:
        """Whether `decode(shrink)` works and pixel (i, j) of it covers exactly the pixels from (i, j) * shrink on."""
        if shrink == 1:
            return True
        whole = self._orientation == 1 or self.height % shrink == self.width % shrink == 0  # mirrored, the rest leads
        return self._plain_jpeg and shrink in SHRINKS and whole

    def decode(self, shrink: int = 1, buffer: PixelBuffer | None = None) -> Pixels:
        """RGB, uint8 `[ceil(height / shrink), ceil(width / shrink), 3]`; a JPEG shrunk while decoding costs less.

        buffer: where the pixels are to lie until the next image is decoded there, if they fit and the decoder can write
        there.
        """
        if not self.can_shrink(shrink):
            raise ValueError(f"shrink must be 1, or one of {SHRINKS} for a JPEG that allows it, got {shrink}")
        orientation, decoder = self._orientation, jpeg_decoder()
        with _bad_image(self.name):
            if self._plain_jpeg and shrink > 1:
                pixels = _shrunk(decoder)(self.data, shrink)
            elif self._plain_jpeg and (place := self._place_in(buffer)) is not None:
                pixels = _decode_into(place, decoder, self.data)
            elif self._plain_jpeg:
                pixels = _load(decoder)[0](self.data)
                turned = orientation != 1 and decoder in _TURNS_BY_ITSELF and _is_in_exif(self._picture)
                orientation = 1 if turned else orientation
            else:
                # it holds its pixels from now on, which would otherwise live as long as this object
                picture, self._picture = self._picture or _open(self.data), None
                pixels = _rgb(picture)
                del picture
            pixels = _upright(pixels, orientation)
            height, width = -(-self.height // shrink), -(-self.width // shrink)
            if pixels.shape != (height, width, 3):  # views are drawn for the size in the header
                raise BadImage(self.name, f"{height} x {width} pixels announced, {pixels.shape[:2]} found")
        return pixels

    def _place_in(self, buffer: PixelBuffer | None) -> Pixels | None:
        return buffer.place(self.height, self.width) if buffer is not None and self._orientation == 1 else None


_SEGMENTS = {0xDB, 0xC4, 0xDD, 0xE0, 0xFE}  # tables, restarts, JFIF's density, comments: none changes the picture
_FRAMES = {0xC0, 0xC1}


def _size_of_simple_jpeg(data: bytes) -> tuple[int, int] | None:
    """Height and width of a sequential JPEG, grey or YCbCr, with nothing in its header that asks for more: no EXIF, no
    other colours, no second picture. None for every other file, damaged ones too, which Pillow then looks at.

    Pillow takes 30 us for the same, and twice that when another 0.8 ms of decoding has emptied the caches.
    """
    if data[:2] != b"\xff\xd8":
        return None
    at, size, end = 2, None, len(data) - 10
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xDA:
            return size
        if marker in _FRAMES and size is None:
            precision, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            if precision != 8 or channels not in (1, 3) or height == 0 or width == 0:
                return None
            size = height, width
        elif marker not in _SEGMENTS:
            return None
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None


def _open(data: bytes) -> Image.Image:
    """The picture that a file holds, of which only the header is read: `PIL.Image.open` without Pillow's limit.

    That limit is one number for the whole process. Here data.max_pixels decides, so it must not stand in the way, nor
    can it be lifted for a moment: other threads, the user's among them, would go without it. So it is left alone, and
    Pillow's registry is asked directly. WebP and TIFF apply it once more by themselves, where they take memory.
    """
    for kind in _FORMATS:
        if kind not in Image.OPEN:
            Image.init()
        read_header, accepts = Image.OPEN[kind]
        if accepts is None or accepts(data[:16]) is True:
            with suppress(SyntaxError, IndexError, TypeError, struct.error):  # not of this kind after all
                return read_header(io.BytesIO(data), "")
    raise Image.UnidentifiedImageError


@contextmanager
def _bad_image(name: str) -> Iterator[None]:
    """Damaged files make decoders raise OSError, struct.error, zlib.error, IndexError, ...: here all are BadImage."""
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise BadImage(name, "not an image of a known format") from None
    except Image.DecompressionBombError as error:
        raise BadImage(name, f"{error} (a limit of Pillow for this format: PIL.Image.MAX_IMAGE_PIXELS)") from error
    except Exception as error:
        raise BadImage(name, str(error) or type(error).__name__) from error


def _orientation(picture: Image.Image) -> int:
    try:
        # Pillow's own for PNG loads the pixels first, to look for EXIF behind them; a failure there leaves a picture
        # that seems to load the second time, with whatever came through.
        return Image.Image.getexif(picture).get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF is no reason to lose the picture
        return 1


def _is_in_exif(picture: Image.Image | None) -> bool:
    """Whether the orientation stands in EXIF; it may also come from XMP, where no decoder looks but Pillow."""
    exif = Image.Exif()
    with suppress(Exception):
        exif.load(picture.info.get("exif", b"") if picture else b"")
    return _ORIENTATION in exif


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


# ---- JPEG decoders: a function from a file's bytes to its pixels, not turned by EXIF ----


def _simplejpeg() -> JpegDecoder:
    import simplejpeg

    return simplejpeg.decode_jpeg


def _torchcodec() -> JpegDecoder:
    from torchcodec.decoders import decode_jpeg

    def run(data: bytes) -> Pixels:
        return cast(Tensor, decode_jpeg(data)).permute(1, 2, 0).numpy()

    return run


def _torchvision() -> JpegDecoder:
    import torch
    import torchvision.io  # noqa: F401  (loads the operators)

    # the operator itself: the Python function above it warns of its removal on every call
    operator = torch.ops.image.decode_jpeg.default

    def run(data: bytes) -> Pixels:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return operator(encoded, 3, False).permute(1, 2, 0).numpy()

    return run


def _pillow() -> JpegDecoder:
    return lambda data: np.asarray(_open(data).convert("RGB"))


def _decode_into(place: Pixels, decoder: str, data: bytes) -> Pixels:
    """The pixels in the memory of `place`; only one decoder can write there itself, for the others they are copied."""
    if decoder == "simplejpeg":
        import simplejpeg

        pixels = simplejpeg.decode_jpeg(data, buffer=place)
        return place if pixels.shape == place.shape else pixels
    pixels = _load(decoder)[0](data)
    if pixels.shape != place.shape:
        return pixels
    place[...] = pixels
    return place


def _shrunk(decoder: str) -> Callable[[bytes, int], Pixels]:
    """From a JPEG's bytes and a divisor to its pixels; the others than these two cannot, and Pillow stands in."""
    return _simplejpeg_shrunk if decoder == "simplejpeg" else _pillow_shrunk


def _simplejpeg_shrunk(data: bytes, shrink: int) -> Pixels:
    import simplejpeg

    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    return simplejpeg.decode_jpeg(data, min_height=-(-height // shrink), min_width=-(-width // shrink), min_factor=1)


def _pillow_shrunk(data: bytes, shrink: int) -> Pixels:
    picture = _open(data)
    picture.draft(None, (max(1, picture.width // shrink), max(1, picture.height // shrink)))
    return np.asarray(picture.convert("RGB"))


_JPEG_DECODERS: dict[str, Callable[[], JpegDecoder]] = {
    # By speed, as benchmarks/input_bench.py times them. The first also notices more damage; the third, as fast as the
    # second, is on its way out of torchvision.
    "simplejpeg": _simplejpeg,
    "torchcodec": _torchcodec,
    "torchvision": _torchvision,
    "pillow": _pillow,
}
_TURNS_BY_ITSELF = ("torchcodec",)


def jpeg_decoder() -> str:
    """Name of the JPEG decoder in use: the first that works, or the one that SCRL_FAST_JPEG names.

    Raises ValueError if that is unknown and RuntimeError with the cause if it cannot run.
    """
    return _first_working(os.environ.get("SCRL_FAST_JPEG", ""))


def decoders() -> dict[str, str]:
    """Every JPEG decoder, best first: 'in use', 'works', or why not."""
    used = jpeg_decoder()
    return {name: "in use" if name == used else _load(name)[1] or "works" for name in _JPEG_DECODERS}


@functools.cache
def _first_working(forced: str) -> str:
    if forced and forced not in _JPEG_DECODERS:
        raise ValueError(f"SCRL_FAST_JPEG={forced} is unknown; choose one of {', '.join(_JPEG_DECODERS)}")
    if forced and (failure := _load(forced)[1]):
        raise RuntimeError(f"SCRL_FAST_JPEG={forced} cannot be used: {failure}")
    return forced or next(name for name in _JPEG_DECODERS if not _load(name)[1])


@functools.cache
def _load(name: str) -> tuple[JpegDecoder, str]:
    """The decoder and '', or one that must not be called and the reason why not."""
    try:
        decoder = _JPEG_DECODERS[name]()
        file = io.BytesIO()
        Image.new("RGB", (9, 7), (200, 30, 90)).save(file, "JPEG")
        if decoder(file.getvalue()).shape != (7, 9, 3):
            raise RuntimeError("gives a picture of the wrong shape")
        return decoder, ""
    except Exception as error:  # a broken installation may raise anything; it must not take the others down
        return _pillow(), f"{type(error).__name__}: {error}".splitlines()[0]
