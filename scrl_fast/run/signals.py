"""Ctrl-C, SIGTERM and their like as a request that the loop reads, not as an exception in the middle of a step."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

from scrl_fast.errors import tell

T = TypeVar("T")
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP", "SIGXCPU")  # the last four are not known everywhere
STOP_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
HANGUP = getattr(signal, "SIGHUP", None)
SIGNAL_OF_PEER = "a signal to another process"
"""In place of a signal's name."""


def _tell_terminal(line: str) -> None:
    """Who pressed Ctrl-C sees at once that it was heard. Not by print: the handler may come in the middle of one."""
    with suppress(OSError, ValueError, AttributeError):  # no terminal any more, or none ever
        if sys.stderr.isatty():
            os.write(sys.stderr.fileno(), f"\n{line}\n".encode())


class SignalHandler:
    """Whether the run is to stop, and the ``reason``: while active, signals that ask for it set it and end nothing.

    They are SIGINT, SIGTERM, SIGUSR1 (some schedulers' warning), SIGHUP (a lost session; one that is ignored, as under
    nohup, stays so) and SIGXCPU (a limit of processor time).
    A second SIGINT raises KeyboardInterrupt at once, without waiting for the step. Inside `interruptible` any of them
    ends the block. Outside the main thread, where Python allows no handlers, nothing is installed.
    """

    def __init__(self) -> None:
        self.reason = ""  # the signal's name, or what `request_stop` was told
        self.previous: dict[int, Any] = {}
        self.immediate = False

    def __bool__(self) -> bool:
        return bool(self.reason)

    def __enter__(self) -> SignalHandler:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if not (number == HANGUP and signal.getsignal(number) == signal.SIG_IGN):
                    self.previous[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        impatient = bool(self.reason) and number == signal.SIGINT
        if number == signal.SIGINT and not impatient and not self.immediate:
            _tell_terminal("SIGINT: the run stops after this step; once more ends it at once, without saving")
        self.reason = signal.Signals(number).name
        self.request_stop(self.reason)
        if impatient:
            raise KeyboardInterrupt

    def request_stop(self, reason: str) -> None:
        """Stops the run as a signal does, `interruptible` work at once; a reason that is there already stays."""
        self.reason = self.reason or reason
        if self.immediate:
            self.immediate = False  # once: what handles this exception must not be interrupted
            raise KeyboardInterrupt

    def stop_message(self, step: int) -> str:
        """The line after a stop behind this step, which is saved; the command that resumes follows it."""
        if step == 0:
            return f"{self.reason}: stopped before the first step, so there is nothing to save. To start again:"
        return f"{self.reason}: stopped after step {step}, everything is saved. To continue:"

    def run_interruptible(self, work: Callable[[], T]) -> T | None:
        """What ``work`` returns; None when a signal ended it, or came before it: then it is not even begun."""
        try:
            with self.interruptible():
                if not self.reason:  # looked at inside, so that no signal slips in between
                    return work()
        except KeyboardInterrupt:  # that came between the end of the block and its exit
            if not self.reason:
                raise
        return None

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """For work that need not be finished, such as an evaluation: a signal leaves the block there and then."""
        self.immediate = True
        try:
            yield
        except KeyboardInterrupt:
            if not self.reason:  # it was not ours
                raise
        finally:
            self.immediate = False


EXPORT_ENDED = "ended before the export was done; no file is half written"
"""`kept` of `ending_cleanly` for the commands that export."""


class _Ended(BaseException):
    """A signal that ends a command; no Exception, so that nothing on the way takes it for a fault of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def ending_cleanly(command: str, kept: str) -> Iterator[None]:
    """For a command that cannot be resumed: SIGTERM, SIGHUP and their like end the block as an error does.

    Unfinished files are removed on the way, a line names the signal, and the exit code is 128 and the signal's number,
    as of a process that a signal ends. A second signal ends the process at once. SIGINT stays KeyboardInterrupt.
    command: in front of the line. kept: what is left behind, the end of the line.
    Outside the main thread, where Python allows no handlers, nothing is installed.
    """

    def end(number: int, frame: FrameType | None) -> None:
        for each in previous:
            signal.signal(each, signal.SIG_DFL)
        raise _Ended(number)

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if number != signal.SIGINT and signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
                previous[number] = signal.signal(number, end)
    try:
        yield
    except _Ended as ended:
        tell(f"{command}: {signal.Signals(ended.number).name}: {kept}")
        raise SystemExit(128 + ended.number) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
