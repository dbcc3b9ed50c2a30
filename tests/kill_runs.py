"""Run by test_kill.py: ``python tests/kill_runs.py FOLDER SECONDS``. One import, then a process by fork for each trial.

The same run, resumed each time, is killed at random instants until it has been killed often enough and may go on for a
few steps; another is left alone. A checkpoint follows every step, so that many of the kills hit the writing of one.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tiny_trainer import Pictures, make_config

from scrl_fast import info
from scrl_fast.run import plots
from scrl_fast.trainer import SCRLTrainer

KILLS, PLANNED = 20, 300  # the plan is longer than it gets between the kills


def train(folder: Path, last: int) -> None:
    config = make_config(folder, batch_size=4, epochs=PLANNED // 3, max_steps=last)
    config.run.checkpoint_every, config.resume = 1, "auto"
    SCRLTrainer(config, source=Pictures(num_classes=3)).fit()


def start(folder: Path, log: Path, limit: int = 0, last: int = 0) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        train(folder, last)
        code = 0
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(code)


def main(folder: Path) -> None:
    draw, whole, killed = random.Random(0), folder / "whole", folder / "killed"
    step = 0.05  # seconds; measured below, on the machine as busy as it is
    for trial in range(KILLS):
        before, child = newest(killed), start(killed, folder / "killed.txt")
        if trial % 4:  # three in four after a new checkpoint at least, one while it starts
            wait_until(lambda before=before: newest(killed) > before)
            began, one = time.monotonic(), newest(killed)
            if trial == 1:
                wait_until(lambda one=one: newest(killed) >= one + 2)
                step = (time.monotonic() - began) / 2
        time.sleep(draw.uniform(0, 1.5 * step))
        os.kill(child, signal.SIGKILL)
        wait(child)
    size = max(path.stat().st_size for path in (killed / "checkpoints").glob("*.pt"))
    assert wait(start(killed, folder / "full.txt", limit=size // 2)) == 1
    last = newest(killed) // 2 * 2 + 4
    assert wait(start(killed, folder / "killed.txt", last=last)) == 0
    assert wait(start(whole, folder / "whole.txt", last=last)) == 0


def newest(run: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    return max([0, *(int(path.stem.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*.pt"))])


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for module, name in ((plots, "draw_curves"), (plots, "draw_boxes"), (info, "write_environment")):
        setattr(module, name, lambda *_, **__: True)  # not what is tested here
    make_config("").from_dict({})  # what every process would have to make anew
    main(Path(sys.argv[1]))
