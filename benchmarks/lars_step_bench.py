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

from scrl_fast.models import SCRL
from scrl_fast.ops import backends, lars_step_
from scrl_fast.optim import LARS

LR, MOMENTUM, DECAY, TRUST, EPS, EMA = 1e-6, 0.9, 1e-6, 1e-3, 1e-8, 0.97
LR_TO_SEE = 100.0  # of the check: a step then moves weights by a tenth, more than any dtype's rounding


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
    """Parameters, gradients, buffers and targets of one contender.

    steady: gradients as long as the LARS ratio makes them, so that it is about 1. The rivals scale gradients in place,
    as published implementations do; calls without a backward pass between them then leave the numbers' size alone.
    """

    def __init__(self, backbone: str, bench: harness.Bench, lr: float = LR, *, steady: bool = True) -> None:
        self.lr = lr
        model: Any = copy.deepcopy(network(backbone)).to(bench.device, bench.dtype)
        torch.manual_seed(0)
        if bench.args.layout == "channels_last":
            model = model.to(memory_format=torch.channels_last)
        self.params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        for p in self.params:
            p.grad = torch.randn_like(p) * 1e-3
            if steady and p.ndim > 1:
                p.grad.mul_(TRUST * p.detach().norm() / p.grad.norm())
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


def rival(state: State, adapt: Callable, average: Callable | None, **options: bool) -> Callable[[], Any]:
    sgd = torch.optim.SGD(state.params, state.lr, MOMENTUM, **options)

    def step() -> torch.optim.Optimizer:
        adapt(state)
        sgd.step()
        if average:
            average(state)
        return sgd

    return step


def ours(state: State, average: bool, backend: str | None = None, counter: Tensor | None = None) -> Callable[[], None]:
    options = {"ema_targets": state.target_list, "ema_momentum": EMA} if average else {}
    numbers = {"lr": state.lr, "momentum": MOMENTUM, "weight_decay": state.decay, "adapt": state.adapt}

    def step() -> None:
        lars_step_(
            *(state.params, state.grads, state.buffers), **numbers, **options, skip_counter=counter, backend=backend
        )

    return step


def optimizer(state: State, average: bool) -> Callable[[], Any]:
    pairs = list(zip(state.params, state.adapt, strict=True))
    adapted, plain = [p for p, a in pairs if a], [p for p, a in pairs if not a]
    groups = [{"params": adapted, "weight_decay": DECAY}, {"params": plain, "adapt": False}]
    lars = LARS(groups, lr=state.lr, momentum=MOMENTUM, skip_nonfinite=True)
    lars.attach_ema(state.targets, state.sources)

    def step() -> torch.optim.Optimizer:
        lars.step(ema_momentum=EMA if average else None)
        return lars

    return step


def contenders(state: State, average: bool, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Every provider; those with an optimizer return it."""
    operation = backends.OPERATIONS["lars_step_"]
    forms = [name for name in ("native", "triton") if not operation.failure(name, device.type)]
    forms = [name for name in forms if (name, device.type) != ("triton", "cpu")]
    together, one_by_one = (average_together, average_one_by_one) if average else (None, None)
    counter = torch.zeros((), dtype=torch.int64, device=device)
    return {f"scrl_fast/{name}": ours(state, average, name) for name in forms} | {
        "scrl_fast/skipping": ours(state, average, counter=counter),
        "scrl_fast/optimizer": optimizer(state, average),
        "torch/composite": rival(state, adapt_together, together, fused=True),
        "torch/loops": rival(state, adapt_one_by_one, one_by_one),
    }


@torch.no_grad()
def expected(state: State, average: bool) -> list[list[Tensor | None]]:
    """Parameters, momentum buffers and targets after two steps with the same gradients, in float64."""
    results = []
    for p, g, t, adapt in zip(state.params, state.grads, state.target_list, state.adapt, strict=True):
        p, g, t = p.double(), g.double(), None if t is None else t.double()
        buffer = torch.zeros_like(p)
        for _ in range(2):
            ratio = TRUST * p.norm() / (g.norm() + DECAY * p.norm() + EPS) if adapt and p.norm() * g.norm() else 1.0
            buffer = MOMENTUM * buffer + ratio * (g + (DECAY * p if adapt else 0))
            p = p - state.lr * buffer
            if average and t is not None:
                t = EMA * t + (1 - EMA) * p
        results.append([p, buffer, t])
    return [list(column) for column in zip(*results, strict=True)]


def agree(name: str, build: Callable[[], State], average: bool, bench: harness.Bench) -> None:
    """One provider, two steps: parameters, momentum buffers and targets, each by its relative distance."""
    exact = expected(build(), average)
    # PyTorch sums the squares of millions of numbers in float32, which costs it a digit
    wide = 2e-4 if name.startswith("torch") else 2e-5
    tolerance = 8 * torch.finfo(bench.dtype).eps if bench.dtype.itemsize == 2 else wide
    state = build()
    step = contenders(state, average, bench.device)[name]
    grads = [g.clone() for g in state.grads]
    step()
    torch._foreach_copy_(state.grads, grads)
    made = step()
    buffers = state.buffers if made is None else [made.state[p]["momentum_buffer"] for p in state.params]
    for what, mine, theirs in zip(
        ("param", "buffer", "target"), (state.params, buffers, state.target_list), exact, strict=True
    ):
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            # a single number may come near zero by chance, which rounding in 16 bits cannot follow
            least = 0.5 if what != "buffer" and a is not None and a.numel() == 1 else 1e-30
            distance = 0 if a is None else float((a.detach().double() - b).norm() / b.norm().clamp_min(least))
            if not distance <= tolerance * (4 if a is not None and a.numel() == 1 else 1):
                raise AssertionError(f"{what} {i} is off by {distance:.1e}, more than {tolerance:.1e}")


def main() -> int:
    parser = harness.parser("lars_step", __doc__)
    parser.add_argument("--backbones", nargs="+", default=["resnet50", "resnet10_tiny", "overhead"])
    parser.add_argument("--layout", choices=("contiguous", "channels_last"), default="channels_last")
    args = parser.parse_args()
    bench = harness.Bench("lars_step", args)
    for backbone in args.backbones:
        for average in (False, True):
            state = State(backbone, bench)
            numbers, averaged = state.numbers(), sum(t.numel() for t in state.targets) if average else 0
            bench.case(
                harness.case_name(f"{backbone}{'+ema' if average else ''}", tensors=len(state.params), numbers=numbers),
                contenders(state, average, bench.device),
                bytes=(28 * numbers + 8 * averaged) * bench.dtype.itemsize // 4,
                items=numbers,
                check_each=lambda name, b=backbone, a=average: agree(
                    name, lambda: State(b, bench, LR_TO_SEE, steady=False), a, bench
                ),
                wall=backbone == "overhead",
            )
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
