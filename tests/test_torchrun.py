"""The launcher's part: a killed process, the restart, and a scheduler's signal, in one job."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path

import slurm_stubs
import torch

from scrl_fast import train
from scrl_fast.run.metrics_file import read_metrics

OPTIONS = (
    "--data.demo_images=32 --data.demo_size=48 --views.size=32 --boxes.min_size=8 --train.epochs=40 "
    "--eval.roi_linear=false --run.tensorboard=false --run.log_every=1 --run.checkpoint_every=1 --train.device=cpu"
)


def test_a_killed_process_is_restarted_and_a_schedulers_signal_stops_all_with_a_checkpoint(tmp_path):
    """The SLURM template on two nodes of one process each: the longest way that a job goes."""
    environment = slurm_stubs.install(tmp_path, CPUS_PER_TASK="1")
    environment["STUB_SCRIPT"] = str(Path(__file__).with_name("torchrun_worker.py"))
    template = Path(__file__).parents[1] / "scripts" / "slurm.sbatch"
    command = ["bash", str(template), "--config=demo", "--data.source=demo", *OPTIONS.split(), "--train.batch_size=2"]
    number, started = environment["SLURM_JOB_ID"], time.monotonic()
    run = tmp_path / "runs" / f"scrl-{number}"
    job = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        while len(rows := steps(run)) < 6:
            assert job.poll() is None, job.stderr.read()[-4000:]
            assert time.monotonic() - started < 120, rows
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)  # what --signal has SLURM send when time runs out
        _, said = job.communicate(timeout=60)
    finally:
        slurm_stubs.end(job)
    assert job.returncode == 1, said  # torchrun's, whatever its processes return
    assert re.search(r"exitcode: -9\).* local_rank: 0", said), said
    log = (run / "log.txt").read_text()
    assert log.count("resumed from") == 1 and "at step 3" in log  # by one restart, of both machines
    (resume,) = re.findall(r"torchrun --nnodes=2 --nproc-per-node=1 (-m scrl_fast.train --config=.*)", said)
    assert "everything is saved" in log and resume.endswith("--resume=auto")
    assert (tmp_path / "scontrol").read_text() == f"requeue\n{number}\n"
    last = torch.load(run / "checkpoints" / "last.pt", weights_only=True)["step"]
    assert steps(run) == list(range(1, last + 1))

    alone = tmp_path / "alone"  # one process, never disturbed
    options = [*OPTIONS.split(), "--train.batch_size=4", f"--train.max_steps={last}", f"--run.dir={alone}"]
    assert train.main(options) == 0
    for one, two in zip(*(read_metrics(path / "metrics.jsonl") for path in (alone, run)), strict=True):
        assert abs(one["loss"] - two["loss"]) < 1e-3 * one["loss"], (one, two)


def steps(run: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run / "metrics.jsonl")]
