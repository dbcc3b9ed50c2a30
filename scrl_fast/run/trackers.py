"""TensorBoard and Weights & Biases: optional packages that take a run's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from scrl_fast.errors import UsageError


class Tracker(Protocol):
    """What takes numbers beside metrics.jsonl."""

    def log(self, numbers: Mapping[str, float], step: int) -> bool: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run folder; those of steps after ``step`` are marked as void. Its import takes 0.8 s.

    Raises what the import of tensorboard raises: ModuleNotFoundError where it is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, numbers: Mapping[str, float], step: int) -> bool:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        return True

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of a W&B project, named after the run folder; the same folder continues the same run."""

    def __init__(self, project: str, folder: Path, settings: Mapping[str, Any] | None) -> None:
        import wandb

        name, own = folder.resolve().name, dict(settings or {})
        self.run = wandb.init(project=project, name=name, id=name, dir=str(folder), config=own, resume="allow")

    def log(self, numbers: Mapping[str, float], step: int) -> bool:
        self.run.log(dict(numbers), step=step)
        return True

    def close(self) -> None:
        self.run.finish()


def check_wandb(project: str) -> None:
    """Raises UsageError where wandb is not installed; one that is broken is told by the log, and costs no run."""
    try:
        import wandb  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(f"run.wandb is {project!r}, but wandb is not installed: pip install wandb") from error
    except Exception:
        return
