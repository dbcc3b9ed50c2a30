"""BatchNorm [+ residual] [+ ReLU] as one operation: every backend against float64, layouts, edge batches, errors."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_accurate, guarded, implementations, num_threads, poisoned_allocator
from torch import Tensor, nn

from scrl_fast.ops import _native, batch_norm_act

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# short rows, a tail of channels, rows without a map; then long rows, more rows than one block of the CPU's form, one
# image: for these the interpreter would take minutes
SHAPES = [(3, 24, 4, 5), (2, 5, 3, 3), (37, 130), (2, 160, 5, 3), (2, 6, 90, 85), (1, 16, 2, 3)]
FEW = SHAPES[:3]
everywhere = pytest.mark.parametrize("device, backend", implementations("batch_norm_act"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def maps(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    """Values of a spread of 2 about a mean of 1, each channel about another; channels_last."""
    generator = torch.Generator().manual_seed(seed)
    values = 2 * torch.randn(shape, generator=generator, dtype=torch.float64) + 1
    values += torch.randn(shape[1], generator=generator, dtype=torch.float64).view([1, -1] + [1] * (len(shape) - 2))
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return values.to(device, dtype).contiguous(memory_format=layout).requires_grad_()


def affine(channels: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Weight and bias, in float32 beside 16 bits as autocast leaves them."""
    generator = torch.Generator().manual_seed(5)
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = torch.randn(2, channels, generator=generator).to(device, wide)
    return (weight + 1.5).requires_grad_(), bias.requires_grad_()


def plain(x: Tensor, w: Tensor | None, b: Tensor | None, z: Tensor | None, open_gates: Tensor | None) -> Tensor:
    """As PyTorch's users write it; ``open_gates`` in place of the ReLU, whose gradient jumps where rounding decides."""
    y = F.batch_norm(x, None, None, w, b, True, 0.1, 1e-5)
    y = y if z is None else y + z
    return y if open_gates is None else y * open_gates


def results(output: Tensor, inputs: list[Tensor], dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Output and gradients for a cotangent that ``dtype`` (output's by default) holds."""
    generator = torch.Generator().manual_seed(9)
    cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(dtype or output.dtype)
    cotangent = cotangent.to(output.device, output.dtype)
    return output, *torch.autograd.grad(output, inputs, cotangent)


@everywhere
@dtypes
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_matches_float64(device: str, backend: str, dtype: torch.dtype, with_residual: bool, relu: bool) -> None:
    interpreted = backend == "triton" and device == "cpu"
    for shape in FEW if interpreted else SHAPES:
        matches_float64(shape, dtype, device, backend, with_residual, relu)


def matches_float64(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, backend: str, with_residual: bool, relu: bool
) -> None:
    x, (w, b) = maps(shape, dtype, device), affine(shape[1], device, dtype)
    z = maps(shape, dtype, device, seed=1) if with_residual else None
    inputs = [each for each in (x, w, b, z) if each is not None]
    ours = results(batch_norm_act(x, w, b, z, relu=relu, backend=backend), inputs)
    gates = (ours[0] > 0).detach() if relu else None
    pytorch = results(plain(x, w, b, z, gates), inputs)
    wide = [each.detach().double().requires_grad_() for each in inputs]
    exact = results(plain(*wide[:3], wide[3] if with_residual else None, gates), wide, dtype)
    names = ("output", "gradient of input", "gradient of weight", "gradient of bias", "gradient of residual")
    for name, *values in zip(names[: len(ours)], ours, pytorch, exact, strict=True):
        assert_as_accurate(*values, f"{name} of {shape}")
    assert ours[0].stride() == x.stride()
    if relu:  # the gates themselves
        unclipped = plain(*wide[:3], wide[3] if with_residual else None, None)
        doubtful = unclipped.abs() <= 32 * torch.finfo(dtype).eps
        assert ((ours[0] > 0) == (unclipped > 0))[~doubtful].all()


@everywhere
def test_a_mean_far_from_zero_costs_no_digits(device: str, backend: str) -> None:
    shape = (4, 24, 20, 20)
    x = (maps(shape, torch.float64, device).detach() * 1e-2 + 1000).float().requires_grad_()
    w, b = affine(24, device)
    wide = [each.detach().double().requires_grad_() for each in (x, w, b)]
    ours = results(batch_norm_act(x, w, b, relu=False, backend=backend), [x, w, b])
    exact = results(plain(*wide, None, None), wide)
    for made, expected in zip(ours, exact, strict=True):
        error = (made.double() - expected).abs().max() / expected.abs().max()
        assert error < 2e-3  # 1000 in float32 has a spacing of 6e-5, beside a spread of 0.02


@everywhere
@pytest.mark.parametrize("shape", [(3, 6, 4, 4), (9, 6)], ids=["map", "rows"])
def test_running_statistics_and_eval_are_those_of_batchnorm(device: str, backend: str, shape: tuple[int, ...]) -> None:
    norm = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(6, momentum=0.3).to(device)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2), norm.bias.uniform_(-1, 1)
    ours = copy.deepcopy(norm)
    keep = {"running_mean": ours.running_mean, "running_var": ours.running_var, "momentum": 0.3, "backend": backend}
    for seed in range(3):
        x = maps(shape, device=device, seed=seed).detach()
        torch.testing.assert_close(batch_norm_act(x, ours.weight, ours.bias, relu=False, **keep), norm(x))
    torch.testing.assert_close(ours.running_mean, norm.running_mean)
    torch.testing.assert_close(ours.running_var, norm.running_var)
    before = ours.running_mean.clone()
    x, twin = maps(shape, device=device, seed=7), maps(shape, device=device, seed=7)
    made = results(batch_norm_act(x, ours.weight, ours.bias, training=False, **keep), [x, ours.weight, ours.bias])
    expected = results(torch.relu(norm.eval()(twin)), [twin, norm.weight, norm.bias])
    for one, other in zip(made, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(before, ours.running_mean)


@everywhere
@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (0, 6), (2, 6, 0, 3)], ids=["images", "rows", "height"])
def test_a_batch_without_rows(device: str, backend: str, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, device=device).to(
        memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format
    )
    x.requires_grad_()
    w, b = affine(6, device)
    mean, var = torch.zeros(6, device=device), torch.ones(6, device=device)
    y = batch_norm_act(x, w, b, running_mean=mean, running_var=var, backend=backend)
    grads = torch.autograd.grad(y.sum(), [x, w, b])
    assert y.shape == x.shape and not mean.any() and (var == 1).all()
    assert not any(grad.any() for grad in grads) and grads[0].shape == x.shape


@everywhere
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter
def test_nan_and_infinity_reach_their_channel_alone(device: str, backend: str) -> None:
    for bad in (float("nan"), float("inf")):
        x = maps((2, 8, 3, 3), device=device).detach()
        x[1, 3, 0, 2] = bad
        y = batch_norm_act(x, backend=backend)
        assert y[:, 3].isnan().any() and not y[:, [0, 1, 2, 4, 5, 6, 7]].isnan().any()


@everywhere
@pytest.mark.parametrize("case", ["contiguous", "sliced", "three axes", "five axes"])
def test_other_layouts_are_taken(device: str, backend: str, case: str) -> None:
    x = maps((4, 8, 6, 6), device=device).detach()
    x = {
        "contiguous": x.contiguous(),
        "sliced": x[:, :, ::2, 1:5],
        "three axes": x[..., 0],
        "five axes": x.reshape(4, 8, 6, 3, 2),
    }[case].requires_grad_()
    y = batch_norm_act(x, backend=backend)
    expected = torch.relu(F.batch_norm(x, None, None, None, None, True))
    torch.testing.assert_close(y, expected)
    grads = [torch.autograd.grad(each.square().sum(), x)[0] for each in (y, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@everywhere
@dtypes
def test_reads_and_writes_nothing_beside_its_map(
    device: str, backend: str, dtype: torch.dtype, guarded_outputs: None
) -> None:
    for shape in ((2, 5, 3, 3), (3, 24, 4, 5), (9, 21)):
        tensors = maps(shape, dtype, device), maps(shape, dtype, device, seed=1), *affine(shape[1], device)
        with guarded(*tensors) as (x, z, w, b), poisoned_allocator():
            made = results(batch_norm_act(x, w, b, z, backend=backend), [x, z, w, b])
            made += results(batch_norm_act(x, w, b, backend=backend), [x, w, b])
        assert not any(each.isnan().any() for each in made), shape


@dtypes
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    if ("cpu", "native") not in [p.values for p in implementations("batch_norm_act")]:
        pytest.skip("the native form is not built")
    x, z, (w, b) = maps((5, 40, 45, 41), dtype), maps((5, 40, 45, 41), dtype, seed=1), affine(40)
    made = []
    for threads in (1, 2, 3, 5):
        with num_threads(threads):
            made.append(results(batch_norm_act(x, w, b, z, backend="native"), [x, w, b, z]))
    assert all(torch.equal(a, b) for other in made[1:] for a, b in zip(made[0], other, strict=True))


@everywhere
def test_a_second_derivative_is_refused(device: str, backend: str) -> None:
    if backend == "reference":
        pytest.skip("plain PyTorch goes through any derivative")
    x = maps((2, 4, 3, 3), device=device)
    (grad,) = torch.autograd.grad(batch_norm_act(x, backend=backend).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="batch_norm_act is differentiable once"):
        grad.sum().backward()


@everywhere
def test_torch_func_and_forward_mode_take_the_reference(device: str, backend: str) -> None:
    x = maps((2, 4, 3, 3), device=device).detach()
    expected = torch.func.grad(lambda each: plain(each, None, None, None, None).relu().square().sum())(x)
    made = torch.func.grad(lambda each: batch_norm_act(each, backend=backend).square().sum())(x)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    _, tangent = torch.func.jvp(lambda each: batch_norm_act(each, backend=backend), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.zeros_like(x), rtol=0, atol=1e-5)  # a shift of the input changes nothing


@pytest.mark.parametrize("suffix", ["", "_triton"])
def test_opcheck(suffix: str) -> None:
    if _native.load_failure("_cpu"):
        pytest.skip("the native form is not built")
    ops = torch.ops.scrl_fast
    name = "batch_norm_act" + suffix
    x, z, (w, b) = maps((2, 6, 3, 2)).detach(), maps((2, 6, 3, 2), seed=1).detach(), affine(6)
    w, b = w.detach(), b.detach()
    statistics = getattr(ops, "batch_norm_statistics" + suffix)(x)
    y = getattr(ops, name)(x, z, w, b, statistics, 1e-5, True)
    sums, masked = getattr(ops, name.replace("act", "act_backward_sums"))(z, x, y, w, b, statistics, 1e-5, True)
    for operator, arguments in (
        ("batch_norm_statistics", (x,)),
        ("batch_norm_act", (x, z, w, b, statistics, 1e-5, True)),
        ("batch_norm_act_backward_sums", (z, x, y, w, b, statistics, 1e-5, True)),
        ("batch_norm_act_backward_sums", (z, x, None, None, None, statistics, 1e-5, False)),
        ("batch_norm_act_backward", (masked, x, w, b, statistics, sums, 1e-5, False)),
    ):
        torch.library.opcheck(getattr(ops, operator + suffix).default, arguments)


def test_one_graph() -> None:
    x, (w, b) = maps((2, 6, 3, 2)), affine(6)

    def step(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return batch_norm_act(x * 2, w, b, x).square()

    made = results(torch.compile(step, fullgraph=True, backend="aot_eager")(x, w, b), [x, w, b])
    for one, other in zip(made, results(step(x, w, b), [x, w, b]), strict=True):
        torch.testing.assert_close(one, other)


WRONG = {
    "input must be a tensor, got list": ([1.0],),
    "input must be float32, float64, bfloat16 or float16, got torch.int64": (torch.zeros(2, 3, dtype=torch.int64),),
    "input must be [N, C, ...], got [3]": (torch.zeros(3),),
    "residual must have the shape of input, [2, 3], got [2, 4]": (torch.zeros(2, 3), None, None, torch.zeros(2, 4)),
    "residual must have the dtype of input": (torch.zeros(2, 3), None, None, torch.zeros(2, 3).double()),
    "weight must be [3], one value a channel of input, got [2]": (torch.zeros(2, 3), torch.zeros(2)),
    "weight must have a floating dtype": (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int32)),
    "input must have more than one value a channel in training, got shape [1, 3]": (torch.zeros(1, 3),),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_tensors_are_named(message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        batch_norm_act(*WRONG[message])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"eps": -1.0}, "eps must be in [0, inf], got -1"),
        ({"momentum": "0.1"}, "momentum must be a number, got '0.1'"),
        ({"training": "yes"}, "training must be True or False, got 'yes'"),
        ({"training": False}, "running_mean must be given with training=False"),
        ({"running_mean": torch.zeros(3)}, "running_mean and running_var must be given together"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        batch_norm_act(torch.zeros(2, 3), **options)
