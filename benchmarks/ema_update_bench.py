"""Moving average of the target network: every step after the optimizer, over encoder and projector.

Rivals: PyTorch's own multi-tensor lerp, its averaging helper for models, and the loop over `.data` that published
implementations have. The network of record is ResNet-50 with its projector, 33.0 M numbers in 164 tensors; the case
`overhead` has as many tensors of one number.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import harness
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from scrl_fast.models import SCRL
from scrl_fast.ops import backends, ema_update_

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


def contenders(t: list[Tensor], s: list[Tensor], device: str) -> dict[str, Callable[[], object]]:
    operation, helper = backends.OPERATIONS["ema_update_"], get_ema_multi_avg_fn(MOMENTUM)
    forms = [name for name in ("native", "triton") if not operation.failure(name, device)]
    forms = [name for name in forms if (name, device) != ("triton", "cpu")]
    return {f"scrl_fast/{name}": lambda b=name: ema_update_(t, s, MOMENTUM, backend=b) for name in forms} | {
        "torch/foreach_lerp": lambda: torch._foreach_lerp_(t, s, 1 - MOMENTUM),
        "torch/swa_utils": lambda: helper(t, s, 1),
        "torch/data_loop": lambda: data_loop(t, s),
    }


def agree(name: str, targets: list[Tensor], sources: list[Tensor], device: str) -> None:
    """One provider, against float64."""
    made = [t.clone() for t in targets]
    contenders(made, sources, device)[name]()
    for i, (a, t, s) in enumerate(zip(made, targets, sources, strict=True)):
        exact = MOMENTUM * t.double() + (1 - MOMENTUM) * s.double()
        eps = 4 * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a.double(), exact, rtol=eps, atol=eps, msg=lambda m, i=i: f"tensor {i}: {m}")


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
    for label, shapes in cases.items():
        t, s = lists(shapes, bench)
        numbers = sum(x.numel() for x in t)
        bench.case(
            harness.case_name(label, tensors=len(t), numbers=numbers),
            contenders(t, s, args.device),
            bytes=3 * numbers * bench.dtype.itemsize,
            items=numbers,
            check_each=lambda name, t=t, s=s: agree(name, t, s, args.device),
            wall=label == "overhead",
        )
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
