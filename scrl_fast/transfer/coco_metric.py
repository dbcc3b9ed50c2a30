"""COCO's average precision, by faster-coco-eval where it is installed, else (slower, same numbers) by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any, Literal

from scrl_fast.errors import UsageError
from scrl_fast.transfer.detections import Detections

Kind = Literal["bbox", "segm", "keypoints"]
NAMES: dict[str, tuple[str, ...]] = {
    "bbox": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "segm": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl"),
}


def evaluator(backend: str = "auto") -> tuple[Any, Any]:
    """The classes (COCO, COCOeval) of faster_coco_eval or pycocotools. Raises UsageError where neither is installed."""
    if backend in ("auto", "faster_coco_eval"):
        try:
            from faster_coco_eval import COCO, COCOeval_faster

            return COCO, COCOeval_faster
        except ImportError:
            pass
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    except ImportError as error:
        raise UsageError(
            "average precision needs faster-coco-eval or pycocotools: pip install 'scrl-fast[eval]'"
        ) from error


def ground_truth(source: Any) -> dict[str, Any]:
    """`ImagesWithBoxes` as a document in COCO's format; an image's id is its place, a category's its label."""
    objects = getattr(source, "objects", None)
    annotations: list[dict[str, Any]] = []
    labels: set[int] = set()
    for index in range(len(source)):
        boxes, found = source.boxes(index), source.labels(index)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) if objects is None else objects[index].areas
        crowd = [False] * len(found) if objects is None else objects[index].crowd
        for box, label, area, is_crowd in zip(boxes.tolist(), found.tolist(), areas.tolist(), crowd, strict=True):
            x0, y0, x1, y1 = box
            annotation = {"id": len(annotations) + 1, "image_id": index, "category_id": label, "area": area}
            annotations.append(annotation | {"bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": int(is_crowd)})
            labels.add(label)
    classes = getattr(source, "classes", None)
    count = len(classes) if classes is not None else max(labels, default=0) + 1
    return {
        "info": {},
        "images": [{"id": index} for index in range(len(source))],
        "annotations": annotations,
        "categories": [{"id": label, "name": str(label)} for label in range(count)],
    }


def results(found: Sequence[Detections], image_ids: Sequence[Any], category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Detections in COCO's format of results."""
    rows = []
    for image in found:
        for i, (box, score, label) in enumerate(
            zip(image.boxes.tolist(), image.scores.tolist(), image.labels.tolist(), strict=True)
        ):
            x0, y0, x1, y1 = box
            row: dict[str, Any] = {"image_id": image_ids[image.index], "category_id": category_ids[label]}
            row |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
            if image.masks is not None:
                counts = image.masks[i]["counts"]
                text = counts.decode() if isinstance(counts, bytes) else counts
                row["segmentation"] = {"size": [int(n) for n in image.masks[i]["size"]], "counts": text}
            if image.keypoints is not None:
                row["keypoints"] = image.keypoints[i].reshape(-1).tolist()
            rows.append(row)
    return rows


def coco_average_precision(
    truth: str | dict[str, Any],
    found: Sequence[Detections],
    source: Any,
    kind: Kind = "bbox",
    *,
    backend: str = "auto",
) -> dict[str, float]:
    """AP over IoU 0.5 to 0.95 (of boxes, masks, or keypoint similarity), and its companions.

    truth: path of the official annotation file, or what `ground_truth` gave; only images in ``found`` count.
    source: where ``found`` comes from: with a path it brings the file's own ids of images and categories.
    Returns 0 to 1 by name; -1 where there is no object to find.
    """
    COCO, COCOeval = evaluator(backend)
    if isinstance(truth, str):
        image_ids = [objects.image_id for objects in source.objects]
        category_ids = source.category_ids
    else:
        image_ids, category_ids = list(range(len(source))), [c["id"] for c in truth["categories"]]
    with contextlib.redirect_stdout(io.StringIO()):  # both packages report every stage
        expected = COCO(truth) if isinstance(truth, str) else _from_document(COCO, truth)
        rows = results(found, image_ids, category_ids)
        nothing = {**expected.dataset, "annotations": []}  # what loadRes makes of no rows is an error
        guesses = expected.loadRes(rows) if rows else _from_document(COCO, nothing)
        evaluation = COCOeval(expected, guesses, iouType=kind)
        evaluation.params.imgIds = sorted({image_ids[image.index] for image in found})
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(value) for name, value in zip(NAMES[kind], evaluation.stats, strict=False)}


def _from_document(cls: Any, document: dict[str, Any]) -> Any:
    coco = cls()
    coco.dataset = document
    coco.createIndex()
    return coco
