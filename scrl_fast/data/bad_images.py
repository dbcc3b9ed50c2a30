"""What happens to images that cannot be read: counted, named once, and a run stopped when there are too many."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from scrl_fast.data.image_files import BadImage, printable
from scrl_fast.errors import UsageError

IN_A_ROW = 100
_ALWAYS_TOLERATED = 10  # a few bad files are no reason to stop, in however small a folder
_MAX_LISTED = 20
_log = logging.getLogger("scrl_fast")


class TooManyBadImages(UsageError):
    """So many images of an epoch could not be read that the data as a whole must be at fault."""


class BadFiles:
    """The tally of one loader, shared by its threads.

    images: per epoch (of this process). fraction: data.max_bad_fraction; 0 stops at the first bad image, otherwise 10
    (or half of the images, if fewer) are always tolerated. path: bad_files.jsonl, appended to, each file once.
    """

    def __init__(self, images: int, fraction: float, path: str | os.PathLike[str] | None = None) -> None:
        self.errors: dict[str, str] = {}
        self._images, self._path = images, path
        self._allowed = max(int(fraction * images), min(_ALWAYS_TOLERATED, images // 2)) if fraction > 0 else 0
        self._written = _already_in(path)
        self._lock = threading.Lock()
        self._names: dict[int, set[str]] = {}  # by epoch
        self._others: dict[int, set[str]] = {}  # counted before the resume, by other processes
        self._in_a_row = 0

    def good(self) -> None:
        if self._in_a_row:
            self._in_a_row = 0

    def add(self, bad: BadImage, epoch: int, step: int = 0) -> None:
        """Count one failed read, for the step of that number. Raises TooManyBadImages when it is one too many."""
        with self._lock:
            # two epochs at once: batches of the next are begun before the last of this one are done
            self._names = {e: names for e, names in self._names.items() if abs(e - epoch) <= 1}
            names = self._names.setdefault(epoch, set())
            if bad.name not in self._others.get(epoch, ()):
                names.add(bad.name)
            self._in_a_row += 1
            if bad.name not in self.errors:
                self.errors[bad.name] = bad.cause
                self._tell(bad, epoch, step)
            if len(names) > self._allowed:
                raise TooManyBadImages(
                    f"{len(names)} of the {self._images} images of epoch {epoch} cannot be read, more than "
                    f"data.max_bad_fraction allows; the last: {bad}{self._where()}"
                )
            if self._in_a_row >= IN_A_ROW:
                raise TooManyBadImages(
                    f"{IN_A_ROW} images in a row cannot be read; is the disk or network share still there? "
                    f"The last: {bad}{self._where()}"
                )

    def state_dict(self) -> dict[int, list[str]]:
        """The names counted, by epoch: with those of all processes a resumed run stops where this one would have.

        An epoch in which they stopped this run is left out: the images are expected to be mended before the next.
        """
        with self._lock:
            return {epoch: sorted(names) for epoch, names in self._names.items() if 0 < len(names) <= self._allowed}

    def load_state_dict(
        self, states: Sequence[Mapping[int, Sequence[str]]], rank: int = 0, world_size: int = 1
    ) -> None:
        """Go on counting from what `state_dict` gave in each process.

        With as many processes as before, each takes its own names; with more or fewer, an equal share of all. No name
        is then counted again by another process. Of more names than are allowed now, only so many are kept: the next
        bad image stops the run, not those counted before.
        """
        own, others = dict[int, set[str]](), dict[int, set[str]]()
        for epoch in {int(epoch) for state in states for epoch in state}:
            names = sorted({name for state in states for name in state.get(epoch, ())})
            share = sorted(states[rank].get(epoch, ())) if len(states) == world_size else names[rank::world_size]
            own[epoch] = set(share[: self._allowed])
            others[epoch] = set(names) - own[epoch]
        with self._lock:
            self._names, self._others = own, others

    def _where(self) -> str:
        return f" (all of them: {printable(os.fspath(self._path))})" if self._path else ""

    def _tell(self, bad: BadImage, epoch: int, step: int) -> None:
        if len(self.errors) <= _MAX_LISTED:
            _log.warning("skipped an image that cannot be read: %s", bad)
        elif len(self.errors) == _MAX_LISTED + 1:
            _log.warning(
                "more than %d images cannot be read; no more of them are named here%s", _MAX_LISTED, self._where()
            )
        if self._path and bad.name not in self._written:
            self._written.add(bad.name)
            line = json.dumps({"path": bad.name, "error": bad.cause, "epoch": epoch, "step": step})
            try:
                with open(self._path, "a", encoding="utf-8") as file:
                    file.write(line + "\n")
            except OSError as error:  # a full disk costs the list, not the run
                _log.warning("%s cannot be written: %s", printable(os.fspath(self._path)), error.strerror)


def _already_in(path: str | os.PathLike[str] | None) -> set[str]:
    names = set()
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines() if path else []
    except OSError:  # there is none yet
        lines = []
    for line in lines:
        try:
            names.add(json.loads(line)["path"])
        except (ValueError, KeyError, TypeError):  # a line cut off by a crash
            continue
    return names
