"""Folders of labelled images in every layout that is found by itself, and the odd lines and boxes in them."""

from __future__ import annotations

import numpy as np
import pytest
from labelled_folders import BOX, HEIGHT, LINE, NAMES, WIDTH, coco_file, picture, voc_part, write, yolo_part

from scrl_fast.data.image_files import DEFAULT_LIMITS
from scrl_fast.data.sources.labelled_folder import find_labelled
from scrl_fast.data.sources.layout import role_of
from scrl_fast.data.sources.yolo import parse_line, read_yolo
from scrl_fast.errors import UsageError


def read_all(root, layout="auto"):
    """The kind of a folder, and each split by its role or name."""
    folder = find_labelled(str(root), layout)
    return folder, {split.role or split.name: split.read(folder.classes, DEFAULT_LIMITS) for split in folder.splits}


def check_square(source, count):
    assert len(source) == count and source.classes[0] == NAMES[0]
    for index in range(count):
        np.testing.assert_allclose(source.boxes(index), [BOX], atol=1e-4)
        assert source.read(index).shape == (HEIGHT, WIDTH, 3) and (source.read(index)[20, 20] > [180, 180, 0]).all()


# ---- YOLO ----


YAML = "train: {train}\nval: {val}\nnc: 2\nnames: ['fish', 'star fish']\n"


@pytest.mark.parametrize(
    "train, val, folders, text",
    [
        ("../train/images", "../valid/images", ("train/images", "valid/images"), YAML),  # Roboflow
        ("train", "val", ("train/images", "val/images"), YAML),
        ("images/train", "images/val", ("images/train", "images/val"), "path: .\n" + YAML),
        ("images/train", "images/val", ("sets/images/train", "sets/images/val"), "path: sets\n" + YAML),
        ("images/train", "images/val", ("images/train", "images/val"), "path: /not/here\n" + YAML),  # another machine's
        ("Images/train", "Images/val", ("Images/train", "Images/val"), YAML),
        ("flat/a", "flat/b", ("flat/a", "flat/b"), YAML),  # label files beside the images
        ("[images/train]", "images/val", ("images/train", "images/val"), YAML),
        ("a", "b", ("a", "b"), "train: {train}\nvalid: {val}\nnames: {{0: fish, 1: star fish}}\n"),
    ],
)
def test_data_yaml_finds_its_images_and_labels(tmp_path, train, val, folders, text):
    for at, folder in enumerate(folders):
        beside = folder.replace("images", "labels").replace("Images", "Labels")
        yolo_part(tmp_path / folder, tmp_path / beside, 3 - at)
    write(tmp_path / "data.yaml", text.format(train=train, val=val))
    folder, splits = read_all(tmp_path)
    assert (folder.kind, list(folder.classes)) == ("YOLO", NAMES) and set(splits) == {"train", "val"}
    check_square(splits["train"], 3)
    check_square(splits["val"], 2)
    assert not splits["train"].notes


def test_a_yaml_of_another_name_lists_images_and_a_test_folder_it_leaves_out(tmp_path):
    yolo_part(tmp_path / "images/all", tmp_path / "labels/all", 5)
    yolo_part(tmp_path / "test/images", tmp_path / "test/labels", 2)
    for name, numbers in (("train", "012"), ("val", "34")):
        write(tmp_path / f"{name}.txt", "".join(f"./images/all/{n}.jpg\n" for n in numbers))
    write(tmp_path / "fish.yaml", YAML.format(train="train.txt", val="val.txt"))
    write(tmp_path / "other.yaml", "lr: 0.1\n")
    _, splits = read_all(tmp_path)
    check_square(splits["train"], 3)
    check_square(splits["val"], 2)
    check_square(splits["test"], 2)
    assert not splits["train"].notes  # the labels of the others have their image


@pytest.mark.parametrize(
    "folders",
    [
        {"train": "images/train", "val": "images/val"},
        {"train": "train/images", "val": "valid/images"},
        {"train": "train", "val": "val"},
        {"images": "images"},
        {"images": "."},
    ],
)
def test_yolo_without_data_yaml(tmp_path, folders):
    for folder in folders.values():
        yolo_part(tmp_path / folder, tmp_path / folder.replace("images", "labels"), 2)
    folder, splits = read_all(tmp_path)
    assert folder.classes == ("class 0",) and folder.nameless and "they are numbered" in folder.notes[0]
    write(tmp_path / "classes.txt", "fish\nstar fish\n")
    folder, splits = read_all(tmp_path)
    assert set(splits) == set(folders) and not folder.nameless and not folder.notes
    for source in splits.values():
        check_square(source, 2)
        assert not source.notes


def test_boxes_and_polygons_in_one_file(tmp_path):
    outline = "1 0.2 0.25 0.6 0.25 0.6 0.75 0.2 0.75"
    yolo_part(tmp_path / "images", tmp_path / "labels", 1, f"0 0.5 0.5 1 1\n{outline}\n\n1.0 0.1 0.1 0.2 0.2")
    write(tmp_path / "classes.txt", "fish\nstar fish")
    _, splits = read_all(tmp_path)
    objects = splits["images"].objects[0]
    np.testing.assert_allclose(objects.boxes, [[0, 0, 60, 40], BOX, [0, 0, 12, 8]], atol=1e-4)
    assert objects.labels.tolist() == [0, 1, 1]
    assert objects.segmentations[0] is objects.segmentations[2] is None
    np.testing.assert_allclose(objects.segmentations[1], [[12, 10, 36, 10, 36, 30, 12, 30]], atol=1e-4)
    np.testing.assert_allclose(objects.areas, [2400, 480, 96], rtol=1e-4)


ODD_LINES = {
    "0 0.5 0.5 0.2": "fewer than 5 numbers",
    "0 0.5 0.5 0.2 0.2 0.9": "neither 5 numbers",
    "0 0.1 0.1 0.2 0.2 0.3": "neither 5 numbers",
    "0 0.5 nan 0.2 0.2": "NaN or infinity",
    "0 0.5 inf 0.2 0.2": "NaN or infinity",
    "0 0.5 0,5 0.2 0.2": "no number",
    "fish 0.5 0.5 0.2 0.2": "no number",
    "\0\0\1\2\3": "no number",
    "2 0.5 0.5 0.2 0.2": "none of 0 to 1",
    "-1 0.5 0.5 0.2 0.2": "none of 0 to 1",
    "0.5 0.5 0.5 0.2 0.2": "none of 0 to 1",
    "1e300 0.5 0.5 0.2 0.2": "none of 0 to 1",
    "0 24 20 24 20": "pixels?",
    "1 12 10 36 10 36 30": "pixels?",
}


@pytest.mark.parametrize("line", ODD_LINES)
def test_an_odd_line_is_left_out_and_named(tmp_path, line):
    yolo_part(tmp_path / "images", tmp_path / "labels", 2)
    write(tmp_path / "labels/1.txt", LINE + line)
    write(tmp_path / "classes.txt", "fish\nstar fish")
    _, splits = read_all(tmp_path)
    check_square(splits["images"], 2)
    (note,) = splits["images"].notes
    assert note.startswith("1 lines ") and ODD_LINES[line] in note and f"{tmp_path}/labels/1.txt:2" in note


def test_odd_lines_alone_are_refused(tmp_path):
    yolo_part(tmp_path / "images", tmp_path / "labels", 3, "0 24 20 24 20\n9 0.5 0.5 0.1 0.1\n")
    write(tmp_path / "classes.txt", "fish\n")
    with pytest.raises(UsageError, match=r"no line of its label files can be read. 3 lines .*\(pixels\?\).*0.txt:1"):
        read_all(tmp_path)


def test_boxes_outside_degenerate_and_repeated(tmp_path):
    lines = [
        *("0 0.5 0.5 0 0.2", "0 0.5 0.5 0.2 0", "0 0.5 0.5 -0.2 0.2", "0 1.5 0.5 0.2 0.2"),  # nothing of them remains
        *("0 0.0 0.5 0.4 0.5", "0 0.4 0.5 0.4 0.5", "0 0.4 0.5 0.4 0.5", "0 0.5 0.5 1.001 1"),
    ]
    yolo_part(tmp_path / "images", tmp_path / "labels", 1, "\r\n".join(lines))
    write(tmp_path / "classes.txt", "fish\n")
    _, splits = read_all(tmp_path)
    np.testing.assert_allclose(splits["images"].boxes(0), [[0, 10, 12, 30], BOX, [0, 0, 60, 40]], atol=1e-4)
    said = " ".join(splits["images"].notes)
    assert "4 boxes have no area inside their image and are left out; the first" in said and "0.txt:1" in said
    assert "1 lines repeat another line of their file and are left out; the first" in said and "0.txt:7" in said
    assert "1 of 7 boxes reach more than a pixel beyond their image and are clipped" in said


def test_images_without_labels_labels_without_images_and_damaged_images(tmp_path):
    yolo_part(tmp_path / "images", tmp_path / "labels", 3)
    picture(tmp_path / "images/bare.png")
    write(tmp_path / "labels/empty.txt", "")
    picture(tmp_path / "images/empty.png")
    write(tmp_path / "labels/lonely.txt", LINE)
    write(tmp_path / "images/broken.jpg", "<html>404</html>")
    write(tmp_path / "labels/broken.txt", LINE)
    write(tmp_path / "labels/classes.txt", "fish\nstar fish\n")
    _, splits = read_all(tmp_path)
    source = splits["images"]
    assert [len(objects) for objects in source.objects] == [1, 1, 1, 0, 0]
    said = "\n".join(source.notes)
    assert "1 images cannot be read and are left out" in said and "broken.jpg: is an HTML page" in said
    assert "1 images have no label file" in said
    assert f"1 label files have no image, such as {tmp_path}/labels/lonely.txt" in said and len(source.notes) == 3


@pytest.mark.parametrize(
    "text, message",
    [
        ("train: nowhere\nnames: [a]\n", "its train 'nowhere' is not there or holds no images; looked for .*/nowhere"),
        ("train: images\nnames: [a, b]\nnc: 3\n", "nc is 3, but names holds 2"),
        ("train: images\nnames: {a: 0}\n", "names holds"),
        ("train: images\nnames: 7\n", "names is 7"),
        ("train: {a: 1}\nnames: [a]\n", "train is"),
        ("train: images\nnames: [a]\nkpt_shape: 3\n", "kpt_shape is 3"),
        ("train: [images\n", "data.yaml"),
    ],
)
def test_a_wrong_data_yaml_is_named(tmp_path, text, message):
    yolo_part(tmp_path / "images", tmp_path / "labels", 1)
    write(tmp_path / "data.yaml", text)
    with pytest.raises(UsageError, match=message):
        read_all(tmp_path)


@pytest.mark.parametrize("there", [False, True])
def test_parts_that_an_export_names_but_does_not_have(tmp_path, there):
    yolo_part(tmp_path / "train/images", tmp_path / "train/labels", 2)
    if there:
        (tmp_path / "valid/images").mkdir(parents=True)
    write(
        tmp_path / "data.yaml", YAML.format(train="../train/images", val="../valid/images") + "test: ../test/images\n"
    )
    folder, splits = read_all(tmp_path)
    assert set(splits) == {"train"}
    assert [note.partition(": ")[2] for note in folder.notes] == [
        f"its {key} '../{name}/images' is not there or holds no images"
        for key, name in (("val", "valid"), ("test", "test"))
    ]


def test_text_beside_images_is_no_label_file_of_theirs(tmp_path):
    coco_file(tmp_path / "train/_annotations.coco.json", tmp_path / "train", 2)
    write(tmp_path / "train/licence.txt", "free")
    assert read_all(tmp_path)[0].kind == "COCO"


def test_files_for_poses_give_their_boxes(tmp_path):
    yolo_part(tmp_path / "images", tmp_path / "labels", 2, LINE.strip() + " 0.3 0.4 2 0.5 0.5 1\n")
    write(tmp_path / "data.yaml", "train: images\nnames: [fish]\nkpt_shape: [2, 3]\n")
    folder, splits = read_all(tmp_path)
    check_square(splits["train"], 2)
    assert "keypoints are not" in folder.notes[0]


def test_no_label_at_all_is_refused_with_where_it_was_looked_for(tmp_path):
    picture(tmp_path / "images/0.jpg")
    write(tmp_path / "data.yaml", "train: images\nnames: [fish]\n")
    with pytest.raises(UsageError, match=r"none of 1 images has a label file, such as .*/labels/0.txt or"):
        read_all(tmp_path)
    write(tmp_path / "labels/0.txt", "version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UsageError, match=r"0.txt is a Git LFS pointer"):
        read_all(tmp_path)


def test_parse_line_corners():
    assert parse_line("1 0.5 0.5 0.5 0.25", 2).corners == (0.25, 0.375, 0.75, 0.625)
    row = parse_line("0 0.5 0.25 0.75 0.5 0.25 0.75", 1)
    assert row.corners == (0.25, 0.25, 0.75, 0.75) and len(row.outline) == 6


# ---- COCO ----


def test_coco_in_the_folder_of_each_split(tmp_path):
    for name, count in (("train", 3), ("valid", 2), ("test", 1)):
        coco_file(tmp_path / name / "_annotations.coco.json", tmp_path / name, count)
    folder, splits = read_all(tmp_path)
    assert folder.kind == "COCO" and {split.name for split in folder.splits} == {"train", "valid", "test"}
    check_square(splits["train"], 3)
    check_square(splits["val"], 2)
    assert splits["train"].category_ids == [3, 4]


@pytest.mark.parametrize("prefix", ["", "images/"])
@pytest.mark.parametrize("train, val", [("train2017", "val2017"), ("my_train", "my_val"), ("train", "dev")])
def test_coco_official_under_any_name(tmp_path, prefix, train, val):
    for split, count in ((train, 3), (val, 2)):
        coco_file(tmp_path / f"annotations/instances_{split}.json", tmp_path / prefix / split, count)
    write(tmp_path / "annotations/captions_train2017.json", '{"images": [], "annotations": [], "categories": []}')
    _, splits = read_all(tmp_path)
    check_square(splits["train"], 3)
    check_square(splits["val"], 2)


def test_one_coco_file_beside_its_images(tmp_path):
    coco_file(tmp_path / "result.json", tmp_path / "images", 3)
    write(tmp_path / "notes.json", '{"who": "me"}')
    _, splits = read_all(tmp_path)
    check_square(splits["result"], 3)


# ---- VOC ----


def test_voc_devkit_with_lists(tmp_path):
    for year, names in (("2007", ["a", "b", "c"]), ("2012", ["d", "e"])):
        folder = tmp_path / "VOCdevkit" / f"VOC{year}"
        voc_part(folder / "JPEGImages", folder / "Annotations", names)
        write(folder / "ImageSets/Main/train.txt", "\n".join(names[:-1]))
        write(folder / "ImageSets/Main/val.txt", names[-1])
        write(folder / "ImageSets/Main/fish_train.txt", "a 1\nb -1\n")
    folder, splits = read_all(tmp_path)
    assert folder.kind == "VOC" and list(folder.classes) == NAMES
    check_square(splits["train"], 3)
    check_square(splits["val"], 2)


@pytest.mark.parametrize("images, annotations", [("JPEGImages", "Annotations"), ("images", "annotations"), (".", ".")])
def test_plain_voc_folders(tmp_path, images, annotations):
    voc_part(tmp_path / images, tmp_path / annotations, ["a", "b"], size=False)
    picture(tmp_path / images / "bare.png")
    folder, splits = read_all(tmp_path)
    assert folder.kind == "VOC" and list(folder.classes) == NAMES
    check_square(splits["all"], 2)
    assert "1 images have no XML file and are left out, such as bare.png" in "\n".join(splits["all"].notes)


def test_voc_lists_without_annotations_are_said(tmp_path):
    voc_part(tmp_path / "JPEGImages", tmp_path / "Annotations", ["a", "b"])
    write(tmp_path / "ImageSets/Main/train.txt", "a\nb\n")
    write(tmp_path / "ImageSets/Main/val.txt", "\n")
    write(tmp_path / "ImageSets/Main/test.txt", "x\ny\n")
    folder, splits = read_all(tmp_path)
    assert set(splits) == {"train"} and len(folder.notes) == 2
    assert "val.txt names no images" in " ".join(folder.notes) and "none of its images has an XML" in " ".join(
        folder.notes
    )
    write(tmp_path / "ImageSets/Main/train.txt", "z\n")
    with pytest.raises(UsageError, match=r"train.txt: none of its images has an XML file"):
        read_all(tmp_path)


def test_voc_in_the_folder_of_each_split(tmp_path):
    voc_part(tmp_path / "train", tmp_path / "train", ["a", "b"])
    voc_part(tmp_path / "valid", tmp_path / "valid", ["c"])
    _, splits = read_all(tmp_path)
    check_square(splits["train"], 2)
    check_square(splits["val"], 1)


@pytest.mark.parametrize(
    "box, kept", [((36, 10, 12, 30), 0), ((12, 10, 12, 30), 0), ((70, 5, 90, 9), 0), ((50, 5, 90, 9), 1)]
)
def test_voc_boxes_inverted_empty_or_outside(tmp_path, box, kept):
    voc_part(tmp_path / "JPEGImages", tmp_path / "Annotations", ["a"], box)
    _, splits = read_all(tmp_path)
    assert len(splits["all"].objects[0]) == kept
    assert ("clipped" if kept else "left out") in splits["all"].notes[-1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("<annotation>", r"/a.xml is not in VOC's format: no element"),
        ("<annotation><object/></annotation>", r"/a.xml is not in VOC's format: <object> has no <name>"),
        ("<html></html>", r"/a.xml is an HTML page .*, not an annotation in XML"),
    ],
)
def test_a_damaged_xml_file_is_named_once(tmp_path, text, message):
    voc_part(tmp_path / "JPEGImages", tmp_path / "Annotations", ["a", "b"])
    write(tmp_path / "Annotations/a.xml", text)
    with pytest.raises(UsageError, match=message) as error:
        read_all(tmp_path)
    assert str(error.value).count("a.xml") == 1


# ---- which one it is ----


def test_a_folder_in_a_folder_and_a_forced_layout(tmp_path):
    voc_part(tmp_path / "set/JPEGImages", tmp_path / "set/Annotations", ["a", "b"])
    assert read_all(tmp_path)[0].kind == "VOC"
    coco_file(tmp_path / "set/annotations.json", tmp_path / "set/JPEGImages", 2)
    assert read_all(tmp_path)[0].kind == "COCO"
    assert read_all(tmp_path, "voc")[0].kind == "VOC"
    with pytest.raises(UsageError, match=r"no data\.layout=yolo data set"):
        read_all(tmp_path, "yolo")


def test_no_labelled_images_says_what_is_there(tmp_path):
    for n in range(3):
        picture(tmp_path / f"{n}.jpg")
    with pytest.raises(UsageError, match=r"no labelled images in .*, which holds 3 images; expected YOLO"):
        read_all(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        read_all(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="which holds nothing"):
        read_all(tmp_path / "empty")


def test_roles():
    names = {"train2017": "train", "training": "train", "valid": "val", "val": "val", "instances_val2014": "val"}
    names |= {
        "dev": "val",
        "test": "test",
        "testing": "test",
        "my-train": "train",
        "all": "",
        "default": "",
        "trees": "",
    }
    assert {name: role_of(name) for name in names} == names


def test_limits_reach_the_reader(tmp_path):
    yolo_part(tmp_path / "images", tmp_path / "labels", 2)
    with pytest.raises(UsageError, match="can be read"):
        read_yolo(str(tmp_path), ["images/0.jpg"], NAMES, origin="x", limits=DEFAULT_LIMITS.with_pixels(100))
