"""A run that is killed twenty times, and once finds the disk full, ends in the bits of one that was left alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import kill_runs
import pytest
from test_resume import assert_same, metrics

from scrl_fast.config.run_folder import METRICS


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, kill_runs.__file__, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_killed_runs_end_in_the_same_bits_with_each_step_once(runs):
    killed, whole = (SimpleNamespace(folder=runs / name) for name in ("killed", "whole"))
    steps = [row["step"] for row in metrics(killed)]
    assert steps == [1, *range(2, steps[-1] + 1, 2)] and steps[-1] > 10
    assert_same(killed, whole)
    assert not list((killed.folder / "checkpoints").glob(".*"))


def test_kills_lost_nothing_but_steps_after_the_last_checkpoint(runs):
    resumed = [int(step) for step in re.findall(r"resumed from .* at step (\d+)", (runs / "killed.txt").read_text())]
    assert len(set(resumed)) > 5, resumed  # it did get on between the kills
    assert resumed == sorted(resumed)


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(runs):
    said = (runs / "full.txt").read_text()
    before = int(re.findall(r"resumed from .* at step (\d+)", said)[0])
    assert re.search(
        rf"CheckpointWriteError: cannot write .*step_0*{before + 1}\.pt.*\(disk full\? \d+ bytes free", said
    )
    after = re.findall(r"resumed from .* at step (\d+)", (runs / "killed.txt").read_text())[-1]
    assert int(after) == before
    assert Path(runs, "killed", METRICS).exists()
