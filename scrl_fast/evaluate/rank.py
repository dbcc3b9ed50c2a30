"""Collapse and rank: how many directions do the features of a data set use?"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

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
