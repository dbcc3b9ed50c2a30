"""Export: every format loads in the library that it is for, strictly where that library can, with equal numbers.

This file is long because every format has a test of its own.
"""

from __future__ import annotations

import json
import pickle
import sys
import types

import numpy as np
import pytest
import torch
import torchvision
import yaml

from scrl_fast import export, weights
from scrl_fast.config.schema import load_recipe
from scrl_fast.errors import UsageError
from scrl_fast.models import SCRL, build_encoder
from scrl_fast.weights.detector_configs import detectron2_config, mmdet_config
from scrl_fast.weights.momentum import momentum_by_name, parameter_order

NAME = "resnet18"


def trained(backbone, folder, classes=3, momentum=False):
    """A checkpoint as the trainer writes it, with random numbers in every tensor."""
    from scrl_fast.build import build_model, build_optimizer
    from scrl_fast.run.checkpoint import CheckpointManager

    config = load_recipe("demo")
    config.model.backbone, config.model.hidden_dim, config.model.projection_dim = backbone, 8, 4
    config.model.target_init, config.data.root = "random", "/data/of/mine"
    model = build_model(config, classes)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():  # means near 0: features that are all 0 would equal any others
            buffer.uniform_(0.5, 1.5) if name.endswith("var") else buffer.uniform_(-0.1, 0.1)
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


@pytest.fixture
def as_if_theirs(monkeypatch):
    """The tiny network as one that other libraries have, too: a ResNet-18 has the same names and takes seconds."""
    from scrl_fast.weights import formats

    monkeypatch.setattr(formats, "TORCHVISION_NAMES", ("resnet10_tiny",))
    monkeypatch.setattr(formats, "REFERENCE_BACKBONES", ("resnet10_tiny",))


def run(checkpoint, to, out, *more):
    assert export.main([str(checkpoint[0]), "--to", to, str(out), *more]) == 0
    return out


def features(module, images):
    with torch.no_grad():
        found = module.eval()(images)
    assert found.std() > 0
    return found


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
    torch.testing.assert_close(features(network, images), features(encoder, images).mean((2, 3)))


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


def test_hub_folder(checkpoint, tmp_path, images, monkeypatch):
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
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(card.split("```python\n")[1].split("```")[0], names)  # the card's own words, as a reader would run them
    assert torch.equal(names["model"].conv1.weight, checkpoint[1].online.encoder.body.conv1.weight)
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


def test_settings_of_a_detector_lie_beside_the_file(checkpoint, tmp_path, capsys):
    run(checkpoint, "detectron2", tmp_path / "r.pkl")
    settings = yaml.safe_load((tmp_path / "r_detectron2.yaml").read_text())
    model = settings["MODEL"]
    assert settings["INPUT"]["FORMAT"] == "RGB" and model["WEIGHTS"] == "r.pkl" and model["BACKBONE"]["FREEZE_AT"] == 0
    assert (model["RESNETS"]["DEPTH"], model["RESNETS"]["RES2_OUT_CHANNELS"]) == (18, 64)
    assert model["RESNETS"]["STRIDE_IN_1X1"] is False and model["PIXEL_MEAN"] == [123.675, 116.28, 103.53]
    assert "r_detectron2.yaml" in capsys.readouterr().out
    run(checkpoint, "mmdet", tmp_path / "r.pth")
    names: dict = {}
    exec((tmp_path / "r_mmdet.py").read_text(), names)  # as mmengine does
    model = names["model"]
    assert model["backbone"]["init_cfg"]["checkpoint"] == "{{ fileDirname }}/r.pth"
    assert (model["backbone"]["depth"], model["neck"]["in_channels"]) == (18, [64, 128, 256, 512])
    assert model["data_preprocessor"]["std"] == [58.395, 57.12, 57.375] and len(names["_base_"]) == 4
    assert "RES2_OUT_CHANNELS" not in detectron2_config("r.pkl", 50, (0.5,) * 3, (0.5,) * 3)
    assert "neck" not in mmdet_config("r.pth", 50, (0.5,) * 3, (0.5,) * 3)
    (tmp_path / "s_mmdet.py").write_text("mine")
    with pytest.raises(UsageError, match=r"s_mmdet\.py exists already"):
        export.export(checkpoint[0], "mmdet", tmp_path / "s.pth")
    assert (tmp_path / "s_mmdet.py").read_text() == "mine" and not (tmp_path / "s.pth").exists()


def test_a_folder_is_uploaded(checkpoint, tmp_path, capsys, monkeypatch):
    said: list = []

    class Hub:
        def create_repo(self, name, **options):
            said.append((name, options))
            if name.endswith("/taken"):
                raise RuntimeError("403 Forbidden:\n no right to write")

        def upload_folder(self, **options):
            said.append(options)
            return "https://hub/commit/1"

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=Hub))
    run(checkpoint, "hf", tmp_path / "hub", "--push", "me/encoder")
    assert said[0] == ("me/encoder", {"private": True, "exist_ok": True})
    assert said[1]["repo_id"] == "me/encoder" and said[1]["folder_path"] == str(tmp_path / "hub")
    assert sorted(said[1]["allow_patterns"]) == sorted(path.name for path in (tmp_path / "hub").iterdir())
    assert "uploaded: https://hub/commit/1" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"hub2 is written, but the hub .*: 403 Forbidden: no right to write"):
        export.export(checkpoint[0], "hf", tmp_path / "hub2", push="me/taken")
    with pytest.raises(UsageError, match="push=encoder: must be OWNER/NAME"):
        export.export(checkpoint[0], "hf", tmp_path / "hub3", push="encoder")
    with pytest.raises(UsageError, match=r"push=me/a: --to=timm writes no folder"):
        export.export(checkpoint[0], "timm", tmp_path / "a.pth", push="me/a")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match="pip install huggingface_hub"):
        export.export(checkpoint[0], "hf", tmp_path / "hub3", push="me/a")
    assert not (tmp_path / "hub3").exists() and not (tmp_path / "a.pth").exists()


def blocks(depths, convolutions, shortcuts):
    """Stage from 1, block from 0, its convolutions, whether it has a projection: what every ResNet is made of."""
    for stage, depth in enumerate(depths, 1):
        for block in range(depth):
            yield stage, block, range(1, convolutions + 1), block == 0 and stage in shortcuts


NORM = ("weight", "bias", "running_mean", "running_var")
FAMILIES = {"resnet18": ((2, 2, 2, 2), 2, (2, 3, 4)), "resnet50": ((3, 4, 6, 3), 3, (1, 2, 3, 4))}


def detectron2_names(*family):
    """As its BasicStem, BasicBlock and BottleneckBlock call them (a norm is a part of its convolution)."""
    layers = ["stem.conv1"]
    for stage, block, convolutions, shortcut in blocks(*family):
        layers += [f"res{stage + 1}.{block}.conv{n}" for n in convolutions]
        layers += [f"res{stage + 1}.{block}.shortcut"] * shortcut
    return {f"{layer}.weight" for layer in layers} | {f"{layer}.norm.{leaf}" for layer in layers for leaf in NORM}


def mmdet_names(*family):
    """As its ResNet of style pytorch calls them (norms beside the convolutions, counters included)."""
    names = {"conv1.weight"} | {f"bn1.{leaf}" for leaf in (*NORM, "num_batches_tracked")}
    for stage, block, convolutions, shortcut in blocks(*family):
        pairs = [(f"conv{n}", f"bn{n}") for n in convolutions] + [("downsample.0", "downsample.1")] * shortcut
        for convolution, norm in pairs:
            names |= {f"layer{stage}.{block}.{convolution}.weight"}
            names |= {f"layer{stage}.{block}.{norm}.{leaf}" for leaf in (*NORM, "num_batches_tracked")}
    return {f"backbone.{name}" for name in names}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_name_that_detectron2_and_mmdet_expect_is_there_and_no_other(tmp_path, name):
    from scrl_fast.weights import formats

    encoder = build_encoder(name)
    formats.write_detectron2(tmp_path / "r.pkl", encoder, {})
    formats.write_mmdet(tmp_path / "r.pth", encoder, {"method": "scrl"})
    assert set(pickle.loads((tmp_path / "r.pkl").read_bytes())["model"]) == detectron2_names(*FAMILIES[name])
    content = torch.load(tmp_path / "r.pth", weights_only=True)
    assert set(content["state_dict"]) == mmdet_names(*FAMILIES[name]) and content["meta"]["method"] == "scrl"
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None)
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict({k.removeprefix("backbone."): v for k, v in content["state_dict"].items()}, assign=True)


def test_published_layout_comes_back_whole(as_if_theirs, tmp_path):
    checkpoint = trained("resnet10_tiny", tmp_path / "run", momentum=True)
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
    config.model.backbone, config.model.hidden_dim, config.model.projection_dim = "resnet10_tiny", 8, 4
    from scrl_fast.build import build_model, build_optimizer

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


def test_a_run_without_labels_keeps_the_places_of_the_published_evaluator(tmp_path):
    """Its optimizer refuses groups of other sizes: 65 and 106 parameters of a ResNet-50, with labels or without."""
    from scrl_fast.weights import formats

    parts = SCRL("resnet50", hidden_dim=8, projection_dim=4).state()
    state = {name: dict(part) for name, part in parts.items() if part is not None}
    order = [name for group in parameter_order(weights.Weights("", "scrl_fast", state)) for name in group]
    tensors = {f"{part}.{name}": tensor for part, named in state.items() for name, tensor in named.items()}
    optimizer = {
        "state": {i: {"momentum_buffer": tensors[name] + 1} for i, name in enumerate(order)},
        "param_groups": [{"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-6, "params": list(range(len(order)))}],
    }
    source = weights.Weights("run", "scrl_fast", state, metadata={"epoch": 3}, optimizer=optimizer)
    formats.write_reference(tmp_path / "checkpoint_last.pth", source)
    content = torch.load(tmp_path / "checkpoint_last.pth", weights_only=True)
    groups = content["optimizer_state_dict"]["param_groups"]
    assert [len(group["params"]) for group in groups] == [65, 106]
    assert set(range(171)) - set(content["optimizer_state_dict"]["state"]) == {64, 170}
    again = weights.read(tmp_path)  # the folder, as `load_dir` names it
    assert again.path.endswith("checkpoint_last.pth")
    found = momentum_by_name(again)
    assert len(found) == 169 and all(torch.equal(found[name], tensors[name] + 1) for name in found)


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

    fresh = build_encoder("resnet10_tiny")
    report = weights.load_into(fresh, out)
    own = tiny[1].online.encoder.body.state_dict()
    assert report.layout == "onnx" and not report.unexpected and set(report.matched) | set(report.missing) == set(own)
    assert all(torch.equal(fresh.body.state_dict()[name], own[name]) for name in report.matched)
    assert {name.rpartition(".")[2] for name in report.missing} == {"num_batches_tracked"}
    assert weights.read(out).metadata["config"]["model"]["method"] == "scrl"


def test_onnx_of_others_is_refused_where_norms_are_folded(tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is in the extra 'export'")
    weight = onnx.numpy_helper.from_array(np.zeros((16, 3, 3, 3), np.float32), "conv1.weight")
    node = onnx.helper.make_node("Conv", ["x", "conv1.weight"], ["y"])
    io = [onnx.helper.make_tensor_value_info(name, 1, None) for name in "xy"]
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([node], "g", io[:1], io[1:], [weight])), tmp_path / "a.onnx"
    )
    with pytest.raises(UsageError, match=r"bn1\.weight.*[Ww]ere its norms folded"):
        weights.load_into(build_encoder("resnet10_tiny"), tmp_path / "a.onnx")
    (tmp_path / "b.onnx").write_bytes(b"junk")
    with pytest.raises(UsageError, match=r"cannot load .*b\.onnx"):
        weights.read(tmp_path / "b.onnx")


@pytest.mark.parametrize("to, name", [("safetensors", "a.safetensors"), ("mmdet", "a.pth"), ("hf", "a")])
def test_what_a_file_says_of_itself_survives_another_conversion(tiny, as_if_theirs, tmp_path, to, name):
    said = [export.export(tiny[0], to, tmp_path / name, branch="target")]
    said.append(export.export(tmp_path / name, "hf", tmp_path / "hub"))
    for metadata in said:
        del metadata["checked"], metadata["format"], metadata["source_layout"]
    assert said[0] == said[1] and said[0]["branch"] == "target" and said[0]["epochs"] == 20


def test_text_that_looks_like_a_number_stays_text():
    from scrl_fast.weights.metadata import flattened, unflattened

    said = {"commit": "12e4567", "scrl_fast": "0.1", "method": "scrl", "empty": "", "quoted": '"a"', "list": "[1]"}
    said |= {"epoch": 2, "mean": [0.5, 0.25], "config": {"train": {"seed": 1}}}
    text = flattened(said)
    assert all(isinstance(value, str) for value in text.values()) and text["method"] == "scrl"
    assert unflattened(text) == said


@pytest.mark.filterwarnings("ignore:.*has no .sha256 beside it:RuntimeWarning")
def test_the_commit_of_the_training_run_is_named(tiny, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "env.json").write_text(json.dumps({"scrl_fast": {"commit": "abc1234"}}))
    (tmp_path / "run" / "checkpoints" / "last.pt").write_bytes(tiny[0].read_bytes())
    assert export.export(tmp_path / "run", "safetensors", tmp_path / "a.safetensors")["commit"] == "abc1234"


def test_refusals(tiny, checkpoint, tmp_path, capsys):
    with pytest.raises(UsageError, match=r"has no network like 'resnet18': it takes resnet50 and resnet101"):
        export.export(checkpoint[0], "scrl-reference", tmp_path / "x.pth")
    for to in ("torchvision", "timm", "detectron2", "mmdet", "scrl-reference"):
        with pytest.raises(UsageError, match=r"has no network like 'resnet10_tiny'"):
            export.export(tiny[0], to, tmp_path / f"x{export.SUFFIXES.get(to, '.pth')}")
    out = run(checkpoint, "torchvision", tmp_path / "a.pth")
    with pytest.raises(SystemExit) as stopped:
        export.main([str(checkpoint[0]), "--to", "torchvision", str(out)])
    assert stopped.value.code == 2 and "exists already" in capsys.readouterr().err
    (tmp_path / "b.pth.json").touch()
    (tmp_path / "c.pth").mkdir()
    for name, message in (("b.pth", r"b\.pth\.json exists already"), ("c.pth", r"c\.pth is a folder, and --to timm")):
        with pytest.raises(UsageError, match=message):
            export.export(checkpoint[0], "timm", tmp_path / name)
    with pytest.raises(UsageError, match=r"a\.pth is a file, and --to hf"):
        export.export(checkpoint[0], "hf", out, overwrite=True)
    (tmp_path / "b.pth.json").unlink()
    (tmp_path / "c.pth").rmdir()
    with pytest.raises(UsageError, match="size=0: must be at least 1"):
        export.export(checkpoint[0], "onnx", tmp_path / "z.onnx", size=0)
    with pytest.raises(UsageError, match="holds the encoder only"):
        export.export(out, "scrl-reference", tmp_path / "y.pth")
    with pytest.raises(UsageError, match=r"no weights at .*none\.pt"):
        export.export(tmp_path / "none.pt", "timm", tmp_path / "y.pth")
    with pytest.raises(UsageError, match=r"the folder .*nowhere does not exist"):
        export.export(checkpoint[0], "timm", tmp_path / "nowhere" / "y.pth")
    for to, name in (("torchvision", "a.safetensors"), ("detectron2", "a.pth"), ("onnx", "a"), ("timm", "a.pkl")):
        with pytest.raises(UsageError, match=rf"a\S*: --to {to} writes a"):
            export.export(checkpoint[0], to, tmp_path / name)
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
    backbone = "timm:test_convnext"  # its extractor spells names otherwise, and has no final norm
    model = SCRL(backbone, hidden_dim=8, projection_dim=4)
    torch.save({"model": model.state(), "config": {"model": {"backbone": backbone}}}, tmp_path / "a.pt")
    export.export(tmp_path / "a.pt", "timm", tmp_path / "b.pth")
    network = timm.create_model("test_convnext", num_classes=0)
    result = network.load_state_dict(torch.load(tmp_path / "b.pth", weights_only=True), strict=False)
    assert not result.unexpected_keys and all(name.startswith("head.norm.") for name in result.missing_keys)
    own = model.online.encoder.body.state_dict()
    encoder = build_encoder(backbone)
    assert len(weights.load_into(encoder, tmp_path / "b.pth").matched) == len(own)
    assert all(torch.equal(tensor, own[name]) for name, tensor in encoder.body.state_dict().items())
