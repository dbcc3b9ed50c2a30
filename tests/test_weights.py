"""Import: every layout ends in the encoder, bit for bit; what does not fit is named; nothing in a file runs."""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest
import torch
import torchvision

import scrl_fast
from scrl_fast import weights
from scrl_fast.build import build_model, build_optimizer
from scrl_fast.models import SCRL, build_encoder
from scrl_fast.weights.layouts import from_detectron2, from_published, to_detectron2, to_published

NAME = "resnet18"


@pytest.fixture(scope="module")
def source():
    """A torchvision state dict with its classifier."""
    torch.manual_seed(1)
    return torchvision.models.resnet18(weights=None).state_dict()


def without_fc(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


def arrays(state):
    return {name: tensor.numpy() for name, tensor in state.items()}


def detectron2(state):
    renamed = {to_detectron2(name): array for name, array in arrays(without_fc(state)).items()}
    return {name: array for name, array in renamed.items() if name is not None}


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def published(state):
    return {to_published(name): tensor for name, tensor in without_fc(state).items()}


WRAPPED = {
    "torchvision.pth": lambda s: s,
    "ddp.pth": lambda s: {"state_dict": prefixed("module.", s), "epoch": 3},
    "moco.pth": lambda s: {"state_dict": {**prefixed("module.encoder_q.", s), **prefixed("module.encoder_k.", s)}},
    "detector.pth": lambda s: {**prefixed("backbone.body.", without_fc(s)), "rpn.head.weight": torch.zeros(3)},
    "mmdet.pth": lambda s: {"state_dict": prefixed("backbone.", without_fc(s)), "meta": {"epoch": 1}},
    "backbone_only.pth": published,
    "published.pth": lambda s: {"online_network_state_dict": published(s), "predictor_state_dict": "fake_state_dict"},
}


def equal(encoder, state):
    own = encoder.body.state_dict()
    return all(torch.equal(own[name], state[name]) for name in own)


@pytest.mark.parametrize("name", WRAPPED)
def test_torch_files(tmp_path, source, name):
    path = tmp_path / name
    torch.save(WRAPPED[name](source), path)
    encoder = build_encoder(NAME)
    report = weights.load_into(encoder, path)
    assert equal(encoder, source) and len(report.matched) == len(encoder.body.state_dict()) and not report.missing
    assert str(path) in str(report) and report.layout in str(report)
    assert weights.guess_backbone(weights.read(path)) == NAME


def test_what_is_not_used_is_said(tmp_path, source):
    torch.save(source, tmp_path / "a.pth")
    report = weights.load_into(build_encoder(NAME), tmp_path / "a.pth")
    assert report.unexpected == ("fc.weight", "fc.bias")
    assert "2 more in the file not used (fc.weight, fc.bias)" in str(report)
    torch.save(WRAPPED["detector.pth"](source), tmp_path / "b.pth")
    assert weights.load_into(build_encoder(NAME), tmp_path / "b.pth").unexpected == ("rpn.head.weight",)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("prefix", ["", "backbone.bottom_up."])
def test_detectron2_pickle(tmp_path, protocol, prefix):
    source = build_encoder("resnet10_tiny").body.state_dict()
    path = tmp_path / "r.pkl"
    content = {"model": prefixed(prefix, detectron2(source)), "__author__": "x", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    encoder = build_encoder("resnet10_tiny")
    report = weights.load_into(encoder, path)
    assert "9 missing (bn1.num_batches_tracked, ...: counters that nothing reads)" in str(report)
    assert report.layout == "detectron2" and all(name.endswith("num_batches_tracked") for name in report.missing)
    own = encoder.body.state_dict()
    assert all(torch.equal(own[name], source[name]) for name in report.matched) and len(report.matched) == 45


def test_safetensors_and_hub_folder(tmp_path, source):
    from safetensors.torch import save_file

    save_file(source, tmp_path / "model.safetensors", metadata={"backbone": NAME})
    (tmp_path / "config.json").write_text(json.dumps({"method": "scrl"}))
    for path in (tmp_path / "model.safetensors", tmp_path):
        encoder = build_encoder(NAME)
        weights.load_into(encoder, path)
        assert equal(encoder, source)
    assert weights.read(tmp_path).metadata == {"backbone": NAME, "method": "scrl"}
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:999])
    with pytest.raises(weights.WeightsError, match=r"cannot load .*model\.safetensors"):
        weights.read(tmp_path)


def test_timm_feature_extractor(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is an extra")
    torch.manual_seed(0)
    whole = timm.create_model("resnetv2_50", num_classes=0)
    torch.save(whole.state_dict(), tmp_path / "t.pth")
    encoder = build_encoder("timm:resnetv2_50")
    report = weights.load_into(encoder, tmp_path / "t.pth")
    assert torch.equal(encoder.body.state_dict()["stem_conv.weight"], whole.state_dict()["stem.conv.weight"])
    assert len(report.matched) == len(encoder.body.state_dict())
    assert f"{tmp_path / 't.pth'} (timm): " in str(report)
    with pytest.raises(weights.WeightsError, match=r"t\.pth \(own names\) does not fill the encoder resnet18"):
        weights.load_into(build_encoder("resnet18"), tmp_path / "t.pth")


def test_names_go_both_ways():
    names = [name for name in build_encoder("resnet50").body.state_dict() if not name.endswith("tracked")]
    assert [from_detectron2(to_detectron2(name)) for name in names] == names
    assert [from_published(to_published(name)) for name in names] == names
    assert len({to_detectron2(name) for name in names}) == 265
    assert to_detectron2("layer1.0.downsample.1.running_var") == "res2.0.shortcut.norm.running_var"
    assert to_detectron2("bn1.weight") == "stem.conv1.norm.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("layer2.1.bn2.running_var"), r"1 of 100 tensors are missing \(layer2\.1\.bn2\.running_var\)"),
        (lambda s: s.update({"conv1.weight": torch.zeros(64, 3, 3, 3)}), r"conv1\.weight is \[64, 3, 3, 3\], must be"),
    ],
)
def test_less_than_the_encoder_is_refused(tmp_path, source, change, message):
    state = dict(source)
    change(state)
    torch.save(state, tmp_path / "a.pth")
    encoder = build_encoder(NAME)
    before = {name: tensor.clone() for name, tensor in encoder.body.state_dict().items()}
    with pytest.raises(weights.WeightsError, match=message):
        weights.load_into(encoder, tmp_path / "a.pth")
    assert equal(encoder, before)


def test_wrong_backbone_is_named(tmp_path, source):
    torch.save(source, tmp_path / "a.pth")
    with pytest.raises(weights.WeightsError, match=r"resnet50.*Is it the right backbone\?"):
        weights.load_into(build_encoder("resnet50"), tmp_path / "a.pth")
    own_checkpoint(tmp_path / "b.pt", tiny())
    with pytest.raises(weights.WeightsError, match=r"fill the encoder resnet18.* is of resnet10_tiny: choose"):
        weights.load_into(build_encoder("resnet18"), tmp_path / "b.pt")


def test_a_deeper_network_is_refused_and_one_without_its_last_stage_is_filled(tmp_path, source):
    deeper = source | {"layer1.2.conv1.weight": torch.zeros(8, 8, 3, 3)}
    torch.save(deeper, tmp_path / "a.pth")
    with pytest.raises(weights.WeightsError, match=r"deeper network than .* has no layer1\.2\.conv1\.weight"):
        weights.load_into(build_encoder(NAME), tmp_path / "a.pth")
    torch.save(source, tmp_path / "b.pth")
    shorter = build_encoder(NAME).body
    del shorter.layer4
    assert any(name.startswith("layer4.") for name in weights.load_into(shorter, tmp_path / "b.pth").unexpected)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["evil.pkl", "evil.pth"])
def test_nothing_in_a_file_runs(tmp_path, name):
    marker = tmp_path / "ran"
    (tmp_path / name).write_bytes(pickle.dumps({"model": {"stem.conv1.weight": Evil(marker)}}))
    with pytest.raises(weights.WeightsError, match="only NumPy arrays, tensors and plain values are read"):
        weights.read(tmp_path / name)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"\x80", b"\x80\x02garbage", pickle.dumps([1, 2])])
def test_damaged_pickles_are_named(tmp_path, content):
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(weights.WeightsError, match=r"(cannot load .*a\.pkl|a\.pkl is damaged: it is empty)"):
        weights.read(tmp_path / "a.pkl")
    with pytest.raises(weights.WeightsError, match=r"no weights at .*none\.pkl"):
        weights.read(tmp_path / "none.pkl")


def test_a_file_without_tensors_is_named(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(weights.WeightsError, match=r"holds no tensors under names \(it holds epoch\)"):
        weights.read(tmp_path / "a.pth")


def tiny(**options):
    torch.manual_seed(options.pop("seed", 0))
    return SCRL("resnet10_tiny", hidden_dim=8, projection_dim=4, target_init="random", **options)


def own_checkpoint(path, model, **extra):
    torch.save({"model": model.state(), "config": {"model": {"backbone": "resnet10_tiny"}}, **extra}, path)


def test_our_checkpoint_into_all_networks(tmp_path):
    trained, fresh = tiny(num_classes=3, seed=1), tiny(num_classes=4)
    own_checkpoint(tmp_path / "a.pt", trained)
    report = weights.load_into_scrl(fresh, tmp_path / "a.pt")
    for part in ("online", "target", "predictor"):
        ours, theirs = getattr(fresh, part).state_dict(), getattr(trained, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "encoder, projector, target projector, predictor loaded; from random weights: probe (missing" in str(report)
    for branch in ("online", "target"):
        encoder = weights.encoder_of(tmp_path / "a.pt", branch=branch)
        assert encoder.name == "resnet10_tiny" and equal(encoder, getattr(trained, branch).encoder.body.state_dict())
        body, images = scrl_fast.load_encoder(tmp_path / "a.pt", branch=branch), torch.rand(2, 3, 32, 32)
        assert not body.training and isinstance(body, torchvision.models.ResNet)
        torch.testing.assert_close(body(images), encoder.eval()(images).mean((2, 3)))


@pytest.mark.parametrize("name", ["torchvision.pth", "published.pth", "mmdet.pth"])
def test_a_plain_module_from_any_layout(tmp_path, source, name):
    torch.save(WRAPPED[name](source), tmp_path / name)
    body = scrl_fast.load_encoder(tmp_path / name)
    assert isinstance(body, torchvision.models.ResNet) and not body.training
    assert all(torch.equal(tensor, source[name]) for name, tensor in body.state_dict().items())


def test_encoder_alone_starts_heads_anew(tmp_path, source):
    torch.save(source, tmp_path / "a.pth")
    model = SCRL(NAME, hidden_dim=8, projection_dim=4)
    heads = {name: tensor.clone() for name, tensor in model.online.projector.state_dict().items()}
    report = weights.load_into_scrl(model, tmp_path / "a.pth")
    assert equal(model.online.encoder, source) and equal(model.target.encoder, source)
    assert all(torch.equal(tensor, heads[name]) for name, tensor in model.target.projector.state_dict().items())
    said = "from random weights: projector, target projector, predictor (the file is of an encoder, and has none)"
    assert said in str(report)


def test_random_is_left_alone():
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert str(weights.load_into_scrl(model, "random")) == "random weights"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("compat", ["none", "kakaobrain"])
def test_momentum_goes_to_its_parameter(tmp_path, compat):
    from scrl_fast.config.schema import load_recipe

    config = load_recipe("demo")
    config.compat = compat
    config.model.hidden_dim, config.model.projection_dim = 8, 4

    def made():
        model = build_model(config, 3)
        return model, build_optimizer(model, config, 8)

    model, optimizer = made()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = parameter.detach() * 2 + 1
    state = {"model": model.state(), "optimizer": optimizer.state_dict(), "config": config.to_dict()}
    torch.save(state, tmp_path / "a.pt")
    other, its_optimizer = made()
    trained = [parameter for parameter in other.parameters() if parameter.requires_grad]
    assert weights.load_momentum(other, its_optimizer, weights.read(tmp_path / "a.pt")) == len(trained)
    for name, parameter in other.named_parameters():
        if parameter.requires_grad:
            expected = dict(model.named_parameters())[name].detach() * 2 + 1
            assert torch.equal(its_optimizer.state[parameter]["momentum_buffer"], expected), name


def test_arrays_of_many_kinds(tmp_path):
    content = {"a": np.float32(3), "b": np.arange(4)[::2], "c": {"d": np.zeros((0, 2), np.float16)}, "e": "text"}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    from scrl_fast.weights.files import read_pickle

    read = read_pickle(tmp_path / "a.pkl")
    assert read["a"].item() == 3 and read["b"].tolist() == [0, 2] and read["c"]["d"].shape == (0, 2)
