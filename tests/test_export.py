"""Export: every format loads in the library that it is for, strictly where that library can, with equal numbers."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
import torchvision

from scrl_fast import export, weights
from scrl_fast.errors import UsageError
from scrl_fast.models import SCRL, build_encoder
from scrl_fast.recipes import load_recipe

NAME = "resnet18"


def trained(backbone, folder, classes=3, momentum=False):
    """A checkpoint as the trainer writes it, with random numbers in every tensor."""
    from scrl_fast.checkpoint import CheckpointManager
    from scrl_fast.prepare import build_model, build_optimizer

    config = load_recipe("demo")
    config.model.backbone, config.model.hidden_dim, config.model.projection_dim = backbone, 8, 4
    config.model.target_init, config.data.root = "random", "/data/of/mine"
    model = build_model(config, classes)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    optimizer = build_optimizer(model, config, 8)
    for group in optimizer.param_groups if momentum else ():
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.randn_like(parameter)
    state = {"model": model.state(), "optimizer": optimizer.state_dict(), "config": config.to_dict()}
    state |= {"step": 7, "epoch": 2, "rng": {}, "loader": {}, "version": "0"}
    return CheckpointManager(folder).save(state, 7), model, optimizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return trained(NAME, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return trained("resnet10_tiny", tmp_path_factory.mktemp("tiny"))


def run(checkpoint, to, out, *more):
    assert export.main([str(checkpoint[0]), "--to", to, str(out), *more]) == 0
    return out


def features(module, images):
    with torch.no_grad():
        return module.eval()(images)


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("branch", ["online", "target"])
def test_torchvision_loads_strictly(checkpoint, tmp_path, images, branch):
    out = run(checkpoint, "torchvision", tmp_path / "r.pth", "--branch", branch)
    network = torchvision.models.resnet18(weights=None)
    network.fc = torch.nn.Identity()
    network.load_state_dict(torch.load(out, weights_only=True), strict=True)
    encoder = getattr(checkpoint[1], branch).encoder.eval()
    assert torch.equal(features(network, images), features(encoder, images).mean((2, 3)))


def test_detection_backbone_of_torchvision_takes_it(checkpoint, tmp_path):
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    out = run(checkpoint, "torchvision", tmp_path / "r.pth")
    body = resnet_fpn_backbone(backbone_name=NAME, weights=None, norm_layer=torch.nn.BatchNorm2d).body
    body.load_state_dict(torch.load(out, weights_only=True), strict=True)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm_loads_strictly(checkpoint, tmp_path, images, suffix):
    timm = pytest.importorskip("timm", reason="timm is an extra")
    out = run(checkpoint, "timm", tmp_path / f"r{suffix}")
    network = timm.create_model(NAME, num_classes=0, checkpoint_path=str(out))
    expected = features(checkpoint[1].online.encoder, images).mean((2, 3))
    torch.testing.assert_close(features(network, images), expected)


def test_hub_folder(checkpoint, tmp_path, images):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is an extra")
    folder = run(checkpoint, "hf", tmp_path / "hub", "--size", "96")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == NAME and config["pretrained_cfg"]["input_size"] == [3, 96, 96]
    assert config["method"] == "scrl" and config["mean"] == [0.485, 0.456, 0.406]
    network = torchvision.models.resnet18(weights=None)
    network.fc = torch.nn.Identity()
    network.load_state_dict(safetensors.load_file(folder / "model.safetensors"), strict=True)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n") and "torchvision.models.resnet18" in card and "{" not in card.split("```")[0]
    run(checkpoint, "hf", folder, "--overwrite")
    timm = pytest.importorskip("timm", reason="timm is an extra")
    network = timm.create_model(f"local-dir:{folder}", pretrained=True)
    expected = features(checkpoint[1].online.encoder, images).mean((2, 3))
    torch.testing.assert_close(features(network, images), expected)


def test_safetensors_round_trip_with_metadata(tiny, tmp_path):
    safetensors = pytest.importorskip("safetensors", reason="safetensors is an extra")
    out = run(tiny, "safetensors", tmp_path / "a.safetensors")
    with safetensors.safe_open(out, "pt") as file:
        metadata = file.metadata()
        own = tiny[1].online.encoder.body.state_dict()
        assert set(file.keys()) == set(own)
        assert all(torch.equal(file.get_tensor(name), own[name]) for name in own)
    assert metadata["backbone"] == "resnet10_tiny" and json.loads(metadata["mean"]) == [0.485, 0.456, 0.406]
    config = json.loads(metadata["config"])
    assert config["model"]["method"] == "scrl" and metadata["step"] == "7" and metadata["epoch"] == "2"
    assert "/data/of/mine" not in json.dumps(metadata) and "init" not in config and "seed" in config["train"]
    assert out.stat().st_mode & 0o777 == (tmp_path / "a.safetensors.json").stat().st_mode & 0o777
    beside = json.loads((tmp_path / "a.safetensors.json").read_text())
    assert beside["backbone"] == "resnet10_tiny" and "equal when read back" in beside["checked"]


def test_detectron2_layout(checkpoint, tmp_path, capsys):
    out = run(checkpoint, "detectron2", tmp_path / "r.pkl")
    content = pickle.loads(out.read_bytes())
    assert set(content) == {"model", "__author__", "matching_heuristics"} and content["matching_heuristics"] is True
    assert all(isinstance(array, np.ndarray) for array in content["model"].values())
    own = checkpoint[1].online.encoder.body.state_dict()
    assert len(content["model"]) == sum(not name.endswith("num_batches_tracked") for name in own)
    for theirs, ours in {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_mean": "bn1.running_mean",
        "res2.1.conv2.weight": "layer1.1.conv2.weight",
        "res5.0.conv1.norm.bias": "layer4.0.bn1.bias",
        "res3.0.shortcut.weight": "layer2.0.downsample.0.weight",
        "res3.0.shortcut.norm.running_var": "layer2.0.downsample.1.running_var",
    }.items():
        assert np.array_equal(content["model"][theirs], own[ours].numpy()), theirs
    assert "INPUT.FORMAT=RGB" in capsys.readouterr().out


def test_mmdet_names(checkpoint, tmp_path):
    content = torch.load(run(checkpoint, "mmdet", tmp_path / "r.pth"), weights_only=True)
    own = checkpoint[1].online.encoder.body.state_dict()
    assert set(content["state_dict"]) == {f"backbone.{name}" for name in own}
    assert content["meta"]["method"] == "scrl"


def test_published_layout_comes_back_whole(tmp_path):
    checkpoint = trained(NAME, tmp_path / "run", momentum=True)
    _, model, optimizer = checkpoint
    out = run(checkpoint, "scrl-reference", tmp_path / "checkpoint_last.pth")
    content = torch.load(out, weights_only=True)
    assert content["epoch"] == 2 and content["predictor_state_dict"]["net.0.weight"].shape == (8, 4)
    assert torch.equal(content["target_network_state_dict"]["encoder.1.weight"], model.target.encoder.body.bn1.weight)
    assert content["evaluator_state_dict"]["linear.bias"].shape == (3,)
    groups = content["optimizer_state_dict"]["param_groups"]
    names = [name for name, _ in published_parameters(content)]
    expected = [[n for n in names if not left_out(n)], [n for n in names if left_out(n)]]
    assert [len(group["params"]) for group in groups] == list(map(len, expected))
    shapes = dict(published_parameters(content))
    for index, name in enumerate(expected[0] + expected[1]):
        assert content["optimizer_state_dict"]["state"][index]["momentum_buffer"].shape == shapes[name].shape, name

    config = load_recipe("demo")
    config.model.backbone, config.model.hidden_dim, config.model.projection_dim = NAME, 8, 4
    from scrl_fast.prepare import build_model, build_optimizer

    fresh = build_model(config, 3)
    fresh_optimizer = build_optimizer(fresh, config, 8)
    report = weights.load_into_scrl(fresh, out)
    assert "projector, target projector, predictor, probe loaded" in str(report) and report.layout == "scrl-reference"
    ours, theirs = model.state_dict(), fresh.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    weights.load_momentum(fresh, fresh_optimizer, weights.read(out))
    for (name, mine), other in zip(fresh.named_parameters(), model.parameters(), strict=True):
        if mine.requires_grad:
            found = fresh_optimizer.state[mine]["momentum_buffer"]
            assert torch.equal(found, optimizer.state[other]["momentum_buffer"]), name


def published_parameters(content):
    """Names and tensors of the trained parameters, module by module, as the published implementation chains them."""
    for part in ("online_network", "predictor", "evaluator"):
        for name, tensor in content[f"{part}_state_dict"].items():
            if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
                yield f"{part} {name}", tensor


def left_out(name):
    return "bn" in name.split()[1] or "bias" in name.split()[1]


def test_onnx_runs_to_1e_4(tiny, tmp_path):
    pytest.importorskip("onnx", reason="onnx is in the extra 'export'")
    pytest.importorskip("onnxscript", reason="onnxscript is in the extra 'export'")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is in the extra 'export'")
    out = run(tiny, "onnx", tmp_path / "a.onnx", "--size", "64")
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 64, 64), (3, 3, 96, 72)):
        images = torch.randn(shape)
        (found,) = session.run(None, {"images": images.numpy()})
        expected = features(tiny[1].online.encoder, images)
        assert np.abs(found - expected.numpy()).max() <= 1e-4 * expected.abs().max()
    assert session.get_modelmeta().custom_metadata_map["backbone"] == "resnet10_tiny"
    assert {path.name for path in tmp_path.iterdir()} == {"a.onnx", "a.onnx.json"}


def test_refusals(tiny, checkpoint, tmp_path, capsys):
    for to in ("torchvision", "timm", "detectron2", "mmdet", "scrl-reference"):
        with pytest.raises(UsageError, match=r"has no network like 'resnet10_tiny'"):
            export.export(tiny[0], to, tmp_path / "x")
    out = run(checkpoint, "torchvision", tmp_path / "a.pth")
    with pytest.raises(SystemExit) as stopped:
        export.main([str(checkpoint[0]), "--to", "torchvision", str(out)])
    assert stopped.value.code == 2 and "exists already" in capsys.readouterr().err
    with pytest.raises(UsageError, match="holds the encoder only"):
        export.export(out, "scrl-reference", tmp_path / "y.pth")
    with pytest.raises(UsageError, match=r"no weights at .*none\.pt"):
        export.export(tmp_path / "none.pt", "timm", tmp_path / "y.pth")
    with pytest.raises(UsageError, match=r"the folder .*nowhere does not exist"):
        export.export(checkpoint[0], "timm", tmp_path / "nowhere" / "y.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "a.pth.json"]


def test_a_wrong_file_is_not_published(checkpoint, tmp_path, monkeypatch):
    from scrl_fast.weights import formats

    right = formats.to_detectron2
    swapped = {"layer1.0.conv1.weight": "layer1.0.conv2.weight", "layer1.0.conv2.weight": "layer1.0.conv1.weight"}
    monkeypatch.setattr(formats, "to_detectron2", lambda name: right(swapped.get(name, name)))
    with pytest.raises(RuntimeError, match=r"was written wrongly: .*layer1\.0\.conv1\.weight"):
        export.export(checkpoint[0], "detectron2", tmp_path / "a.pkl")
    assert not list(tmp_path.iterdir())


def test_timm_extractor_back_into_timm(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is an extra")
    model = SCRL("timm:resnetv2_50", hidden_dim=8, projection_dim=4)
    torch.save({"model": model.state(), "config": {"model": {"backbone": "timm:resnetv2_50"}}}, tmp_path / "a.pt")
    export.export(tmp_path / "a.pt", "timm", tmp_path / "b.pth")
    network = timm.create_model("resnetv2_50", num_classes=0)
    result = network.load_state_dict(torch.load(tmp_path / "b.pth", weights_only=True), strict=False)
    assert not result.unexpected_keys and all(name.startswith("norm.") for name in result.missing_keys)
    encoder = build_encoder("timm:resnetv2_50")
    assert len(weights.load_into(encoder, tmp_path / "b.pth").matched) == len(encoder.body.state_dict())
