"""Lines and a progress bar on stderr, for as long as something reads them."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm


class Terminal:
    """A stream for lines, with a progress bar where it is a terminal.

    A stream that goes away (a lost session, a pipe whose reader has ended) ends nothing: log.txt holds the same lines.
    stream: None where the process has none. total, done: steps of the bar. unit: what a step is called there.
    notebook: the bar is one of a notebook. Any thread may call the methods.
    """

    def __init__(
        self, stream: TextIO | None, *, total: int, done: int, unit: str = "step", notebook: bool = False
    ) -> None:
        self.stream, self.unit = stream, unit
        self.bar: Any = None
        self._lock = threading.RLock()  # a signal may come, and say a line, while its own thread writes
        self.lost = ""
        """Why nothing is written any more."""
        if stream is not None and notebook:
            self._try(lambda: self._open_notebook_bar(total, done))
        elif stream is not None and self._try(lambda: is_terminal(stream)):
            # into a file tqdm writes ten lines a second; log lines serve better there
            self._try(lambda: self._open_bar(total, done))

    def _open_bar(self, total: int, done: int) -> None:
        self.bar = tqdm(total=total, initial=done, file=self.stream, unit=self.unit, dynamic_ncols=True)

    def _open_notebook_bar(self, total: int, done: int) -> None:
        from tqdm.auto import tqdm as notebook_bar  # a widget where ipywidgets is installed

        self.bar = notebook_bar(total=total, initial=done, unit=self.unit)

    def write(self, line: str) -> None:
        """One line, above the bar."""
        with self._lock:
            if self.bar is not None:
                self._try(lambda: self.bar.write(line, file=self.stream))
            elif self.stream is not None:
                self._try(lambda: print(line, file=self.stream, flush=True))

    def advance(self, steps: int = 1) -> None:
        """So many steps are done."""
        with self._lock:
            if self.bar is not None:
                self._try(lambda: self.bar.update(steps))

    def show(self, numbers: str) -> None:
        """Numbers behind the bar."""
        with self._lock:
            if self.bar is not None:
                self._try(lambda: self.bar.set_postfix_str(numbers))

    def end_progress(self) -> None:
        """Ends the bar: lines from here on come below it."""
        with self._lock:
            if self.bar is not None:
                self._try(self.bar.close)
                self.bar = None

    def take_lost(self) -> str:
        """`lost`, which is told to one caller alone."""
        with self._lock:
            lost, self.lost = self.lost, ""
        return lost

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self._lose(error)
            return None

    def _lose(self, error: Exception) -> None:
        self.lost = str(error) or type(error).__name__
        stream, self.stream = self.stream, None
        if self.bar is not None:
            self.bar.disable = True  # else it would write again when it is deleted
            self.bar = None
        if stream is sys.stderr:
            discard_stderr()


def discard_stderr() -> None:
    """Sends what is still written to stderr, by Python or by libraries, to nowhere."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stderr.fileno())
        os.close(null)
    except (OSError, ValueError, AttributeError):  # no file behind it
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the rest of the process


def is_terminal(stream: TextIO) -> bool:
    """Whether a progress bar can be drawn: on a terminal, unless it says that it has no columns."""
    if not stream.isatty():
        return False
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):  # no file behind the stream
        return True
