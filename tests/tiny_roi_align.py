"""What the tests of RoIAlign share: maps and boxes drawn from a seed, layouts, and one call with its gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import implementations
from torch import Tensor

from scrl_fast.ops import roi_align

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
everywhere = pytest.mark.parametrize("device, backend", implementations("roi_align"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
OPTIONS = list(itertools.product([1, (3, 2)], [-1, 2], [False, True]))  # output size, sampling ratio, aligned
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "images and channels swapped": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "rows and columns swapped": lambda t: t.mT.contiguous().mT,
    "every second channel": lambda t: t.repeat_interleave(2, 1)[:, ::2],
}


def feature_map(n: int = 3, c: int = 20, h: int = 7, w: int = 9, dtype=torch.float64, device="cpu", seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, c, h, w, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()


def some_boxes(count: int = 25, images: int = 3, h: int = 7, w: int = 9, seed: int = 0) -> Tensor:
    """Boxes of all sizes, in no order, some beyond the edges, one image without any where there are several."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, max(images - 1, 1), (count,), generator=generator).double()
    corners = torch.rand(count, 2, 2, generator=generator, dtype=torch.float64).sort(1).values * 1.3 - 0.15
    corners = (corners * torch.tensor([w, h]) * 32).round(decimals=1)  # exact enough in float32 for every backend
    return torch.cat([image[:, None], corners.reshape(count, 4)], 1)


def small_work(device: str, backend: str) -> dict[str, int]:
    """Channels that tests of many cases take: the interpreter needs seconds where the others need microseconds."""
    return {"c": 4 if interpreted(device, backend) else 20}


def interpreted(device: str, backend: str) -> bool:
    return device == "cpu" and backend == "triton"


def run(input: Tensor, boxes: Tensor, options=(1, -1, False), seed: int = 1, **more) -> tuple[Tensor, Tensor]:
    """Output and gradient for a random cotangent, the same one for every dtype and backend."""
    size, ratio, aligned = options
    function = more.pop("function", roi_align)
    output = function(input, boxes, size, 1 / 32, ratio, aligned, **more)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (grad,) = torch.autograd.grad(output, input, cotangent.to(output.device, output.dtype))
    return output, grad
