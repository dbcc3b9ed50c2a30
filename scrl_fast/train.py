"""``python -m scrl_fast.train``: pre-train a backbone.

Exit codes: 0 done, or stopped on request with a checkpoint; 2 wrong usage or input; 1 anything else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from scrl_fast import cli
from scrl_fast.errors import friendly_errors

PROG = "python -m scrl_fast.train"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, those of the process by default; return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    with friendly_errors("scrl_fast.train", debug="--debug" in argv) as report:
        request = cli.parse(argv, prog=PROG)
        if os.environ.get("RANK", "0") == "0":
            for note in request.notes:
                print(note, file=sys.stderr)
        if request.print_config:
            print(request.config.to_yaml(), end="")
            return 0
        request.config.check_ready()
        from scrl_fast.trainer import SCRLTrainer  # torch, only once the options are known to be right

        trainer = SCRLTrainer(request.config)
        report.log = trainer.folder / "log.txt"
        trainer.fit()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
