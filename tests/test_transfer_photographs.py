"""Average precision on real annotations of VOC, difficult objects among them, and of COCO, computed a second way.

The second way reads the XML files by itself, keeps VOC's coordinates (from 1, the last pixel included) and follows the
development kit's VOCevaldet line by line. COCO's second way is pycocotools, on a document made from these files or on
COCO's own.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scrl_fast.data.sources.coco import read_coco
from scrl_fast.data.sources.voc import CLASSES, read_voc
from scrl_fast.transfer.coco_metric import coco_average_precision, ground_truth
from scrl_fast.transfer.detections import Detections
from scrl_fast.transfer.masks import mask_tools, masks_of
from scrl_fast.transfer.voc_metric import voc_average_precision

DATA = Path(__file__).parents[2] / "shared" / "data"
VOC, COCO = DATA / "voc2007" / "VOCdevkit", DATA / "coco_sample"
IMAGES = 300

pytestmark = [
    pytest.mark.skipif(not VOC.is_dir() or not COCO.is_dir(), reason=f"needs the photographs in {DATA}"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # pycocotools, NumPy 2
]


@pytest.fixture(scope="module")
def annotated():
    """For each image its name and objects (class, difficult, [xmin, ymin, xmax, ymax]), read by regular expressions."""
    folder = VOC / "VOC2007"
    names = (folder / "ImageSets/Main/test.txt").read_text().split()[:IMAGES]
    sides = ("xmin", "ymin", "xmax", "ymax")
    images = []
    for name in names:
        text = (folder / "Annotations" / f"{name}.xml").read_text()
        objects = []
        for part in re.findall(r"<object>.*?</object>", text, re.S):
            part = re.sub(r"<part>.*?</part>", "", part, flags=re.S)
            box = [float(re.search(rf"<{side}>(.*?)</{side}>", part)[1]) for side in sides]
            label = CLASSES.index(re.search(r"<name>(.*?)</name>", part)[1].strip())
            objects.append((label, re.search(r"<difficult>(.*?)</difficult>", part)[1].strip() == "1", box))
        images.append((name, objects))
    assert sum(difficult for _, objects in images for _, difficult, _ in objects) > 50
    return images


@pytest.fixture(scope="module")
def guesses(annotated):
    """Made detections in VOC's coordinates: near objects, twice on some, of other classes, anywhere."""
    rng = np.random.default_rng(7)
    rows = []
    for index, (_, objects) in enumerate(annotated):
        for label, _, box in objects:
            for _ in range(rng.choice([0, 1, 1, 1, 2])):
                side = np.array([box[2] - box[0], box[3] - box[1]] * 2)
                near = np.array(box) + rng.normal(0, 0.1, 4) * side
                guessed = label if rng.random() < 0.85 else int(rng.integers(len(CLASSES)))
                rows.append((index, guessed, rng.random() * 0.7 + 0.3, near))
        for _ in range(rng.integers(0, 3)):
            corner = rng.uniform(1, 150, 2)
            rows.append((index, int(rng.integers(20)), rng.random(), np.append(corner, corner + rng.uniform(9, 99, 2))))
    return [row for row in rows if (row[3][2:] > row[3][:2]).all()]


@pytest.fixture(scope="module")
def source():
    return read_voc(str(VOC)).subset(range(IMAGES))


@pytest.fixture(scope="module")
def found(guesses):
    """The same for our metrics: from 0, the far edge not included."""
    images = []
    for index in range(IMAGES):
        own = [row for row in guesses if row[0] == index]
        boxes = np.array([row[3] for row in own]).reshape(-1, 4) - [1, 1, 0, 0]
        scores, labels = [row[2] for row in own], [row[1] for row in own]
        images.append(Detections(index, boxes, np.array(scores), np.array(labels, np.int64)))
    return images


def voc_eval_det(annotated, guesses, label, least_overlap):
    """Recall and precision of a class as VOCevaldet computes them; None without an object to find."""
    truth = {}
    wanted = 0
    for index, (_, objects) in enumerate(annotated):
        own = [(box, difficult) for its, difficult, box in objects if its == label]
        truth[index] = [box for box, _ in own], [difficult for _, difficult in own], [False] * len(own)
        wanted += sum(not difficult for _, difficult in own)
    if not wanted:
        return None
    rows = sorted((row for row in guesses if row[1] == label), key=lambda row: -row[2])
    tp, fp = np.zeros(len(rows)), np.zeros(len(rows))
    for d, (index, _, _, bb) in enumerate(rows):
        boxes, difficult, detected = truth[index]
        most, at = -np.inf, -1
        for j, gt in enumerate(boxes):
            bi = [max(bb[0], gt[0]), max(bb[1], gt[1]), min(bb[2], gt[2]), min(bb[3], gt[3])]
            iw, ih = bi[2] - bi[0] + 1, bi[3] - bi[1] + 1
            if iw > 0 and ih > 0:
                union = (bb[2] - bb[0] + 1) * (bb[3] - bb[1] + 1) + (gt[2] - gt[0] + 1) * (gt[3] - gt[1] + 1) - iw * ih
                if iw * ih / union > most:
                    most, at = iw * ih / union, j
        if most < least_overlap:
            fp[d] = 1
        elif not difficult[at]:
            tp[d], fp[d] = (0, 1) if detected[at] else (1, 0)
            detected[at] = True
    tp, fp = tp.cumsum(), fp.cumsum()
    return tp / wanted, tp / np.maximum(fp + tp, 1)


def eleven_points(recall, precision):
    return (
        sum(
            max((p for r, p in zip(recall, precision, strict=True) if r >= t / 10 - 1e-12), default=0)
            for t in range(11)
        )
        / 11
    )


def area(recall, precision):
    mrec, mpre = [0.0, *recall, 1.0], [0.0, *precision, 0.0]
    for i in range(len(mpre) - 2, -1, -1):
        mpre[i] = max(mpre[i], mpre[i + 1])
    return sum((mrec[i + 1] - mrec[i]) * mpre[i + 1] for i in range(len(mrec) - 1))


def test_voc_average_precision_is_the_development_kits(annotated, guesses, source, found):
    result = voc_average_precision(found, source)
    by_threshold = []
    for least in np.arange(0.5, 1.0, 0.05):
        curves = [voc_eval_det(annotated, guesses, label, least) for label in range(len(CLASSES))]
        by_threshold.append(np.mean([eleven_points(*curve) for curve in curves if curve is not None]))
        if least == 0.5:
            areas = np.mean([area(*curve) for curve in curves if curve is not None])
    expected = {"AP": np.mean(by_threshold), "AP50": by_threshold[0], "AP75": by_threshold[5], "AP50_area": areas}
    assert 0.1 < expected["AP"] < expected["AP75"] + 0.3 and 0.3 < expected["AP50"] < 0.9
    assert result == pytest.approx(expected, abs=1e-6)


def test_difficult_objects_make_a_difference(source, found):
    """Were they objects like others, or none at all, the numbers would be others."""
    official = voc_average_precision(found, source)["AP50"]
    without = source.only(lambda objects: ~objects.difficult)
    assert abs(voc_average_precision(found, without)["AP50"] - official) > 1e-3
    alike = source.subset(range(IMAGES))
    alike.objects = [replace(objects, difficult=np.zeros_like(objects.difficult)) for objects in alike.objects]
    assert abs(voc_average_precision(found, alike)["AP50"] - official) > 1e-3


def test_coco_average_precision_is_that_of_pycocotools(annotated, guesses, source, found):
    rows = []
    for index, (_, objects) in enumerate(annotated):
        for label, _, (x0, y0, x1, y1) in objects:
            box = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]
            row = {"id": len(rows) + 1, "image_id": index, "category_id": label, "iscrowd": 0}
            rows.append(row | {"bbox": box, "area": box[2] * box[3]})
    document = {"info": {}, "images": [{"id": i} for i in range(IMAGES)], "annotations": rows}
    document["categories"] = [{"id": label} for label in range(len(CLASSES))]
    results = [
        {"image_id": i, "category_id": label, "score": score, "bbox": [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]}
        for i, label, score, (x0, y0, x1, y1) in guesses
    ]
    result = coco_average_precision(ground_truth(source), found, source)
    assert 0.1 < result["AP"] < 0.9
    assert list(result.values()) == pytest.approx(pycocotools_stats(document, results, "bbox")[:6], abs=1e-6)


def pycocotools_stats(document, results, kind):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = document
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


@pytest.mark.parametrize("backend", ["faster_coco_eval", "pycocotools"])
@pytest.mark.parametrize(
    ("kind", "file"), [("bbox", "instances"), ("segm", "instances"), ("keypoints", "person_keypoints")]
)
def test_average_precision_on_cocos_file_is_that_of_pycocotools(kind, file, backend):
    """Crowds, masks, keypoints and ids are COCO's own; nothing of a sound file is left out or commented on."""
    source = read_coco(str(COCO), "val2017", kind=file)
    document = json.loads(Path(source.annotation_file).read_text())
    assert source.notes == [] and sum(map(len, source.objects)) == len(document["annotations"])
    rng, found, results = np.random.default_rng(3), [], []
    for index, objects in enumerate(source.objects):
        objects = objects[~objects.crowd & (rng.random(len(objects)) < 0.9)]
        scores = rng.random(len(objects)).astype(np.float32)
        boxes = (objects.boxes + rng.normal(0, 4, objects.boxes.shape)).astype(np.float32)
        image = Detections(index, boxes, scores, objects.labels)
        if kind == "segm":
            masks = np.roll(masks_of(objects.segmentations, objects.height, objects.width), 2, axis=2)
            image.masks = [mask_tools().encode(np.asfortranarray(mask)) for mask in masks]
        if kind == "keypoints":
            points = objects.keypoints if objects.keypoints is not None else np.zeros((0, 17, 3), np.float32)
            image.keypoints = (points + rng.normal(0, 3, points.shape)).astype(np.float32)
        found.append(image)
        for i, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
            row = {"image_id": objects.image_id, "category_id": source.category_ids[objects.labels[i]]}
            row |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "score": float(scores[i])}
            row |= {"segmentation": image.masks[i]} if image.masks else {}
            results.append(row | ({"keypoints": image.keypoints[i].ravel().tolist()} if kind == "keypoints" else {}))
    result = coco_average_precision(source.annotation_file, found, source, kind, backend=backend)
    assert 0.05 < result["AP"] < 0.95
    assert list(result.values()) == pytest.approx(pycocotools_stats(document, results, kind)[: len(result)], abs=1e-9)
