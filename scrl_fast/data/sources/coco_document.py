"""COCO's JSON files as tools write them: read, checked, and brought into one form.

Ids of annotations are not used: tools repeat them, count them from 0 or leave them out. Format:
cocodataset.org/#format-data.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

from scrl_fast.data.sources.annotation_files import (
    check_class_names,
    foreign_content,
    read_annotations,
    shown,
    stated_size,
)
from scrl_fast.data.sources.coco_fields import (
    area_of,
    bbox_of,
    crowd_of,
    id_of,
    keypoints_of,
    segmentation_of,
    text_of,
)
from scrl_fast.errors import UsageError

_LARGEST_FILE = 1 << 33  # bytes: a million images with masks take about half of it
PARTS = ("images", "annotations", "categories")


class Image(NamedTuple):
    """One row of ``images``."""

    id: int | str
    file_name: str
    size: tuple[int, int] | None
    """Height and width in pixels; None where the file does not know them."""


class Annotation(NamedTuple):
    """One row of ``annotations``."""

    where: tuple[int, Any]
    """Position in the file and the id there, for messages."""
    label: int
    """0 to classes - 1."""
    bbox: tuple[float, float, float, float]
    """x, y, width, height in pixels, as the file has them."""
    area: float
    """Square pixels; of the box where the file gives none."""
    crowd: bool
    segmentation: Any
    """Polygons, or a dict of run lengths; None without a mask, or where masks are not read."""
    keypoints: list[float] | None
    """3 K numbers: x, y, visibility."""

    def __str__(self) -> str:
        return _in_words("annotation", *self.where)


@dataclass(frozen=True)
class Document:
    """The content of a COCO file, checked."""

    file: str
    images: list[Image]
    classes: list[str]
    """Names by label; labels follow ascending category ids."""
    category_ids: list[int | str]
    annotations: list[list[Annotation]]
    """For each image its annotations, in the order of the file."""
    notes: list[str]
    """What a user should know about the content."""


def read_document(file: str, *, segmentations: bool) -> Document:
    """Read and check a COCO file. segmentations: read the masks, too.

    Raises UsageError naming the file and the row for content that cannot be taken as it is meant.
    """
    content = _load(file)
    classes, category_ids, notes = _categories(file, content["categories"])
    images = _images(file, content["images"])
    place_of = {image.id: place for place, image in enumerate(images)}
    label_of = {number: label for label, number in enumerate(category_ids)}
    annotations: list[list[Annotation]] = [[] for _ in images]
    for row, item in enumerate(content["annotations"]):
        where = row, item.get("id")
        try:
            found = annotations[_known(item, "image_id", place_of)]
            found.append(_annotation(item, where, _known(item, "category_id", label_of), segmentations))
        except ValueError as error:
            raise UsageError(f"{file}: {_in_words('annotation', *where)} {error}") from error
    _check_keypoints(file, annotations)
    _check_unit(file, annotations)
    return Document(file, images, classes, category_ids, annotations, notes)


def _in_words(what: str, row: int, number: Any) -> str:
    return f"{what} at position {row}" if number is None else f"{what} {shown(number)}"


def _known(item: dict[str, Any], key: str, place_of: dict[int | str, int]) -> int:
    number = id_of(item, key)
    if number not in place_of:
        raise ValueError(f"has the unknown {key} {number!r}")
    return place_of[number]


def _load(file: str) -> dict[str, list[dict[str, Any]]]:
    try:
        data = read_annotations(file, _LARGEST_FILE)
    except FileNotFoundError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from error
    if other := foreign_content(data):
        raise UsageError(f"{file} is {other}, not COCO's JSON")
    try:
        content = json.loads(data)  # takes a byte order mark
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file} is not in COCO's format: it holds a {type(content).__name__}, not an object")
    for part in PARTS:
        rows = content.get(part)
        if not isinstance(rows, list):
            raise UsageError(f"{file} is not in COCO's format: it lacks a list of {part}")
        odd = next((i for i, row in enumerate(rows) if not isinstance(row, dict)), None)
        if odd is not None:
            raise UsageError(f"{file}: {part}[{odd}] is {shown(rows[odd])}, not an object")
    for part in ("images", "categories"):
        if not content[part]:
            raise UsageError(f"{file} names no {part}")
    return content


def _categories(file: str, rows: list[dict[str, Any]]) -> tuple[list[str], list[int | str], list[str]]:
    """Names and ids in the order of the ids, and notes."""
    names: dict[int | str, str] = {}
    for row, item in enumerate(rows):
        try:
            number, name = id_of(item, "id"), text_of(item, "name")
        except ValueError as error:
            raise UsageError(f"{file}: {_in_words('category', row, item.get('id'))} {error}") from error
        if number in names:
            raise UsageError(f"{file}: two categories have the id {number!r}: {names[number]!r} and {name!r}")
        names[number] = name
    if len({type(number) for number in names}) > 1:
        raise UsageError(f"{file}: ids of categories are numbers and text: {', '.join(map(repr, list(names)[:6]))}")
    ids = sorted(names)  # type: ignore[type-var]
    classes = [names[number] for number in ids]
    return classes, ids, check_class_names(file, classes)


def _images(file: str, rows: list[dict[str, Any]]) -> list[Image]:
    images: dict[int | str, Image] = {}
    for row, item in enumerate(rows):
        try:
            number, name = id_of(item, "id"), text_of(item, "file_name")
            size = stated_size(item.get("height"), item.get("width"))
        except ValueError as error:
            raise UsageError(f"{file}: {_in_words('image', row, item.get('id'))} {error}") from error
        if number in images:
            raise UsageError(
                f"{file}: two images have the id {number!r}: {images[number].file_name!r} and {name!r}; "
                "each would get the boxes of both"
            )
        images[number] = Image(number, name, size)
    return list(images.values())


def _annotation(item: dict[str, Any], where: tuple[int, Any], label: int, segmentations: bool) -> Annotation:
    bbox = bbox_of(item)
    segmentation = segmentation_of(item.get("segmentation")) if segmentations else None
    area, crowd = area_of(item.get("area"), bbox), crowd_of(item.get("iscrowd"))
    return Annotation(where, label, bbox, area, crowd, segmentation, keypoints_of(item.get("keypoints")))


def _check_keypoints(file: str, annotations: list[list[Annotation]]) -> None:
    counts = Counter(len(a.keypoints) for found in annotations for a in found if a.keypoints is not None)
    if len(counts) < 2:
        return
    usual = counts.most_common(1)[0][0]
    odd = next(a for found in annotations for a in found if a.keypoints is not None and len(a.keypoints) != usual)
    raise UsageError(f"{file}: {odd} has {len(odd.keypoints or ()) // 3} keypoints, where others have {usual // 3}")


def _check_unit(file: str, annotations: list[list[Annotation]]) -> None:
    boxes = [annotation.bbox for found in annotations for annotation in found]
    values = [value for box in boxes for value in box]
    if all(0 <= value <= 1 for value in values) and any(value % 1 for value in values):  # [0, 0, 1, 1] is a pixel
        raise UsageError(
            f"{file}: all {len(boxes)} boxes lie between 0 and 1; COCO's bbox is x, y, width, height in pixels"
        )
