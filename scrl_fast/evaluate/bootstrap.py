"""Differences between encoders that name the boxes of the same test images: a paired bootstrap over images and seeds.

Boxes of one image are alike, so whole images are drawn, with all their boxes. A seed chooses the training images, the
same for every encoder, so seeds are drawn too, and a draw holds the same images and seeds for both encoders.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993. Few seeds need two corrections: one seed less is
drawn than there are, which makes the variance of a mean unbiased (Rao and Wu, 1988), and the interval is widened from
the normal to Student's t with the degrees of freedom of Satterthwaite (1946).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scrl_fast.run.statistics import CONFIDENCE, Difference, t_quantile

DRAWS, BLOCK = 2_000, 200
NORMAL = 1.959963984540054  # the quantile of the normal distribution that t_quantile approaches
MEASURES = ("accuracy", "mean_class_accuracy")
"""Share of the boxes named rightly; mean over the classes that occur."""

Right = NDArray[np.bool_]
Sums = NDArray[np.float64]


class PairedBootstrap:
    """Draws of test images and seeds, the same for every pair of encoders that is compared.

    labels: ``[n]``, the class of each test box. images: ``[n]``, the image it lies in. seeds: how many repeats there
    are; with one, images alone vary.
    """

    def __init__(
        self, labels: NDArray[np.int64], images: NDArray[np.int64], seeds: int, *, draws: int = DRAWS, seed: int = 0
    ) -> None:
        self.labels, self.images = labels, np.unique(images, return_inverse=True)[1]
        self.seeds, self.count, self.classes = seeds, int(self.images.max()) + 1, int(labels.max()) + 1
        rng = np.random.default_rng([seed, seeds, self.count])
        self.image_draws = rng.integers(self.count, size=(draws, self.count)).astype(np.int32)
        self.seed_draws = rng.integers(seeds, size=(draws, max(1, seeds - 1)))
        self._seed_weights = _counts(self.seed_draws, seeds) / self.seed_draws.shape[1]
        self._boxes = self._sums(np.ones(len(labels), bool))

    def means(self, right: Sequence[Right], measure: str) -> list[float]:
        """The measure of each seed, over all test images. right: of each seed, which boxes were named rightly."""
        sums = np.stack([self._sums(each) for each in right])
        return [float(value) for value in _measured(sums.sum(1)[None], self._boxes.sum(0)[None], measure)[0]]

    def difference(self, first: Sequence[Right], other: Sequence[Right], measure: str) -> Difference:
        """``other - first`` with its interval. first, other: of each seed, which boxes were named rightly.

        The interval is None where the images cannot tell it: there is one, or all draws agree on a difference.
        """
        sums = np.stack([self._sums(b) - self._sums(a) for a, b in zip(first, other, strict=True)])  # [seeds, I, K]
        by_seed = _measured(sums.sum(1)[None], self._boxes.sum(0)[None], measure)[0]
        mean = float(by_seed.mean())
        flat = sums.transpose(1, 0, 2).reshape(self.count, -1)
        parts = []
        for images, seeds in self._weights():
            drawn = (images @ flat).reshape(-1, self.seeds, self.classes)
            parts.append((_measured(drawn, images @ self._boxes, measure) * seeds).sum(1))
        values = np.concatenate(parts)
        if self.count < 2 or (mean and np.ptp(values) == 0):
            return Difference(mean, None, self.seeds)
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(values, [tail, 1 - tail]) - mean
        wider = t_quantile(1 - tail, self._freedom(by_seed, float(values.var()))) / NORMAL
        return Difference(mean, (mean + wider * float(low), mean + wider * float(high)), self.seeds)

    def _weights(self) -> Iterator[tuple[Sums, Sums]]:
        """How often each image and seed was drawn, some draws at a time: all at once take gigabytes for many images."""
        for first in range(0, len(self.image_draws), BLOCK):
            part = slice(first, first + BLOCK)
            yield _counts(self.image_draws[part], self.count), self._seed_weights[part]

    def _freedom(self, by_seed: Sums, variance: float) -> int:
        """Degrees of freedom of a variance of which a part comes from few seeds, the rest from the images."""
        if self.seeds < 2 or variance == 0:
            return max(1, self.count - 1)
        from_seeds = min(float(by_seed.var(ddof=1)) / self.seeds, variance)
        rest = variance - from_seeds
        return max(1, int(variance**2 / (from_seeds**2 / (self.seeds - 1) + rest**2 / max(1, self.count - 1))))

    def _sums(self, right: Right) -> Sums:
        """Boxes named rightly of each image and class, ``[images, classes]``."""
        place = self.images * self.classes + self.labels
        counts = np.bincount(place, weights=right, minlength=self.count * self.classes)
        return counts.reshape(self.count, self.classes).astype(float)


def _measured(right: Sums, boxes: Sums, measure: str) -> Sums:
    """The measure of every draw and seed, ``[draws, seeds]``. right: ``[draws, seeds, K]``. boxes: ``[draws, K]``."""
    if measure == "accuracy":
        return right.sum(2) / boxes.sum(1)[:, None]
    occurs = boxes > 0
    return (right / np.where(occurs, boxes, 1)[:, None]).sum(2) / occurs.sum(1)[:, None]


def _counts(draws: NDArray[Any], kinds: int) -> Sums:
    """How often each kind was drawn, ``[draws, kinds]``."""
    rows = np.arange(len(draws))[:, None] * kinds
    return np.bincount((draws + rows).ravel(), minlength=len(draws) * kinds).reshape(len(draws), kinds).astype(float)
