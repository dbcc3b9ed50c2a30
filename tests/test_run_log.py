"""The run folder's files: each step once, readable after a crash, and nothing required that may be missing."""

from __future__ import annotations

import builtins
import fcntl
import io
import json
import logging
import math
import os
import stat
import struct
import sys
import termios
import threading
import types

import pytest
import torch
from PIL import Image

from scrl_fast.run import log as run_log
from scrl_fast.run import plots
from scrl_fast.run.folder import prepare_folder
from scrl_fast.run.log import Clock, RunLog, format_seconds, progress_line
from scrl_fast.run.metrics_file import read_metrics
from scrl_fast.run.statistics import spread
from scrl_fast.run.terminal import is_terminal

ROW = {"epoch": 0.5, "loss": 1.5, "images_per_s": 100.0, "data_wait": 0.25, "feature_std": 0.1, "rankme": 9.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def open_log(folder, step=0, **options):
    options.setdefault("stream", io.StringIO())
    return RunLog(folder, total_steps=100, step=step, tensorboard=False, **options)


@pytest.fixture
def hide(monkeypatch):
    """Makes imports of a package fail, as if it were not installed."""

    def hide(name):
        real = builtins.__import__

        def refuse(wanted, *args, **kwargs):
            if wanted == name or wanted.startswith(name + "."):
                raise ModuleNotFoundError(f"no {name}", name=name)
            return real(wanted, *args, **kwargs)

        for module in [module for module in sys.modules if module == name or module.startswith(name + ".")]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setattr(builtins, "__import__", refuse)

    return hide


def test_rows_are_readable_at_once_and_strict_json(tmp_path):
    with open_log(tmp_path) as log:
        log.metrics(ROW | {"step": 10, "rankme": math.nan})
        text = (tmp_path / "metrics.jsonl").read_text()  # while the run is still going
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["rankme"] is None


def test_a_resumed_log_has_each_step_once(tmp_path):
    with open_log(tmp_path) as log:
        for step in (10, 20, 30):
            log.metrics(ROW | {"step": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "los')  # what a crash leaves
    with open_log(tmp_path, step=20) as log:
        log.metrics(ROW | {"step": 30, "loss": 7.0})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(10, 1.5), (20, 1.5), (30, 7.0)]


def test_late_results_join_the_last_row(tmp_path):
    with open_log(tmp_path) as log:
        log.metrics(ROW | {"step": 10})
        log.metrics(ROW | {"step": 20})
        log.amend({"roi_linear": {"trained": 0.5}})
        log.metrics(ROW | {"step": 30})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert rows[1]["roi_linear"] == {"trained": 0.5}


def test_into_a_file_there_are_lines_and_on_a_terminal_a_bar(tmp_path):
    plain, terminal = io.StringIO(), Terminal()
    for name, stream in (("a", plain), ("b", terminal)):
        (tmp_path / name).mkdir()
        with open_log(tmp_path / name, stream=stream) as log:
            log.say("hello")
            for step in (1, 2):
                log.tick()
                log.metrics(ROW | {"step": step, "probe_accuracy": 0.125}, seconds_per_step=2.0)
        text = (tmp_path / name / "log.txt").read_text()
        assert "hello" in text
        assert "loss 1.5" in text
    lines = plain.getvalue().splitlines()
    assert lines[0] == "hello"
    assert lines[2].startswith("step 2/100")
    for part in ("loss 1.5", "100 images/s", "data wait 25%", "probe 12.5%", "ETA 3m16s"):
        assert part in lines[2]
    assert "hello" in terminal.getvalue()
    assert "\r" in terminal.getvalue()


def test_less_than_one_image_a_second_is_not_nothing():
    row = ROW | {"step": 1, "epoch": 0.1}
    assert "0.4 images/s" in progress_line(row | {"images_per_s": 0.43})
    assert "  12 images/s" in progress_line(row | {"images_per_s": 12.4})


@pytest.mark.parametrize(("columns", "bar"), [(80, True), (0, False)])
def test_a_terminal_without_columns_gets_lines(columns, bar):
    pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(main, "rb"), open(other, "w") as stream:
        assert is_terminal(stream) is bar


def test_what_the_package_logs_is_in_the_log_while_it_is_open(tmp_path):
    with open_log(tmp_path):
        logging.getLogger("scrl_fast").warning("skipped %s", "a.jpg")
    logging.getLogger("scrl_fast").info("too late")
    text = (tmp_path / "log.txt").read_text()
    assert "skipped a.jpg" in text
    assert "too late" not in text
    assert not logging.getLogger("scrl_fast").handlers


def test_other_processes_write_nothing(tmp_path):
    with open_log(tmp_path, active=False) as log:
        log.say("hello")
        log.tick()
        log.metrics(ROW | {"step": 1})
        log.amend({"x": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0s"), (42, "42s"), (185, "3m05s"), (25920, "7h12m"), (273600, "3d04h")]
)
def test_seconds_read_well(seconds, text):
    assert format_seconds(seconds) == text


def test_clock_counts_images_and_waiting(monkeypatch):
    now = iter([0.0, 1.0, 2.0, 4.0, 4.5])
    monkeypatch.setattr(run_log.time, "perf_counter", lambda: next(now))
    clock = Clock()
    with clock.waiting():
        clock.images += 8
    assert clock.read() == {"images_per_s": 2.0, "data_wait": 0.25}
    assert clock.read() == {"images_per_s": 0.0, "data_wait": 0.0}


def test_folder_is_made_and_a_run_in_it_is_not_overwritten(tmp_path):
    folder = prepare_folder(tmp_path / "a" / "b", resume=False)
    assert folder.is_dir()
    assert [path.name for path in folder.iterdir()] == [".lock"]
    (folder / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"run\.dir .* already holds a run .*--resume=auto"):
        prepare_folder(folder, resume=False)
    prepare_folder(folder, resume=True)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=r"run\.dir .*file.* cannot be written to"):
            prepare_folder(path, resume=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(tmp_path):
    (tmp_path / "ro").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(ValueError, match=r"run\.dir .*ro.* cannot be written to"):
        prepare_folder(tmp_path / "ro", resume=False)


def test_tensorboard_gets_events_where_it_is_installed(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is an extra")
    with RunLog(tmp_path, total_steps=9, stream=io.StringIO()) as log:
        log.metrics(ROW | {"step": 1})
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_missing_tensorboard_stands_in_the_log_alone_and_changes_nothing(tmp_path, hide, monkeypatch):
    for module in [module for module in sys.modules if module.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    hide("tensorboard")
    stream = io.StringIO()
    with RunLog(tmp_path, total_steps=9, stream=stream) as log:
        log.metrics(ROW | {"step": 1})
    assert "tensorboard" not in stream.getvalue()
    assert (tmp_path / "log.txt").read_text().count("tensorboard is not installed: no event files") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_wandb_is_used_when_asked_and_named_when_missing(tmp_path, hide, monkeypatch):
    calls = []
    run = types.SimpleNamespace(log=lambda row, step: calls.append((step, row)), finish=lambda: calls.append("finish"))
    wandb = types.SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with open_log(tmp_path, wandb="project", settings={"a": 1}) as log:
        log.metrics({"step": 3, "loss": 1.0} | ROW)
    assert calls[0]["project"] == "project"
    assert calls[0]["config"] == {"a": 1}
    assert calls[1] == (3, ROW)
    assert calls[2] == "finish"
    hide("wandb")
    with pytest.raises(ValueError, match=r"run\.wandb is 'project', but wandb is not installed"):
        open_log(tmp_path, wandb="project")


def test_boxes_are_drawn_in_matching_colours_at_their_place(tmp_path):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)
    views = torch.zeros(2 * 3, 3, 32, 32)  # grey after un-normalising: the mean
    one = torch.tensor([[1, 4.0, 4, 20, 12], [1, 10, 16, 30, 30]])
    two = torch.tensor([[4, 8.0, 2, 30, 12], [4, 0, 20, 12, 32]])
    path = tmp_path / "boxes.png"
    plots.draw_boxes(path, views, (one, two), mean=mean, std=std, min_side=64)
    sheet = Image.open(path).convert("RGB")
    gap = plots.MARGIN
    left = 2 * gap + (2 * 64 + gap + 2 * gap)  # the second image of three
    red, cyan = (255, 25, 25), (25, 255, 255)
    assert sheet.getpixel((left + 2 * 4, 2 * gap + 2 * 8)) == red
    assert sheet.getpixel((left + 64 + gap + 2 * 8, 2 * gap + 2 * 6)) == red
    assert sheet.getpixel((left + 2 * 10, 2 * gap + 2 * 20)) == cyan
    assert sheet.getpixel((left + 64 + gap, 2 * gap + 2 * 25)) == cyan
    assert sheet.getpixel((2 * gap + 32, 2 * gap + 32)) == (128, 102, 76)


@pytest.mark.parametrize("boxes", [None, (torch.zeros(0, 5), torch.zeros(0, 5))])
def test_pictures_without_boxes_and_of_one_image(tmp_path, boxes):
    plots.draw_boxes(tmp_path / "b.png", torch.zeros(2, 3, 32, 32), boxes, mean=(0,) * 3, std=(1,) * 3)
    assert Image.open(tmp_path / "b.png").size[0] > 2 * 160


def test_curves_of_what_there_is(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is an extra")
    rows = [{"step": step, "loss": 1.0 / step, "rankme": None if step == 2 else 5.0} for step in (1, 2, 3)]
    plots.draw_curves(tmp_path / "curves.png", rows)
    assert Image.open(tmp_path / "curves.png").size[0] > 500
    plots.draw_curves(tmp_path / "nan.png", [{"step": 1, "rankme": float("nan"), "feature_std": 0.0}])
    assert Image.open(tmp_path / "nan.png").size[0] > 500
    plots.draw_curves(tmp_path / "none.png", [])
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("counts", "bars", "hollow"), [((5, 1), "5", True), ((3, 5), "3 to 5", False), ((1,), "", True)]
)
def test_points_without_a_bar_say_why(tmp_path, counts, bars, hollow):
    values = {1 / (place + 1): spread(range(count)) for place, count in enumerate(counts)}
    plots.draw_shares(tmp_path / "compare.svg", {"random": values}, ylabel="AP", title="")
    text = (tmp_path / "compare.svg").read_text()  # which names each text in a comment
    assert ("one repeat: no deviation" in text) == hollow
    assert (f"standard deviation, {bars} repeats" in text) == bool(bars) == ("standard deviation" in text)


def test_missing_matplotlib_is_told(tmp_path, hide):
    hide("matplotlib")
    rows = [{"step": 1, "loss": 1.0}]
    with open_log(tmp_path) as log:
        log.optional("curves.png", "matplotlib", lambda: plots.draw_curves(tmp_path / "curves.png", rows))
    assert "matplotlib is not installed: no curves.png (pip install" in (tmp_path / "log.txt").read_text()


def test_a_slow_start_on_a_full_disk_leaves_no_traceback_of_a_thread(tmp_path, monkeypatch):
    monkeypatch.setattr("scrl_fast.run.log.SLOW_START", 0.0)
    said, escaped = threading.Event(), []

    def full(message):
        said.set()
        raise OSError(28, "No space left on device")

    with open_log(tmp_path, stream=io.StringIO()) as log:
        monkeypatch.setattr(log, "say", full)
        monkeypatch.setattr(threading, "excepthook", lambda failed: escaped.append(failed.exc_value))
        with log.slow_start(1):
            assert said.wait(30)
            for timer in [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]:
                timer.join()
    assert not escaped
