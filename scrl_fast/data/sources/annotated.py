"""Images with annotated objects: the form in which COCO, VOC and Cityscapes reach evaluation and transfer."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scrl_fast.config.defaults import MAX_PIXELS
from scrl_fast.data.image_files import ImageLimits, read_file
from scrl_fast.data.sources.base import UNLABELLED, EncodedImages
from scrl_fast.errors import UsageError


@dataclass(frozen=True)
class Objects:
    """The annotated objects of one image; n may be 0. Row i of every field is the same object."""

    image_id: int | str
    """COCO: the image's id; VOC: the file's name without extension."""
    file_name: str
    """Path of the image, relative to the folder of images."""
    height: int
    """Of the image in pixels, as the annotations say."""
    width: int
    boxes: NDArray[np.float32]
    """``[n, 4]`` as x0, y0, x1, y1 in pixels, from 0, the far edge not included, clipped to the image; never empty."""
    labels: NDArray[np.int64]
    """``[n]``, 0 to classes - 1."""
    areas: NDArray[np.float32]
    """``[n]`` square pixels: COCO: of the mask, as annotated; VOC: of the box."""
    crowd: NDArray[np.bool_]
    """``[n]`` COCO's iscrowd: a region of many objects, not one. VOC has none."""
    difficult: NDArray[np.bool_]
    """``[n]`` VOC's difficult: left out of its evaluation. COCO has none."""
    segmentations: tuple[Any, ...]
    """``n`` masks as the file holds them (COCO: polygons, or a run-length dict); None where there is none."""
    keypoints: NDArray[np.float32] | None = None
    """``[n, K, 3]`` as x, y, visibility (0 not labelled, 1 hidden, 2 seen); None without keypoints."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, mask: NDArray[np.bool_]) -> Objects:
        """The objects where ``mask`` ``[n]`` is true."""
        chosen: dict[str, Any] = {f.name: getattr(self, f.name)[mask] for f in fields(self) if f.name in _ROWS}
        chosen["segmentations"] = tuple(self.segmentations[i] for i in np.flatnonzero(mask))
        chosen["keypoints"] = None if self.keypoints is None else self.keypoints[mask]
        return replace(self, **chosen)


_ROWS = ("boxes", "labels", "areas", "crowd", "difficult")


class AnnotatedImages(EncodedImages):
    """Images of one folder with their `Objects`, images without objects included; a `Source`, too.

    classes: names by label. category_ids: the file's own number of each label, which COCO results are written with.
    annotation_file: where the annotations were read: COCO's JSON file, VOC's list of images.
    `boxes` and `labels` give an image's objects as `scrl_fast.evaluate.roi_linear` takes them.
    """

    num_classes = 0  # of whole images: they have none

    def __init__(
        self,
        folder: str,
        objects: Sequence[Objects],
        classes: Sequence[str],
        *,
        annotation_file: str,
        category_ids: Sequence[int] = (),
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.folder, self.objects, self.classes = folder, list(objects), list(classes)
        self.annotation_file, self.max_pixels = annotation_file, max_pixels
        self.limits = ImageLimits(max_pixels=max_pixels)
        self.category_ids = list(category_ids) or list(range(len(self.classes)))

    def __len__(self) -> int:
        return len(self.objects)

    def data(self, index: int) -> bytes:
        return read_file(self.name_of(index), limit=self.limits.max_file_bytes)

    def name_of(self, index: int) -> str:
        return os.path.join(self.folder, self.objects[index].file_name)

    def label(self, index: int) -> int:
        return UNLABELLED

    def boxes(self, index: int) -> NDArray[np.float32]:
        """``[n, 4]`` as x0, y0, x1, y1 in pixels."""
        return self.objects[index].boxes

    def labels(self, index: int) -> NDArray[np.int64]:
        """``[n]``, the class of each box."""
        return self.objects[index].labels

    def only(self, keep: Callable[[Objects], NDArray[np.bool_]]) -> AnnotatedImages:
        """The same images with the objects for which ``keep`` is true: ``data.only(lambda o: ~o.crowd)``."""
        return self._with([objects[keep(objects)] for objects in self.objects])

    def subset(self, indices: Sequence[int]) -> AnnotatedImages:
        """Some of the images, in the order given."""
        return self._with([self.objects[i] for i in indices])

    def _with(self, objects: list[Objects]) -> AnnotatedImages:
        return AnnotatedImages(
            self.folder,
            objects,
            self.classes,
            annotation_file=self.annotation_file,
            category_ids=self.category_ids,
            max_pixels=self.max_pixels,
        )


def concatenate(parts: Sequence[AnnotatedImages]) -> AnnotatedImages:
    """Several sources of the same classes as one (VOC 2007 and 2012)."""
    objects = [
        replace(objects, file_name=part.name_of(index)) for part in parts for index, objects in enumerate(part.objects)
    ]
    first = parts[0]
    return AnnotatedImages(
        "",
        objects,
        first.classes,
        annotation_file=" + ".join(part.annotation_file for part in parts),
        category_ids=first.category_ids,
        max_pixels=first.max_pixels,
    )


def inside(boxes: NDArray[np.float32], height: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Boxes clipped to the image, and which of them still have an area (NaN has none)."""
    clipped = np.clip(boxes, 0, np.array([width, height, width, height], np.float32)).astype(np.float32)
    return clipped, (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])


def check_images_exist(folder: str, names: Sequence[str], annotation_file: str) -> None:
    """Raises UsageError naming the first image that the annotations promise and the folder lacks."""
    present = set(os.listdir(folder))  # one look at the folder instead of a hundred thousand at its files
    missing = [n for n in names if n not in present and not os.path.isfile(os.path.join(folder, n))]
    if missing:
        raise UsageError(
            f"{annotation_file} names {len(names)} images, of which {len(missing)} are not in {folder}; the first is "
            f"{os.path.join(folder, missing[0])}"
        )
