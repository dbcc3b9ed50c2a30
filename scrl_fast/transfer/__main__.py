"""``python -m scrl_fast.transfer TASK --data.root=... --init=WEIGHTS``: fine-tune a detector and measure it.

``python -m scrl_fast.transfer predict`` uses a trained one (`scrl_fast.transfer.commands`), and ``compare TASK`` trains
one from each of several starts (`scrl_fast.transfer.compare`).

Exit codes: 0 done, or stopped on request with a checkpoint; 2 wrong usage or input; 1 anything else, but 128 and its
number by a signal that ends ``predict`` or ``export``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from scrl_fast.atomic_files import write_json
from scrl_fast.config.command_line import parse_as, take_task
from scrl_fast.config.files import Settings
from scrl_fast.config.run_folder import LOG
from scrl_fast.errors import UsageError, friendly_errors
from scrl_fast.transfer.commands import COMMANDS, LESS_MEMORY, LESS_MEMORY_TRAINING, PROG, SUMMARIES
from scrl_fast.transfer.compare.config import CompareConfig
from scrl_fast.transfer.config import DETECTOR_DEFAULTS, TASK_DEFAULTS, TASK_SUMMARIES, TransferConfig
from scrl_fast.transfer.recipes import RECIPES
from scrl_fast.transfer.start_backbone import backbone_not_named

USAGE = " TASK --data.root=... [--init=WEIGHTS] [--SECTION.OPTION=VALUE]..."
COMPARE_USAGE = (
    " TASK --data.root=... [--inits=random,RUN,...] [--shares=0.1,1] [--seeds=3] [--SECTION.OPTION=VALUE]..."
)
Options = TypeVar("Options", bound=TransferConfig)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, those of the process by default; return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with friendly_errors("scrl_fast.transfer", debug="--debug" in argv) as report:
        name = next((word for word in argv if word != "--debug"), "")
        report.less_memory = LESS_MEMORY.get(name, LESS_MEMORY_TRAINING)
        if name == "compare":
            argv.remove(name)
            return compare(argv)
        if name in COMMANDS:
            argv.remove(name)
            COMMANDS[name](argv)
            return 0
        config = parse(argv)
        from scrl_fast.distributed import rendezvous  # torch, only once the options are known to be right
        from scrl_fast.transfer.trainer import Transfer

        with rendezvous.distributed_command():
            transfer = Transfer(config)
            report.log = transfer.folder / LOG
            summary = transfer.fit()
        if config.json and "result" in summary and transfer.world.rank == 0:
            write_result(config, summary)
    return 0


def compare(argv: list[str]) -> int:
    """``compare TASK``: the task from several starts; returns the exit code, 1 also where a row failed."""
    config = parse_command(argv, CompareConfig, f"{PROG} compare", TASK_SUMMARIES, COMPARE_USAGE)
    from scrl_fast.transfer.compare.comparison import Comparison

    return Comparison(config).run()


def parse(argv: list[str]) -> TransferConfig:
    """Options of a task: its own defaults, the detector's, the backbone that the weights state, then files, then the
    command line. Raises UsageError."""
    return parse_command(argv, TransferConfig, PROG, {**TASK_SUMMARIES, **SUMMARIES}, USAGE)


def parse_command(argv: list[str], cls: type[Options], prog: str, summaries: Mapping[str, str], usage: str) -> Options:
    """`parse` for a command of this package. Raises UsageError.

    cls: its options. prog: its name. summaries, usage: what may follow the name, and how, in its help.
    """
    task = take_task(argv, summaries, prog + usage)
    settings = [Settings({"task": task, **TASK_DEFAULTS[task]}, f"the defaults of {task}")]
    description = (
        f"{(cls.__doc__ or '').splitlines()[0]} Task: {task}. The defaults below are those of detection; "
        "--print_config shows the task's own."
    )
    command: dict[str, Any] = {"prog": f"{prog} {task}", "description": description, "recipes": recipes()}
    request = parse_as(cls, argv, base=settings, **command)
    if defaults := DETECTOR_DEFAULTS.get(request.config.model.detector):
        settings.append(Settings(defaults, f"the defaults of {request.config.model.detector}"))
        request = parse_as(cls, argv, base=settings, **command)
    config = request.config
    if config.task != task:
        raise UsageError(f"the task is {task}, but the options say --task={config.task}")
    if not request.print_config:
        config.check_ready()
    unnamed = "model.backbone" not in request.named
    if unnamed and (default := backbone_not_named(config, getattr(config, "inits", (config.init,)))):
        request = parse_as(cls, argv, base=[*settings, default], **command)
    return request.options()


def recipes() -> dict[str, Settings]:
    """What ``--config`` takes by name."""
    return {name: Settings(options, f"the recipe {name}") for name, options in RECIPES.items()}


def write_result(config: TransferConfig, summary: dict[str, Any]) -> None:
    """The file that ``--json`` names."""
    document = {
        "task": config.task,
        "result": summary["result"],
        "config": config.to_dict(),
        "checkpoint": summary["checkpoint"],
        "seconds": summary["seconds"],
    } | {name: summary[name] for name in ("best",) if name in summary}
    write_json(config.json, document)


if __name__ == "__main__":
    raise SystemExit(main())
