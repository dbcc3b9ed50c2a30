"""Image files as bytes: the limits that they must keep, reading them, and naming what is no image.

Files may come from anywhere, so nothing in them is trusted: only regular files are opened, and no more is read of them
than their size and `ImageLimits.max_file_bytes` allow.
"""

from __future__ import annotations

import functools
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from scrl_fast.config.schema import DataConfig


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

    max_pixels: int = DataConfig.max_pixels
    max_file_bytes: int = DataConfig.max_file_bytes
    max_pixels_per_byte: int = DataConfig.max_pixels_per_byte
    max_scans: int = DataConfig.max_scans
    max_decoded_bytes: int = DataConfig.max_decoded_bytes
    decode_memory: int = DataConfig.decode_memory

    @classmethod
    def of(cls, data: DataConfig) -> ImageLimits:
        """The limits that the options of a run set."""
        return cls(**{limit.name: getattr(data, limit.name) for limit in fields(cls)})


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
    def reserved(self, wanted: int) -> Iterator[None]:
        """Hold so many bytes meanwhile. Not to be used by a thread that holds some already: two could wait forever."""
        if wanted <= _ALWAYS_FREE:
            yield
            return
        share = min(wanted, self._size)
        with self._changed:
            self._changed.wait_for(lambda: self._held + share <= self._size)
            self._held += share
        try:
            yield
        finally:
            with self._changed:
                self._held -= share
                self._changed.notify_all()


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
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def read_file(path: str, name: str | None = None, *, limit: int = DataConfig.max_file_bytes) -> bytes:
    """The bytes of a regular file.

    limit: bytes; a larger file is not read.
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
        if not stat.S_ISREG(status.st_mode):
            kind = next((kind for is_kind, kind in _KINDS if is_kind(status.st_mode)), "something else")
            raise BadImage(name, f"is {kind}, not a regular file")
        check_size(status.st_size, limit, name)
        return read_at(handle, status.st_size, 0)
    except OSError as error:
        raise BadImage(name, error.strerror or str(error)) from error
    finally:
        os.close(handle)


def check_size(size: int, limit: int, name: str) -> None:
    """Raises BadImage for a file of more than `limit` bytes."""
    if size > limit:
        raise BadImage(name, f"{size} bytes are more than data.max_file_bytes={limit}")


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
