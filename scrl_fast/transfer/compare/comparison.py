"""The life of a comparison: checks, rows one after another, the table after each of them."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from scrl_fast import weights
from scrl_fast.atomic_files import write_json, write_text
from scrl_fast.distributed import rendezvous
from scrl_fast.distributed.rendezvous import announced_size
from scrl_fast.distributed.world import World
from scrl_fast.errors import EXIT_FAILURE, UsageError, one_line, tell, tell_result
from scrl_fast.run.lock import hold_folder, release_folder
from scrl_fast.run.log import LogFile, format_seconds
from scrl_fast.run.precision import Precision
from scrl_fast.run.signals import SignalHandler
from scrl_fast.run.start_tables import percent
from scrl_fast.transfer.checks import check_batch_size
from scrl_fast.transfer.commands import LESS_MEMORY_TRAINING
from scrl_fast.transfer.compare.config import LABELLED, CompareConfig
from scrl_fast.transfer.compare.leaks import LeakCheck, Sharing, in_short, in_words
from scrl_fast.transfer.compare.plot import draw_comparison
from scrl_fast.transfer.compare.rows import (
    Row,
    RowFiles,
    digest_of_labels,
    fitted_to,
    options_of,
    rows_of,
    values_of,
)
from scrl_fast.transfer.compare.table import Results, markdown, seen_line, summary_of
from scrl_fast.transfer.compare.timed import TIMED_STEPS, Deadline, RowTimes, TimedTransfer
from scrl_fast.transfer.config import TransferConfig
from scrl_fast.transfer.custom import read_custom
from scrl_fast.transfer.dataset import read_split, trainable


class Comparison:
    """Runs a `CompareConfig`. folder: ``compare.dir``.

    After construction nothing is trained yet, and what can be refused is: a UsageError names the option.
    """

    log: LogFile  # open while `run` runs

    def __init__(self, config: CompareConfig) -> None:
        config.check_ready()
        if announced_size() > 1:
            raise UsageError(
                "compare trains its rows one after another in one process: start it without torchrun. The command of "
                "one row, in rows/*.json, takes several"
            )
        self.config, self.deadline = config, Deadline(config.minutes)
        self.folder = Path(config.compare.dir or f"runs/compare-{config.task}").absolute()
        self.rows = rows_of(config)
        self.results = Results(self.rows)
        self.found: list[str] = []
        self.train, self.val, self.val_name = self.read_data()
        self.measured = min(config.eval.images or len(self.val), len(self.val))
        self.files = RowFiles(
            self.folder, config.inits, {"train": digest_of_labels(self.train), "val": digest_of_labels(self.val)}
        )
        self.precision = Precision(config.train.precision, rendezvous.device_of(config.train.device), World())
        self.options = self.read_options()
        for row in self.rows:
            if (result := self.files.read(row, self.options[row.name], self.precision)) is not None:
                self.results.values[row.name] = self.values(row, result)
        self.seen: dict[str, Sharing] = {}
        self.times = RowTimes()

    def read_data(self) -> tuple[Any, Any, str]:
        """Images to train on, images to measure on, and what the latter are called; read once for all rows."""
        config = self.config.transfer_options()
        if config.task == "custom":
            data = read_custom(config)
            self.found = data.found
            return data.train, data.val, data.val_name
        return read_split(config, config.data.train), read_split(config, config.data.val), config.data.val

    def read_options(self) -> dict[str, TransferConfig]:
        """The options of each row by its name. Raises UsageError where a share does not fill a batch."""
        model, options = self.config.model.detector, {}
        precision = self.files.kept_precision(self.precision)
        needed = {"masks": model == "mask_rcnn", "keypoints": model == "keypoint_rcnn"}
        images: dict[tuple[float, int], int] = {}
        for row in self.rows:
            asked, key = options_of(row, self.config, self.folder), (row.share, row.seed)
            if key not in images:
                images[key] = len(trainable(self.train, asked.data, **needed))
            asked = replace(asked, train=replace(asked.train, precision=precision))
            options[row.name] = fitted = fitted_to(asked, images[key])
            try:
                check_batch_size(fitted.train.batch_size, images[key], 1)
            except UsageError as error:
                raise UsageError(f"shares={row.share:g}, seed {row.seed}: {error}") from None
        return options

    # ---- the whole ----

    def run(self) -> int:
        """Trains what is open, prints the table, and returns the exit code: 1 where a row failed."""
        self.make_folder()
        lock = hold_folder(self.folder, option="compare.dir")
        try:
            with closing(LogFile(self.folder)) as self.log:
                with SignalHandler() as stop:
                    self.say_plan()
                    self.check_starts()
                    if self.look_for_leaks(stop):
                        self.run_rows(stop)
                self.write()
                tell_result(self.table().rstrip("\n"))
                for line in self.last_words():
                    self.say(line)
        finally:
            release_folder(lock)
        return EXIT_FAILURE if self.results.failed else 0

    def make_folder(self) -> None:
        try:
            (self.folder / "rows").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"compare.dir {str(self.folder)!r} cannot be written to: {error.strerror}") from error

    def run_rows(self, stop: SignalHandler) -> None:
        """The open rows in their order, until the end, a signal or the deadline."""
        for row in self.results.open:
            self.deadline.check(stop)
            if stop:
                return
            number = self.rows.index(row) + 1
            self.say(f"row {number} of {len(self.rows)}: {row.describe()}")
            if not self.run_row(row):
                return
            self.write()
            if self.results.open:
                self.say(f"{self.progress()}{self.time_left()}")

    def run_row(self, row: Row) -> bool:
        """One row; False where a signal or the deadline ended it. A row that fails is noted, and the others go on."""
        config, started = self.options[row.name], time.monotonic()
        try:
            self.files.write(row, config)
            transfer = self.transfer(config)

            begun = transfer.loop.found.path is None
            summary = transfer.fit()
        except Exception as error:
            self.note_failure(row, error)
            return True
        if "result" not in summary:
            return False
        self.files.write(row, config, summary["result"])
        self.results.values[row.name] = self.values(row, summary["result"])
        if not self.config.compare.keep_detectors:
            for path in transfer.loop.checkpoints.folder.glob("*.pt*"):
                path.unlink()
        if begun and self.times.step is not None:
            self.times.overhead = 0.0
            spent = time.monotonic() - started
            self.times.overhead = max(0.0, spent - self.times.row(config.train.last_step, self.measured))
        return True

    def transfer(self, config: TransferConfig) -> TimedTransfer:
        """The training of a row, which goes on from its newest checkpoint where it has one."""
        begun = Path(config.run.dir).exists()
        return TimedTransfer(
            replace(config, resume="auto" if begun else ""),
            train=self.train,
            val=self.val,
            val_name=self.val_name,
            deadline=self.deadline,
            times=self.times,
            on_times=lambda: self.say(f"measured here: {self.times.step:.3g}s a step{self.first_estimate()}"),
        )

    def note_failure(self, row: Row, error: Exception) -> None:
        self.log.note("".join(traceback.format_exception(error)).rstrip())
        said = self.results.failed[row.name] = one_line(error, LESS_MEMORY_TRAINING)
        self.say(f"failed: {row.describe()}: {said} (traceback in {self.log.path})")

    def values(self, row: Row, result: dict[str, float]) -> dict[str, Any]:
        return values_of(row, self.config.task, result) | {"command": self.files.command(row, self.options[row.name])}

    # ---- validation images that were seen before ----

    def look_for_leaks(self, stop: SignalHandler) -> bool:
        """Fills ``seen``; False where a signal or the deadline ended it."""
        if self.config.compare.leaks == "off":
            return True
        check = LeakCheck(
            self.val,
            self.measured,
            self.config.compare,
            workers=self.config.data.workers,
            say=self.say,
            tick=lambda: self.deadline.check(stop),
            file=self.folder / "seen.json",
        )
        starts = dict(zip(self.config.inits, self.results.labels, strict=True))
        work = {label: partial(check.of_start, init) for init, label in starts.items()}
        work[LABELLED] = partial(check.of_labelled, self.train)
        for name, look in work.items():
            found = stop.run_interruptible(look)
            if found is None:
                return False
            self.seen[name] = found
            if found.exact + found.alike:
                self.say(seen_line(name, in_words(found, self.measured, self.config.compare)))
        return True

    def seen_in_words(self) -> dict[str, tuple[str, str]]:
        """Of each start and the labelled images, what they share with the validation images: short, and in words."""
        off = "compare.leaks=off" if self.config.compare.leaks == "off" else "stopped before"
        said = dict.fromkeys((*self.results.labels, LABELLED), ("not checked", f"not checked: {off}"))
        for name, found in self.seen.items():
            said[name] = in_short(found, self.measured), in_words(found, self.measured, self.config.compare)
        return said

    # ---- what is said and written ----

    def say(self, line: str) -> None:
        """A line on stderr and in log.txt."""
        tell(line)
        self.log.note(line)

    def say_plan(self) -> None:
        labels, shares = self.results.labels, ", ".join(map(percent, self.results.shares))
        rows, config = len(self.rows), self.config
        for line in self.found:
            self.say(line)
        steps = sorted({options.train.last_step for options in self.options.values()})
        starts = f"{len(labels)} start{'s' * (len(labels) > 1)} ({', '.join(labels)})"
        seeds = f"{config.seeds} seed{'s' * (config.seeds > 1)}"
        length = f"{' or '.join(map(str, steps))} steps each, measured on {self.measured} images"
        self.say(f"compare {config.task}: {rows} rows: {starts} x {shares} of the labels x {seeds}, {length}")
        if len(self.results.open) < rows:
            self.say(f"{self.progress()} in {self.folder}, which goes on")
        if self.results.open:
            row = self.results.open[0]
            first = f"first all starts with {percent(row.share)} of the labels and seed {row.seed}"
            self.say(f"{first}; how long the whole takes is said after {TIMED_STEPS} steps of the first row")

    def check_starts(self) -> None:
        """Says before the first row which starts were trained on images normalised otherwise, or cannot be read.

        After the first row the options cannot change any more. Raises UsageError for weights that do not fill the
        backbone: their rows would all fail.
        """
        model, misfits = self.config.model, []
        for init, label in zip(self.config.inits, self.results.labels, strict=True):
            if init == weights.RANDOM or not any(row.init == init for row in self.results.open):
                continue
            try:
                source = weights.read_initial(init, model.backbone)
            except UsageError as error:
                self.say(f"{label}: its rows will fail: {error}")
                continue
            try:
                weights.check_fit(source, model.backbone, model.branch)
            except weights.WeightsError as error:
                misfits.append(f"{label}: {error}")
            except UsageError as error:  # of the backbone itself
                self.say(f"{label}: its rows will fail: {error}")
            for note in weights.normalization_notes(source, {"mean": model.mean, "std": model.std}, "model"):
                self.say(f"{label}: {note}")
        if misfits:
            raise UsageError(
                f"inits: weights that do not fill model.backbone={model.backbone}, model.branch={model.branch}: "
                + "; ".join(misfits)
            )

    def progress(self) -> str:
        return f"{len(self.results.values)} of {len(self.rows)} rows are finished"

    def seconds_left(self, rows: list[Row]) -> float:
        return sum(self.times.row(self.options[row.name].train.last_step, self.measured) for row in rows)

    def first_estimate(self) -> str:
        """What the open rows take, for the first estimate."""
        left, first = self.results.open, self.results.open[0]
        block = [row for row in left if (row.share, row.seed) == (first.share, first.seed)]
        text = (
            f" and {self.times.image:.3g}s a measured image: about {format_seconds(self.seconds_left(left[:1]))} "
            f"a row, {format_seconds(self.seconds_left(left))} for all {len(left)} that are open; all starts with "
            f"{percent(first.share)} of the labels and seed {first.seed} in {format_seconds(self.seconds_left(block))}"
        )
        seconds = self.deadline.left()
        if seconds is not None and seconds < self.seconds_left(left):
            fit = sum(self.seconds_left(left[: n + 1]) <= seconds for n in range(len(left)))
            text += f"; --minutes={self.deadline.minutes:g} are enough for about {fit} of them"
        return text

    def time_left(self) -> str:
        """What the open rows take, between two rows; nothing before a pace is known."""
        return (
            f", the others take about {format_seconds(self.seconds_left(self.results.open))}" if self.times.step else ""
        )

    def title(self) -> str:
        return f"{self.config.task}: {self.config.model.detector} with {self.config.model.backbone}"

    def table(self) -> str:
        alone = (
            f"One row alone, to the same numbers: {self.files.command(self.rows[0], self.options[self.rows[0].name])}"
        )
        return markdown(self.title(), self.results, self.seen_in_words(), [alone])

    def write(self) -> None:
        """table.md, compare.json, compare.png, and the file of ``--json``."""
        document = {
            "task": self.config.task,
            "rows": [self.results.values[row.name] for row in self.rows if row.name in self.results.values],
            "table": summary_of(self.results),
            "failed": self.results.failed,
            "open": [row.name for row in self.results.open],
            "seen": {name: vars(found) for name, found in self.seen.items()},
            "config": json.loads(json.dumps(self.config.to_dict())),
        }
        write_text(self.folder / "table.md", self.table())
        for path in filter(None, (str(self.folder / "compare.json"), self.config.json)):
            write_json(path, document)
        self.optional(lambda: draw_comparison(self.folder / "compare.png", self.results, self.title()))

    def optional(self, draw: Callable[[], None]) -> None:
        """The picture, where matplotlib draws one: no comparison ends for want of it."""
        try:
            draw()
        except Exception as error:
            self.say(f"no compare.png: matplotlib fails or is not installed: {one_line(error)}")

    def last_words(self) -> list[str]:
        lines = [f"table, rows and picture: {self.folder}"]
        if self.results.open:
            lines.append(f"{self.progress()}; the same command goes on with the {len(self.results.open)} others")
        if self.results.failed:
            lines.append(f"rows that failed: {len(self.results.failed)}; the same command tries them again")
        return lines
