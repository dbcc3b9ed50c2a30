"""What would end a transfer at some step, or after the last one, ends it before the first."""

from __future__ import annotations

import builtins
import contextlib
import copy
import io
import json

import numpy as np
import pytest
from PIL import Image
from tiny_data import HEIGHT, WIDTH, write_coco
from tiny_transfer import edited, transfer

from scrl_fast.data.image_files import BadImage
from scrl_fast.data.sources.coco import read_coco
from scrl_fast.errors import UsageError
from scrl_fast.transfer import checks
from scrl_fast.transfer.coco_metric import coco_average_precision
from scrl_fast.transfer.detections import Detections

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools, NumPy 2

BOTH = ("faster_coco_eval", "pycocotools")


def perfect(source):
    return [
        Detections(index, objects.boxes, np.ones(len(objects), np.float32), objects.labels)
        for index, objects in enumerate(source.objects)
    ]


def reference(document, found, source):
    """pycocotools on the file as it is, but for ids of annotations, 1 to N, and the two fields that it requires."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    document = copy.deepcopy(document)
    for number, annotation in enumerate(document["annotations"], 1):
        annotation["id"] = number
    rows = []
    for image, objects in zip(found, source.objects, strict=True):
        for (x0, y0, x1, y1), score, label in zip(
            image.boxes.tolist(), image.scores.tolist(), image.labels.tolist(), strict=True
        ):
            row = {"image_id": objects.image_id, "category_id": source.category_ids[label], "score": score}
            rows.append(row | {"bbox": [x0, y0, x1 - x0, y1 - y0]})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = document
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), evaluation.stats.tolist(), strict=False))


# ---- the ground truth that COCO's metric sees ----

IDS = {
    "1 to N": lambda n: n + 1,
    "from 0": lambda n: n,
    "again in each image": lambda n: n % 3,
    "all equal": lambda n: 1,
    "text": lambda n: f"a{n}",
    "missing": lambda n: None,
}


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("ids", IDS)
def test_average_precision_does_not_depend_on_ids_of_annotations(tmp_path, ids, backend):
    path = write_coco(tmp_path)
    document = json.loads(path.read_text())
    for n, annotation in enumerate(document["annotations"]):
        annotation.pop("id")
        if (number := IDS[ids](n)) is not None:
            annotation["id"] = number
    path.write_text(json.dumps(document))
    source = read_coco(str(tmp_path))
    found = perfect(source)
    assert coco_average_precision(str(path), found, source, backend=backend)["AP"] == pytest.approx(1)
    rng = np.random.default_rng(0)
    for image in found:
        image.boxes = image.boxes + rng.normal(0, 1.5, image.boxes.shape).astype(np.float32)
        image.scores = rng.random(len(image.scores)).astype(np.float32)
    result = coco_average_precision(str(path), found, source, backend=backend)
    assert 0.2 < result["AP"] < 0.9 and result == pytest.approx(reference(document, found, source))


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize(
    "edit",
    [
        lambda d: [a.pop(k) for a in d["annotations"] for k in ("area", "iscrowd", "segmentation", "id")],
        lambda d: [a.update(iscrowd=None, area=None) for a in d["annotations"]],
        lambda d: (
            [i.update(id=f"im{i['id']}") for i in d["images"]]
            + [a.update(image_id=f"im{a['image_id']}") for a in d["annotations"]]
        ),
        lambda d: (
            [c.update(id=f"c{c['id']}") for c in d["categories"]]
            + [a.update(category_id=f"c{a['category_id']}") for a in d["annotations"]]
        ),
        lambda d: (
            [i.update(id=i["id"] - 1000) for i in d["images"]]
            + [a.update(image_id=a["image_id"] - 1000) for a in d["annotations"]]
        ),
        lambda d: d["annotations"][0].update(bbox=[-40, -30, 60, 50]),  # no detection can reach beyond the image
        lambda d: d["annotations"][0].update(bbox=[5, 5, 0, 9]),  # nor find a box without an area
    ],
)
def test_perfect_boxes_have_an_average_precision_of_one(tmp_path, edit, backend):
    path = write_coco(tmp_path)
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    source = read_coco(str(tmp_path))
    found = [image for image, objects in zip(perfect(source), source.objects, strict=True) if not objects.crowd.any()]
    assert coco_average_precision(str(path), found, source, backend=backend)["AP"] == pytest.approx(1)
    assert coco_average_precision(str(path), found, source, "bbox", backend=backend)["AP50"] == pytest.approx(1)


# ---- before the first step ----


def refused(data_root, tmp_path, name, edit, message, task="detection", *more):
    with edited(data_root, tmp_path, name) as document:
        edit(document)
    with pytest.raises(UsageError, match=message):
        transfer(task, tmp_path / "data", tmp_path / "run", *more)
    assert not (tmp_path / "run").exists()


def half_size(document):
    for image in document["images"]:
        image.update(height=HEIGHT // 2, width=WIDTH // 2)
    for annotation in document["annotations"]:
        annotation["segmentation"] = []


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_images_of_another_size_end_it_before_the_first_step(data_root, tmp_path, split):
    name = f"instances_{split}.json"
    message = rf"{split}/0+1000\.jpg: has 48 x 64 pixels, but its boxes in .*{split}\.json are of an image of 24 x 32"
    refused(data_root, tmp_path, name, half_size, message)


def test_images_that_are_not_measured_are_not_compared(data_root, tmp_path):
    with edited(data_root, tmp_path, "instances_val2017.json") as document:
        document["images"][-1].update(height=HEIGHT // 2)
    run = transfer("detection", tmp_path / "data", tmp_path / "run", "--eval.images=2")
    with pytest.raises(BadImage, match="has 48 x 64 pixels"):
        run.data.val.read(len(run.data.val) - 1)


def test_a_large_set_is_compared_by_a_sample(data_root, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "SIZES_CHECKED", 2)
    source = read_coco(str(data_root), "val2017")
    seen, open_image = [], source.open
    monkeypatch.setattr(source, "open", lambda index: seen.append(index) or open_image(index))
    checks.check_sizes(source, range(5), 1)
    assert seen == [0, 3]


def test_an_image_that_cannot_be_read_is_left_to_its_step(data_root, tmp_path):
    source = read_coco(str(data_root), "val2017")
    source.folder = str(tmp_path)
    checks.check_sizes(source, range(5), 1)


@pytest.mark.parametrize(
    ("orientation", "size", "said"), [(3, (64, 48), True), (6, (48, 48), True), (6, (48, 64), False)]
)
def test_exif_that_no_size_tells_is_said(tmp_path, orientation, size, said):
    path = write_coco(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(tmp_path / "val2017/000000001000.jpg", exif=exif)
    document = json.loads(path.read_text())
    document["images"][0].update(
        width=size[0] if orientation < 5 else size[1], height=size[1] if orientation < 5 else size[0]
    )
    path.write_text(json.dumps(document))
    notes = checks.check_sizes(read_coco(str(tmp_path)), range(6), 1)
    assert len(notes) == said and (not said or "EXIF turns 1 of 6 images" in notes[0])


def forbid(monkeypatch, *names):
    plain = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.partition(".")[0] in names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)


@pytest.mark.parametrize(
    ("task", "missing", "message"),
    [
        ("detection", BOTH, r"average precision needs faster-coco-eval or pycocotools: pip install"),
        ("instance", ("pycocotools",), r"masks need pycocotools: pip install"),
        ("cityscapes", ("pycocotools",), r"masks need pycocotools: pip install"),
    ],
)
def test_the_evaluator_is_imported_before_the_first_step(data_root, tmp_path, monkeypatch, task, missing, message):
    forbid(monkeypatch, *missing)
    with pytest.raises(UsageError, match=message):
        transfer(task, data_root, tmp_path / "run")


def test_one_of_two_evaluators_is_enough(data_root, tmp_path, monkeypatch):
    forbid(monkeypatch, "faster_coco_eval")
    transfer("detection", data_root, tmp_path / "run")


def test_masks_to_measure_by_are_looked_for_before_the_first_step(data_root, tmp_path):
    def no_masks(document):
        for annotation in document["annotations"]:
            del annotation["segmentation"]

    refused(data_root, tmp_path, "instances_val2017.json", no_masks, r"none of its \d+ objects has a mask", "instance")


def test_notes_on_the_data_are_logged(data_root, tmp_path):
    with edited(data_root, tmp_path, "instances_val2017.json") as document:
        document["annotations"][0].update(bbox=[5, 5, 0, 0])
        document["annotations"][1].update(segmentation=[])
    run = transfer("instance", tmp_path / "data", tmp_path / "run")
    said = run.describe()[:2]
    assert "val2017.json: 1 of 12 boxes have no area" in said[0] and "1 objects have no mask; segm_AP" in said[1]


@pytest.mark.parametrize("task", ["detection", "instance", "keypoints", "voc", "cityscapes"])
def test_sound_data_are_not_commented_on(data_root, tmp_path, task):
    assert transfer(task, data_root, tmp_path / "run").data.notes == []
