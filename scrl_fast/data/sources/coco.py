"""COCO annotations in their official layout: ``ROOT/annotations/instances_SPLIT.json`` and ``ROOT/SPLIT/*.jpg``.

Labels are 0 to classes - 1 by ascending category id (COCO's 80 categories have ids up to 90). Format:
cocodataset.org/#format-data.
"""

from __future__ import annotations

import glob
import json
import os
from typing import Any

import numpy as np

from scrl_fast.data.sources.annotated import MAX_PIXELS, AnnotatedImages, Objects, check_images_exist, inside
from scrl_fast.errors import UsageError, did_you_mean

PARTS = ("images", "annotations", "categories")


def read_coco(
    root: str,
    split: str = "val2017",
    *,
    kind: str = "instances",
    annotation_file: str = "",
    image_folder: str = "",
    keep_segmentations: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> AnnotatedImages:
    """The images of one split with their objects; crowds are kept and marked, images without objects are kept.

    root: the folder that holds ``annotations`` and the folders of images.
    kind: ``instances``, or ``person_keypoints``, whose keypoints are read too.
    annotation_file, image_folder: in place of the official ``annotations/KIND_SPLIT.json`` and ``SPLIT``.
    keep_segmentations: False leaves the masks out (most of the memory of train2017).
    Boxes that are empty, or empty inside the image, are left out.
    Raises UsageError naming the path that was expected, and for a file that is not COCO's format.
    """
    file = annotation_file or os.path.join(root, "annotations", f"{kind}_{split}.json")
    folder = image_folder or os.path.join(root, split)
    _check_layout(root, file, folder)
    document = _load(file)
    categories = sorted(document["categories"], key=lambda c: c["id"])
    try:
        objects = _all_objects(
            document, file, {c["id"]: label for label, c in enumerate(categories)}, keep_segmentations
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{file} is not in COCO's format: {type(error).__name__}: {error}") from error
    check_images_exist(folder, [o.file_name for o in objects], file)
    return AnnotatedImages(
        folder,
        objects,
        [category["name"] for category in categories],
        annotation_file=file,
        category_ids=[category["id"] for category in categories],
        max_pixels=max_pixels,
    )


def _check_layout(root: str, file: str, folder: str) -> None:
    if not os.path.isdir(root):
        raise UsageError(f"COCO's folder {root!r} does not exist; expected in it: annotations/*.json and the images")
    if not os.path.isfile(file):
        others = sorted(glob.glob(os.path.join(glob.escape(os.path.dirname(file)), "*.json")))
        hint = did_you_mean(file, others) or (f"; there are: {', '.join(others[:6])}" if others else "")
        raise UsageError(f"no COCO annotations at {file}{hint}")
    if not os.path.isdir(folder):
        raise UsageError(f"no folder of images at {folder}, which {file} belongs to")


def _load(file: str) -> dict[str, Any]:
    try:
        with open(file, encoding="utf-8") as text:
            document = json.load(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not JSON: {error}") from error
    missing = [part for part in PARTS if not isinstance(document, dict) or not isinstance(document.get(part), list)]
    if missing:
        raise UsageError(f"{file} is not in COCO's format: it lacks a list of {', '.join(missing)}")
    if not document["images"]:
        raise UsageError(f"{file} names no images")
    return document


def _all_objects(document: dict[str, Any], file: str, label_of: dict[int, int], segmentations: bool) -> list[Objects]:
    found: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in document["images"]}
    for annotation in document["annotations"]:
        for key, known in (("image_id", found), ("category_id", label_of)):
            if annotation[key] not in known:
                raise UsageError(f"{file}: annotation {annotation.get('id')} has the unknown {key} {annotation[key]}")
        found[annotation["image_id"]].append(annotation)
    return [_objects(image, found[image["id"]], label_of, segmentations) for image in document["images"]]


def _objects(
    image: dict[str, Any], annotations: list[dict[str, Any]], label_of: dict[int, int], segmentations: bool
) -> Objects:
    count = len(annotations)
    boxes = np.array([annotation["bbox"] for annotation in annotations], np.float32).reshape(count, 4)
    boxes[:, 2:] += boxes[:, :2]  # COCO: x, y, width, height
    boxes, valid = inside(boxes, image["height"], image["width"])
    areas = [a.get("area", b[2] * b[3]) for a, b in ((a, a["bbox"]) for a in annotations)]
    objects = Objects(
        image_id=image["id"],
        file_name=image["file_name"],
        height=image["height"],
        width=image["width"],
        boxes=boxes,
        labels=np.array([label_of[annotation["category_id"]] for annotation in annotations], np.int64),
        areas=np.array(areas, np.float32),
        crowd=np.array([bool(annotation.get("iscrowd", 0)) for annotation in annotations], bool),
        difficult=np.zeros(count, bool),
        segmentations=tuple(a.get("segmentation") if segmentations else None for a in annotations),
        keypoints=_keypoints(annotations),
    )
    return objects if valid.all() else objects[valid]


def _keypoints(annotations: list[dict[str, Any]]) -> np.ndarray | None:
    rows = [np.array(annotation.get("keypoints", ()), np.float32).reshape(-1, 3) for annotation in annotations]
    most = max(map(len, rows), default=0)
    if not most:
        return None
    return np.stack([row if len(row) else np.zeros((most, 3), np.float32) for row in rows])
