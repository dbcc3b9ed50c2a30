"""ema_update_: every backend against float64, in every layout, at every thread count."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
from aot import GPUS, Kernel, compile_for_gpus, needs_compiler
from conftest import assert_as_accurate, guarded, implementations, num_threads
from torch import Tensor

from scrl_fast.ops import _native, ema_update_
from scrl_fast.ops._tensor_lists import call_on_flat

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (0,), (1,), (3,), (17, 5), (8, 3, 3, 3), (4, 0, 2), (16384,), (40013,)]
MOMENTA = [0.0, 0.03, 0.5, 0.97, 0.9996]
everywhere = pytest.mark.parametrize("device, backend", implementations("ema_update_"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
needs_native = pytest.mark.skipif(bool(_native.load_failure("_cpu")), reason=_native.load_failure("_cpu"))


def randoms(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


def expected(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float) -> list[Tensor]:
    """In float64, and not by lerp."""
    return [momentum * t.double() + (1 - momentum) * s.double() for t, s in zip(targets, sources, strict=True)]


# ---- numbers ----


@everywhere
@dtypes
@pytest.mark.parametrize("momentum", MOMENTA)
def test_matches_float64(device: str, backend: str, dtype: torch.dtype, momentum: float) -> None:
    targets, sources = randoms(SHAPES, dtype, device), randoms(SHAPES, dtype, device, seed=1)
    exact, pytorch = expected(targets, sources, momentum), clones(targets)
    torch._foreach_lerp_(pytorch, sources, 1 - momentum)
    with guarded(*targets, *sources) as inside:
        ours = inside[: len(targets)]
        ema_update_(ours, inside[len(targets) :], momentum, backend=backend)
        for i in range(len(SHAPES)):
            assert_as_accurate(ours[i], pytorch[i], exact[i], f"target {i}")


@everywhere
@dtypes
@pytest.mark.parametrize("number", [torch.float32, torch.float64])
def test_momentum_may_be_a_tensor(device: str, backend: str, dtype: torch.dtype, number: torch.dtype) -> None:
    targets, sources = randoms(SHAPES, dtype, device), randoms(SHAPES, dtype, device, seed=1)
    by_number, by_tensor = clones(targets), clones(targets)
    momentum = torch.tensor(0.9375, dtype=number, device=device)  # exact in both
    ema_update_(by_number, sources, 0.9375, backend=backend)
    ema_update_(by_tensor, sources, momentum, backend=backend)
    for a, b in zip(by_number, by_tensor, strict=True):
        torch.testing.assert_close(
            a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-7 if dtype != torch.float64 else 1e-15
        )


@everywhere
@pytest.mark.parametrize("momentum", [1, 1.0, torch.tensor(1.0)], ids=str)
def test_momentum_one_keeps_targets_whatever_the_sources_hold(device: str, backend: str, momentum: float) -> None:
    targets = randoms(SHAPES, torch.float32, device)
    sources = [torch.full_like(t, float("nan")) for t in targets]
    before = clones(targets)
    ema_update_(targets, sources, momentum, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(targets, before, strict=True))


@everywhere
def test_momentum_zero_copies_bit_for_bit(device: str, backend: str) -> None:
    targets, sources = randoms(SHAPES, torch.float32, device), randoms(SHAPES, torch.float32, device, seed=1)
    ema_update_(targets, sources, 0.0, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(targets, sources, strict=True))


@everywhere
def test_a_list_may_mix_dtypes(device: str, backend: str) -> None:
    targets = [randoms([(37,)], dtype, device)[0] for dtype in DTYPES * 2]
    sources = [randoms([(37,)], dtype, device, seed=1)[0] for dtype in DTYPES * 2]
    exact, pytorch = expected(targets, sources, 0.9), clones(targets)
    torch._foreach_lerp_(pytorch, sources, 0.1)
    ema_update_(targets, sources, 0.9, backend=backend)
    for i in range(len(targets)):
        assert_as_accurate(targets[i], pytorch[i], exact[i], f"target {i}")


@everywhere
def test_any_thread_count_gives_the_same_bits(device: str, backend: str) -> None:
    targets, sources = randoms([(100_003,), (5,), (70_000,)], torch.float32, device), []
    sources = randoms([(100_003,), (5,), (70_000,)], torch.float32, device, seed=1)
    results = []
    for count in (1, 2, 3):
        ours = clones(targets)
        with num_threads(count):
            ema_update_(ours, sources, 0.9, backend=backend)
        results.append(ours)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- layouts ----

LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "gaps": lambda t: torch.stack([t, t + 1], dim=-1)[..., 0],
    "offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),  # not on a vector's boundary
}


@everywhere
@pytest.mark.parametrize("target_layout", LAYOUTS)
@pytest.mark.parametrize("source_layout", LAYOUTS)
def test_layouts(device: str, backend: str, target_layout: str, source_layout: str) -> None:
    shapes = [(6, 5, 3, 3), (4, 1, 3, 1), (2, 3, 1, 1)]
    targets, sources = randoms(shapes, torch.float32, device), randoms(shapes, torch.float32, device, seed=1)
    plain = clones(targets)
    ema_update_(plain, sources, 0.9, backend=backend)
    laid = [LAYOUTS[target_layout](t) for t in targets] + [LAYOUTS[source_layout](s) for s in sources]
    with guarded(*laid) as inside:
        strides = [t.stride() for t in inside]
        ema_update_(inside[:3], inside[3:], 0.9, backend=backend)
        assert [t.stride() for t in inside] == strides
        for ours, alike in zip(inside[:3], plain, strict=True):
            torch.testing.assert_close(ours, alike, rtol=1e-6, atol=1e-7)
        assert all(torch.equal(a, b) for a, b in zip(inside[3:], sources, strict=True)), "a source was written"


@everywhere
def test_empty_tensors_may_lie_in_any_way(device: str, backend: str) -> None:
    target, source = torch.zeros(3, device=device), torch.ones(3, device=device)
    targets = [torch.empty(4, 0, 2, device=device), torch.empty(4, 0, 3, 3, device=device)]
    sources = [
        torch.empty(2, 0, 4, device=device).transpose(0, 2),
        targets[1].contiguous(memory_format=torch.channels_last),
    ]
    assert all(t.stride() != s.stride() for t, s in zip(targets, sources, strict=True))
    ema_update_([*targets, target], [*sources, source], 0.5, backend=backend)
    assert target.tolist() == [0.5] * 3


def test_a_failure_after_writing_is_raised_and_not_run_again() -> None:
    """Only lists that lie differently are tried twice: the first try has refused them before it wrote."""
    tried = []

    def fails(targets, sources) -> None:
        tried.append([t.add_(1) for t in targets])
        raise RuntimeError("out of memory")

    target, source = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="out of memory"):
        call_on_flat(fails, {"targets": [target]}, {"sources": [source]}, checks_itself=True)
    assert len(tried) == 1 and torch.equal(target, source)


# ---- as PyTorch expects of an operation ----


@everywhere
def test_empty_lists_and_tuples(device: str, backend: str) -> None:
    ema_update_([], [], 0.5, backend=backend)
    target, source = torch.zeros(3, device=device), torch.ones(3, device=device)
    ema_update_((target,), (source,), 0.5, backend=backend)
    assert target.tolist() == [0.5] * 3


@everywhere
def test_parameters_are_updated_without_a_graph_and_autograd_is_told(device: str, backend: str) -> None:
    target = torch.nn.Parameter(torch.zeros(3, device=device))
    source = torch.nn.Parameter(torch.ones(3, device=device))
    version = target._version
    ema_update_([target], [source], 0.5, backend=backend)
    assert target.is_leaf and target.grad_fn is None and target._version > version
    used = torch.ones(3, device=device, requires_grad=True)
    product = used * target
    ema_update_([target], [source], 0.5, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


OPERATORS = {"native": "ema_update_", "triton": "ema_update_triton_"}


@everywhere
def test_opcheck(device: str, backend: str) -> None:
    if backend == "reference":
        return  # plain PyTorch, no operator of ours
    operator = getattr(torch.ops.scrl_fast, OPERATORS[backend])
    targets, sources = (randoms(SHAPES[:5], torch.float32, device, seed) for seed in (0, 1))
    torch.library.opcheck(operator, (targets, sources, 0.9))
    torch.library.opcheck(operator, (targets, sources, 1.0, torch.tensor(0.9, device=device)))


@needs_native
def test_compiles_without_graph_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # torch 2.11 traces no allocation through what poisons it
    targets, sources = randoms(SHAPES[:6], torch.float32), randoms(SHAPES[:6], torch.float32, seed=1)
    sources[5] = LAYOUTS["channels_last"](sources[5])
    targets[4] = LAYOUTS["gaps"](targets[4])
    eager = clones(targets)
    ema_update_(eager, sources, 0.9)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def update(targets: list[Tensor], sources: list[Tensor]) -> None:
        ema_update_(targets, sources, 0.9)

    update(targets, sources)
    assert all(torch.equal(a, b) for a, b in zip(targets, eager, strict=True))


# ---- GPUs that are not here ----

POINTERS = {"table_ptr": "*i64", "momentum_high": "fp32", "momentum_low": "fp32"}
SIZES = {"WIDE": False, "CHUNK": 8192, "BLOCK": 1024}
KERNELS = [
    Kernel(
        "scrl_fast.kernels.ema_update:ema_chunk",
        {**POINTERS, "like_ptr": like, **({"momentum_ptr": momentum} if momentum else {})},
        {"WIDE": False, "CHUNK": 8192, "BLOCK": 1024, "ALIGNED": aligned}
        | ({} if momentum else {"momentum_ptr": None}),
        divisible_by_16=("table_ptr", "like_ptr"),
    )
    for like, momentum, aligned in [("*fp32", None, True), ("*bf16", "*fp32", True), ("*fp32", None, False)]
]


@needs_compiler
def test_compiles_for_gpus_that_are_not_here() -> None:
    for kernel, gpu, made in compile_for_gpus(KERNELS):
        assert made.stack_bytes == 0 and made.registers <= 48, (kernel, GPUS[gpu], made)
        whole = made.ptx.count("ld.global.v4") + made.ptx.count("ld.global.v2.b64")
        assert (whole > 0) == kernel.constexprs["ALIGNED"], (kernel, GPUS[gpu], "16 bytes a load")


# ---- wrong input ----

ONE = torch.ones(3)
WRONG = [
    (([ONE], [ONE, ONE], 0.5), ValueError, "sources has 2 tensors, targets has 1"),
    (([], [ONE], 0.5), ValueError, "sources has 1 tensors, targets has 0"),
    (([ONE, ONE], [ONE, torch.ones(4)], 0.5), ValueError, "sources[1] has shape [4], targets[1] has [3]"),
    (([ONE], [ONE.double()], 0.5), TypeError, "sources[0] has dtype torch.float64, targets[0] has torch.float32"),
    (([ONE.int()], [ONE.int()], 0.5), TypeError, "targets[0] has dtype torch.int32"),
    (([ONE], [3.0], 0.5), TypeError, "sources[0] must be a tensor, got float"),
    (([ONE, ONE], [ONE, None], 0.5), TypeError, "sources[1] must be a tensor, got NoneType"),
    (([3.0], [ONE], 0.5), TypeError, "targets[0] must be a tensor, got float"),
    (([ONE], [ONE.to("meta")], 0.5), ValueError, "sources[0] is on meta, targets[0] on cpu"),
    (([ONE, ONE.to("meta")], [ONE, ONE.to("meta")], 0.5), ValueError, "targets[1] is on meta, targets[0] on cpu"),
    (([ONE], [ONE], 1.5), ValueError, "momentum must be in [0, 1], got 1.5"),
    (([ONE], [ONE], -0.1), ValueError, "momentum must be in [0, 1], got -0.1"),
    (([ONE], [ONE], float("nan")), ValueError, "momentum must be in [0, 1], got nan"),
    (([ONE], [ONE], "0.5"), TypeError, "momentum must be a number, got '0.5'"),
    (([ONE], [ONE], torch.ones(2)), ValueError, "momentum must have one element, got shape [2]"),
    (([ONE], [ONE], torch.tensor(1)), TypeError, "momentum must be a float tensor, got torch.int64"),
]


@pytest.mark.parametrize("backend", [b.values[1] for b in implementations("ema_update_") if b.values[0] == "cpu"])
@pytest.mark.parametrize("arguments, error, message", WRONG, ids=[message for _, _, message in WRONG])
def test_wrong_input_is_named(backend: str, arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ema_update_(*arguments, backend=backend)
    assert ONE.tolist() == [1.0] * 3, "memory was touched before the check"
