"""Errors that speak to the user: one line, an exit code, a traceback only on request.

Every command of the package wraps its work in `friendly_errors`; nothing here imports torch, so that a wrong option
is answered at once.
"""

from __future__ import annotations

import difflib
import errno
import os
import select
import stat
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

EXIT_FAILURE = 1
EXIT_USAGE = 2


class UsageError(ValueError):
    """What the user asked for cannot be done: a wrong option, file or folder. Commands exit with code 2."""


FILE_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def irregular_kind(mode: int) -> str:
    """What a file of this ``st_mode`` is in words, such as ``a named pipe``; an empty text for a regular file."""
    if stat.S_ISREG(mode):
        return ""
    return next((kind for is_kind, kind in FILE_KINDS if is_kind(mode)), "something else")


def nearest(name: str, valid: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The valid name that looks most like ``name``, or None when nothing comes close.

    A dotted name may also be matched by its last part alone (``lr`` finds ``optim.lr``).
    """
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    if close:
        return close[0]
    leaves: dict[str, str] = {}
    for full in names:
        leaves.setdefault(full.rpartition(".")[2], full)
    close = difflib.get_close_matches(name.rpartition(".")[2], list(leaves), n=1, cutoff=max(cutoff, 0.7))
    return leaves[close[0]] if close else None


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` with the nearest valid name, or an empty string."""
    close = nearest(name, valid)
    return f"; did you mean '{close}'?" if close else ""


def exit_code(error: BaseException) -> int:
    """2 when the error says that the request was wrong, else 1.

    Wrong requests are `UsageError` and its kinds, and files that are missing or may not be read. A TypeError,
    ValueError or ImportError of another kind is a fault, whether torch, another package or our own code made it.
    """
    wrong_file = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
    return EXIT_USAGE if isinstance(error, (UsageError, *wrong_file)) else EXIT_FAILURE


LESS_MEMORY_TRAINING = (
    "lower --train.batch_size and raise --train.accumulate by the same factor to keep the global batch, or use "
    "--train.precision=bf16, --train.checkpoint_activations=true, a smaller --views.size, fewer --boxes.per_image or a "
    "smaller --model.backbone"
)
"""Which options of pre-training take less memory."""


def one_line(error: BaseException, less_memory: str = LESS_MEMORY_TRAINING) -> str:
    """The message on one line, with the type in front where the type carries meaning.

    less_memory: for want of memory, which options lower the need.
    """
    if is_out_of_memory(error):
        said = " ".join(str(error).split())[:160] or type(error).__name__
        return f"out of memory ({said}){_memory_limit()}; {less_memory}"
    text = " ".join(str(error).split())
    if exit_code(error) == EXIT_USAGE and not isinstance(error, OSError):
        return text or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


_NO_MEMORY = (
    *("can't allocate memory", "std::bad_alloc", "Cannot allocate memory", "could not allocate memory"),
    "can't start new thread",
)
"""What torch, its libraries, Python and the loader of libraries say in errors of other kinds where memory is short."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error is for want of memory, whatever kind it has: of the machine, a device or ``ulimit``."""
    torch = sys.modules.get("torch")  # an error of torch cannot come from a torch that was never imported
    if torch is not None and isinstance(error, getattr(torch, "OutOfMemoryError", ())):  # none in one half imported
        return True
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if isinstance(error, ImportError):  # a folder whose files may not be executed is told in the same words
        return "failed to map segment" in str(error) and bool(_memory_limit())
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _NO_MEMORY)


def _memory_limit() -> str:
    """The limit of ``ulimit -v``, where there is one: memory may be short on a machine that has plenty."""
    try:
        import resource
    except ImportError:  # Windows
        return ""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return "" if limit == resource.RLIM_INFINITY else f", with ulimit -v at {limit >> 20} MiB"


@dataclass
class Report:
    """Where `friendly_errors` tells of a fault.

    log: a file to which the traceback is appended, once there is one.
    quiet: say nothing, since another process says the same.
    less_memory: which options of the command lower its need of memory.
    """

    log: Path | None = None
    quiet: bool = False
    less_memory: str = LESS_MEMORY_TRAINING


@contextmanager
def friendly_errors(command: str, *, debug: bool = False, less_memory: str = LESS_MEMORY_TRAINING) -> Iterator[Report]:
    """Turn an error inside the block into one line on stderr and an exit code.

    command: shown in front of the line, as in ``scrl_fast.train: ...``.
    debug: print the traceback first.
    less_memory: as of `Report`.
    Yields a `Report`; once its ``log`` is set, the traceback of a fault goes there too.
    Raises SystemExit with code 2 (wrong usage or input) or 1 (anything else); SystemExit itself passes through.
    """
    report = Report(less_memory=less_memory)
    _replace_closed_streams()
    try:
        yield report
    except KeyboardInterrupt:
        tell(f"{command}: interrupted")
        raise SystemExit(EXIT_FAILURE) from None
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _discard_unread():
            raise SystemExit(EXIT_FAILURE) from None  # the reader of our output has ended (`... | head`)
        code = exit_code(error)
        where = "" if debug or code == EXIT_USAGE else _traceback_place(report.log)
        if debug:
            traceback.print_exc()
        if not report.quiet:
            tell(f"{command}: {one_line(error, report.less_memory)}{where}")
        raise SystemExit(code) from None


def tell(line: str) -> None:
    """A line on stderr, as long as something reads it; work goes on without."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr)


def tell_result(line: str) -> None:
    """A line on stdout after the work is done: a reader that has ended (``| head``) changes nothing then.

    Raises OSError where stdout does not take it, such as a file on a full disk; the line is on stderr then.
    """
    try:
        print(line, flush=True)
    except BrokenPipeError:
        if not _discard_unread():
            raise
    except OSError as error:
        tell(line)
        why = f"the work is done, but its result cannot be printed: {error.strerror}"
        raise OSError(error.errno, why, "stdout") from error


def _discard_unread() -> bool:
    """Sends stdout and stderr to nowhere if nothing reads them any more; whether that was so of one.

    Else what is still buffered would be a second error at shutdown.
    """
    lost = False
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # no file behind it
            if _is_unread(stream.fileno()):
                lost = True
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)
    return lost


def _is_unread(file: int) -> bool:
    """Whether the other end of a pipe is closed; where the system cannot tell, it is taken to be."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(file, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _replace_closed_streams() -> None:
    """Puts the null device where a process was started without stdin, stdout or stderr (``2>&-``).

    The next file that is opened would take the place, and get what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the rest of the process


def _traceback_place(log: Path | None) -> str:
    """Append the traceback to the log where there is one; say where it can be seen."""
    if log is not None:
        try:
            with open(log, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(traceback.format_exc())
            return f" (traceback in {log})"
        except OSError:
            pass  # a full disk may be the very fault that is being told
    return " (--debug shows the traceback)"
