"""The optimizer step: LARS over SGD with momentum, alone and with the target network's moving average.

Rivals: the tensor-by-tensor loop before `torch.optim.SGD` that published implementations have, and the best that can be
composed of PyTorch's multi-tensor operations: `_foreach_norm`, fused SGD, `_foreach_lerp_`. The network of record is
SCRL on ResNet-50 with a probe of 1,000 classes: 37.1 M numbers in 171 tensors, 33.0 M of them with an average; the
case `overhead` has as many tensors of one number.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import Tensor, nn

from scrl_fast import backends
from scrl_fast.models import SCRL
from scrl_fast.ops import lars_step_
from scrl_fast.optim import LARS

LR, MOMENTUM, DECAY, TRUST, EPS, EMA = 1e-6, 0.9, 1e-6, 1e-3, 1e-8, 0.97


class Numbers(nn.Module):
    """Tensors of one number each: what a call costs before it moves anything."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.online, self.target = (nn.ParameterList(torch.randn(1, 1) for _ in range(count)) for _ in range(2))
        self.target.requires_grad_(False)

    def ema_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        return list(self.target), list(self.online)


@functools.cache
def network(backbone: str) -> nn.Module:
    return Numbers(171) if backbone == "overhead" else SCRL(backbone, num_classes=1000)


class State:
    """Parameters, gradients, buffers and targets of one contender."""

    def __init__(self, backbone: str, bench: harness.Bench) -> None:
        model: Any = copy.deepcopy(network(backbone)).to(bench.device, bench.dtype)
        torch.manual_seed(0)
        if bench.args.layout == "channels_last":
            model = model.to(memory_format=torch.channels_last)
        self.params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        for p in self.params:
            p.grad = torch.randn_like(p) * 1e-3
        self.grads = [p.grad for p in self.params]
        self.buffers = [torch.zeros_like(p) for p in self.params]
        self.targets, self.sources = model.ema_pairs()
        target_of = dict(zip(self.sources, self.targets, strict=True))
        self.target_list = [target_of.get(p) for p in self.params]
        self.adapt = [p.ndim > 1 for p in self.params]
        self.decay = [DECAY if a else 0.0 for a in self.adapt]

    def numbers(self) -> int:
        return sum(p.numel() for p in self.params)


@torch.no_grad()
def adapt_one_by_one(state: State) -> None:
    for p, adapt in zip(state.params, state.adapt, strict=True):
        if adapt:
            p_norm, g_norm = p.norm(), p.grad.norm()
            ratio = TRUST * p_norm / (g_norm + DECAY * p_norm + EPS)
            ratio = torch.where((p_norm == 0) | (g_norm == 0), torch.ones_like(ratio), ratio)
            p.grad.add_(p, alpha=DECAY).mul_(ratio)


@torch.no_grad()
def adapt_together(state: State) -> None:
    params = [p for p, adapt in zip(state.params, state.adapt, strict=True) if adapt]
    grads = [p.grad for p in params]
    p_norm, g_norm = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, grads))
    ratio = TRUST * p_norm / (g_norm + DECAY * p_norm + EPS)
    ratio = torch.where((p_norm == 0) | (g_norm == 0), 1.0, ratio)
    torch._foreach_add_(grads, params, alpha=DECAY)
    torch._foreach_mul_(grads, list(ratio.unbind()))


@torch.no_grad()
def average_one_by_one(state: State) -> None:
    for target, source in zip(state.targets, state.sources, strict=True):
        target.data = target.data * EMA + source.data * (1 - EMA)


def average_together(state: State) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(list(state.targets), list(state.sources), 1 - EMA)


def rival(state: State, adapt: Callable, average: Callable | None, **options: bool) -> Callable[[], None]:
    sgd = torch.optim.SGD([nn.Parameter(p) if not p.is_leaf else p for p in state.params], LR, MOMENTUM, **options)

    def step() -> None:
        adapt(state)
        sgd.step()
        if average:
            average(state)

    return step


def ours(state: State, average: bool, backend: str | None = None, counter: Tensor | None = None) -> Callable[[], None]:
    options = {"ema_targets": state.target_list, "ema_momentum": EMA} if average else {}
    numbers = {"lr": LR, "momentum": MOMENTUM, "weight_decay": state.decay, "adapt": state.adapt}

    def step() -> None:
        lars_step_(
            *(state.params, state.grads, state.buffers), **numbers, **options, skip_counter=counter, backend=backend
        )

    return step


def optimizer(state: State, average: bool) -> Callable[[], None]:
    pairs = list(zip(state.params, state.adapt, strict=True))
    adapted, plain = [p for p, a in pairs if a], [p for p, a in pairs if not a]
    groups = [{"params": adapted, "weight_decay": DECAY}, {"params": plain, "adapt": False}]
    lars = LARS(groups, lr=LR, momentum=MOMENTUM, skip_nonfinite=True)
    lars.attach_ema(state.targets, state.sources)
    return lambda: lars.step(ema_momentum=EMA if average else None)


def agree(build: Callable[[], State], average: bool) -> None:
    a, b = build(), build()
    ours(a, average)()
    rival(b, adapt_one_by_one, average_one_by_one if average else None)()
    pairs = [*zip(a.params, b.params, strict=True), *zip(a.targets, b.targets, strict=True)]
    for mine, theirs in pairs:
        torch.testing.assert_close(mine.data, theirs.data)


def main() -> int:
    parser = harness.parser("lars_step", __doc__)
    parser.add_argument("--backbones", nargs="+", default=["resnet50", "resnet10_tiny", "overhead"])
    parser.add_argument("--layout", choices=("contiguous", "channels_last"), default="channels_last")
    args = parser.parse_args()
    bench = harness.Bench("lars_step", args)
    operation = backends.OPERATIONS["lars_step_"]
    fused = {"fused": True}
    for backbone in args.backbones:
        for average in (False, True):
            state = State(backbone, bench)
            counter = torch.zeros((), dtype=torch.int64, device=bench.device)
            providers = {
                f"scrl_fast/{backend}": ours(state, average, backend)
                for backend in ("native", "triton")
                if not operation.failure(backend, args.device) and (backend, args.device) != ("triton", "cpu")
            }
            providers |= {
                "scrl_fast/skipping": ours(state, average, counter=counter),
                "scrl_fast/optimizer": optimizer(state, average),
                "torch/composite": rival(state, adapt_together, average_together if average else None, **fused),
                "torch/loops": rival(state, adapt_one_by_one, average_one_by_one if average else None),
            }
            numbers, averaged = state.numbers(), sum(t.numel() for t in state.targets) if average else 0
            bench.case(
                harness.case_name(f"{backbone}{'+ema' if average else ''}", tensors=len(state.params), numbers=numbers),
                providers,
                bytes=(28 * numbers + 8 * averaged) * bench.dtype.itemsize // 4,
                items=numbers,
                check=lambda b=backbone, a=average: agree(lambda: State(b, bench), a),
            )
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
