"""scripts/slurm.sbatch as sbatch would run it: what each node's torchrun is told, and what becomes of the job then."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_stubs

from scrl_fast.config import command_line

TEMPLATE = Path(__file__).parents[1] / "scripts" / "slurm.sbatch"
STOPPED = "2026-01-01 00:00:00 SIGTERM: stopped after step 9, everything is saved. To continue:\n"
UNSAVED = "2026-01-01 00:00:00 SIGTERM: stopped before the first step, so there is nothing to save. To start again:\n"

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="SLURM, and the /proc of its stand-in")


def start(folder, torchrun, *options, **job):
    """The finished template, on nodes whose torchrun is this shell script."""
    environment = slurm_stubs.install(folder, **{"JOB_ID": "4711", **job})
    (folder / "bin" / "torchrun").write_text(f"#!/bin/bash\n{torchrun}\n")
    command, said = ["bash", str(TEMPLATE), *options], subprocess.PIPE
    job = subprocess.Popen(command, env=environment, stdout=said, stderr=said, text=True, cwd=folder)
    try:
        stdout, stderr = job.communicate(timeout=60)
        return subprocess.CompletedProcess(command, job.returncode, stdout, stderr)
    finally:
        slurm_stubs.end(job)


def save(folder):
    """The run folder of the job, with a checkpoint."""
    checkpoints = folder / "runs" / "scrl-4711" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step_00000009.pt").touch()
    return checkpoints.parent


def asked(folder, command="scontrol"):
    return (folder / command).read_text().split() if (folder / command).exists() else []


def test_every_node_gets_the_same_rendezvous_and_its_processes(tmp_path, monkeypatch):
    for name in ("RUN", "DATA", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.setenv(name, "/the/testers")
    tell = f'printf "%s\\n" "$@" "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" > {tmp_path}/told_$SLURM_NODEID'
    done = start(tmp_path, tell, "--train.epochs=100", "--run.dir=elsewhere")
    assert (done.returncode, done.stderr) == (0, "")
    first, second = ((tmp_path / f"told_{node}").read_text().split("\n") for node in (0, 1))
    assert first == second
    options = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=4711"]
    assert first[:6] == [*options, "--rdzv-endpoint=localhost:24711", "--max-restarts=3"]
    assert first[6:8] == ["-m", "scrl_fast.train"] and "--data.root=/data/imagenet" in first
    # RUN is where the template looks: it has the last word
    run = f"--run.dir={tmp_path}/runs/scrl-4711"
    assert first[-6:] == ["--resume=auto", "--train.epochs=100", "--run.dir=elsewhere", run, "240", ""]
    assert command_line.parse(["--config=demo", *first[-4:-2]], prog="train").config.run.dir == run.partition("=")[2]
    assert asked(tmp_path, "srun") == ["--kill-on-bad-exit=1", "--cpus-per-task=3"]
    assert asked(tmp_path) == asked(tmp_path, "scancel") == []


@pytest.mark.parametrize(
    ("gpus", "cpus", "processes", "threads"),
    [("2", "7", 2, 3), ("4", "2", 4, 1), ("8", "", 8, 8), ("", "6", 1, 6), ("", "", 1, 8), ("0", "6", 1, 6)],
)
def test_a_node_has_a_process_a_gpu_or_one_and_its_cpus_are_shared_out(tmp_path, gpus, cpus, processes, threads):
    tell = f'echo "$2" "$OMP_NUM_THREADS" > {tmp_path}/told'
    done = start(tmp_path, tell, GPUS_ON_NODE=gpus, CPUS_PER_TASK=cpus, NNODES="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "told").read_text().split() == [f"--nproc-per-node={processes}", str(threads)]


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
    log = save(tmp_path) / "log.txt"
    if before:
        log.write_text("2026-01-01 00:00:00 a line\n" + before)
    (tmp_path / "says").write_text(says)
    done = start(tmp_path, f"[ $SLURM_NODEID = 1 ] && exit; cat {tmp_path}/says >> {log}; exit {code}")
    assert (done.returncode, done.stderr) == (code, "")
    assert asked(tmp_path) == (["requeue", "4711"] if queued else [])


@pytest.mark.parametrize(
    ("at_term", "saved", "task", "queued"),
    [
        ("", True, {}, "4711"),
        ("trap 'exit 1' TERM", True, {}, "4711"),
        ("trap 'exit 0' TERM", True, {}, ""),
        ("trap 'exit 1' TERM", False, {}, ""),
        ("", True, {"ARRAY_JOB_ID": "4711", "ARRAY_TASK_ID": "3"}, "4711_3"),
    ],
    ids=["while Python starts", "a save that takes too long", "just done", "nothing saved", "a task of an array"],
)
def test_a_job_whose_time_runs_out_is_queued_again_whatever_its_log_says(tmp_path, at_term, saved, task, queued):
    if saved:
        save(tmp_path)
    both = f"touch {tmp_path}/node_$SLURM_NODEID; until [ -e {tmp_path}/node_1 ]; do sleep 0.02; done"
    signal = "[ $SLURM_NODEID = 1 ] || kill -USR1 $(cut -d' ' -f4 /proc/$PPID/stat)"  # srun's parent, as B: has it
    done = start(tmp_path, f"{at_term}\n{both}\n{signal}\nwhile :; do sleep 0.05; done", **task)
    assert (done.returncode == 0) == ("exit 0" in at_term), done
    assert asked(tmp_path, "scancel") == ["--signal=TERM", queued or "4711"]
    assert asked(tmp_path) == (["requeue", queued] if queued else [])


def test_the_stand_in_leaves_no_process_behind(tmp_path):
    environment = slurm_stubs.install(tmp_path)
    (tmp_path / "bin" / "torchrun").write_text(f"#!/bin/bash\necho $$ > {tmp_path}/pid_$SLURM_NODEID; exec sleep 50\n")
    job, started = subprocess.Popen(["bash", str(TEMPLATE)], env=environment, cwd=tmp_path), time.monotonic()
    try:
        while len(found := [text for path in tmp_path.glob("pid_*") if (text := path.read_text())]) < 2:
            assert job.poll() is None and time.monotonic() - started < 30
            time.sleep(0.02)
    finally:
        slurm_stubs.end(job)
    for pid in [*found, (tmp_path / "srun_pid").read_text()]:
        status = Path("/proc", pid.strip(), "status")
        while status.exists() and "State:\tZ" not in status.read_text():  # a signal takes a moment
            assert time.monotonic() - started < 40, pid
            time.sleep(0.02)


def test_two_jobs_on_one_machine_have_numbers_and_ports_of_their_own(tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", slurm_stubs.free_port()))
        ports = [taken.getsockname()[1], 23456, 20001, 29999]
        monkeypatch.setattr(slurm_stubs.random, "randrange", lambda *_: ports.pop(0))
        assert int(slurm_stubs.install(tmp_path)["SLURM_JOB_ID"]) in (23456, 20001, 29999)


def test_the_template_is_a_script_that_bash_reads_and_sbatch_takes():
    assert subprocess.run(["bash", "-n", str(TEMPLATE)], check=False).returncode == 0
    lines = TEMPLATE.read_text().splitlines()
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert {"#SBATCH --signal=B:USR1@300", "#SBATCH --requeue"} <= set(lines)
    assert max(directives) < first  # sbatch reads them up to the first command
    assert os.access(TEMPLATE, os.R_OK)
