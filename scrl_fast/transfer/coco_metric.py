"""COCO's average precision, by faster-coco-eval where it is installed, else (slower, same numbers) by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from scrl_fast.data import ImagesWithBoxes
from scrl_fast.data.sources.annotated import AnnotatedImages
from scrl_fast.data.sources.annotation_files import clip_boxes, far_outside
from scrl_fast.data.sources.coco import corners_of
from scrl_fast.data.sources.coco_document import read_document
from scrl_fast.data.sources.coco_fields import inside_mask
from scrl_fast.errors import UsageError
from scrl_fast.transfer.dataset import KEYPOINTS
from scrl_fast.transfer.detections import Detections
from scrl_fast.transfer.masks import areas_of, has_mask

IOU_THRESHOLDS = tuple(np.round(np.arange(0.5, 1.0, 0.05), 2).tolist())
"""Over which COCO averages."""
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
        except Exception:  # missing, or built for another NumPy: pycocotools gives the same numbers
            if backend != "auto":
                raise
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    except Exception as error:
        why = "" if isinstance(error, ModuleNotFoundError) else f" (pycocotools: {error})"
        raise UsageError(
            f"average precision needs faster-coco-eval or pycocotools: pip install 'scrl-fast[eval]'{why}"
        ) from error


def ground_truth(source: ImagesWithBoxes, kind: Kind = "bbox", *, ignore_difficult: bool = False) -> dict[str, Any]:
    """The objects of any images as a document in COCO's format; an image's id is its index, a category's its label.

    kind: ``segm`` and ``keypoints`` need annotated images; for ``segm`` objects without a mask are left out.
    ignore_difficult: VOC's difficult objects count neither way, as crowds do.
    """
    annotated = getattr(source, "objects", None)
    rows: list[dict[str, Any]] = []
    for index in range(len(source)):
        boxes, labels = source.boxes(index), source.labels(index)
        objects = None if annotated is None else annotated[index]
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) if objects is None else objects.areas
        ignored = np.zeros(len(labels), bool) if objects is None else objects.crowd
        if objects is not None and ignore_difficult:
            ignored = ignored | objects.difficult
        for place, ((x0, y0, x1, y1), label, area, crowd) in enumerate(
            zip(boxes.tolist(), labels.tolist(), areas.tolist(), ignored.tolist(), strict=True)
        ):
            row = {"image_id": index, "category_id": label, "area": area, "iscrowd": int(crowd)}
            row["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            if kind == "bbox" or objects is None:
                rows.append(row)
            elif kind == "keypoints":
                points = None if objects.keypoints is None else objects.keypoints[place].reshape(-1).tolist()
                rows.append(row | _keypoint_fields(points))
            elif has_mask(objects.segmentations[place]):
                rows.append(row | {"segmentation": areas_of(objects.segmentations[place])})
    classes = getattr(source, "classes", None)
    count = len(classes) if classes is not None else max((row["category_id"] for row in rows), default=0) + 1
    images = [{"id": i} | _size(annotated[i] if annotated is not None else None) for i in range(len(source))]
    return _document(images, rows, count)


def _size(objects: Any) -> dict[str, int]:
    return {} if objects is None else {"height": objects.height, "width": objects.width}


def _keypoint_fields(points: list[float] | None) -> dict[str, Any]:
    """Keypoints of a row and the number of those that are labelled; none are COCO's seventeen, unlabelled."""
    points = points or [0.0] * 3 * KEYPOINTS
    return {"keypoints": points, "num_keypoints": sum(value > 0 for value in points[2::3])}


def file_ground_truth(source: AnnotatedImages, kind: Kind = "bbox") -> dict[str, Any]:
    """What COCO's file says of these images, to the last digit, with ids as in `ground_truth`.

    Annotations are numbered from 1, since both packages lose objects whose ids are 0 or repeated. Objects without an
    area in their image are left out, as in training; for ``segm`` those without a mask, too.
    """
    content = read_document(source.annotation_file, segmentations=kind == "segm")
    place_of = {image.id: place for place, image in enumerate(content.images)}
    rows: list[dict[str, Any]] = []
    for index, objects in enumerate(source.objects):
        if objects.image_id not in place_of:
            raise UsageError(f"{source.annotation_file} was changed: it has no image {objects.image_id!r} any more")
        annotations = content.annotations[place_of[objects.image_id]]
        corners = corners_of(annotations)
        clipped, valid = clip_boxes(corners, objects.height, objects.width)
        far = far_outside(corners, clipped)
        for place in np.flatnonzero(valid).tolist():
            annotation = annotations[place]
            row: dict[str, Any] = {"image_id": index, "category_id": annotation.label, "area": annotation.area}
            row |= {"bbox": list(annotation.bbox), "iscrowd": int(annotation.crowd)}
            if far[place]:  # no detection reaches beyond the image
                x0, y0, x1, y1 = clipped[place].tolist()
                row["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            if kind == "segm":
                mask = inside_mask(annotation.segmentation, objects.height, objects.width)
                if not has_mask(mask):
                    continue
                row["segmentation"] = areas_of(mask)
            if kind == "keypoints":
                row |= _keypoint_fields(annotation.keypoints)
            rows.append(row)
    images = [{"id": i, "height": o.height, "width": o.width} for i, o in enumerate(source.objects)]
    return _document(images, rows, len(source.classes))


def _document(images: list[dict[str, Any]], rows: list[dict[str, Any]], classes: int) -> dict[str, Any]:
    return {
        "info": {},
        "images": images,
        "annotations": [{"id": number, **row} for number, row in enumerate(rows, 1)],
        "categories": [{"id": label, "name": str(label)} for label in range(classes)],
    }


def results(found: Sequence[Detections]) -> list[dict[str, Any]]:
    """Detections in COCO's format of results, with ids as in `ground_truth`."""
    rows = []
    for image in found:
        for i, (box, score, label) in enumerate(
            zip(image.boxes.tolist(), image.scores.tolist(), image.labels.tolist(), strict=True)
        ):
            x0, y0, x1, y1 = box
            row: dict[str, Any] = {"image_id": image.index, "category_id": label}
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

    truth: path of the file that ``source`` was read from, or a document of `ground_truth`; only images in ``found``
        count.
    Returns 0 to 1 by name; -1 where there is no object to find.
    """
    COCO, COCOeval = evaluator(backend)
    document = file_ground_truth(source, kind) if isinstance(truth, str) else truth
    with contextlib.redirect_stdout(io.StringIO()):  # both packages report every stage
        expected = _from_document(COCO, document)
        rows = results(found)
        nothing = {**document, "annotations": []}  # what loadRes makes of no rows is an error
        guesses = expected.loadRes(rows) if rows else _from_document(COCO, nothing)
        evaluation = COCOeval(expected, guesses, iouType=kind)
        evaluation.params.imgIds = sorted({image.index for image in found})
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(value) for name, value in zip(NAMES[kind], evaluation.stats, strict=False)}


def _from_document(cls: Any, document: dict[str, Any]) -> Any:
    coco = cls()
    coco.dataset = document
    coco.createIndex()
    return coco
