"""The three principal components of dense features as colours: what an encoder takes for the same, in one picture.

Each cell of the feature map, at unit length as retrieval compares it, becomes red, green and blue by its first three
components. They are those of all cells of all images together: the same colour means the same direction in each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from scrl_fast.evaluate.batches import Progress
from scrl_fast.models import Encoder

COMPONENTS = 3
SHOWN = (
    0.02,
    0.98,
)  # quantiles of a component that are drawn as 0 and 1: a few odd cells must not make all others grey


@dataclass(frozen=True)
class Components:
    """colours: float32 ``[n, h, w, 3]``, 0 to 1. shares: of the variance, of each component. cells: how many."""

    colours: Tensor
    shares: tuple[float, ...]
    cells: int


@torch.no_grad()
def dense_features(encoder: Encoder, views: Tensor, batch_size: int = 16, progress: Progress | None = None) -> Tensor:
    """Feature maps of views ``[n, 3, S, S]``, float32 ``[n, h, w, C]`` on the CPU. progress: counts views."""
    device = next(encoder.parameters()).device
    maps = []
    for part in views.split(batch_size):
        maps.append(encoder(part.to(device)).float().cpu())
        if progress is not None:
            progress.advance(len(part))
    return torch.cat(maps).permute(0, 2, 3, 1)


def principal_components(features: Tensor) -> Components:
    """Components of dense features ``[n, h, w, C]``.

    A component's direction is the one in which its largest entry is positive. A component without variance, as of
    a collapsed encoder, is drawn grey. With fewer than three channels the others are grey, too.
    """
    n, height, width, channels = features.shape
    rows = F.normalize(features.reshape(-1, channels).double(), dim=1)
    rows = rows - rows.mean(0)
    variances, directions = torch.linalg.eigh(rows.T @ rows / len(rows))
    order = torch.argsort(variances, descending=True)[:COMPONENTS]
    directions = directions[:, order]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    values = rows @ (directions * largest.sign())
    total = variances.clamp_min(0).sum()
    shares = [float(variances[place] / total) if total > _nothing(channels) else 0.0 for place in order]
    colours = torch.full((len(rows), COMPONENTS), 0.5)
    for place, share in enumerate(shares):
        if share > 0:
            colours[:, place] = _stretched(values[:, place])
    shares += [0.0] * (COMPONENTS - len(shares))
    return Components(colours.reshape(n, height, width, COMPONENTS), tuple(shares), len(rows))


def _nothing(channels: int) -> float:
    """Variance of rows of unit length that differ by rounding alone."""
    return channels * torch.finfo(torch.float32).eps ** 2


def _stretched(values: Tensor) -> Tensor:
    ordered = values.sort().values
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in SHOWN)
    if high <= low:  # one value almost everywhere
        low, high = ordered[0], ordered[-1]
    return ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).float()
