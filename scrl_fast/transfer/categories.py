"""The classes of a detector: their names, and the numbers that COCO results are written with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from scrl_fast.errors import UsageError

# COCO's eighty things by ascending id; the ids between them stand for classes that COCO dropped
_COCO_NAMES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone"),
    *("microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear"),
    *("hair drier", "toothbrush"),
)
_COCO_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
_COCO_IDS = tuple(number for number in range(1, 91) if number not in _COCO_UNUSED)


class Categories(NamedTuple):
    """names, ids: by label, from 0; ids as the annotations number the classes."""

    names: tuple[str, ...]
    ids: tuple[int | str, ...]

    def to_plain(self) -> dict[str, list[Any]]:
        """What a checkpoint holds."""
        return {"names": list(self.names), "ids": list(self.ids)}


def categories_of(source: Any) -> Categories:
    """The classes of annotated images."""
    names = tuple(map(str, source.classes))
    return Categories(names, tuple(getattr(source, "category_ids", range(len(names)))))


def stored_categories(state: Mapping[str, Any], classes: int) -> Categories:
    """The classes of a checkpoint's detector: as the run stored them, else those of its task, else numbered.

    classes: of the detector. Runs of earlier releases store none.
    Raises UsageError where the stored names are not as many.
    """
    stored = state.get("categories")
    if stored is not None:
        found = Categories(tuple(stored["names"]), tuple(stored["ids"]))
        if not len(found.names) == len(found.ids) == classes:
            raise UsageError(f"the checkpoint names {len(found.names)} classes, its detector has {classes}")
        return found
    known = _of_task(str(state["config"].get("task", "")))
    if known is not None and len(known.names) == classes:
        return known
    return Categories(tuple(f"class {label}" for label in range(classes)), tuple(range(classes)))


def _of_task(task: str) -> Categories | None:
    if task in ("detection", "instance", "coco10"):
        return Categories(_COCO_NAMES, _COCO_IDS)
    if task == "keypoints":
        return Categories(("person",), (1,))
    if task == "voc":
        from scrl_fast.data.sources import voc

        return Categories(voc.CLASSES, tuple(range(len(voc.CLASSES))))
    if task == "cityscapes":
        from scrl_fast.data.sources import cityscapes

        return Categories(tuple(cityscapes.CLASSES), tuple(cityscapes.CLASSES.values()))
    return None
