"""The transfer tasks end to end on tiny data in the official layouts: they learn, measure, resume, name errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tiny_data import write_coco, write_voc
from tiny_transfer import write_cityscapes, write_keypoints

from scrl_fast import checkpoint
from scrl_fast.distributed import PeerFailed, World
from scrl_fast.errors import UsageError
from scrl_fast.models import build_encoder
from scrl_fast.ops import roi_align
from scrl_fast.runlog import read_metrics
from scrl_fast.transfer import detector
from scrl_fast.transfer.__main__ import main, parse
from scrl_fast.transfer.config import TASKS, TransferConfig
from scrl_fast.transfer.data import Ahead, maskless
from scrl_fast.transfer.trainer import Transfer

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools, NumPy 2

SMALL = [
    *("--model.backbone=resnet10_tiny", "--model.short_side=[48,64]", "--model.short_side_step=16"),
    *("--model.test_short_side=48", "--model.fpn_channels=16", "--model.head_channels=32", "--model.mask_channels=8"),
    *("--model.keypoint_channels=8", "--model.proposals=[40,40]", "--model.rois_per_image=16", "--data.workers=2"),
    *("--train.batch_size=3", "--train.steps=8", "--train.device=cpu", "--optim.reference_batch=3", "--optim.lr=0.01"),
    *("--optim.decay_at=[8,8]", "--optim.warmup_steps=2", "--run.log_every=1", "--run.tensorboard=false"),
]
RESULTS = {
    "detection": {f"bbox_{name}" for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")},
    "instance": {f"{kind}_{name}" for kind in ("bbox", "segm") for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")},
    "keypoints": {f"bbox_{name}" for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")}
    | {f"keypoints_{name}" for name in ("AP", "AP50", "AP75", "APm", "APl")},
    "voc": {"AP", "AP50", "AP75", "AP50_area"},
    "cityscapes": {"AP", "AP50", "AP_car", "AP_person", "AP_bus", "AP_train", "AP_truck", "AP_rider"}
    | {"AP_motorcycle", "AP_bicycle"},
}
RESULTS["coco10"] = RESULTS["detection"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All data sets in one folder: their names do not meet."""
    folder = tmp_path_factory.mktemp("data")
    write_coco(folder, "train2017", images=12)
    write_coco(folder, "val2017", images=5, seed=1)
    write_keypoints(folder, "train2017")
    write_keypoints(folder, "val2017", images=4, seed=1)
    write_voc(folder, "trainval", images=5)
    write_voc(folder, "trainval", images=4, year="2012", seed=2)
    write_voc(folder, "test", images=4, seed=1)
    for split in ("train", "val"):
        write_cityscapes(folder, split)
    return folder


def arguments(task, root, run, *more):
    return [task, f"--data.root={root}", f"--run.dir={run}", *SMALL, *more]


@pytest.mark.parametrize("task", TASKS)
def test_task_learns_and_measures(task, root, tmp_path):
    more = ["--train.steps=14", "--optim.decay_at=[14,14]", "--optim.lr=0.02"]
    more += ["--data.subset=0.5"] if task == "coco10" else []
    assert main(arguments(task, root, tmp_path / "run", f"--json={tmp_path}/new/result.json", *more)) == 0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [row["loss"] for row in rows]
    assert [row["step"] for row in rows] == list(range(1, 15)) and sum(losses[-4:]) < 0.97 * sum(losses[:4])
    document = json.loads((tmp_path / "new" / "result.json").read_text())
    assert document["task"] == task and set(document["result"]) == RESULTS[task]
    assert all(value == -1 or 0 <= value <= 100 for value in document["result"].values())
    assert document["config"]["train"]["steps"] == 14 and document["checkpoint"].endswith("last.pt")
    assert rows[-1][task] == document["result"]
    names = {"instance": "loss_mask", "cityscapes": "loss_mask", "keypoints": "loss_keypoint"}
    assert names.get(task, "loss_classifier") in rows[0]


def transfer(task, root, run, *more):
    return Transfer(parse(arguments(task, root, run, *more)))


def test_init_is_in_the_backbone_before_the_first_step(root, tmp_path):
    encoder = build_encoder("resnet10_tiny")
    torch.save({"state_dict": {f"module.{k}": v for k, v in encoder.body.state_dict().items()}}, tmp_path / "w.pth")
    arguments = ("instance", root, tmp_path / "run", f"--init={tmp_path}/w.pth")
    run = transfer(*arguments)
    body = run.network.backbone.body.state_dict()
    assert all(torch.equal(body[name], tensor) for name, tensor in encoder.body.state_dict().items())
    assert "tensors of the encoder matched" in run.restore()[0]
    run.save()
    (tmp_path / "w.pth").unlink()  # a run that goes on needs it no more
    again = transfer(*arguments, "--resume=auto")
    assert "resumed from" in again.restore()[0] and again.config.init == f"{tmp_path}/w.pth"
    assert torch.equal(again.network.backbone.body.conv1.weight, encoder.body.conv1.weight)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"init=.*w\.pth: there is no such checkpoint"):
        transfer(*arguments, "--resume=auto")


def test_mask_rcnn_is_trained_on_masks_in_every_task_of_coco(root, tmp_path):
    run = transfer("detection", root, tmp_path / "a", "--model.detector=mask_rcnn")
    with closing(Ahead(1, 1)) as ahead:
        _, target = next(run.examples(ahead))[0]
    assert target["masks"].shape[0] == len(target["boxes"]) and target["masks"].flatten(1).any(1).all()


def test_objects_without_a_mask_are_left_out_and_counted(root, tmp_path):
    task, option = without_masks(root, tmp_path, every=2)
    run = Transfer(parse([*arguments(task, root, tmp_path / "a"), option, "--train.steps=2", "--eval.images=1"]))
    run.fit()
    lost = maskless(run.train, run.indices)
    assert lost > 3 and f"{lost} objects without a mask are left out" in (tmp_path / "a" / "log.txt").read_text()


@pytest.mark.parametrize("roi_align", ["scrl_fast", "torchvision"])
def test_resume_is_exact(root, tmp_path, roi_align):
    more = (
        f"--model.roi_align={roi_align}",
        f"--model.roi_aligned={roi_align == 'scrl_fast'}".lower(),
        "--train.steps=6",
        "--eval.images=1",
    )
    whole = transfer("detection", root, tmp_path / "a", *more, "--data.workers=1")
    whole.fit()
    part = transfer("detection", root, tmp_path / "b", *more, "--train.max_steps=2")
    part.fit()
    rest = transfer("detection", root, tmp_path / "b", *more, "--resume=auto", "--data.workers=3")
    rest.fit()
    states = [whole.network.state_dict(), rest.network.state_dict()]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    moments = [[s["momentum_buffer"] for s in run.optimizer.state.values()] for run in (whole, rest)]
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in "ab"]
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]
    said = (tmp_path / "b" / "log.txt").read_text()
    assert "at step 2" in said and "options have changed" not in said


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision(root, tmp_path, monkeypatch, precision, dtype):
    seen = []
    monkeypatch.setattr(detector, "roi_align", lambda x, *a, **k: seen.append(x.dtype) or roi_align(x, *a, **k))
    options = (f"--train.precision={precision}", "--train.steps=1", "--eval.images=1")
    run = transfer("detection", root, tmp_path / "a", *options)
    run.fit()
    assert set(seen) == {dtype}  # our RoIAlign takes the features as they are
    assert all(np.isfinite(row["loss"]) for row in read_metrics(tmp_path / "a" / "metrics.jsonl"))
    scale = checkpoint.load(tmp_path / "a" / "checkpoints" / "last.pt")["rng"]["scaler"].get("scale")
    assert scale in ((2.0**16, 2.0**15) if precision == "fp16" else (None,))  # halved where the first one overflows


def test_a_trained_detector_is_measured_alone(root, tmp_path):
    run = transfer("detection", root, tmp_path / "a", "--train.steps=2", "--model.score_threshold=0.0")
    first = run.fit()["result"]
    path = tmp_path / "a" / "checkpoints" / "last.pt"
    again = transfer(
        *("detection", root, tmp_path / "b", "--model.score_threshold=0.0"),
        *("--eval.only=true", f"--resume={path}", "--train.steps=2"),
    )
    assert again.fit()["result"] == first
    assert set(checkpoint.load(path)) >= set(checkpoint.CHECKPOINT_KEYS)


def test_its_backbone_goes_on_elsewhere(root, tmp_path):
    run = transfer("detection", root, tmp_path / "a", "--train.steps=1", "--eval.images=1")
    run.fit()
    other = transfer("voc", root, tmp_path / "b", f"--init={tmp_path}/a")
    body, own = other.network.backbone.body.state_dict(), run.network.backbone.body.state_dict()
    assert all(torch.equal(body[name], own[name]) for name in own)


def test_signal_saves_and_resumes(root, tmp_path):
    run = transfer("detection", root, tmp_path / "a")
    step_once = run.step_once

    def stopping(batch):
        step_once(batch)
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    run.step_once = stopping
    summary = run.fit()
    assert summary["interrupted"] == "SIGTERM" and summary["step"] == 3 and "result" not in summary
    assert "scrl_fast.transfer detection --config=" in summary["resume_command"]
    command = summary["resume_command"].split()[3:]
    assert parse(command).resume == "auto" and transfer("detection", root, tmp_path / "a", "--resume=auto").restore()


def test_an_image_that_cannot_be_read_ends_the_run_with_a_checkpoint(root, tmp_path, capsys):
    shutil.copytree(root, tmp_path / "data")
    bad = tmp_path / "data" / "train2017" / "000000001005.jpg"
    good = bad.read_bytes()
    bad.write_bytes(b"junk")
    options = ["--eval.images=1", "--train.steps=11", "--train.batch_size=1", "--eval.every=8"]  # one epoch
    with pytest.raises(SystemExit) as stopped:
        main(arguments("detection", tmp_path / "data", tmp_path / "run", *options))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and f"cannot read {bad}" in said
    bad.write_bytes(good)
    assert main(arguments("detection", tmp_path / "data", tmp_path / "run", *options, "--resume=auto")) == 0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 12))
    assert [row["step"] for row in rows if "detection" in row] == [8, 11]


def test_all_processes_hear_of_a_bad_image_and_of_a_signal_at_the_end(root, tmp_path):
    @dataclass(frozen=True)
    class Fellow(World):
        """A world where another process says this, in the step after so many."""

        says: tuple = (0, 0)
        after: int = 0

        def sums(self, numbers):
            heard = len(numbers) == 2 and run.step == self.after
            return [a + b for a, b in zip(numbers, self.says, strict=True)] if heard else super().sums(numbers)

    config = parse(arguments("detection", root, tmp_path / "a", "--train.steps=3"))
    run = Transfer(config, world=Fellow(says=(0, 1), after=2))
    with pytest.raises(PeerFailed, match="data of another process"):
        run.fit()
    assert run.saved == 2 and (tmp_path / "a" / "checkpoints" / "step_00000002.pt").exists()
    run = Transfer(
        parse(arguments("detection", root, tmp_path / "b", "--train.steps=2")), world=Fellow(says=(1, 0), after=2)
    )
    summary = run.fit()  # at the last step: nobody must be left alone in the measurement
    assert summary["interrupted"] == "a signal to another process" and "result" not in summary


def test_a_checkpoint_of_another_detector_is_named(root, tmp_path):
    transfer("detection", root, tmp_path / "a", "--train.steps=1", "--eval.images=1").fit()
    other = transfer("instance", root, tmp_path / "b", f"--resume={tmp_path}/a/checkpoints/last.pt")
    with pytest.raises(ValueError, match=r"of faster_rcnn with resnet10_tiny: \d+ tensors .*mask_head.*config\.yaml"):
        other.restore()


def test_subset_is_the_same_by_seed(root):
    from scrl_fast.transfer.data import read_split, trainable

    config = parse(["coco10", f"--data.root={root}", "--data.subset=0.5"])
    source = read_split(config, "train2017")
    chosen = trainable(source, config.data)
    config.data.subset_seed = 1
    assert chosen == trainable(source, parse(["coco10", f"--data.root={root}", "--data.subset=0.5"]).data)
    assert chosen != trainable(source, config.data) and len(chosen) in (5, 6)
    assert parse(["coco10", f"--data.root={root}"]).data.subset == 0.1


def test_published_defaults(root):
    config = parse(["detection", f"--data.root={root}"])
    assert (config.train.batch_size, config.train.steps, config.optim.decay_at) == (16, 90000, (60000, 80000))
    rates = [config.optim.rate(step, 16) for step in (0, 500, 1000, 59999, 60000, 80000)]
    assert np.allclose(rates, [0.02 * 0.001, 0.02 * 0.5005, 0.02, 0.02, 0.002, 0.0002])
    assert config.optim.rate(2000, 8) == pytest.approx(0.01)
    voc = parse(["voc", f"--data.root={root}"])
    assert (voc.train.steps, voc.optim.decay_at, voc.optim.warmup_steps) == (18000, (12000, 16000), 100)
    assert voc.model.short_sides() == tuple(range(480, 801, 32)) and voc.model.box_loss_knee == 0
    points = parse(["keypoints", f"--data.root={root}"]).model
    assert points.proposals == (1500, 1000) and (points.rpn_loss_knee, points.box_loss_knee) == (0, 0.5)
    assert parse(["coco10", f"--data.root={root}", "--model.detector=retinanet"]).optim.lr == 0.01
    assert parse(["detection", f"--data.root={root}", "--model.detector=fcos", "--optim.lr=0.03"]).optim.lr == 0.03
    fcos = parse(["detection", f"--data.root={root}", "--model.detector=fcos"]).model
    assert (fcos.score_threshold, fcos.nms_threshold) == (0.2, 0.6)  # detectron2's and torchvision's
    city = parse(["cityscapes", f"--data.root={root}"]).optim
    assert np.allclose([city.rate(step, 8) for step in (17999, 18000, 23999)], [0.01, 0.001, 0.001])
    assert config.model.short_sides() == (640, 672, 704, 736, 768, 800) and config.model.frozen_stages == 0


# ---- errors ----


@contextmanager
def edited(root, tmp_path, name):
    """The annotations of that file, of a copy of the data in tmp_path / "data", written back when changed."""
    shutil.copytree(root, tmp_path / "data")
    path = tmp_path / "data" / "annotations" / name
    document = json.loads(path.read_text())
    yield document
    path.write_text(json.dumps(document))


def break_categories(root, tmp_path):
    with edited(root, tmp_path, "instances_val2017.json") as document:
        document["categories"][0]["name"] = "pony"
    return ["detection", f"--data.root={tmp_path / 'data'}"]


def empty_annotations(root, tmp_path):
    with edited(root, tmp_path, "instances_train2017.json") as document:
        document["annotations"] = [a for a in document["annotations"] if a["iscrowd"]]
    return ["detection", f"--data.root={tmp_path / 'data'}"]


def without_masks(root, tmp_path, every=1):
    """As files made for boxes alone have it: no polygon at all, or one that has no inside."""
    with edited(root, tmp_path, "instances_train2017.json") as document:
        single = [annotation for annotation in document["annotations"] if not annotation["iscrowd"]]
        for n, annotation in enumerate(single[::every]):
            annotation["segmentation"] = ([], [[1, 1, 5, 5]])[n % 2]
    return ["instance", f"--data.root={tmp_path / 'data'}"]


def few_keypoints(root, tmp_path):
    with edited(root, tmp_path, "person_keypoints_train2017.json") as document:
        for annotation in document["annotations"]:
            annotation["keypoints"] = annotation["keypoints"][:15]
    return ["keypoints", f"--data.root={tmp_path / 'data'}"]


def lost_image(root, tmp_path):
    shutil.copytree(root, tmp_path / "data")
    next((tmp_path / "data" / "train2017").iterdir()).unlink()
    return ["detection", f"--data.root={tmp_path / 'data'}"]


def lost_instances(root, tmp_path):
    shutil.copytree(root, tmp_path / "data")
    next((tmp_path / "data" / "gtFine" / "train").glob("*/*.png")).unlink()
    return ["cityscapes", f"--data.root={tmp_path / 'data'}"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda r, t: ["detection", f"--data.root={t}/none"], r"COCO's folder '.*none' does not exist"),
        (lambda r, t: ["voc", f"--data.root={r}", "--data.train=2009_trainval"], r"no VOC annotations .*VOC2009"),
        (lambda r, t: ["voc", f"--data.root={r}", "--data.train=trainval"], r"YEAR_SPLIT, as in 2007_trainval"),
        (lambda r, t: ["cityscapes", f"--data.root={t}"], r"no folder .*leftImg8bit.*val.*gtFine"),
        (lambda r, t: ["detection", f"--data.root={r}", "--data.train=train2018"], r"instances_train2018\.json"),
        (break_categories, r"categories of .*train2017\.json and .*val2017\.json differ: .*\['disc'\].*\['pony'\]"),
        (empty_annotations, r"instances_train2017\.json: none of 12 images has boxes .*keep_empty"),
        (without_masks, r"instances_train2017\.json: none of 12 images has masks to train on"),
        (lambda r, t: ["voc", f"--data.root={r}", "--model.detector=mask_rcnn"], r"none of 9 images has masks"),
        (few_keypoints, r"person_keypoints_train2017\.json: objects have 5 keypoints, and .* 17"),
        (lambda r, t: ["detection", f"--data.root={r}", "--model.detector=keypoint_rcnn"], r"no object has keypoints"),
        (lost_image, r"names 12 images, of which 1 are not in .*train2017; the first is .*\.jpg"),
        (lost_instances, r"no instance image at .*instanceIds\.png"),
        (
            lambda r, t: ["detection", f"--data.root={r}", "--init=/no/w.pth"],
            r"init=/no/w\.pth: there is no such checkpoint",
        ),
        (lambda r, t: ["detection", "--config=scrl_200ep"], r"--config=scrl_200ep: there is no such file"),
        (lambda r, t: ["instance", f"--data.root={r}", "--model.detector=fcos"], r"instance needs mask_rcnn"),
        (lambda r, t: ["detection", f"--data.root={r}", "--train.batch_size=99"], r"batch_size=99: .* 11 images"),
        (lambda r, t: ["detection", f"--data.root={r}", "--eval.only=true"], r"eval\.only=True .*--resume"),
    ],
)
def test_what_is_wrong_is_named(root, tmp_path, make, message):
    task, *rest = make(root, tmp_path)
    with pytest.raises(ValueError, match=message):
        Transfer(parse([task, *SMALL, f"--run.dir={tmp_path / 'run'}", *rest]))


def test_wrong_weights_are_named_on_the_command_line(root, tmp_path, capsys):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(SystemExit) as stopped:
        main(arguments("detection", root, tmp_path / "run", f"--init={tmp_path}/w.pth"))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "does not fill the encoder resnet10_tiny" in said and "bn1.weight" in said


@pytest.mark.parametrize("argv", [[], ["--data.root=x"], ["detectoin"]])
def test_the_task_comes_first(argv):
    with pytest.raises(UsageError, match=r"must be one of|the first argument is the task"):
        parse(argv)


def test_config_is_checked():
    with pytest.raises(ValueError, match=r"model\.roi_aligned=True.*roi_aligned=false"):
        TransferConfig(model=TransferConfig().model.__class__(roi_aligned=True, roi_align="torchvision"))


# ---- several processes ----


def test_two_processes_train_and_measure_together(root, tmp_path):
    options = ["--train.batch_size=4", "--train.steps=3", "--model.score_threshold=0.0", "--optim.clip_norm=1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "scrl_fast.transfer", *arguments("instance", root, tmp_path / "run", *options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, f"--json={tmp_path}/r.json"], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes with 2 images each" in done.stderr
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    result = json.loads((tmp_path / "r.json").read_text())["result"]
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    again = transfer("instance", root, tmp_path / "b", "--eval.only=true", f"--resume={path}", *options)
    assert again.fit()["result"] == pytest.approx(result, abs=1e-3)  # the same detector, measured by one process
