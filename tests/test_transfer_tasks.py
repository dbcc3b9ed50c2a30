"""The transfer tasks end to end on tiny data in the official layouts: they learn, measure, resume, name errors."""

from __future__ import annotations

import json
from contextlib import closing

import numpy as np
import pytest
import torch
from tiny_transfer import arguments, transfer, without_masks

from scrl_fast.models import build_encoder
from scrl_fast.ops import roi_align
from scrl_fast.run import checkpoint
from scrl_fast.run.metrics_file import read_metrics
from scrl_fast.transfer import detector
from scrl_fast.transfer.__main__ import main, parse
from scrl_fast.transfer.config import TASK_DEFAULTS
from scrl_fast.transfer.dataset import count_without_masks
from scrl_fast.transfer.trainer import Transfer

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools, NumPy 2

RESULTS = {
    "detection": {f"bbox_{name}" for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")},
    "instance": {f"{kind}_{name}" for kind in ("bbox", "segm") for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")},
    "keypoints": {f"bbox_{name}" for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")}
    | {f"keypoints_{name}" for name in ("AP", "AP50", "AP75", "APm", "APl")},
    "voc": {"AP", "AP50", "AP75", "AP50_area"},
    "cityscapes": {"AP", "AP50", "AP_car", "AP_person", "AP_bus", "AP_train", "AP_truck", "AP_rider"}
    | {"AP_motorcycle", "AP_bicycle"},
}
RESULTS["coco10"] = RESULTS["custom"] = RESULTS["detection"]


@pytest.mark.parametrize("task", TASK_DEFAULTS)
def test_task_learns_and_measures(task, data_root, tmp_path):
    more = ["--train.steps=14", "--optim.lr_steps=[14,14]", "--optim.lr=0.02"]
    more += ["--data.subset=0.5"] if task == "coco10" else []
    assert main(arguments(task, data_root, tmp_path / "run", f"--json={tmp_path}/new/result.json", *more)) == 0
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


def test_init_is_in_the_backbone_before_the_first_step(data_root, tmp_path):
    encoder = build_encoder("resnet10_tiny")
    torch.save({"state_dict": {f"module.{k}": v for k, v in encoder.body.state_dict().items()}}, tmp_path / "w.pth")
    arguments = ("instance", data_root, tmp_path / "run", f"--init={tmp_path}/w.pth")
    run = transfer(*arguments)
    assert run.network is run.model  # the name in earlier releases
    body = run.model.backbone.body.state_dict()
    assert all(torch.equal(body[name], tensor) for name, tensor in encoder.body.state_dict().items())
    assert "tensors of the encoder matched" in run.loop.restore()[0]
    run.loop.save()
    (tmp_path / "w.pth").unlink()  # a run that goes on needs it no more
    again = transfer(*arguments, "--resume=auto")
    assert "resumed from" in again.loop.restore()[0] and again.config.init == f"{tmp_path}/w.pth"
    assert torch.equal(again.model.backbone.body.conv1.weight, encoder.body.conv1.weight)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"init=.*w\.pth: there is no such checkpoint"):
        transfer(*arguments, "--resume=auto")


def test_mask_rcnn_is_trained_on_masks_in_every_task_of_coco(data_root, tmp_path):
    run = transfer("detection", data_root, tmp_path / "a", "--model.detector=mask_rcnn")
    with closing(run.batches()) as batches:
        _, target = next(batches)[0]
    assert target["masks"].shape[0] == len(target["boxes"]) and target["masks"].flatten(1).any(1).all()


def test_objects_without_a_mask_are_left_out_and_counted(data_root, tmp_path):
    task, option = without_masks(data_root, tmp_path, every=2)
    run = Transfer(parse([*arguments(task, data_root, tmp_path / "a"), option, "--train.steps=2", "--eval.images=1"]))
    run.fit()
    lost = count_without_masks(run.data.train, run.data.indices)
    assert lost > 3 and f"{lost} objects without a mask are left out" in (tmp_path / "a" / "log.txt").read_text()


@pytest.mark.parametrize("roi_align", ["scrl_fast", "torchvision"])
def test_resume_is_exact(data_root, tmp_path, roi_align):
    more = (
        f"--model.roi_align={roi_align}",
        f"--model.roi_aligned={roi_align == 'scrl_fast'}".lower(),
        "--train.steps=6",
        "--eval.images=1",
    )
    whole = transfer("detection", data_root, tmp_path / "a", *more, "--data.workers=1")
    whole.fit()
    part = transfer("detection", data_root, tmp_path / "b", *more, "--train.max_steps=2")
    part.fit()
    rest = transfer("detection", data_root, tmp_path / "b", *more, "--resume=auto", "--data.workers=3")
    rest.fit()
    states = [whole.model.state_dict(), rest.model.state_dict()]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    moments = [[s["momentum_buffer"] for s in run.optimizer.state.values()] for run in (whole, rest)]
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in "ab"]
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]
    said = (tmp_path / "b" / "log.txt").read_text()
    assert "at step 2" in said and "options have changed" not in said


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision(data_root, tmp_path, monkeypatch, precision, dtype):
    seen = []
    monkeypatch.setattr(detector, "roi_align", lambda x, *a, **k: seen.append(x.dtype) or roi_align(x, *a, **k))
    options = (f"--train.precision={precision}", "--train.steps=1", "--eval.images=1")
    run = transfer("detection", data_root, tmp_path / "a", *options)
    run.fit()
    assert seen[0] == dtype  # our RoIAlign takes the features as they are
    assert seen[-1] == torch.float32  # and a CPU measures in float32
    assert all(np.isfinite(row["loss"]) for row in read_metrics(tmp_path / "a" / "metrics.jsonl"))
    scale = checkpoint.load(tmp_path / "a" / "checkpoints" / "last.pt")["rng"]["scaler"].get("scale")
    assert scale in ((2.0**16, 2.0**15) if precision == "fp16" else (None,))  # halved where the first one overflows


def test_a_trained_detector_is_measured_alone(data_root, tmp_path):
    run = transfer("detection", data_root, tmp_path / "a", "--train.steps=2", "--model.score_threshold=0.0")
    first = run.fit()["result"]
    path = tmp_path / "a" / "checkpoints" / "last.pt"
    again = transfer(
        *("detection", data_root, tmp_path / "b", "--model.score_threshold=0.0"),
        *("--eval.only=true", f"--resume={path}", "--train.steps=2"),
    )
    assert again.fit()["result"] == first
    assert set(checkpoint.load(path)) >= set(checkpoint.CHECKPOINT_KEYS)


def test_its_backbone_goes_on_elsewhere(data_root, tmp_path):
    run = transfer("detection", data_root, tmp_path / "a", "--train.steps=1", "--eval.images=1")
    run.fit()
    other = transfer("voc", data_root, tmp_path / "b", f"--init={tmp_path}/a")
    body, own = other.model.backbone.body.state_dict(), run.model.backbone.body.state_dict()
    assert all(torch.equal(body[name], own[name]) for name in own)


def test_subset_is_the_same_by_seed(data_root):
    from scrl_fast.transfer.dataset import read_split, trainable

    config = parse(["coco10", f"--data.root={data_root}", "--data.subset=0.5"])
    source = read_split(config, "train2017")
    chosen = trainable(source, config.data)
    config.data.subset_seed = 1
    assert chosen == trainable(source, parse(["coco10", f"--data.root={data_root}", "--data.subset=0.5"]).data)
    assert chosen != trainable(source, config.data) and len(chosen) in (5, 6)
    assert parse(["coco10", f"--data.root={data_root}"]).data.subset == 0.1


def test_published_defaults(data_root):
    config = parse(["detection", f"--data.root={data_root}"])
    assert (config.train.batch_size, config.train.steps, config.optim.lr_steps) == (16, 90000, (60000, 80000))
    rates = [config.optim.rate(step, 16) for step in (0, 500, 1000, 59999, 60000, 80000)]
    assert np.allclose(rates, [0.02 * 0.001, 0.02 * 0.5005, 0.02, 0.02, 0.002, 0.0002])
    assert config.optim.rate(2000, 8) == pytest.approx(0.01)
    voc = parse(["voc", f"--data.root={data_root}"])
    assert (voc.train.steps, voc.optim.lr_steps, voc.optim.warmup_steps) == (18000, (12000, 16000), 100)
    assert voc.model.short_sides() == tuple(range(480, 801, 32)) and voc.model.box_smooth_l1_beta == 0
    points = parse(["keypoints", f"--data.root={data_root}"]).model
    assert points.proposals == (1500, 1000) and (points.rpn_smooth_l1_beta, points.box_smooth_l1_beta) == (0, 0.5)
    assert parse(["coco10", f"--data.root={data_root}", "--model.detector=retinanet"]).optim.lr == 0.01
    assert parse(["detection", f"--data.root={data_root}", "--model.detector=fcos", "--optim.lr=0.03"]).optim.lr == 0.03
    fcos = parse(["detection", f"--data.root={data_root}", "--model.detector=fcos"]).model
    assert (fcos.score_threshold, fcos.nms_threshold) == (0.2, 0.6)  # detectron2's and torchvision's
    city = parse(["cityscapes", f"--data.root={data_root}"]).optim
    assert np.allclose([city.rate(step, 8) for step in (17999, 18000, 23999)], [0.01, 0.001, 0.001])
    assert config.model.short_sides() == (640, 672, 704, 736, 768, 800) and config.model.frozen_stages == 0
