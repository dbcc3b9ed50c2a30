"""From the bytes of an image file to RGB pixels: the fastest decoder at hand for JPEG, Pillow for everything else.

What a file asks for is checked from its header before a pixel is decoded, by rules that are the same for all decoders.
The EXIF orientation is applied in one place for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from scrl_fast.data.image_files import DEFAULT_LIMITS, BadImage, ImageLimits, check_size, name_of_content, read_file
from scrl_fast.data.image_headers import header_fault
from scrl_fast.data.jpeg import (
    SHRINKS,
    Pixels,
    decode_jpeg,
    frame_of,
    has_more_scans,
    jpeg_header_fault,
    size_of_simple_jpeg,
    turns_by_itself,
)
from scrl_fast.data.pillow import (
    bytes_per_pixel,
    is_turned_by_exif,
    open_picture,
    orientation_and_size,
    to_rgb,
)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
"""Ends of the names of image files, compared in lower case."""
_BYTES_PER_PIXEL = 7  # of an RGB picture of Pillow's (4) and its array (3); the other JPEG decoders take 3
_NEVER_TOO_SMALL = 1 << 24  # pixels for which any file is large enough
_BYTES_OF_COEFFICIENTS = 6  # beside them in a JPEG of several scans, at most


def read_image(
    path: str, *, max_pixels: int | None = None, limits: ImageLimits = DEFAULT_LIMITS, name: str | None = None
) -> Pixels:
    """The file at path as uint8 `[H, W, 3]`; see `decode`. Raises BadImage also when it cannot be opened."""
    data = read_file(path, name, limit=limits.max_file_bytes)
    return decode(data, max_pixels=max_pixels, limits=limits, name=name or path)


def decode(
    data: bytes, *, max_pixels: int | None = None, limits: ImageLimits = DEFAULT_LIMITS, name: str = "image"
) -> Pixels:
    """Decode to RGB, uint8 `[H, W, 3]`, turned upright by its EXIF orientation.

    Grey is repeated, alpha is dropped, palette and CMYK are converted, 16 bits become their upper 8.
    max_pixels: in place of the one in limits.
    Raises BadImage(name, cause) for an empty, damaged or cut file, for one that is no image, and for one beyond the
    limits, which is refused before it is decoded.
    """
    return Encoded(data, max_pixels=max_pixels, limits=limits, name=name).decode()


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

    height, width: in pixels, upright. data: the file. decoding_bytes: memory that decoding takes, at most.
    is_upright_baseline_jpeg: every decoder takes the file as it is, and quickly.
    Raises BadImage as `decode` does.
    """

    def __init__(
        self,
        data: bytes,
        *,
        max_pixels: int | None = None,
        limits: ImageLimits = DEFAULT_LIMITS,
        name: str = "image",
    ) -> None:
        self.name, self.data = name, data
        limits = limits.with_pixels(max_pixels)
        if not data:
            raise BadImage(name, "the file is empty")
        check_size(len(data), limits.max_file_bytes, name)
        self._picture: Image.Image | None = None
        if size := size_of_simple_jpeg(data):
            self.height, self.width = size
            self._orientation, self._plain_jpeg, self.is_upright_baseline_jpeg = 1, True, True
            several_scans, per_pixel = False, _BYTES_PER_PIXEL
        else:
            if fault := jpeg_header_fault(data) or header_fault(data):
                raise BadImage(name, fault)
            with _bad_image(name, data):
                self._picture = picture = open_picture(data)
                self._orientation, self.height, self.width = orientation_and_size(picture)
                per_pixel = bytes_per_pixel(picture)
            frame = frame_of(data) if picture.format in ("JPEG", "MPO") else None
            several_scans = frame is not None and frame.several_scans
            self._plain_jpeg = frame is not None and frame.is_common and picture.mode in ("RGB", "L")
            self.is_upright_baseline_jpeg = self._plain_jpeg and self._orientation == 1 and not several_scans
        self.decoding_bytes = self.height * self.width * (per_pixel + (_BYTES_OF_COEFFICIENTS if several_scans else 0))
        self._check(limits, several_scans)

    @property
    def orientation(self) -> int:
        """EXIF's number, 1 to 8, of how the stored pixels are turned; 1 is upright."""
        return self._orientation

    def _check(self, limits: ImageLimits, several_scans: bool) -> None:
        if self.width * self.height > limits.max_pixels:
            cause = f"{self.width} x {self.height} pixels are more than data.max_pixels={limits.max_pixels}"
            raise BadImage(self.name, cause)
        most = max(_NEVER_TOO_SMALL, len(self.data) * limits.max_pixels_per_byte)
        if self.width * self.height > most:
            cause = f"{self.width} x {self.height} pixels in {len(self.data)} bytes are more than"
            raise BadImage(self.name, f"{cause} data.max_pixels_per_byte={limits.max_pixels_per_byte}")
        if self.decoding_bytes > limits.max_decoded_bytes:
            cause = f"{self.width} x {self.height} pixels take {self.decoding_bytes} bytes to decode, more than"
            raise BadImage(self.name, f"{cause} data.max_decoded_bytes={limits.max_decoded_bytes}")
        if several_scans and has_more_scans(self.data, limits.max_scans):
            raise BadImage(self.name, f"it is a JPEG of more scans than data.max_scans={limits.max_scans}")

    def can_shrink(self, shrink: int) -> bool:
        """Whether `decode(shrink)` works and pixel (i, j) of it covers exactly the pixels from (i, j) * shrink on."""
        if shrink == 1:
            return True
        whole = self._orientation == 1 or self.height % shrink == self.width % shrink == 0  # mirrored, the rest leads
        small = min(self.height, self.width) < shrink  # Pillow shrinks no side to less than a pixel, others do
        return self._plain_jpeg and shrink in SHRINKS and whole and not small

    def decode(self, shrink: int = 1, buffer: PixelBuffer | None = None) -> Pixels:
        """RGB, uint8 `[ceil(height / shrink), ceil(width / shrink), 3]`; a JPEG shrunk while decoding costs less.

        buffer: where the pixels are to lie until the next image is decoded there, if they fit.
        """
        if not self.can_shrink(shrink):
            raise ValueError(f"shrink must be 1, or one of {SHRINKS} for a JPEG that allows it, got {shrink}")
        orientation = self._orientation
        with _bad_image(self.name, self.data):
            if self._plain_jpeg:
                pixels, decoder = decode_jpeg(self.data, shrink, self._place_in(buffer) if shrink == 1 else None)
                if orientation != 1 and shrink == 1 and turns_by_itself(decoder) and self._picture is not None:
                    orientation = 1 if is_turned_by_exif(self._picture) else orientation
            else:
                # it holds its pixels from now on, which would otherwise live as long as this object
                picture, self._picture = self._picture or open_picture(self.data), None
                pixels = to_rgb(picture)
                del picture
            pixels = upright(pixels, orientation)
            height, width = -(-self.height // shrink), -(-self.width // shrink)
            if pixels.shape != (height, width, 3):  # views are drawn for the size in the header
                raise BadImage(self.name, f"{height} x {width} pixels announced, {pixels.shape[:2]} found")
        return pixels

    def _place_in(self, buffer: PixelBuffer | None) -> Pixels | None:
        return buffer.place(self.height, self.width) if buffer is not None and self._orientation == 1 else None


@contextmanager
def _bad_image(name: str, data: bytes) -> Iterator[None]:
    """Damaged files make decoders raise OSError, struct.error, zlib.error, IndexError, ...: here all are BadImage."""
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise BadImage(name, _unknown(data)) from None
    except Image.DecompressionBombError as error:
        raise BadImage(name, f"{error} (a limit of Pillow for this format: PIL.Image.MAX_IMAGE_PIXELS)") from error
    except Exception as error:
        raise BadImage(name, str(error) or type(error).__name__) from error


def _unknown(data: bytes) -> str:
    frame = frame_of(data)
    if frame is not None and frame.precision != 8:
        return f"is a JPEG of {frame.precision} bits a channel, which is not read; convert it to 8 bits"
    return name_of_content(data)


_TURNS: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: image.transpose(1, 0, 2)[:, ::-1],
    7: lambda image: image[::-1, ::-1].transpose(1, 0, 2),
    8: lambda image: image.transpose(1, 0, 2)[::-1],
}


def upright(image: Pixels, orientation: int) -> Pixels:
    """The pixels turned as EXIF's number says, in memory without gaps; as they are for a number it does not know."""
    turn = _TURNS.get(orientation)
    return np.ascontiguousarray(turn(image) if turn else image)
