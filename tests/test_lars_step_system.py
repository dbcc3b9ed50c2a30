"""lars_step_ inside PyTorch: tensors in any layout, autograd's version counters, tracing, the operator's own checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import guarded
from tiny_lars_step import ADAPT, DECAY, SHAPES, Lists, assert_same_bits, everywhere

from scrl_fast.ops import _native, lars_step_

needs_native = pytest.mark.skipif(bool(_native.load_failure("_cpu")), reason=_native.load_failure("_cpu"))

# ---- layouts ----

LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "gaps": lambda t: torch.stack([t, t + 1], dim=-1)[..., 0],
    "offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}
MIXTURES = [
    ("contiguous",) * 4,
    ("channels_last",) * 4,
    ("offset",) * 4,
    ("channels_last", "contiguous", "channels_last", "channels_last"),
    ("channels_last", "channels_last", "contiguous", "contiguous"),
    ("contiguous", "gaps", "offset", "channels_last"),
    ("gaps", "contiguous", "channels_last", "gaps"),
    ("contiguous", "contiguous", "contiguous", "gaps"),
]


@everywhere
@pytest.mark.parametrize("layouts", MIXTURES, ids="-".join)
@pytest.mark.parametrize("bad", [False, True], ids=["good", "skipped"])
def test_layouts(device: str, backend: str, layouts: tuple[str, ...], bad: bool) -> None:
    """layouts: of parameters, gradients, buffers and targets."""
    shapes = [(6, 5, 3, 3), (4, 1, 3, 1), (2, 3, 1, 1), (3, 4, 5, 2)]
    plain = Lists(torch.float32, device, shapes)
    if bad:
        plain.grads[3][0, 0, 0, 0] = float("nan")
    tensors = [plain.params, plain.grads, plain.buffers, plain.targets]
    laid = [LAYOUTS[how](t.clone()) for how, ts in zip(layouts, tensors, strict=True) for t in ts if t is not None]
    options = {"weight_decay": 0.1, "adapt": True}
    plain.step(backend, **options, skip_counter=torch.zeros((), dtype=torch.int64, device=device))
    with guarded(*laid) as inside:
        rest, ours = iter(inside), plain.copy()
        for name, ts in zip(("params", "grads", "buffers", "targets"), tensors, strict=True):
            setattr(ours, name, [None if t is None else next(rest) for t in ts])
        strides = [t.stride() for t in inside]
        ours.step(backend, **options, skip_counter=torch.zeros((), dtype=torch.int64, device=device))
        assert [t.stride() for t in inside] == strides
        for a, b in zip(ours.written(), plain.written(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# ---- as PyTorch expects of an operation ----


@everywhere
def test_no_tensors_and_only_empty_tensors(device: str, backend: str) -> None:
    counter = torch.zeros((), dtype=torch.int64, device=device)
    lars_step_([], [], [], lr=0.1, skip_counter=counter, backend=backend)
    empty = [torch.zeros(0, 3, device=device) for _ in range(4)]
    lars_step_(
        *([e] for e in empty[:3]),
        lr=0.1,
        ema_targets=empty[3:],
        ema_momentum=0.5,
        skip_counter=counter,
        backend=backend,
    )
    assert counter.item() == 0


@everywhere
def test_empty_tensors_may_lie_in_any_way(device: str, backend: str) -> None:
    lists = Lists(torch.float32, device, [(3,), (4, 0, 3, 3), (4, 0, 2), (3, 0, 2, 2)])
    lists.grads[1], lists.targets[3] = (LAYOUTS["channels_last"](t) for t in (lists.grads[1], lists.targets[3]))
    lists.buffers[2] = torch.empty(2, 0, 4, device=device).transpose(0, 2)
    assert lists.buffers[2].stride() != lists.params[2].stride()
    alone = Lists(torch.float32, device, [(3,)]).step(backend, weight_decay=0.1, adapt=True)
    lists.step(backend, weight_decay=0.1, adapt=True)
    assert torch.equal(lists.params[0], alone.params[0]) and torch.equal(lists.targets[0], alone.targets[0])


@everywhere
def test_parameters_are_updated_without_a_graph_and_autograd_is_told(device: str, backend: str) -> None:
    param, grad, buffer = (torch.ones(3, device=device) for _ in range(3))
    param.requires_grad_()
    versions = param._version, buffer._version, grad._version
    lars_step_([param], [grad], [buffer], lr=0.1, backend=backend)
    assert param.is_leaf and param.grad_fn is None
    assert param._version > versions[0] and buffer._version > versions[1] and grad._version == versions[2]


OPERATORS = {"native": "lars_step_", "triton": "lars_step_triton_"}


@everywhere
def test_opcheck(device: str, backend: str) -> None:
    if backend == "reference":
        return  # plain PyTorch, no operator of ours
    operator = getattr(torch.ops.scrl_fast, OPERATORS[backend])
    lists = Lists(torch.float32, device, shapes=SHAPES[:5])
    targets = [t for t in lists.targets if t is not None]
    places = [i for i, t in enumerate(lists.targets) if t is not None]
    rows = [0.1, 0.9, 1e-4, 1e-3, 1e-8, 1.0, 1.0, 0.2, 0.9, 0.0, 1e-3, 1e-8, 1.0, 2.0]
    arguments = (lists.params, lists.buffers, targets, lists.grads, places, rows, [0, 1, 0, 1, 0], 0.9)
    torch.library.opcheck(operator, (*arguments, None, None, None, None))
    numbers = [torch.tensor(value, device=device) for value in ([0.5, 0.25], 0.5, 0.5, 0)]
    torch.library.opcheck(operator, (*arguments, *numbers))


@needs_native
def test_compiles_without_graph_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # torch 2.11 traces no allocation through what poisons it
    lists, eager = Lists(torch.float32), Lists(torch.float32)
    for one in (lists, eager):
        one.grads[5] = LAYOUTS["channels_last"](one.grads[5])
        one.buffers[4] = LAYOUTS["gaps"](one.buffers[4])
    eager.step()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(params: Any, grads: Any, buffers: Any, targets: Any) -> None:
        numbers = {"lr": 0.3, "weight_decay": DECAY, "adapt": ADAPT}
        lars_step_(params, grads, buffers, **numbers, ema_targets=targets, ema_momentum=0.9)

    step(lists.params, lists.grads, lists.buffers, lists.targets)
    assert_same_bits(lists, eager)


@needs_native
@pytest.mark.parametrize(
    "places, settings, rows",
    [([9], 7, [0]), ([-1], 7, [0]), ([0], 7, [1]), ([0], 0, [0]), ([0], 7, [-1]), ([], 7, [0])],
)
def test_native_checks_its_indices(places: list[int], settings: int, rows: list[int]) -> None:
    """Calls that bypass the public function must not reach memory beside the lists."""
    one = [torch.ones(3)]
    with pytest.raises(RuntimeError, match="lars_step_"):
        torch.ops.scrl_fast.lars_step_(
            one, [torch.ones(3)], [torch.ones(3)], one, places, [0.1] * settings, rows, 0.5, None, None, None, None
        )
