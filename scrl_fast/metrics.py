"""Monitors of a run: is the representation collapsing, and what do the numbers of the last steps say?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Standard deviation over rows of the L2-normalised features, mean over dimensions: the collapse monitor.

    features: ``[N, D]``, any float dtype. Returns a 0-dim float32 (float64 for float64) tensor on the same device:
    about ``1 / sqrt(D)`` when directions are spread evenly, 0 when all rows point one way, and 0 for fewer than two
    rows, where there is no spread to speak of. Source: SimSiam, arXiv 2011.10566, section 4.1.
    """
    rows = as_rows(features)
    if rows.shape[0] < 2:
        return rows.new_zeros(())
    return F.normalize(rows, dim=1).std(dim=0, correction=0).mean()


@torch.no_grad()
def rankme(features: Tensor, eps: float = 1e-7) -> Tensor:
    """Effective rank of a feature matrix: ``exp(entropy of its singular values divided by their sum)``.

    features: ``[N, D]``, any float dtype. Returns a 0-dim tensor between 1 (collapsed onto one direction) and
    ``min(N, D)``; 0 for a matrix without rows or with nothing but zeros. Non-finite features give NaN instead of an
    error from the decomposition. Source: Garrido et al. 2023, arXiv 2210.02885, equation 1.
    """
    rows = as_rows(features)
    if rows.numel() == 0:
        return rows.new_zeros(())
    finite = torch.isfinite(rows).all()
    values = torch.linalg.svdvals(torch.nan_to_num(rows, nan=0.0, posinf=0.0, neginf=0.0))
    total = values.sum()
    share = values / total.clamp_min(torch.finfo(rows.dtype).tiny)
    rank = torch.exp(-(share * torch.log(share + eps)).sum())
    rank = torch.where(total > 0, rank, torch.zeros_like(rank))
    return torch.where(finite, rank, torch.full_like(rank, float("nan")))


def as_rows(features: Tensor) -> Tensor:
    """The features as a float32 (float64 stays) matrix. Raises ValueError when they are not ``[N, D]``."""
    if features.ndim != 2:
        raise ValueError(f"features must have shape [N, D], got {list(features.shape)}")
    return features if features.dtype == torch.float64 else features.float()


class StepMeter:
    """Collects one row of device scalars a step and brings them to the host together, in one copy, when asked.

    Reading a loss with ``.item()`` after every step would stop the CPU until the GPU has caught up; here that
    happens once a logging point.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[Tensor, tuple[float, ...]]] = []

    def add(self, values: Sequence[Tensor], *numbers: float) -> None:
        """One step's 0-dim tensors, all on one device, and numbers the host knows anyway; as many at every step."""
        self.rows.append((torch.stack([value.detach().double() for value in values]), numbers))

    def drain(self) -> list[list[float]]:
        """The rows added since the last call, oldest first, as Python numbers. Waits for the device."""
        rows, self.rows = self.rows, []
        read = torch.stack([values for values, _ in rows]).tolist() if rows else []
        return [values + list(numbers) for values, (_, numbers) in zip(read, rows, strict=True)]


class LossWindow:
    """The losses by name of every step since the last row of the log; each row has the names of the first."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def take(self) -> dict[str, float]:
        """The means of the window, which is then empty."""
        rows, self.rows = self.rows, []
        return {name: fmean(row[name] for row in rows) for name in rows[0]}

    def state_dict(self) -> dict[str, Any]:
        return {"pending": self.rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rows = [{str(name): float(value) for name, value in row.items()} for row in state.get("pending", [])]


class LogWindow:
    """The finished steps' numbers since the last row of the log, and the probe's accuracies since the last checkpoint.

    A row of ``rows`` holds one step's loss, probe loss, right answers, labelled views, skipped updates and box pairs.
    """

    def __init__(self) -> None:
        self.rows: list[list[float]] = []
        self.scores: list[float] = []  # probe accuracies at the logging points since the last checkpoint
        self.best = -math.inf  # the probe's accuracy at best.pt
        self.improved: bool | None = None  # by the last `end_interval`; None where there was no score
        self.pairs = 0  # box pairs of all windows so far

    def take(self, images: int) -> dict[str, float]:
        """The means of the window, which is then empty. images: of a step, in all processes."""
        rows, self.rows = self.rows, []
        loss, probe_loss, correct, count, _, pairs = (list(column) for column in zip(*rows, strict=True))
        self.pairs += int(sum(pairs))
        row = {"loss": fmean(loss), "pairs_per_image": sum(pairs) / (images * len(rows))}
        if sum(count):
            row |= {"probe_loss": fmean(probe_loss), "probe_accuracy": sum(correct) / sum(count)}
            self.scores.append(row["probe_accuracy"])
        return row

    def end_interval(self) -> None:
        """A checkpoint comes: notes whether the probe was never more accurate than since the last one."""
        self.improved = None
        if self.scores:
            score, self.scores = fmean(self.scores), []
            self.improved, self.best = score > self.best, max(score, self.best)

    def state_dict(self) -> dict[str, Any]:
        return {"pending": self.rows, "scores": self.scores, "best": self.best, "pairs": self.pairs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rows = [[float(number) for number in row] for row in state.get("pending", [])]
        if any(len(row) != 6 for row in self.rows):
            raise ValueError("pending: rows hold six numbers")
        self.scores = [float(score) for score in state.get("scores", [])]
        self.best = float(state.get("best", self.best))
        self.pairs = int(state.get("pairs", 1))  # an earlier release did not count them
