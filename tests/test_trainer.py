"""The trainer on a tiny network: what a step does to odd batches, what a run leaves behind, what is refused early."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
import traceback

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from scrl_fast import prepare, runlog
from scrl_fast.config import Config
from scrl_fast.resume import restore
from scrl_fast.schedules import ema_momentum, learning_rate
from scrl_fast.trainer import NonFiniteError, SCRLTrainer

pytestmark = pytest.mark.usefixtures("no_curves")


class Pictures:
    """Random images, labelled or not."""

    def __init__(self, count=12, num_classes=0):
        self.images = np.random.default_rng(0).integers(0, 256, (count, 40, 44, 3), dtype=np.uint8)
        self.num_classes = num_classes

    def __len__(self):
        return len(self.images)

    def read(self, index):
        return self.images[index]

    def label(self, index):
        return index % self.num_classes if self.num_classes else -1

    def name_of(self, index):
        return f"picture {index}"


def make_config(folder, **train):
    config = Config()
    config.data.workers = 0
    config.views.size, config.views.recipe = 32, "simple"
    config.boxes.min_size, config.boxes.per_image = 8, 3
    config.model.backbone = "resnet10_tiny"
    config.model.hidden_dim, config.model.projection_dim = 16, 8
    config.optim.warmup_epochs = 1
    config.run.dir, config.run.tensorboard, config.run.log_every = str(folder), False, 2
    config.train = dataclasses.replace(config.train, **{"batch_size": 4, "epochs": 2, "precision": "fp32"} | train)
    return config


def make_trainer(folder, source=None, **train):
    return SCRLTrainer(make_config(folder, **train), source=source or Pictures())


def state_of(trainer):
    weights = {key: value for name, part in trainer.model.state().items() if part for key, value in part.items()}
    buffers = [state["momentum_buffer"] for state in trainer.optimizer.state.values()]
    return copy.deepcopy([*trainer.model.state_dict().values(), *weights.values(), *buffers])


def first_batch(trainer):
    stream = trainer.batches()
    (batch,) = next(stream)
    stream.close()
    return batch


def with_boxes(batch, count):
    return dataclasses.replace(batch, boxes=tuple(boxes[:count] for boxes in batch.boxes))


# One step -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1])
def test_a_batch_with_no_box_or_one_trains_on(tmp_path, count):
    trainer = make_trainer(tmp_path)
    batch = first_batch(trainer)
    for boxes in (with_boxes(batch, count), batch):
        trainer.train_step([boxes])
    (few, *_), (loss, *_) = trainer.meter.drain()
    assert few == 0 if count == 0 else 0 <= few <= 8
    assert 0 < loss < 8
    assert all(torch.isfinite(value).all() for value in state_of(trainer))


@pytest.mark.parametrize("method", ["scrl", "byol"])
def test_a_batch_of_one_image_trains(tmp_path, method):
    config = make_config(tmp_path, batch_size=1)
    config.model.method = method
    trainer = SCRLTrainer(config, source=Pictures())
    trainer.train_step([first_batch(trainer)])
    assert math.isfinite(trainer.meter.drain()[0][0])


@pytest.mark.parametrize("bf16, packed", [(False, False), (True, False), (False, True)])
def test_what_the_loader_hands_to_a_gpu_becomes_views_on_the_way_to_the_step(tmp_path, bf16, packed):
    plain, levels = make_trainer(tmp_path / "a"), make_trainer(tmp_path / "b", precision="bf16" if bf16 else "fp32")
    levels.loader._dtype, levels.loader._packed = torch.uint8, packed  # as for a GPU
    expected, found = first_batch(plain).views, first_batch(levels).views
    dtype = torch.bfloat16 if bf16 else torch.float32
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected.to(dtype), rtol=2**-8 if bf16 else 0, atol=1e-6)


@pytest.mark.parametrize("counts", [(5, 2), (4, 0)])
def test_accumulation_is_the_mean_over_the_pairs_of_all_batches(tmp_path, counts):
    trainer = make_trainer(tmp_path, accumulate=2)
    trainer.model.double()
    stream = trainer.batches()
    batches = [with_boxes(batch, count) for batch, count in zip(next(stream), counts, strict=True)]
    stream.close()
    for batch in batches:
        batch.views = batch.views.double()
    model = copy.deepcopy(trainer.model)
    sums = [model(batch.views, batch.boxes).loss * count for batch, count in zip(batches, counts, strict=True)]
    (sum(sums) / sum(counts)).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    seen = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.extend(p.grad.clone() for p in trainer.model.parameters() if p.requires_grad)
    )
    trainer.train_step(batches)
    assert trainer.meter.drain()[0][0] == pytest.approx(sum(sums).item() / sum(counts), rel=1e-12)
    for ours, exact in zip(seen, gradients, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-15)


def test_schedules_follow_the_step_and_the_global_batch(tmp_path):
    trainer = make_trainer(tmp_path, epochs=3, accumulate=2, batch_size=3)  # 12 images: 2 steps an epoch
    trainer.config.optim.ema_momentum = 0.9
    batch = first_batch_group(trainer)
    plan = {"steps_per_epoch": 2, "epochs": 3, "warmup_epochs": 1}
    for step in range(6):
        trainer.train_step(batch)
        assert trainer.optimizer.param_groups[0]["lr"] == learning_rate(step, base=0.45 * 6 / 256, **plan)
        assert trainer.momentum == ema_momentum(step, base=0.9, total_steps=6)


def first_batch_group(trainer):
    stream = trainer.batches()
    group = next(stream)
    stream.close()
    return group


def test_the_probe_learns_from_labels_and_moves_nothing_else(tmp_path):
    weights = []
    for classes, folder in ((3, "labelled"), (0, "unlabelled")):
        trainer = make_trainer(tmp_path / folder, Pictures(num_classes=classes))
        if classes:
            before = trainer.model.probe.weight.clone()
        for _ in range(2):
            trainer.train_step([first_batch(trainer)])
        weights.append(trainer.model.online.state_dict())
        if classes:
            assert not torch.equal(trainer.model.probe.weight, before)
            assert {row[3] for row in trainer.meter.drain()} == {8.0}  # both views of four images are counted
    for labelled, unlabelled in zip(*(part.values() for part in weights), strict=True):
        assert torch.equal(labelled, unlabelled)


def test_compat_takes_a_random_target_and_the_probe_under_lars(tmp_path):
    config = make_config(tmp_path)
    config.compat = "kakaobrain"
    trainer = SCRLTrainer(config, source=Pictures(num_classes=3))
    assert not torch.equal(trainer.model.target.projector.net[0].weight, trainer.model.online.projector.net[0].weight)
    adapted = [p for group in trainer.optimizer.param_groups if group["adapt"] for p in group["params"]]
    assert any(p is trainer.model.probe.weight for p in adapted)
    assert len(trainer.optimizer.param_groups) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_batch_changes_no_parameter(tmp_path, value):
    trainer = make_trainer(tmp_path, Pictures(num_classes=3))
    batch = first_batch(trainer)
    trainer.train_step([batch])
    parameters = copy.deepcopy(list(trainer.model.parameters()))
    buffers = copy.deepcopy([state["momentum_buffer"] for state in trainer.optimizer.state.values()])
    broken = dataclasses.replace(batch, views=batch.views.clone())
    broken.views[0, 0, 0, 0] = value
    trainer.train_step([broken])
    for ours, before in zip(trainer.model.parameters(), parameters, strict=True):
        assert torch.equal(ours, before)
    for state, before in zip(trainer.optimizer.state.values(), buffers, strict=True):
        assert torch.equal(state["momentum_buffer"], before)
    with pytest.raises(NonFiniteError, match=r"step 2: .*no checkpoint was written yet"):
        trainer.read_meter()


class Reads(TorchDispatchMode):
    """Collects which functions of the package ask for a tensor's value, which on a GPU would stop the CPU."""

    def __init__(self):
        super().__init__()
        self.readers = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if str(operation).startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal")):
            frames = [f for f in traceback.extract_stack() if f"{os.sep}scrl_fast{os.sep}" in f.filename]
            self.readers |= {f"{os.path.basename(frame.filename)} {frame.name}" for frame in frames[-1:]}
        return operation(*args, **kwargs or {})

    def counting(self, method):
        def read(tensor):
            self.readers.add(method.__name__)
            return method(tensor)

        return read


def test_a_step_reads_nothing_back_from_the_device(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, Pictures(num_classes=3), accumulate=2)
    batches = first_batch_group(trainer)
    trainer.train_step(batches)
    with Reads() as reads:
        monkeypatch.setattr(torch.Tensor, "tolist", reads.counting(torch.Tensor.tolist))
        trainer.train_step(batches)
    # the loss looks at the incoming gradient on a CPU, where that costs nothing, and only there
    assert reads.readers <= {"normalized_mse_loss.py _scaled"}
    with reads:
        trainer.read_meter()
    assert "tolist" in reads.readers  # the net does catch


def test_bf16_runs_and_keeps_float32_weights(tmp_path):
    trainer = make_trainer(tmp_path, Pictures(num_classes=3), precision="bf16")
    before = trainer.model.online.encoder.body.conv1.weight.clone()
    for _ in range(2):
        trainer.train_step([first_batch(trainer)])
    assert trainer.projections.dtype == torch.bfloat16
    assert not torch.equal(trainer.model.online.encoder.body.conv1.weight, before)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert 0 < trainer.meter.drain()[1][0] < 8


# A run --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = SCRLTrainer(make_config(folder, epochs=3), source=Pictures(num_classes=3))
    return folder, trainer, trainer.fit()


def test_the_run_folder_holds_what_was_promised(finished):
    folder, _, summary = finished
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "log.txt", "env.json", "boxes.png", "checkpoints"} <= names
    assert summary["run_dir"] == str(folder)
    assert summary["step"] == 9
    assert summary["epoch"] == 3
    assert not summary["interrupted"]
    state = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    keys = {"model", "optimizer", "step", "epoch", "config", "rng", "loader", "version"}
    assert keys <= set(state)
    assert set(state["model"]) == {"online", "target", "predictor", "probe"}
    assert (state["step"], state["epoch"], state["loader"]["batch"]) == (9, 3, 0)
    assert Config.from_dict(yaml.safe_load((folder / "config.yaml").read_text())).run.dir == str(folder)
    assert isinstance(json.loads((folder / "env.json").read_text()), dict)
    assert Image.open(folder / "boxes.png").size[0] > 500
    assert (folder / "checkpoints" / "best.pt").exists()


def test_metrics_have_each_logging_point_once_with_every_key(finished):
    folder, _, summary = finished
    rows = runlog.read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 4, 6, 8, 9]
    for row in rows:
        for key in ("epoch", "loss", "lr", "ema_momentum", "images_per_s", "data_wait", "feature_std", "rankme"):
            assert isinstance(row[key], (int, float)), key
        assert 0 < row["loss"] < 8
        assert 0 < row["feature_std"] < 1
        assert 1 <= row["rankme"] <= 8
        assert 0 <= row["data_wait"] <= 1
        assert 0 <= row["probe_accuracy"] <= 1
        assert 0 < row["pairs_per_image"] <= 3
    assert summary["loss"] == rows[-1]["loss"]
    assert rows[-1]["lr"] == 0.0
    assert [row["epoch"] for row in rows] == [pytest.approx(row["step"] / 3, abs=1e-5) for row in rows]


def test_best_is_the_most_accurate_probe_or_without_labels_the_newest(tmp_path):
    for classes, expected in ((3, 3), (0, 9)):
        folder = tmp_path / str(classes)
        trainer = make_trainer(folder, Pictures(num_classes=classes), epochs=3)
        plain = trainer.report

        def report(trainer=trainer, plain=plain):
            plain()
            trainer.scores = trainer.scores and [1 / trainer.step]  # the first is the best

        trainer.report = report
        trainer.fit()
        assert torch.load(folder / "checkpoints" / "best.pt", weights_only=True)["step"] == expected


def test_compiled_encoders_are_compiled_once_whatever_the_boxes(tmp_path, monkeypatch):
    plain, compiled = torch.nn.Module.compile, []

    def without_code_generation(module, **options):
        compiled.append(module)
        plain(module, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", without_code_generation)
    trainer = make_trainer(tmp_path / "compiled", compile=True)
    assert compiled == [trainer.model.online.encoder, trainer.model.target.encoder]
    eager = make_trainer(tmp_path / "eager")
    batch = first_batch(trainer)
    for count in (12, 12):
        trainer.train_step([with_boxes(batch, count)])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (3, 0, 1, 11):
            trainer.train_step([with_boxes(batch, count)])
    for count in (12, 12, 3, 0, 1, 11):
        eager.train_step([with_boxes(batch, count)])
    assert list(trainer.model.state_dict()) == list(eager.model.state_dict())
    for ours, expected in zip(trainer.model.state_dict().values(), eager.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "processes", "device", "reason"),
    [
        ({}, 1, "cpu", "replays the encoders on a GPU, but this run is on cpu"),
        ({}, 2, "cuda", "does not go with 2 processes"),
        ({"accumulate": 2}, 1, "cuda", "does not go with train.accumulate=2"),
        ({"checkpoint_activations": True}, 1, "cuda", "does not go with train.checkpoint_activations"),
        ({"checkpoint_activations": True, "compile": True}, 1, "cpu", "does not go with train.checkpoint_activations"),
    ],
)
def test_compiling_is_refused_where_it_cannot_be(tmp_path, options, processes, device, reason):
    config = make_config(tmp_path, **({"cuda_graphs": True} if "compile" not in options else {}), **options)
    with pytest.raises(ValueError, match=rf"^train\.(cuda_graphs|compile)=True {re.escape(reason)}"):
        prepare.check_run(config, images=12, world_size=processes, device_type=device)


def test_cuda_graphs_are_asked_of_the_compiler_for_encoders_alone_and_begin_anew_every_step(tmp_path, monkeypatch):
    compiled, begun = [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append((module, options)))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(True))
    monkeypatch.setattr(prepare, "check_compiled", lambda *_: None)
    trainer = make_trainer(tmp_path, cuda_graphs=True)
    options = {"dynamic": False, "mode": "reduce-overhead"}
    assert compiled == [(trainer.model.online.encoder, options), (trainer.model.target.encoder, options)]
    batch = first_batch(trainer)
    for _ in range(2):
        trainer.train_step([batch])
    assert len(begun) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graphs_give_what_eager_encoders_give(tmp_path):
    states = []
    for graphs in (False, True):
        trainer = make_trainer(tmp_path / str(graphs), cuda_graphs=graphs, device="cuda")
        stream = trainer.batches()
        for _ in range(6):
            trainer.train_step(next(stream))
        stream.close()
        states.append(trainer.model.state_dict())
    for eager, graphed in zip(*(state.values() for state in states), strict=True):
        torch.testing.assert_close(graphed, eager, rtol=1e-2, atol=1e-3)


def test_checkpointed_activations_keep_less_and_change_nothing(tmp_path):
    states, kept = [], []
    for on in (False, True):
        trainer = make_trainer(tmp_path / str(on), checkpoint_activations=on)
        batch, saved = first_batch(trainer), {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.update({t.data_ptr(): t.nbytes}) or t, id_):
            trainer.model.online.encoder(batch.views)
        trainer = make_trainer(tmp_path / f"{on} again", checkpoint_activations=on)
        for _ in range(3):
            trainer.train_step([batch])
        states.append(state_of(trainer))
        kept.append(sum(saved.values()))
    assert kept[1] < 0.6 * kept[0]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def id_(tensor):
    return tensor


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.set_sync_debug_mode needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_on_a_gpu_waits_for_nothing(tmp_path, precision):
    trainer = make_trainer(tmp_path, Pictures(num_classes=3), precision=precision, device="cuda")
    batch = first_batch(trainer)
    for _ in range(3):
        trainer.train_step([batch])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.train_step([batch])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0 < trainer.meter.drain()[-1][0] < 8


def test_weights_depend_on_the_number_of_threads_only_and_a_resumed_run_keeps_it(tmp_path):
    before, states = torch.get_num_threads(), []
    try:
        for own_choice, workers in ((1, 0), (2, 3)):
            torch.set_num_threads(own_choice)
            config = make_config(tmp_path / str(own_choice), threads=3, max_steps=4)
            config.data.workers = workers
            SCRLTrainer(config, source=Pictures()).fit()
            config.train.threads, config.resume = 0, "auto"
            config.train.max_steps = 0
            torch.set_num_threads(own_choice)
            trainer = SCRLTrainer(config, source=Pictures())
            trainer.fit()
            assert trainer.config.train.threads == torch.get_num_threads() == 3
            assert "have changed" not in (trainer.folder / "log.txt").read_text()
            states.append(state_of(trainer))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_max_steps_stops_early_with_schedules_as_planned(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, epochs=10)
    assert trainer.fit()["step"] == 4
    rows = runlog.read_metrics(tmp_path / "metrics.jsonl")
    assert rows[-1]["lr"] == learning_rate(3, base=0.45 * 4 / 256, steps_per_epoch=3, epochs=10, warmup_epochs=1)
    assert rows[-1]["ema_momentum"] == ema_momentum(3, base=0.97, total_steps=30)


@pytest.mark.parametrize("log_every", [2, 100])
def test_nan_stops_the_run_and_names_step_and_checkpoint(tmp_path, monkeypatch, log_every):
    config = make_config(tmp_path, epochs=5)
    config.run.log_every = log_every
    trainer = SCRLTrainer(config, source=Pictures())
    plain = trainer.train_step

    def poisoned(batches, *pairs):
        if trainer.step == 7:
            batches[0].views[0] = math.nan
        plain(batches, *pairs)

    monkeypatch.setattr(trainer, "train_step", poisoned)
    with pytest.raises(NonFiniteError, match=r"step 8: the loss is nan.*step_00000006\.pt"):
        trainer.fit()
    assert runlog.read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == (6 if log_every == 2 else 1)
    assert torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)["step"] == 6


def test_the_seed_decides_everything(tmp_path):
    states = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trainer = make_trainer(tmp_path / name, seed=seed, max_steps=3)
        torch.rand(5)  # whatever else draws from the global generator does not matter
        trainer.fit()
        states.append(state_of(trainer))
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not all(torch.equal(a, c) for a, c in zip(states[0], states[2], strict=True))


def test_init_takes_weights_only(tmp_path, finished):
    folder, trained, _ = finished
    config = make_config(tmp_path / "new")
    config.init = str(folder / "checkpoints" / "last.pt")
    trainer = SCRLTrainer(config, source=Pictures(num_classes=5))  # the probe does not fit and is left as it is
    (note,) = restore(trainer)
    assert config.init in note and "encoder, projector, target projector, predictor" in note
    for ours, theirs in zip(trainer.model.online.parameters(), trained.model.online.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert trainer.step == 0
    assert not trainer.optimizer.state


def test_demo_is_compared_with_its_random_initialisation(tmp_path, capsys):
    config = make_config(tmp_path, max_steps=1)
    config.data.demo_images, config.data.demo_size = 30, 48
    config.eval.roi_linear, config.eval.scenes = True, 20
    summary = SCRLTrainer(config).fit()
    result = summary["roi_linear"]
    assert 0 <= result["random"]["accuracy"] <= 1
    assert result["trained"]["boxes"] == result["random"]["boxes"] > 20
    assert runlog.read_metrics(tmp_path / "metrics.jsonl")[-1]["roi_linear"] == result
    said = capsys.readouterr().err
    assert "random initialisation" in said
    assert str(tmp_path) in said.splitlines()[-1]
