"""Cityscapes instances in their official layout: ``ROOT/{leftImg8bit,gtFine}/SPLIT/CITY/*.png``.

An instance image holds ``1000 * class + number`` where there is an object, and the class alone where there is a group
of objects that nobody told apart (crowd here) or where objects are not counted (road, sky, ...). Layout and ids:
github.com/mcordts/cityscapesScripts.
"""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scrl_fast.config.defaults import MAX_PIXELS
from scrl_fast.data.image_files import DEFAULT_LIMITS, ImageLimits
from scrl_fast.data.sources.annotated import AnnotatedImages, Objects
from scrl_fast.data.sources.annotation_files import read_annotations
from scrl_fast.errors import UsageError

CLASSES = {"person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33}
VOID = frozenset([0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30])
"""Classes that the evaluation ignores: a detection over them is no mistake."""
INSTANCE, MOST_CLASSES = 1000, 256
IMAGE_SUFFIX, LABEL_SUFFIX = "_leftImg8bit.png", "_gtFine_instanceIds.png"


def read_cityscapes(
    root: str,
    split: str = "val",
    *,
    workers: int = 8,
    max_pixels: int | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> AnnotatedImages:
    """The images of one split with their instances; groups are kept and marked as crowd.

    ``segmentations`` are pairs (path of the instance image, the value it holds there), which `mask` turns into masks.
    limits: of the image files. max_pixels: in place of the one in limits.
    Raises UsageError naming the path that was expected.
    """
    images = os.path.join(root, "leftImg8bit", split)
    labels = os.path.join(root, "gtFine", split)
    for folder in (images, labels):
        if not os.path.isdir(folder):
            raise UsageError(f"no folder {folder}; expected in {root!r}: leftImg8bit/{split} and gtFine/{split}")
    names = sorted(path.relative_to(images).as_posix() for path in Path(images).glob(f"*/*{IMAGE_SUFFIX}"))
    if not names:
        raise UsageError(f"no images in {images}: expected CITY/*{IMAGE_SUFFIX}")
    labelled = {path.relative_to(labels).as_posix() for path in Path(labels).glob(f"*/*{LABEL_SUFFIX}")}
    lost = labelled - {name.removesuffix(IMAGE_SUFFIX) + LABEL_SUFFIX for name in names}
    notes = [f"{labels}: {len(lost)} instance images have no picture, such as {min(lost)}"] if lost else []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        objects = list(pool.map(lambda name: _objects(labels, name), names))
    return AnnotatedImages(
        images,
        objects,
        list(CLASSES),
        annotation_file=labels,
        category_ids=list(CLASSES.values()),
        limits=limits.with_pixels(max_pixels),
        notes=notes,
    )


def instance_image(path: str | os.PathLike[str]) -> NDArray[np.int32]:
    """Values of an instance image, int32 ``[H, W]``. Raises UsageError naming a file that is none or missing."""
    try:
        data = io.BytesIO(read_annotations(path, DEFAULT_LIMITS.max_file_bytes))
        with Image.open(data, formats=("PNG",)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels are more than {MAX_PIXELS}")
            values = np.asarray(picture)
    except FileNotFoundError:
        raise UsageError(f"no instance image at {path}, though the split has its picture") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if values.ndim != 2 or values.dtype.kind not in "iu":
        raise UsageError(f"{path} is no instance image: expected one channel of whole numbers, got {values.shape}")
    if values.size == 0 or values.min() < 0 or values.max() >= INSTANCE * MOST_CLASSES:
        raise UsageError(f"{path} is no instance image: it holds the value {int(values.max(initial=0))}")
    return values.astype(np.int32)


def mask(segmentation: tuple[str, int]) -> NDArray[np.uint8]:
    """Mask ``[H, W]`` of one instance, 0 or 1."""
    path, value = segmentation
    return (instance_image(path) == value).astype(np.uint8)


def label_path(labels: str, name: str) -> str:
    """The instance image of a picture; labels: ``gtFine/SPLIT``, name: ``CITY/..._leftImg8bit.png``."""
    return os.path.join(labels, name.removesuffix(IMAGE_SUFFIX) + LABEL_SUFFIX)


def class_of(value: int) -> int:
    """Class id of a value of an instance image."""
    return value // INSTANCE if value >= INSTANCE else value


def _objects(labels: str, name: str) -> Objects:
    path = label_path(labels, name)
    values = instance_image(path)
    label_of = {class_id: label for label, class_id in enumerate(CLASSES.values())}
    found = [int(v) for v in np.flatnonzero(np.bincount(values.ravel())) if class_of(int(v)) in label_of]
    boxes, areas = [], []
    for value in found:
        at = values == value
        rows, columns = np.flatnonzero(at.any(1)), np.flatnonzero(at.any(0))
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        areas.append(at.sum())
    count = len(found)
    return Objects(
        image_id=os.path.basename(name).removesuffix(IMAGE_SUFFIX),
        file_name=name,
        height=values.shape[0],
        width=values.shape[1],
        boxes=np.array(boxes, np.float32).reshape(count, 4),
        labels=np.array([label_of[class_of(value)] for value in found], np.int64),
        areas=np.array(areas, np.float32),
        crowd=np.array([value < INSTANCE for value in found], bool),
        difficult=np.zeros(count, bool),
        segmentations=tuple((path, value) for value in found),
    )
