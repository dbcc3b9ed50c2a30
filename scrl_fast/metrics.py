"""Monitors of a run: is the representation collapsing, and what do the numbers of the last steps say?"""

from __future__ import annotations

from collections.abc import Sequence

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
