"""Pascal VOC annotations in their official layout: ``ROOT/VOC2007/{Annotations,ImageSets/Main,JPEGImages}``.

ROOT (the devkit) or ``ROOT/VOC2007`` itself may be named. Boxes in the XML files count pixels from 1 and include the
last one; here they count from 0 and do not.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scrl_fast.data.sources.annotated import MAX_PIXELS, AnnotatedImages, Objects, check_images_exist, inside
from scrl_fast.errors import UsageError, did_you_mean

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def read_voc(
    root: str,
    split: str = "test",
    *,
    year: str = "2007",
    classes: Sequence[str] = CLASSES,
    max_pixels: int = MAX_PIXELS,
) -> AnnotatedImages:
    """The images of one split with their objects; difficult ones are kept and marked.

    root: the devkit's folder, which holds ``VOC<year>``, or that folder itself.
    split: a list of ``ImageSets/Main``: train, val, trainval or test.
    classes: names by label; VOC's own twenty unless your XML files have others.
    Raises UsageError naming the path that was expected, or the file and the class that does not belong.
    """
    folder = _folder(root, year)
    listing = folder / "ImageSets" / "Main" / f"{split}.txt"
    names = _listed(listing)
    objects = [_objects(folder, name, {c: label for label, c in enumerate(classes)}) for name in names]
    images = str(folder / "JPEGImages")
    if not os.path.isdir(images):
        raise UsageError(f"no folder of images at {images}, which {listing} belongs to")
    check_images_exist(images, [o.file_name for o in objects], str(listing))
    return AnnotatedImages(images, objects, classes, annotation_file=str(listing), max_pixels=max_pixels)


def _folder(root: str, year: str) -> Path:
    if not os.path.isdir(root):
        raise UsageError(f"VOC's folder {root!r} does not exist; expected: VOCdevkit with VOC{year} in it")
    for folder in (Path(root, f"VOC{year}"), Path(root, "VOCdevkit", f"VOC{year}"), Path(root)):
        if (folder / "Annotations").is_dir():
            return folder
    raise UsageError(f"no VOC annotations in {root!r}: expected {Path(root, f'VOC{year}', 'Annotations')}")


def _listed(listing: Path) -> list[str]:
    try:
        lines = listing.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        there = sorted(path.stem for path in listing.parent.glob("*.txt") if "_" not in path.stem)
        hint = did_you_mean(listing.stem, there) or (f"; there are: {', '.join(there)}" if there else "")
        raise UsageError(f"no list of images at {listing}{hint}") from None
    names = [line.split()[0] for line in lines if line.strip()]
    if not names:
        raise UsageError(f"{listing} names no images")
    return names


def _objects(folder: Path, name: str, label_of: dict[str, int]) -> Objects:
    path = folder / "Annotations" / f"{name}.xml"
    try:
        tree = ElementTree.parse(path).getroot()
        found = [_object(node) for node in tree.findall("object")]
        height, width = (int(_text(tree, f"size/{side}")) for side in ("height", "width"))
    except FileNotFoundError:
        raise UsageError(f"no annotation at {path}, though the list of images names {name}") from None
    except (ElementTree.ParseError, ValueError) as error:
        raise UsageError(f"{path} is not in VOC's format: {error}") from error
    for category, _, _ in found:
        if category not in label_of:
            raise UsageError(
                f"{path}: '{category}' is none of the {len(label_of)} classes{did_you_mean(category, label_of)}"
            )
    boxes = np.array([box for _, box, _ in found], np.float32).reshape(len(found), 4)
    boxes[:, :2] -= 1
    boxes, valid = inside(boxes, height, width)
    objects = Objects(
        image_id=name,
        file_name=(tree.findtext("filename") or f"{name}.jpg").strip(),
        height=height,
        width=width,
        boxes=boxes,
        labels=np.array([label_of[category] for category, _, _ in found], np.int64),
        areas=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
        crowd=np.zeros(len(found), bool),
        difficult=np.array([difficult for _, _, difficult in found], bool),
        segmentations=(None,) * len(found),
    )
    return objects if valid.all() else objects[valid]


def _object(node: ElementTree.Element) -> tuple[str, list[float], bool]:
    box = [float(_text(node, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
    return _text(node, "name"), box, (node.findtext("difficult") or "0").strip() == "1"


def _text(node: ElementTree.Element, path: str) -> str:
    text = node.findtext(path)
    if text is None:
        raise ValueError(f"<{node.tag}> has no <{path.replace('/', '><')}>")
    return text.strip()
