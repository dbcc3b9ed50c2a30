"""Run by test_checkpoint.py: ``python tests/crash_saves.py FOLDER``. One import, then a process by fork for each crash.

``FOLDER/killed``: a process that does nothing but save is killed at random instants, and after each of them all that is
there must load. ``FOLDER/full``: a checkpoint that is larger than any file may be. Prints what the full disk said.
"""

from __future__ import annotations

import itertools
import os
import random
import resource
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

from scrl_fast.run.checkpoint import CheckpointManager, CheckpointWriteError, load

KILLS, NUMBERS = 20, 300_000


def save_forever(manager: CheckpointManager, step: int, pipe: int) -> None:
    for number in itertools.count(step):
        state = {"step": number, "weight": torch.full((NUMBERS,), float(number))}
        manager.save(state, number, best=number % 3 == 0)
        os.write(pipe, f"{number} ".encode())


def killed_after(manager: CheckpointManager, step: int, seconds: float) -> int:
    """The last step that a process says to have saved which began with `step` and was killed `seconds` after that."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        save_forever(manager, step, write)
    os.close(write)
    said = os.read(read, 100)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(read, 4096):
        said += more
    os.close(read)
    return int(said.split()[-1])


def kill(manager: CheckpointManager) -> None:
    done, draw = 0, random.Random(0)
    for _ in range(KILLS):
        done = killed_after(manager, done + 1, draw.uniform(0.0, 0.03))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # killed between a file and its checksum: read by its zip checksums
            state = load(manager.folder)
            for path in manager.folder.glob("*.pt"):
                load(path)
        assert state["step"] in (done, done + 1), (state["step"], done)
        assert torch.equal(state["weight"], torch.full((NUMBERS,), float(state["step"])))
        done = state["step"]


def fill(manager: CheckpointManager) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    manager.save({"weight": torch.ones(10)}, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        manager.save({"weight": torch.ones(1_000_000)}, 2)
    except CheckpointWriteError as error:
        print(error)


if __name__ == "__main__":
    torch.set_num_threads(1)  # no threads that a fork would lose
    kill(CheckpointManager(Path(sys.argv[1], "killed")))
    fill(CheckpointManager(Path(sys.argv[1], "full")))
