"""Stands in for SLURM's commands, with nodes that are processes of this machine: ``slurm_stubs.py COMMAND ...``.

What the commands were asked for goes into the folder that SLURM_STUBS names; `install` puts them on a PATH.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

COMMANDS = ("srun", "scontrol", "torchrun")


def install(folder: Path) -> dict[str, str]:
    """Environment in which the commands are these, inside a job of two nodes with one GPU each."""
    (folder / "bin").mkdir(parents=True)
    for name in COMMANDS:
        path = folder / "bin" / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        path.chmod(0o755)
    job = {"JOB_ID": "4711", "JOB_NODELIST": "node[1-2]", "NNODES": "2", "GPUS_ON_NODE": "1", "CPUS_PER_TASK": "3"}
    slurm = {f"SLURM_{name}": value for name, value in {**job, "SUBMIT_DIR": str(folder)}.items()}
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return os.environ | slurm | {"PATH": path, "SLURM_STUBS": str(folder), "OMP_NUM_THREADS": "1"}


def note(name: str, words: list[str]) -> None:
    with open(Path(os.environ["SLURM_STUBS"]) / name, "a", encoding="utf-8") as file:
        file.write("\n".join(words) + "\n")


def scontrol(words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        print("localhost", "127.0.0.1", sep="\n", flush=True)
    else:
        note("scontrol", words)
    return 0


def torchrun(words: list[str]) -> int:
    """torch.distributed.run, with another script in place of scrl_fast.train if STUB_SCRIPT names one."""
    note(f"torchrun_{os.environ['SLURM_NODEID']}", words)
    if script := os.environ.get("STUB_SCRIPT"):
        place = words.index("scrl_fast.train")
        words[place - 1 : place + 1] = [script]
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *words])


def srun(words: list[str]) -> int:
    """The command once a node; the first failure kills what is left, as --kill-on-bad-exit has it.

    SIGUSR1 stands for what the controller does when time runs out: SIGTERM to every process of the step.
    """
    count = next(place for place, word in enumerate(words) if not word.startswith("--"))
    note("srun", words[:count])
    environments = [os.environ | {"SLURM_NODEID": str(node)} for node in range(int(os.environ["SLURM_NNODES"]))]
    nodes = [subprocess.Popen(words[count:], env=environment) for environment in environments]
    signal.signal(signal.SIGUSR1, lambda *_: send(signal.SIGTERM))
    note("srun_pid", [str(os.getpid())])
    codes = []
    while len(codes) < len(nodes):
        _, status = os.wait()
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1] != 0:
            send(signal.SIGKILL)
    return next((abs(code) for code in codes if code), 0)


def send(number: int) -> None:
    """A signal to every descendant of this process."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    for pid in found - {os.getpid()}:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](sys.argv[2:]))
