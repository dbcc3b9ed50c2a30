"""What a run reports while it goes: log.txt, the progress line, rows of metrics, TensorBoard and W&B."""

from __future__ import annotations

import functools
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, TypeVar

from scrl_fast.atomic_files import naming
from scrl_fast.config.run_folder import LOG, METRICS
from scrl_fast.run.metrics_file import MetricsFile
from scrl_fast.run.terminal import Terminal
from scrl_fast.run.trackers import TensorBoard, Tracker, WeightsAndBiases, check_wandb

LOGGER = logging.getLogger("scrl_fast")
SLOW_START = 3.0  # seconds after which a first step that is not done yet is told of
OUTPUTS = {"tensorboard": "event files", "wandb": "W&B"}
R = TypeVar("R")
RowHook = Callable[[dict[str, Any]], object]
"""Takes a row of numbers; a true answer asks the run to stop."""


class Clock:
    """Throughput between two logging points, and the share of the time that was spent waiting for data."""

    def __init__(self) -> None:
        self.images = self.steps = 0  # since the last reading
        self.waited, self.seconds = 0.0, 0.0
        self.start = time.perf_counter()

    def add_step(self, images: int) -> None:
        """Counts one step of so many images."""
        self.images += images
        self.steps += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside the block as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """``{images_per_s, data_wait}`` since the last call, and starts over; ``seconds`` keeps the time between."""
        now = time.perf_counter()
        self.seconds = max(now - self.start, 1e-9)
        result = {"images_per_s": self.images / self.seconds, "data_wait": self.waited / self.seconds}
        self.images, self.steps, self.waited, self.start = 0, 0, 0.0, now
        return result


class LogHandler(logging.Handler):
    """Takes what the package's modules log (an image that cannot be read) to where the run is reported."""

    def __init__(self, log: RunLog) -> None:
        super().__init__(logging.INFO)
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "noted", False):  # the run's own message, on its way to the program's handlers
            return
        if self.log.as_library:  # the program's handlers have it already
            self.log.note(record.getMessage())
        else:
            self.log.say(record.getMessage())


class LogFile:
    """log.txt of a folder, whose lines begin with the time; it goes on where there is one."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG
        # names and messages may hold bytes that are no UTF-8
        self.file = open(self.path, "a", encoding="utf-8", errors="backslashreplace", buffering=1)  # noqa: SIM115

    def note(self, message: str) -> None:
        """Adds one message."""
        with naming(self.path):
            self.file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    def close(self) -> None:
        self.file.close()


class RunLog:
    """Everything a run reports goes through here: `say` for sentences, `metrics` for numbers, `tick` once a step.

    folder: an existing run folder. total_steps: for the progress and the ETA. step: updates already made; rows of
    later steps in metrics.jsonl are dropped. active: False for every process but the first, which then writes nothing.
    Raises UsageError when ``run.wandb`` is set and wandb is missing. What else goes wrong with TensorBoard, W&B or the
    terminal is said once and costs no step.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        step: int = 0,
        tensorboard: bool = True,
        wandb: str = "",
        settings: Mapping[str, Any] | None = None,
        active: bool = True,
        stream: TextIO | None = None,
        as_library: bool = False,
        progress: bool = True,
    ) -> None:
        self.folder, self.total_steps, self.active = folder, total_steps, active
        self.as_library = as_library
        self.said: set[str] = set()
        self.trackers: dict[str, Tracker] = {}
        self.handler = LogHandler(self)
        if not active:
            return
        if wandb:
            check_wandb(wandb)
        notebook = as_library and "ipykernel" in sys.modules
        shown = (stream or sys.stderr) if progress else None
        self.terminal = Terminal(shown, total=total_steps, done=step, notebook=notebook)
        self.text = LogFile(folder)
        LOGGER.addHandler(self.handler)
        self.rows = MetricsFile(folder / METRICS, step)
        if self.rows.skipped:
            self.say(f"{METRICS}: {self.rows.skipped} lines hold no row of numbers and were left out")
        if tensorboard:
            self.open_tracker("tensorboard", lambda: TensorBoard(folder, step))
        if wandb:
            self.open_tracker("wandb", lambda: WeightsAndBiases(wandb, folder, settings))

    def open_tracker(self, package: str, make: Callable[[], Tracker]) -> None:
        """Adds the tracker that a package makes."""
        tracker = self.optional(OUTPUTS[package], package, make)
        if tracker is not None:
            self.trackers[package] = tracker

    def track(self, row: Mapping[str, Any]) -> None:
        """Hands the numbers of a row to the trackers; one that fails gets no more."""
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
        for package, tracker in list(self.trackers.items()):
            log = functools.partial(tracker.log, numbers, row["step"])
            if self.optional(f"more {OUTPUTS[package]}", package, log) is None:
                del self.trackers[package]

    def optional(self, what: str, package: str, action: Callable[[], R]) -> R | None:
        """What ``action`` returns; where it fails, one line says so, since no run ends for want of ``what``."""
        try:
            return action()
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == package:
                # run.tensorboard is true unless it is turned off: nobody has asked for it, and the terminal stays quiet
                tell = self.note if package == "tensorboard" else self.say_once
                tell(f"{package} is not installed: no {what} (pip install {package} brings it)")
            else:
                self.say_once(f"no {what}: {package} does not load: {error}")
        except Exception as error:
            self.say_once(f"no {what}: {package} fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return None

    def say(self, message: str) -> None:
        """One message to the terminal and to log.txt."""
        if not self.active:
            return
        message = message.encode("utf-8", "backslashreplace").decode()
        self.note(message)
        if self.as_library:
            LOGGER.info("%s", message, extra={"noted": True})
            return
        self.terminal.write(message)
        if lost := self.terminal.take_lost():
            self.note(f"nothing reads stderr any more ({lost}): what is said stands here alone")

    def note(self, message: str) -> None:
        """One message to log.txt alone."""
        self.text.note(message)

    def say_once(self, message: str) -> None:
        """`say`, but only the first time that this message comes."""
        if message not in self.said:
            self.said.add(message)
            self.say(message)

    def metrics(self, row: Mapping[str, Any], *, seconds_per_step: float = 0.0) -> None:
        """One row of numbers with at least ``step``: to metrics.jsonl, the progress line and the trackers."""
        if not self.active:
            return
        self.rows.write(row)
        self.track(row)
        if "loss" not in row:
            return
        line = progress_line(row)
        left = format_seconds(seconds_per_step * (self.total_steps - row["step"]))
        if self.terminal.bar is not None:
            self.terminal.show(line)
            self.note(f"step {row['step']}  {line}")
        else:
            self.say(f"step {row['step']}/{self.total_steps}  {line}  ETA {left}")

    def amend(self, extra: Mapping[str, Any]) -> None:
        """Adds results that came after the last step to its row in metrics.jsonl, so that each step has one row."""
        if self.active and extra:
            self.rows.amend(extra)

    @contextmanager
    def slow_start(self, step: int) -> Iterator[Callable[[], None]]:
        """Says that the first step is on where it takes seconds; what it yields is to be called after that step.

        Before it nothing else tells a slow start from a run that hangs.
        """
        words = f"step {step} of {self.total_steps} is being made: the first one takes longest"

        def tell() -> None:
            with suppress(OSError, ValueError):  # a full disk, which the row of this step will meet, or a closed log
                self.say(words)

        timer = threading.Timer(SLOW_START, tell)
        timer.daemon = True
        timer.start()
        try:
            yield timer.cancel
        finally:
            timer.cancel()

    def tick(self) -> None:
        """One step is done."""
        if self.active:
            self.terminal.advance()

    def end_progress(self) -> None:
        """Ends the bar: what is said from here on comes below it."""
        if self.active:
            self.terminal.end_progress()

    def close(self) -> None:
        """Ends the bar and closes files and trackers; safe to call twice."""
        if not self.active:
            return
        self.end_progress()
        for package, tracker in self.trackers.items():
            self.optional(OUTPUTS[package], package, tracker.close)
        self.active = False
        LOGGER.removeHandler(self.handler)
        self.rows.close()
        self.text.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def progress_line(row: Mapping[str, Any]) -> str:
    """The numbers a person wants to see pass by."""
    parts = [f"epoch {row['epoch']:.2f}", f"loss {row['loss']:.4f}"]
    rate = row["images_per_s"]
    parts.append(f"{rate:.{0 if rate >= 10 else 1}f} images/s" if rate else "- images/s")
    parts.append(f"data wait {row['data_wait']:.0%}")
    if "feature_std" in row:  # pre-training alone has these
        parts += [f"std {row['feature_std']:.4f}", f"rank {row['rankme']:.1f}"]
    if row.get("probe_accuracy") is not None:
        parts.append(f"probe {row['probe_accuracy']:.1%}")
    return "  ".join(parts)


def format_seconds(seconds: float) -> str:
    """Seconds as people read them: 42s, 3m05s, 7h12m, 3d04h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
