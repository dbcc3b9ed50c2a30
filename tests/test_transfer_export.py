"""A trained detector for others: torchvision's own classes load it, and onnxruntime finds the same boxes."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from scrl_fast.transfer import build_detector, export_detector, trained
from scrl_fast.transfer.__main__ import main
from scrl_fast.transfer.categories import Categories
from scrl_fast.transfer.config import DetectorConfig
from scrl_fast.transfer.trained import TrainedDetector
from scrl_fast.weights.errors import CheckpointError

DETECTORS = ("faster_rcnn", "mask_rcnn", "keypoint_rcnn", "retinanet", "fcos")
NAMES = ("fish", "jellyfish", "puffin")


@pytest.fixture(autouse=True)
def _poisoned_empty() -> None:
    """In place of conftest's: the exporter compiles functions of torchvision that call torch.empty itself."""


def detector_of(kind, **options):
    """A small detector of random weights whose scores differ from one another."""
    config = DetectorConfig(
        **{
            **{"detector": kind, "backbone": "resnet18", "short_side": (96, 96), "test_short_side": 96},
            **{"fpn_channels": 64, "head_channels": 64, "mask_channels": 16, "keypoint_channels": 16},
            **{"proposals": (50, 50), "proposals_before_nms": (100, 60), "detections": 20, "long_side": 200},
            **options,
        }
    )
    torch.manual_seed(0)
    names = {"backbone": config.backbone, "branch": config.branch}
    network = build_detector(kind, len(NAMES), keypoints=5, config=config, **names)
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
        if name.endswith(("cls_score", "cls_logits", "bbox_pred")):
            nn.init.normal_(module.weight, std=0.3)
        if name.endswith("cls_logits"):
            nn.init.zeros_(module.bias)  # of RetinaNet and FCOS it starts where nothing scores above 0.01
    return TrainedDetector(network, config, Categories(NAMES, (1, 2, 7)), None)


@pytest.fixture(scope="module")
def photo():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((150, 110), Image.Resampling.BICUBIC))


# ---- torchvision ----

LOAD = """
import importlib.util, json, sys, numpy, torch
spec = importlib.util.spec_from_file_location("built", sys.argv[1])
built = importlib.util.module_from_spec(spec)
spec.loader.exec_module(built)
assert "scrl_fast" not in sys.modules
network = built.build(sys.argv[2])
image = torch.from_numpy(numpy.load(sys.argv[3])).permute(2, 0, 1) / 255
with torch.no_grad():
    found = network([image])[0]
found = {name: value.tolist() for name, value in found.items() if name in ("boxes", "labels", "scores", "keypoints")}
print(json.dumps({"class": type(network).__name__, "module": type(network).__module__, "first": built.FIRST_LABEL,
                  "names": built.CLASSES, **found}))
"""


@pytest.mark.parametrize(
    "kind, options, name",
    [
        ("faster_rcnn", {}, "FasterRCNN"),
        ("faster_rcnn", {"roi_align": "torchvision", "roi_aligned": False, "roi_sampling_ratio": 2}, "FasterRCNN"),
        ("faster_rcnn", {"norm": "frozen"}, "FasterRCNN"),
        ("faster_rcnn", {"frozen_stages": 2, "roi_aligned": False}, "FasterRCNN"),
        ("mask_rcnn", {}, "MaskRCNN"),
        ("mask_rcnn", {"norm_in_heads": False}, "MaskRCNN"),
        ("keypoint_rcnn", {}, "KeypointRCNN"),
        ("retinanet", {"norm_in_heads": False}, "RetinaNet"),
        ("fcos", {}, "FCOS"),
    ],
)
def test_torchvision_alone_loads_it_and_finds_the_same(kind, options, name, photo, tmp_path):
    detector = detector_of(kind, **options)
    done = export_detector(detector, "torchvision", tmp_path / "it.pth", score=0.05)
    assert done["files"] == [str(tmp_path / "it.pth"), str(tmp_path / "it.py")] and name in done["checked"]
    np.save(tmp_path / "photo.npy", photo)
    command = [sys.executable, "-c", LOAD, *(str(tmp_path / file) for file in ("it.py", "it.pth", "photo.npy"))]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PATH": ""}, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found, expected = json.loads(ran.stdout), detector.predict(photo, score=0.05)
    assert found["class"] == name and found["module"].startswith("torchvision.models.detection")
    assert len(expected) > 3 and found["names"] == list(NAMES)
    assert [found["names"][label - found["first"]] for label in found["labels"]] == expected.names
    np.testing.assert_allclose(found["boxes"], expected.boxes, atol=1e-2)
    np.testing.assert_allclose(found["scores"], expected.scores, atol=1e-4)
    if kind == "keypoint_rcnn":
        np.testing.assert_allclose(found["keypoints"], expected.keypoints, atol=1e-2)


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("retinanet", {}, "retinanet with model.norm_in_heads=True has a norm for each level"),
        ("faster_rcnn", {"backbone": "resnet10_tiny"}, "backbone=resnet10_tiny is none of torchvision's networks"),
    ],
)
def test_what_torchvisions_classes_lack_is_named(kind, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_detector(detector_of(kind, **options), "torchvision", tmp_path / "it.pth")
    assert not list(tmp_path.iterdir())


# ---- ONNX ----


@pytest.mark.parametrize(
    "kind, options",
    [
        *((kind, {}) for kind in DETECTORS),
        ("faster_rcnn", {"roi_align": "torchvision", "roi_aligned": False, "backbone": "resnet10_tiny"}),
    ],
)
def test_onnxruntime_finds_the_same_boxes(kind, options, photo, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime runs the graph")
    pytest.importorskip("onnx", reason="onnx writes the graph")
    detector = detector_of(kind, **options)
    done = export_detector(detector, "onnx", tmp_path / "it.onnx", score=0.05)
    assert "onnxruntime and PyTorch find the same" in done["checked"]
    session = onnxruntime.InferenceSession(tmp_path / "it.onnx", providers=["CPUExecutionProvider"])
    described = session.get_modelmeta().custom_metadata_map
    assert json.loads(described["classes"]) == list(NAMES) and json.loads(described["category_ids"]) == [1, 2, 7]
    for pixels in (photo, photo.transpose(1, 0, 2)[:90].copy()):  # wider than high, and the other way
        image = pixels.transpose(2, 0, 1).astype(np.float32) / 255
        names = [output.name for output in session.get_outputs()]
        found = dict(zip(names, session.run(None, {"image": image}), strict=True))
        expected = detector.predict(pixels, score=0.05)
        assert len(expected) > 3 and found["boxes"].shape == expected.boxes.shape
        np.testing.assert_allclose(np.sort(found["scores"]), np.sort(expected.scores), atol=5e-4)
        pairs = [_partner(found, expected, row) for row in range(len(expected))]
        assert sorted(pairs) == list(range(len(expected)))
        if expected.masks is not None:
            assert found["masks"].dtype == bool and (found["masks"][pairs] != expected.masks).mean() < 1e-3
        if expected.keypoints is not None:
            np.testing.assert_allclose(found["keypoints"][pairs], expected.keypoints, atol=1e-2)


def _partner(found, expected, row):
    """The detection of onnxruntime with this box, label and score."""
    near = np.abs(found["boxes"] - expected.boxes[row]).max(1) + 100 * np.abs(found["scores"] - expected.scores[row])
    place = int(np.where(found["labels"] == expected.labels[row], near, np.inf).argmin())
    assert near[place] < 0.05
    return place


# ---- the command ----


def test_the_command(data_root, tmp_path, capsys):
    from tiny_transfer import transfer

    pytest.importorskip("onnx", reason="onnx writes the graph")
    run = transfer("detection", data_root, tmp_path / "run")
    run.loop.save()
    command = ["export", f"--detector={tmp_path / 'run'}", "--to=onnx", f"--out={tmp_path / 'it.onnx'}"]
    assert main(command) == 0
    assert "faster_rcnn as onnx" in capsys.readouterr().out and (tmp_path / "it.onnx").is_file()
    wrong = {
        "exists already": command,
        "writes a .onnx file: it.onnx": [*command[:3], f"--out={tmp_path / 'it.pth'}"],
        "does not exist": [*command[:3], f"--out={tmp_path / 'nowhere' / 'it.onnx'}"],
        "invalid choice: 'tensorrt'": [*command[:2], "--to=tensorrt", command[3]],
        "none of torchvision's networks": [*command[:2], "--to=torchvision", f"--out={tmp_path / 'it.pth'}"],
        "must be from 0 to 1": [*command, "--score=3"],
    }
    for message, arguments in wrong.items():
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2 and message in capsys.readouterr().err, message
    assert main([*command, "--overwrite"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it.onnx", "run"]


def test_both_commands_take_a_backbone_of_the_users_own(tmp_path, monkeypatch):
    asked = []

    def load(run, *, backbone="", **options):
        asked.append(backbone)
        raise CheckpointError("no more is needed here")

    monkeypatch.setattr(trained, "load_detector", load)
    export = ["export", f"--detector={tmp_path}", "--to=onnx", f"--out={tmp_path}/x.onnx"]
    predict = ["predict", f"--detector={tmp_path}", f"--images={tmp_path}", f"--out={tmp_path}/out"]
    for arguments in (predict, export):
        with pytest.raises(SystemExit):
            main([*arguments, "--backbone=package.module:function"])
    assert asked == ["package.module:function"] * 2
