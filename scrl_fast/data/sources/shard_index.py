"""The index of a tar shard: where its images lie and what class they have, kept beside it where that is possible.

Of a shard in a store it is kept in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import zipfile
from array import array
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scrl_fast.atomic_files import cache_folder, temporary_name
from scrl_fast.data.decode import EXTENSIONS
from scrl_fast.data.image_files import BadImage, printable, read_at, read_file
from scrl_fast.data.sources.base import UNLABELLED
from scrl_fast.data.sources.remote import BlockReader, RemoteFile, is_url
from scrl_fast.data.sources.tar import BLOCK, Damaged, Member, ReadAt, members
from scrl_fast.errors import UsageError

INDEX_SUFFIX = ".index.npz"
_VERSION = 3
_SMALL_INDEX = 1 << 20
_DTYPES: dict[str, Any] = {
    "stamp": np.dtype(np.int64),
    "offsets": np.dtype(np.int64),
    "sizes": np.dtype(np.int64),
    "labels": np.dtype(np.int32),
    "names": np.dtype(np.uint8),
    "name_ends": np.dtype(np.int64),
    "problems": np.dtype(np.uint8),
}
_MOST_CLASSES = 1_000_000
_LONGEST_LABEL = 32
_log = logging.getLogger("scrl_fast")


class ShardIndex(NamedTuple):
    """The images of one shard, in the order of its members.

    offsets, sizes: int64 `[N]`, bytes of the image files. labels: int32 `[N]`, -1 where there is none.
    names: the members' names as UTF-8, one behind the other; name_ends: int64 `[N]`. problems: what is wrong with it.
    """

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int32]
    names: bytes
    name_ends: NDArray[np.int64]
    problems: list[str]

    def name(self, row: int) -> str:
        start = int(self.name_ends[row - 1]) if row else 0
        return self.names[start : int(self.name_ends[row])].decode("utf-8", "surrogateescape")


def shard_index(path: str) -> ShardIndex:
    """The index beside the shard if it fits the shard, else a new one, written there when possible.

    path: of the shard, or its URL; the index of a shard in a store is kept in the user's cache folder.
    Raises UsageError if the shard cannot be opened.
    """
    try:
        return _index_of_url(path) if is_url(path) else _index_of_file(path)
    except OSError as error:
        raise UsageError(f"the shard {path!r} cannot be read: {printable(error.strerror or str(error))}") from None


def _index_of_file(path: str) -> ShardIndex:
    handle = os.open(path, os.O_RDONLY)
    try:
        status = os.fstat(handle)
        stamp = np.array([_VERSION, status.st_size, status.st_mtime_ns], np.int64)
        return _kept_or_scanned(path + INDEX_SUFFIX, stamp, partial(read_at, handle))
    finally:
        os.close(handle)


def _index_of_url(url: str) -> ShardIndex:
    file = RemoteFile(url)
    if file.version is None:  # an index that is kept would outlive its shard
        return _scan(BlockReader(file).read, file.size)
    stamp = np.array([_VERSION, file.size, file.version], np.int64)
    name = hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()[:32] + INDEX_SUFFIX
    return _kept_or_scanned(str(cache_folder() / "shards" / name), stamp, BlockReader(file).read)


def _kept_or_scanned(path: str, stamp: NDArray[np.int64], read: ReadAt) -> ShardIndex:
    index = _load(path, stamp)
    if index is None:
        index = _scan(read, int(stamp[1]))
        _store(path, index, stamp)
    return index


def _scan(read: ReadAt, length: int) -> ShardIndex:
    scan = _Scan(read)
    try:
        for member in members(read, length):
            scan.add(member)
    except Damaged as error:
        scan.problems.append(str(error))
    return scan.index()


class _Scan:
    """What has been found in a shard so far. A name and two numbers are held for each image: there may be millions."""

    def __init__(self, read: ReadAt) -> None:
        self.problems: list[str] = []
        self._read = read
        self._names: list[str] = []
        self._offsets, self._sizes = array("q"), array("q")
        self._labels: dict[str, int] = {}
        self._left_out: dict[str, list[str]] = {}

    def add(self, member: Member) -> None:
        if member.kind:
            if member.kind != "folder":
                self._leave_out(f"{member.kind}, left out", member.name)
            return
        key, extension = _split(member.name)
        if extension.endswith(EXTENSIONS) and not os.path.basename(member.name).startswith("."):
            self._names.append(member.name)
            self._offsets.append(member.offset)
            self._sizes.append(member.size)
            if member.name.startswith("/") or ".." in member.name.split("/"):
                self._leave_out("name outside the archive, read all the same", member.name)
        elif extension == ".cls":
            label = _label(self._read(min(member.size, _LONGEST_LABEL + 1), member.offset))
            if label is None:
                self._leave_out("label that is no class number, left out", member.name)
            else:
                self._labels[key] = label

    def index(self) -> ShardIndex:
        parts = list(map(_split, self._names))
        plain = {key for key, extension in parts if extension in EXTENSIONS}
        # a.seg.png belongs to a.jpg and is no picture of its own; holiday.1.jpg, with no holiday.jpg beside it, is one
        chosen = [row for row, (key, extension) in enumerate(parts) if extension in EXTENSIONS or key not in plain]
        lost = set(self._labels) - {parts[row][0] for row in chosen}
        if lost:
            what = "label without an image of its name in the shard, left out"
            self._left_out[what] = [f"{key.removeprefix('/')}.cls" for key in sorted(lost)]
        for what, names in self._left_out.items():
            self.problems.append(f"has {len(names)} x {what}: {names[0]!r}{', ...' if len(names) > 1 else ''}")
        encoded = [self._names[row].encode("utf-8", "surrogateescape") for row in chosen]
        return ShardIndex(
            np.array(self._offsets, np.int64)[chosen],
            np.array(self._sizes, np.int64)[chosen],
            np.array([self._labels.get(parts[row][0], UNLABELLED) for row in chosen], np.int32),
            b"".join(encoded),
            np.cumsum([len(name) for name in encoded], dtype=np.int64),
            self.problems,
        )

    def _leave_out(self, why: str, name: str) -> None:
        self._left_out.setdefault(why, []).append(name)


def _split(name: str) -> tuple[str, str]:
    """WebDataset's key and extension: the path up to the first dot of its last part, and the rest in lower case."""
    folder, _, last = name.rpartition("/")
    stem, dot, extension = last.partition(".")
    return f"{folder}/{stem}", (dot + extension).lower()


def _label(text: bytes) -> int | None:
    digits = text.strip()
    if len(text) > _LONGEST_LABEL or not re.fullmatch(rb"-1|[0-9]+", digits) or int(digits) >= _MOST_CLASSES:
        return None
    return int(digits)


def _store(path: str, index: ShardIndex, stamp: NDArray[np.int64]) -> None:
    problems = json.dumps(index.problems).encode()
    file = io.BytesIO()
    np.savez(
        file,
        stamp=stamp,
        offsets=index.offsets,
        sizes=index.sizes,
        labels=index.labels,
        names=np.frombuffer(index.names, np.uint8),
        name_ends=index.name_ends,
        problems=np.frombuffer(problems, np.uint8),
    )
    temporary = temporary_name(Path(path))
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(file.getvalue())
        os.replace(temporary, path)
    except OSError as error:  # a folder for reading only, or a full disk: the index stays in memory
        _log.debug("the index %s cannot be kept: %s", path, error)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _load(path: str, stamp: NDArray[np.int64]) -> ShardIndex | None:
    """The index at path; None if it is missing, damaged, of another shard, or reaches outside this one.

    It is data like the shard: nothing of it is unpacked, and no array is larger than its bytes.
    """
    try:
        data = read_file(path, limit=2 * int(stamp[1]) + _SMALL_INDEX)
        arrays = _arrays(data)
        if not np.array_equal(arrays.pop("stamp"), stamp):
            return None
        names, problems = (arrays.pop(name).tobytes() for name in ("names", "problems"))
        index = ShardIndex(**arrays, names=names, problems=json.loads(problems))
    except (BadImage, OSError, ValueError, KeyError, TypeError, EOFError, RecursionError, MemoryError):
        return None
    except zipfile.BadZipFile:
        return None
    return index if _is_whole(index, int(stamp[1])) else None


def _arrays(data: bytes) -> dict[str, NDArray[Any]]:
    """The arrays in a file of `numpy.savez`, as long as they are those of an index and are stored as they are."""
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        if sorted(entry.filename for entry in entries) != sorted(f"{name}.npy" for name in _DTYPES):
            raise ValueError("other arrays than an index has")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > len(data):
                raise ValueError("a compressed array")
            content = archive.read(entry)
            file, name = io.BytesIO(content), entry.filename.removesuffix(".npy")
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("an array of another version")
            # stubs of NumPy before 2.3 lack the limit
            shape, _, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=1000)  # type: ignore[call-arg]
            if dtype != _DTYPES[name] or len(shape) != 1 or shape[0] * dtype.itemsize != len(content) - file.tell():
                raise ValueError("an array of another shape")
            arrays[name] = np.frombuffer(content, dtype, offset=file.tell())
    return arrays


def _is_whole(index: ShardIndex, length: int) -> bool:
    """Whether an index may be one of a shard of so many bytes."""
    ends = index.name_ends
    return bool(
        index.offsets.shape == index.sizes.shape == index.labels.shape == ends.shape
        and len(ends) <= length // BLOCK
        and (index.offsets >= 0).all()
        and (index.sizes >= 0).all()
        and (index.sizes <= length - index.offsets).all()
        and (np.diff(ends, prepend=0) >= 0).all()
        and int(ends[-1] if len(ends) else 0) == len(index.names)
        and (index.labels >= UNLABELLED).all()
        and (index.labels < _MOST_CLASSES).all()
        and isinstance(index.problems, list)
        and all(isinstance(problem, str) for problem in index.problems)
    )
