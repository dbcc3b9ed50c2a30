"""Multinomial logistic regression with an L2 penalty: L-BFGS, at most 100 iterations, no randomness."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from scrl_fast.evaluate.batches import Progress

LBFGS_STEPS = 100
DOUBLE_NUMBERS = 2**28  # features beyond 2 GB in float64 stay in float32
ONE_THREAD = 2**27  # multiplications of a pass: below, threads wait for each other longer than they calculate


def standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both ``[n, C]`` with the mean and deviation of ``train`` taken out; a dead channel stays at zero.

    float64, or float32 where that would take more than 2 GB.
    """
    train, test = ((rows.double() if rows.numel() <= DOUBLE_NUMBERS else rows.float()) for rows in (train, test))
    centre, scale = train.mean(0), train.std(0, correction=0)
    scale = torch.where(scale > 1e-6 * scale.max(), scale, 1.0)
    return (train - centre) / scale, (test - centre) / scale


@torch.no_grad()
def fit(
    rows: Tensor, labels: Tensor, classes: int, penalties: Sequence[float], progress: Progress | None = None
) -> list[Tensor]:
    """Weights ``[C + 1, classes]`` (the last row is the bias) for each penalty, each started from the one before.

    rows: ``[n, C]``. labels: ``[n]`` of 0 to classes - 1. The bias carries no penalty. progress: counts iterations.
    """
    weight = torch.zeros(rows.shape[1] + 1, classes, dtype=rows.dtype, device=rows.device)
    fitted = []
    with _threads_for(rows, classes):
        for penalty in penalties:
            _minimise(weight, rows, labels, penalty, progress)
            fitted.append(weight.clone())
    return fitted


def _minimise(weight: Tensor, rows: Tensor, labels: Tensor, penalty: float, progress: Progress | None) -> None:
    """Move ``weight``, in place, to the minimum of mean cross entropy + penalty * |weight without bias|^2."""
    weight.grad = torch.empty_like(weight)
    solver = torch.optim.LBFGS([weight], max_iter=LBFGS_STEPS, history_size=20, line_search_fn="strong_wolfe")
    solver.step(lambda: loss_and_gradient(weight, rows, labels, penalty, progress))  # type: ignore[arg-type, return-value]


def loss_and_gradient(
    weight: Tensor, rows: Tensor, labels: Tensor, penalty: float, progress: Progress | None = None
) -> Tensor:
    """The loss; its gradient is written to ``weight.grad``."""
    assert weight.grad is not None
    logs = torch.addmm(weight[-1], rows, weight[:-1]).log_softmax(1)
    loss = F.nll_loss(logs, labels) + penalty * weight[:-1].square().sum()
    slope = logs.exp_().sub_(F.one_hot(labels, weight.shape[1])).div_(len(rows))  # of the loss by the logits
    torch.mm(rows.T, slope, out=weight.grad[:-1])
    weight.grad[:-1].add_(weight[:-1], alpha=2 * penalty)
    torch.sum(slope, 0, out=weight.grad[-1])
    if progress is not None:
        progress.advance()
    return loss


@contextmanager
def _threads_for(rows: Tensor, classes: int) -> Iterator[None]:
    """One thread for small problems on a CPU.

    822 x 512 rows of 20 classes: 244 s with two threads on two busy cores, of which 175 s in 24,000 dot products of
    10,000 numbers, each of which waited for the second thread.
    """
    threads = torch.get_num_threads()
    small = rows.device.type == "cpu" and rows.numel() * classes <= ONE_THREAD
    torch.set_num_threads(1 if small else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def predict(weight: Tensor, rows: Tensor) -> Tensor:
    """The most probable class of every row, ``[n]``."""
    return torch.addmm(weight[-1], rows, weight[:-1]).argmax(1)


def accuracy(weight: Tensor, rows: Tensor, labels: Tensor) -> float:
    """Share of rows whose most probable class is their label, 0 to 1."""
    return (predict(weight, rows) == labels).double().mean().item()
