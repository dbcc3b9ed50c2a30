"""COCO annotations in their official layout: ``ROOT/annotations/instances_SPLIT.json`` and ``ROOT/SPLIT/*.jpg``.

Labels are 0 to classes - 1 by ascending category id (COCO's 80 categories have ids up to 90). Format:
cocodataset.org/#format-data.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from scrl_fast.data.image_files import DEFAULT_LIMITS, ImageLimits
from scrl_fast.data.sources.annotated import AnnotatedImages, Objects
from scrl_fast.data.sources.annotation_files import box_notes, clip_boxes, fill_sizes, find_images
from scrl_fast.data.sources.coco_document import Annotation, Document, read_document
from scrl_fast.data.sources.coco_fields import inside_mask
from scrl_fast.errors import UsageError, did_you_mean


def read_coco(
    root: str,
    split: str = "val2017",
    *,
    kind: str = "instances",
    annotation_file: str = "",
    image_folder: str = "",
    keep_segmentations: bool = True,
    max_pixels: int | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> AnnotatedImages:
    """The images of one split with their objects; crowds are kept and marked, images without objects are kept.

    root: the folder that holds ``annotations`` and the folders of images.
    kind: ``instances``, or ``person_keypoints``, whose keypoints are read too.
    annotation_file, image_folder: in place of the official ``annotations/KIND_SPLIT.json`` and ``SPLIT``.
    keep_segmentations: False leaves the masks out (most of the memory of train2017).
    limits: of the image files. max_pixels: in place of the one in limits.
    Sizes of images that the file does not know are read from the images. Boxes are clipped to their image and left out
    where nothing remains; ``notes`` of the result count them.
    Raises UsageError naming the path that was expected, or the row of the file that is wrong.
    """
    file = annotation_file or os.path.join(root, "annotations", f"{kind}_{split}.json")
    folder = image_folder or os.path.join(root, split)
    limits = limits.with_pixels(max_pixels)
    _check_layout(root, file, folder)
    document = read_document(file, segmentations=keep_segmentations)
    names, notes = find_images(folder, [image.file_name for image in document.images], file)
    stated = [image.size for image in document.images]
    sizes, more = fill_sizes(folder, names, stated, file, limits=limits)
    faults: Counter[str] = Counter()
    objects = [
        _objects(document, place, name, size, faults)
        for place, (name, size) in enumerate(zip(names, sizes, strict=True))
    ]
    return AnnotatedImages(
        folder,
        objects,
        document.classes,
        annotation_file=file,
        category_ids=document.category_ids,
        limits=limits,
        notes=[*document.notes, *notes, *more, *box_notes(file, faults)],
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


def corners_of(annotations: Sequence[Annotation]) -> NDArray[np.float64]:
    """Boxes ``[n, 4]`` as x0, y0, x1, y1; COCO has x, y, width, height."""
    boxes = np.array([annotation.bbox for annotation in annotations], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def _objects(document: Document, place: int, name: str, size: tuple[int, int], faults: Counter[str]) -> Objects:
    annotations, (height, width) = document.annotations[place], size
    for annotation in annotations:
        mask = annotation.segmentation
        if isinstance(mask, dict) and mask["size"] != [height, width]:
            rows, columns = mask["size"]
            raise UsageError(
                f"{document.file}: {annotation} has run lengths of {rows} x {columns} pixels, but its image {name} has "
                f"{height} x {width}"
            )
    boxes, valid = clip_boxes(corners_of(annotations), height, width, faults)
    objects = Objects(
        image_id=document.images[place].id,
        file_name=name,
        height=height,
        width=width,
        boxes=boxes,
        labels=np.array([annotation.label for annotation in annotations], np.int64),
        areas=np.array([annotation.area for annotation in annotations], np.float32),
        crowd=np.array([annotation.crowd for annotation in annotations], bool),
        difficult=np.zeros(len(annotations), bool),
        segmentations=tuple(inside_mask(annotation.segmentation, height, width) for annotation in annotations),
        keypoints=_keypoints(annotations),
    )
    return objects if valid.all() else objects[valid]


def _keypoints(annotations: Sequence[Annotation]) -> NDArray[np.float32] | None:
    rows = [np.array(annotation.keypoints or (), np.float32).reshape(-1, 3) for annotation in annotations]
    most = max(map(len, rows), default=0)
    if not most:
        return None
    return np.stack([row if len(row) else np.zeros((most, 3), np.float32) for row in rows])
