"""Which files are being read, written down so that it outlives a crash of the process.

A decoder that segfaults takes Python with it, before anything can be said. So each thread notes the name of its file in
a memory-mapped text file; the system keeps that when the process dies, and the next start names what it finds.
"""

from __future__ import annotations

import mmap
import os
import threading
from contextlib import suppress
from pathlib import Path

_LINE = 1024  # bytes for a name and its newline; longer names lose their beginning


class Trace:
    """One line per thread of a text file: what it is reading, or nothing.

    path: made anew, and removed by `close`. threads: at most so many call `note`. `left` are the names that a process
    which never got to `close` was reading.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int) -> None:
        self._path, self._lock = Path(path), threading.Lock()
        self._lines: dict[int, int] = {}
        self.left = self._names()
        blank = (b" " * (_LINE - 1) + b"\n") * threads
        self._map: mmap.mmap | bytearray = bytearray(blank)  # where the disk cannot map files: for nobody to read
        self._inode = -1
        with suppress(OSError, ValueError):
            # another file: were the old one cut, a process that has it mapped would be killed at its next note
            self._path.unlink(missing_ok=True)
            self._path.write_bytes(blank)
            with self._path.open("r+b") as file:
                self._inode = os.fstat(file.fileno()).st_ino
                self._map = mmap.mmap(file.fileno(), len(blank))

    def note(self, name: str) -> None:
        """The calling thread is reading this; '' for nothing."""
        thread = threading.get_ident()
        if thread not in self._lines:
            with self._lock:
                self._lines[thread] = len(self._lines)
        start = self._lines[thread] * _LINE
        if start < len(self._map):
            line = name.replace("\n", " ").encode("utf-8", "replace")[1 - _LINE :]
            self._map[start : start + _LINE - 1] = line.ljust(_LINE - 1)

    def close(self) -> None:
        """Nothing more is read: the file goes, unless it has become another one's."""
        with suppress(OSError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()

    def _names(self) -> list[str]:
        try:
            text = self._path.read_bytes().decode("utf-8", "replace")
        except OSError:
            return []
        lines = text.split("\n")  # not at whatever else Unicode takes for the end of a line
        return [line.strip(" \0") for line in lines if line.strip(" \0")]
