"""The launcher's part: a killed process, the restart, and a scheduler's signal, in one job."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from scrl_fast import runlog, train

OPTIONS = (
    "--data.demo_images=32 --data.demo_size=48 --views.size=32 --boxes.min_size=8 --train.epochs=40 "
    "--eval.roi_linear=false --run.tensorboard=false --run.log_every=1 --run.checkpoint_every=1 --train.device=cpu"
)


def test_a_killed_process_is_restarted_and_a_signal_stops_all_with_a_checkpoint(tmp_path):
    launcher = f"{sys.executable} -m torch.distributed.run --nproc-per-node=2 --max-restarts=1".split()
    command = [*launcher, str(Path(__file__).with_name("torchrun_worker.py")), *OPTIONS.split(), "--train.batch_size=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    job = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        while len(rows := steps(tmp_path)) < 6:
            assert job.poll() is None, job.stderr.read()[-4000:]
            assert time.monotonic() - started < 120, rows
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        _, said = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode == 1, said  # torchrun's, whatever its processes return
    assert re.search(r"exitcode: -9\).* local_rank: 1", said), said
    (run,) = (tmp_path / "runs").iterdir()  # the second attempt has the folder of the first
    log = (run / "log.txt").read_text()
    assert "resumed from" in log and "at step 3" in log
    (command,) = re.findall(r"torchrun --nproc-per-node=2 (-m scrl_fast.train --config=.*)", said)
    assert "everything is saved" in said and command.endswith("--resume=auto")
    last = torch.load(run / "checkpoints" / "last.pt", weights_only=True)["step"]
    assert steps(tmp_path) == list(range(1, last + 1))

    alone = tmp_path / "alone"  # one process, never disturbed
    options = [*OPTIONS.split(), "--train.batch_size=4", f"--train.max_steps={last}", f"--run.dir={alone}"]
    assert train.main(options) == 0
    for one, two in zip(*(runlog.read_metrics(path / "metrics.jsonl") for path in (alone, run)), strict=True):
        assert abs(one["loss"] - two["loss"]) < 1e-3 * one["loss"], (one, two)


def steps(folder: Path) -> list[int]:
    files = list(folder.glob("runs/*/metrics.jsonl"))
    return [json.loads(line)["step"] for line in files[0].read_text().splitlines()] if files else []
