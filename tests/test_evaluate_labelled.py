"""``roi-linear`` on folders of labels as people have them: what is found, what is said, and what is refused."""

from __future__ import annotations

import json

import pytest
from labelled_folders import LINE, NAMES, coco_file, voc_part, write, yolo_part
from test_evaluate import TINY, evaluate, refused
from tiny_data import write_coco

TWO = LINE + "1 0.1 0.15 0.18 0.25\n"
"""The yellow square, and a dark corner of another class."""
LABELLED = ["roi-linear", *TINY, "--workers=0", "--data.source=labelled"]


def write_yolo(root, parts=(("train", 8), ("valid", 3), ("test", 1)), text=TWO):
    for place, (part, count) in enumerate(parts):
        yolo_part(root / part / "images", root / part / "labels", count, text, first=100 * place)
    places = "".join(f"{'val' if part == 'valid' else part}: {part}/images\n" for part, _ in parts)
    write(root / "data.yaml", f"{places}names: [fish, star fish]\n")
    return root


def alternating(file):
    """Every other object of a COCO file becomes one of the second class."""
    document = json.loads(file.read_text())
    for row in document["annotations"]:
        row["category_id"] = 3 + row["image_id"] % 2
    file.write_text(json.dumps(document))


def test_a_yolo_folder_is_found_and_said_before_the_features(capsys, tmp_path):
    root = write_yolo(tmp_path / "data")
    write(root / "train/labels/0.txt", TWO + "7 0.5 0.5 0.1 0.1\n")
    line, document, said = evaluate(capsys, tmp_path, *LABELLED, f"--data.root={root}")
    result = document["result"]
    assert (result["train_boxes"], result["boxes"], result["accuracy"]) == (
        16,
        6,
        1.0,
    ) and "6 boxes of 2 classes" in line
    assert list(result["per_class"]) == NAMES and result["by_area"]["small"]["boxes"] == 6
    assert f"{root}/data.yaml: YOLO, 2 classes: fish, star fish" in said
    assert "to train on: train: 8 images, 16 boxes (fish 8, star fish 8)" in said
    assert "to measure on: val: 3 images, 6 boxes (fish 3, star fish 3)" in said
    assert "not used: test (--data.test=test measures on it)" in said
    assert "1 lines name a class that is none of 0 to 1 and are left out" in said
    tested = evaluate(capsys, tmp_path, *LABELLED, f"--data.root={root}", "--data.test=test", "--data.train=train+val")
    assert (tested[1]["result"]["train_boxes"], tested[1]["result"]["boxes"]) == (22, 2)


@pytest.mark.parametrize("layout", ["coco in the split's folder", "coco, official", "voc", "voc lists", "two files"])
def test_other_layouts_are_read(capsys, tmp_path, layout):
    root, more = tmp_path / "data", []
    if layout == "coco, official":
        for split, images in (("train_2026", 8), ("holdout-test", 5)):  # an image of each is empty, one has a crowd
            write_coco(root, split, images=images)
        boxes = (8 - 1) * 3 - 1, (5 - 1) * 3 - 1
    elif layout.startswith("voc"):
        voc_part(root / "JPEGImages", root / "Annotations", list("abcdefgh"))
        boxes = 6, 2
    else:
        for part, count in (("train", 6), ("valid", 2)):
            alternating(coco_file(root / part / "_annotations.coco.json", root / part, count))
        boxes = 6, 2
    if layout == "voc lists":
        write(root / "ImageSets/Main/trainval.txt", "\n".join("abcdef"))
        write(root / "ImageSets/Main/test.txt", "g\nh\n")
    if layout == "two files":
        parts = {"train": root / "train", "test": root / "valid"}
        more = [f"--data.{role}={place}/_annotations.coco.json:{place}" for role, place in parts.items()]
    where = [] if layout == "two files" else [f"--data.root={root}"]
    _, document, said = evaluate(capsys, tmp_path, *LABELLED, *where, *more, "--data.val_share=0.25")
    result = document["result"]
    assert (result["train_boxes"], result["boxes"]) == boxes and "to measure on: " in said
    split_off = "2 of 8 images are split off (--data.val_share=0.25 --data.val_seed=0) and not trained on"
    assert (split_off in said) == (layout == "voc")


def test_a_part_is_split_off_by_seed(capsys, tmp_path):
    root = write_yolo(tmp_path / "data", (("train", 10),))
    documents = [
        evaluate(capsys, tmp_path, *LABELLED, f"--data.root={root}", f"--data.val_seed={seed}") for seed in (0, 1)
    ]
    assert all(said.count("2 of 10 images are split off") == 1 for _, _, said in documents)
    assert all(document["result"]["boxes"] == 4 for _, document, _ in documents)


def test_classes_are_chosen_by_name(capsys, tmp_path):
    root = write_yolo(tmp_path / "data", text=TWO + "2 0.9 0.85 0.16 0.25\n")
    write(root / "data.yaml", "train: train/images\nval: valid/images\nnames: [fish, star fish, crab]\n")
    data = [*LABELLED, f"--data.root={root}"]
    _, document, said = evaluate(capsys, tmp_path, *data, "--data.classes=crab, fish")
    assert list(document["result"]["per_class"]) == ["crab", "fish"] and document["result"]["boxes"] == 6
    assert "8 objects are of other classes than data.classes" in said
    assert "has no class 'crap'; did you mean 'crab'" in refused(capsys, *data, "--data.classes=crap,fish")
    assert "all boxes to train on are 'fish': there is nothing to tell apart" in refused(
        capsys, *data, "--data.classes=fish"
    )


def test_refusals_name_the_option(capsys, tmp_path):
    root = write_yolo(tmp_path / "data")
    data = [*LABELLED, f"--data.root={root}"]
    assert "data.source=labelled needs --data.root" in refused(capsys, *LABELLED)
    coco = ["roi-linear", "--checkpoint=random", "--data.source=coco", "--data.root=x"]
    assert "data.classes=fish: not with source=coco" in refused(capsys, *coco, "--data.classes=fish")
    assert "data.layout=yolo: not with source=coco" in refused(capsys, *coco, "--data.layout=yolo")
    voc = [word.replace("coco", "voc") for word in coco]
    assert "data.val_share=0.3: not with source=voc; source=labelled" in refused(capsys, *voc, "--data.val_share=0.3")
    assert "data.val_seed=1: not with source=coco" in refused(capsys, *coco, "--data.val_seed=1")
    assert "data.year=2012: not with source=coco; source=voc" in refused(capsys, *coco, "--data.year=2012")
    assert "data.root='/nowhere' does not exist" in refused(capsys, *LABELLED, "--data.root=/nowhere")
    said = refused(capsys, *data, "--data.test=tset")
    assert "data.test=tset: " in said and "has no part 'tset'; did you mean 'test'" in said
    assert "data.train=vall: " in refused(capsys, *data, "--data.train=vall")
    assert "data.test=train: is what is trained on" in refused(capsys, *data, "--data.test=train", "--data.train=train")
    said = refused(capsys, *data, "--data.test=labels.json:pictures")
    assert "data.test=labels.json:pictures: names a file, so data.train must name one, too" in said
    train = coco_file(tmp_path / "coco/a.json", tmp_path / "coco/a", 2)
    said = refused(capsys, *data, f"--data.train={train}:{tmp_path}/coco/a", "--data.test=valid")
    assert "data.test=valid: expected FILE.json:FOLDER, as in the other of data.train and data.test" in said
    assert "no data.layout=voc data set" in refused(capsys, *data, "--data.layout=voc")
    assert "data.val_share=1.0: must be above 0 and below 1" in refused(capsys, *data, "--data.val_share=1")
    assert "data.val_seed=-1: must be" in refused(capsys, *data, "--data.val_seed=-1")
    for part in ("train", "valid_a", "valid_b"):
        yolo_part(tmp_path / "more" / part / "images", tmp_path / "more" / part / "labels", 2, TWO)
    write(tmp_path / "more/classes.txt", "fish\nstar fish\n")
    said = refused(capsys, *LABELLED, f"--data.root={tmp_path}/more")
    assert "several parts may be meant, name one by --data.test: valid_a, valid_b" in said


def test_images_in_both_parts_are_told(capsys, tmp_path):
    root = write_yolo(tmp_path / "data")
    write(root / "data.yaml", "train: train/images\nval: [train/images]\nnames: [fish, star fish]\n")
    said = evaluate(capsys, tmp_path, *LABELLED, f"--data.root={root}")[2]
    assert "all 8 images to measure on are trained on, too" in said
    assert "does not tell how the encoder does on other images" in said
