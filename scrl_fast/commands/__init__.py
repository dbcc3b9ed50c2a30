"""``scrl-fast COMMAND``: the same code as ``python -m scrl_fast.COMMAND``, imported once the command is known."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from scrl_fast._version import __version__
from scrl_fast.errors import UsageError, did_you_mean, friendly_errors

COMMANDS = {
    "train": ("scrl_fast.train", "pre-train an encoder"),
    "evaluate": ("scrl_fast.evaluate.__main__", "measure an encoder"),
    "transfer": ("scrl_fast.transfer.__main__", "fine-tune detectors, compare starts, use and export a detector"),
    "export": ("scrl_fast.export", "write an encoder for other libraries"),
    "info": ("scrl_fast.info", "versions, devices, and which implementation each operation uses"),
    "pack": ("scrl_fast.data.pack", "decode and shrink images once, for fast reading"),
}
"""Every command with its module and a line about it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: scrl-fast COMMAND ...\n\ncommands (each has its own --help):")
        print("\n".join(f"  {name:10}{line}" for name, (_, line) in COMMANDS.items()))
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        with friendly_errors("scrl-fast"):
            raise UsageError(f"unknown command '{name}'{did_you_mean(name, COMMANDS)}; there are {', '.join(COMMANDS)}")
    return import_module(COMMANDS[name][0]).main(rest)
