"""Weighted k-nearest-neighbour classification of frozen features, exact and in bounded memory.

Source: Wu et al. 2018, arXiv 1805.01978, section 3.4: each of the k most similar training images votes for its class
with weight exp(cosine / temperature).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from scrl_fast.errors import UsageError

QUERIES, BANK = 256, 65_536  # rows a block: 64 MB of similarities in float32, twice that to rank them


@dataclass(frozen=True)
class KnnResult:
    """What `knn` measured."""

    k: int
    top1: float
    top5: float
    """Share of test images whose class is the first, or among the first five, of the vote; 0 to 1."""
    classes: int
    train_images: int
    test_images: int


@torch.no_grad()
def nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(cosine similarities, indices into bank), each ``[Q, k]``, the most similar first; both on ``queries``' device.

    queries ``[Q, D]`` and bank ``[N, D]`` of unit length; the bank may lie on another device and is brought over in
    blocks. Equal similarities go by lower index, whatever the blocks.
    """
    if not 1 <= k <= len(bank):
        raise UsageError(f"k={k}: the training set has {len(bank)} images; choose 1 to {len(bank)}")
    found = [_nearest_block(queries[i : i + QUERIES], bank, k) for i in range(0, len(queries), QUERIES)]
    empty = queries.new_zeros(0, k), torch.zeros(0, k, dtype=torch.int64, device=queries.device)
    values, indices = zip(*(found or [empty]), strict=True)
    return torch.cat(values), torch.cat(indices)


def _nearest_block(rows: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best = rows.new_zeros(len(rows), 0)
    where = torch.zeros(len(rows), 0, dtype=torch.int64, device=rows.device)
    for first in range(0, len(bank), BANK):
        block = bank[first : first + BANK].to(rows.device)
        cosine = torch.cat([best, rows @ block.T], dim=1)
        here = torch.arange(first, first + len(block), device=rows.device).expand(len(rows), -1)
        best, at = _stable_top(cosine, min(k, cosine.shape[1]))
        where = torch.cat([where, here], dim=1).gather(1, at)
    return best, where


def _stable_top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """topk whose ties go to the first: topk alone picks any, so that blocks would change the vote."""
    threshold = values.topk(k, dim=1).values[:, -1:]
    above = (values > threshold).sum(1, keepdim=True)
    level = values == threshold
    kept = (values > threshold) | (level & (level.cumsum(1) <= k - above))
    at = kept.nonzero()[:, 1].view(len(values), k)
    chosen = values.gather(1, at)
    order = chosen.argsort(dim=1, descending=True, stable=True)
    return chosen.gather(1, order), at.gather(1, order)


@torch.no_grad()
def knn(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, k: Sequence[int], temperature: float
) -> list[KnnResult]:
    """Accuracy for each k.

    train ``[N, D]``, test ``[M, D]`` features of any length; labels int64 of 0 to classes - 1.
    Raises ValueError for a k outside 1..N.
    """
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    rows, bank = F.normalize(test.float(), dim=1), F.normalize(train.float(), dim=1)
    similar, at = nearest(rows, bank, max(k))
    votes, labels = torch.exp((similar - 1) / temperature), train_labels.to(at.device)[at]  # - 1: no overflow
    truth = test_labels.to(at.device)[:, None]
    results = []
    for each in k:
        scores = torch.zeros(len(rows), classes, device=at.device).scatter_add_(1, labels[:, :each], votes[:, :each])
        ranked = scores.argsort(dim=1, descending=True, stable=True)
        right = ranked == truth
        results.append(
            KnnResult(
                each,
                right[:, 0].double().mean().item(),
                right[:, :5].any(1).double().mean().item(),
                classes,
                len(train),
                len(test),
            )
        )
    return results
