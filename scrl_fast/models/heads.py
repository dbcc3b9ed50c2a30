"""Projector and predictor: Linear, BatchNorm, ReLU, Linear without bias (SCRL section 3; BYOL, arXiv 2006.07733)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scrl_fast.distributed.sync_batch_norm import RowBatchNorm


class ProjectionHead(nn.Module):
    """Two-layer perceptron over rows: ``[N, in_dim] -> [N, out_dim]``, N = 0 included. Built by `projection_head`.

    On a CPU it stays in float32 under autocast: bf16 in the heads turns the predictor's gradient by 2 to 5 % in
    nearly the same direction batch after batch (`benchmarks/results/precision_cpu.json`); the encoder's is mostly
    noise.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            RowBatchNorm(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, out_dim, bias=False),
        )

    def forward(self, rows: Tensor) -> Tensor:
        if rows.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return self.net(rows.float())
        return self.net(rows)


def projection_head(in_dim: int, hidden_dim: int = 4096, out_dim: int = 256) -> ProjectionHead:
    """Projector (``in_dim`` = feature channels) or predictor (``in_dim = out_dim``) of SCRL and BYOL.

    Raises ValueError naming the width that is below 1.
    """
    for name, value in (("in_dim", in_dim), ("hidden_dim", hidden_dim), ("projection_dim", out_dim)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return ProjectionHead(in_dim, hidden_dim, out_dim)


def classification(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, correct, count) of a linear classifier: the trainer's online probe and linear evaluation alike.

    logits: ``[..., b, classes]``, any float dtype; labels: ``[b]``, -1 where unlabelled.
    loss: cross entropy in float32 or wider, mean over labelled rows (0 if there are none), ``[...]``; correct: labelled
    rows whose highest logit is theirs, ``[...]``; count: labelled rows, a scalar.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    count = (labels >= 0).sum()
    every = labels.expand(logits.shape[:-1])
    each = F.cross_entropy(logits.flatten(0, -2), every.flatten(), ignore_index=-1, reduction="none")
    loss = each.view(every.shape).sum(-1) / count.clamp(min=1)
    return loss, (logits.argmax(-1) == every).sum(-1), count
