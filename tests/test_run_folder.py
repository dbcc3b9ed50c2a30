"""A run holds its folder, knows it again, and loses nothing when the folder, the disk or the terminal goes away."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import stat
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny_trainer import Pictures, make_config, make_trainer

from scrl_fast.atomic_files import write_text
from scrl_fast.errors import UsageError
from scrl_fast.run import checkpoint, lock, plots
from scrl_fast.run.folder import prepare_folder
from scrl_fast.run.lock import RunFolderLost, hold_folder, release_folder
from scrl_fast.run.log import RunLog
from scrl_fast.run.metrics_file import read_metrics
from scrl_fast.run.signals import STOP_SIGNALS, SignalHandler
from scrl_fast.run.terminal import Terminal
from scrl_fast.trainer import SCRLTrainer

pytestmark = pytest.mark.usefixtures("no_curves")
DRAW_CURVES = plots.draw_curves
HOLD = "import sys; from pathlib import Path; from scrl_fast.run.lock import hold_folder; "
HOLD += "hold_folder(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path until its stdin is closed."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_by_name_until_the_first_has_died(tmp_path, holder):
    with pytest.raises(UsageError, match=rf"run\.dir .* is in use by process {holder.pid} on .*--run\.dir=NEW"):
        prepare_folder(tmp_path, resume=True)
    with pytest.raises(UsageError, match=r"compare\.dir .* is in use .*--compare\.dir=NEW"):
        hold_folder(tmp_path, option="compare.dir")
    holder.kill()
    holder.wait()
    release_folder(hold_folder(tmp_path))


def test_a_restarted_run_waits_for_the_process_before_it(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(lock.time, "sleep", lambda _: holder.kill() or holder.wait())
    release_folder(hold_folder(tmp_path, patience=60))


def test_one_process_may_take_its_folder_again_and_gives_it_up_after_the_run(tmp_path):
    make_trainer(tmp_path, max_steps=1)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit()
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout == "held\n"


def test_a_folder_that_was_moved_is_taken_anew_where_it_lies(tmp_path):
    (tmp_path / "a").mkdir()
    before = hold_folder(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert not before.present() and before.moved_to() == tmp_path / "b"
    after = hold_folder(tmp_path / "b")
    assert after is not before and after.present()
    release_folder(after)


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_a_lock_that_leads_to_another_file_leaves_it_as_it_was(tmp_path, link):
    other, folder = tmp_path / "important.txt", tmp_path / "downloaded"
    other.write_text("kept")
    folder.mkdir()
    getattr(folder / ".lock", link)(other)
    with pytest.raises(UsageError, match=r"downloaded': \.lock there is a link or no regular file: remove it"):
        prepare_folder(folder, resume=True)
    assert other.read_text() == "kept"
    (folder / ".lock").unlink()
    os.mkfifo(folder / ".lock")
    with pytest.raises(UsageError, match="no regular file"):
        prepare_folder(folder, resume=True)


@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl", "config.yaml", "env.json", "curves.png", "reading_1.txt"])
@pytest.mark.parametrize("target", ["there", "nowhere"])
def test_a_file_of_the_run_that_is_a_link_is_refused_by_name(tmp_path, name, target):
    (tmp_path / "there").touch()
    folder = tmp_path / "downloaded"
    folder.mkdir()
    (folder / name).symlink_to(tmp_path / target)
    with pytest.raises(UsageError, match=rf"run\.dir '.*downloaded': {name} there is a link"):
        prepare_folder(folder, resume=True)
    assert not lock._locks.get(lock.inode_of(folder)) and not (tmp_path / "nowhere").exists()


def test_checkpoints_may_lie_on_another_disk_but_not_in_another_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "disk" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk" / "checkpoints")
    prepare_folder(tmp_path / "run", resume=True)
    (tmp_path / "disk" / "config.yaml").touch()
    with pytest.raises(UsageError, match="checkpoints there is a link to those of another run"):
        prepare_folder(tmp_path / "run", resume=True)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, None])
def test_a_file_system_without_locks_is_told_once(tmp_path, monkeypatch, code):
    def flock(*_):
        if code is not None:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    make_trainer(tmp_path, max_steps=1).fit()
    assert (tmp_path / "log.txt").read_text().count("has no locks: start no second run there") == int(code is not None)


def test_the_last_state_is_gathered_before_an_evaluation_of_process_0_alone(tmp_path):
    trainer, order = make_trainer(tmp_path, max_steps=1), []
    state_dict, evaluate = trainer.state_dict, trainer.evaluate
    trainer.state_dict = lambda: order.append("state") or state_dict()
    trainer.evaluate = lambda: order.append("evaluation") or evaluate()
    trainer.fit()
    assert order[-2:] == ["state", "evaluation"]


def test_what_is_refused_is_not_held(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match="already holds a run"):
        prepare_folder(tmp_path, resume=False)
    assert not lock._locks.get(lock.inode_of(tmp_path))


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt", "config.yaml", "env.json"])
def test_a_pipe_or_a_folder_in_place_of_a_file_is_named_instead_of_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UsageError, match=rf"{name} there is no regular file"):
        prepare_folder(tmp_path, resume=True)


def lose(trainer, act, step=3):
    """Calls act() in that step."""
    plain = trainer.train_step

    def train_step(*arguments):
        plain(*arguments)
        if trainer.step == step:
            act()

    trainer.train_step = train_step


def test_a_run_folder_that_is_moved_keeps_every_step_and_ends_with_an_error(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    lose(trainer, lambda: (tmp_path / "run").rename(tmp_path / "moved"))
    with pytest.raises(RunFolderLost, match=r"moved to .*moved while the run was on; step 3 is saved in .*moved"):
        trainer.fit()
    assert not (tmp_path / "run").exists()
    assert checkpoint.load_training_state(tmp_path / "moved")["step"] == 3
    assert [row["step"] for row in read_metrics(tmp_path / "moved" / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_folder_that_is_removed_comes_back_with_the_last_step(tmp_path, replaced):
    trainer = make_trainer(tmp_path / "run")
    lose(trainer, lambda: (shutil.rmtree(tmp_path / "run"), replaced and (tmp_path / "run").mkdir()))
    with pytest.raises(RunFolderLost, match=r"was removed while the run was on; step 3 is saved in"):
        trainer.fit()
    kept = tmp_path / ("run-kept" if replaced else "run")
    assert checkpoint.load_training_state(kept)["step"] == 3 and (kept / "config.yaml").exists()
    assert not replaced or list((tmp_path / "run").iterdir()) == []


def test_a_relative_folder_stays_where_it_was_when_the_process_moves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    trainer = make_trainer("run", max_steps=4)
    lose(trainer, lambda: os.chdir(tmp_path / "other"), step=1)
    summary = trainer.fit()
    assert summary["checkpoint"] == str(tmp_path / "run" / "checkpoints" / "last.pt")
    assert list((tmp_path / "other").iterdir()) == []


def test_a_name_that_is_no_utf8_is_a_folder_like_others(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xe9sum\xe9"))
    make_trainer(folder, max_steps=2).fit()
    config = make_config(folder, max_steps=4)
    config.resume = "auto"
    assert SCRLTrainer(config, source=Pictures()).fit()["step"] == 4
    assert "r\\udce9sum\\udce9" in (folder / "log.txt").read_text(encoding="utf-8")
    again = type(config).from_yaml(folder / "config.yaml")
    assert again.run.dir == str(folder)


def test_a_disk_without_room_for_the_checkpoints_is_told_before_the_first_step(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(UsageError, match=r"10000 bytes are free, and the checkpoints of this run need \d{6}"):
        trainer.fit()
    assert trainer.step == 0


def test_room_is_asked_for_the_momentum_of_what_is_trained_alone(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    state = trainer.loop.state_dict()
    trained = sum(4 * p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    assert trained < sum(4 * p.numel() for p in trainer.model.parameters()), "the target network gets no momentum"
    needed = 3 * (checkpoint._size(state) + trained)
    for free in (needed - 1, needed):
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        with pytest.raises(UsageError, match=f"need {needed}:") if free < needed else nullcontext():
            trainer.loop.check_room()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_that_cannot_sync_a_folder_takes_files(tmp_path, monkeypatch, code):
    """SMB and some FUSE answer so; a disk that fails is an error for folders, too."""
    real = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="error") if code == errno.EIO else nullcontext():
        write_text(tmp_path / "config.yaml", "a: 1\n")
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"


def test_a_failed_write_leaves_the_options_as_they_were_and_names_the_file(tmp_path, monkeypatch):
    write_text(tmp_path / "config.yaml", "old\n")

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"No space left on device: .*config\.yaml"):
        write_text(tmp_path / "config.yaml", "new\n")
    assert (tmp_path / "config.yaml").read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "config.yaml"]


class Gone(io.StringIO):
    """A terminal whose reader goes away after so many writes."""

    def __init__(self, writes, terminal):
        super().__init__()
        self.left, self.terminal = writes, terminal

    def isatty(self):
        return self.terminal

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("writes", [0, 1, 5])
def test_a_terminal_that_goes_away_ends_nothing(tmp_path, terminal, writes):
    row = {"epoch": 0.5, "loss": 1.5, "images_per_s": 100.0, "data_wait": 0.25}
    with RunLog(tmp_path, total_steps=9, tensorboard=False, stream=Gone(writes, terminal)) as log:
        for step in range(1, 9):
            log.tick()
            log.say(f"line {step}")
            log.metrics(row | {"step": step})
    text = (tmp_path / "log.txt").read_text()
    assert all(f"line {step}\n" in text and f"step {step}" in text for step in range(1, 9))
    assert text.count("nothing reads stderr any more (") == 1 and "Broken pipe" in text
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 8


def test_without_stderr_there_is_no_terminal():
    terminal = Terminal(None, total=3, done=0)
    terminal.write("x"), terminal.advance(), terminal.show("y"), terminal.end_progress()
    assert not terminal.lost


def test_a_command_started_without_stderr_runs_and_prints_into_no_file_of_its_own(tmp_path):
    options = "--data.demo_images=8 --data.demo_size=48 --views.size=32 --boxes.min_size=8 --train.batch_size=4"
    options += f" --train.max_steps=1 --eval.roi_linear=false --run.tensorboard=false --run.dir={tmp_path / 'run'}"
    command = f"exec {sys.executable} -m scrl_fast.train {options} --train.device=cpu 2>&-"
    assert subprocess.run(["sh", "-c", command], env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == 0
    assert "done: 1 steps" in (tmp_path / "run" / "log.txt").read_text()
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1


@pytest.mark.parametrize(
    "garbage", [b"3\n", b"[1]\n", b"\0\0\0\n", b'{"step": "x"}\n', b"\xff\xfe{\n", b"[" * 99_999 + b"\n"]
)
def test_garbage_in_metrics_is_read_past_and_said_once(tmp_path, garbage):
    path = tmp_path / "metrics.jsonl"
    before = b'{"step": 1, "loss": 2.0}\n' + garbage + b'{"step": 2, "loss": 1.0}\n'
    path.write_bytes(before)
    stream = io.StringIO()
    with RunLog(tmp_path, total_steps=9, step=2, tensorboard=False, stream=stream):
        pass
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert stream.getvalue().count("metrics.jsonl: 1 lines hold no row of numbers and were left out") == 1
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before


def break_package(folder, name, error):
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(f"raise {error}")


@pytest.mark.parametrize("name, what", [("tensorboard", "event files"), ("wandb", "W&B"), ("matplotlib", "curves.png")])
def test_a_broken_optional_package_costs_one_line(tmp_path, monkeypatch, name, what):
    for module in list(sys.modules):
        if module.partition(".")[0] == name or module.startswith("torch.utils.tensorboard"):
            monkeypatch.delitem(sys.modules, module)
    break_package(tmp_path / "site", name, "TypeError('Descriptors cannot be created directly.')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    config = make_config(tmp_path / "run", max_steps=2)
    config.run.tensorboard, config.run.wandb = name == "tensorboard", "project" if name == "wandb" else ""
    trainer = SCRLTrainer(config, source=Pictures())
    if name == "matplotlib":
        monkeypatch.setattr(plots, "draw_curves", DRAW_CURVES)
    assert trainer.fit()["step"] == 2
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count(f"no {what}: {name} fails: TypeError: Descriptors cannot be created directly.") == 1


def test_a_tracker_that_fails_in_use_gets_no_more(tmp_path):
    class Failing:
        def log(self, numbers, step):
            raise RuntimeError("server gone")

        def close(self):
            raise AssertionError("it is not used any more")

    stream = io.StringIO()
    with RunLog(tmp_path, total_steps=9, tensorboard=False, stream=stream) as log:
        log.trackers["wandb"] = Failing()
        for step in (1, 2):
            log.metrics({"step": step})
    assert stream.getvalue() == "no more W&B: wandb fails: RuntimeError: server gone\n"
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_a_lost_session_and_a_limit_of_time_save_like_sigterm(tmp_path, monkeypatch):
    monkeypatch.setattr("scrl_fast.run.signals.signal.getsignal", lambda _: signal.SIG_DFL)  # also under nohup
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU} == set(STOP_SIGNALS)
    trainer = make_trainer(tmp_path)
    lose(trainer, lambda: os.kill(os.getpid(), signal.SIGHUP))
    summary = trainer.fit()
    assert (summary["interrupted"], summary["step"]) == ("SIGHUP", 3)
    assert torch.load(summary["checkpoint"], weights_only=True)["step"] == 3


def test_nohup_stays_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalHandler() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, before)
