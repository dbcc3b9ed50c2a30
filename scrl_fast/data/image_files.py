"""Image files as bytes: the limits that they must keep, reading them, and naming what is no image.

Files may come from anywhere, so nothing in them is trusted: only regular files are opened, and no more is read of them
than their size and `ImageLimits.max_file_bytes` allow.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

from scrl_fast.config.image_limits import ImageLimitOptions
from scrl_fast.errors import irregular_kind


class BadImage(Exception):
    """An image that cannot be read: carries its name and the cause. The message is printable whatever the name is."""

    def __init__(self, name: str, cause: str) -> None:
        super().__init__(f"{printable(name)}: {printable(cause)}")
        self.name, self.cause = name, printable(cause)

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        return BadImage, (self.name, self.cause)  # from one process to another


@dataclass(frozen=True)
class ImageLimits:
    """What an image file may ask for before it is refused as a `BadImage`; see the options of the same names."""

    max_pixels: int = ImageLimitOptions.max_pixels
    max_file_bytes: int = ImageLimitOptions.max_file_bytes
    max_pixels_per_byte: int = ImageLimitOptions.max_pixels_per_byte
    max_scans: int = ImageLimitOptions.max_scans
    max_decoded_bytes: int = ImageLimitOptions.max_decoded_bytes
    decode_memory: int = ImageLimitOptions.decode_memory

    @classmethod
    def of(cls, options: ImageLimitOptions) -> ImageLimits:
        """The limits that the options of a run set."""
        return cls(**{limit.name: getattr(options, limit.name) for limit in fields(cls)})

    def with_pixels(self, max_pixels: int | None) -> ImageLimits:
        """The same with another `max_pixels`, unless that is None."""
        return self if max_pixels is None else replace(self, max_pixels=max_pixels)


DEFAULT_LIMITS = ImageLimits()
_ALWAYS_FREE = 1 << 25  # bytes: what a photograph of 11 megapixels takes is not counted, so no lock is taken for it


class MemoryBudget:
    """Memory that threads share for decoding large images: a thread waits until its share is free.

    size: bytes. An image that needs more than all of it is decoded alone.
    """

    def __init__(self, size: int) -> None:
        self._size, self._held = size, 0
        self._changed = threading.Condition()

    @contextmanager
    def reserved(self, wanted: int) -> Iterator[Reservation]:
        """Hold so many bytes meanwhile. Not to be used by a thread that holds some already: two could wait forever."""
        held = Reservation(self)
        held.add(wanted)
        try:
            yield held
        finally:
            self.take(0, held.share)

    def take(self, wanted: int, instead: int = 0) -> int:
        """Waits for so many bytes and returns how many of them count; gives back `instead` first."""
        share = min(wanted, self._size) if wanted > _ALWAYS_FREE else 0
        if share or instead:
            with self._changed:
                if instead:
                    self._held -= instead
                    self._changed.notify_all()
                self._changed.wait_for(lambda: self._held + share <= self._size)
                self._held += share
        return share


class Reservation:
    """What one thread holds of a `MemoryBudget`. share: the bytes that count there."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget, self._wanted, self.share = budget, 0, 0

    def add(self, more: int) -> None:
        """Hold so many bytes more, or fewer. Nothing is held while it waits: threads cannot wait for each other."""
        self._wanted += more
        before, self.share = self.share, 0  # an interrupted wait must not give it back twice
        self.share = self._budget.take(self._wanted, before)


@functools.cache
def memory_budget(size: int) -> MemoryBudget:
    """The budget of so many bytes that all threads of the process share."""
    return MemoryBudget(size)


def printable(text: str) -> str:
    """The text with bytes that are no UTF-8 (surrogates) as backslashes, so that it can be written anywhere."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


_OPEN_FLAGS = os.O_RDONLY
for _flag in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"):  # a pipe must not be waited for, not even to open it
    _OPEN_FLAGS |= getattr(os, _flag, 0)


def read_file(
    path: str,
    name: str | None = None,
    *,
    limit: int = ImageLimitOptions.max_file_bytes,
    option: str = "data.max_file_bytes=",
) -> bytes:
    """The bytes of a regular file.

    limit: bytes; a larger file is not read. option: what stands before the limit in the message.
    Raises BadImage(name, cause) when the file cannot be read, is too large, or is a pipe, a device or the like.
    """
    name = name or path
    try:
        handle = os.open(path, _OPEN_FLAGS)
    except OSError as error:
        raise BadImage(name, error.strerror or str(error)) from error
    except ValueError as error:  # a NUL in the path
        raise BadImage(name, str(error)) from error
    try:
        status = os.fstat(handle)
        if kind := irregular_kind(status.st_mode):
            raise BadImage(name, f"is {kind}, not a regular file")
        check_size(status.st_size, limit, name, option)
        return read_at(handle, status.st_size, 0)
    except OSError as error:
        raise BadImage(name, error.strerror or str(error)) from error
    finally:
        os.close(handle)


def check_size(size: int, limit: int, name: str, option: str = "data.max_file_bytes=") -> None:
    """Raises BadImage for a file of more than `limit` bytes."""
    if size > limit:
        raise BadImage(name, f"{size} bytes are more than {option}{limit}")


def read_at(handle: int, size: int, offset: int) -> bytes:
    """`size` bytes from `offset` of an open file, fewer only where the file ends."""
    data = os.pread(handle, size, offset)
    while 0 < len(data) < size:
        more = os.pread(handle, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


# ---- what a file is that is no image of a known format ----

_STARTS = (
    (b"version https://git-lfs.github.com/spec", "a Git LFS pointer in place of the image: run `git lfs pull`"),
    (b"%PDF", "a PDF document"),
    (b"8BPS", "a Photoshop document"),
    (b"II*\0", "a TIFF of bands or a compression that Pillow does not read; convert it to 8-bit RGB"),
    (b"MM\0*", "a TIFF of bands or a compression that Pillow does not read; convert it to 8-bit RGB"),
    (b"II+\0", "a BigTIFF that Pillow does not read; convert it to 8-bit RGB"),
    (b"\x1f\x8b", "a gzip file"),
    (b"PK\x03\x04", "a zip file"),
    (b"\x00\x00\x00\x0cjP  ", "a JPEG 2000 image, which is not read; convert it to JPEG or PNG"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image, which is not read; convert it to JPEG or PNG"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL image, which is not read; convert it to JPEG or PNG"),
    (b"\xff\x0a", "a JPEG XL image, which is not read; convert it to JPEG or PNG"),
)
_MARKUP = (
    (b"<!doctype html", "an HTML page in place of the image, as a failed download leaves it"),
    (b"<html", "an HTML page in place of the image, as a failed download leaves it"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML document in place of the image, as a failed download leaves it"),
    (b"{", "JSON text in place of the image, as a failed download leaves it"),
)
_BRANDS = {  # of the ISO base media file format: bytes 8 to 12
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "a HEIC"),
    **dict.fromkeys((b"avif", b"avis"), "an AVIF"),
}


def name_of_content(data: bytes) -> str:
    """What a file is that no decoder knows, as far as its first bytes tell."""
    if data[4:8] == b"ftyp":
        kind = _BRANDS.get(data[8:12])
        return f"is {kind} image, which is not read; convert it to JPEG or PNG" if kind else "is a video (MP4)"
    for start, what in _STARTS:
        if data.startswith(start):
            return f"is {what}"
    text = data[:256].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for start, what in _MARKUP:
        if text.startswith(start):
            return f"is {what}"
    if not data.strip(b"\0"):
        return "holds nothing but zeros, as an interrupted copy leaves it"
    return "not an image of a known format"
