"""``python -m scrl_fast.train``: pre-train a backbone.

Exit codes: 0 done, or stopped on request with a checkpoint; 2 wrong usage or input; 1 anything else.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Sequence
from typing import Any

from scrl_fast.config.command_line import parse
from scrl_fast.config.run_folder import LOG
from scrl_fast.errors import friendly_errors

PROG = "python -m scrl_fast.train"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, those of the process by default; return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    _tell_native_crashes()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    name = "scrl_fast.train" + (f" (process {os.environ.get('RANK')})" if several else "")
    with friendly_errors(name, debug="--debug" in argv) as report:
        report.quiet = several and os.environ.get("LOCAL_RANK", "0") != "0"  # a wrong option is told once a machine
        config = parse(argv, prog=PROG, checkpoint_config=_checkpoint_config).options()
        config.check_ready()
        report.quiet = False
        from scrl_fast.distributed import rendezvous  # torch, only once the options are known to be right
        from scrl_fast.trainer import SCRLTrainer

        with rendezvous.distributed_command():
            trainer = SCRLTrainer(config)
            report.log = trainer.folder / LOG
            trainer.fit()
    return 0


def _checkpoint_config(path: str) -> dict[str, Any]:
    """The options in a checkpoint file."""
    from scrl_fast.run.checkpoint import load_training_state  # torch

    return load_training_state(path)["config"]


def _tell_native_crashes() -> None:
    """A crash in compiled code shows what every thread was doing, where stderr is a file that can be written then."""
    try:
        sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # no stderr, a notebook's, a closed one
        return
    if not faulthandler.is_enabled():
        faulthandler.enable()


if __name__ == "__main__":
    raise SystemExit(main())
