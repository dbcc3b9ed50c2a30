"""The data sets of evaluation: labelled images, and images with labelled boxes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scrl_fast.data import DemoScenes, ImageLimits, Source
from scrl_fast.data.sources.annotated import AnnotatedImages
from scrl_fast.data.sources.coco import read_coco
from scrl_fast.data.sources.files import class_folders
from scrl_fast.data.sources.labelled_parts import LabelledChoice, read_parts
from scrl_fast.data.sources.voc import CLASSES, read_voc
from scrl_fast.errors import UsageError
from scrl_fast.evaluate.batches import Say, silent
from scrl_fast.evaluate.data_config import ImageData, RegionData

DEMO_DIGIT = (1 / 3, 2 / 3)  # of the scene: one large digit, as the object of a photograph


class DigitImages:
    """Demo scenes of one large digit each, which is the image's class."""

    num_classes = 10
    classes = tuple("0123456789")

    def __init__(self, count: int, size: int, seed: int, split: Any) -> None:
        low, high = (round(size * share) for share in DEMO_DIGIT)
        scenes = DemoScenes(count, size, seed, split, digits=(1, 1), digit_size=(low, high))
        self.scenes, self.images = scenes, scenes.images
        self.name_of, self.read = scenes.name_of, scenes.read

    def __len__(self) -> int:
        return len(self.scenes)

    def label(self, index: int) -> int:
        return int(self.scenes.labels(index)[0])


def labelled_images(data: ImageData, seed: int) -> tuple[Source, Source]:
    """Training and test images with the same classes.

    Raises UsageError naming the folder that is missing, or the class folder that only one of them has.
    """
    if data.source == "demo":
        return (
            DigitImages(data.demo_images, data.demo_size, seed, "train"),
            DigitImages(data.demo_test, data.demo_size, seed, "test"),
        )
    if not os.path.isdir(data.root):
        raise UsageError(f"data.root={data.root!r} does not exist; expected in it: {data.train}/ and {data.test}/")
    sets = []
    for split in (data.train, data.test):
        folder = os.path.join(data.root, split)
        if not os.path.isdir(folder):
            raise UsageError(f"no folder {folder}: expected one folder a class in it, as in {folder}/n01440764/*.JPEG")
        sets.append(class_folders(folder, limits=ImageLimits.of(data)))
    train, test = sets
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[0]
        has, lacks = (train.root, test.root) if odd in train.classes else (test.root, train.root)
        raise UsageError(
            f"{train.root} has {len(train.classes)} classes and {test.root} {len(test.classes)}: "
            f"{os.path.join(has, odd)} has no counterpart in {lacks}"
        )
    return train, test


def labels_of(source: Source) -> NDArray[np.int64]:
    """The class of every image."""
    return np.array([source.label(index) for index in range(len(source))], np.int64)


def labelled_regions(data: RegionData, seed: int, say: Say = silent) -> tuple[Any, Any]:
    """Training and test images with labelled boxes: `DemoScenes`, or `ResizedImages` without crowds and empty images.

    say: is told what a labelled folder holds. Images of one size stand together, so that they make batches.
    Raises UsageError naming what is missing.
    """
    if data.source == "demo":
        return (
            DemoScenes(data.demo_images, data.demo_size, seed),
            DemoScenes(data.demo_test, data.demo_size, seed, "test"),
        )
    train, test = (_with_boxes(part, data) for part in _annotated_parts(data, say))
    if train.classes != test.classes:
        raise UsageError(
            f"{train.annotation_file} has {len(train.classes)} classes and {test.annotation_file} "
            f"{len(test.classes)}, or they differ by name: one classifier cannot serve both"
        )
    if data.source == "labelled":
        _check_classes(train)
    return train, test


def _annotated_parts(data: RegionData, say: Say) -> Sequence[AnnotatedImages]:
    """The images to train on and those to test on, with all their objects."""
    limits = ImageLimits.of(data)
    names = [name.strip() for name in data.classes.split(",")] if data.classes else []
    if data.source == "labelled":
        return _labelled_parts(data, names, limits, say)
    if data.source == "coco":
        splits = data.train or "train2017", data.test or "val2017"
        return [read_coco(data.root, split, keep_segmentations=False, limits=limits) for split in splits]
    splits = data.train or "trainval", data.test or "test"
    return [read_voc(data.root, split, year=data.year, classes=names or CLASSES, limits=limits) for split in splits]


def _labelled_parts(
    data: RegionData, names: Sequence[str], limits: ImageLimits, say: Say
) -> tuple[AnnotatedImages, AnnotatedImages]:
    parts = read_parts(
        LabelledChoice(
            data.root,
            train=data.train,
            val=data.test,
            layout=data.layout,
            classes=names,
            val_share=data.val_share,
            val_seed=data.val_seed,
            limits=limits,
            val_option="test",
            trained="the encoder",
        )
    )
    for line in dict.fromkeys([*parts.found, *parts.train.notes, *parts.val.notes]):
        say(line)
    return parts.train, parts.val


def _check_classes(train: ResizedImages) -> None:
    """Raises UsageError where every training box is of one class."""
    found = {label for index in range(len(train)) for label in train.labels(index).tolist()}
    if len(found) < 2:
        raise UsageError(
            f"{train.annotation_file}: all boxes to train on are {train.classes[found.pop()]!r}: there is nothing to "
            "tell apart: a classifier needs two classes; a detector (scrl_fast.transfer custom) needs one"
        )


def _with_boxes(found: AnnotatedImages, data: RegionData) -> ResizedImages:
    """The images that have boxes other than crowds, those of one size together."""
    found = found.only(lambda objects: ~objects.crowd)
    chosen = np.flatnonzero([len(objects) for objects in found.objects])[: data.max_images or None]
    if not len(chosen):
        raise UsageError(f"{found.annotation_file} holds no boxes in its {len(found)} images")
    heights, widths = np.array([(o.height, o.width) for o in found.objects]).T
    by_size = chosen[np.lexsort((chosen, widths[chosen], heights[chosen]))]
    return ResizedImages(found.subset(by_size.tolist()), data.short_side)


class ResizedImages:
    """Annotated images as `roi_linear` takes them, enlarged or shrunk to a shorter side of so many pixels (0: not).

    `areas` are those of the original images, by which COCO sorts objects into small, medium and large.
    """

    def __init__(self, images: AnnotatedImages, short_side: int = 0) -> None:
        self.images, self.short_side = images, short_side
        self.classes, self.annotation_file = images.classes, images.annotation_file
        self.name_of = images.name_of

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> NDArray[np.uint8]:
        """Raises BadImage, also for an image whose size is not the one that its annotations say."""
        from PIL import Image

        pixels = self.images.read(index)
        if self._scale(index) == 1:
            return pixels
        height, width = self.size_of(index)
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))

    def boxes(self, index: int) -> NDArray[np.float32]:
        height, width = self.size_of(index)
        objects = self.images.objects[index]
        ratio = np.array([width / objects.width, height / objects.height] * 2, np.float32)
        return self.images.boxes(index) * ratio

    def labels(self, index: int) -> NDArray[np.int64]:
        return self.images.labels(index)

    def areas(self) -> NDArray[np.float32]:
        """Square pixels of every object, in the order of the boxes."""
        return np.concatenate([objects.areas for objects in self.images.objects])

    def _scale(self, index: int) -> float:
        objects = self.images.objects[index]
        return self.short_side / min(objects.height, objects.width) if self.short_side else 1.0

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width of what `read` returns."""
        objects, scale = self.images.objects[index], self._scale(index)
        return max(1, round(objects.height * scale)), max(1, round(objects.width * scale))
