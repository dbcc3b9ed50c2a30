"""JPEG: what its markers say before anything is decoded, and the decoders that may be installed.

All decoders give the same pixels bit for bit (libjpeg-turbo with its exact transform). They differ in what they refuse:
so each is given only what all of them take, and where one fails all the same, Pillow decides.
"""

from __future__ import annotations

import functools
import io
import os
import re
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

from scrl_fast.data.image_headers import TOO_MANY_PARTS, TOO_MANY_TAGS, claims_too_much
from scrl_fast.data.pillow import open_picture, to_rgb
from scrl_fast.errors import UsageError

Pixels = NDArray[np.uint8]
JpegDecoder = Callable[[bytes], Pixels]
SHRINKS = (8, 4, 2)  # divisors that libjpeg's inverse transform makes for nothing

_SEGMENTS = {0xDB, 0xC4, 0xDD, 0xE0, 0xFE}  # tables, restarts, JFIF's density, comments: none changes the picture
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), (0xC2, 0xC6, 0xCA, 0xCE)
_COMMON = (*_SEQUENTIAL, 0xC2)  # coded by Huffman
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SCAN, _END = 0xDA, 0xD9
_MOST_SEGMENTS, _MOST_EXIF_SEGMENTS, _APP1 = 10_000, 64, 0xE1
_LONGEST_SIMPLE_HEADER = 1 << 20  # bytes
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of a segment with a length, or the end


class Frame(NamedTuple):
    """What a JPEG says in front of its coded data.

    precision: bits a channel. is_common: 8 bits, sequential or progressive, Huffman codes: every decoder takes it.
    several_scans: its channels do not come all at once, so the coefficients of the whole picture must be held.
    """

    precision: int
    is_common: bool
    several_scans: bool


def size_of_simple_jpeg(data: bytes) -> tuple[int, int] | None:
    """Height and width of a sequential JPEG, grey or YCbCr, with nothing in its header that asks for more: no EXIF, no
    other colours, no second picture. None for every other file, damaged ones too, which Pillow then looks at.

    Pillow takes 30 us for the same, and twice that when another 0.8 ms of decoding has emptied the caches.
    """
    if data[:2] != b"\xff\xd8":
        return None
    at, size, channels, end = 2, None, 0, min(len(data) - 10, _LONGEST_SIMPLE_HEADER)
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == _SCAN:
            return size if size and data[at + 4] == channels else None
        if marker in _SEQUENTIAL and size is None:
            precision, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            if precision != 8 or channels not in (1, 3) or height == 0 or width == 0:
                return None
            size = height, width
        elif marker not in _SEGMENTS:
            return None
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None


def frame_of(data: bytes) -> Frame | None:
    """The frame header of a JPEG; None where there is none before the first scan."""
    kind = precision = channels = 0
    at_once = False
    for marker, at in _segments(data):
        if marker in _FRAMES:
            kind, precision, channels = marker, data[at + 4], data[at + 9]
        at_once = marker == _SCAN and data[at + 4] == channels
    if not kind:
        return None
    return Frame(precision, precision == 8 and kind in _COMMON, kind in _PROGRESSIVE or not at_once)


def jpeg_header_fault(data: bytes) -> str:
    """Why a JPEG is not given to Pillow, which takes each segment in Python and joins those of EXIF; "" for others."""
    exif: list[bytes] = []
    for number, (marker, at) in enumerate(_segments(data)):
        if number >= _MOST_SEGMENTS or len(exif) > _MOST_EXIF_SEGMENTS:
            return TOO_MANY_PARTS
        if marker == _APP1 and data[at + 4 : at + 10] == b"Exif\0\0":
            exif.append(data[at + 10 : at + 2 + (data[at + 2] << 8 | data[at + 3])])
    return TOO_MANY_TAGS if claims_too_much(b"".join(exif)) else ""


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Markers of a JPEG's header with their places, the first scan the last of them; fill bytes count as such, too."""
    at, end = 2, len(data) - 10
    while data[:2] == b"\xff\xd8" and at < end and data[at] == 0xFF:
        marker = data[at + 1]
        yield marker, at
        if marker in (_SCAN, _END):
            return
        if marker == 0xFF:
            at += 1
        elif marker in _WITHOUT_LENGTH:
            at += 2
        else:
            at += 2 + (data[at + 2] << 8 | data[at + 3])


def has_more_scans(data: bytes, limit: int) -> bool:
    """Whether the picture of a JPEG comes in more scans than `limit`; those of thumbnails do not count."""
    if data.count(b"\xff\xda") <= limit:  # 10 us in a file of 100 kB; most files end here
        return False
    found, scans = _MARKER.search(data, 2), 0
    while found and (marker := data[found.start() + 1]) != _END and found.end() + 2 <= len(data):
        scans += marker == _SCAN
        length = data[found.end()] << 8 | data[found.end() + 1]
        found = _MARKER.search(data, found.end() + length)  # over the coded data behind a scan, too
    return scans > limit


# ---- decoders: a function from a file's bytes to its pixels, not turned by EXIF ----


def _simplejpeg() -> JpegDecoder:
    import simplejpeg

    return simplejpeg.decode_jpeg


def _torchcodec() -> JpegDecoder:
    from torchcodec.decoders import decode_jpeg

    def run(data: bytes) -> Pixels:
        return cast("Tensor", decode_jpeg(data)).permute(1, 2, 0).numpy()

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
    return lambda data: to_rgb(open_picture(data))


_DECODERS: dict[str, Callable[[], JpegDecoder]] = {
    # By speed, as benchmarks/input_bench.py times them. The third, as fast as the second, is on its way out of
    # torchvision.
    "simplejpeg": _simplejpeg,
    "torchcodec": _torchcodec,
    "torchvision": _torchvision,
    "pillow": _pillow,
}
_TURNS_BY_ITSELF = ("torchcodec",)


def decode_jpeg(data: bytes, shrink: int = 1, place: Pixels | None = None) -> tuple[Pixels, str]:
    """The pixels of a JPEG that is common (`Frame.is_common`), and the name of the decoder that made them.

    shrink: one of SHRINKS; then the pixels are `[ceil(height / shrink), ceil(width / shrink), 3]`.
    place: where to put the pixels if they fit there.
    Whichever decoder is in use, a file that it refuses is given to Pillow, so what is refused is what Pillow refuses.
    Raises what Pillow raises.
    """
    decoder = jpeg_decoder()
    if decoder != "pillow":
        try:
            if shrink > 1 and decoder == "simplejpeg":
                return _simplejpeg_shrunk(data, shrink), decoder
            if shrink == 1:
                return _into(place, decoder, data), decoder
        except MemoryError:
            raise
        except Exception:  # damaged, or of a kind that this decoder lacks: Pillow says which, or takes it
            pass
    return _pillow_shrunk(data, shrink) if shrink > 1 else _into(place, "pillow", data), "pillow"


def turns_by_itself(decoder: str) -> bool:
    """Whether a decoder applies the orientation in EXIF."""
    return decoder in _TURNS_BY_ITSELF


def _into(place: Pixels | None, decoder: str, data: bytes) -> Pixels:
    """The pixels in the memory of `place`; only one decoder can write there itself, for the others they are copied."""
    if place is not None and decoder == "simplejpeg":
        import simplejpeg

        pixels = simplejpeg.decode_jpeg(data, buffer=place)
        return place if pixels.shape == place.shape else pixels
    pixels = _load(decoder)[0](data)
    if place is None or pixels.shape != place.shape:
        return pixels
    place[...] = pixels
    return place


def _simplejpeg_shrunk(data: bytes, shrink: int) -> Pixels:
    import simplejpeg

    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    return simplejpeg.decode_jpeg(data, min_height=-(-height // shrink), min_width=-(-width // shrink), min_factor=1)


def _pillow_shrunk(data: bytes, shrink: int) -> Pixels:
    picture = open_picture(data)
    picture.draft(None, (max(1, picture.width // shrink), max(1, picture.height // shrink)))
    return to_rgb(picture)


def jpeg_decoder() -> str:
    """Name of the JPEG decoder in use: the first that works, or the one that SCRL_FAST_JPEG names.

    Raises ValueError if that is unknown and RuntimeError with the cause if it cannot run.
    """
    return _first_working(os.environ.get("SCRL_FAST_JPEG", ""))


def decoders(*, try_all: bool = True) -> dict[str, str]:
    """Every JPEG decoder, best first: 'in use', 'works', or why not.

    try_all: False leaves those after the one in use untried, since that takes a second.
    """
    used, said = jpeg_decoder(), dict[str, str]()
    for name in _DECODERS:
        if used in said and not try_all:
            said[name] = f"not tried, {used} comes first"
        else:
            said[name] = "in use" if name == used else _load(name)[1] or "works"
    return said


@functools.cache
def _first_working(forced: str) -> str:
    if forced and forced not in _DECODERS:
        raise UsageError(f"SCRL_FAST_JPEG={forced} is unknown; choose one of {', '.join(_DECODERS)}")
    if forced and (failure := _load(forced)[1]):
        raise RuntimeError(f"SCRL_FAST_JPEG={forced} cannot be used: {failure}")
    return forced or next(name for name in _DECODERS if not _load(name)[1])


@functools.cache
def _load(name: str) -> tuple[JpegDecoder, str]:
    """The decoder and '', or one that must not be called and the reason why not."""
    try:
        decoder = _DECODERS[name]()
        file = io.BytesIO()
        Image.new("RGB", (9, 7), (200, 30, 90)).save(file, "JPEG")
        if decoder(file.getvalue()).shape != (7, 9, 3):
            raise RuntimeError("gives a picture of the wrong shape")
        return decoder, ""
    except Exception as error:  # a broken installation may raise anything; it must not take the others down
        return _pillow(), f"{type(error).__name__}: {error}".splitlines()[0]
