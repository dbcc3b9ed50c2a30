"""COCO and VOC as they lie on disk: boxes, classes, crowds, difficult and empty ones, and errors that name the path."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from tiny_data import write_coco, write_voc, write_voc_object

from scrl_fast.data.sources.coco import read_coco
from scrl_fast.data.sources.voc import CLASSES, read_voc
from scrl_fast.errors import UsageError


def edited(path, edit):
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def test_coco_objects(tmp_path):
    write_coco(tmp_path, "val2017")
    data = read_coco(str(tmp_path), "val2017")
    assert data.classes == ["square", "disc", "bar"] and data.category_ids == [2, 7, 90]  # in the order of ids
    assert len(data) == 6 and len(data.objects[3]) == 0 and data.objects[3].boxes.shape == (0, 4)
    first = data.objects[0]
    document = json.loads((tmp_path / "annotations/instances_val2017.json").read_text())
    raw = [a for a in document["annotations"] if a["image_id"] == first.image_id]
    for i, annotation in enumerate(raw):
        x, y, w, h = annotation["bbox"]
        assert first.boxes[i].tolist() == [x, y, x + w, y + h]
        assert data.category_ids[first.labels[i]] == annotation["category_id"]
        assert first.segmentations[i] == annotation["segmentation"] and first.areas[i] == annotation["area"]
    assert sum(o.crowd.sum() for o in data.objects) == 1 and not any(o.difficult.any() for o in data.objects)
    assert data.read(0).shape == (first.height, first.width, 3) and data.name_of(0).endswith(first.file_name)


def test_crowds_can_be_left_out_and_images_chosen(tmp_path):
    write_coco(tmp_path, "val2017")
    data = read_coco(str(tmp_path))
    single = data.only(lambda o: ~o.crowd)
    assert len(single) == len(data) and not any(o.crowd.any() for o in single.objects)
    assert sum(map(len, single.objects)) == sum(map(len, data.objects)) - 1
    assert all(len(o.segmentations) == len(o) for o in single.objects)
    assert [o.image_id for o in data.subset([4, 1]).objects] == [data.objects[4].image_id, data.objects[1].image_id]


def test_coco_boxes_without_area_are_left_out_and_others_clipped(tmp_path):
    file = write_coco(tmp_path, "val2017")

    def edit(document):
        for annotation, box in zip(document["annotations"], ([5, 5, 0, 9], [-4, -6, 10, 10]), strict=False):
            annotation["bbox"] = box

    before = read_coco(str(tmp_path)).objects[0]
    edited(file, edit)
    after = read_coco(str(tmp_path)).objects[0]
    assert len(after) == len(before) - 1 and after.boxes[0].tolist() == [0, 0, 6, 4]
    assert after.labels.tolist() == before.labels[1:].tolist()


def test_coco_keypoints_and_leaving_masks_out(tmp_path):
    file = write_coco(tmp_path, "val2017")
    edited(file, lambda d: d["annotations"][0].update(keypoints=[1, 2, 2, 0, 0, 0]))
    file.rename(file.with_name("person_keypoints_val2017.json"))
    data = read_coco(str(tmp_path), kind="person_keypoints", keep_segmentations=False)
    assert data.objects[0].keypoints.shape == (len(data.objects[0]), 2, 3)
    assert data.objects[0].keypoints[0].tolist() == [[1, 2, 2], [0, 0, 0]] and not data.objects[0].keypoints[1:].any()
    assert data.objects[0].segmentations[0] is None and data.objects[1].keypoints is None


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda d: d.pop("categories"), "lacks a list of categories"),
        (lambda d: d["annotations"][0].update(image_id=99), "unknown image_id 99"),
        (lambda d: d["annotations"][0].update(category_id=5), "unknown category_id 5"),
        (
            lambda d: d["annotations"][0].update(bbox=[1, 2, 3]),
            r"annotation 1 has bbox \[1, 2, 3\], expected \[x, y, w",
        ),
        (lambda d: d["images"].clear(), "names no images"),
        (lambda d: d["images"][2].update(file_name="gone.jpg"), "1 are not in .*val2017; the first is .*gone.jpg"),
    ],
)
def test_coco_files_that_are_wrong_say_how(tmp_path, edit, says):
    edited(write_coco(tmp_path, "val2017"), edit)
    with pytest.raises(UsageError, match=says):
        read_coco(str(tmp_path))


def test_coco_layouts_that_are_wrong_name_the_path(tmp_path):
    with pytest.raises(UsageError, match="nowhere' does not exist"):
        read_coco(str(tmp_path / "nowhere"))
    write_coco(tmp_path, "val2017")
    with pytest.raises(UsageError, match=r"annotations/instances_val2071\.json; did you mean .*val2017"):
        read_coco(str(tmp_path), "val2071")
    (tmp_path / "val2017").rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"no folder of images at .*val2017"):
        read_coco(str(tmp_path))
    assert len(read_coco(str(tmp_path), image_folder=str(tmp_path / "elsewhere"))) == 6
    (tmp_path / "annotations/instances_val2017.json").write_text("[1, 2")
    with pytest.raises(UsageError, match="is not JSON"):
        read_coco(str(tmp_path), image_folder=str(tmp_path / "elsewhere"))


def test_voc_objects(tmp_path):
    write_voc(tmp_path, "test")
    data = read_voc(str(tmp_path))
    assert data.classes == list(CLASSES) and len(data) == 4
    first = data.objects[0]
    assert [data.classes[label] for label in first.labels] == ["cat", "dog"] and first.difficult.tolist() == [
        False,
        True,
    ]
    assert first.boxes[0].tolist() == [8, 11, 20, 31]  # in the file 9, 12, 20, 31: from 1, the last one included
    assert first.areas[0] == 12 * 20 and len(data.objects[2]) == 0 and not first.crowd.any()
    assert data.read(0).shape == (first.height, first.width, 3) and data.name_of(0).endswith("JPEGImages/000000.jpg")
    inner = read_voc(str(tmp_path / "VOC2007"))
    assert all(np.array_equal(a.boxes, b.boxes) for a, b in zip(inner.objects, data.objects, strict=True))


def test_voc_layouts_that_are_wrong_name_the_path(tmp_path):
    with pytest.raises(UsageError, match=r"expected .*VOC2007/Annotations"):
        read_voc(str(tmp_path))
    folder = write_voc(tmp_path, "test")
    with pytest.raises(UsageError, match=r"ImageSets/Main/tset\.txt; did you mean 'test'"):
        read_voc(str(tmp_path), "tset")
    (folder / "JPEGImages/000001.jpg").unlink()
    with pytest.raises(UsageError, match=r"the first is .*000001\.jpg"):
        read_voc(str(tmp_path))


def test_voc_files_that_are_wrong_say_how(tmp_path):
    folder = write_voc(tmp_path, "test")
    path = folder / "Annotations/000000.xml"
    write_voc_object(path, "catt", (9, 12, 20, 31))
    with pytest.raises(UsageError, match=r"000000\.xml: 'catt' is none of the 20 classes; did you mean 'cat'"):
        read_voc(str(tmp_path))
    assert read_voc(str(tmp_path), classes=["catt", *CLASSES]).objects[0].labels.tolist() == [0]
    path.write_text(path.read_text().replace("xmin", "left"))
    with pytest.raises(UsageError, match="<object> has no <bndbox><xmin>"):
        read_voc(str(tmp_path))
    path.write_text("<annotation>")
    with pytest.raises(UsageError, match="not in VOC's format"):
        read_voc(str(tmp_path))
    path.unlink()
    with pytest.raises(UsageError, match=r"no annotation at .*000000\.xml"):
        read_voc(str(tmp_path))


def test_images_without_objects_only(tmp_path):
    file = write_coco(tmp_path, "val2017")
    edited(file, lambda d: d["annotations"].clear())
    data = read_coco(str(tmp_path))
    assert sum(map(len, data.objects)) == 0 and Image.open(data.name_of(0)).size == (64, 48)
