"""Tensors that no network can use are refused by name, whatever file they come from and whatever they would fill."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from tiny_trainer import make_config

import scrl_fast
from scrl_fast import weights
from scrl_fast.build import build
from scrl_fast.errors import UsageError
from scrl_fast.evaluate.__main__ import main as evaluate
from scrl_fast.evaluate.config import LinearOptions
from scrl_fast.evaluate.encoder import EvaluatedEncoder, load_evaluated, probe_of
from scrl_fast.export import export
from scrl_fast.models import build_encoder
from scrl_fast.run.checkpoint import load_networks
from scrl_fast.transfer.config import DetectorConfig
from scrl_fast.transfer.detector import build_detector, check_same_detector
from scrl_fast.transfer.trained import load_detector
from scrl_fast.weights.errors import WeightsError
from scrl_fast.weights.layouts import to_detectron2
from scrl_fast.weights.tensor_values import value_fault
from scrl_fast.weights.training_state import check_training_state

ENCODER, STEM, VARIANCE = "resnet10_tiny", "conv1.weight", "layer1.0.bn1.running_var"
WRONG = {
    "NaN": (lambda t: t.index_fill(0, torch.tensor([0]), float("nan")), "values that are NaN or infinite"),
    "infinite": (lambda t: t / 0, "values that are NaN or infinite"),
    "too large": (lambda t: t.abs().double() + 1e300, "NaN or infinite as float32"),
    "integers": (lambda t: t.to(torch.int32), "is int32, must be floats"),
    "bool": (lambda t: t > 0, "is bool, must be floats"),
    "complex": (lambda t: t.to(torch.complex64), "is complex64, must be floats"),
    "eight bits": (lambda t: t.to(torch.float8_e5m2), "is float8_e5m2, must be floats"),
}
wrong_tensors = pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return {name: tensor + (name == STEM) for name, tensor in build_encoder(ENCODER).body.state_dict().items()}


def saved(path, state):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch", reason="safetensors is an extra").save_file(state, path)
    elif path.suffix == ".pkl":
        arrays = {to_detectron2(name): tensor.numpy() for name, tensor in state.items()}
        path.write_bytes(pickle.dumps({"model": {n: a for n, a in arrays.items() if n}, "__author__": "x"}, 2))
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
@wrong_tensors
def test_an_encoders_tensors_are_refused_by_name(tmp_path, state, suffix, change, said):
    tensor = change(state[STEM])
    if suffix == ".pkl" and said in (WRONG["complex"][1], WRONG["eight bits"][1]):
        pytest.skip("no such array is read from a pickle of NumPy's")
    path = saved(tmp_path / f"a{suffix}", state | {STEM: tensor})
    encoder = build_encoder(ENCODER)
    before = {name: value.clone() for name, value in encoder.body.state_dict().items()}
    for load in (lambda: weights.load_into(encoder, path), lambda: weights.load_encoder(path, backbone=ENCODER)):
        with pytest.raises(WeightsError, match=rf"a\{suffix} .*tensor conv1\.weight .*{said}"):
            load()
    assert all(torch.equal(before[name], value) for name, value in encoder.body.state_dict().items())


def test_a_variance_below_zero_is_refused(tmp_path, state):
    path = saved(tmp_path / "a.pth", state | {VARIANCE: -state[VARIANCE]})
    with pytest.raises(WeightsError, match=rf"tensor {VARIANCE} holds the variance -1, must be at least 0"):
        weights.load_into(build_encoder(ENCODER), path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_cast(tmp_path, state, dtype):
    path = saved(tmp_path / "a.pth", {name: t.to(dtype) for name, t in state.items()})  # counters, too
    encoder = build_encoder(ENCODER)
    weights.load_into(encoder, path)
    assert torch.equal(encoder.body.conv1.weight, state[STEM].to(dtype).float())


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (torch.tensor(3, dtype=torch.uint8), ""),
        (torch.tensor(3.0), ""),
        (torch.tensor(3.5), ""),  # of a moving average
        (torch.tensor(-1.0), "holds counts that are negative, NaN or infinite"),
        (torch.tensor(float("nan")), "holds counts that are negative, NaN or infinite"),
        (torch.tensor(True), "is bool, must be whole numbers"),
        (3, "must be a tensor, is 3"),
        (torch.zeros(3).to_sparse(), "is sparse (torch.sparse_coo), must be dense"),
    ],
)
def test_counters(value, fault):
    assert value_fault("bn1.num_batches_tracked", value, torch.int64) == fault


def test_only_counters_may_be_averages():
    assert value_fault("index", torch.tensor(3.5), torch.int64) == "is float32, must be whole numbers"
    assert value_fault("index", torch.tensor(3.0), torch.int64) == ""


@wrong_tensors
def test_heads_and_momentum_are_refused_by_name(tmp_path, change, said):
    config = make_config(tmp_path)
    model, optimizer = build(config, num_classes=3, global_batch=8, device=torch.device("cpu"))
    head = "2.weight" if "2.weight" in model.predictor.state_dict() else next(iter(model.predictor.state_dict()))
    parts = model.state()
    parts["predictor"] = parts["predictor"] | {head: change(torch.ones_like(parts["predictor"][head]))}
    with pytest.raises(WeightsError, match=rf"checkpoint part 'predictor': tensor {head} .*{said}"):
        load_networks(model, parts)
    torch.save({"model": parts, "config": config.to_dict()}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=rf"a\.pt \(scrl_fast\): predictor: tensor {head} .*{said}"):
        weights.load_into_scrl(model, tmp_path / "a.pt")
    for p in model.online.parameters():
        optimizer.state[p]["momentum_buffer"] = change(torch.ones_like(p))
    torch.save(
        {"model": model.state(), "config": config.to_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "b.pt"
    )
    with pytest.raises(WeightsError, match=rf"b\.pt \(scrl_fast\): momentum: tensor .*{said}"):
        weights.load_momentum(model, optimizer, weights.read(tmp_path / "b.pt"))
    with pytest.raises(WeightsError, match=f"optimizer cannot be used: 'state' .*momentum_buffer.*{said}"):
        check_training_state("b.pt", {"optimizer": optimizer.state_dict()})


@pytest.fixture(scope="module")
def detector():
    config = DetectorConfig(backbone=ENCODER, fpn_channels=32)
    network = build_detector("fcos", 2, backbone=ENCODER, config=config)
    options = {"task": "custom", "model": vars(config) | {"detector": "fcos"}}
    return {"model": network.state_dict(), "config": options, "step": 1}, network


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"test_short_side": 20_000}, r"model\.test_short_side=20000: must be from 1 to 16384"),
        ({"test_short_side": 9000, "long_side": 9000}, "81000000 pixels, more than max_pixels=4194304: --max_pixels="),
        ({"detections": 50_000}, "model.detections=50000: at most 10000"),
        ({"proposals": (1000, 90_000)}, "model.proposals=.*90000.*: at most 10000"),
        ({"fpn_channels": 10**6}, "model.fpn_channels=1000000: must be from 1 to 65536"),
        ({"anchor_scale": 1e300}, r"model\.anchor_scale=1e\+300: must be above 0 and at most 16384"),
        ({"detections": 10**30}, "model.detections: is a whole number of 100 bits"),
        ({"mean": [0, float("nan"), 0]}, "model.mean=nan: must be finite"),
    ],
)
def test_sizes_that_a_detectors_file_asks_for_are_bounded(tmp_path, detector, options, said):
    document, _ = detector
    config = document["config"] | {"model": document["config"]["model"] | options}
    torch.save(document | {"config": config}, tmp_path / "a.pt")
    with pytest.raises(UsageError, match=rf"a\.pt.*{said}"):
        load_detector(tmp_path / "a.pt", device="cpu")
    if "long_side" in options:
        assert load_detector(tmp_path / "a.pt", device="cpu", max_pixels=9000**2).config.long_side == 9000


@wrong_tensors
def test_a_detectors_tensors_are_refused_by_name(tmp_path, detector, change, said):
    document, network = detector
    name = "head.classification_head.cls_logits.bias"
    document = document | {"model": document["model"] | {name: change(document["model"][name])}}
    torch.save(document, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=rf"a\.pt: tensor {name} .*{said}"):
        load_detector(tmp_path / "a.pt", device="cpu")
    with pytest.raises(WeightsError, match=rf"resume=b\.pt: tensor {name} .*{said}"):
        check_same_detector(network, document, "b.pt")


def test_a_detector_in_half_precision_is_cast(tmp_path, detector):
    document, _ = detector
    halves = {name: t.half() if t.is_floating_point() else t for name, t in document["model"].items()}
    torch.save(document | {"model": halves}, tmp_path / "a.pt")
    own = load_detector(tmp_path / "a.pt", device="cpu").network.state_dict()
    assert all(torch.equal(tensor, halves[name].to(tensor.dtype)) for name, tensor in own.items())


# ---- the probe, and what a file says of its images ----


@pytest.mark.parametrize(
    ("probe", "said"),
    [
        ({"weight": torch.ones(3, 64)}, "no linear layer of"),
        ({"weight": torch.ones(3, 9), "bias": torch.ones(3)}, "no linear layer of"),
        ({"weight": torch.tensor(1.0), "bias": torch.ones(3)}, "no linear layer of"),
        ({"weight": None, "bias": torch.ones(3)}, "NaN or infinite"),
    ],
)
def test_a_probe_that_is_no_layer_is_refused(probe, said):
    encoder = build_encoder(ENCODER)
    if probe["weight"] is None:
        probe["weight"] = torch.full((3, encoder.out_channels), float("nan"))
    with pytest.raises(ValueError, match=rf"a\.pt.*{said}"):
        probe_of(EvaluatedEncoder(encoder, "a.pt", "", probe=probe), 3, "here")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"views": {"mean": "grey"}}, "views.mean='grey': must be a list of 3 numbers"),
        ({"views": {"mean": [0.5, float("nan"), 0.5]}}, r"views\.mean=nan: must be finite"),
        ({"views": {"std": [0, 0.2, 0.2]}}, r"views\.std=\[0\.0, 0\.2, 0\.2\]: must be above 0"),
        ({"views": [1], "data": 3, "model": "x", "train": None}, ""),
        ({"views": {"size": "224"}}, r"views\.size='224': must be a whole number"),
    ],
)
def test_options_in_a_file_of_weights_are_checked(tmp_path, state, config, said):
    parts = {"online": {f"encoder.body.{name}": tensor for name, tensor in state.items()}}
    torch.save({"model": parts, "config": config, "step": 1}, tmp_path / "a.pt")
    options = LinearOptions(checkpoint=str(tmp_path / "a.pt"), backbone=ENCODER, device="cpu")
    if said:
        with pytest.raises(WeightsError, match=rf"a\.pt: the options in it cannot be used: .*{said}"):
            load_evaluated(options)
        return
    assert load_evaluated(options).size == 224
    metadata = export(tmp_path / "a.pt", "safetensors", tmp_path / "b.safetensors", backbone=ENCODER)
    assert metadata["epochs"] == 0 and metadata["method"] == ""


def test_a_large_view_in_a_file_is_refused_where_it_would_be_used(tmp_path, state, capsys):
    parts = {"online": {f"encoder.body.{name}": tensor for name, tensor in state.items()}}
    path = tmp_path / "a.pt"
    torch.save({"model": parts, "config": {"views": {"size": 2048}}, "step": 1}, path)
    evaluated = load_evaluated(LinearOptions(checkpoint=str(path), backbone=ENCODER, device="cpu"))
    assert (evaluated.size, evaluated.view_size(64)) == (2048, 64)
    said = r"a\.pt: .* 2048 pixels, and at most 1024 is taken from a file: give the size, --size=2048"
    with pytest.raises(WeightsError, match=said):
        evaluated.view_size()
    picture = np.zeros((40, 40, 3), np.uint8)
    with pytest.raises(WeightsError, match=said):
        scrl_fast.embed(picture, weights=path)
    assert len(scrl_fast.embed(picture, weights=path, size=64)) == 1
    dense = ["dense-consistency", f"--checkpoint={path}", f"--backbone={ENCODER}", "--images=2", "--plot="]
    with pytest.raises(SystemExit) as ended:
        evaluate(dense)
    assert ended.value.code == 2 and "give the size, --views.size=2048" in capsys.readouterr().err
    evaluate([*dense, "--views.size=64", "--boxes.min_size=20"])
