"""Average precision on detections made by hand, whose AP is known; targets and batches of the transfer tasks."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_tools
from tiny_data import HEIGHT, WIDTH, write_coco, write_voc
from tiny_transfer import write_cityscapes, write_keypoints

from scrl_fast.data.sources.cityscapes import read_cityscapes
from scrl_fast.data.sources.coco import read_coco
from scrl_fast.data.sources.voc import read_voc
from scrl_fast.transfer.cityscapes_metric import cityscapes_average_precision
from scrl_fast.transfer.coco_metric import coco_average_precision, ground_truth
from scrl_fast.transfer.dataset import Examples, aspect_ratio_batches, flip_horizontally
from scrl_fast.transfer.detections import Detections
from scrl_fast.transfer.masks import coco_mask, masks_of
from scrl_fast.transfer.metrics import measure
from scrl_fast.transfer.voc_metric import voc_average_precision

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools, NumPy 2


def encoded(mask):
    return mask_tools.encode(np.asfortranarray(mask.astype(np.uint8)))


def detections(index, boxes, scores, labels, **more):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return Detections(index, boxes, np.array(scores, np.float32), np.array(labels, np.int64), **more)


def perfect(source, masks=False, keypoints=False):
    """Everything that is there, crowds left out."""
    found = []
    for index, objects in enumerate(source.objects):
        keep = ~objects.crowd
        objects = objects[keep]
        more = {}
        if masks:
            more["masks"] = [encoded(m) for m in masks_of(objects.segmentations, objects.height, objects.width)]
        if keypoints:
            more["keypoints"] = np.zeros((0, 17, 3)) if not len(objects) else objects.keypoints
        found.append(detections(index, objects.boxes, np.ones(len(objects)), objects.labels, **more))
    return found


# ---- COCO ----


@pytest.fixture
def coco(tmp_path):
    write_coco(tmp_path)
    return read_coco(str(tmp_path))


@pytest.mark.parametrize("backend", ["faster_coco_eval", "pycocotools"])
def test_coco_known_values(tmp_path, backend):
    """One class, two objects a picture: the first found exactly, the second with an IoU of 0.72."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    objects = [[10, 10, 20, 20], [40, 10, 20, 20]]
    document = {
        "images": [{"id": 5, "file_name": "a.png", "height": 60, "width": 80}],
        "categories": [{"id": 18, "name": "dog"}],
        "annotations": [
            {"id": n + 1, "image_id": 5, "category_id": 18, "bbox": box, "area": 400, "iscrowd": 0}
            | {"segmentation": [[box[0], box[1], box[0] + 20, box[1], box[0] + 20, 30, box[0], 30]]}
            for n, box in enumerate(objects)
        ],
    }
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(document))
    Image.new("RGB", (80, 60)).save(tmp_path / "val2017" / "a.png")
    source = read_coco(str(tmp_path))
    found = [detections(0, [[10, 10, 30, 30], [40, 10, 60, 24.4]], [0.9, 0.8], [0, 0])]
    result = coco_average_precision(source.annotation_file, found, source, backend=backend)
    half = 51 / 101  # recall 0 to 0.5 of COCO's 101 points, at precision 1
    assert result["AP50"] == pytest.approx(1) and result["AP75"] == pytest.approx(half)
    assert result["AP"] == pytest.approx((5 + 5 * half) / 10)  # right at 0.5 to 0.7, half right at 0.75 to 0.95
    assert result["APs"] == result["AP"] and result["APm"] == -1
    masks = np.zeros((2, 60, 80))
    masks[0, 10:30, 10:30] = masks[1, 10:30, 40:60] = 1
    masks[1, 10:20, 40:51] = 0  # of 400 pixels 290 are left: an IoU of 0.725
    found[0].masks = [encoded(mask) for mask in masks]
    result = coco_average_precision(source.annotation_file, found, source, "segm", backend=backend)
    assert result["AP"] == pytest.approx((5 + 5 * half) / 10) and result["AP75"] == pytest.approx(half)


def test_coco_perfect_and_nothing(coco):
    assert coco_average_precision(coco.annotation_file, perfect(coco), coco)["AP"] == pytest.approx(1)
    nothing = [detections(index, [], [], []) for index in range(len(coco))]
    for backend in ("faster_coco_eval", "pycocotools"):
        for kind in ("bbox", "segm"):
            result = coco_average_precision(coco.annotation_file, nothing, coco, kind, backend=backend)
            assert result["AP"] == result["APs"] == 0 and result["APl"] == -1  # there is no large object to find
    assert coco_average_precision(coco.annotation_file, nothing[3:4], coco)["AP"] == -1  # this image has no object
    masks = coco_average_precision(coco.annotation_file, perfect(coco, masks=True), coco, "segm")
    assert masks["AP"] == pytest.approx(1)


def test_coco_crowds_are_no_mistakes(coco):
    found = perfect(coco)
    more = detections(1, [[0, 0, 20, 20]], [1.0], [int(coco.labels(1)[0])])  # on image 1's crowd, which covers it all
    crowded = found[1]
    found[1] = detections(
        1,
        np.concatenate([more.boxes, crowded.boxes]),
        np.concatenate([more.scores, crowded.scores * 0.5]),
        np.concatenate([more.labels, crowded.labels]),
    )
    crowd_box = coco.objects[1].boxes[coco.objects[1].crowd][0]
    found[1].boxes[0] = crowd_box
    assert coco_average_precision(coco.annotation_file, found, coco)["AP"] == pytest.approx(1)


def test_coco_only_measured_images_count(coco):
    found = perfect(coco)[:2]
    assert coco_average_precision(coco.annotation_file, found, coco)["AP"] == pytest.approx(1)


def test_ground_truth_of_other_regions_equals_the_file(coco):
    found = perfect(coco)
    for image in found:
        image.boxes[:, 2] += 2
    from_file = coco_average_precision(coco.annotation_file, found, coco)
    assert 0.2 < from_file["AP"] < 0.95
    assert coco_average_precision(ground_truth(coco), found, coco) == pytest.approx(from_file)


def test_keypoints(tmp_path):
    write_keypoints(tmp_path, "val2017")
    source = read_coco(str(tmp_path), kind="person_keypoints")
    found = perfect(source, keypoints=True)
    assert measure("keypoints", found, source)["keypoints_AP"] == pytest.approx(100)
    for image in found:
        image.keypoints[..., :2] += 40
    nobody = [detections(index, [], [], []) for index in range(len(source))]
    assert measure("keypoints", nobody, source)["keypoints_AP"] == 0
    result = measure("keypoints", found, source)
    assert result["keypoints_AP"] < 1 and result["bbox_AP"] == pytest.approx(100)


def test_keypoints_known_value(tmp_path):
    """Every point off by as much: the similarity is COCO's formula, and AP the share of thresholds below it."""
    write_keypoints(tmp_path, "val2017")
    source = read_coco(str(tmp_path), kind="person_keypoints")
    head, arm, leg = [26, 25, 25, 35, 35], [79, 79, 72, 72, 62, 62], [107, 107, 87, 87, 89, 89]
    spread = np.array(head + arm + leg) / 1000 * 2
    similarity = np.exp(-(1.4**2) / (2 * 20 * 36 * 0.6 * spread[:-1] ** 2)).mean()  # the last point has no label
    assert 0.76 < similarity < 0.79  # between two thresholds, six of ten below
    found = perfect(source, keypoints=True)
    for image in found:
        image.keypoints[..., 0] += 1.4
    assert measure("keypoints", found, source)["keypoints_AP"] == pytest.approx(60)


# ---- VOC ----


def boxes_of(*boxes, difficult=()):
    count = len(boxes)
    return SimpleNamespace(
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.zeros(count, np.int64),
        difficult=np.isin(np.arange(count), difficult),
    )


def voc(objects, found):
    return voc_average_precision(found, SimpleNamespace(classes=["cat"], objects=objects))


def test_voc_known_values():
    objects = [boxes_of([0, 0, 10, 10], [20, 0, 30, 10]), boxes_of([0, 0, 10, 10])]
    found = [  # right, wrong, right (a miss of one object)
        detections(0, [[0, 0, 10, 10], [50, 50, 60, 60]], [0.9, 0.8], [0, 0]),
        detections(1, [[0, 0, 10, 10]], [0.7], [0]),
    ]
    result = voc(objects, found)
    # precision 1 up to recall 1/3 (points 0 to 0.3), 2/3 up to recall 2/3 (0.4 to 0.6), nothing beyond
    assert result["AP50"] == pytest.approx((4 * 1 + 3 * 2 / 3) / 11) and result["AP"] == pytest.approx(result["AP50"])
    assert result["AP50_area"] == pytest.approx(1 / 3 + 2 / 9)


def test_voc_second_detection_of_an_object_is_wrong():
    found = [detections(0, [[0, 0, 10, 10], [0, 0, 10, 9]], [0.8, 0.9], [0, 0])]
    result = voc([boxes_of([0, 0, 10, 10])], found)
    assert result["AP50"] == pytest.approx(1) and result["AP50_area"] == pytest.approx(1)
    assert result["AP"] == pytest.approx((9 + 0.5) / 10)  # at 0.95 the better-scored one misses, then precision is 1/2


def test_voc_difficult_objects_count_neither_way():
    objects = [boxes_of([0, 0, 10, 10], [20, 0, 30, 10], difficult=[1])]
    both = detections(0, [[20, 0, 30, 10], [20, 0, 30, 10], [0, 0, 10, 10]], [0.9, 0.85, 0.8], [0, 0, 0])
    assert voc(objects, [both])["AP"] == pytest.approx(1)
    assert voc(objects, [detections(0, [], [], [])])["AP"] == 0
    assert voc([boxes_of([0, 0, 5, 5], difficult=[0])], [detections(0, [], [], [])])["AP"] == -1


def test_voc_from_files(tmp_path):
    write_voc(tmp_path)
    source = read_voc(str(tmp_path))
    found = perfect(source)
    result = voc_average_precision(found, source)
    assert result["AP"] == result["AP50_area"] == pytest.approx(1)
    found[0].boxes[:] = 0
    assert voc_average_precision(found, source)["AP50"] < 0.9


# ---- Cityscapes ----


@pytest.fixture
def cityscapes(tmp_path):
    write_cityscapes(tmp_path, "val")
    return read_cityscapes(str(tmp_path), "val")


def test_cityscapes_is_read(cityscapes):
    assert len(cityscapes) == 6 and cityscapes.category_ids[2] == 26
    crowds = [objects.crowd.sum() for objects in cityscapes.objects]
    assert sum(crowds) == 1 and sum(len(objects) for objects in cityscapes.objects) == 11
    objects = cityscapes.objects[0]
    assert objects.labels.tolist() == [0, 2] and objects.boxes.tolist() == [[44, 10, 56, 40], [4, 8, 28, 28]]
    assert objects.areas.tolist() == [360, 480]
    assert masks_of(objects.segmentations, HEIGHT, WIDTH).sum((1, 2)).tolist() == [360, 480]


def test_cityscapes_perfect(cityscapes):
    result = cityscapes_average_precision(perfect(cityscapes, masks=True), cityscapes)
    assert result["AP"] == result["AP_car"] == result["AP_person"] == pytest.approx(1) and result["AP_bus"] == -1
    found = perfect(cityscapes, masks=True)
    found[2] = detections(2, [[0, 0, 9, 9]], [2.0], [2], masks=[encoded(np.ones((HEIGHT, WIDTH)))])
    assert cityscapes_average_precision(found, cityscapes)["AP_car"] < 0.95  # in the picture without objects
    nothing = [detections(index, [], [], [], masks=[]) for index in range(6)]
    assert cityscapes_average_precision(nothing, cityscapes)["AP"] == 0


def square(y0, y1, x0, x1):
    mask = np.zeros((40, 60), np.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask


def city(tmp_path, values, guesses, label=2):
    """AP of one image; guesses are (score, mask)."""
    path = tmp_path / "a_gtFine_instanceIds.png"
    Image.fromarray(values.astype(np.uint16)).save(path)
    objects = SimpleNamespace(file_name="a_leftImg8bit.png")
    found = detections(
        *(0, np.zeros((len(guesses), 4)), [score for score, _ in guesses], [label] * len(guesses)),
        masks=[encoded(mask) for _, mask in guesses],
    )
    return cityscapes_average_precision([found], SimpleNamespace(objects=[objects], annotation_file=str(tmp_path)))


def test_cityscapes_known_values(tmp_path):
    values = np.full((40, 60), 7)
    values[0:20, 0:20], values[0:20, 30:50], values[30:35, 0:10] = 26001, 26002, 26003  # the last is below 100 pixels
    values[30:40, 30:60] = 26  # a group
    first, second = (0.9, square(0, 20, 0, 20)), (0.8, square(0, 20, 30, 44))  # the second with an IoU of 0.7
    assert city(tmp_path, values, [first, second])["AP50"] == pytest.approx(1)
    # beyond 0.65 the second is wrong: recall 1/2 at precision 1 and at 1/2; trapezoids over recall
    wrong = city(tmp_path, values, [first])["AP50"]
    assert wrong == pytest.approx(0.5 * 0.5 * (1 - 0) + 0.5 * 0.5)
    on_group, on_small = (0.95, square(30, 40, 30, 60)), (0.96, square(30, 35, 0, 10))
    assert city(tmp_path, values, [first, second, on_group, on_small])["AP50"] == pytest.approx(1)
    on_road = (0.97, square(22, 29, 0, 60))
    assert city(tmp_path, values, [first, second, on_road])["AP50"] < 0.8
    values[22:29] = 1  # ego vehicle: void
    assert city(tmp_path, values, [first, second, on_road])["AP50"] == pytest.approx(1)


CITY_IDS = (24, 25, 26, 27, 28, 31, 32, 33)


def random_city(path, rng, index):
    """One picture of random instances, groups and void, and guesses near them and anywhere."""
    values = np.full((120, 160), 7, np.int32)
    values[:10], values[10:20, :40] = 1, rng.choice([26, 24, 4, 29])
    guesses, count = [], {}
    for _ in range(rng.integers(0, 9)):
        its = int(rng.choice(CITY_IDS[:5]))
        count[its] = count.get(its, -1) + 1
        h, w = rng.integers(5, 50, 2)
        y, x = rng.integers(0, 120 - h), rng.integers(0, 160 - w)
        values[y : y + h, x : x + w] = its * 1000 + count[its]
        for _ in range(rng.integers(0, 3)):
            off, mask = rng.integers(-4, 5, 4), np.zeros((120, 160), np.uint8)
            mask[max(0, y + off[0]) : y + h + off[1], max(0, x + off[2]) : x + w + off[3]] = 1
            guessed = its if rng.random() < 0.9 else int(rng.choice(CITY_IDS))
            guesses.append((round(float(rng.random()), 2), guessed, mask))
    for _ in range(rng.integers(0, 4)):
        h, w = rng.integers(5, 40, 2)
        y, x = rng.integers(0, 120 - h), rng.integers(0, 160 - w)
        mask = np.zeros((120, 160), np.uint8)
        mask[y : y + h, x : x + w] = 1
        guessed = int(rng.choice(CITY_IDS))
        guesses.append((round(float(rng.random()), 2), guessed, mask))
    Image.fromarray(values.astype(np.uint16)).save(path / f"{index}_gtFine_instanceIds.png")
    guesses.sort(key=lambda guess: -guess[0])
    labels = [CITY_IDS.index(guessed) for _, guessed, _ in guesses]
    masks = [encoded(mask) for _, _, mask in guesses]
    return detections(index, np.zeros((len(guesses), 4)), [score for score, _, _ in guesses], labels, masks=masks)


@pytest.mark.parametrize(
    "seed, expected",  # what cityscapesScripts 2.3.0 gives for the same pictures and masks
    [
        (0, {"AP": 0.1306008277436849, "AP50": 0.3966329966329966, "AP_truck": 0.19427939124367696, "AP_train": -1}),
        (1, {"AP": 0.13199022621570294, "AP50": 0.34174061159040153, "AP_car": 0.2516440529053651}),
    ],
)
def test_cityscapes_equals_the_official_evaluation(tmp_path, seed, expected):
    rng = np.random.default_rng(seed)
    found = [random_city(tmp_path, rng, index) for index in range(14)]
    objects = [SimpleNamespace(file_name=f"{index}_leftImg8bit.png") for index in range(14)]
    result = cityscapes_average_precision(found, SimpleNamespace(objects=objects, annotation_file=str(tmp_path)))
    assert {name: result[name] for name in expected} == pytest.approx(expected)


# ---- targets ----


def test_masks_of_polygons_and_run_lengths():
    polygon = coco_mask([[2, 1, 6, 1, 6, 4, 2, 4]], 8, 10)
    assert polygon.shape == (8, 10) and polygon[1:4, 2:6].all() and polygon.sum() == 12
    assert np.array_equal(coco_mask(encoded(polygon), 8, 10), polygon)
    runs = {"size": [8, 10], "counts": [8, 8, 64]}
    assert coco_mask(runs, 8, 10)[:, 1].all() and coco_mask(runs, 8, 10).sum() == 8


def test_mirror():
    image = torch.arange(2 * 5).reshape(1, 2, 5)
    points = torch.zeros(1, 17, 3)
    points[0, 1] = torch.tensor([1.0, 1, 2])  # the left eye
    target = {"boxes": torch.tensor([[0.0, 0, 2, 2]]), "keypoints": points, "masks": image.bool()}
    flipped, result = flip_horizontally(image, target)
    assert flipped[0, 0].tolist() == [4, 3, 2, 1, 0] and result["boxes"].tolist() == [[3, 0, 5, 2]]
    assert result["keypoints"][0, 2].tolist() == [3, 1, 2] and not result["keypoints"][0, 1].any()
    again = flip_horizontally(flipped, result)[1]
    assert all(torch.equal(again[name], target[name]) for name in target)


def test_examples_leave_crowds_out_and_keep_people_with_points(coco, tmp_path):
    image, target = Examples(coco, masks=True)(1, 0)
    assert image.shape == (3, HEIGHT, WIDTH) and len(target["boxes"]) == len(target["masks"]) == 2
    assert target["labels"].min() >= 1
    write_keypoints(tmp_path, "val2017")
    people = read_coco(str(tmp_path), kind="person_keypoints")
    assert [len(Examples(people, keypoints=17)(i, 0)[1]["keypoints"]) for i in range(4)] == [1, 1, 0, 0]


def test_flips_depend_on_seed_epoch_and_image_alone(coco):
    examples = Examples(coco, flip=0.5, seed=3)
    first = [torch.equal(examples(i, e)[0], examples.image(i)) for e in range(4) for i in range(6)]
    assert first == [torch.equal(examples(i, e)[0], examples.image(i)) for e in range(4) for i in range(6)]
    assert 4 < sum(first) < 20


@settings(max_examples=40, deadline=None)
@given(wide=st.lists(st.booleans(), min_size=1, max_size=60), size=st.integers(1, 7), epoch=st.integers(0, 3))
def test_batches(wide, size, epoch):
    made = aspect_ratio_batches(wide, size, seed=1, epoch=epoch)
    assert len(made) == len(wide) // size and all(len(batch) == size for batch in made)
    used = [place for batch in made for place in batch]
    assert len(set(used)) == len(used) and made == aspect_ratio_batches(wide, size, seed=1, epoch=epoch)
    mixed = sum(len({wide[place] for place in batch}) > 1 for batch in made)
    assert mixed <= 1
