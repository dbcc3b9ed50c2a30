"""Which files are being read, written down so that it outlives a crash of the process.

A decoder that segfaults takes Python with it, before anything can be said. So each thread writes the name of its file
into a text file; the system keeps that when the process dies, and the next start names what it finds. The file is not
mapped into memory: when a mapped file is cut, the next note kills the process.
"""

from __future__ import annotations

import os
import threading
import weakref
from contextlib import suppress
from pathlib import Path

from scrl_fast.data.image_files import BadImage, printable, read_file

_LINE = 1024  # bytes for a name and its newline; longer names lose their beginning
_MOST_LEFT = 1 << 20  # bytes that are read of what an earlier process left: a thousand threads' names


class Trace:
    """One line per thread of a text file: what it is reading, or nothing.

    path: made anew, and removed by `close`. threads: at most so many call `note`. `left` are the names that a process
    which never got to `close` was reading. A disk that fails costs the notes, never the run.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int) -> None:
        self._path, self._lock = Path(path), threading.Lock()
        self._lines: dict[int, int] = {}
        self.left = _names_in(self._path)
        self._file = -1
        with suppress(OSError, ValueError):
            # another file, since an earlier process may still write into the old one
            self._path.unlink(missing_ok=True)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o644)
            # closed with this object, not before: a thread that hung would write into whatever got the number next
            weakref.finalize(self, os.close, self._file).atexit = False
            os.pwrite(self._file, (b" " * (_LINE - 1) + b"\n") * threads, 0)

    def note(self, name: str) -> None:
        """The calling thread is reading this; '' for nothing."""
        thread = threading.get_ident()
        if thread not in self._lines:
            with self._lock:
                self._lines[thread] = len(self._lines)
        if self._file >= 0:
            line = printable(name).replace("\n", " ").encode()[1 - _LINE :]
            with suppress(OSError):
                os.pwrite(self._file, line.ljust(_LINE - 1), self._lines[thread] * _LINE)

    def close(self) -> None:
        """Nothing more is read: the file goes, unless it has become another one's."""
        with suppress(OSError):
            if self._file >= 0 and self._path.stat().st_ino == os.fstat(self._file).st_ino:
                self._path.unlink()


def _names_in(path: Path) -> list[str]:
    try:
        text = read_file(str(path), limit=_MOST_LEFT).decode("utf-8", "replace")
    except BadImage:  # there is none, or something else has its name
        return []
    lines = text.split("\n")  # not at whatever else Unicode takes for the end of a line
    return [line.strip(" \0") for line in lines if line.strip(" \0")]
