"""Stands in for SLURM's commands, with nodes that are processes of this machine: ``slurm_stubs.py COMMAND ...``.

What the commands were asked for goes into the folder that SLURM_STUBS names; `install` puts them on a PATH.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

COMMANDS = ("srun", "scontrol", "scancel", "torchrun")
OF_A_JOB = ("RUN", "DATA")


def install(folder: Path, **job: str) -> dict[str, str]:
    """Environment in which the commands are these, inside a job of two nodes with one GPU each.

    job: what SLURM sets besides or otherwise, by its name behind ``SLURM_``; '' for what it does not set. The job's id
    is the port that the template makes of it, free now. What the template reads of the caller's environment is dropped.
    """
    (folder / "bin").mkdir(parents=True)
    for name in COMMANDS:
        path = folder / "bin" / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        path.chmod(0o755)
    usual = {"JOB_ID": str(free_port()), "JOB_NODELIST": "node[1-2]", "NNODES": "2", "SUBMIT_DIR": str(folder)}
    job = {**usual, "GPUS_ON_NODE": "1", "CPUS_PER_TASK": "3", **job}
    slurm = {f"SLURM_{name}": value for name, value in job.items() if value}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") and name not in OF_A_JOB}
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return kept | slurm | {"PATH": path, "SLURM_STUBS": str(folder), "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    """One of those that the template chooses from."""
    while True:
        with socket.socket() as listener:
            try:
                listener.bind(("", port := random.randrange(20_000, 30_000)))
            except OSError:
                continue
            return port


def note(name: str, words: list[str]) -> None:
    with open(Path(os.environ["SLURM_STUBS"]) / name, "a", encoding="utf-8") as file:
        file.write("\n".join(words) + "\n")


def scontrol(words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        print("localhost", "127.0.0.1", sep="\n", flush=True)
    else:
        note("scontrol", words)
    return 0


def scancel(words: list[str]) -> int:
    """A signal to every process of the step, and not to the script; there is no step before srun has run."""
    note("scancel", words)
    path = Path(os.environ["SLURM_STUBS"]) / "srun_pid"
    if path.exists():
        send(getattr(signal, words[0].replace("--signal=", "SIG")), int(path.read_text()))
    return 0


def torchrun(words: list[str]) -> int:
    """torch.distributed.run, with another script in place of scrl_fast.train if STUB_SCRIPT names one."""
    note(f"torchrun_{os.environ['SLURM_NODEID']}", words)
    if script := os.environ.get("STUB_SCRIPT"):
        place = words.index("scrl_fast.train")
        words[place - 1 : place + 1] = [script]
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *words])


def srun(words: list[str]) -> int:
    """The command once a node; the first failure kills what is left, as --kill-on-bad-exit has it."""
    count = next(place for place, word in enumerate(words) if not word.startswith("--"))
    note("srun", words[:count])
    note("srun_pid", [str(os.getpid())])
    environments = [os.environ | {"SLURM_NODEID": str(node)} for node in range(int(os.environ["SLURM_NNODES"]))]
    nodes = [subprocess.Popen(words[count:], env=environment) for environment in environments]
    codes = []
    while len(codes) < len(nodes):
        _, status = os.wait()
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1] != 0:
            kill(os.getpid())
    return next((abs(code) for code in codes if code), 0)


def end(job: subprocess.Popen) -> None:
    """The template, and whatever it has started."""
    if job.poll() is None:  # otherwise its id may be another's by now
        kill(job.pid)
        job.kill()
    job.wait()


def kill(ancestor: int) -> None:
    """Every descendant of a process, also those that are born meanwhile."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        send(number, ancestor)


def send(number: int, ancestor: int) -> None:
    """A signal to every descendant of a process."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
    found = {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    for pid in found - {ancestor}:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](sys.argv[2:]))
