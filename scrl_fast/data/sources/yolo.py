"""YOLO's label files: beside every image one text file of the same name, one object a line.

A line is ``class x y width height`` (centre and size) or ``class x1 y1 x2 y2 x3 y3 ...`` (an outline). All
but the class are shares of the image's width and height. Both kinds may stand in one file. Source:
docs.ultralytics.com/datasets.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from scrl_fast.data.decode import Encoded
from scrl_fast.data.image_files import DEFAULT_LIMITS, BadImage, ImageLimits, printable, read_file
from scrl_fast.data.sources.annotated import AnnotatedImages, Objects
from scrl_fast.data.sources.annotation_files import (
    MOST_CLASSES,
    box_notes,
    clip_boxes,
    foreign_content,
    read_annotations,
    shown,
)
from scrl_fast.data.sources.coco_fields import inside_mask
from scrl_fast.errors import UsageError

BOX_FIELDS = 5
FARTHEST = 2.0  # shares of the image: what lies farther out is no rounding and no object that the frame cuts
_LARGEST_LABELS = 1 << 24  # bytes: of one image
NO_LABELS = ("classes.txt", "labels.txt", "notes.txt", "train.txt", "val.txt", "valid.txt", "test.txt")
"""Text files that tools write beside label files; so are all whose name begins with readme."""


class Row(NamedTuple):
    """One object of a label file, in shares of the image."""

    label: int
    corners: tuple[float, float, float, float]
    """x0, y0, x1, y1."""
    outline: tuple[float, ...]
    """x, y, x, y, ...; empty for a box."""


@dataclass
class LeftOut:
    """What is left out, by the reason: how often, and where first."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        """One more for this reason."""
        self.counts[reason] += 1
        self.first.setdefault(reason, where)

    def notes(self, what: str) -> list[str]:
        """A sentence for each reason. what: is left out, such as ``lines``."""
        return [
            f"{count} {what} {reason} and are left out; the first: {printable(self.first[reason])}"
            for reason, count in self.counts.most_common()
        ]


def read_yolo(
    root: str,
    images: Sequence[str],
    classes: Sequence[str],
    *,
    origin: str,
    keypoint_fields: int = 0,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> AnnotatedImages:
    """These images with the objects of their label files; images without a label file have no objects.

    root, images: a folder and paths relative to it. classes: names by label; a class beyond them is left out.
    origin: the folder or list that named the images, for messages.
    keypoint_fields: numbers that follow the box in files for poses; they are not read.
    A label file is looked for in the folder ``labels`` where the image's path has ``images``, beside the image, and in
    a folder ``labels`` there. ``notes`` of the result count the lines, boxes and images that are left out.
    Raises UsageError where no image has a label file, or no line of them can be read.
    """
    files = LabelFiles()
    labels = [files.of(os.path.join(root, name)) for name in images]
    if not any(labels):
        raise UsageError(f"{origin}: none of {len(images)} images has a label file, {files.example(root, images)}")
    sizes = image_sizes([os.path.join(root, name) for name in images], limits)
    faults: Counter[str] = Counter()
    unread, lines, empty = LeftOut(), LeftOut(), LeftOut()
    parser = _Parser(len(classes), keypoint_fields, lines)
    objects = []
    for name, path, size in zip(images, labels, sizes, strict=True):
        if isinstance(size, BadImage):
            unread.add("cannot be read", str(size))
            continue
        rows = parser.rows(path) if path else []
        objects.append(_objects(name, size, rows, faults, empty))
    if parser.read == 0 and lines.counts:
        raise UsageError(f"{origin}: no line of its label files can be read. " + ". ".join(lines.notes("lines")))
    if not objects:
        raise UsageError(f"{origin}: none of {len(images)} images can be read; the first: {unread.first.popitem()[1]}")
    without, lonely = labels.count(""), files.without_image()
    notes = [*unread.notes("images"), *lines.notes("lines"), *empty.notes("boxes"), *box_notes(origin, faults)]
    if without:
        notes.append(f"{origin}: {without} images have no label file and are taken to show no object")
    if lonely:
        notes.append(f"{origin}: {len(lonely)} label files have no image, such as {printable(lonely[0])}")
    return AnnotatedImages(root, objects, classes, annotation_file=origin, limits=limits, notes=notes)


class LabelFiles:
    """Finds the label files of images; every folder is listed once."""

    def __init__(self) -> None:
        self._listed: dict[str, dict[str, str]] = {}
        self._stems: dict[str, set[str]] = {}  # of the files in the images' folders

    def of(self, image: str) -> str:
        """The path of an image's label file, '' where there is none."""
        folder, name = os.path.split(image)
        stem = os.path.splitext(name)[0]
        if folder not in self._stems:
            self._stems[folder] = {os.path.splitext(file)[0] for file in os.listdir(folder) if not is_label_file(file)}
        for place in label_folders(folder):
            if found := self._texts(place).get(stem):
                return os.path.join(place, found)
        return ""

    def example(self, root: str, images: Sequence[str]) -> str:
        """Where the label file of the first image was looked for."""
        folder, name = os.path.split(os.path.join(root, images[0]))
        stem = os.path.splitext(name)[0]
        return "such as " + " or ".join(os.path.join(place, f"{stem}.txt") for place in label_folders(folder)[:2])

    def without_image(self) -> list[str]:
        """Paths of label files in the folders that were looked at, without an image of their name."""
        stems = set().union(*self._stems.values())
        return [
            os.path.join(folder, name)
            for folder, texts in sorted(self._listed.items())
            for stem, name in sorted(texts.items())
            if stem not in stems
        ]

    def _texts(self, folder: str) -> dict[str, str]:
        if folder not in self._listed:
            names = os.listdir(folder) if os.path.isdir(folder) else []
            self._listed[folder] = {os.path.splitext(name)[0]: name for name in names if is_label_file(name)}
        return self._listed[folder]


def is_label_file(name: str) -> bool:
    """Whether a text file may hold the labels of an image, by its name."""
    low = name.lower()
    return low.endswith(".txt") and low not in NO_LABELS and not low.startswith((".", "readme"))


def label_folders(folder: str) -> list[str]:
    """Where the label files of a folder of images may lie, the likeliest first."""
    parts = folder.split(os.sep)
    places = [folder, os.path.join(folder, "labels")]
    for at in range(len(parts) - 1, -1, -1):
        if parts[at].lower() == "images":
            twin = {"images": "labels", "Images": "Labels", "IMAGES": "LABELS"}.get(parts[at], "labels")
            return [os.sep.join([*parts[:at], twin, *parts[at + 1 :]]), *places]
    return places


def image_sizes(paths: Sequence[str], limits: ImageLimits) -> list[tuple[int, int] | BadImage]:
    """Height and width of every upright image, from its header, or why it cannot be read."""

    def size(path: str) -> tuple[int, int] | BadImage:
        try:
            image = Encoded(read_file(path, limit=limits.max_file_bytes), limits=limits, name=path)
        except BadImage as error:
            return error
        return image.height, image.width

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(size, paths))


def count_classes(root: str, images: Sequence[str]) -> int:
    """One more than the largest class in the label files of these images; odd lines do not count."""
    files, largest = LabelFiles(), -1
    for name in images:
        path = files.of(os.path.join(root, name))
        for line in _text(path).split("\n") if path else ():
            with contextlib.suppress(ValueError):
                largest = max(largest, parse_line(line, MOST_CLASSES).label)
    return largest + 1


# ---- lines ----


class _Parser:
    """Reads label files of so many classes. read: lines that were taken; those that were not are added to left_out."""

    def __init__(self, classes: int, keypoint_fields: int, left_out: LeftOut) -> None:
        self.classes, self.keypoint_fields, self.left_out, self.read = classes, keypoint_fields, left_out, 0

    def rows(self, path: str) -> list[tuple[str, Row]]:
        """The objects of a file, each with where it stands. A line that repeats an earlier one is left out."""
        found: dict[Row, str] = {}
        for number, line in enumerate(_text(path).split("\n"), 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = parse_line(line, self.classes, self.keypoint_fields)
            except ValueError as error:
                self.left_out.add(str(error), f"{where} ({shown(line.strip())})")
                continue
            self.read += 1
            if row in found:
                self.left_out.add("repeat another line of their file", where)
            found.setdefault(row, where)
        return [(where, row) for row, where in found.items()]


def _text(path: str) -> str:
    try:
        data = read_annotations(path, _LARGEST_LABELS)
    except FileNotFoundError:
        raise UsageError(f"{path} is gone, though its folder lists it") from None
    if data.strip() and (other := foreign_content(data)):
        raise UsageError(f"{path} is {other}, not a label file")
    return data.decode("utf-8-sig", "replace").replace("\r\n", "\n").replace("\r", "\n")


def parse_line(line: str, classes: int, keypoint_fields: int = 0) -> Row:
    """The object in a line. Raises ValueError, whose text says what such lines do: ``hold ...``, ``name ...``."""
    fields = line.split()
    try:
        values = [float(text) for text in fields]
    except ValueError:
        raise ValueError("hold what is no number") from None
    if len(values) < BOX_FIELDS:
        raise ValueError(f"hold fewer than {BOX_FIELDS} numbers")
    if not all(map(math.isfinite, values)):
        raise ValueError("hold NaN or infinity")
    label, numbers = values[0], values[1:]
    if keypoint_fields and len(numbers) == BOX_FIELDS - 1 + keypoint_fields:
        numbers = numbers[: BOX_FIELDS - 1]
    if len(numbers) != BOX_FIELDS - 1 and (len(numbers) % 2 or len(numbers) < 6):
        raise ValueError("hold neither 5 numbers nor a class and pairs of x and y")
    if not label.is_integer() or not 0 <= label < classes:
        raise ValueError(f"name a class that is none of 0 to {classes - 1}")
    if max(map(abs, numbers)) > FARTHEST:
        raise ValueError("hold coordinates that are no shares of the image's sides (pixels?)")
    if len(numbers) == BOX_FIELDS - 1:
        x, y, width, height = numbers
        return Row(int(label), (x - width / 2, y - height / 2, x + width / 2, y + height / 2), ())
    xs, ys = numbers[::2], numbers[1::2]
    return Row(int(label), (min(xs), min(ys), max(xs), max(ys)), tuple(numbers))


def _objects(
    name: str, size: tuple[int, int], rows: Sequence[tuple[str, Row]], faults: Counter[str], empty: LeftOut
) -> Objects:
    height, width = size
    corners = np.array([row.corners for _, row in rows], np.float64).reshape(-1, 4) * [width, height, width, height]
    boxes, valid = clip_boxes(corners, height, width, faults)
    for place in np.flatnonzero(~valid).tolist():
        faults["left out"] -= 1  # said below with its file and line
        empty.add("have no area inside their image", rows[place][0])
    sides = np.array([width, height], np.float64)
    outlines = [(np.array(row.outline).reshape(-1, 2) * sides).reshape(-1).tolist() for _, row in rows]
    objects = Objects(
        image_id=os.path.splitext(name)[0],
        file_name=name,
        height=height,
        width=width,
        boxes=boxes,
        labels=np.array([row.label for _, row in rows], np.int64),
        areas=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
        crowd=np.zeros(len(rows), bool),
        difficult=np.zeros(len(rows), bool),
        segmentations=tuple(inside_mask([o], height, width) if o else None for o in outlines),
    )
    return objects if valid.all() else objects[valid]
