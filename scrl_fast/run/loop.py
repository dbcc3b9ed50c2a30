"""The life of a run, the same for every trainer: steps, signals, agreement between processes, saving, last words.

A trainer supplies batches, steps, log rows and state as a `scrl_fast.run.task.TrainingTask`. The loop knows no error of
the data and no model by name.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import torch

from scrl_fast._version import __version__
from scrl_fast.atomic_files import write_text
from scrl_fast.config.files import under_present_names
from scrl_fast.config.run_folder import CHECKPOINTS, CONFIG, CURVES, ENVIRONMENT, LAST, METRICS
from scrl_fast.config.yaml_text import dump
from scrl_fast.distributed.rendezvous import launcher
from scrl_fast.distributed.world import PeerFailed
from scrl_fast.errors import UsageError, is_out_of_memory
from scrl_fast.run import plots
from scrl_fast.run.checkpoint import CheckpointError, CheckpointManager
from scrl_fast.run.lock import FolderLock, RunFolderLost, hold_folder, release_folder
from scrl_fast.run.log import Clock, RowHook, RunLog
from scrl_fast.run.metrics_file import read_metrics
from scrl_fast.run.resume import Found, changed_data, changed_options, find_checkpoint, read_checkpoint
from scrl_fast.run.signals import SIGNAL_OF_PEER, SignalHandler
from scrl_fast.run.task import TrainingTask

ON_ROW = "on_row"  # why a run stopped, where no signal did
CURVES_EVERY = 600.0  # seconds between redrawings of curves.png
T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")


class TrainingLoop(Generic[T]):
    """Owns step, signals, agreement between processes, saving, logging and the last words of one run.

    task: its trainer, whose config names the run folder. write_environment: writes env.json to a path.
    """

    log: RunLog  # open while `run` runs

    def __init__(self, task: TrainingTask[T], *, write_environment: Callable[[Path], None]) -> None:
        self.task, self.world, self.write_environment = task, task.world, write_environment
        run = task.config.run
        self.folder = Path(run.dir).absolute()  # the process may change its working directory
        self.checkpoints = CheckpointManager(self.folder / CHECKPOINTS, keep=run.keep)
        self.found: Found = self.world.broadcast_from_rank0(
            lambda: find_checkpoint(task.config.resume, self.checkpoints)
        )
        self.lock: FolderLock | None = None
        self.step = self.saved = 0  # updates made so far, and at the last checkpoint
        self.stop = SignalHandler()
        self.stopped_together = False  # all processes know of a signal to one of them
        self.clock = Clock()
        self.drawn = time.monotonic()  # when curves.png was drawn last
        self.last_row: dict[str, Any] = {}
        self.on_row: RowHook | None = None
        self.says_how_to_resume = True  # False for a part of something that says so itself
        self.log_options: dict[str, Any] = {}  # of `RunLog`, besides the run's own

    def use_logging(self, on_row: RowHook | None = None, *, progress: bool = True) -> None:
        """For a program that runs the trainer: messages go to the logger ``scrl_fast`` and not to stderr.

        on_row: called in process 0 with each row that is logged; a true answer stops the run as a signal does, under
            the name ``on_row``. progress: whether a bar is drawn on a terminal or in a notebook.
        """
        self.on_row, self.log_options = on_row, {"as_library": True, "progress": progress}

    # ---- the run ----

    def run(self) -> dict[str, Any]:
        """Trains to the end of the plan or to a signal, evaluates, and says what came out.

        Returns ``{run_dir, step, interrupted, checkpoint, resume_command, seconds}`` and what the task adds.
        Raises what the data raise, once the steps before are saved.
        """
        started = time.perf_counter()
        with self.hold_folder():
            notes = self.restore()
            with self.open_log() as self.log, self.stop:
                self.log_run_header(notes)
                if self.task.trains:
                    self.check_room()
                    self.train()
                return self.finish() | {"seconds": time.perf_counter() - started}

    def train(self) -> None:
        """The steps that are left."""
        task, run = self.task, self.task.config.run
        save_every = run.checkpoint_every or task.steps_per_epoch
        log_every = run.log_interval(task.last_step)
        self.clock.read()
        with closing(task.batches()) as stream, self.log.slow_start(self.step + 1) as started:
            for batch, weight in self.synchronized_batches(stream):
                if self.step == 0:
                    task.first_batch(batch)
                self.make_step(batch, weight)
                started()
                self.log.tick()
                if note := task.step_note():
                    self.log.say(note)
                if self.step % log_every == 0 or self.step in (1, task.last_step):
                    self.log_step()
                if self.step % save_every == 0 or self.step == task.last_step:
                    self.save()
                if task.evaluate_every and self.step % task.evaluate_every == 0 and self.step < task.last_step:
                    task.evaluate()
        self.save_unsaved(planned=not self.stop)  # a signal, or another run's checkpoint and no step left to make

    def make_step(self, batch: T, weight: int) -> None:
        """One update. What cannot be saved where memory ends in it, since it is half made, is said."""
        try:
            self.task.train_step(batch, weight)
        except Exception as error:
            if is_out_of_memory(error):
                self.log.say(f"step {self.step + 1} needs more memory than there is; {self.last_good()}")
            raise

    @contextmanager
    def hold_folder(self) -> Iterator[None]:
        """No other run may use the folder meanwhile; process 0 holds it for all."""
        if self.world.rank == 0:
            self.lock = hold_folder(self.folder)
        try:
            yield
        finally:
            if self.lock is not None:
                release_folder(self.lock)
                self.lock = None

    def check_room(self) -> None:
        """Raises UsageError where the disk has no room for the checkpoints that are to come."""
        state, groups = self.state_dict(), self.task.optimizer.param_groups
        files = 1 if self.found.own else self.task.config.run.keep + 1  # the oldest goes when the newest is whole
        files += bool(self.task.evaluate_every)  # best.pt may be an older one
        self.world.broadcast_from_rank0(lambda: self.checkpoints.check_room(state, groups, files))

    def synchronized_batches(self, stream: Iterator[T]) -> Generator[tuple[T, int], None, None]:
        """Batches with their weight in all processes, as long as every process has one and none was told to stop."""
        fetch: Callable[[], T] = lambda: next(stream)  # noqa: E731
        while self.step < self.task.last_step:
            with self.clock.waiting():
                agreed = self.agree(fetch, f"step {self.step + 1}", self.task.batch_weight)
            batch, weight = agreed
            if batch is None:
                return
            yield batch, weight
        self.agree(lambda: True, "the end")  # no process may be left alone in what comes after the last step

    def agree(self, work: Callable[[], R], where: str, weigh: Callable[[R], int] = lambda _: 0) -> tuple[R | None, int]:
        """What ``work`` returns here, and its weight in all processes; None in all where one was told to stop.

        One small message between the hosts: weights, signals, data that failed. So all processes stop at the same step.
        A signal ends slow work there and then.
        Raises what ``work`` raised, as `TrainingTask.data_error` puts it, or PeerFailed, once all steps are saved.
        """
        result: R | None = None
        failure: Exception | None = None
        try:
            result = self.stop.run_interruptible(work)
        except Exception as error:
            failure = error
        own_weight = 0 if result is None else weigh(result)
        stopped = bool(self.stop) or result is None
        weight, stops, failures = self.world.all_reduce_ints([own_weight, int(stopped), int(failure is not None)])
        if failures:
            self.end_with_failed_data(failure, where)
        if stops:
            self.note_stop()
        return (None if stops else result), weight

    def measure(self, work: Callable[[], list[R]], combine: Callable[[list[R]], S]) -> S | None:
        """What ``combine`` makes of every process's ``work`` in process 0, in all; None where one was told to stop.

        Raises as `agree` does.
        """
        own, _ = self.agree(work, f"the measurement after step {self.step}")
        if own is None:
            return None
        found = self.world.gather_objects(own)
        stop = self.stop
        result = self.world.broadcast_from_rank0(lambda: stop.run_interruptible(lambda: combine(found)))
        if result is None:
            self.note_stop()
        return result

    def end_with_failed_data(self, failure: Exception | None, where: str) -> NoReturn:
        """Saves, says so and raises. failure: of this process, None where another one's data failed."""
        if self.save_unsaved():
            saved = f"the data failed; all {self.step} steps are saved"
            self.log.say(f"{where}: {saved}. To continue: {self.resume_command()}")
        if failure is None:
            raise PeerFailed("stopped because the data of another process failed")
        error = self.task.data_error(failure, where)
        raise error from (failure if error is not failure else None)

    def note_stop(self) -> None:
        """Notes that all processes know of a stop of one of them."""
        self.stop.request_stop(SIGNAL_OF_PEER)
        self.stopped_together = True

    def advance(self, images: int) -> None:
        """One update was made. images: of the step, in all processes."""
        self.step += 1
        self.clock.add_step(images)

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """A training checkpoint: all that the run needs to go on as if it had never stopped."""
        return {
            "step": self.step,
            "epoch": self.step // self.task.steps_per_epoch,
            "config": self.task.config.to_dict(),
            "version": __version__,
            "data": self.task.data_identity(),
            **self.task.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a training checkpoint."""
        try:
            self.task.load_state_dict(state)
        except UsageError as error:
            path = str(self.found.path)
            raise CheckpointError(str(error) if path in str(error) else f"{path}: {error}") from error
        self.step = state["step"]

    def restore(self) -> list[str]:
        """Loads what ``resume`` or ``init`` asks for; returns what there is to say about it.

        Raises CheckpointError for a checkpoint that is missing, damaged or foreign, UsageError for one that does not
        fit.
        """
        asked, notes = self.task.config.resume, list(self.found.notes)
        if self.found.path is None:
            if asked:
                notes.append(
                    f"resume=auto: no checkpoint in {self.checkpoints.folder} yet, starting from the beginning"
                )
            return notes + self.task.initialise()
        state, said = read_checkpoint(self.found, asked, self.folder)
        self.load_state_dict(state)
        self.saved = self.step if self.found.own else 0
        notes += [*said, f"resumed from {self.found.path} at step {self.step}"]
        before, now = state["loader"].get("world_size", 1), self.world.size
        if before != now:
            notes.append(f"{now} processes instead of {before}: the same images, views and boxes in every step")
        besides = self.task.process_options if before != now else ()
        notes += changed_data(state.get("data", {}), self.task.data_identity())
        config = self.task.config
        saved, defaults = under_present_names(type(config), state["config"]), type(config)().to_dict()
        saved = self.task.precision.settled(saved)
        if changed := changed_options(saved, config.to_dict(), besides, defaults=defaults):
            notes.append(f"not the same run any more, these options have changed: {', '.join(changed)}")
        return notes

    def save(self, planned: bool = True) -> None:
        """Writes a checkpoint of this step. planned: the task may measure first, and have it become best.pt."""
        if planned:
            self.task.before_save()
        best = planned and self.task.is_best()
        state = self.state_dict()
        if self.world.rank == 0:
            self.check_folder(state)
            self.checkpoints.save(state, self.step, best=best)
            if time.monotonic() - self.drawn > CURVES_EVERY:
                self.draw_curves()
        self.saved = self.step

    def check_folder(self, state: dict[str, Any] | None = None) -> None:
        """Raises RunFolderLost where the folder was moved or removed; what is to be saved is saved where it can be."""
        if self.lock is None or self.lock.present():
            return
        moved = self.lock.moved_to()
        folder, saved = moved or self.folder, ""
        if not moved and folder.exists():  # something else lies there now
            folder = folder.with_name(f"{folder.name}-kept")
        if state is not None:
            path = CheckpointManager(folder / CHECKPOINTS, keep=self.task.config.run.keep).save(state, self.step)
            self.write_config(folder)
            saved = f"; step {self.step} is saved in {path}"
        what = f"was moved to {moved}" if moved else "was removed"
        raise RunFolderLost(f"the run folder {self.folder} {what} while the run was on{saved}")

    def save_unsaved(self, planned: bool = False) -> bool:
        """Saves the steps since the last checkpoint, if there are any; whether there were."""
        if not self.task.trains or self.step <= self.saved:
            return False
        self.save(planned=planned)
        return True

    def last_good(self) -> str:
        """For errors: which checkpoint to go back to."""
        good = self.checkpoints.newest_good()
        return f"the last good checkpoint is {good}" if good else "no checkpoint was written yet"

    # ---- what is said ----

    def open_log(self) -> RunLog:
        """The run's log, continued after the step that was restored; process 0 writes it."""
        run = self.task.config.run
        return RunLog(
            self.folder,
            total_steps=self.task.last_step,
            step=self.step,
            tensorboard=run.tensorboard,
            wandb=run.wandb,
            settings=self.task.config.to_dict(),
            active=self.world.rank == 0,
            **self.log_options,
        )

    def log_run_header(self, notes: list[str]) -> None:
        """What this run is, on the terminal and in the run folder's files."""
        if self.lock is not None and not self.lock.exclusive:
            notes = [*notes, "the file system of the run folder has no locks: start no second run there"]
        for line in (*notes, *self.task.describe(), f"run folder: {self.folder}"):
            self.log.say(line)
        if self.world.rank == 0:
            self.write_config(self.folder)
            self.write_environment(self.folder / ENVIRONMENT)

    def write_config(self, folder: Path) -> None:
        """config.yaml, which starts the run again; at once, so that a full disk leaves the one before."""
        kept = replace(self.task.config, **self.task.start_options)
        write_text(folder / CONFIG, dump(kept.to_dict()))

    def log_step(self) -> None:
        """One logging point."""
        row = {"step": self.step, "epoch": round(self.step / self.task.steps_per_epoch, 6)} | self.task.log_row()
        steps, speed = self.clock.steps, self.clock.read()
        row |= speed | self.world.average({"data_wait": speed["data_wait"]})
        if self.task.device.type == "cuda":
            row["peak_memory_gb"] = torch.cuda.max_memory_allocated(self.task.device) / 1e9
        self.last_row = row
        self.log.metrics(row, seconds_per_step=self.clock.seconds / steps)
        if self.on_row is not None and self.world.rank == 0:
            try:
                stop = bool(self.on_row(dict(row)))  # an array has no truth value
            except BaseException:
                if not self.world.is_distributed:  # the others are in their next step
                    self.save_unsaved()
                raise
            if stop:
                self.stop.request_stop(ON_ROW)

    def finish(self) -> dict[str, Any]:
        """Curves, evaluation and the last words."""
        self.log.end_progress()
        row = self.last_row or (read_metrics(self.folder / METRICS) or [{}])[-1]
        summary = {"run_dir": str(self.folder), "step": self.step} | self.task.summary(row)
        self.draw_curves()
        # every process takes part in the state, and some evaluations are process 0's alone: nobody waits for their end
        state = self.state_dict() if self.task.trains else None
        summary |= self.task.evaluate()
        self.check_folder(state)
        last = self.checkpoints.folder / LAST
        summary["interrupted"] = self.stop.reason
        summary["checkpoint"] = str(last if last.exists() else self.found.path or "")
        summary["resume_command"] = self.resume_command()
        for line in self.last_words():
            self.log.say(line)
        if self.stopped_together:  # a launcher that sees one process end may kill the first one before it has said this
            self.world.all_reduce_ints([0])
        return summary

    def last_words(self) -> list[str]:
        """How the run ended, and how it goes on."""
        if not self.stop:
            done = f"done: {self.step} steps; checkpoint and curves are in {self.folder}"
            return [*self.task.last_words(), done]
        message = self.stop.stop_message(self.step)
        if not self.says_how_to_resume:
            return [message.rpartition(" To ")[0]]
        if not self.task.trains:
            message = f"{self.stop.reason}: stopped before the measurement was complete. To measure anew:"
        return [message, f"  {self.resume_command()}"]

    def resume_command(self) -> str:
        """The command that goes on from here."""
        arguments = [*self.task.command, f"--config={self.folder / CONFIG}", *self.task.resume_arguments()]
        return f"{launcher()} -m scrl_fast.{shlex.join(arguments)}"

    def draw_curves(self) -> None:
        """curves.png from metrics.jsonl."""
        self.drawn = time.monotonic()
        rows = read_metrics(self.folder / METRICS) if self.world.rank == 0 else []
        if rows:
            self.log.optional(CURVES, "matplotlib", lambda: plots.draw_curves(self.folder / CURVES, rows))
