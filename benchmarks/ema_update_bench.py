"""Moving average of the target network: every step after the optimizer, over encoder and projector.

Rivals: PyTorch's own multi-tensor lerp, its averaging helper for models, and the loop over `.data` that published
implementations have. The network of record is ResNet-50 with its projector, 33.0 M numbers in 164 tensors; the case
`overhead` has as many tensors of one number.
"""

from __future__ import annotations

import sys

import harness
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from scrl_fast import backends
from scrl_fast.models import SCRL
from scrl_fast.ops import ema_update_

MOMENTUM = 0.97


def lists(shapes: list[torch.Size], bench: harness.Bench) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator(bench.device).manual_seed(0)

    def draw() -> list[Tensor]:
        made = [torch.randn(s, generator=generator, device=bench.device) for s in shapes]
        if bench.args.layout == "channels_last":
            made = [t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for t in made]
        return [t.to(bench.dtype) for t in made]

    return draw(), draw()


def data_loop(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.data = target.data * MOMENTUM + source.data * (1 - MOMENTUM)


def agree(targets: list[Tensor], sources: list[Tensor]) -> None:
    ours, theirs = ([t.clone() for t in targets] for _ in range(2))
    ema_update_(ours, sources, MOMENTUM)
    torch._foreach_lerp_(theirs, sources, 1 - MOMENTUM)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def main() -> int:
    parser = harness.parser("ema_update", __doc__)
    parser.add_argument("--backbones", nargs="+", default=["resnet10_tiny", "resnet50"])
    parser.add_argument("--layout", choices=("contiguous", "channels_last"), default="channels_last")
    args = parser.parse_args()
    bench = harness.Bench("ema_update", args)
    cases = {}
    for backbone in args.backbones:
        with torch.device("meta"):
            cases[backbone] = [p.shape for p in SCRL(backbone).target.parameters()]
    cases["overhead"] = [torch.Size([1])] * 164
    operation = backends.OPERATIONS["ema_update_"]
    for label, shapes in cases.items():
        t, s = lists(shapes, bench)
        numbers = sum(x.numel() for x in t)
        helper = get_ema_multi_avg_fn(MOMENTUM)
        providers = {
            f"scrl_fast/{backend}": lambda t=t, s=s, b=backend: ema_update_(t, s, MOMENTUM, backend=b)
            for backend in ("native", "triton")
            if not operation.failure(backend, args.device) and (backend, args.device) != ("triton", "cpu")
        }
        providers |= {
            "torch/foreach_lerp": lambda t=t, s=s: torch._foreach_lerp_(t, s, 1 - MOMENTUM),
            "torch/swa_utils": lambda t=t, s=s, f=helper: f(t, s, 1),
            "torch/data_loop": lambda t=t, s=s: data_loop(t, s),
        }
        bench.case(
            harness.case_name(label, tensors=len(t), numbers=numbers),
            providers,
            bytes=3 * numbers * bench.dtype.itemsize,
            items=numbers,
            check=lambda t=t, s=s: agree(t, s),
        )
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
