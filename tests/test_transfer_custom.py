"""The task custom: what it finds and says, parts and classes, the length that follows the data, the best checkpoint."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import yaml
from labelled_folders import LINE, NAMES, coco_file, voc_part, write, yolo_part
from tiny_transfer import SMALL

from scrl_fast.data.sources.labelled_parts import split_off
from scrl_fast.distributed.world import World
from scrl_fast.errors import UsageError
from scrl_fast.run import checkpoint
from scrl_fast.transfer.__main__ import main, parse
from scrl_fast.transfer.best import Best
from scrl_fast.transfer.coco_metric import ground_truth
from scrl_fast.transfer.custom import read_custom
from scrl_fast.transfer.metrics import measure
from scrl_fast.transfer.schedule import Pace, follow_data
from scrl_fast.transfer.trainer import Transfer
from scrl_fast.transfer.training_data import TransferData

SHORT = [o for o in SMALL if not o.startswith(("--train.steps", "--optim.lr_steps", "--optim.warmup", "--train.batch"))]


def options(root, *more):
    return parse(["custom", f"--data.root={root}", *more])


def read(root, *more):
    return read_custom(options(root, *more))


def names(source):
    return {objects.file_name for objects in source.objects}


@pytest.fixture
def yolo(tmp_path):
    """Six pictures to train on, two to measure on, one test picture that data.yaml leaves out."""
    root = tmp_path / "data"
    for part, count in (("train", 6), ("valid", 2), ("test", 1)):
        yolo_part(root / part / "images", root / part / "labels", count, LINE + "1 0.2 0.2 0.2 0.2\n")
    write(root / "train/labels/0.txt", "1 0.5 0.5 0 0.3\n7 0.5 0.5 0.1 0.1\n0 0.5 0.5 1 1\n")
    write(root / "data.yaml", "train: ../train/images\nval: ../valid/images\nnames: [fish, star fish]\n")
    return root


# ---- what is found ----


def test_what_was_found_is_said_before_it_begins(yolo, tmp_path, capsys):
    run = [f"--run.dir={tmp_path}/run", "--train.steps=2", "--train.batch_size=2", *SHORT]
    assert main(["custom", f"--data.root={yolo}", *run, f"--json={tmp_path}/out.json"]) == 0
    said = (tmp_path / "run/log.txt").read_text()
    assert f"{yolo}/data.yaml: YOLO, 2 classes: fish, star fish" in said
    assert "to train on: train: 6 images, 11 boxes (fish 6, star fish 5)" in said
    assert "to measure on: val: 2 images, 4 boxes (fish 2, star fish 2)" in said
    assert "not used: test (--data.val=test measures on it)" in said
    assert re.search(r"1 lines name a class that is none of 0 to 1 and are left out; the first: .*/0.txt:2", said)
    assert re.search(r"1 boxes have no area inside their image and are left out; the first: .*/0.txt:1", said)
    assert said.index("left out") < said.index("step 1")
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["data"]["classes"] == NAMES
    state = checkpoint.load(tmp_path / "run/checkpoints/last.pt")
    assert state["categories"]["names"] == NAMES and state["config"]["data"]["classes"] == NAMES
    assert json.loads((tmp_path / "out.json").read_text())["config"]["train"]["steps"] == 2


@pytest.mark.parametrize("layout", ["coco", "voc", "voc lists"])
def test_other_layouts_are_read(tmp_path, layout):
    if layout == "coco":
        for part, count in (("train", 4), ("valid", 2)):
            coco_file(tmp_path / part / "_annotations.coco.json", tmp_path / part, count)
    else:
        voc_part(tmp_path / "JPEGImages", tmp_path / "Annotations", list("abcdef"))
    if layout == "voc lists":
        write(tmp_path / "ImageSets/Main/trainval.txt", "a\nb\nc\nd\n")
        write(tmp_path / "ImageSets/Main/test.txt", "e\nf\n")
    data = read(tmp_path, "--data.val_share=0.34")
    assert (len(data.train), len(data.val)) == (4, 2) and data.train.classes == data.val.classes == NAMES
    assert ("split off" in data.val_name) == (layout == "voc")


def test_trainval_is_trained_on_only_where_nothing_else_is_validated_on(tmp_path):
    voc_part(tmp_path / "JPEGImages", tmp_path / "Annotations", list("abcdef"))
    for part, listed in {"train": "abc", "val": "de", "trainval": "abcde", "test": "f"}.items():
        write(tmp_path / f"ImageSets/Main/{part}.txt", "\n".join(listed))
    assert [len(part) for part in (read(tmp_path).train, read(tmp_path).val)] == [3, 2]
    data = read(tmp_path, "--data.train=train+val", "--data.val=test")
    assert [len(data.train), len(data.val)] == [5, 1]
    (tmp_path / "ImageSets/Main/val.txt").unlink()
    assert [len(part) for part in (read(tmp_path).train, read(tmp_path).val)] == [5, 1]


def test_files_and_folders_by_name(tmp_path):
    train = coco_file(tmp_path / "labels/a.json", tmp_path / "pictures", 5)
    val = coco_file(tmp_path / "labels/b.json", tmp_path / "others", 2)
    config = parse(["custom", f"--data.train={train}:{tmp_path}/pictures", f"--data.val={val}:{tmp_path}/others/"])
    data = read_custom(config)
    assert (len(data.train), len(data.val)) == (5, 2)
    data = read(tmp_path, "--data.train=labels/a.json:pictures")  # under data.root; a part is split off
    assert (len(data.train), len(data.val)) == (4, 1)
    official = coco_file(tmp_path / "annotations/instances_all.json", tmp_path / "all", 3)
    assert len(read(tmp_path, f"--data.train={official}", "--data.val_share=0.3").train) == 2
    with pytest.raises(UsageError, match=r"data.train must name one, too"):
        read(tmp_path, f"--data.val={official}")
    for wrong, message in {
        "labels/c.json:pictures": "there is no file labels/c.json",
        "labels/a.json:nowhere": "there is no folder nowhere",
    }.items():
        with pytest.raises(UsageError, match=message):
            read(tmp_path, f"--data.train={wrong}")
    with pytest.raises(UsageError, match=r"data.val=valid: expected FILE.json:FOLDER"):
        read(tmp_path, "--data.train=labels/a.json:pictures", "--data.val=valid")


def test_a_part_is_split_off_by_seed_and_said(tmp_path):
    yolo_part(tmp_path / "images", tmp_path / "labels", 20)
    first, again, other = (read(tmp_path, f"--data.val_seed={seed}") for seed in (0, 0, 1))
    assert (len(first.train), len(first.val)) == (16, 4) and not names(first.train) & names(first.val)
    assert names(first.val) == names(again.val) != names(other.val)
    assert "4 of 20 images are split off (--data.val_share=0.2 --data.val_seed=0)" in "\n".join(first.found)
    assert len(read(tmp_path, "--data.val_share=0.5").val) == 10
    copies = first.train.subset(range(4))
    copies.objects = [
        type(o)(**{**vars(o), "file_name": f"{n // 2}_jpg.rf.{n}.jpg"}) for n, o in enumerate(copies.objects)
    ]
    for part in split_off(copies, 0.5, 0):
        assert len({o.file_name.partition(".rf.")[0] for o in part.objects}) == 1 and len(part) == 2
    with pytest.raises(UsageError, match="1 pictures cannot be split"):
        split_off(first.train.subset([0]), 0.5, 0)


def test_parts_by_name_and_what_is_refused(yolo, tmp_path):
    for part in ("train", "test_a", "test_b"):
        yolo_part(tmp_path / "more" / part / "images", tmp_path / "more" / part / "labels", 2)
    with pytest.raises(UsageError, match=r"several parts may be meant, name one by --data.val: test_a, test_b"):
        read(tmp_path / "more")
    assert len(read(yolo, "--data.val=test").val) == 1
    with pytest.raises(UsageError, match=r"data.val=tset: .*has no part 'tset'.*test"):
        read(yolo, "--data.val=tset")
    with pytest.raises(UsageError, match=r"data.val=train: is what is trained on"):
        read(yolo, "--data.val=train")
    for task in ("detection", "voc", "cityscapes"):
        for option in ("val_share=0.3", "val_seed=1", "layout=yolo", "classes=[fish]"):
            name = option.partition("=")[0]
            with pytest.raises(UsageError, match=rf"data\.{name}=.*: not with the task {task}; the task custom has it"):
                parse([task, "--data.root=x", f"--data.{option}"])
            parse([task, "--data.root=x", f"--data.{option}", "--resume=x.pt"])  # as a run of an earlier release has it
    for wrong in ("--data.val_share=0", "--data.val_share=1", "--data.layout=csv"):
        with pytest.raises(UsageError, match="must be"):
            options(yolo, wrong)
    with pytest.raises(UsageError, match=r"needs --data.root"):
        parse(["custom"])


def test_images_of_both_parts_are_counted(yolo):
    write(yolo / "data.yaml", "train: [train/images, valid/images]\nval: valid/images\nnames: [fish, star fish]\n")
    assert "all 2 images to measure on are trained on, too" in "\n".join(read(yolo).found)


# ---- classes ----


def test_classes_are_chosen_by_name(yolo):
    data = read(yolo, "--data.classes=[star fish]")
    assert data.train.classes == ["star fish"] and sum(map(len, data.train.objects)) == 5
    assert {label for o in data.train.objects for label in o.labels.tolist()} == {0}
    assert "6 objects are of other classes than data.classes" in "\n".join(data.train.notes)
    assert read(yolo, "--data.classes=[star fish,fish]").val.labels(0).tolist() == [1, 0]
    with pytest.raises(UsageError, match=r"no class 'starfish', did you mean 'star fish'|no class 'starfish'"):
        read(yolo, "--data.classes=[starfish]")


def test_classes_without_names_get_them(yolo):
    (yolo / "data.yaml").unlink()
    assert read(yolo).train.classes[:2] == ["class 0", "class 1"]
    found = read(yolo).train.classes
    named = read(yolo, f"--data.classes={json.dumps([f'c{n}' for n in range(len(found))])}")
    assert named.train.classes[0] == "c0"
    with pytest.raises(UsageError, match="names 1 classes"):
        read(yolo, "--data.classes=[fish]")


def test_a_category_of_one_file_alone_is_refused(tmp_path):
    coco_file(tmp_path / "train/_annotations.coco.json", tmp_path / "train", 3)
    path = coco_file(tmp_path / "valid/_annotations.coco.json", tmp_path / "valid", 1)
    path.write_text(path.read_text().replace('"star fish"', '"crab"'))
    with pytest.raises(UsageError, match=r"categories of .*train.* and .*valid.* differ: .*star fish.*crab"):
        Transfer(options(tmp_path, *SHORT))


# ---- the length ----


@pytest.mark.parametrize(
    "given, images, steps, lr_steps, warmup",
    [
        ([], 448, 1008, (672, 896), 100),  # 36 passes
        ([], 10, 1000, (666, 888), 100),  # at least so many
        ([], 118_000, 36000, (24000, 32000), 1000),  # at most
        (["--train.passes=2"], 448, 56, (37, 49), 5),
        (["--train.passes=0.001"], 448, 1, (0, 0), 0),
        (["--train.steps_range=[10,500]"], 448, 500, (333, 444), 50),
        (["--train.steps=300"], 448, 300, (200, 266), 30),
        (["--train.steps=300", "--optim.lr_steps=[100,-1]", "--optim.warmup_steps=0"], 448, 300, (100, 266), 0),
    ],
)
def test_the_length_follows_the_data(given, images, steps, lr_steps, warmup):
    config = follow_data(options("x", *given), images)
    assert (config.train.steps, config.optim.lr_steps, config.optim.warmup_steps) == (steps, lr_steps, warmup)
    assert follow_data(config, 7) == config  # a run that goes on keeps its length


def test_other_tasks_keep_their_length():
    config = parse(["detection", "--data.root=x"])
    assert follow_data(config, 5) == config and config.train.steps == 90_000 and config.data.classes == ()


def test_the_small_recipe_lies_beneath_the_command_line():
    plain = parse(["custom", "--data.root=x"])
    small = parse(["custom", "--config=small", "--data.root=x", "--train.steps=7"])
    assert (small.train.steps, small.model.short_side, small.train.batch_size) == (7, (192, 192), 4)
    assert small.data == plain.data and small.optim.lr_steps == plain.optim.lr_steps == (-1, -1)


def test_a_batch_of_more_than_all_images_is_made_smaller(yolo):
    data = TransferData(options(yolo, "--model.backbone=resnet10_tiny"), World(), "cpu")
    assert data.config.train.batch_size == 6 and "train.batch_size=16" in "\n".join(data.notes)
    assert data.config.data.classes == ("fish", "star fish")


def test_the_pace_is_said_once(monkeypatch):
    clock = iter(range(0, 1000, 30))
    monkeypatch.setattr("scrl_fast.transfer.schedule.time.monotonic", lambda: next(clock) / 4)
    pace = Pace(1000)
    said = [pace.step_done(step) for step in range(101, 112)]
    assert said[4] == "the remaining 895 steps take about 27m58s here (1.9 s a step), measuring not counted"
    assert not any(said[:4] + said[5:])


# ---- the best ----


def test_the_best_of_several_measurements_is_kept(yolo, tmp_path, monkeypatch):
    scores = iter([5.0, 30.0, 30.0, 20.0])
    monkeypatch.setattr("scrl_fast.transfer.trainer.measure", lambda *_: {"bbox_AP": next(scores), "bbox_AP50": 50.0})
    common = [f"--data.root={yolo}", f"--run.dir={tmp_path}/run", "--train.steps=8", "--train.batch_size=2"]
    common += ["--eval.every=2", "--eval.images=1", "--run.checkpoint_every=1", *SHORT]
    first = Transfer(parse(["custom", *common, "--train.max_steps=2"]))
    summary = first.fit()  # the measurement at its end counts, too
    assert summary["best"]["step"] == 2 and summary["best"]["bbox_AP"] == 5.0
    assert main(["custom", *common, "--resume=auto", f"--json={tmp_path}/out.json"]) == 0
    folder = tmp_path / "run/checkpoints"
    assert checkpoint.load(folder / "best.pt")["step"] == 4 and checkpoint.load(folder / "last.pt")["step"] == 8
    best = {"step": 4, "bbox_AP": 30.0, "checkpoint": str(folder / "best.pt")}
    assert json.loads((tmp_path / "out.json").read_text())["best"] == best
    said = (tmp_path / "run/log.txt").read_text()
    assert f"best so far: bbox_AP 30.00 at step 4 ({folder}/best.pt)" in said
    assert f"best: bbox_AP 30.00 at step 4 ({folder}/best.pt)" in said
    assert checkpoint.load(folder / "last.pt")["best"] == {"step": 4, "bbox_AP": 30.0}


def test_best_round_trips():
    best = Best()
    assert best.to_plain() == {} and Best.of({}) == best
    assert best.improve({"bbox_AP": -1.0, "segm_AP": 3.0}, 5) and best == Best("segm_AP", 3.0, 5)
    assert not best.improve({"segm_AP": 3.0}, 6) and Best.of(best.to_plain()) == best
    assert Best().improve({"bbox_AP": -1.0}, 1)


# ---- the metric ----


def test_difficult_objects_count_neither_way(tmp_path):
    voc_part(tmp_path / "JPEGImages", tmp_path / "Annotations", ["a", "b", "c"])
    path = tmp_path / "Annotations/a.xml"
    path.write_text(path.read_text().replace("</name>", "</name><difficult>1</difficult>"))
    data = read(tmp_path, "--data.val_share=0.34")
    both = [(source, place) for source in (data.train, data.val) for place in range(len(source))]
    marked = [(s, i) for s, i in both if s.objects[i].difficult.any()]
    assert len(marked) == 1
    source = marked[0][0]
    rows = ground_truth(source, ignore_difficult=True)["annotations"]
    assert sum(row["iscrowd"] for row in rows) == 1 and not any(
        r["iscrowd"] for r in ground_truth(source)["annotations"]
    )


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_masks_from_polygons_are_measured(tmp_path):
    mask_utils = pytest.importorskip("pycocotools.mask")
    from scrl_fast.transfer.detections import Detections

    yolo_part(tmp_path / "images", tmp_path / "labels", 4, "0 0.2 0.25 0.6 0.25 0.6 0.75 0.2 0.75\n")
    val = read(tmp_path).val
    found = []
    for index, objects in enumerate(val.objects):
        pixels = np.zeros((40, 60), np.uint8)
        pixels[10:30, 12:36] = 1
        mask = mask_utils.encode(np.asfortranarray(pixels))
        found.append(Detections(index, objects.boxes, np.ones(1, np.float32), objects.labels, [mask]))
    result = measure("custom", found, val)
    assert result["bbox_AP"] == pytest.approx(100) and result["segm_AP"] == pytest.approx(100)
    assert set(
        measure("custom", [Detections(0, *(f for f in (found[0].boxes, found[0].scores, found[0].labels)))], val)
    ) == {f"bbox_{name}" for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_mask_rcnn_trains_on_polygons(tmp_path):
    pytest.importorskip("pycocotools.mask")
    yolo_part(tmp_path / "d/images", tmp_path / "d/labels", 6, "0 0.2 0.25 0.6 0.25 0.6 0.75 0.2 0.75\n")
    run = [f"--data.root={tmp_path}/d", f"--run.dir={tmp_path}/run", "--train.steps=2", "--train.batch_size=2"]
    result = Transfer(parse(["custom", *run, "--model.detector=mask_rcnn", *SHORT])).fit()["result"]
    assert {"bbox_AP", "segm_AP"} <= set(result)


def test_a_checkpoint_is_measured_alone_under_the_options_of_its_run(yolo, tmp_path):
    run = [f"--data.root={yolo}", "--train.passes=1", "--train.batch_size=3", *SHORT]
    first = Transfer(parse(["custom", f"--run.dir={tmp_path}/a", *run])).fit()
    only = ["--eval.only=true", f"--resume={tmp_path}/a", "--data.val=test", f"--run.dir={tmp_path}/b"]
    again = Transfer(parse(["custom", *run, *only]))
    assert first["step"] == again.config.train.steps == 2 and again.config.data.classes == tuple(NAMES)
    assert len(again.data.val) == 1 and "bbox_AP" in again.fit()["result"]
    changed = [line for line in (tmp_path / "b/log.txt").read_text().splitlines() if "options have changed" in line]
    assert all("steps" not in line and "classes" not in line for line in changed)
