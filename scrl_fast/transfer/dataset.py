"""From annotated images to batches of a detector: targets, flips, batches of like orientation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scrl_fast.data.image_files import ImageLimits
from scrl_fast.data.sources.annotated import Objects, concatenate
from scrl_fast.errors import UsageError
from scrl_fast.transfer.config import TransferConfig, TransferDataConfig
from scrl_fast.transfer.masks import has_mask, masks_of

Target = dict[str, Tensor]
Example = tuple[Tensor, Target]

KEYPOINTS = 17
"""Keypoints of a person in COCO."""
KEYPOINT_PAIRS = ((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16))
"""Left and right of COCO's keypoints: eyes, ears, shoulders, elbows, wrists, hips, knees, ankles."""


# ---- what a task reads ----


def read_split(config: TransferConfig, split: str) -> Any:
    """The annotated images of a split, in the task's layout. Raises UsageError naming what is missing."""
    root, limits = config.data.root, ImageLimits.of(config.data)
    if config.task == "voc":
        from scrl_fast.data.sources.voc import read_voc

        parts = [part.partition("_") for part in split.split("+")]
        if any(not year.isdecimal() or not name for year, _, name in parts):
            raise UsageError(f"data split {split!r}: for voc it is YEAR_SPLIT, as in 2007_trainval+2012_trainval")
        return concatenate([read_voc(root, name, year=year, limits=limits) for year, _, name in parts])
    if config.task == "cityscapes":
        from scrl_fast.data.sources.cityscapes import read_cityscapes

        return read_cityscapes(root, split, workers=config.data.workers, limits=limits)
    from scrl_fast.data.sources.coco import read_coco

    kind = "person_keypoints" if config.task == "keypoints" else "instances"
    return read_coco(root, split, kind=kind, keep_segmentations=config.model.detector == "mask_rcnn", limits=limits)


def trainable(source: Any, config: TransferDataConfig, *, masks: bool = False, keypoints: bool = False) -> list[int]:
    """Indices of the images to train on: the subset, and of it those with objects (with masks, with keypoints).

    The subset is drawn before images without objects are left out, as a share of the published split.
    Raises UsageError when nothing is left.
    """
    count = len(source)
    chosen: NDArray[np.signedinteger] = np.arange(count)
    if config.subset < 1:
        order = np.random.default_rng([config.subset_seed, count]).permutation(count)
        chosen = np.sort(order[: max(1, round(config.subset * count))])
    needed = {"masks": masks, "keypoints": keypoints}
    kept = [i for i in chosen.tolist() if config.keep_empty or usable(source, i, **needed).any()]
    if not kept:
        what = "keypoints" if keypoints else "masks" if masks else "boxes (crowds do not count)"
        where = getattr(source, "annotation_file", "the training images")
        way_out = "--model.detector=faster_rcnn needs none" if masks else "--data.keep_empty=true takes them"
        raise UsageError(f"{where}: none of {len(chosen)} images has {what} to train on; {way_out}")
    return kept


def usable(source: Any, index: int, *, masks: bool = False, keypoints: bool = False) -> NDArray[np.bool_]:
    """Mask ``[n]`` of the objects to train on: no crowds; with ``masks``, ``keypoints`` only objects that have them."""
    objects = _objects(source, index)
    if objects is None:
        return np.ones(len(source.labels(index)), bool)
    keep = ~objects.crowd
    if masks:
        keep = keep & np.array([has_mask(segmentation) for segmentation in objects.segmentations], bool)
    if keypoints:
        points = objects.keypoints
        keep = keep & ((points[:, :, 2] > 0).any(1) if points is not None else False)
    return keep


def count_without_masks(source: Any, indices: Sequence[int]) -> int:
    """Number of objects in these images, crowds not counted, that have no mask to train on."""
    return sum(int((usable(source, i) & ~usable(source, i, masks=True)).sum()) for i in indices)


def _objects(source: Any, index: int) -> Objects | None:
    objects = getattr(source, "objects", None)
    return None if objects is None else objects[index]


# ---- examples ----


class Examples:
    """Images and targets in the form of torchvision's detectors.

    source: `ImagesWithBoxes`.
    first_label: what label 0 becomes: 1 where the detector counts background as 0.
    masks: targets hold ``masks`` uint8 ``[n, H, W]``.
    keypoints: number of keypoints of an object; above 0, targets hold ``keypoints`` float32 ``[n, K, 3]``.
    flip: probability of a horizontal flip, drawn from (seed, epoch, index) alone.
    """

    def __init__(
        self,
        source: Any,
        *,
        first_label: int = 1,
        masks: bool = False,
        keypoints: int = 0,
        flip: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.source, self.first_label, self.masks, self.keypoints = source, first_label, masks, keypoints
        self.flip, self.seed = flip, seed

    def image(self, index: int) -> Tensor:
        """uint8 ``[3, H, W]``."""
        return torch.tensor(self.source.read(index)).permute(2, 0, 1).contiguous()  # a copy: sources may share

    def __call__(self, index: int, epoch: int) -> Example:
        """One training example: image uint8 ``[3, H, W]``; boxes float32 ``[n, 4]``, labels int64 ``[n]``, ..."""
        image = self.image(index)
        keep = usable(self.source, index, masks=self.masks, keypoints=self.keypoints > 0)
        target: Target = {
            "boxes": torch.from_numpy(self.source.boxes(index)[keep].astype(np.float32)).reshape(-1, 4),
            "labels": torch.from_numpy(self.source.labels(index)[keep].astype(np.int64)) + self.first_label,
        }
        objects = _objects(self.source, index)
        if self.masks and objects is not None:
            found = [s for s, k in zip(objects.segmentations, keep, strict=True) if k]
            target["masks"] = torch.from_numpy(masks_of(found, objects.height, objects.width))
        if self.keypoints:
            points = objects.keypoints[keep] if objects is not None and objects.keypoints is not None else np.zeros(0)
            target["keypoints"] = torch.from_numpy(points.astype(np.float32)).reshape(-1, self.keypoints, 3)
        if self.flip and np.random.default_rng([self.seed, epoch, index]).random() < self.flip:
            return flip_horizontally(image, target)
        return image, target


def flip_horizontally(image: Tensor, target: Target) -> Example:
    """Image ``[3, H, W]`` and target flipped left to right; left and right keypoints change places."""
    width = image.shape[-1]
    result = dict(target)
    result["boxes"] = target["boxes"][:, [2, 1, 0, 3]] * torch.tensor([-1.0, 1, -1, 1]) + torch.tensor(
        [width, 0.0, width, 0]
    )
    if "masks" in target:
        result["masks"] = target["masks"].flip(-1)
    if "keypoints" in target:
        points = target["keypoints"].clone()
        points[..., 0] = torch.where(points[..., 2] > 0, width - 1 - points[..., 0], points[..., 0])
        order = list(range(points.shape[1]))
        for left, right in KEYPOINT_PAIRS if points.shape[1] == KEYPOINTS else ():
            order[left], order[right] = right, left
        result["keypoints"] = points[:, order]
    return image.flip(-1), result


# ---- order ----


def aspect_ratio_batches(wide: Sequence[bool], batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch as positions in ``wide``; images of one orientation share a batch, which saves padding.

    wide: whether each image is wider than high. There are always len(wide) // batch_size batches: the rest of both
    orientations makes one mixed batch if it is large enough.
    """
    rng = np.random.default_rng([seed, epoch, len(wide)])
    groups: dict[bool, list[int]] = {False: [], True: []}
    full: list[list[int]] = []
    for place in rng.permutation(len(wide)).tolist():
        group = groups[bool(wide[place])]
        group.append(place)
        if len(group) == batch_size:
            full.append(group.copy())
            group.clear()
    rest = groups[True] + groups[False]
    if len(rest) >= batch_size:
        full.append(rest[:batch_size])
    return full


def is_landscape(source: Any, index: int) -> bool:
    """Whether an image is wider than high; read from the image where the annotations give no size."""
    objects = _objects(source, index)
    height, width = (objects.height, objects.width) if objects is not None else source.read(index).shape[:2]
    return width > height
