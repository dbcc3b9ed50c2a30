"""Images that are trained on and measured on, by their place on disk and, where it is cheap, by their content."""

from __future__ import annotations

import filecmp
import hashlib
import os
import stat
from collections.abc import Sequence
from typing import Any

from scrl_fast.data.image_files import printable

MOST_READ = 20_000
"""Files that are read to compare their content, of both parts together."""
NOT_COMPARED = f"more than {MOST_READ:,} files agree in size: images were compared by path and link, not by content"
SAMPLE = 4096
"""Bytes from the middle of a file that tell most pictures of one size apart before they are compared whole."""


def shared_images(train: Any, val: Any, *, content: bool, trained: str = "the detector") -> list[str]:
    """A note where images to measure on are trained on, too.

    content: also files that are equal byte by byte, and links; every file is asked for its size, those of one size
        are read in part, and those that agree there in whole.
    trained: what the result is about, in words.
    """
    if train is None or not (hasattr(train, "name_of") and hasattr(val, "name_of")):
        return []
    shared, compared = shared_files(train, val, content=content)
    unread = [] if compared or not content else [NOT_COMPARED]
    if not shared:
        return unread
    total = len(val)
    what = f"all {total} images" if len(shared) == total else f"{len(shared)} of {total} images"
    said = f": the result does not tell how {trained} does on other images" if len(shared) == total else ""
    return [f"{what} to measure on are trained on, too, such as {printable(min(shared))}{said}", *unread]


def shared_files(train: Any, val: Any, *, content: bool) -> tuple[set[str], bool]:
    """Names of the images of ``val`` that are images of ``train``, and whether contents were compared, too.

    train, val: have ``name_of``. content: as above; more than MOST_READ files of equal sizes are not read.
    """
    compared = False
    names = [[source.name_of(index) for index in range(len(source))] for source in (train, val)]
    places = [{os.path.abspath(name) for name in part} for part in names]
    shared = {name for name in names[1] if os.path.abspath(name) in places[0] and os.path.lexists(name)}
    if content:
        found, compared = _same_content(names[0], [name for name in names[1] if name not in shared])
        shared |= found
    return shared, compared


def _same_content(train: Sequence[str], val: Sequence[str]) -> tuple[set[str], bool]:
    """Those of ``val`` that are a file of ``train``, or of the same content, and whether contents were read."""
    known, measured = _statuses(train), _statuses(val)
    files = {(status.st_dev, status.st_ino) for status in known.values()}
    found = {name for name, status in measured.items() if (status.st_dev, status.st_ino) in files}
    left = {name: status.st_size for name, status in measured.items() if name not in found}
    sizes = {status.st_size for status in known.values()} & set(left.values())
    alike = [[n for n, s in measured.items() if n in left and s.st_size in sizes]]
    alike.append([name for name, status in known.items() if status.st_size in sizes])
    if sum(map(len, alike)) > MOST_READ:
        return found, False
    by_sample: dict[str, list[str]] = {}
    for name in alike[1]:
        by_sample.setdefault(_sample_digest(name), []).append(name)
    by_sample.pop("", None)
    equal = {name for name in alike[0] if any(_equal(name, one) for one in by_sample.get(_sample_digest(name), ()))}
    return found | equal, True


def _equal(one: str, other: str) -> bool:
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False


def _statuses(names: Sequence[str]) -> dict[str, os.stat_result]:
    """Of the files that are there and hold something."""
    found = {}
    for name in names:
        try:
            status = os.stat(name)
        except (OSError, ValueError):
            continue
        if stat.S_ISREG(status.st_mode) and status.st_size:
            found[name] = status
    return found


def _sample_digest(name: str) -> str:
    """Of a file's size and middle; "" where it cannot be read."""
    try:
        with open(name, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, (size - SAMPLE) // 2))
            return f"{size} {hashlib.sha256(file.read(SAMPLE)).hexdigest()}"
    except OSError:
        return ""
