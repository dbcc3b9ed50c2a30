"""What a run says of itself is what happened in it: losses, monitors, probe, rates, curves, the demo's comparison."""

from __future__ import annotations

import copy
import time
from statistics import fmean

import pytest
import torch
from PIL import Image
from tiny_trainer import Pictures, make_config

from scrl_fast.build import build_model
from scrl_fast.config.schema import RunConfig
from scrl_fast.evaluate import RoILinearResult, demo
from scrl_fast.metrics import feature_std, rankme
from scrl_fast.run.metrics_file import read_metrics
from scrl_fast.trainer import SCRLTrainer


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run of 6 steps, its folder, and what its network gave in each step."""
    folder = tmp_path_factory.mktemp("watched")
    trainer = SCRLTrainer(make_config(folder), source=Pictures(num_classes=3))
    outputs, scores = [], []
    trainer.model.register_forward_hook(lambda module, inputs, output: outputs.append(copy.copy(output)))
    state_dict = trainer.state_dict

    def state_and_look():
        if trainer.step:
            scores.append(list(trainer.window.scores))
        return state_dict()

    trainer.state_dict = state_and_look
    trainer.fit()
    return folder, outputs, scores


def test_rows_are_means_of_the_steps_and_monitors_of_the_last(watched):
    folder, outputs, _ = watched
    rows, begin = read_metrics(folder / "metrics.jsonl"), 0
    assert [row["step"] for row in rows] == [1, 2, 4, 6]
    for row in rows:
        steps, begin = outputs[begin : row["step"]], row["step"]
        assert row["loss"] == pytest.approx(fmean(step.loss.item() for step in steps))
        assert row["probe_loss"] == pytest.approx(fmean(step.probe_loss.item() for step in steps))
        correct, count = (sum(int(getattr(step, name)) for step in steps) for name in ("probe_correct", "probe_count"))
        assert row["probe_accuracy"] == pytest.approx(correct / count)
        assert row["feature_std"] == pytest.approx(feature_std(steps[-1].projections).item())
        assert row["rankme"] == pytest.approx(rankme(steps[-1].projections).item())
        assert row["pairs_per_image"] == pytest.approx(fmean(step.pairs for step in steps) / 4)
        assert 0 < row["images_per_s"] < 1e6
    assert len({row["loss"] for row in rows}) == len({row["rankme"] for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("steps", "given", "interval"),
    [(5, 0, 1), (59, 0, 1), (60, 0, 2), (100, 0, 3), (299, 0, 9), (300, 0, 10), (250_000, 0, 10), (30, 10, 10)],
)
def test_short_runs_log_more_often(steps, given, interval):
    assert RunConfig(log_every=given).log_interval(steps) == interval
    assert given or steps // interval >= min(steps, 30)


def test_the_default_logs_each_step_of_a_short_run(tmp_path):
    config = make_config(tmp_path / "run")
    config.run.log_every = RunConfig.log_every
    SCRLTrainer(config, source=Pictures()).fit()
    steps = [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert steps == list(range(1, steps[-1] + 1)) and len(steps) > 3


def test_a_checkpoint_is_judged_by_the_probe_since_the_one_before(watched):
    assert watched[2] == [[], [], []]  # two planned checkpoints, and what the end compares the folder with


@pytest.mark.parametrize("slow", [False, True])
def test_a_slow_first_step_is_told_of(slow, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("scrl_fast.run.log.SLOW_START", 0.01 if slow else 1e6)
    trainer = SCRLTrainer(make_config(tmp_path / "run", max_steps=2), source=Pictures())
    log, step, words = tmp_path / "run/log.txt", trainer.train_step, "step 1 of 2 is being made: the first one takes"

    def until_told(*batch):
        deadline = time.monotonic() + 60
        while slow and words not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        return step(*batch)

    monkeypatch.setattr(trainer, "train_step", until_told)
    trainer.fit()
    assert (words in log.read_text()) == (words in capfd.readouterr().err) == slow


def test_curves_are_drawn(watched):
    assert Image.open(watched[0] / "curves.png").size[0] > 300


def test_the_demo_compares_the_trained_encoder_with_the_one_it_began_with(tmp_path, monkeypatch):
    config = make_config(tmp_path, max_steps=2)
    config.eval.roi_linear = True
    config.data.demo_images, config.data.demo_size = 20, 48
    seen = {}

    def spy(encoders, *_, **__):
        seen.update({name: copy.deepcopy(encoder.state_dict()) for name, encoder in encoders.items()})
        return {
            name: RoILinearResult(accuracy=share, boxes=4, classes=10, train_boxes=8, penalty=1.0)
            for name, share in RESULTS.items()
        }

    monkeypatch.setattr(demo, "demo_roi_linear", spy)
    trainer = SCRLTrainer(config)
    summary = trainer.fit()
    began = build_model(trainer.config, trainer.source.num_classes).online.encoder.state_dict()
    ended = trainer.model.online.encoder.state_dict()
    assert all(torch.equal(seen["random"][name], value) for name, value in began.items())
    assert all(torch.equal(seen["trained"][name], value) for name, value in ended.items())
    assert any(not torch.equal(began[name], value) for name, value in ended.items())
    assert {name: each["accuracy"] for name, each in summary["roi_linear"].items()} == RESULTS
    assert "random initialisation 25.0%, after 2 steps 75.0% (+50.0 points)" in (tmp_path / "log.txt").read_text()


RESULTS = {"random": 0.25, "trained": 0.75}
