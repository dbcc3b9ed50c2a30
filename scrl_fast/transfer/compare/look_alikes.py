"""Which images of one set are in another: the same file, the same pixels, or pictures that look alike.

Alike are two pictures whose difference hashes differ in few bits: whether each of 16 x 16 cells is darker than its
right neighbour, which size, quality and small changes of colour leave mostly as it is. A crop is not found. A mirrored
copy is: its hash is made from the other one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from scrl_fast.data.image_files import BadImage
from scrl_fast.data.jpeg import SHRINKS
from scrl_fast.data.prefetch import prefetched
from scrl_fast.data.scaled import open_image

SIDE = 16
BITS = SIDE * SIDE
_DECODED_SIDE = 8 * SIDE  # a JPEG may be shrunk to this while it is decoded
_LEAST_CONTRAST = 4.0  # levels, deviation of the cells; a flatter picture looks like any other flat one
_BLOCK = 1 << 14


@dataclass(frozen=True)
class Fingerprints:
    """What is compared of some images. A row an image that could be read.

    indices: in their source. files: SHA-256 of each file, or of its pixels where there is no file. hashes: bool
    ``[N, 256]``. structured: bool ``[N]``, False where the picture is too flat to be told by its hash. unread: images
    that could not be read.
    """

    indices: list[int]
    files: list[str]
    hashes: NDArray[np.bool_]
    structured: NDArray[np.bool_]
    unread: int


@dataclass(frozen=True)
class Match:
    """Image ``index`` of one set is ``other`` of the other. kind: file, pixels or alike. bits: how many differ."""

    index: int
    other: int
    kind: str
    bits: int


def fingerprints(
    source: Any,
    indices: Sequence[int],
    *,
    looks: bool,
    workers: int = 2,
    tick: Callable[[], None] = lambda: None,
) -> Fingerprints:
    """Reads these images of a source. looks: decode them for their hashes too. tick: called after every image."""
    kept: list[int] = []
    files: list[str] = []
    hashes: list[NDArray[np.bool_]] = []
    structured: list[bool] = []
    made = prefetched(lambda index: _fingerprint(source, index, looks), indices, workers)
    for index, found in zip(indices, made, strict=True):
        tick()
        if found is None:
            continue
        file, bits, contrast = found
        kept.append(index)
        files.append(file)
        hashes.append(bits)
        structured.append(looks and contrast >= _LEAST_CONTRAST)
    stacked = np.stack(hashes) if hashes else np.zeros((0, BITS), bool)
    return Fingerprints(kept, files, stacked, np.array(structured, bool), len(indices) - len(kept))


def _fingerprint(source: Any, index: int, looks: bool) -> tuple[str, NDArray[np.bool_], float] | None:
    try:
        image = open_image(source, index)
        data: bytes = image.data if isinstance(image.data, bytes) else np.asarray(image.data).tobytes()
        file = hashlib.sha256(data)
        if not looks:
            return file.hexdigest(), np.zeros(BITS, bool), 0.0
        least = min(image.height, image.width)
        shrink = next((s for s in SHRINKS if least >= s * _DECODED_SIDE and image.can_shrink(s)), 1)
        return (file.hexdigest(), *difference_hash(image.decode(shrink)))
    except BadImage:
        return None


def difference_hash(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], float]:
    """The 256 bits of a picture ``[H, W, 3]``, row by row, and the deviation of its cells in levels."""
    grey = Image.fromarray(pixels).convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX)
    cells = np.asarray(grey, np.int16)
    return (cells[:, :-1] < cells[:, 1:]).reshape(-1), float(cells.std())


def _mirrored(hashes: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The hashes of the mirrored pictures, but for cells that are equal to their neighbours."""
    return ~hashes.reshape(-1, SIDE, SIDE)[:, :, ::-1].reshape(-1, BITS)


def matches(
    images: Fingerprints, others: Fingerprints, same_pixels: Callable[[int, int], bool], *, distance: int
) -> list[Match]:
    """For each image that is among the others, the nearest one: the same file before the same pixels before alike.

    same_pixels: whether image i of the one source and j of the other have equal pixels; asked where hashes are near.
    distance: hashes with at most so many different bits are near.
    """
    by_file: dict[str, int] = {}
    for other, file in zip(others.indices, others.files, strict=True):
        by_file.setdefault(file, other)
    found: list[Match] = []
    for place, (bits, near) in enumerate(_near(images, others, distance)):
        index = images.indices[place]
        if images.files[place] in by_file:
            found.append(Match(index, by_file[images.files[place]], "file", 0))
            continue
        candidates = [(int(bits[i]), others.indices[int(i)]) for i in near]
        equal = next((other for _, other in candidates if same_pixels(index, other)), None)
        if equal is not None:
            found.append(Match(index, equal, "pixels", 0))
        elif candidates:
            least, other = min(candidates)
            found.append(Match(index, other, "alike", least))
    return found


def _near(
    images: Fingerprints, others: Fingerprints, distance: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """For each image: bits that differ from every other one, and which others are near, the nearest first."""
    structured = np.flatnonzero(others.structured)
    columns = torch.from_numpy(_signs(others.hashes[structured])).T
    for place in range(0, len(images.indices), 256):
        rows = images.hashes[place : place + 256]
        fewest = np.full((len(rows), len(others.indices)), BITS + 1, np.int64)
        for first in range(0, len(structured), _BLOCK):
            block = columns[:, first : first + _BLOCK]
            both = [torch.from_numpy(_signs(kind)) @ block for kind in (rows, _mirrored(rows))]
            agreeing = torch.maximum(*both).numpy()  # of signs: 256 less twice the bits that differ
            fewest[:, structured[first : first + _BLOCK]] = ((BITS - agreeing) / 2).round().astype(np.int64)
        for row, bits in enumerate(fewest):
            near = np.flatnonzero(bits <= distance) if images.structured[place + row] else np.zeros(0, np.int64)
            yield bits, near[np.argsort(bits[near], kind="stable")]


def _signs(hashes: NDArray[np.bool_]) -> NDArray[np.float32]:
    return np.where(hashes, np.float32(1), np.float32(-1))
