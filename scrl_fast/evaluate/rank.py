"""Collapse and rank: how many directions do the features of a data set use?"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from scrl_fast.metrics import feature_std, rankme


@dataclass(frozen=True)
class RankResult:
    """What `rank` measured; see `scrl_fast.metrics`."""

    rankme: float
    feature_std: float
    """Deviation of the unit-length features, mean over channels; 0 when collapsed."""
    healthy_std: float
    """What evenly spread directions would give: 1 / sqrt(channels)."""
    dimensions: int
    images: int
    dead: int
    """Channels that are the same for every image."""


def rank(features: Tensor) -> RankResult:
    """RankMe and feature deviation of ``[N, D]`` features."""
    count, dimensions = features.shape
    return RankResult(
        rankme(features).item(),
        feature_std(features).item(),
        dimensions**-0.5,
        dimensions,
        count,
        int((features == features[:1]).all(0).sum()),
    )


def draw_spectrum(path: str | os.PathLike[str], features: Tensor, title: str) -> bool:
    """Singular values of the unit-length, centred features, largest first. False where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = F.normalize(features.float(), dim=1)
    values = torch.linalg.svdvals(rows - rows.mean(0)).cpu()
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.semilogy(range(1, len(values) + 1), (values / values[0]).clamp_min(1e-8), linewidth=1.4)
    axes.set(xlabel="direction", ylabel="singular value, largest = 1", title=title)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return True
