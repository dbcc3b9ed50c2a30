"""The entries of a zip archive as torch writes them: stored, apart from each other, and nowhere outside the file.

Zip readers disagree about unusual archives, so those are refused: the entries checked here are the entries read.
Without compression an archive cannot hold more than its size.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

MAX_ENTRIES = 200_000
_END, _END64, _LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_ENTRY, _LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
_ENCRYPTED = 1
_BLOCK = 1 << 20
_SEARCHED = 1 << 20  # bytes at the end of a file that does not end as an archive does


class ArchiveError(ValueError):
    """An archive that is damaged, or not as torch writes it."""


@dataclass(frozen=True)
class Entry:
    """One file of the archive: its name, the offset of its bytes, their number and their CRC-32."""

    name: str
    offset: int
    size: int
    crc: int


class ZipArchive:
    """A stored zip archive, open for reading; use it as a context manager.

    Raises ArchiveError, when it is opened, for one that is damaged, compressed or overlapping.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.file: IO[bytes] = open(path, "rb")  # noqa: SIM115  closed by __exit__
        try:
            self.size = os.fstat(self.file.fileno()).st_size
            self.entries = self._directory()
        except struct.error as error:
            self.file.close()
            raise ArchiveError("its central directory is damaged") from error
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> ZipArchive:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def _at(self, offset: int, count: int) -> bytes:
        if not 0 <= offset <= self.size - count:
            raise ArchiveError("it is cut off, or its directory points outside it")
        self.file.seek(offset)
        data = self.file.read(count)
        if len(data) != count:
            raise ArchiveError("it became shorter while it was read")
        return data

    def _bounds(self) -> tuple[int, int, int]:
        """(offset and length of the central directory, number of entries)."""
        end = self.size - _END.size
        magic, disk, start_disk, here, count, length, offset, comment = _END.unpack(self._at(max(end, 0), _END.size))
        if magic != b"PK\5\6" or comment:
            raise ArchiveError(self._why_no_end())
        if end >= _LOCATOR.size and self._at(end - _LOCATOR.size, 4) == b"PK\6\7":
            _, _, end64, _ = _LOCATOR.unpack(self._at(end - _LOCATOR.size, _LOCATOR.size))
            record = _END64.unpack(self._at(end64, _END64.size))
            magic, extent, _, _, disk, start_disk, here, count, length, offset = record
            if magic != b"PK\6\6" or end64 + extent + 12 != end - _LOCATOR.size:
                raise ArchiveError("its zip64 record is damaged")
            end = end64
        if disk or start_disk or here != count or offset + length != end:
            raise ArchiveError("its central directory is damaged, or bytes were put in front of it or behind")
        if count > MAX_ENTRIES:
            raise ArchiveError(f"it has {count} entries, more than {MAX_ENTRIES}")
        return offset, length, count

    def _why_no_end(self) -> str:
        """Why the file does not end as an archive does: cut off, lengthened, or not written to its end."""
        searched = min(_SEARCHED, self.size)
        tail = self._at(self.size - searched, searched)
        place = tail.rfind(b"PK\5\6")
        behind = searched - place - _END.size
        if place >= 0 and behind >= 0:
            return f"{behind} bytes stand behind the end of its archive" if behind else "its end has a comment"
        zeros = searched - len(tail.rstrip(b"\0"))
        if zeros >= _END.size:
            more = " or more" if zeros == searched else ""
            return f"its last {zeros}{more} bytes are zeros: it was lengthened, or not written to its end"
        return "it is cut off: the end of the zip archive is missing"

    def _directory(self) -> dict[str, Entry]:
        start, length, count = self._bounds()
        if length > self.size or count * _ENTRY.size > length:
            raise ArchiveError("its central directory is damaged")
        directory, position = self._at(start, length), 0
        entries: dict[str, Entry] = {}
        packed = ""
        for _ in range(count):
            entry, position, kind = self._entry(directory, position)
            if entry.name in entries:
                raise ArchiveError(f"it has two entries {entry.name!r}")
            entries[entry.name] = entry
            packed = packed or (kind and f"its entry {entry.name!r} is {kind}, and torch stores entries as they are")
        if position != length:
            raise ArchiveError("its central directory is damaged")
        if packed:
            raise ArchiveError(other_archive(entries) or packed)
        self._check_apart(entries, start)
        return entries

    def _entry(self, directory: bytes, position: int) -> tuple[Entry, int, str]:
        """The entry at ``position`` of the central directory, the position of the next one, how it is packed or ""."""
        magic, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length, comment, *rest = (
            _ENTRY.unpack_from(directory, position)
        )
        _, _, _, offset = rest
        position += _ENTRY.size
        name_bytes = directory[position : position + name_length]
        extra = directory[position + name_length : position + name_length + extra_length]
        name = name_bytes.decode("utf-8", "replace")
        if magic != b"PK\1\2" or len(name_bytes) != name_length:
            raise ArchiveError("its central directory is damaged")
        size, packed, offset = _zip64_sizes(extra, size, packed, offset)
        position += name_length + extra_length + comment
        if method != 0 or size != packed or flags & _ENCRYPTED:  # never read: only its name says what the archive is
            return Entry(name, offset, 0, crc), position, "encrypted" if flags & _ENCRYPTED else "compressed"
        local = _LOCAL.unpack(self._at(offset, _LOCAL.size))
        start = offset + _LOCAL.size + local[9] + local[10]
        if local[0] != b"PK\3\4" or self._at(offset + _LOCAL.size, local[9]) != name_bytes:
            raise ArchiveError(f"its entry {name!r} has a damaged header")
        return Entry(name, start, size, crc), position, ""

    def _check_apart(self, entries: dict[str, Entry], end: int) -> None:
        free = 0
        for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.size)):
            if entry.offset < free or entry.offset + entry.size > end:
                raise ArchiveError(f"its entry {entry.name!r} overlaps another one or leaves the file")
            free = entry.offset + entry.size

    @property
    def has_checksums(self) -> bool:
        """False where every checksum is 0, as ``torch.serialization.set_crc32_options(False)`` leaves them."""
        return not self.entries or any(entry.crc for entry in self.entries.values())

    def read(self, name: str) -> Tensor:
        """The bytes of an entry, ``uint8 [size]``.

        Raises ArchiveError where they do not match their checksum, if the archive has checksums.
        """
        entry = self.entries[name]
        data = torch.empty(entry.size, dtype=torch.uint8)
        view, crc = data.numpy().data, 0
        self.file.seek(entry.offset)
        for start in range(0, entry.size, _BLOCK):
            block = view[start : start + _BLOCK]
            if self.file.readinto(block) != len(block):  # type: ignore[attr-defined]
                raise ArchiveError("it became shorter while it was read")
            crc = zlib.crc32(block, crc)
        if crc != entry.crc and self.has_checksums:
            raise ArchiveError(f"checksum of {name}")
        return data

    def check(self) -> None:
        """Read every entry. Raises ArchiveError for one that does not match its checksum, or has none."""
        if not self.has_checksums:
            raise ArchiveError(
                "it has no checksums, as torch.serialization.set_crc32_options(False) leaves a file, so whether it is "
                f"whole is not known; if it is, 'sha256sum {self.path.name} > {self.path.name}.sha256' says so"
            )
        for name in self.entries:
            self.read(name)


def _zip64_sizes(extra: bytes, size: int, packed: int, offset: int) -> tuple[int, int, int]:
    """Sizes and offset, those that need 64 bits taken from the extra field."""
    if not {size, packed, offset} & {0xFFFFFFFF}:
        return size, packed, offset
    while len(extra) >= 4:
        tag, length = struct.unpack_from("<2H", extra)
        if tag == 1:
            words = list(struct.unpack_from(f"<{min(length, len(extra) - 4) // 8}Q", extra, 4))
            found = [words.pop(0) if value == 0xFFFFFFFF and words else value for value in (size, packed, offset)]
            return found[0], found[1], found[2]
        extra = extra[4 + length :]
    return size, packed, offset


def is_zip(start: bytes) -> bool:
    """Whether a file that starts so is a zip archive."""
    return start[:4] in (b"PK\3\4", b"PK\5\6")


def other_archive(names: Iterable[str]) -> str:
    """What a known archive of another kind is, by the names of its entries, and the way round; "" for any other."""
    names = list(names)
    leaves = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in leaves:
        return (
            "it is a TorchScript archive, which holds code: torch.save(torch.jit.load(FILE, map_location='cpu')"
            ".state_dict(), 'weights.pth') keeps its weights"
        )
    if leaves & {"archive_format", "serialized_exported_program.json"}:
        return (
            "it is a program of torch.export, which holds code: torch.save(torch.export.load(FILE).state_dict, "
            "'weights.pth') keeps its weights"
        )
    if names and all(name.endswith(".npy") for name in names):
        return "it is a NumPy archive (.npz): save its arrays with torch.save or safetensors"
    if "model.weights.h5" in leaves:
        return "it is a Keras archive: load it there and save its arrays with safetensors"
    return ""
