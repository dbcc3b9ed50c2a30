"""scripts/slurm.sbatch as sbatch would run it: what each node's torchrun is told, and what becomes of the job then."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import slurm_stubs

TEMPLATE = Path(__file__).parents[1] / "scripts" / "slurm.sbatch"
STOPPED = "2026-01-01 00:00:00 SIGTERM: stopped after step 9, everything is saved. To continue:\n"
UNSAVED = "2026-01-01 00:00:00 SIGTERM: stopped before the first step, so there is nothing to save. To start again:\n"

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="SLURM, and the /proc of its stand-in")


def start(folder, torchrun, *options):
    """The finished template, on nodes whose torchrun is this shell script."""
    environment = slurm_stubs.install(folder)
    (folder / "bin" / "torchrun").write_text(f"#!/bin/bash\n{torchrun}\n")
    command = ["bash", str(TEMPLATE), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=folder)


def test_every_node_gets_the_same_rendezvous_and_its_processes(tmp_path):
    tell = f'printf "%s\\n" "$@" "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" > {tmp_path}/told_$SLURM_NODEID'
    done = start(tmp_path, tell, "--train.epochs=100", "--run.keep=2")
    assert (done.returncode, done.stderr) == (0, "")
    first, second = ((tmp_path / f"told_{node}").read_text().split("\n") for node in (0, 1))
    assert first == second
    options = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=4711"]
    assert first[:6] == [*options, "--rdzv-endpoint=localhost:24711", "--max-restarts=3"]
    assert first[6:8] == ["-m", "scrl_fast.train"] and f"--run.dir={tmp_path}/runs/scrl-4711" in first
    assert first[-5:] == ["--resume=auto", "--train.epochs=100", "--run.keep=2", "240", ""]
    assert (tmp_path / "srun").read_text().split() == ["--kill-on-bad-exit=1", "--cpus-per-task=3"]
    assert not (tmp_path / "scontrol").exists()


@pytest.mark.parametrize(
    ("before", "says", "code", "queued"),
    [
        ("", STOPPED, 1, True),
        ("", STOPPED, 0, False),
        ("", "", 1, False),
        (STOPPED, "", 1, False),
        (STOPPED, STOPPED, 1, True),
        (STOPPED, UNSAVED, 1, False),
    ],
    ids=["stopped", "done", "failed", "failed after a stop", "stopped again", "stopped before the first step"],
)
def test_a_job_is_queued_again_only_if_this_start_was_stopped_with_all_saved(tmp_path, before, says, code, queued):
    log = tmp_path / "runs" / "scrl-4711" / "log.txt"
    log.parent.mkdir(parents=True)
    if before:
        log.write_text("2026-01-01 00:00:00 a line\n" + before)
    (tmp_path / "says").write_text(says)
    done = start(tmp_path, f"[ $SLURM_NODEID = 1 ] && exit; cat {tmp_path}/says >> {log}; exit {code}")
    assert (done.returncode, done.stderr) == (code, "")
    asked = (tmp_path / "scontrol").read_text() if (tmp_path / "scontrol").exists() else ""
    assert asked == ("requeue\n4711\n" if queued else "")


def test_the_template_is_a_script_that_bash_reads_and_sbatch_takes():
    assert subprocess.run(["bash", "-n", str(TEMPLATE)], check=False).returncode == 0
    lines = TEMPLATE.read_text().splitlines()
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert {"#SBATCH --signal=TERM@300", "#SBATCH --requeue"} <= set(lines)
    assert max(directives) < first  # sbatch reads them up to the first command
    assert os.access(TEMPLATE, os.R_OK)
