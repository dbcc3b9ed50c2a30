"""Projector and predictor: Linear, BatchNorm, ReLU, Linear without bias (SCRL section 3; BYOL, arXiv 2006.07733)."""

from __future__ import annotations

from torch import Tensor, nn


class RowBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d that lets a batch without rows pass: empty output, zero gradients, running statistics untouched.

    ``nn.SyncBatchNorm.convert_sync_batchnorm`` replaces it like any other BatchNorm; SyncBatchNorm takes empty input
    itself, and must, because the other processes wait for this one's (empty) statistics.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[0] == 0:  # the affine part alone keeps weight and bias in the graph, as DDP expects
            return input * self.weight + self.bias
        return super().forward(input)


class ProjectionHead(nn.Module):
    """Two-layer perceptron over rows: ``[N, in_dim] -> [N, out_dim]``, N = 0 included. Built by `projection_head`."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            RowBatchNorm(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, out_dim, bias=False),
        )

    def forward(self, rows: Tensor) -> Tensor:
        return self.net(rows)


def projection_head(in_dim: int, hidden_dim: int = 4096, out_dim: int = 256) -> ProjectionHead:
    """Projector (``in_dim`` = feature channels) or predictor (``in_dim = out_dim``) of SCRL and BYOL.

    Raises ValueError naming the width that is below 1.
    """
    for name, value in (("in_dim", in_dim), ("hidden_dim", hidden_dim), ("projection_dim", out_dim)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return ProjectionHead(in_dim, hidden_dim, out_dim)
