"""Pascal VOC annotations in their official layout: ``ROOT/VOC2007/{Annotations,ImageSets/Main,JPEGImages}``.

ROOT (the devkit) or ``ROOT/VOC2007`` itself may be named. Boxes in the XML files count pixels from 1 and include the
last one; here they count from 0 and do not.
"""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scrl_fast.data.decode import EXTENSIONS
from scrl_fast.data.image_files import DEFAULT_LIMITS, ImageLimits
from scrl_fast.data.sources.annotated import AnnotatedImages, Objects
from scrl_fast.data.sources.annotation_files import (
    box_notes,
    clip_boxes,
    fill_sizes,
    find_images,
    foreign_content,
    read_annotations,
    shown,
    stated_size,
)
from scrl_fast.errors import UsageError, did_you_mean

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

_LARGEST_XML, LARGEST_LIST = 1 << 26, 1 << 30  # bytes: of one image; ten million names


def read_voc(
    root: str,
    split: str = "test",
    *,
    year: str = "2007",
    classes: Sequence[str] = CLASSES,
    max_pixels: int | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> AnnotatedImages:
    """The images of one split with their objects; difficult ones are kept and marked.

    root: the devkit's folder, which holds ``VOC<year>``, or that folder itself.
    split: a list of ``ImageSets/Main``: train, val, trainval or test.
    classes: names by label; VOC's own twenty unless your XML files have others.
    limits: of the image files. max_pixels: in place of the one in limits.
    Raises UsageError naming the path that was expected, or the file and the class that does not belong.
    """
    folder, limits = _folder(root, year), limits.with_pixels(max_pixels)
    listing = folder / "ImageSets" / "Main" / f"{split}.txt"
    names = listed_names(folder / "Annotations", listing)
    return read_voc_folder(
        folder / "Annotations", folder / "JPEGImages", names, classes=classes, origin=str(listing), limits=limits
    )


def read_voc_folder(
    annotations: Path,
    images: Path,
    names: Sequence[str],
    *,
    classes: Sequence[str],
    origin: str,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> AnnotatedImages:
    """The images of these XML files, wherever the two folders lie.

    names: of the files in ``annotations``, without ``.xml``. origin: the list that names them, or their folder, for
        messages.
    Raises UsageError as `read_voc` does.
    """
    label_of = {name: label for label, name in enumerate(classes)}
    found = [_read_xml(annotations / f"{name}.xml", label_of) for name in names]
    if not images.is_dir():
        raise UsageError(f"no folder of images at {images}, which {origin} belongs to")
    files, notes = find_images(str(images), _image_files(images, names, found), origin)
    sizes, more = fill_sizes(str(images), files, [a.size for a in found], origin, limits=limits)
    faults: Counter[str] = Counter()
    objects = [
        _objects(name, file, size, annotation, faults)
        for name, file, size, annotation in zip(names, files, sizes, found, strict=True)
    ]
    return AnnotatedImages(
        str(images),
        objects,
        classes,
        annotation_file=origin,
        limits=limits,
        notes=[*notes, *more, *box_notes(origin, faults)],
    )


def class_names(annotations: Path, names: Sequence[str]) -> set[str]:
    """The names of all objects in these XML files. Raises UsageError naming a file that cannot be read."""
    found: set[str] = set()
    for name in names:
        path = annotations / f"{name}.xml"
        try:
            found.update(_text(node, "name") for node in _document(path).iterfind("object"))
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(f"{path} is not in VOC's format: {error}") from error
    return found


class _Annotation(NamedTuple):
    """The content of one XML file."""

    file_name: str
    size: tuple[int, int] | None
    labels: list[int]
    boxes: list[list[float]]
    difficult: list[bool]


def _folder(root: str, year: str) -> Path:
    if not os.path.isdir(root):
        raise UsageError(f"VOC's folder {root!r} does not exist; expected: VOCdevkit with VOC{year} in it")
    for folder in (Path(root, f"VOC{year}"), Path(root, "VOCdevkit", f"VOC{year}"), Path(root)):
        if (folder / "Annotations").is_dir():
            return folder
    raise UsageError(f"no VOC annotations in {root!r}: expected {Path(root, f'VOC{year}', 'Annotations')}")


def listed_names(annotations: Path, listing: Path) -> list[str]:
    """The names that a list holds, without what the lists of single classes have behind them.

    Raises UsageError for a list that is missing, empty or names a file twice.
    """
    try:
        lines = read_annotations(listing, LARGEST_LIST).decode("utf-8-sig").replace("\r", "\n").split("\n")
    except FileNotFoundError:
        there = sorted(path.stem for path in listing.parent.glob("*.txt") if "_" not in path.stem)
        hint = did_you_mean(listing.stem, there) or (f"; there are: {', '.join(there)}" if there else "")
        raise UsageError(f"no list of images at {listing}{hint}") from None
    except ValueError as error:
        raise UsageError(f"{listing} is no list of names: {error}") from error
    present = set(os.listdir(annotations))
    names = [_listed_name(line.strip(), present) for line in lines if line.strip()]
    if not names:
        raise UsageError(f"{listing} names no images")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise UsageError(f"{listing} names {name!r} {count} times: its objects would be counted as often")
    return names


def _listed_name(line: str, present: set[str]) -> str:
    first, *rest = line.split()
    for name in (line, first, os.path.splitext(line)[0], os.path.splitext(first)[0]):
        if f"{name}.xml" in present:
            return name
    return first if rest in (["1"], ["-1"], ["0"]) else line


def _image_files(images: Path, names: Sequence[str], annotations: Sequence[_Annotation]) -> list[str]:
    """The image of each annotation: the one called as the list says, whatever its extension.

    An XML file's ``<filename>`` decides between several, and counts alone where there is none: tools copy it wrongly.
    """
    files_of: dict[str, list[str]] = {}
    for file in sorted(os.listdir(images)):
        stem, extension = os.path.splitext(file)
        if extension.lower() in EXTENSIONS:
            files_of.setdefault(stem, []).append(file)
    chosen = []
    for name, annotation in zip(names, annotations, strict=True):
        files = files_of.get(name, [])
        if not files:
            chosen.append(annotation.file_name or f"{name}.jpg")
        else:
            chosen.append(annotation.file_name if annotation.file_name in files else files[0])
    return chosen


# ---- XML files ----


def _read_xml(path: Path, label_of: Mapping[str, int]) -> _Annotation:
    try:
        return _annotation(_document(path), label_of)
    except UsageError as error:
        raise error if str(path) in str(error) else UsageError(f"{path}: {error}") from None
    except (ValueError, LookupError) as error:
        raise UsageError(f"{path} is not in VOC's format: {error}") from error


def _document(path: Path) -> ElementTree.Element:
    try:
        data = read_annotations(path, _LARGEST_XML)
    except FileNotFoundError:
        raise UsageError(f"no annotation at {path}, though the list of images names {path.stem}") from None
    if other := foreign_content(data):
        raise UsageError(f"{path} is {other}, not an annotation in XML")
    try:
        return _parsed(data)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UsageError(f"{path} is not in VOC's format: {error}") from error


def _parsed(data: bytes) -> ElementTree.Element:
    """The root of an XML document that declares no entities: a few bytes of them can stand for gigabytes."""
    if b"<!ENTITY" in data.replace(b"\0", b""):
        raise ValueError("it declares XML entities, which annotations need not and which may be endless")
    root = ElementTree.fromstring(data.lstrip())
    if root.tag != "annotation":
        raise ValueError(f"its root is <{shown(root.tag)[1:-1]}>, not <annotation>")
    return root


def _annotation(root: ElementTree.Element, label_of: Mapping[str, int]) -> _Annotation:
    labels, boxes, difficult = [], [], []
    for node in root.iterfind("object"):
        boxes.append([_number(node, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")])
        category = _text(node, "name")
        if category not in label_of:
            raise UsageError(
                f"{shown(category)} is none of the {len(label_of)} classes{did_you_mean(category[:99], label_of)}"
            )
        labels.append(label_of[category])
        difficult.append(_flag(node.findtext("difficult")))
    name = re.split(r"[\\/]", (root.findtext("filename") or "").strip())[-1]
    height, width = ((root.findtext(f"size/{side}") or "").strip() for side in ("height", "width"))
    return _Annotation(name, stated_size(height, width), labels, boxes, difficult)


def _number(node: ElementTree.Element, path: str) -> float:
    text = _text(node, path)
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"<{path.replace('/', '><')}> is {shown(text)}, which is no number") from None


def _flag(text: str | None) -> bool:
    """<difficult>: 0 or 1; some tools write words, or nothing."""
    value = (text or "").strip().lower()
    if value in ("1", "true"):
        return True
    if value in ("", "0", "false", "unspecified"):
        return False
    raise ValueError(f"<difficult> is {shown(text)}, expected 0 or 1")


def _text(node: ElementTree.Element, path: str) -> str:
    text = node.findtext(path)
    if text is None:
        raise ValueError(f"<{node.tag}> has no <{path.replace('/', '><')}>")
    return text.strip()


def _objects(name: str, file: str, size: tuple[int, int], annotation: _Annotation, faults: Counter[str]) -> Objects:
    height, width = size
    count = len(annotation.labels)
    corners = np.array(annotation.boxes, np.float64).reshape(count, 4)
    corners[:, :2] -= 1
    boxes, valid = clip_boxes(corners, height, width, faults)
    objects = Objects(
        image_id=name,
        file_name=file,
        height=height,
        width=width,
        boxes=boxes,
        labels=np.array(annotation.labels, np.int64),
        areas=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
        crowd=np.zeros(count, bool),
        difficult=np.array(annotation.difficult, bool),
        segmentations=(None,) * count,
    )
    return objects if valid.all() else objects[valid]
