"""Detectors: pre-trained weights land in the backbone, every kind learns, RoIAlign of both kinds agrees."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from conftest import assert_as_accurate
from torch import nn
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from scrl_fast import weights
from scrl_fast.data import DemoScenes
from scrl_fast.distributed.sync_batch_norm import SyncBatchNorm, synchronize_batch_norm
from scrl_fast.errors import UsageError
from scrl_fast.models import build_encoder
from scrl_fast.transfer import average_precision, build_detector, fine_tune
from scrl_fast.transfer.config import DETECTORS
from scrl_fast.transfer.detector import PyramidRoIAlign, level_of

SMALL = {"short_side": 96, "fpn_channels": 16, "head_channels": 32, "mask_channels": 8, "keypoint_channels": 8}
SMALL |= {"proposals": (50, 50), "rois_per_image": 32}


def small(kind="faster_rcnn", **options):
    torch.manual_seed(0)
    if kind == "fcos":
        options = {"fpn_channels": 32, **options}
    return build_detector(kind, 10, **{"backbone": "resnet10_tiny", **SMALL, **options})


@pytest.fixture(scope="module")
def scenes():
    return DemoScenes(16, 96, 0)


@pytest.mark.parametrize("kind", DETECTORS)
def test_weights_land_in_the_backbone(tmp_path, kind):
    encoder = build_encoder("resnet18")
    for tensor in encoder.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    torch.save(encoder.body.state_dict(), tmp_path / "r.pth")
    network = small(kind, backbone="resnet18", init=str(tmp_path / "r.pth"))
    body, own = network.backbone.body.state_dict(), encoder.body.state_dict()
    assert len(body) == 120 and set(body) == set(own)
    assert all(torch.equal(body[name], own[name]) for name in own)
    assert len(network.init_report.matched) == 120
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in network.modules())


@pytest.mark.parametrize("kind, levels", [("faster_rcnn", 5), ("retinanet", 5)])
def test_a_timm_backbone(tmp_path, scenes, kind, levels):
    pytest.importorskip("timm", reason="timm is an extra")
    encoder = build_encoder("timm:test_resnet")
    torch.save({"state_dict": encoder.body.state_dict()}, tmp_path / "t.pth")
    network = small(kind, backbone="timm:test_resnet", init=str(tmp_path / "t.pth"))
    body, own = network.backbone.body.state_dict(), encoder.body.state_dict()
    assert set(body) == set(own) and all(torch.equal(body[name], own[name]) for name in own)
    maps = network.backbone(torch.zeros(1, 3, 64, 128))
    strides = (8, 16, 32, 64, 128) if kind == "retinanet" else (4, 8, 16, 32, 64)
    assert [tuple(m.shape[2:]) for m in maps.values()] == [(-(-64 // s), -(-128 // s)) for s in strides]
    losses = fine_tune(network, scenes, steps=2, batch_size=4, lr=0.01, workers=1)
    assert all(loss < 10 for loss in losses)
    moved = network.backbone.body.state_dict()
    assert not torch.equal(moved["layer1.0.conv1.weight"], own["layer1.0.conv1.weight"])
    torch.save(network.state_dict(), tmp_path / "detector.pth")
    report = weights.load_into(build_encoder("timm:test_resnet"), tmp_path / "detector.pth")
    assert len(report.matched) == len(own)
    small(kind, backbone="timm:test_efficientnet", norm="frozen")(
        [torch.rand(3, 64, 64)], [{"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}]
    )["loss_box_reg" if kind == "faster_rcnn" else "bbox_regression"].backward()


def test_torchvisions_supervised_weights(monkeypatch):
    asked, state = [], torchvision.models.resnet18(weights=None).state_dict()
    kind = type(torchvision.models.ResNet18_Weights.IMAGENET1K_V1)
    monkeypatch.setattr(kind, "get_state_dict", lambda self, **options: asked.append((self, options)) or state)
    network = small(backbone="resnet18", init="torchvision")
    assert asked == [(kind.IMAGENET1K_V1, {"progress": False, "check_hash": True})]
    assert len(network.init_report.matched) == 120 and network.init_report.unexpected == ("fc.weight", "fc.bias")
    assert torch.equal(network.backbone.body.state_dict()["layer4.1.bn2.weight"], state["layer4.1.bn2.weight"])
    assert torch.equal(network.backbone.body.state_dict()["conv1.weight"], state["conv1.weight"])

    def offline(self, **options):
        raise OSError("no route")

    monkeypatch.setattr(kind, "get_state_dict", offline)
    with pytest.raises(UsageError, match=r"of resnet18 cannot be downloaded \(OSError: no route\).*give a file"):
        small(backbone="resnet18", init="torchvision")


def test_an_encoder_may_be_given_itself():
    encoder = build_encoder("resnet10_tiny")
    network = small(init=encoder)
    body, own = network.backbone.body.state_dict(), encoder.body.state_dict()
    assert all(torch.equal(body[name], own[name]) for name in own)
    assert body["conv1.weight"].data_ptr() != own["conv1.weight"].data_ptr()


def test_another_normalisation_is_said(tmp_path):
    model = {"online": {f"encoder.body.{k}": v for k, v in build_encoder("resnet10_tiny").body.state_dict().items()}}
    config = {"views": {"mean": [0.5, 0.5, 0.5], "std": [0.229, 0.224, 0.225]}}
    torch.save({"model": model, "config": config}, tmp_path / "c.pt")
    said = str(small(init=str(tmp_path / "c.pt")).init_report)
    assert said.endswith("normalised otherwise than here: --model.mean=0.5,0.5,0.5")
    assert "normalised" not in str(small(init=str(tmp_path / "c.pt"), mean=(0.5, 0.5, 0.5)).init_report)


def test_stages_freeze_from_the_image_on():
    for count, expected in enumerate((set(), {"conv1", "bn1"}, {"conv1", "bn1", "layer1"})):
        body = small(backbone="resnet18", frozen_stages=count).backbone.body
        trained = {name.partition(".")[0] for name, p in body.named_parameters() if p.requires_grad}
        assert trained == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"} - expected
        assert isinstance(body.bn1, FrozenBatchNorm2d) == (count > 0)


def test_norms():
    def norms(network, kind):
        return sum(isinstance(module, kind) for module in network.modules())

    everywhere, body_only, frozen = (small(**o) for o in ({}, {"norm_in_heads": False}, {"norm": "frozen"}))
    assert norms(everywhere.backbone.fpn, nn.BatchNorm2d) == 6 and norms(body_only.backbone.fpn, nn.BatchNorm2d) == 0
    assert norms(frozen, nn.BatchNorm2d) == 0 and norms(frozen, FrozenBatchNorm2d) == 9
    masks = small("mask_rcnn")
    assert norms(masks.roi_heads.mask_head, nn.BatchNorm2d) == 4
    synchronize_batch_norm(masks)  # what several processes train
    assert norms(masks, SyncBatchNorm) == 9 + 6 + 4 and norms(masks, nn.BatchNorm2d) == 0


def test_the_earlier_name_of_lr_steps_is_taken(scenes):
    def losses(**steps):
        torch.manual_seed(0)
        return fine_tune(small("faster_rcnn"), scenes, steps=3, batch_size=4, lr=0.01, workers=1, **steps)

    with pytest.warns(FutureWarning, match="lr_steps"):
        earlier = losses(decay_at=(1, 1))
    assert earlier == losses(lr_steps=(1, 1)) and earlier != losses()


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet", "fcos"])
def test_loss_falls(kind, scenes):
    losses = fine_tune(small(kind), scenes, steps=8, batch_size=8, lr=0.02, flip=0.0, workers=2)
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])


def test_fine_tuning_is_repeatable_whatever_the_workers(scenes):
    states = []
    for workers in (1, 3):
        network = small()
        fine_tune(network, scenes, steps=2, batch_size=4, workers=workers, seed=5)
        states.append(network.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_our_roi_align_in_the_detector_is_torchvisions():
    strides, shapes = [4, 8, 16], [(384, 512), (384, 512)]
    features = {str(i): torch.randn(2, 3, 384 // s, 512 // s, requires_grad=True) for i, s in enumerate(strides)}
    features["pool"] = torch.randn(2, 3, 12, 16)
    generator = torch.Generator().manual_seed(0)
    corners = [torch.rand(n, 2, generator=generator) * 60 for n in (17, 0)]
    sides = [torch.rand(n, 2, generator=generator) * 300 + 1 for n in (17, 0)]
    boxes = [torch.cat([c, c + s], 1) for c, s in zip(corners, sides, strict=True)]
    ours = PyramidRoIAlign(strides, 7, 2, aligned=False)
    theirs = MultiScaleRoIAlign(["0", "1", "2"], 7, 2)
    assert len(level_of(boxes[0], strides).unique()) == 3
    exact = {name: map.detach().double().requires_grad_() for name, map in features.items()}
    wide = [each.double() for each in boxes]  # torchvision wants maps and boxes of one type
    pooled = ours(features, boxes, shapes), theirs(features, boxes, shapes), theirs(exact, wide, shapes)
    assert_as_accurate(*pooled)
    cotangent = torch.randn_like(pooled[0])
    gradients = [
        torch.autograd.grad(out, [maps[str(i)] for i in range(3)], cotangent.to(out.dtype))
        for out, maps in zip(pooled, (features, features, exact), strict=True)
    ]
    for level, each in enumerate(zip(*gradients, strict=True)):
        assert_as_accurate(*each, f"gradient of level {level}")


def test_boxes_go_to_the_level_of_their_size():
    boxes = torch.tensor([[0, 0, s, s] for s in (1.0, 111, 112, 223, 224, 448, 2000)])
    assert level_of(boxes, [4, 8, 16, 32]).tolist() == [0, 0, 1, 1, 2, 3, 3]


@pytest.mark.parametrize("knee", [0.0, 1 / 9, 0.5])
def test_box_losses_have_the_knee_that_is_asked_for(monkeypatch, knee):
    network = small(rpn_smooth_l1_beta=knee, box_smooth_l1_beta=2 * knee)
    network.train()
    target = [{"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}]
    given = []
    monkeypatch.setattr("torch._C._nn.smooth_l1_loss", lambda a, b, r, beta: given.append(beta) or (a - b).sum())
    monkeypatch.setattr("torch._C._nn.l1_loss", lambda a, b, r: given.append(0.0) or (a - b).sum())
    network([torch.rand(3, 64, 64)], target)
    assert given == [knee, 2 * knee]
    given.clear()
    with pytest.raises(AssertionError):
        network([torch.rand(3, 64, 64)], None)
    torch.nn.functional.smooth_l1_loss(torch.ones(2), torch.zeros(2), beta=0.3)
    copy.deepcopy(network)([torch.rand(3, 64, 64)], target)
    assert given == [0.3, knee, 2 * knee]


def test_retinanet_is_as_published(monkeypatch):
    network = small("retinanet")
    given = []
    monkeypatch.setattr("torch._C._nn.smooth_l1_loss", lambda a, b, r, beta: given.append(beta) or (a - b).sum())
    network([torch.rand(3, 64, 64)], [{"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}])
    assert given == [0.1]
    own = network.head.regression_head.conv[0][1]
    assert [int(norm.num_batches_tracked) for norm in own.norms] == [1] * 4  # each level has seen its own maps
    assert len({float(norm.running_var.mean()) for norm in own.norms}) == 4
    own.level = 3  # as if a pass had failed
    network.eval()([torch.rand(3, 64, 64)])
    assert own.level == 0 and len(network.head.classification_head.conv[3][1].norms) == 4
    synchronize_batch_norm(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    top = network.backbone.fpn.extra_blocks
    assert not top.use_P5 and top.p6.in_channels == build_encoder("resnet10_tiny").out_channels
    assert small("fcos").backbone.fpn.extra_blocks.use_P5
    assert (small("fcos").score_thresh, small("fcos", nms_threshold=0.3).nms_thresh) == (0.2, 0.3)


def test_heads_start_with_boxes_and_masks_that_say_nothing():
    heads = small("mask_rcnn", head_channels=256, mask_channels=64).roi_heads
    for layer, deviation in (
        (heads.box_predictor.cls_score, 0.01),
        (heads.box_predictor.bbox_pred, 0.001),
        (heads.mask_predictor.mask_fcn_logits, 0.001),
    ):
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.1) and not layer.bias.any()


def test_evaluation_has_its_own_side():
    network = small(short_side=(64, 96), test_short_side=128)
    assert network.train().transform.min_size == (64, 96) and network.eval().transform.min_size == (128,)


def test_average_precision_of_perfect_boxes(scenes):
    class Oracle(nn.Module):
        """Finds what is there, in the order of the scenes."""

        first_label = 1

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.index = -1

        def forward(self, images):
            self.index += 1
            boxes = torch.from_numpy(scenes.boxes(self.index))
            labels = torch.from_numpy(scenes.labels(self.index)) + 1
            return [{"boxes": boxes, "labels": labels, "scores": torch.ones(len(labels))}]

    found = average_precision(Oracle(), scenes)
    assert found["AP"] == pytest.approx(1) and found["AP50"] == pytest.approx(1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("yolo", 3), r"detector must be one of .*, got 'yolo'"),
        (("fcos", 0), r"classes must lie in 1\.\.100000, got 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_detector(*arguments)
    with pytest.raises(ValueError, match=r"fpn_channels must be a multiple of 32 .* got 40"):
        small("fcos", fpn_channels=40)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"backbone": "timm:test_vit"}, r"model\.backbone=timm:test_vit: its feature maps have strides \[16.*ResNet"),
        ({"backbone": "timm:swin_tiny_patch4_window7_224"}, r"images differ in size, and Input height \(64\)"),
        ({"backbone": "timm:test_resnet", "frozen_stages": 1}, r"model\.frozen_stages=1: only torchvision's"),
        ({"backbone": "timm:test_resnet", "init": "torchvision"}, r"no ImageNet weights of timm:test_resnet"),
    ],
)
def test_what_timm_cannot_do_is_named(options, message):
    pytest.importorskip("timm", reason="timm is an extra")
    with pytest.raises(UsageError, match=message):
        small(**options)


def test_weights_of_another_backbone_are_refused(tmp_path):
    torch.save(build_encoder("resnet10_tiny").body.state_dict(), tmp_path / "r.pth")
    with pytest.raises(UsageError, match=r"does not fill the encoder resnet18: .* tensors are missing"):
        small(backbone="resnet18", init=str(tmp_path / "r.pth"))
