"""Mean, spread and the paired t interval of a few repeats. Plain Python: the numbers are the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of a sample, n - 1) of ``count`` values; the deviation is None for one value."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences with its t interval; the interval is None for a single pair."""

    mean: float
    interval: tuple[float, float] | None
    pairs: int

    @property
    def beyond_chance(self) -> bool:
        """Whether the interval leaves zero out. Equal values in every pair are no difference."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of at least one value."""
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def paired_difference(first: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """``other - first`` over the seeds that both have, with its 95 % t interval; None where they share no seed.

    Each seed draws its own images, order and heads, the same for every start: so the difference of a seed is freer of
    chance than the two values are. Source: Student's paired t test.
    """
    found = [other[seed] - first[seed] for seed in sorted(first.keys() & other.keys())]
    if not found:
        return None
    mean = fmean(found)
    if len(found) < 2:
        return Difference(mean, None, len(found))
    half = t_quantile(0.5 + CONFIDENCE / 2, len(found) - 1) * stdev(found) / math.sqrt(len(found))
    return Difference(mean, (mean - half, mean + half), len(found))


def t_quantile(probability: float, freedom: int) -> float:
    """The value below which Student's t with ``freedom`` degrees of freedom lies with this probability, 0.5 to 1."""
    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(f"probability={probability}, freedom={freedom}: must be in [0.5, 1), and at least 1")
    low, high = 0.0, 1.0
    while _t_below(high, freedom) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _t_below(middle, freedom) < probability else (low, middle)
    return high


def _t_below(value: float, freedom: int) -> float:
    """P(T < value) for value >= 0: the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(value / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 + odd, freedom - 1, 2):  # the sum's last power of the cosine is freedom - 2
        term *= square * (k - 1) / k
        total += term
    if not odd:
        return 0.5 + sine * total / 2
    return 0.5 + (angle + sine * total * (freedom > 1)) / math.pi
