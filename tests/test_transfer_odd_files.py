"""Files from elsewhere where the commands of transfer expect a checkpoint, labels or names of classes."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from labelled_folders import LINE, coco_file, voc_part, write, yolo_part

from scrl_fast.data.sources.annotation_files import LONGEST_NAME, check_class_names
from scrl_fast.data.sources.layout import visible
from scrl_fast.data.sources.shared_images import shared_images
from scrl_fast.data.sources.yolo_layout import _names_beside, _read
from scrl_fast.errors import UsageError
from scrl_fast.transfer.__main__ import parse
from scrl_fast.transfer.compare.rows import fingerprint_of
from scrl_fast.transfer.custom import read_custom
from scrl_fast.transfer.trained import sizes_of
from scrl_fast.weights.pickles import ForeignObjectError

HTML = "<!DOCTYPE html><html>\nsign in\n"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_a_start_that_is_a_pipe_or_a_device_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "start.pt")
    assert fingerprint_of(str(tmp_path / "start.pt")) == "no checkpoint"  # returns at all
    assert fingerprint_of("/dev/zero") == "no checkpoint"


@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet"])
def test_a_detectors_scores_without_rows_are_no_classes(detector):
    names = ("roi_heads.box_predictor.cls_score.weight", "head.classification_head.cls_logits.weight")
    assert sizes_of(detector, dict.fromkeys(names, torch.tensor(1.0)))[0] == 1
    assert sizes_of(detector, dict.fromkeys(names, 3))[0] == 1


@pytest.mark.parametrize(("content", "kind"), [(HTML, "HTML"), (LFS, "Git LFS")])
def test_a_page_in_place_of_class_names_is_named(tmp_path, content, kind):
    (tmp_path / "classes.txt").write_text(content)
    with pytest.raises(UsageError, match=rf"classes\.txt holds no names of classes: .*{kind}"):
        _names_beside([str(tmp_path)])


@pytest.mark.parametrize("content", ["", "[1, 2]", "plain words"])
def test_a_data_yaml_that_is_no_table_is_named(tmp_path, content):
    (tmp_path / "data.yaml").write_text(content)
    with pytest.raises(UsageError, match=r"data\.yaml is no table"):
        _read(str(tmp_path / "data.yaml"))
    (tmp_path / "other.yaml").write_text(content)
    assert _read(str(tmp_path / "other.yaml")) is None


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UsageError, match="cannot be listed: Permission denied"):
        visible(str(tmp_path))


def test_a_class_name_of_a_pickle_can_be_printed():
    str(ForeignObjectError("\ud800.x")).encode()


# ---- images in both parts ----


def found(root, *more):
    return "\n".join(read_custom(parse(["custom", f"--data.root={root}", *more])).found)


@pytest.mark.parametrize("how", ["copied", "linked", "hard links", "moved up"])
def test_images_that_are_trained_on_and_measured_on_are_told(tmp_path, how):
    for part, first in (("train", 0), ("val", 9)):
        yolo_part(tmp_path / part / "images", tmp_path / part / "labels", 3, first=first)
    write(tmp_path / "data.yaml", "train: train/images\nval: val/images\nnames: [fish]\n")
    assert "are trained on" not in found(tmp_path)
    source, image = tmp_path / "train/images/1.jpg", tmp_path / "val/images/10.jpg"
    if how == "moved up":
        (tmp_path / "up").symlink_to(tmp_path / "train")
        write(tmp_path / "data.yaml", "train: train/images\nval: up/images\nnames: [fish]\n")
    else:
        image.unlink()
        {"copied": shutil.copy, "linked": lambda a, b: b.symlink_to(a), "hard links": os.link}[how](source, image)
    many = "all 3 images" if how == "moved up" else "1 of 3 images"
    assert f"{many} to measure on are trained on, too, such as " in found(tmp_path)
    assert ("does not tell" in found(tmp_path)) is (how == "moved up")


def test_other_layouts_tell_it_too(tmp_path):
    coco_file(tmp_path / "a/train.json", tmp_path / "a", 2)
    coco_file(tmp_path / "a/val.json", tmp_path / "b", 2)
    files = [
        f"--data.{part}={tmp_path}/a/{part}.json:{tmp_path}/{place}" for part, place in (("train", "a"), ("val", "b"))
    ]
    assert "all 2 images to measure on are trained on, too" in found(tmp_path, *files)
    voc_part(tmp_path / "voc/JPEGImages", tmp_path / "voc/Annotations", ["a", "b", "c"])
    write(tmp_path / "voc/ImageSets/Main/train.txt", "a\nb\n")
    write(tmp_path / "voc/ImageSets/Main/val.txt", "b\nc\n")
    assert "1 of 2 images to measure on are trained on, too" in found(tmp_path / "voc")


def test_images_of_one_size_in_bytes_are_not_taken_for_one_another(tmp_path):
    class Named(list):
        name_of = list.__getitem__

    for name, content in (("a", b"1" * 9000), ("b", b"2" * 9000), ("c", b""), ("d", b"")):
        (tmp_path / name).write_bytes(content)
    os.symlink(tmp_path / "nowhere", tmp_path / "e")
    places = {name: str(tmp_path / name) for name in "abcde"}
    one, other = Named([places["a"], places["c"], places["e"]]), Named([places["b"], places["d"]])
    assert shared_images(one, other, content=True) == []
    (tmp_path / "b").write_bytes(b"1" * 9000)
    assert (
        shared_images(one, other, content=False) == [] and "1 of 2 images" in shared_images(one, other, content=True)[0]
    )
    assert "all 3 images" in shared_images(one, one, content=False)[0] and shared_images(None, one, content=True) == []


def test_a_copy_is_found_among_images_that_differ_at_their_ends_alone(tmp_path):
    class Named(list):
        name_of = list.__getitem__

    for name, end in (("first", b"1"), ("second", b"2"), ("copy", b"1"), ("other", b"3")):
        (tmp_path / name).write_bytes(b"0" * 9000 + end)
    train = Named([str(tmp_path / name) for name in ("first", "second")])
    val = Named([str(tmp_path / name) for name in ("copy", "other")])
    (note,) = shared_images(train, val, content=True)
    assert "1 of 2 images" in note and "copy" in note


# ---- names of classes, and what labels are ----


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["fish", "a\x1b[2Jb"], r"class 1, 'a\\x1b\[2Jb', holds control characters"),
        (["a\nb"], "class 0, .* holds control characters"),
        (["a\ud800"], "holds control characters"),
        (["a", " "], "class 1, ' ', is empty"),
        (["a" * (LONGEST_NAME + 1)], f"at most {LONGEST_NAME} are taken"),
        (["a"] * 100_001, "100001 classes, at most 100000"),
    ],
)
def test_names_that_no_line_of_a_log_can_hold_are_refused(names, message):
    with pytest.raises(UsageError, match=rf"^here: .*{message}"):
        check_class_names("here", names)


def test_names_of_any_language_are_taken():
    assert check_class_names("here", ["Fisch", "魚", "a\u00a0b", "👩\u200d🚀", "Größe"]) == []
    assert check_class_names("here", ["a", "b", "a"]) == ["here: several classes are called 'a'"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nc: 999999\n", "nc is 999999, expected the number of classes, at most 100000"),
        ("nc: true\n", "nc is True"),
        ("nc: '2'\nnames: [a]\n", "nc is 2, but names holds 1"),
        ("nc: two\n", "nc is two, expected the number"),
        ("names: {0: a, 9998: b}\n", "names has 2 names for the classes 0 to 9998"),
        ("names: {0: a, 200000: b}\n", "names holds"),
        ("names: {'01': a, 1: b, 0: c}\n", "names holds"),
        ("names: {a: 0}\n", "names holds"),
        ("names: [yes, no]\n", "words such as no and null"),
        ("names: [a, null]\n", "words such as no and null"),
        ('names: ["a\\e[1m"]\n', "control characters"),
    ],
)
def test_classes_of_a_data_yaml_are_checked(tmp_path, text, message):
    yolo_part(tmp_path / "images", tmp_path / "labels", 1)
    write(tmp_path / "data.yaml", f"train: images\n{text}")
    with pytest.raises(UsageError, match=rf"data\.yaml: .*{message}"):
        found(tmp_path)


def test_numbers_of_classes_may_stand_in_quotes(tmp_path):
    yolo_part(tmp_path / "images", tmp_path / "labels", 6)
    write(tmp_path / "data.yaml", "train: images\nnc: '2'\nnames: {'0': a, '1': b}\n")
    assert read_custom(parse(["custom", f"--data.root={tmp_path}"])).train.classes == ["a", "b"]


def test_classes_of_one_name_are_told_and_cannot_be_chosen(tmp_path):
    yolo_part(tmp_path / "images", tmp_path / "labels", 4)
    write(tmp_path / "data.yaml", "train: images\nnames: [fish, fish]\n")
    assert "several classes are called 'fish'" in found(tmp_path)
    with pytest.raises(UsageError, match="several classes 'fish'"):
        found(tmp_path, "--data.classes=[fish]")


def test_a_link_to_nothing_is_no_image_without_objects(tmp_path):
    yolo_part(tmp_path / "images", tmp_path / "labels", 4)
    write(tmp_path / "classes.txt", "fish\n")
    (tmp_path / "labels/2.txt").unlink()
    (tmp_path / "labels/2.txt").symlink_to("../gone/2.txt")
    with pytest.raises(UsageError, match=r"labels/2\.txt is a link to \.\./gone/2\.txt, which is not there"):
        found(tmp_path)
    (tmp_path / "labels/2.txt").unlink()
    write(tmp_path / "labels/2.txt", LINE)
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "classes.txt").symlink_to("names")
    with pytest.raises(UsageError, match=r"classes\.txt is a link to names, which is not there"):
        found(tmp_path)
