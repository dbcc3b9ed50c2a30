"""The index of a tar shard: where its images lie and what class they have, kept beside it where that is possible."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scrl_fast.atomic_files import temporary_name
from scrl_fast.data.decode import EXTENSIONS
from scrl_fast.data.sources.base import UNLABELLED
from scrl_fast.data.sources.tar import Damaged, members, read_at
from scrl_fast.errors import UsageError

INDEX_SUFFIX = ".index.npz"
_VERSION = 1
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
        return self.names[start : int(self.name_ends[row])].decode("utf-8", "replace")


def shard_index(path: str) -> ShardIndex:
    """The index beside the shard if it fits the shard, else a new one, written there when possible.

    Raises UsageError if the shard cannot be opened.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"the shard {path!r} cannot be read: {error.strerror}") from None
    try:
        status = os.fstat(handle)
        stamp = np.array([_VERSION, status.st_size, status.st_mtime_ns], np.int64)
        index = _load(path + INDEX_SUFFIX, stamp)
        if index is None:
            index = _scan(handle, status.st_size)
            _store(path + INDEX_SUFFIX, index, stamp)
        return index
    finally:
        os.close(handle)


def _scan(handle: int, length: int) -> ShardIndex:
    images, labels, problems = [], {}, []
    left_out: dict[str, list[str]] = {}
    try:
        for member in members(handle, length):
            if member.kind:
                if member.kind != "folder":
                    left_out.setdefault(f"{member.kind}, left out", []).append(member.name)
                continue
            key, extension = _split(member.name)
            if extension.endswith(EXTENSIONS) and not os.path.basename(member.name).startswith("."):
                images.append((key, extension, member))
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    left_out.setdefault("name outside the archive, read all the same", []).append(member.name)
            elif extension == ".cls":
                label = _label(read_at(handle, min(member.size, _LONGEST_LABEL + 1), member.offset))
                if label is None:
                    left_out.setdefault("label that is no class number, left out", []).append(member.name)
                else:
                    labels[key] = label
    except Damaged as error:
        problems.append(str(error))
    for what, names in left_out.items():
        problems.append(f"has {len(names)} x {what}: {names[0]!r}{', ...' if len(names) > 1 else ''}")
    plain = {key for key, extension, _ in images if extension in EXTENSIONS}
    # a.seg.png belongs to a.jpg and is no picture of its own; holiday.1.jpg, with no holiday.jpg beside it, is one
    images = [entry for entry in images if entry[1] in EXTENSIONS or entry[0] not in plain]
    encoded = [member.name.encode("utf-8", "replace") for _, _, member in images]
    return ShardIndex(
        np.array([member.offset for _, _, member in images], np.int64),
        np.array([member.size for _, _, member in images], np.int64),
        np.array([labels.get(key, UNLABELLED) for key, _, _ in images], np.int32),
        b"".join(encoded),
        np.cumsum([len(name) for name in encoded], dtype=np.int64),
        problems,
    )


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
        temporary.write_bytes(file.getvalue())
        os.replace(temporary, path)
    except OSError as error:  # a folder for reading only, or a full disk: the index stays in memory
        _log.debug("the index %s cannot be kept: %s", path, error)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _load(path: str, stamp: NDArray[np.int64]) -> ShardIndex | None:
    """The index at path; None if it is missing, damaged, of another shard, or reaches outside this one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if not np.array_equal(arrays.pop("stamp"), stamp):
            return None
        names, problems = (arrays.pop(name).tobytes() for name in ("names", "problems"))
        index = ShardIndex(**arrays, names=names, problems=json.loads(problems))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    ends = index.name_ends
    whole = (
        index.offsets.shape == index.sizes.shape == index.labels.shape == ends.shape
        and (index.offsets >= 0).all()
        and (index.sizes >= 0).all()
        and (index.sizes <= stamp[1] - index.offsets).all()
        and (np.diff(ends, prepend=0) >= 0).all()
        and int(ends[-1] if len(ends) else 0) == len(index.names)
        and (index.labels >= UNLABELLED).all()
        and (index.labels < _MOST_CLASSES).all()
    )
    return index if whole else None
