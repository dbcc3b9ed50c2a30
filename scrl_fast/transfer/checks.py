"""Checks of the data of a transfer before its first step: splits that suit each other, sizes, the metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from scrl_fast.data.image_files import BadImage
from scrl_fast.data.prefetch import prefetched
from scrl_fast.data.sources.annotated import SizeMismatch
from scrl_fast.errors import UsageError
from scrl_fast.transfer.config import TransferConfig
from scrl_fast.transfer.dataset import KEYPOINTS
from scrl_fast.transfer.detections import Detections
from scrl_fast.transfer.masks import has_mask, mask_tools
from scrl_fast.transfer.metrics import KINDS, measure

SIZES_CHECKED = 1000


def check_data(config: TransferConfig, train: Any, val: Any, indices: Sequence[int]) -> list[str]:
    """Find what would end the run only at some step, or after the last; returns what the user should know.

    train: None where nothing is trained; indices: the images to train on. Raises UsageError.
    """
    if config.model.detector == "mask_rcnn":
        mask_tools()
    count = min(config.eval.images or len(val), len(val))
    notes: list[str] = []
    for source, chosen in ((train, indices), (val, range(count))):
        notes += getattr(source, "notes", [])
        notes += check_sizes(source, chosen, config.data.workers)
    return list(
        dict.fromkeys([*notes, *check_metric(config.task, val, count, masks=config.model.detector == "mask_rcnn")])
    )


def check_splits(train: Any, val: Any, *, keypoints: bool) -> None:
    """Raise UsageError where the splits do not suit each other or, for keypoints, the detector. train may be None."""
    if train is not None:
        check_categories(train, val)
    for split in (val, train) if keypoints else ():
        if split is not None:
            check_keypoints(split)


def check_batch_size(batch_size: int, images: int, processes: int) -> None:
    """Raise UsageError unless so many images fill a batch, and the batch can be shared out evenly."""
    if batch_size > images:
        raise UsageError(f"train.batch_size={batch_size}: the data set has {images} images to train on")
    if batch_size % processes:
        raise UsageError(f"train.batch_size={batch_size}: must be a multiple of the {processes} processes")


def check_categories(train: Any, val: Any) -> None:
    """Raise UsageError naming the files when the two splits have different classes."""
    if list(train.classes) != list(val.classes) or list(train.category_ids) != list(val.category_ids):
        only = [name for name in train.classes if name not in val.classes]
        lacks = [name for name in val.classes if name not in train.classes]
        raise UsageError(
            f"the categories of {train.annotation_file} and {val.annotation_file} differ: "
            f"only in the first {only[:5]}, only in the second {lacks[:5]}"
            + ("" if only or lacks else "; the names agree, their ids do not")
        )


def check_keypoints(source: Any) -> None:
    """Raise UsageError when no object has keypoints, or not the number that COCO's metric is defined for."""
    counts = {objects.keypoints.shape[1] for objects in source.objects if objects.keypoints is not None}
    if counts != {KEYPOINTS}:
        said = f"objects have {', '.join(map(str, sorted(counts)))} keypoints" if counts else "no object has keypoints"
        raise UsageError(f"{source.annotation_file}: {said}, and COCO's metric is defined for a person's {KEYPOINTS}")


def check_sizes(source: Any, indices: Sequence[int], workers: int) -> list[str]:
    """Compare the annotated sizes of up to `SIZES_CHECKED` of the images, evenly spread, with the images themselves.

    Raises UsageError naming the first that differs; the others are compared as they are read. An image that cannot be
    read is left to the reading, which names it. Returns a note where EXIF turns images without changing their size:
    whether boxes were drawn before or after that, no size tells.
    """
    if getattr(source, "objects", None) is None:
        return []
    every = max(1, -(-len(indices) // SIZES_CHECKED))

    def turned(index: int) -> bool | SizeMismatch:
        try:
            image = source.open(index)
        except BadImage as error:
            return error if isinstance(error, SizeMismatch) else False
        return image.orientation in (2, 3, 4) or (image.orientation > 4 and image.height == image.width)

    looked = list(prefetched(turned, indices[::every], workers))
    for error in looked:
        if isinstance(error, SizeMismatch):
            raise UsageError(str(error)) from error
    if not any(looked):
        return []
    return [
        f"{source.annotation_file}: EXIF turns {sum(map(bool, looked))} of {len(looked)} images without changing their "
        "size; their boxes are taken to be those of the upright images"
    ]


def check_metric(task: str, source: Any, images: int = 0, *, masks: bool = False) -> list[str]:
    """Compute the metric once without detections, so that what it lacks is known before training; returns notes.

    images: measure on the first so many; 0: all. masks: the detector finds masks, which custom then measures.
    Raises UsageError.
    """
    kinds = KINDS.get(task, ())
    if task == "custom":
        kinds = ("bbox", "segm") if masks else ("bbox",)
    count = min(images or len(source), len(source)) if kinds else 1  # the others look at one image at a time
    none = np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64)
    notes = _check_masks(source) if "segm" in kinds else []
    try:
        measure(
            task, [Detections(index, *none, masks=[] if "segm" in kinds else None) for index in range(count)], source
        )
    except UsageError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise UsageError(f"{source.annotation_file}: its metric cannot be computed: {what}") from error
    return notes


def _check_masks(source: Any) -> list[str]:
    """Raise UsageError when no object has a mask to be measured by; a note when some have none."""
    have = [has_mask(s) for objects in source.objects for s in objects.segmentations]
    if have and not any(have):
        raise UsageError(f"{source.annotation_file}: none of its {len(have)} objects has a mask to measure segm_AP by")
    lacking = len(have) - sum(have)
    return [f"{source.annotation_file}: {lacking} objects have no mask; segm_AP leaves them out"] if lacking else []
