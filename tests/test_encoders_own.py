"""Networks of the user's own as encoders: what is found, what is refused, and that no file makes code run."""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import own_encoders
import pytest
import torch
from tiny_trainer import Pictures, make_config, state_of
from tiny_transfer import transfer
from torch import nn

from scrl_fast import train, weights
from scrl_fast.config.command_line import parse
from scrl_fast.config.schema import Config
from scrl_fast.errors import UsageError
from scrl_fast.evaluate.__main__ import main as evaluate
from scrl_fast.export import export
from scrl_fast.models import build_encoder, wrap_module
from scrl_fast.trainer import SCRLTrainer
from scrl_fast.transfer import load_detector
from scrl_fast.transfer.detector import build_detector
from scrl_fast.transfer.levels import level_maps

SIX = "own_encoders:six_layers"


def config_for(folder, backbone="resnet10_tiny", **train):
    config = make_config(folder, **train)
    config.model.backbone = backbone
    return config


# ---- what is found ----


@pytest.mark.parametrize(
    "make, size, channels, stride",
    [
        (own_encoders.six_layers, 64, 32, 32),
        (own_encoders.six_layers, 100, 32, 32),
        (own_encoders.stride_8, 32, 16, 8),
        (own_encoders.YoloLike, 64, 128, 32),
        (own_encoders.fixed_size, 32, 8, 4),
        (lambda: nn.Conv2d(3, 5, 14, 14), 224, 5, 14),
        (lambda: nn.Conv2d(3, 5, 1), 17, 5, 1),
    ],
)
def test_channels_and_stride_are_found(make, size, channels, stride) -> None:
    encoder = wrap_module(make(), size=size)
    assert (encoder.out_channels, encoder.stride) == (channels, stride)
    assert encoder(torch.zeros(2, 3, size, size)).shape == (2, channels, -(-size // stride), -(-size // stride))


def test_timms_feature_maps_and_a_whole_convnext_of_pythons() -> None:
    timm = pytest.importorskip("timm")
    encoder = wrap_module(timm.create_model("convnext_atto", features_only=True), size=64)
    assert (encoder.out_channels, encoder.stride, encoder.name) == (320, 32, "<FeatureListNet>")
    with pytest.raises(UsageError, match=r"must give a feature map .*it gave a tensor \[1, 1000\]"):
        wrap_module(timm.create_model("convnext_atto"), size=64)


def test_a_dry_run_changes_neither_the_network_nor_any_generator() -> None:
    module = own_encoders.Random().train()
    module.conv.eval()
    before, modes = copy.deepcopy(module.state_dict()), [m.training for m in module.modules()]
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    wrap_module(module, size=32)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert all(map(torch.equal, before.values(), module.state_dict().values()))
    assert modes == [m.training for m in module.modules()]


@pytest.mark.parametrize(
    "make, message",
    [
        (
            own_encoders.unpadded,
            r"7 x 7 cells for an image of 64 x 64 pixels, smaller than its stride of 8 says \(8 x 8\)",
        ),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 4)), r"it gave a tensor \[1, 4\]"),
        (lambda: nn.LazyConv2d(4, 3), "lazy parameters"),
        (lambda: nn.Conv2d(4, 4, 3), "fails with RuntimeError"),
        (lambda: nn.AdaptiveAvgPool2d(3), "stride cannot be told from 3 rows of cells for 64 pixels"),
        (lambda: nn.Module(), "fails with NotImplementedError"),
        (lambda: "resnet", "must be a torch.nn.Module, is a str"),
    ],
)
def test_what_is_no_encoder_is_refused_with_what_it_gave(make, message) -> None:
    with pytest.raises(UsageError, match=message):
        wrap_module(make(), size=64)


@pytest.mark.parametrize(
    "attribute, value, message",
    [
        ("stride", 4, r"smaller than its stride of 4 says \(16 x 16\)"),
        ("stride", 16, r"larger than its stride of 16 says \(4 x 4\)"),
        ("out_channels", 5, "its out_channels is 5, but its map has 16"),
    ],
)
def test_attributes_that_the_map_belies_are_refused(attribute, value, message) -> None:
    module = own_encoders.stride_8()
    setattr(module, attribute, value)
    with pytest.raises(UsageError, match=message):
        wrap_module(module, size=64)
    setattr(module, attribute, {"stride": 8, "out_channels": 16}[attribute])
    assert wrap_module(module, size=64).stride == 8


# ---- training ----


def test_a_module_and_its_function_train_to_the_same_bits_and_a_run_goes_on(tmp_path) -> None:
    config = config_for(tmp_path / "named", SIX)
    config.train.channels_last = False
    named = SCRLTrainer(config, source=Pictures())
    torch.manual_seed(config.train.seed)
    module = own_encoders.six_layers()
    config = config_for(tmp_path / "given")
    config.train.channels_last = False
    given = SCRLTrainer(config, source=Pictures(), encoder=module)
    assert given.model.online.encoder.body is module and given.config.model.backbone == "<Sequential>"
    assert all(map(torch.equal, named.model.online.encoder.state_dict().values(), module.state_dict().values()))
    before = copy.deepcopy(module.state_dict())
    given.fit()
    assert not all(map(torch.equal, before.values(), module.state_dict().values()))

    half = SCRLTrainer(config_for(tmp_path / "half", SIX), source=Pictures())
    half.last_step = 3
    half.fit()
    whole = SCRLTrainer(config_for(tmp_path / "whole", SIX), source=Pictures())
    whole.fit()
    config = config_for(tmp_path / "half", SIX)
    config.resume = "auto"
    rest = SCRLTrainer(config, source=Pictures())
    summary = rest.fit()
    assert all(map(torch.equal, state_of(whole), state_of(rest)))
    assert f"--model.backbone={SIX}" in summary["resume_command"]


def test_a_given_encoder_has_no_second_one(tmp_path) -> None:
    config = config_for(tmp_path)
    config.model.target_init = "random"
    with pytest.raises(UsageError, match=r"model\.target_init=random makes a second <Sequential>"):
        SCRLTrainer(config, source=Pictures(), encoder=own_encoders.six_layers())


@pytest.mark.parametrize(
    "name, message",
    [
        ("no_such_package.net:make", "cannot import no_such_package"),
        ("own_encoders:six_layer", "own_encoders has no six_layer; did you mean 'six_layers'"),
        ("own_encoders:number", "must be a function without arguments, is a int"),
        ("own_encoders:no_module", r"must make a torch\.nn\.Module, made a int"),
        ("own_encoders:failing", "the function failed with OSError: no such weights"),
        ("<Sequential>", "was handed over in Python"),
    ],
)
def test_a_function_that_makes_no_encoder_is_named(name, message) -> None:
    with pytest.raises(UsageError, match=message):
        build_encoder(name)


@pytest.mark.parametrize("name", ["resnet51", "a b:c", "net:", ":net", "os.path", "a;b:c"])
def test_names_that_can_be_nothing_are_refused_before_torch(name) -> None:
    with pytest.raises(UsageError, match=r"model\.backbone=.*must be one of .*package\.module:function"):
        Config.from_dict({"model": {"backbone": name}})


# ---- no code by a file ----


def code_of(command, argv) -> object:
    with pytest.raises(SystemExit) as stopped:
        command(argv)
    return stopped.value.code


@pytest.fixture
def marked(tmp_path, monkeypatch):
    """A run of an encoder whose making leaves a mark, which is taken away again."""
    mark = tmp_path / "mark"
    monkeypatch.setenv(own_encoders.MARK, str(mark))
    config = config_for(tmp_path / "run", "own_encoders:marking", epochs=1)
    SCRLTrainer(config, source=Pictures()).fit()
    mark.unlink()
    return tmp_path / "run", mark


def test_no_file_alone_makes_code_run(marked, tmp_path, capsys) -> None:
    run, mark = marked
    asked = "--model.backbone=own_encoders:marking"
    for argv in (
        [f"--resume={run}"],
        [f"--resume={run}/checkpoints/last.pt"],
        [f"--config={run}/config.yaml"],
        [f"--config={run}/config.yaml", "--resume=auto"],
    ):
        assert code_of(train.main, argv) == 2
        assert "names code to import, model.backbone=own_encoders:marking" in capsys.readouterr().err
        assert parse([*argv, asked], prog="x").config.model.backbone == "own_encoders:marking"
    (run / "config.yaml").unlink()  # then the checkpoint's own options count
    assert code_of(train.main, [f"--resume={run}"]) == 2
    with pytest.raises(UsageError, match="names code to import"):
        file = tmp_path / "a.yaml"
        file.write_text("model: {backbone: 'own_encoders:marking'}")
        Config.from_yaml(file)
    assert code_of(evaluate, ["rank", f"--checkpoint={run}", "--data.source=demo"]) == 2
    assert "is not imported because a file says so" in capsys.readouterr().err
    with pytest.raises(weights.WeightsError, match="is not imported because a file says so"):
        weights.load_encoder(run / "checkpoints" / "last.pt")
    with pytest.raises(weights.WeightsError, match="is not imported"):
        export(run, "safetensors", tmp_path / "x.safetensors")
    assert not mark.exists()
    assert weights.load_encoder(run, backbone="own_encoders:marking") and mark.exists()


@pytest.mark.parametrize("to, name", [("safetensors", "x.safetensors"), ("hf", "folder")])
def test_an_export_states_code_and_does_not_run_it(marked, tmp_path, to, name) -> None:
    run, mark = marked
    export(run, to, tmp_path / name, backbone="own_encoders:marking")
    mark.unlink()
    with pytest.raises(weights.WeightsError, match="states that its encoder is made by code, own_encoders:marking"):
        weights.encoder_of(tmp_path / name)
    assert not mark.exists()
    with pytest.raises(UsageError, match="names code to import, backbone=own_encoders:marking"):
        file = tmp_path / "evaluate.yaml"
        file.write_text("backbone: own_encoders:marking")
        from scrl_fast.config.command_line import parse_as
        from scrl_fast.evaluate.config import TASK_OPTIONS

        parse_as(TASK_OPTIONS["rank"], [f"--config={file}"], prog="x", description="")


# ---- exports and transfer ----


def test_an_export_has_its_own_names_and_comes_back(tmp_path) -> None:
    trainer = SCRLTrainer(config_for(tmp_path / "run", epochs=1), source=Pictures(), encoder=own_encoders.YoloLike())
    trainer.fit()
    run, state = tmp_path / "run", trainer.model.online.encoder.body.state_dict()
    with pytest.raises(UsageError, match="was handed over in Python"):
        export(run, "safetensors", tmp_path / "no.safetensors")
    with pytest.raises(UsageError, match="torchvision has no network like"):
        export(run, "torchvision", tmp_path / "no.pth", encoder=own_encoders.YoloLike())
    for name in ("own_encoders:YoloLike", ""):
        out = tmp_path / f"x{len(name)}.safetensors"
        given = None if name else own_encoders.YoloLike()
        metadata = export(run, "safetensors", out, backbone=name, encoder=given)
        assert metadata["backbone"] == (name or "<YoloLike>")
        assert json.loads(out.with_name(out.name + ".json").read_text())["backbone"] == metadata["backbone"]
        from safetensors.torch import load_file

        assert load_file(out).keys() == state.keys()
        other = own_encoders.YoloLike()
        report = weights.load_into(other, out)
        assert len(report.matched) == len(state) and not report.unexpected
        assert all(map(torch.equal, other.state_dict().values(), state.values()))


def test_a_plain_state_dict_fills_the_network_that_has_its_names(tmp_path) -> None:
    one, two = own_encoders.YoloLike(), own_encoders.YoloLike()
    torch.save(one.state_dict(), tmp_path / "own.pth")
    weights.load_into(wrap_module(two, size=64), tmp_path / "own.pth")
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))
    weights.check_fit(weights.read(tmp_path / "own.pth"), "own_encoders:YoloLike")
    with pytest.raises(weights.WeightsError, match="does not f"):
        weights.check_fit(weights.read(tmp_path / "own.pth"), "resnet18")


def test_onnx_of_an_own_encoder(tmp_path) -> None:
    pytest.importorskip("onnxscript")
    trainer = SCRLTrainer(config_for(tmp_path / "run", epochs=1), source=Pictures(), encoder=own_encoders.stride_8())
    trainer.fit()
    metadata = export(tmp_path / "run", "onnx", tmp_path / "x.onnx", encoder=own_encoders.stride_8(), size=32)
    assert "tensors equal when read back" in metadata["checked"]


def test_levels_are_the_networks_own_maps_or_its_last_layers_at_a_stride() -> None:
    images = torch.randn(1, 3, 64, 96)
    net = own_encoders.six_layers().eval()
    chosen, channels = level_maps(net, "six", [4, 8, 16, 32])
    assert (chosen.layers, channels) == (["8", "11", "14", ""], [12, 16, 24, 32])
    maps = chosen(images)
    assert [list(m.shape) for m in maps] == [[1, 12, 16, 24], [1, 16, 8, 12], [1, 24, 4, 6], [1, 32, 2, 3]]
    torch.testing.assert_close(maps[1], net[:12](images))
    assert not any(module._forward_hooks for module in net.modules())
    yolo, channels = level_maps(own_encoders.YoloLike().eval(), "yolo", [8, 16, 32])
    assert (yolo.places, channels) == ([0, 1, 2], [32, 64, 128])
    yolo, channels = level_maps(own_encoders.YoloLike().eval(), "yolo", [4, 8, 16, 32])
    assert (yolo.layers[0], channels) == ("stages.0", [16, 32, 64, 128])
    with pytest.raises(UsageError, match="of stride 16, 32, only of 2, 4, 8"):
        level_maps(own_encoders.stride_8(), "short", [4, 8, 16, 32])


@pytest.mark.parametrize("detector", ["faster_rcnn", "fcos"])
@pytest.mark.parametrize("make", ["six_layers", "YoloLike"])
def test_a_detector_trains_on_an_own_encoder_with_its_weights(tmp_path, detector, make) -> None:
    encoder = wrap_module(getattr(own_encoders, make)(), f"own_encoders:{make}", size=64)
    network = build_detector(
        detector, 2, backbone=encoder.name, init=encoder, short_side=160, fpn_channels=32, head_channels=8,
        rois_per_image=16, proposals=(8, 8), proposals_before_nms=(8, 8),
    )  # fmt: skip
    copied = network.backbone.body.net.state_dict()
    assert all(map(torch.equal, copied.values(), encoder.body.state_dict().values()))
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    losses = network.train()([torch.rand(3, 160, 200)], [target])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in network.backbone.body.net.parameters())


def test_a_trained_detector_is_loaded_where_its_code_is_named_again(tmp_path, data_root, monkeypatch) -> None:
    mark = tmp_path / "mark"
    monkeypatch.setenv(own_encoders.MARK, str(mark))
    run = transfer("detection", data_root, tmp_path / "run", "--model.backbone=own_encoders:marking")
    run.loop.save()
    mark.unlink()
    with pytest.raises(UsageError, match="names code to import, backbone=own_encoders:marking"):
        load_detector(tmp_path / "run", device="cpu")
    assert not mark.exists()
    detector = load_detector(tmp_path / "run", device="cpu", backbone="own_encoders:marking")
    assert all(map(torch.equal, detector.network.state_dict().values(), run.model.state_dict().values()))


def test_frozen_stages_are_torchvisions() -> None:
    with pytest.raises(UsageError, match=r"model\.frozen_stages=2: only torchvision's .*takes 0 .none. or 5 .all."):
        build_detector("faster_rcnn", 2, backbone=SIX, frozen_stages=2)


@pytest.mark.parametrize("backbone", [SIX, "timm:test_resnet"])
def test_a_whole_backbone_freezes(backbone) -> None:
    if backbone.startswith("timm"):
        pytest.importorskip("timm", reason="timm is an extra")
    network = build_detector("faster_rcnn", 2, backbone=backbone, frozen_stages=5).train()
    before = copy.deepcopy(network.backbone.body.state_dict())
    images = [torch.rand(3, 64, 64)] * 2
    boxes = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    sum(network(images, [boxes] * 2).values()).backward()
    trained = [name for name, weight in network.named_parameters() if weight.grad is not None]
    assert trained and not any(name.startswith("backbone.body") for name in trained)
    after = network.backbone.body.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
