"""Encoders, heads and SCRL: the sizes of the published networks, any number of boxes, what gradients reach, state."""

from __future__ import annotations

import builtins
import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from scrl_fast.models import SCRL, build_encoder, encoder_names, projection_head

TINY: dict[str, Any] = {"backbone": "resnet10_tiny", "hidden_dim": 32, "projection_dim": 16}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def tiny(seed: int = 0, **options: Any) -> SCRL:
    torch.manual_seed(seed)
    return SCRL(**(TINY | options))


def matched_boxes(pairs: int, images: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(pairs).remainder(images).float()[:, None]
    corners = torch.rand(2, pairs, 2, generator=generator) * 24
    sides = 8 + torch.rand(2, pairs, 2, generator=generator) * 20
    rows = torch.cat([corners, corners + sides], 2)
    return torch.cat([index, rows[0]], 1), torch.cat([index + images, rows[1]], 1)


def views(images: int = 2, size: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.randn(2 * images, 3, size, size, generator=torch.Generator().manual_seed(seed))


# ---- encoders ----


def test_published_sizes():
    with torch.device("meta"):
        model = SCRL("resnet50", num_classes=1000)
    assert count(model.online.encoder) == 23_508_032
    assert count(model.online.projector) == 9_449_472
    assert count(model.predictor) == 2_109_440
    assert count(model.probe) == 2048 * 1000 + 1000
    targets, sources = model.ema_pairs()
    assert len(targets) == len(sources) == 164
    assert sum(t.numel() for t in targets) == 32_957_504
    assert targets[0] is model.target.encoder.body.conv1.weight and sources[0] is model.online.encoder.body.conv1.weight


@pytest.mark.parametrize("name", ["resnet10_tiny", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_torchvision_encoders_keep_torchvision_names(name):
    with torch.device("meta"):
        encoder = build_encoder(name)
        features = encoder(torch.empty(2, 3, 96, 64))
    assert features.shape == (2, encoder.out_channels, 96 // encoder.stride, 64 // encoder.stride)
    if name in torchvision.models.list_models():
        with torch.device("meta"):
            plain = torchvision.models.get_model(name, weights=None)
        expected = {k: v.shape for k, v in plain.state_dict().items() if not k.startswith("fc.")}
        assert {k: v.shape for k, v in encoder.body.state_dict().items()} == expected


def test_every_name_builds():
    with torch.device("meta"):
        for name in encoder_names():
            assert build_encoder(name).stride in (8, 32)


def test_encoder_equals_torchvision():
    torch.manual_seed(0)
    encoder = build_encoder("resnet18").eval()
    plain = torchvision.models.resnet18(weights=None)
    plain.fc = nn.Identity()
    plain.load_state_dict(encoder.body.state_dict(), strict=True)
    images = views()
    torch.testing.assert_close(encoder(images).mean((2, 3)), plain.eval()(images))
    torch.testing.assert_close(encoder.body(images), plain(images))


@pytest.mark.parametrize(
    "name, stride", [("resnet18", 32), ("convnext_atto", 32), ("swin_tiny_patch4_window7_224", 32)]
)
def test_timm_encoders(name, stride):
    pytest.importorskip("timm", reason="timm is an optional dependency")
    encoder = build_encoder(f"timm:{name}")
    assert encoder.stride == 32
    assert encoder(torch.randn(1, 3, 224, 224)).shape == (1, encoder.out_channels, 7, 7)


def test_unknown_encoder_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown backbone 'resnet51'; did you mean .*resnet50"):
        build_encoder("resnet51")
    with pytest.raises(ValueError, match="unknown backbone 'zzz'; known: resnet10_tiny, resnet18"):
        build_encoder("zzz")


def test_unknown_timm_name():
    pytest.importorskip("timm", reason="timm is an optional dependency")
    with pytest.raises(ValueError, match="unknown backbone 'timm:resnet51'; did you mean 'timm:resnet5"):
        build_encoder("timm:resnet51")


def test_timm_missing(monkeypatch):
    real = builtins.__import__

    def without_timm(name, *rest, **options):
        if name == "timm":
            raise ModuleNotFoundError("No module named 'timm'")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_timm)
    with pytest.raises(ValueError, match="backbone 'timm:resnet18' needs timm: pip install timm"):
        build_encoder("timm:resnet18")


def test_timm_model_without_feature_maps(monkeypatch):
    timm = pytest.importorskip("timm", reason="timm is an optional dependency")

    def refuse(*_, **__):
        raise RuntimeError("features_only not implemented for this model.")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ValueError, match="backbone 'timm:resnet18': this timm model offers no feature maps"):
        build_encoder("timm:resnet18")


# ---- the loss of a batch ----


def by_hand(model: SCRL, images: torch.Tensor, boxes: Any) -> torch.Tensor:
    """SPEC in plain PyTorch, view by view, in the order of the paper."""

    def pool(features, rows):
        if rows is None:
            return F.adaptive_avg_pool2d(features, 1).flatten(1)
        scale = 1 / model.online.encoder.stride
        return torchvision.ops.roi_align(features, rows, model.pool_size, scale, model.sampling_ratio, model.aligned)

    def project(branch):
        features = branch.encoder(images)
        half = len(images) // 2
        if boxes is None:
            pooled = torch.cat([pool(features[:half], None), pool(features[half:], None)])
        else:
            shifted = torch.cat([boxes[1][:, :1] - half, boxes[1][:, 1:]], 1)
            pooled = torch.cat([pool(features[:half], boxes[0]), pool(features[half:], shifted)])
            pooled = pooled.flatten(1) if model.pool_reduce == "flatten" else pooled.mean((2, 3))
        return branch.projector(pooled)

    online = model.predictor(project(model.online))
    with torch.no_grad():
        target = project(model.target)
    p1, p2 = F.normalize(online, dim=1).chunk(2)
    z1, z2 = F.normalize(target, dim=1).chunk(2)
    return ((p1 - z2).square().sum(1) + (p2 - z1).square().sum(1)).mean()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "byol"},
        {"target_init": "random"},
        {"pool_size": 2},
        {"pool_size": 2, "pool_reduce": "average", "aligned": True, "sampling_ratio": 2},
    ],
    ids=str,
)
def test_loss_and_gradient_equal_the_formula(options):
    ours, plain = (tiny(**options).double() for _ in range(2))
    images = views(3, 48).double()
    boxes = None if ours.method == "byol" else tuple(b.double() for b in matched_boxes(7, images=3))
    output = ours(images, boxes)
    expected = by_hand(plain, images, boxes)
    torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=1e-10)
    assert output.pairs == (3 if boxes is None else 7)
    assert output.projections.shape == (2 * output.pairs, 16) and not output.projections.requires_grad
    output.loss.backward()
    expected.backward()
    for (name, parameter), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if name.startswith("target."):
            assert parameter.grad is None and not parameter.requires_grad, name
        else:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-7, atol=1e-10)
    for (name, buffer), other in zip(ours.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-9, atol=1e-12, msg=name)


def test_no_boxes_cost_nothing():
    model = tiny()
    heads = nn.ModuleList([model.online.projector, model.target.projector, model.predictor])
    before = copy.deepcopy(heads.state_dict())
    output = model(views(), matched_boxes(0))
    assert output.loss.item() == 0 and output.pairs == 0 and output.projections.shape == (0, 16)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name
    for key, value in heads.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("options", [{}, {"method": "byol"}], ids=["one pair", "one image"])
def test_smallest_batch(options):
    model = tiny(**options)
    boxes = None if model.method == "byol" else matched_boxes(1, images=1)
    output = model(views(images=1), boxes)
    output.loss.backward()
    assert 0 <= output.loss.item() <= 8 and output.pairs == 1
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_channels_last_and_bf16():
    model, other = tiny(), tiny().to(memory_format=torch.channels_last)
    images, boxes = views(), matched_boxes(5)
    loss = model(images, boxes).loss
    torch.testing.assert_close(other(images.to(memory_format=torch.channels_last), boxes).loss, loss, rtol=1e-4, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        output = tiny(num_classes=3)(images, boxes, torch.tensor([0, 2]))
    assert output.loss.dtype is output.probe_loss.dtype is torch.float32
    torch.testing.assert_close(output.loss, loss, rtol=0.1, atol=0)


def test_target_starts_as_copy_or_by_itself():
    pairs = [list(zip(*tiny(target_init=init).ema_pairs(), strict=True)) for init in ("online", "random")]
    assert all(torch.equal(target, source) and target is not source for target, source in pairs[0])
    assert not all(torch.equal(target, source) for target, source in pairs[1])


# ---- the probe ----


def test_probe_reads_labelled_views_only():
    model = tiny(num_classes=3)
    images, boxes = views(3), matched_boxes(4, images=3)
    output = model(images, boxes, torch.tensor([2, -1, 0]))
    with torch.no_grad():
        logits = model.probe(tiny().online.encoder(images).mean((2, 3)))[[0, 2, 3, 5]]
    labels = torch.tensor([2, 0, 2, 0])
    torch.testing.assert_close(output.probe_loss, F.cross_entropy(logits, labels))
    assert output.probe_correct.item() == (logits.argmax(1) == labels).sum().item()
    assert output.probe_count.item() == 4
    output.probe_loss.backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {"probe.weight", "probe.bias"}


def test_probe_without_labels():
    model = tiny(num_classes=3)
    output = model(views(), matched_boxes(2), torch.tensor([-1, -1]))
    assert output.probe_loss.item() == 0 and output.probe_correct.item() == 0 and output.probe_count.item() == 0
    assert model(views(), matched_boxes(2)).probe_loss is None
    assert tiny()(views(), matched_boxes(2), torch.tensor([0, 1])).probe_loss is None


# ---- state ----


def test_state_round_trip():
    model, other = tiny(0, num_classes=3), tiny(1, num_classes=3)
    model(views(), matched_boxes(4))
    other.load_state(model.state())
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


def test_state_that_does_not_fit():
    state = tiny(num_classes=3).state()
    with pytest.raises(ValueError, match="part 'probe' does not fit"):
        tiny(num_classes=4).load_state(state)
    other = tiny(1, num_classes=4)
    probe = copy.deepcopy(other.probe.state_dict())
    other.load_state(state, strict=False)
    assert torch.equal(other.predictor.net[0].weight, state["predictor"]["net.0.weight"])
    assert all(torch.equal(v, probe[k]) for k, v in other.probe.state_dict().items())
    with pytest.raises(ValueError, match="part 'online' does not fit"):
        tiny(hidden_dim=8).load_state(state, strict=False)
    with pytest.raises(ValueError, match="no part 'target'"):
        tiny().load_state({k: v for k, v in state.items() if k != "target"}, strict=False)


# ---- bad input ----


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "simclr"}, "method must be one of scrl, byol, got 'simclr'"),
        ({"pool_size": 0}, "pool_size must be at least 1, got 0"),
        ({"pool_reduce": "max"}, "pool_reduce must be one of flatten, average, got 'max'"),
        ({"target_init": "zeros"}, "target_init must be one of online, random, got 'zeros'"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1, got 0"),
        ({"projection_dim": -1}, "projection_dim must be at least 1, got -1"),
        ({"num_classes": -2}, "num_classes must not be negative, got -2"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_bad_batches():
    model, boxes = tiny(num_classes=2), matched_boxes(4)
    cases = [
        ((views()[:3], boxes), r"views must be \[2B, 3, S, S\] with B >= 1, got \[3, 3, 64, 64\]"),
        ((views()[:0], boxes), "views must be"),
        ((views(size=7), boxes), "views of 7x7 pixels are smaller than the encoder's stride of 8"),
        ((views(), None), "boxes: method 'scrl' needs"),
        ((views(), (boxes[0], boxes[1][:3])), r"boxes must be two \[N, 5\], got \[\[4, 5\], \[3, 5\]\]"),
        ((views(), boxes, torch.tensor([0])), r"labels must be \[2\], one an image, got \[1\]"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model(*arguments)


def test_head_checks_its_widths():
    with pytest.raises(ValueError, match="in_dim must be at least 1, got 0"):
        projection_head(0)
