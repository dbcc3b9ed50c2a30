"""lars_step_: every backend against LARS written out in float64; steps that are skipped; wrong input."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from conftest import assert_as_accurate, guarded, implementations, num_threads
from tiny_lars_step import (
    ADAPT,
    COUNT,
    DECAY,
    DTYPES,
    TOLERANCE,
    Lists,
    assert_same_bits,
    dtypes,
    everywhere,
    plain_ratio,
)

from scrl_fast.ops import ema_update_, lars_step_

# ---- numbers ----


@everywhere
@dtypes
def test_matches_float64(device: str, backend: str, dtype: torch.dtype) -> None:
    start = Lists(dtype, device)
    exact, pytorch = start.exact(), start.copy().step("reference")
    with guarded(*start.written(), *start.grads) as inside:
        ours = start.copy()
        ours.params, ours.buffers = inside[:COUNT], inside[COUNT : 2 * COUNT]
        rest = iter(inside[2 * COUNT :])
        ours.targets = [None if t is None else next(rest) for t in start.targets]
        ours.grads = list(rest)
        ours.step(backend)
        for i, tensors in enumerate(zip(ours.written(), pytorch.written(), exact.written(), strict=True)):
            assert_as_accurate(*tensors, f"tensor {i}")
            torch.testing.assert_close(tensors[0].double(), tensors[2], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert all(torch.equal(a, b) for a, b in zip(ours.grads, start.grads, strict=True)), "a gradient was written"


@everywhere
def test_numbers_of_the_formula(device: str, backend: str) -> None:
    start = Lists(torch.float64, device)
    ours = start.copy().step(backend, lr=0.7, momentum=0.5, ema_momentum=0.2, trust_coefficient=0.02, eps=1.0)
    exact = start.exact(lr=0.7, momentum=0.5, ema_momentum=0.2, numbers={"trust": 0.02, "eps": 1.0})
    for a, b in zip(ours.written(), exact.written(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@everywhere
@pytest.mark.parametrize("zero", ["params", "grads"])
def test_a_norm_of_zero_gives_a_ratio_of_one(device: str, backend: str, zero: str) -> None:
    start = Lists(torch.float32, device)
    for tensor in getattr(start, zero):
        tensor.zero_()
    ours, exact = start.copy().step(backend, ema_targets=None), start.exact()
    for a, b in zip(ours.params, exact.params, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)


@everywhere
@pytest.mark.parametrize("scale, factor", [(0.25, 0.25), ("lr", 0.3)])
def test_plain_gradients_are_scaled(device: str, backend: str, scale: Any, factor: float) -> None:
    start = Lists(torch.float64, device)
    ours, exact = start.copy().step(backend, grad_scale=scale), start.exact(grad_scale=factor)
    for a, b in zip(ours.written(), exact.written(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@everywhere
def test_plain_tensors_step_as_torch_sgd(device: str, backend: str) -> None:
    start = Lists(torch.float32, device)
    ours = start.copy()
    theirs = [torch.nn.Parameter(p.clone()) for p in start.params]
    sgd = torch.optim.SGD(theirs, lr=0.3, momentum=0.9, weight_decay=0.01)
    for buffer in ours.buffers:
        buffer.zero_()
    for _ in range(3):
        for p, g in zip(theirs, start.grads, strict=True):
            p.grad = g.clone()
        sgd.step()
        ours.step(backend, weight_decay=0.01, adapt=False, ema_targets=None)
    for a, b in zip(ours.params, theirs, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-6, atol=1e-6)


@everywhere
@dtypes
def test_fused_average_has_the_bits_of_ema_update(device: str, backend: str, dtype: torch.dtype) -> None:
    fused = Lists(dtype, device)
    apart = fused.copy().step(backend, ema_targets=None)
    fused.step(backend, ema_momentum=0.97)
    with_target = [i for i, t in enumerate(apart.targets) if t is not None]
    ema_update_([apart.targets[i] for i in with_target], [apart.params[i] for i in with_target], 0.97, backend=backend)
    assert_same_bits(fused, apart)


@everywhere
def test_ema_momentum_one_keeps_targets(device: str, backend: str) -> None:
    start = Lists(torch.float32, device)
    ours = start.copy().step(backend, ema_momentum=1.0)
    for a, b in zip(ours.targets, start.targets, strict=True):
        assert a is b is None or torch.equal(a, b)


@everywhere
def test_a_list_may_mix_dtypes(device: str, backend: str) -> None:
    shapes = [(37,), (5, 5)] * len(DTYPES)
    mixed = Lists(torch.float32, device, shapes)
    for tensors in vars(mixed).values():
        tensors[:] = [None if t is None else t.to(dtype) for t, dtype in zip(tensors, DTYPES * 2, strict=True)]
    start = mixed.copy()
    mixed.step(backend, weight_decay=0.01, adapt=True)
    for dtype in DTYPES:
        alone = start.copy()
        for name, tensors in vars(alone).items():
            setattr(alone, name, [t for t, p in zip(tensors, start.params, strict=True) if p.dtype is dtype])
        alone.step(backend, weight_decay=0.01, adapt=True)
        same = [p for p in mixed.params if p.dtype is dtype]
        assert all(torch.equal(a, b) for a, b in zip(alone.params, same, strict=True))


@everywhere
def test_any_thread_count_gives_the_same_bits(device: str, backend: str) -> None:
    results = []
    for count in (1, 2, 3):
        with num_threads(count):
            results.append(Lists(torch.float32, device).step(backend))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@everywhere
def test_groups_of_tensors_change_nothing(device: str, backend: str) -> None:
    """Tensors that fit the caches together are measured, then updated; with a counter all are measured first."""
    group = 1 << 17 if backend == "native" else 1 << 9  # kGroup of csrc/cpu/lars_step.cpp: the group of one thread
    sizes = [5, group - 6, 1, 2 * group + 5, 0, 3, group - 2, 2, group + 1]
    start = Lists(torch.float32, device, [(size,) for size in sizes])
    steps = []
    for threads in (1, 2, 3) if backend == "native" else (1,):
        with num_threads(threads):
            steps.append(start.copy().step(backend))
            counter = torch.zeros(1, dtype=torch.int64, device=device)
            steps.append(start.copy().step(backend, skip_counter=counter))
        assert counter.item() == 0
    for ours, exact in zip(steps[0].written(), start.exact().written(), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    for other in steps[1:]:
        assert_same_bits(steps[0], other)


@everywhere
def test_norms_keep_small_terms_of_long_tensors(device: str, backend: str) -> None:
    size = 100_000 if backend == "triton" and device == "cpu" else 3_000_000  # interpreted: slow
    param = torch.full((size,), 0.25, device=device)
    param[0] = 1024.0  # a running float32 sum of squares would swallow the others'
    grad, buffer = torch.ones_like(param), torch.zeros_like(param)
    ratio = plain_ratio(param.double(), grad.double(), 0.5)
    lars_step_([param], [grad], [buffer], lr=0.0, weight_decay=0.5, backend=backend)
    assert buffer[1].item() == pytest.approx(ratio * (1 + 0.5 * 0.25), rel=1e-6)


# ---- numbers as tensors ----


@everywhere
@pytest.mark.parametrize("number", [torch.float32, torch.float64])
def test_numbers_may_be_tensors(device: str, backend: str, number: torch.dtype) -> None:
    values = {"lr": 0.25, "momentum": 0.5, "ema_momentum": 0.75}  # exact in float32
    tensors = {name: torch.tensor(value, dtype=number, device=device) for name, value in values.items()}
    by_number, by_tensor = Lists(torch.float64, device).step(backend, **values), Lists(torch.float64, device)
    by_tensor.step(backend, **tensors, grad_scale="lr")
    by_number = Lists(torch.float64, device).step(backend, **values, grad_scale="lr")
    for a, b in zip(by_number.written(), by_tensor.written(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@everywhere
def test_each_tensor_may_have_its_own_numbers(device: str, backend: str) -> None:
    numbers = {
        "lr": [0.125 * (i + 1) for i in range(COUNT)],
        "momentum": [0.25 * (i % 4) for i in range(COUNT)],
        "trust_coefficient": [0.001 * (i + 1) for i in range(COUNT)],
        "eps": [1e-8 * (i + 1) for i in range(COUNT)],
        "grad_scale": ["lr" if i % 4 == 2 else 0.5 * i for i in range(COUNT)],
    }
    together, tensors = Lists(torch.float64, device).step(backend, **numbers), Lists(torch.float64, device)
    as_tensors = [torch.tensor(v, device=device) if i % 2 else v for i, v in enumerate(numbers["lr"])]
    tensors.step(backend, **(numbers | {"lr": as_tensors}))
    apart = Lists(torch.float64, device)
    for i in range(COUNT):
        one = apart.copy()
        for name, values in vars(apart).items():
            setattr(one, name, [values[i]])
        own = {name: values[i] for name, values in numbers.items()}
        one.step(backend, **own, weight_decay=DECAY[i], adapt=ADAPT[i])
    for a, b, c in zip(together.written(), apart.written(), tensors.written(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(a, c, rtol=1e-13, atol=1e-13)


# ---- gradients that are not finite ----


@everywhere
@dtypes
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [(2, 0), (4, 84), (8, 40012)], ids=str)
def test_a_bad_gradient_changes_nothing_and_counts(
    device: str, backend: str, dtype: torch.dtype, bad: float, where: tuple[int, int]
) -> None:
    lists = Lists(dtype, device)
    lists.grads[where[0]].view(-1)[where[1]] = bad
    before, counter = lists.copy(), torch.tensor(3, device=device)
    lists.step(backend, skip_counter=counter)
    assert_same_bits(lists, before)
    assert counter.item() == 4


@everywhere
@pytest.mark.parametrize("dtype, shape", [(torch.int32, (1,)), (torch.int64, ())])
def test_a_good_step_with_a_counter_is_the_step_without(device: str, backend: str, dtype: Any, shape: Any) -> None:
    counter = torch.full(shape, 7, dtype=dtype, device=device)
    counted, plain = Lists(torch.float32, device), Lists(torch.float32, device)
    counted.grads[5].fill_(1e30)  # finite, though its square is not in float32
    plain.grads[5].fill_(1e30)
    counted.step(backend, skip_counter=counter)
    assert_same_bits(counted, plain.step(backend))
    assert counter.flatten().tolist() == [7]


@everywhere
def test_without_a_counter_a_bad_gradient_shows(device: str, backend: str) -> None:
    lists = Lists(torch.float32, device)
    lists.grads[4][0, 0] = float("nan")
    lists.step(backend)
    assert lists.params[4].isnan().all() and not lists.params[5].isnan().any()


# ---- wrong input ----

ONE = torch.ones(3)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"grads": [ONE, ONE]}, ValueError, "grads has 2 tensors, params has 1"),
    ({"grads": [torch.ones(4)]}, ValueError, "grads[0] has shape [4], params[0] has [3]"),
    ({"momentum_buffers": [ONE.double()]}, TypeError, "momentum_buffers[0] has dtype torch.float64, params[0] has"),
    ({"params": [ONE.int()]}, TypeError, "params[0] has dtype torch.int32"),
    ({"params": []}, ValueError, "grads has 1 tensors, params has 0"),
    ({"params": [None]}, TypeError, "params[0] must be a tensor, got NoneType"),
    ({"grads": [None]}, TypeError, "grads[0] must be a tensor, got NoneType"),
    ({"momentum_buffers": [None]}, TypeError, "momentum_buffers[0] must be a tensor, got NoneType"),
    ({"grads": [ONE.to("meta")]}, ValueError, "grads[0] is on meta, params[0] on cpu"),
    ({"ema_targets": [ONE]}, ValueError, "ema_momentum is needed with ema_targets"),
    ({"ema_targets": [], "ema_momentum": 0.5}, ValueError, "ema_targets has 0 tensors, params has 1"),
    ({"ema_targets": [torch.ones(2)], "ema_momentum": 0.5}, ValueError, "ema_targets[0] has shape [2]"),
    ({"ema_targets": [ONE], "ema_momentum": 1.1}, ValueError, "ema_momentum must be in [0, 1], got 1.1"),
    ({"lr": -0.1}, ValueError, "lr must be in [0, inf], got -0.1"),
    ({"lr": float("nan")}, ValueError, "lr must be in [0, inf], got nan"),
    ({"lr": [0.1, 0.1]}, ValueError, "lr has 2 values for 1 tensors"),
    ({"lr": torch.ones(2)}, ValueError, "lr must have one element, got shape [2]"),
    ({"lr": torch.ones((), device="meta")}, ValueError, "lr is on meta, params on cpu"),
    ({"momentum": "0.9"}, TypeError, "momentum must be a number, got '0.9'"),
    ({"weight_decay": -1e-6}, ValueError, "weight_decay must be in [0, inf], got -1e-06"),
    ({"trust_coefficient": [None]}, TypeError, "trust_coefficient must be a number, got None"),
    ({"eps": -1.0}, ValueError, "eps must be in [0, inf], got -1.0"),
    ({"adapt": [1]}, TypeError, "adapt must be True or False, got 1"),
    ({"grad_scale": "lr2"}, TypeError, "grad_scale must be a number, got 'lr2'"),
    ({"skip_counter": 0}, TypeError, "skip_counter must be an int32 or int64 tensor, got int"),
    ({"skip_counter": torch.zeros(())}, TypeError, "skip_counter must be an int32 or int64 tensor, got torch.float32"),
    ({"skip_counter": torch.zeros(2, dtype=torch.int64)}, ValueError, "skip_counter must have one element"),
]


@pytest.mark.parametrize("backend", [b.values[1] for b in implementations("lars_step_") if b.values[0] == "cpu"])
@pytest.mark.parametrize("wrong, error, message", WRONG, ids=[message for _, _, message in WRONG])
def test_wrong_input_is_named(backend: str, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    right: dict[str, Any] = {"params": [ONE], "grads": [ONE.clone()], "momentum_buffers": [ONE.clone()], "lr": 0.1}
    with pytest.raises(error, match=re.escape(message)):
        lars_step_(**(right | wrong), backend=backend)
    assert ONE.tolist() == [1.0] * 3, "memory was touched before the check"
