"""A run on a tiny network: what it leaves behind, what it stops at, where it starts, and what its seed decides."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
import yaml
from PIL import Image
from tiny_trainer import Pictures, make_config, make_trainer, state_of, with_boxes

from scrl_fast.config.schema import Config
from scrl_fast.distributed.world import World
from scrl_fast.errors import UsageError
from scrl_fast.run.metrics_file import read_metrics
from scrl_fast.schedules import ema_momentum, learning_rate
from scrl_fast.trainer import NonFiniteError, SCRLTrainer

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = SCRLTrainer(make_config(folder, epochs=3), source=Pictures(num_classes=3))
    return folder, trainer, trainer.fit()


def test_the_run_folder_holds_what_was_promised(finished):
    folder, trainer, summary = finished
    assert trainer.network is trainer.ddp_model is not None  # the name in earlier releases
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
    rows = read_metrics(folder / "metrics.jsonl")
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
        plain = trainer.log_row

        def log_row(trainer=trainer, plain=plain):
            row = plain()
            trainer.window.scores = trainer.window.scores and [1 / trainer.step]  # the first is the best
            return row

        trainer.log_row = log_row
        trainer.fit()
        assert torch.load(folder / "checkpoints" / "best.pt", weights_only=True)["step"] == expected
        assert trainer.is_best() == trainer.is_best() == (expected == 9)  # asked again, nothing has changed


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
    rows = read_metrics(tmp_path / "metrics.jsonl")
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
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == (6 if log_every == 2 else 1)
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
    (note,) = trainer.loop.restore()
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
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["roi_linear"] == result
    said = capsys.readouterr().err
    assert "random initialisation" in said
    assert str(tmp_path) in said.splitlines()[-1]


def without_boxes(trainer, steps):
    """Batches without a single box pair in these steps."""
    plain = trainer.batches

    def batches():
        for group in plain():
            yield [with_boxes(batch, 0) for batch in group] if trainer.step in steps else group

    trainer.batches = batches
    return trainer


def test_a_run_without_a_box_pair_ends_with_an_error_and_a_window_without_one_is_told(tmp_path):
    trainer = without_boxes(make_trainer(tmp_path / "none", batch_size=4, max_steps=3), range(99))
    with pytest.raises(
        UsageError, match=r"no box pair .*boxes\.min_size=8 .*views\.size=32, and nothing can be learned"
    ):
        trainer.fit()
    many = without_boxes(make_trainer(tmp_path / "many", Pictures(130), batch_size=64, epochs=9), range(99))
    with pytest.raises(UsageError, match="no box pair in the last 1 steps"):
        many.fit()
    assert many.step == 1
    some = without_boxes(make_trainer(tmp_path / "some", batch_size=4, epochs=2), {2, 3})
    some.fit()
    assert (tmp_path / "some" / "log.txt").read_text().count("no box pair in the last 2 steps") == 1


def test_processes_that_disagree_are_told_before_anything_is_made(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Two(World):
        """Another process with these differences."""

        differences: tuple = ()

        def all_gather_objects(self, item):
            return [item, item | dict(self.differences)]

    for differences, said in (
        ({"optim.lr": 0.4}, r"optim\.lr is 0\.45 in process 0, 0\.4 in process 1"),
        ({"train.seed": 3, "images": 9}, r"train\.seed is 0 .*; images is 12 in process 0, 9 in process 1"),
        ({"names": "x"}, "the images have other names or another order in process 1 than in process 0"),
        ({"SCRL_FAST_BACKEND": "triton"}, "SCRL_FAST_BACKEND is "),
    ):
        world = Two(size=2, differences=tuple(differences.items()))
        with pytest.raises(UsageError, match=f"the processes of this run disagree: {said}"):
            SCRLTrainer(make_config(tmp_path / "run"), source=Pictures(), world=world)
    assert not (tmp_path / "run").exists()
