"""What a run reports while it goes: log.txt, the progress line, rows of metrics, TensorBoard and W&B."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from scrl_fast.errors import UsageError
from scrl_fast.run.metrics_file import json_line, keep_metrics_until, read_metrics, replace_metrics
from scrl_fast.run.paths import LOG, METRICS

LOGGER = logging.getLogger("scrl_fast")


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
        self.log.say(record.getMessage())


class RunLog:
    """Everything a run reports goes through here: `say` for sentences, `metrics` for numbers, `tick` once a step.

    folder: an existing run folder. total_steps: for the progress and the ETA. step: updates already made; rows of
    later steps in metrics.jsonl are dropped. active: False for every process but the first, which then writes nothing.
    Raises UsageError when ``run.wandb`` is set and wandb is missing.
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
    ) -> None:
        self.folder, self.total_steps, self.active = folder, total_steps, active
        self.stream = stream or sys.stderr
        self.bar = self.events = self.tracker = None
        self.said: set[str] = set()
        self.handler = LogHandler(self)
        if not active:
            return
        self.tracker = open_wandb(wandb, folder, settings) if wandb else None
        self.text = open(folder / LOG, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by close()
        LOGGER.addHandler(self.handler)
        keep_metrics_until(folder / METRICS, step)
        self.rows = open(folder / METRICS, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        if is_terminal(self.stream):  # into a file tqdm writes ten lines a second; log lines serve better there
            from tqdm import tqdm

            self.bar = tqdm(total=total_steps, initial=step, file=self.stream, unit="step", dynamic_ncols=True)
        if tensorboard:
            self.events = open_tensorboard(folder, purge_step=step + 1)
            if self.events is None:
                self.say("tensorboard is not installed: no event files (pip install tensorboard brings them)")

    def say(self, message: str) -> None:
        """One message to the terminal and to log.txt."""
        if not self.active:
            return
        self.text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")
        if self.bar is not None:
            self.bar.write(message, file=self.stream)
        else:
            print(message, file=self.stream, flush=True)

    def metrics(self, row: Mapping[str, Any], *, seconds_per_step: float = 0.0) -> None:
        """One row of numbers with at least ``step``: to metrics.jsonl, the progress line and the trackers."""
        if not self.active:
            return
        self.rows.write(json_line(row))
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
        for name, value in numbers.items():
            if self.events is not None:
                self.events.add_scalar(name, value, row["step"])
        if self.tracker is not None:
            self.tracker.log(numbers, step=row["step"])
        if "loss" not in row:
            return
        line = progress_line(row)
        left = format_seconds(seconds_per_step * (self.total_steps - row["step"]))
        if self.bar is not None:
            self.bar.set_postfix_str(line)
            self.text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} step {row['step']}  {line}\n")
        else:
            self.say(f"step {row['step']}/{self.total_steps}  {line}  ETA {left}")

    def say_once(self, message: str) -> None:
        """`say`, but only the first time that this message comes."""
        if message not in self.said:
            self.said.add(message)
            self.say(message)

    def amend(self, extra: Mapping[str, Any]) -> None:
        """Adds results that came after the last step to its row in metrics.jsonl, so that each step has one row."""
        rows = read_metrics(self.folder / METRICS) if self.active else []
        if rows:
            rows[-1] |= extra
            self.rows.close()
            replace_metrics(self.folder / METRICS, rows)
            self.rows = open(self.folder / METRICS, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def tick(self) -> None:
        """One step is done."""
        if self.bar is not None:
            self.bar.update(1)

    def end_progress(self) -> None:
        """Ends the bar: what is said from here on comes below it."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def close(self) -> None:
        """Ends the bar and closes files and trackers; safe to call twice."""
        if not self.active:
            return
        self.end_progress()
        self.active = False
        LOGGER.removeHandler(self.handler)
        for output in (self.events, self.rows, self.text):
            if output is not None:
                output.close()
        if self.tracker is not None:
            self.tracker.finish()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_terminal(stream: TextIO) -> bool:
    """Whether a progress bar can be drawn: on a terminal, unless it says that it has no columns."""
    if not stream.isatty():
        return False
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):  # no file behind the stream
        return True


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


def open_tensorboard(folder: Path, purge_step: int) -> Any | None:
    """A TensorBoard writer into the run folder, or None where it is not installed. Its import takes 0.8 s."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=purge_step)


def import_wandb(project: str) -> Any:
    """The module. Raises UsageError where it is missing."""
    try:
        import wandb
    except ImportError as error:
        raise UsageError(f"run.wandb is {project!r}, but wandb is not installed: pip install wandb") from error
    return wandb


def open_wandb(project: str, folder: Path, settings: Mapping[str, Any] | None) -> Any:
    """A W&B run named after the run folder; the same folder continues the same run."""
    wandb = import_wandb(project)
    name = folder.resolve().name
    return wandb.init(project=project, name=name, id=name, dir=str(folder), config=dict(settings or {}), resume="allow")
