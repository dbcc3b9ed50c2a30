"""``python -m scrl_fast.evaluate TASK --checkpoint=...``: measure what a frozen encoder learned.

Exit codes: 0 done; 2 wrong usage or input; 128 and its number by a signal; 1 anything else.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from scrl_fast.atomic_files import write_json
from scrl_fast.config.command_line import parse_as, take_task
from scrl_fast.config.files import Settings
from scrl_fast.errors import friendly_errors, tell, tell_result
from scrl_fast.evaluate.config import TASK_OPTIONS
from scrl_fast.run.signals import ending_cleanly

if TYPE_CHECKING:
    from scrl_fast.distributed.world import World
    from scrl_fast.evaluate.result import TaskResult

PROG = "python -m scrl_fast.evaluate"
LESS_MEMORY = (
    "lower --batch_size, --size or --workers, use fewer images (--images, --data.max_images), or a smaller --backbone"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, those of the process by default; return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with friendly_errors("scrl_fast.evaluate", debug="--debug" in argv, less_memory=LESS_MEMORY) as report:
        report.quiet = os.environ.get("LOCAL_RANK", "0") != "0"  # the first process of a machine tells of all errors
        summaries = {name: (cls.__doc__ or "").splitlines()[0] for name, cls in TASK_OPTIONS.items()}
        task = take_task(argv, summaries, f"{PROG} TASK --checkpoint=WEIGHTS [--OPTION=VALUE]...")
        options = _parse(task, argv)
        with ending_cleanly("scrl_fast.evaluate", "ended before there was a result; no file is half written"):
            run(task, options, argv)
    return 0


def run(task: str, options: Any, argv: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate; print the line of result and write the JSON file that the options name. Returns its content.

    argv: parsed once more over the training options that a checkpoint may bring (dense-consistency).
    """
    options.check_ready()
    from scrl_fast.distributed import rendezvous  # torch, only once the options are known to be right
    from scrl_fast.run.numerics import keep_memory

    keep_memory()  # an eighth of the time on a CPU
    with rendezvous.distributed_command():
        document = _run(task, options, argv, rendezvous.join(rendezvous.device_of(options.device)))
    return document


def _run(task: str, options: Any, argv: Sequence[str], world: World) -> dict[str, Any]:
    """`run` as one process of ``world``; rank 0 alone prints and writes."""
    from scrl_fast.evaluate.encoder import load_evaluated
    from scrl_fast.evaluate.region_tasks import training_settings
    from scrl_fast.evaluate.result import TaskContext
    from scrl_fast.evaluate.tasks import COMPARISONS, TASKS

    started = time.perf_counter()
    context = TaskContext(tell, world) if world.rank == 0 else TaskContext(world=world)
    document: dict[str, Any] = {"task": task}
    if task in COMPARISONS:
        result = COMPARISONS[task](options, context)
        return _told(document, result, options, started, world)
    evaluated = load_evaluated(options)
    if task == "dense-consistency" and argv:
        options = _parse(task, argv, Settings(training_settings(evaluated), evaluated.name))
        if options.views.size != _parse(task, argv).views.size:  # the file's
            evaluated.view_size(option="--views.size")
    context.say(evaluated.report)
    result = TASKS[task](options, evaluated, context)
    document |= {"checkpoint": evaluated.name, "backbone": evaluated.encoder.name}
    return _told(document, result, options, started, world)


def _told(document: dict[str, Any], result: TaskResult, options: Any, started: float, world: World) -> dict[str, Any]:
    """The content of the JSON file, once rank 0 has written it and printed the line of result."""
    from scrl_fast.info import measured_on

    document |= {
        "result": result.values,
        "config": dataclasses.asdict(options),
        "seconds": round(time.perf_counter() - started, 3),
    }
    if world.rank == 0:
        if options.json:
            document["environment"] = measured_on()
            write_json(options.json, document)
        tell_result(result.line)
    return document


def _parse(task: str, argv: Sequence[str], *base: Settings) -> Any:
    cls = TASK_OPTIONS[task]
    return parse_as(cls, argv, prog=f"{PROG} {task}", description=cls.__doc__ or "", base=base).options()


if __name__ == "__main__":
    raise SystemExit(main())
