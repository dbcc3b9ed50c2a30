"""Tensors as no benchmark has them: empty, of size zero, expanded, overlapping, with gaps, off any alignment."""

from __future__ import annotations

import random

import torch
from torch import Tensor

LAYOUTS = ("dense", "permuted", "gaps", "offset", "expanded", "overlapping")
WRITABLE = LAYOUTS[:4]
"""Those in which every element has its own place."""


def odd_tensor(draw: random.Random, shape: list[int], dtype: torch.dtype, layouts: tuple[str, ...] = LAYOUTS) -> Tensor:
    """Normal numbers of this shape and dtype in a layout drawn from layouts."""
    layout = draw.choice(layouts)
    generator = torch.Generator().manual_seed(draw.getrandbits(32))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    if layout == "permuted" and shape:
        order = draw.sample(range(len(shape)), len(shape))
        inverse = sorted(range(len(shape)), key=order.__getitem__)
        return normal(*(shape[axis] for axis in order)).permute(inverse)
    if layout == "gaps":
        steps = [draw.choice((1, 1, 2, 3)) for _ in shape]
        whole = normal(*(size * step for size, step in zip(shape, steps, strict=True)))
        return whole[tuple(slice(None, None, step) for step in steps)]
    if layout == "offset":
        return normal(elements_of(shape) + 3)[draw.randint(1, 3) :][: elements_of(shape)].view(shape)
    if layout == "expanded" and shape:
        kept = [draw.choice((size, 1)) if size else 0 for size in shape]
        return normal(*kept).expand(shape)
    if layout == "overlapping" and shape and elements_of(shape):
        strides = [draw.randint(0, 3) for _ in shape]
        extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        return normal(extent).as_strided(shape, strides)
    return normal(*shape)


def elements_of(shape: list[int]) -> int:
    """The number of elements."""
    return torch.Size(shape).numel()
