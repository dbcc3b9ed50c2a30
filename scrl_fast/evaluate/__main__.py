"""``python -m scrl_fast.evaluate TASK --checkpoint=...``: measure what a frozen encoder learned.

Exit codes: 0 done; 2 wrong usage or input; 1 anything else.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from scrl_fast.config import command_line as cli
from scrl_fast.errors import UsageError, did_you_mean, friendly_errors
from scrl_fast.evaluate.config import TASKS

PROG = "python -m scrl_fast.evaluate"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, those of the process by default; return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with friendly_errors("scrl_fast.evaluate", debug="--debug" in argv):
        task = _task(argv)
        options = _parse(task, argv)
        run(task, options, argv)
    return 0


def run(task: str, options: Any, argv: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate; print the line of result and write the JSON file that the options name. Returns its content.

    argv: parsed once more over the training options that a checkpoint may bring (dense-consistency).
    """
    options.check_ready()
    from scrl_fast.evaluate import tasks  # torch, only once the options are known to be right
    from scrl_fast.evaluate.encoder import load_subject

    started = time.perf_counter()
    subject = load_subject(options)
    if task == "dense-consistency" and argv:
        options = _parse(task, argv, cli.Settings(tasks.training_settings(subject), subject.name))
    _say(subject.report)
    outcome = tasks.TASKS[task](options, subject, _say)
    print(outcome.line, flush=True)
    document = {
        "task": task,
        "result": outcome.result,
        "config": dataclasses.asdict(options),
        "checkpoint": subject.name,
        "backbone": subject.encoder.name,
        "seconds": round(time.perf_counter() - started, 3),
    }
    if options.json:
        _write(options.json, document)
    return document


def _write(path: str, document: dict[str, Any]) -> None:
    from pathlib import Path

    from scrl_fast import atomic_files as durable

    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    durable.write_text(file, json.dumps(document, indent=1) + "\n")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _task(argv: list[str]) -> str:
    """The task, taken out of the arguments. Prints the tasks for --help alone."""
    named = next((i for i, word in enumerate(argv) if not word.startswith("-")), None)
    known = ", ".join(TASKS)
    if named is None or (argv[0].startswith("-") and argv[0] not in ("--debug",)):
        if "--help" in argv or "-h" in argv:
            print(f"usage: {PROG} TASK --checkpoint=WEIGHTS [--OPTION=VALUE]...\n\ntasks (each has its own --help):")
            for name, cls in TASKS.items():
                print(f"  {name:18} {(cls.__doc__ or '').splitlines()[0]}")
            raise SystemExit(0)
        raise UsageError(f"the task comes first: {PROG} TASK ..., one of {known}")
    task = argv.pop(named)
    if task not in TASKS:
        near = did_you_mean(task.replace("_", "-"), TASKS)
        raise UsageError(f"unknown task '{task}'{near or f'; there are {known}'}")
    return task


def _parse(task: str, argv: Sequence[str], *base: cli.Settings) -> Any:
    cls = TASKS[task]
    return cli.parse_as(cls, argv, prog=f"{PROG} {task}", description=cls.__doc__ or "", base=base)


if __name__ == "__main__":
    raise SystemExit(main())
