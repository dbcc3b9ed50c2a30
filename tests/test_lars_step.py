"""lars_step_: every backend against LARS written out in float64, in every layout, at every thread count."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from aot import GPUS, Kernel, compile_for_gpus, needs_compiler
from conftest import assert_as_accurate, guarded, implementations, num_threads
from torch import Tensor

from scrl_fast import _native
from scrl_fast.ops import ema_update_, lars_step_

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SHAPES = [(), (0,), (1,), (3,), (17, 5), (8, 3, 3, 3), (4, 0, 2), (16384,), (40013,)]
COUNT = len(SHAPES)
ADAPT = [True, True, False, True, True, True, True, False, True]
DECAY = [1e-2 * i for i in range(COUNT)]
everywhere = pytest.mark.parametrize("device, backend", implementations("lars_step_"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
needs_native = pytest.mark.skipif(bool(_native.load_failure("_cpu")), reason=_native.load_failure("_cpu"))


class Lists:
    """Parameters, gradients, buffers and targets (None for every third) of one step."""

    def __init__(
        self, dtype: torch.dtype, device: str = "cpu", shapes: Sequence[tuple[int, ...]] = tuple(SHAPES)
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(scale: float) -> list[Tensor]:
            values = [scale * torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
            return [value.to(device, dtype) for value in values]

        self.params, self.grads, self.buffers = draw(1), draw(0.1), draw(0.5)
        self.targets: list[Tensor | None] = [None if i % 3 == 2 else t for i, t in enumerate(draw(1))]

    def written(self) -> list[Tensor]:
        return [*self.params, *self.buffers, *(t for t in self.targets if t is not None)]

    def copy(self) -> Lists:
        other = object.__new__(Lists)
        for name, tensors in vars(self).items():
            setattr(other, name, [None if t is None else t.clone() for t in tensors])
        return other

    def step(self, backend: str | None = None, **options: Any) -> Lists:
        """This very object after a step."""
        options = {"lr": 0.3, "weight_decay": DECAY, "adapt": ADAPT, "ema_momentum": 0.9} | options
        options.setdefault("ema_targets", self.targets)
        lars_step_(self.params, self.grads, self.buffers, backend=backend, **options)
        return self

    def exact(self, lr: float = 0.3, momentum: float = 0.9, ema_momentum: float = 0.9, **other: Any) -> Lists:
        """A step in float64, tensor by tensor, on copies."""
        result = self.copy()
        for i in range(len(self.params)):
            p, g, b = (tensors[i].double() for tensors in (self.params, self.grads, self.buffers))
            if (other.get("adapt") or ADAPT)[i]:
                d = plain_ratio(p, g, DECAY[i], **other.get("numbers", {})) * (g + DECAY[i] * p)
            else:
                d = other.get("grad_scale", 1.0) * g + DECAY[i] * p
            result.buffers[i] = momentum * b + d
            result.params[i] = p - lr * result.buffers[i]
            if self.targets[i] is not None:
                rounded = result.params[i].to(self.params[i].dtype).double()
                result.targets[i] = ema_momentum * self.targets[i].double() + (1 - ema_momentum) * rounded
        return result


def plain_ratio(p: Tensor, g: Tensor, decay: float, trust: float = 1e-3, eps: float = 1e-8) -> float:
    p_norm, g_norm = p.square().sum().sqrt().item(), g.square().sum().sqrt().item()
    return 1.0 if p_norm == 0 or g_norm == 0 else trust * p_norm / (g_norm + decay * p_norm + eps)


def assert_same_bits(a: Lists, b: Lists) -> None:
    for ours, theirs in zip(a.written(), b.written(), strict=True):
        assert torch.equal(ours, theirs)


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
def test_compiles_without_graph_break() -> None:
    lists, eager = Lists(torch.float32), Lists(torch.float32)
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


# ---- GPUs that are not here ----

NUMBERS = ("lr", "momentum", "decay", "trust", "eps", "scale", "ema")
FLAGS = {"ADAPT": True, "BY_LR": False, "FIRST": True, "CHUNK": 16384, "BLOCK": 1024, "PARTIALS": 1024, "ALIGNED": True}
KERNELS = [
    kernel
    for like in ("*fp32", "*bf16")
    for kernel in (
        Kernel(
            "scrl_fast.kernels.lars_step:squares_of_chunk",
            {"table_ptr": "*i64", "like_ptr": like, "partials_ptr": "*fp64"},
            {"CHUNK": 16384, "BLOCK": 1024, "ALIGNED": True},
            divisible_by_16=("table_ptr", "like_ptr", "partials_ptr"),
        ),
        Kernel(
            "scrl_fast.kernels.lars_step:update_chunk",
            {"table_ptr": "*i64", "like_ptr": like, "partials_ptr": "*fp64", "all_partials_ptr": "*fp64"}
            | {"all_chunks": "i32", "counter_ptr": "*i64", "lr_ptr": "*fp32", "ema_ptr": "*fp64"}
            | {f"{name}_{half}": "fp32" for name in NUMBERS for half in ("high", "low")},
            {**FLAGS, "momentum_ptr": None, "WIDE": False, "TARGET": True},
            divisible_by_16=("table_ptr", "like_ptr", "partials_ptr"),
        ),
    )
]


@needs_compiler
def test_compiles_for_gpus_that_are_not_here() -> None:
    for kernel, gpu, made in compile_for_gpus(KERNELS):
        assert made.stack_bytes == 0 and made.registers <= 80, (kernel, GPUS[gpu], made)
        assert made.ptx.count("ld.global.v4") + made.ptx.count("ld.global.v2.b64") > 0, (kernel, "16 bytes a load")


# ---- wrong input ----

ONE = torch.ones(3)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"grads": [ONE, ONE]}, ValueError, "grads has 2 tensors, params has 1"),
    ({"grads": [torch.ones(4)]}, ValueError, "grads[0] has shape [4], params[0] has [3]"),
    ({"momentum_buffers": [ONE.double()]}, TypeError, "momentum_buffers[0] has dtype torch.float64, params[0] has"),
    ({"params": [ONE.int()]}, TypeError, "params[0] has dtype torch.int32"),
    ({"params": []}, ValueError, "grads has 1 tensors, params has 0"),
    ({"params": [None]}, TypeError, "params[0] must be a tensor, got NoneType"),
    ({"grads": [ONE.to("meta")]}, ValueError, "grads[0] is on meta, params[0] on cpu"),
    ({"ema_targets": [ONE]}, ValueError, "ema_momentum is needed with ema_targets"),
    ({"ema_targets": [], "ema_momentum": 0.5}, ValueError, "ema_targets has 0 tensors, params has 1"),
    ({"ema_targets": [torch.ones(2)], "ema_momentum": 0.5}, ValueError, "ema_targets[0] has shape [2]"),
    ({"ema_targets": [ONE], "ema_momentum": 1.1}, ValueError, "ema_momentum must be in [0, 1], got 1.1"),
    ({"lr": -0.1}, ValueError, "lr must be in [0, inf], got -0.1"),
    ({"lr": float("nan")}, ValueError, "lr must be in [0, inf], got nan"),
    ({"lr": [0.1, 0.1]}, ValueError, "lr has 2 values for 1 tensors"),
    ({"lr": torch.ones(2)}, ValueError, "lr must have one element, got shape [2]"),
    ({"lr": torch.ones((), device="meta")}, ValueError, "lr is on meta, the parameters are on cpu"),
    ({"momentum": "0.9"}, TypeError, "momentum must be a number, got str"),
    ({"weight_decay": -1e-6}, ValueError, "weight_decay must be in [0, inf], got -1e-06"),
    ({"trust_coefficient": [None]}, TypeError, "trust_coefficient must be a number, got NoneType"),
    ({"eps": -1.0}, ValueError, "eps must be in [0, inf], got -1.0"),
    ({"adapt": [1]}, TypeError, "adapt must be True or False, got 1"),
    ({"grad_scale": "lr2"}, TypeError, "grad_scale must be a number, got str"),
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
