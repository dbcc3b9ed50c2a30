"""What the readers of annotations share: sizes, boxes and names of images as tools write them."""

from __future__ import annotations

import math
import os
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scrl_fast.data.decode import Encoded
from scrl_fast.data.image_files import BadImage, ImageLimits, read_file
from scrl_fast.errors import UsageError

MOST_CLASSES, LONGEST_NAME = 100_000, 200
"""Classes of a data set, and characters of the name of one."""
_CONTROL = ("Cc", "Cs", "Zl", "Zp")  # of Unicode: control characters, halves of pairs, ends of lines and paragraphs

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


def shown(value: Any) -> str:
    """A value of a file in a message, cut to a readable length."""
    return _short.repr(value)


def foreign_content(data: bytes) -> str:
    """What a file is that holds no annotations, in words; an empty text where it may."""
    if not data.strip():
        return "empty"
    if data.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (fetch the file itself by `git lfs pull`)"
    if data[:512].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page (a download that went wrong?)"
    packed = {b"\x1f\x8b": "gzip", b"PK": "zip"}
    return next((f"a {name} archive" for magic, name in packed.items() if data.startswith(magic)), "")


def read_annotations(path: str | os.PathLike[str], largest: int) -> bytes:
    """The bytes of a regular file of annotations.

    largest: bytes; a larger file is not read.
    Raises FileNotFoundError; UsageError naming the file where it is a pipe, a link to nothing, too large, or cannot be
    read.
    """
    try:
        return read_file(os.fspath(path), limit=largest, option="")
    except BadImage as error:
        if isinstance(error.__cause__, FileNotFoundError):
            if os.path.islink(path):
                raise UsageError(f"{path} is a link to {os.readlink(path)}, which is not there") from None
            raise error.__cause__ from None
        raise UsageError(f"cannot read {error}") from error


def check_class_names(origin: str, names: Sequence[str]) -> list[str]:
    """Notes on names that several classes have.

    Raises UsageError for more than `MOST_CLASSES`, and for a name that no line of a log can hold: empty, of more than
    `LONGEST_NAME` characters, or with control characters.
    """
    if len(names) > MOST_CLASSES:
        raise UsageError(f"{origin}: {len(names)} classes, at most {MOST_CLASSES} are taken")
    for label, name in enumerate(names):
        if any(unicodedata.category(character) in _CONTROL for character in name):
            raise UsageError(f"{origin}: the name of class {label}, {shown(name)}, holds control characters")
        if not name.strip() or len(name) > LONGEST_NAME:
            said = f"has {len(name)} characters, at most {LONGEST_NAME} are taken" if name.strip() else "is empty"
            raise UsageError(f"{origin}: the name of class {label}, {shown(name)}, {said}")
    twice = [name for name, count in Counter(names).items() if count > 1]
    return [f"{origin}: several classes are called {', '.join(map(repr, twice[:3]))}"] if twice else []


def stated_size(height: Any, width: Any) -> tuple[int, int] | None:
    """Height and width as annotations give them, also as text; None where tools did not know: nothing, 0 or -1.

    Raises ValueError, naming the value, for anything else that is no whole number of pixels.
    """
    sides = []
    for name, value in (("height", height), ("width", width)):
        if value is None or value == "":
            return None
        try:
            side = float(value) if type(value) in (int, float, str) else math.nan
        except (ValueError, OverflowError):
            side = math.nan
        if not side.is_integer():
            raise ValueError(f"has {name} {shown(value)}, which is no number of pixels")
        sides.append(int(side))
    return (sides[0], sides[1]) if min(sides) > 0 else None


def fill_sizes(
    folder: str,
    names: Sequence[str],
    sizes: Sequence[tuple[int, int] | None],
    annotation_file: str,
    *,
    limits: ImageLimits,
) -> tuple[list[tuple[int, int]], list[str]]:
    """The sizes, unknown ones read from the images, and notes. Raises UsageError for a size that no image can have."""

    def read(name: str) -> tuple[int, int]:
        path = os.path.join(folder, name)
        image = Encoded(read_file(path, limit=limits.max_file_bytes), limits=limits, name=path)
        return image.height, image.width

    large = next((i for i, size in enumerate(sizes) if size and size[0] * size[1] > limits.max_pixels), None)
    if large is not None:
        height, width = sizes[large] or (0, 0)
        raise UsageError(
            f"{annotation_file}: {names[large]} is said to have {height} x {width} pixels, "
            f"more than max_pixels={limits.max_pixels}"
        )
    unknown = [name for name, size in zip(names, sizes, strict=True) if size is None]
    try:
        with ThreadPoolExecutor(8) as pool:
            found = dict(zip(unknown, pool.map(read, unknown), strict=True))
    except BadImage as error:
        raise UsageError(
            f"{annotation_file} does not know the size of an image that cannot be read: {error}"
        ) from error
    filled = [size or found[name] for name, size in zip(names, sizes, strict=True)]
    notes = [f"{annotation_file} does not know the size of {len(unknown)} images: read from them"] if unknown else []
    return filled, notes


def clip_boxes(
    boxes: NDArray[np.float64], height: int, width: int, faults: Counter[str] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Boxes ``[n, 4]`` clipped to the image, and which of them still have an area.

    faults: counts the boxes that are left out or clipped by more than a pixel.
    """
    clipped = np.clip(boxes, 0, np.array([width, height, width, height])).astype(np.float32)
    valid = np.isfinite(boxes).all(1) & (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
    if faults is not None and len(boxes):
        faults["clipped"] += int((valid & far_outside(boxes, clipped)).sum())
        faults["left out"] += int((~valid).sum())
        faults["all"] += len(boxes)
    return clipped, valid


def far_outside(boxes: NDArray[np.float64], clipped: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which boxes reach more than a pixel beyond their image; less is rounding."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.abs(clipped - boxes).max(1, initial=0) > 1


def box_notes(annotation_file: str, faults: Counter[str]) -> list[str]:
    """What `clip_boxes` counted, in words."""
    said = {
        "left out": "have no area inside their image and are left out",
        "clipped": "reach more than a pixel beyond their image and are clipped",
    }
    return [f"{annotation_file}: {faults[k]} of {faults['all']} boxes {text}" for k, text in said.items() if faults[k]]


def find_images(folder: str, names: Sequence[str], annotation_file: str) -> tuple[list[str], list[str]]:
    """The names as the files in the folder have them, and notes on those that differ.

    A name that is not there may differ from a file in its slashes, its folder or its case.
    Raises UsageError naming the first image that the folder lacks, or that is named twice.
    """
    present = set(os.listdir(folder))  # one look at the folder instead of a hundred thousand at its files
    folded: dict[str, list[str]] = {}
    for name in present:
        folded.setdefault(name.lower(), []).append(name)
    found: list[str] = []
    missing: list[tuple[str, str]] = []
    differing: list[tuple[str, str]] = []
    for name in names:
        if name not in present and not os.path.isfile(os.path.join(folder, name)):
            other = _other_name(folder, name, folded)
            (differing if other else missing).append((name, other))
            name = other or name
        found.append(os.path.normpath(name))
    if missing:
        raise UsageError(
            f"{annotation_file} names {len(names)} images, of which {len(missing)} are not in {folder}; the first is "
            f"{os.path.join(folder, missing[0][0])}"
        )
    if len(set(found)) < len(found):
        name = Counter(found).most_common(1)[0][0]
        raise UsageError(f"{annotation_file} names the image {name!r} twice: each has only a part of its boxes")
    notes = []
    if differing:
        name, other = differing[0]
        notes = [f"{annotation_file}: {len(differing)} images have other names, such as {other!r} for {name!r}"]
    return found, notes


def _other_name(folder: str, name: str, folded: dict[str, list[str]]) -> str:
    """The one file of the folder that a differing name can mean, or nothing."""
    slashed = name.replace("\\", "/")
    if os.path.isfile(os.path.join(folder, slashed)):
        return slashed
    like = folded.get(slashed.rpartition("/")[2].lower(), [])
    return like[0] if len(like) == 1 else ""
