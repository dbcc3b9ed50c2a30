"""Images with annotated objects: the form in which COCO, VOC and Cityscapes reach evaluation and transfer."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scrl_fast.data.decode import Encoded
from scrl_fast.data.image_files import DEFAULT_LIMITS, BadImage, ImageLimits
from scrl_fast.data.sources.base import UNLABELLED, EncodedImages


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


class SizeMismatch(BadImage):
    """An image has another size than its annotations say, so that its boxes would lie elsewhere."""

    def __init__(self, image: Encoded, objects: Objects, annotation_file: str) -> None:
        turned = (image.height, image.width) == (objects.width, objects.height)
        hint = (
            "; was it turned after it was annotated? Where the boxes were drawn on the pixels as the file stores them, "
            "remove its EXIF orientation"
        )
        super().__init__(
            image.name,
            f"has {image.height} x {image.width} pixels, but its boxes in {annotation_file} are of an image of "
            f"{objects.height} x {objects.width}{hint if turned else ''}",
        )


class AnnotatedImages(EncodedImages):
    """Images of one folder with their `Objects`, images without objects included; a `Source`, too.

    classes: names by label. category_ids: the file's own number of each label, which COCO results are written with.
    annotation_file: where the annotations were read: COCO's JSON file, VOC's list of images.
    notes: one sentence for each oddity of the annotations, such as the number of boxes left out.
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
        category_ids: Sequence[int | str] = (),
        limits: ImageLimits = DEFAULT_LIMITS,
        notes: Sequence[str] = (),
    ) -> None:
        self.folder, self.objects, self.classes = folder, list(objects), list(classes)
        self.annotation_file, self.limits, self.notes = annotation_file, limits, list(notes)
        self.category_ids = list(category_ids) or list(range(len(self.classes)))

    def __len__(self) -> int:
        return len(self.objects)

    def name_of(self, index: int) -> str:
        return os.path.join(self.folder, self.objects[index].file_name)

    def open(self, index: int) -> Encoded:
        """Image `index` before it is decoded. Raises BadImage, SizeMismatch where the annotations say another size."""
        image, objects = super().open(index), self.objects[index]
        if (image.height, image.width) != (objects.height, objects.width):
            raise SizeMismatch(image, objects, self.annotation_file)
        return image

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
        return self.with_objects([objects[keep(objects)] for objects in self.objects])

    def subset(self, indices: Sequence[int]) -> AnnotatedImages:
        """Some of the images, in the order given."""
        return self.with_objects([self.objects[i] for i in indices])

    def with_objects(self, objects: Sequence[Objects], **changed: Any) -> AnnotatedImages:
        """These objects instead, an entry an image. changed: other arguments of the class that differ."""
        names = ("folder", "classes", "annotation_file", "category_ids", "limits", "notes")
        kept = {name: getattr(self, name) for name in names}
        return AnnotatedImages(objects=objects, **(kept | changed))


def concatenate(parts: Sequence[AnnotatedImages]) -> AnnotatedImages:
    """Several sources of the same classes as one (VOC 2007 and 2012)."""
    objects = [
        replace(objects, file_name=part.name_of(index)) for part in parts for index, objects in enumerate(part.objects)
    ]
    return parts[0].with_objects(
        objects,
        folder="",
        annotation_file=" + ".join(part.annotation_file for part in parts),
        notes=[note for part in parts for note in part.notes],
    )
