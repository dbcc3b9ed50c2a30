"""What a trainer is to the loop that runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch

from scrl_fast.distributed.world import World
from scrl_fast.run.precision import Precision

if TYPE_CHECKING:
    from scrl_fast.run.loop import TrainingLoop

T = TypeVar("T")


class TrainingTask(ABC, Generic[T]):
    """What a trainer tells its loop. T is what one step trains on: a batch, or several.

    config: the checked options, with ``run``, ``resume`` and a `to_dict`. steps_per_epoch, last_step: of the plan.
    trains: False to measure only. evaluate_every: steps between evaluations, 0 for the end alone.
    start_options: options that belong to the start of a run, with the value that config.yaml keeps instead.
    process_options: options that change with the number of processes, for the same training.
    """

    config: Any
    world: World
    device: torch.device
    precision: Precision
    optimizer: Any
    steps_per_epoch: int
    last_step: int
    loop: TrainingLoop[T]
    """Made by the trainer once the run folder is known."""
    trains: bool = True
    evaluate_every: int = 0
    start_options: ClassVar[Mapping[str, Any]] = {"resume": ""}
    process_options: ClassVar[tuple[str, ...]] = ()

    @property
    def step(self) -> int:
        """Updates made so far."""
        return self.loop.step

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.loop.folder

    @property
    @abstractmethod
    def command(self) -> list[str]:
        """The words after ``python -m scrl_fast.`` that start this command."""

    @abstractmethod
    def describe(self) -> list[str]:
        """Lines for the head of the log: what is trained, on what, how long."""

    @abstractmethod
    def batches(self) -> Generator[T, None, None]:
        """What each step trains on, from the step after the last one made to the last one planned."""

    @abstractmethod
    def batch_weight(self, batch: T) -> int:
        """The weight of a batch in the mean over all processes."""

    def first_batch(self, batch: T) -> None:
        """Shows what the first step trains on."""

    @abstractmethod
    def train_step(self, batch: T, weight: int | None = None, /) -> None:
        """One update, told to the loop by `TrainingLoop.advance`. weight: of this step in all processes, if known."""

    def step_note(self) -> str:
        """A line for the log after a step, '' for none; every process calls it."""
        return ""

    @abstractmethod
    def log_row(self) -> dict[str, Any]:
        """The means since the last row, in every process; step, epoch and speed are the loop's."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """``{model, optimizer, rng, loader, log}`` of a checkpoint; every process calls it."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint. Raises UsageError where it does not fit; the options stay those of the config."""

    @abstractmethod
    def data_identity(self) -> dict[str, Any]:
        """``images``, their number, and ``names``, a hash of their names: both go into checkpoints, to be compared."""

    @abstractmethod
    def initialise(self) -> list[str]:
        """Loads what ``init`` asks for into a run without a checkpoint; returns what there is to say about it."""

    @abstractmethod
    def evaluate(self) -> dict[str, Any]:
        """Measures, logs and returns results for the summary; every process calls it. Empty if a signal ended it."""

    def before_save(self) -> None:
        """Measures what a planned checkpoint of this step is judged by; every process calls it."""

    def is_best(self) -> bool:
        """Whether the checkpoint of this step, a planned one, becomes best.pt."""
        return self.step == self.last_step

    def summary(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What `TrainingLoop.run` returns of the last row; every process calls it."""
        return {"loss": row.get("loss")}

    def last_words(self) -> list[str]:
        """Lines before the last one of a run that came to its end."""
        return []

    def resume_arguments(self) -> list[str]:
        """Arguments that go on from the run's newest checkpoint, after its ``--config``."""
        return ["--resume=auto"]

    def data_error(self, error: Exception, where: str) -> Exception:
        """The error that ends the run, of one that the data raised. where: ``step 3``, ``the measurement``."""
        return error
