"""A run that was stopped, by a signal or a step limit, ends where the undisturbed run ends, to the bit."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from tiny_trainer import Pictures, make_config

from scrl_fast import train
from scrl_fast.config import command_line
from scrl_fast.config.schema import Config
from scrl_fast.run.checkpoint import CheckpointManager
from scrl_fast.run.metrics_file import read_metrics
from scrl_fast.run.resume import changed_options
from scrl_fast.run.signals import SignalHandler
from scrl_fast.trainer import SCRLTrainer

pytestmark = pytest.mark.usefixtures("no_curves")
UNREPEATABLE = {"images_per_s", "data_wait"}
STEPS = 9  # 3 epochs of 3


def run(folder, *, resume="", stop_at=None, stop_by=signal.SIGTERM, **options):
    """One run, stopped by a signal during the step after `stop_at` steps where that is given."""
    config = make_config(folder, **({"epochs": 3} | options))
    config.run.checkpoint_every = 2
    config.resume = resume
    trainer = SCRLTrainer(config, source=Pictures(num_classes=3))
    plain = trainer.train_step

    def step(batches, *pairs):
        if trainer.step == stop_at:
            os.kill(os.getpid(), stop_by)
        plain(batches, *pairs)

    trainer.train_step = step
    return trainer, trainer.fit()


def final_state(trainer):
    state = torch.load(trainer.folder / "checkpoints" / "last.pt", weights_only=True)
    tensors = []

    def collect(value):
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, dict):
            [collect(item) for item in value.values()]
        elif isinstance(value, list):
            [collect(item) for item in value]

    collect({name: state[name] for name in ("model", "optimizer", "rng")})
    return tensors, {name: state[name] for name in ("step", "epoch", "loader", "log")}


def metrics(trainer):
    rows = read_metrics(trainer.folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in UNREPEATABLE} for row in rows]


def assert_same(ours, whole):
    (tensors, rest), (expected, expected_rest) = final_state(ours), final_state(whole)
    assert len(tensors) == len(expected) > 100
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
    assert rest == expected_rest
    assert metrics(ours) == metrics(whole)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))[0]


@pytest.mark.parametrize(
    ("stop_at", "stop_by"),
    [(0, signal.SIGTERM), (3, signal.SIGINT), (4, signal.SIGTERM), (6, signal.SIGUSR1), (8, signal.SIGTERM)],
)
def test_stop_by_signal_and_resume_is_bit_equal(tmp_path, whole, stop_at, stop_by, capsys):
    _, summary = run(tmp_path, stop_at=stop_at, stop_by=stop_by)
    assert summary["interrupted"] == signal.Signals(stop_by).name
    assert summary["step"] == stop_at + 1
    said = capsys.readouterr().err
    assert f"python -m scrl_fast.train --config={tmp_path}/config.yaml --resume=auto" in said
    resumed, summary = run(tmp_path, resume="auto")
    assert (summary["step"], summary["interrupted"]) == (STEPS, "")
    assert_same(resumed, whole)


def test_a_signal_ends_the_evaluation_at_once(tmp_path):
    config = make_config(tmp_path, max_steps=1)
    config.eval.roi_linear = True
    trainer = SCRLTrainer(config, source=Pictures())
    trainer.measure = lambda: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60)
    started = time.monotonic()
    summary = trainer.fit()
    assert time.monotonic() - started < 30
    assert (summary["interrupted"], summary["step"]) == ("SIGTERM", 1)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_while_data_are_waited_for_stops_there_and_then(tmp_path, whole):
    config = make_config(tmp_path, epochs=3)
    config.run.checkpoint_every, config.data.workers = 2, 1
    source, released = Pictures(num_classes=3), threading.Event()
    trainer = SCRLTrainer(config, source=source)
    plain = trainer.train_step

    def step(*batches):
        plain(*batches)
        if trainer.step == 3:
            source.read = lambda index: released.wait(60) and source.images[index]
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()

    trainer.train_step = step
    started = time.monotonic()
    summary = trainer.fit()
    released.set()
    assert time.monotonic() - started < 30
    assert summary["interrupted"] == "SIGTERM" and 3 <= summary["step"] <= 6  # three batches may have been made ahead
    resumed, _ = run(tmp_path, resume="auto")
    assert_same(resumed, whole)


def stopped_before_data(folder, **options):
    """What a run says and returns that is told to stop while it waits for its first batch."""
    config = make_config(folder, epochs=3)
    config.resume, config.init = options.get("resume", ""), options.get("init", "")
    trainer = SCRLTrainer(config, source=Pictures(num_classes=3))
    trainer.batches = lambda: (os.kill(os.getpid(), signal.SIGTERM) for _ in range(1))
    return trainer.fit(), (folder / "log.txt").read_text()


def test_a_stop_before_the_first_step_says_that_nothing_is_saved_and_starts_from_the_same_weights(tmp_path, whole):
    weights = str(whole.folder / "checkpoints" / "last.pt")
    summary, said = stopped_before_data(tmp_path, init=weights)
    assert (summary["step"], summary["interrupted"], summary["checkpoint"]) == (0, "SIGTERM", "")
    assert "SIGTERM: stopped before the first step, so there is nothing to save" in said and "is saved" not in said
    config = command_line.parse(shlex.split(summary["resume_command"])[3:], prog="").config
    assert (config.resume, config.init, config.init_momentum) == ("auto", weights, False)
    again = SCRLTrainer(config, source=Pictures(num_classes=3))
    assert any("54 tensors of the encoder matched" in note for note in again.loop.restore())


def test_a_run_that_branches_off_and_stops_at_once_has_a_checkpoint_of_its_own(tmp_path, whole):
    other = str(whole.folder / "checkpoints" / "last.pt")
    steps = torch.load(other, weights_only=True)["step"] - 1
    config = make_config(tmp_path / "first", epochs=3, max_steps=steps)
    first = SCRLTrainer(config, source=Pictures(num_classes=3)).fit()["checkpoint"]
    older = CheckpointManager(tmp_path / "older" / "checkpoints")
    older.save(torch.load(other, weights_only=True), step=2)
    for folder in (tmp_path / "second", older.folder.parent):
        summary, said = stopped_before_data(folder, resume=first)
        assert f"stopped after step {steps}, everything is saved" in said
        assert torch.load(summary["checkpoint"], weights_only=True)["step"] == steps
        assert str(folder) in summary["checkpoint"]


def test_a_run_that_branches_off_with_no_step_left_has_a_checkpoint_of_its_own(tmp_path, whole):
    config = make_config(tmp_path, epochs=3)
    config.resume = str(whole.folder / "checkpoints" / "last.pt")
    checkpoint = SCRLTrainer(config, source=Pictures(num_classes=3)).fit()["checkpoint"]
    assert str(tmp_path) in checkpoint and torch.load(checkpoint, weights_only=True)["step"] == whole.step
    assert read_metrics(tmp_path / "metrics.jsonl") == []  # the steps were another run's


def test_work_ends_at_a_signal_and_again_only_when_asked():
    with SignalHandler() as stop:
        assert stop.run_interruptible(lambda: 5) == 5
        assert stop.run_interruptible(lambda: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60)) is None
        os.kill(os.getpid(), signal.SIGUSR1)  # outside: a request, nothing more
        assert stop.reason == "SIGUSR1"
        stop.request_stop("another reason")
        assert stop.reason == "SIGUSR1"
        reached = []
        with stop.interruptible():
            stop.request_stop("the time is up")
            reached.append("what comes after a stop")
        assert not reached
        assert stop.run_interruptible(lambda: 5) is None  # what comes after a request is not begun
    with pytest.raises(KeyboardInterrupt):  # not ours
        SignalHandler().run_interruptible(lambda: signal.default_int_handler(signal.SIGINT, None))


def test_a_second_ctrl_c_does_not_wait():
    with pytest.raises(KeyboardInterrupt), SignalHandler() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_is_answered_at_once_on_a_terminal(monkeypatch):
    terminal, other = os.openpty()
    with os.fdopen(other, "w") as stderr, SignalHandler() as stop:
        monkeypatch.setattr(sys, "stderr", stderr)
        os.kill(os.getpid(), signal.SIGTERM)  # of a scheduler: nobody waits at a terminal
        stop.reason = ""
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGINT"
        answer = " ".join(os.read(terminal, 1000).decode().split())
        assert answer == "SIGINT: the run stops after this step; once more ends it at once, without saving"
        monkeypatch.setattr(sys, "stderr", None)
        stop.reason = ""
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGINT"
    os.close(terminal)


def test_resume_with_workers_and_twice(tmp_path, whole):
    run(tmp_path, stop_at=1)
    run(tmp_path, resume="auto", stop_at=4)
    config = make_config(tmp_path, epochs=3)
    config.run.checkpoint_every, config.resume, config.data.workers = 2, "auto", 2
    trainer = SCRLTrainer(config, source=Pictures(num_classes=3))
    trainer.fit()
    assert_same(trainer, whole)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_with_accumulation_in_mid_epoch(tmp_path, precision):
    options = {"batch_size": 2, "accumulate": 2, "epochs": 2, "precision": precision}
    whole, _ = run(tmp_path / "whole", **options)
    run(tmp_path / "parts", stop_at=1, **options)
    resumed, _ = run(tmp_path / "parts", resume="auto", **options)
    assert resumed.step == 6
    assert_same(resumed, whole)


def test_a_stop_keeps_what_the_next_row_and_the_next_best_are_made_of(tmp_path):
    config = make_config(tmp_path, epochs=3)
    config.run.checkpoint_every, config.run.log_every = 9, 2
    trainer = SCRLTrainer(config, source=Pictures(num_classes=3))
    plain = trainer.train_step
    trainer.train_step = lambda *batches: (
        plain(*batches) or (trainer.step == 5 and os.kill(os.getpid(), signal.SIGTERM))
    )
    trainer.fit()
    log = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)["log"]
    assert (len(log["scores"]), len(log["pending"])) == (3, 1)  # rows of steps 1, 2, 4; step 5
    config.resume = "auto"
    again = SCRLTrainer(config, source=Pictures(num_classes=3))
    again.loop.restore()
    assert again.window.state_dict() == log


def test_a_lost_row_and_steps_after_the_checkpoint_are_written_again(tmp_path, whole):
    """As after SIGKILL: metrics are ahead of the newest checkpoint, which lies in mid-epoch."""
    run(tmp_path, max_steps=6)
    for name in ("step_00000006.pt", "last.pt", "best.pt"):
        (tmp_path / "checkpoints" / name).unlink()
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 6
    resumed, _ = run(tmp_path, resume="auto")
    assert "resumed from" in (tmp_path / "log.txt").read_text()
    assert [row["step"] for row in metrics(resumed)] == [1, 2, 4, 6, 8, 9]
    assert_same(resumed, whole)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path, whole):
    run(tmp_path, stop_at=6)
    newest = tmp_path / "checkpoints" / "step_00000007.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    resumed, _ = run(tmp_path, resume="auto")
    log = (tmp_path / "log.txt").read_text()
    assert "step_00000007.pt" in log
    assert "step_00000006.pt at step 6" in log
    assert_same(resumed, whole)


def test_resume_auto_of_nothing_starts_and_of_a_finished_run_only_ends(tmp_path, whole):
    started, _ = run(tmp_path, resume="auto")
    assert "no checkpoint" in (tmp_path / "log.txt").read_text()
    before = metrics(started)
    again, summary = run(tmp_path, resume="auto")
    assert summary["step"] == STEPS
    assert summary["loss"] == before[-1]["loss"]
    assert metrics(again) == before
    assert_same(again, whole)


def test_a_checkpoint_by_path_continues_in_its_own_folder(tmp_path, whole):
    run(tmp_path / "run", stop_at=4)
    config = make_config("", epochs=3)
    config.run.checkpoint_every, config.resume = 2, str(tmp_path / "run" / "checkpoints" / "last.pt")
    trainer = SCRLTrainer(config, source=Pictures(num_classes=3))
    trainer.fit()
    assert trainer.folder == tmp_path / "run"
    assert_same(trainer, whole)


def test_data_that_fail_in_mid_epoch_lose_no_step(tmp_path, whole):
    config = make_config(tmp_path, epochs=3)
    config.run.checkpoint_every, config.data.workers = 9, 1
    source = Pictures(num_classes=3)
    trainer = SCRLTrainer(config, source=source)
    plain = trainer.train_step
    trainer.train_step = lambda *batches: plain(*batches) or (trainer.step == 4 and setattr(source, "read", gone))
    with pytest.raises(RuntimeError, match="the disk is gone"):
        trainer.fit()
    log = (tmp_path / "log.txt").read_text()
    step = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)["step"]
    assert f"all {step} steps are saved. To continue: python -m scrl_fast.train --config=" in log
    assert 4 <= step <= 7  # up to three batches were made ahead
    resumed, _ = run(tmp_path, resume="auto")
    assert_same(resumed, whole)


def gone(index):
    raise RuntimeError("the disk is gone")


def test_an_older_checkpoint_asks_for_a_folder_of_its_own(tmp_path):
    run(tmp_path / "run", max_steps=4)
    old = str(tmp_path / "run" / "checkpoints" / "step_00000002.pt")
    with pytest.raises(ValueError, match=r"newer checkpoint, step_00000004\.pt.*--run\.dir"):
        run(tmp_path / "run", resume=old)
    trainer, _ = run(tmp_path / "branch", resume=old, max_steps=3)
    assert trainer.step == 3


def test_changed_options_are_told_and_win(tmp_path):
    run(tmp_path, stop_at=2)
    config = make_config(tmp_path, epochs=3)
    config.resume, config.optim.lr, config.data.workers = "auto", 0.9, 1
    trainer = SCRLTrainer(config, source=Pictures(num_classes=3))
    trainer.fit()
    log = (tmp_path / "log.txt").read_text()
    assert "optim.lr 0.45 -> 0.9" in log
    defaults = Config().to_dict()  # of an option that the earlier release did not have
    assert changed_options({"data": {}}, defaults, defaults=defaults) == []
    assert "workers" not in log
    assert {group["peak_lr"] for group in trainer.optimizer.param_groups} >= {0.9 * 4 / 256}


def test_a_foreign_checkpoint_is_refused_by_name(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match=r"foreign\.pt is no training checkpoint"):
        run(tmp_path / "run", resume=str(tmp_path / "foreign.pt"))


def test_sigterm_to_the_command_saves_exits_0_and_the_printed_command_resumes(tmp_path):
    """The whole way, as a scheduler would do it: start, SIGTERM, and the command that was printed."""
    options = "--data.demo_images=32 --data.demo_size=48 --views.size=32 --boxes.min_size=8 --train.batch_size=4"
    options += f" --train.epochs=40 --eval.roi_linear=false --run.tensorboard=false --run.dir={tmp_path / 'run'}"
    start = [sys.executable, "-m", "scrl_fast.train", *options.split(), "--run.log_every=1", "--train.device=cpu"]
    process = subprocess.Popen(start, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    metrics_file = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics_file.exists() and metrics_file.read_text().count("\n") >= 3):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    (command,) = [line.strip() for line in said.splitlines() if "--resume=auto" in line]
    step = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["step"]
    assert 3 <= step < 320
    assert f"after step {step}" in said
    python, module, name, *words = shlex.split(command)
    assert (python, module, name) == ("python", "-m", "scrl_fast.train")
    assert train.main([*words, f"--train.max_steps={step + 2}"]) == 0
    rows = [json.loads(line)["step"] for line in metrics_file.read_text().splitlines()]
    assert rows == list(range(1, step + 3))
