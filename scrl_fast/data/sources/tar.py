"""Members of tar archives by place: names, offsets and sizes from the headers, so that nothing is ever extracted.

Python's own tarfile is not used for reading: it reads long-name headers of any claimed length into memory and stops
without a word at a damaged header.
Format: POSIX.1-2001 (ustar and pax), GNU long names.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

from scrl_fast.data.image_files import read_at

BLOCK = 512
_LONGEST_NAME = 1 << 16
_LARGEST_PAX, _PAX_PART = 1 << 24, 1 << 18  # bytes: of the records before a member, and of what is read at a time
_PADDING = 40 * BLOCK  # archives are filled up with zeros to a multiple of 20 blocks
_REGULAR = (b"0", b"\0", b"7")
_SPARSE = b"S"
_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK = b"x", b"g", b"L", b"K"
_KINDS = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"5": "folder", b"6": "pipe"}


ReadAt = Callable[[int, int], bytes]  # (size, offset): so many bytes from there, fewer only where the archive ends


class Member(NamedTuple):
    """One member. kind: empty for a regular file, else what it is. offset, size: of its content, in bytes."""

    name: str
    kind: str
    offset: int
    size: int


class Damaged(Exception):
    """An archive that cannot be read on from here."""


def members(read: ReadAt, length: int) -> Iterator[Member]:
    """The members of an archive of `length` bytes, as far as they are there whole. read: bytes of it, (size, offset).

    Raises Damaged where the archive is cut or damaged, after the members before that place.
    """
    place = 0
    extra: dict = {}
    while True:
        header = read(BLOCK, place)
        if len(header) < BLOCK:
            what = "ends without the end mark; members may be missing" if not header else "is cut in a header"
            raise Damaged(f"{what} (at byte {place})")
        if not header.strip(b"\0"):
            if read(_PADDING, place).strip(b"\0"):
                raise Damaged(f"goes on after its end mark at byte {place}; joined archives are read up to there")
            return
        kind, size = header[156:157], _checked(header, place)
        content, place = place + BLOCK, place + BLOCK + -(-size // BLOCK) * BLOCK
        if kind in (_PAX, _LONG_NAME, _PAX_GLOBAL, _LONG_LINK):
            extra |= _extension(kind, read, content, size, length)
            continue
        if kind in _REGULAR and "size" in extra:  # 8 GB and more
            size = extra["size"]
            place = content + -(-size // BLOCK) * BLOCK
        if kind == _SPARSE:  # its map may go on in blocks of its own before the content
            content = _end_of_sparse_map(read, header, content)
            place = content + -(-size // BLOCK) * BLOCK
        if kind in _KINDS:  # no content follows, whatever size they claim
            place, size = content, 0
        name = extra.get("name") or _name(header)
        kind = _SPARSE if "sparse" in extra else kind
        if content + size > length:
            raise Damaged(f"is cut inside {name!r} (at byte {length} of {content + size})")
        if kind in _REGULAR and name.endswith("/"):  # how the oldest archives wrote folders
            kind = b"5"
        what = "sparse file" if kind == _SPARSE else _KINDS.get(kind, "special member")
        yield Member(name, "" if kind in _REGULAR else what, content, size)
        extra = {}


def _checked(header: bytes, place: int) -> int:
    """The size in a header whose checksum is right."""
    fields = header[:148] + b" " * 8 + header[156:]
    total = sum(fields)
    if _number(header[148:156]) not in (total, total - 256 * sum(byte > 127 for byte in fields)):  # signed: old writers
        what = "is no tar archive" if place == 0 else f"has a damaged header at byte {place}"
        raise Damaged(f"{what} (gzip'ed: unpack it with gunzip)" if header[:2] == b"\x1f\x8b" else what)
    size = _number(header[124:136])
    if size < 0:
        raise Damaged(f"has a damaged header at byte {place}")
    return size


def _number(field: bytes) -> int:
    """Octal text, or GNU's big-endian binary; -1 where it is neither, or negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0")[0].strip()
    return int(text, 8) if text.isdigit() and not set(text) & set(b"89") else 0 if not text else -1


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "surrogateescape")


def _end_of_sparse_map(read: ReadAt, header: bytes, content: int) -> int:
    more = header[482]
    while more:
        block = read(BLOCK, content)
        if len(block) < BLOCK:
            raise Damaged(f"is cut in a header (at byte {content})")
        content, more = content + BLOCK, block[504]
    return content


def _extension(kind: bytes, read: ReadAt, content: int, size: int, length: int) -> dict:
    """What a header before a member says of it: a long name, or pax records (path and size; the rest is unused)."""
    if content + size > length:
        raise Damaged(f"is cut in a header (at byte {length})")
    if kind == _LONG_NAME:
        _check_name(size, content)
        return {"name": _text(read(size, content))}
    if kind == _PAX and size > _LARGEST_PAX:
        raise Damaged(f"has a damaged header at byte {content - BLOCK}: pax records of {size} bytes")
    found: dict = {}
    for key, value, length in _pax_records(read, content, size) if kind == _PAX else ():
        if key == b"path":
            _check_name(length, content)
            found["name"] = value.decode("utf-8", "surrogateescape")
        elif key.startswith(b"GNU.sparse."):
            found["sparse"] = True
        elif key == b"size" and value.isdigit() and len(value) < 20:
            found["size"] = int(value)
    return found


def _check_name(size: int, content: int) -> None:
    if size > _LONGEST_NAME:
        raise Damaged(f"has a damaged header at byte {content - BLOCK}: a name of {size} bytes")


def _pax_records(read: ReadAt, content: int, size: int) -> Iterator[tuple[bytes, bytes, int]]:
    """Key, value and length of the value of each record; of a value longer than any name perhaps the beginning only.

    Extended attributes and comments may take megabytes, so the records are read in parts.
    """
    place, stop = content, content + size
    data, low = b"", content  # the bytes from `low` on
    while place < stop:
        if low + len(data) < min(place + _PAX_PART // 2, stop):
            data, low = read(min(_PAX_PART, stop - place), place), place
        at = place - low
        digits, _, _ = data[at : at + 10].partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 10 else 0
        key, equals, value = data[at + len(digits) + 1 : at + max(length - 1, 0)].partition(b"=")
        end = place + length
        if not equals or end > stop or (data[at + length - 1 : at + length] or read(1, end - 1)) != b"\n":
            raise Damaged(f"has a damaged header at byte {content - BLOCK}")
        yield key, value, length - len(digits) - len(key) - 3
        place = end


class Handles:
    """Files open for reading by place from many threads; of very many files only the first ones stay open."""

    def __init__(self, paths: list[str]) -> None:
        self._paths, self._most = paths, _files_to_keep_open()
        self._open: dict[int, int] = {}
        self._lock = threading.Lock()
        self._close = weakref.finalize(self, _close_all, self._open)

    def read(self, file: int, size: int, offset: int) -> bytes:
        """`size` bytes of file number `file`, fewer where it ends. Raises OSError."""
        handle = self._open.get(file)
        if handle is None:
            with self._lock:
                handle = self._open.get(file)
                if handle is None and len(self._open) < self._most:
                    handle = self._open[file] = os.open(self._paths[file], os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        if handle is not None:
            return read_at(handle, size, offset)
        handle = os.open(self._paths[file], os.O_RDONLY)
        try:
            return read_at(handle, size, offset)
        finally:
            os.close(handle)


def _files_to_keep_open() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 128
    return max(16, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, 4096))


def _close_all(handles: dict[int, int]) -> None:
    for handle in handles.values():
        os.close(handle)
    handles.clear()
