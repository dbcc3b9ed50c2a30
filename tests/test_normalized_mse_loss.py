"""The losses: every backend against plain PyTorch in float64; gradients, shapes, layouts, wrong input."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_accurate
from tiny_normalized_mse_loss import REDUCTIONS, SIZES, dtypes, everywhere, gradients, plain_rows, plain_two_views, rows

from scrl_fast.ops import backends, normalized_mse_loss, two_view_loss

# ---- numbers ----


@everywhere
@dtypes
@pytest.mark.parametrize("count, width", SIZES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_match_float64(
    device: str, backend: str, dtype: torch.dtype, count: int, width: int, reduction: str
) -> None:
    input, target = rows(count, width, dtype, device), rows(count, width, dtype, device, seed=1)
    ours = gradients(normalized_mse_loss(input, target, reduction, backend=backend), input, target)
    pytorch = gradients(plain_rows(input, target, reduction), input, target)
    wide = [t.detach().double().requires_grad_() for t in (input, target)]
    exact = gradients(plain_rows(*wide, reduction), *wide)
    for name, *values in zip(("loss", "gradient of input", "gradient of target"), ours, pytorch, exact, strict=True):
        assert_as_accurate(*values, name)


@everywhere
@dtypes
@pytest.mark.parametrize("count, width", SIZES)
def test_two_views_match_float64(device: str, backend: str, dtype: torch.dtype, count: int, width: int) -> None:
    online, target = rows(count, width, dtype, device), rows(count, width, dtype, device, seed=1)
    ours = gradients(two_view_loss(online, target, backend=backend), online, target)
    pytorch = gradients(plain_two_views(online, target), online, target)
    wide = [t.detach().double().requires_grad_() for t in (online, target)]
    exact = gradients(plain_two_views(*wide), *wide)
    assert ours[0].dtype == torch.promote_types(dtype, torch.float32)
    assert_as_accurate(ours[0], pytorch[0].to(ours[0].dtype), exact[0], "loss")
    assert_as_accurate(ours[1], pytorch[1], exact[1], "gradient of online")
    assert_as_accurate(ours[2], pytorch[2], exact[2], "gradient of target")


@everywhere
def test_known_values(device: str, backend: str) -> None:
    one, other = (
        torch.tensor([[3.0, 0.0], [0.0, 1.0]], device=device),
        torch.tensor([[5.0, 0.0], [0.0, -2.0]], device=device),
    )
    assert normalized_mse_loss(one, other, "none", backend=backend).tolist() == [0, 4]
    assert normalized_mse_loss(one, other, backend=backend).item() == 2
    assert two_view_loss(one, other, backend=backend).item() == 4  # each row meets a perpendicular one
    assert two_view_loss(one, other.flip(0), backend=backend).item() == 4  # 0 and 4


@everywhere
@dtypes
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # the interpreter, where a float16 becomes infinite
def test_zero_rows_behave_like_normalize(device: str, backend: str, dtype: torch.dtype) -> None:
    input, target = rows(4, 8, torch.float64), rows(4, 8, torch.float64, seed=1)
    with torch.no_grad():
        input[1], target[2] = 0, 0
        input[3] *= 5e-13 / input[3].norm()  # shorter than eps: divided by a constant, so no part along the row itself
    # In float16 the short row becomes zero as well.
    ours = [t.detach().to(device, dtype).requires_grad_() for t in (input, target)]
    exact = [t.detach().double().requires_grad_() for t in ours]
    losses = normalized_mse_loss(*ours, "none", backend=backend)
    assert losses[1:3].tolist() == [2, 2]
    made = torch.autograd.grad(losses.sum(), ours)
    expected = torch.autograd.grad(plain_rows(*exact, "sum"), exact)
    for ours_grad, exact_grad in zip(made, expected, strict=True):
        finite = exact_grad.abs() < torch.finfo(dtype).max  # a zero row's gradient is 1e12 long: infinite in float16
        torch.testing.assert_close(
            ours_grad.double()[finite], exact_grad[finite], rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps
        )
        assert ours_grad[~finite].isinf().all()


@everywhere
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter
def test_nan_and_infinity_come_through(device: str, backend: str) -> None:
    for bad in (float("nan"), float("inf")):
        input, target = rows(40, 20, torch.float32, device).detach(), rows(40, 20, torch.float32, device, seed=1)
        input[17, 3] = bad
        losses = normalized_mse_loss(input, target, "none", backend=backend)
        assert losses.isnan().nonzero().tolist() == [[17]]
        assert two_view_loss(input, target, backend=backend).isnan()


@everywhere
def test_width_one_has_no_gradient(device: str, backend: str) -> None:
    """One number's direction is its sign: what is left of the gradient is rounding of 2 / |x|."""
    input, target = rows(50, 1, torch.float32, device), rows(50, 1, torch.float32, device, seed=1)
    loss, grad, _ = gradients(normalized_mse_loss(input, target, "none", backend=backend), input, target)
    expected = 2 - 2 * (input.sign() * target.sign()).squeeze(1)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    assert (grad * input).abs().max() <= 1e-5


@everywhere
def test_float16_gradient_survives_many_rows(device: str, backend: str) -> None:
    """1 / (pairs * length) is subnormal in float16; scaled as a gradient scaler does it must come out precise."""
    online, target = rows(4096, 16, torch.float16, device), rows(4096, 16, torch.float16, device, seed=1)
    (ours,) = torch.autograd.grad(two_view_loss(online, target, backend=backend) * 65536.0, online)
    wide = online.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(plain_two_views(wide, target.double()) * 65536.0, wide)
    torch.testing.assert_close(ours.double(), exact, rtol=4e-3, atol=1e-3 * exact.abs().max().item())


# ---- gradients ----


@everywhere
def test_gradcheck(device: str, backend: str) -> None:
    input, target = rows(4, 3, device=device), rows(4, 3, device=device, seed=1)
    for reduction in REDUCTIONS:
        torch.autograd.gradcheck(
            lambda x, t, r=reduction: normalized_mse_loss(x, t, r, backend=backend), (input, target)
        )
    torch.autograd.gradcheck(lambda x, t: two_view_loss(x, t, backend=backend), (input, target))


@everywhere
def test_gradient_only_where_wanted(device: str, backend: str) -> None:
    input, target = rows(6, 5, device=device), rows(6, 5, device=device, seed=1)
    both = torch.autograd.grad(normalized_mse_loss(input, target, backend=backend), (input, target))
    (only_input,) = torch.autograd.grad(normalized_mse_loss(input, target.detach(), backend=backend), input)
    (only_target,) = torch.autograd.grad(normalized_mse_loss(input.detach(), target, backend=backend), target)
    assert torch.equal(both[0], only_input) and torch.equal(both[1], only_target)
    assert not normalized_mse_loss(input.detach(), target.detach(), backend=backend).requires_grad
    with torch.no_grad():
        assert not two_view_loss(input, target, backend=backend).requires_grad


@everywhere
def test_backward_twice_and_accumulation(device: str, backend: str) -> None:
    """Where the incoming gradient is 1, what the forward pass made is handed out uncopied, unless the graph stays."""
    online, target = rows(6, 5, device=device), rows(6, 5, device=device, seed=1).detach()
    loss = two_view_loss(online, target, backend=backend)
    loss.backward(retain_graph=True)
    once = online.grad.clone()
    online.grad.mul_(3)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(online.grad, 4 * once, rtol=1e-12, atol=0)
    (2 * loss).backward()
    torch.testing.assert_close(online.grad, 6 * once, rtol=1e-12, atol=0)


@everywhere
def test_gradient_may_be_edited_while_the_graph_stays(device: str, backend: str) -> None:
    online, target = rows(6, 5, device=device), rows(6, 5, device=device, seed=1).detach()
    loss = two_view_loss(online, target, backend=backend)
    (first,) = torch.autograd.grad(loss, online, retain_graph=True)
    expected = first.clone()
    first.zero_()
    assert expected.abs().sum() > 0 and torch.equal(torch.autograd.grad(loss, online)[0], expected)


# ---- shapes and layouts ----


@everywhere
@dtypes
def test_empty(device: str, backend: str, dtype: torch.dtype) -> None:
    for shape in ((0, 8), (0, 3, 8)):
        input, target = (torch.zeros(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
        for reduction in REDUCTIONS:
            loss = normalized_mse_loss(input, target, reduction, backend=backend)
            assert loss.shape == (shape[:-1] if reduction == "none" else ()) and not loss.any()
            assert [g.shape for g in torch.autograd.grad(loss.sum(), (input, target))] == [input.shape] * 2
    online = torch.zeros(0, 8, dtype=dtype, device=device, requires_grad=True)
    loss = two_view_loss(online, online.detach(), backend=backend)
    loss.backward()
    assert loss.item() == 0 and online.grad.shape == (0, 8)
    no_columns = torch.zeros(4, 0, dtype=dtype, device=device, requires_grad=True)
    loss = two_view_loss(no_columns, no_columns.detach(), backend=backend)
    loss.backward()
    assert loss.item() == 4 and no_columns.grad.shape == (4, 0)


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every second column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "every third row": lambda t: t.repeat_interleave(3, 0)[::3],
    "slice of wider rows": lambda t: F.pad(t, (1, 2))[:, 1:-2],
    "reversed rows of a buffer": lambda t: t.flip(0).contiguous().flip(0),
}


@everywhere
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: str, backend: str, layout: str) -> None:
    online, target = rows(10, 37, torch.float32, device), rows(10, 37, torch.float32, device, seed=1)
    expected = gradients(two_view_loss(online, target, backend=backend), online, target)
    laid = [LAYOUTS[layout](t.detach()).requires_grad_() for t in (online, target)]
    made = gradients(two_view_loss(*laid, backend=backend), *laid)
    for a, b in zip(made, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@everywhere
def test_expanded_rows_and_more_dimensions(device: str, backend: str) -> None:
    input = rows(12, 7, device=device).detach().reshape(3, 4, 7).requires_grad_()
    target = rows(1, 7, device=device, seed=1).detach().expand(3, 4, 7)
    loss = normalized_mse_loss(input, target, "none", backend=backend)
    torch.testing.assert_close(loss, plain_rows(input, target, "none"))
    (grad,) = torch.autograd.grad(loss.sum(), input)
    assert grad.shape == input.shape
    vector = normalized_mse_loss(input[0, 0], target[0, 0], backend=backend)
    torch.testing.assert_close(vector, loss[0, 0])
    transposed = input.detach().transpose(0, 1).requires_grad_()
    torch.testing.assert_close(
        normalized_mse_loss(transposed, target.transpose(0, 1), "none", backend=backend), loss.t()
    )


# ---- wrong input ----


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"input": [1.0]}, TypeError, "input must be a tensor, got list"),
        ({"target": None}, TypeError, "target must be a tensor, got NoneType"),
        ({"input": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "input must be float32, .* got torch.int64"),
        (
            {"target": torch.zeros(4, 3).bfloat16()},
            TypeError,
            "target must have the dtype of input, torch.float32, got",
        ),
        ({"target": torch.zeros(4, 2)}, ValueError, r"target must have the shape of input, \[4, 3\], got \[4, 2\]"),
        ({"target": torch.zeros(4, 3, device="meta")}, ValueError, "target must be on cpu like input, got meta"),
        ({"input": torch.tensor(1.0), "target": torch.tensor(1.0)}, ValueError, "input must have at least one dim"),
        ({"reduction": "average"}, ValueError, "reduction must be one of none, sum, mean, got 'average'"),
        ({"backend": "cudnn"}, ValueError, "backend 'cudnn' is unknown"),
    ],
)
def test_wrong_input_is_named(change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        normalized_mse_loss(**({"input": torch.zeros(4, 3), "target": torch.zeros(4, 3)} | change))


def test_two_views_need_pairs() -> None:
    for shape in ((5, 3), (4, 3, 2), (4,)):
        with pytest.raises(
            ValueError, match=re.escape(f"online must be [2N, D], view 1 then view 2, got {list(shape)}")
        ):
            two_view_loss(torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(TypeError, match="target must have the dtype of online"):
        two_view_loss(torch.zeros(4, 3), torch.zeros(4, 3).double())


def test_operator_refuses_what_the_public_function_would_not_pass() -> None:
    if failure := backends.OPERATIONS["two_view_loss"].failure("native", "cpu"):
        pytest.skip(failure)
    op, good = torch.ops.scrl_fast.normalized_mse_loss, torch.zeros(4, 3)
    for arguments in [
        (good, good[:2], False, 0),
        (good, good.double(), False, 0),
        (good[0], good[0], False, 0),
        (good, good.t().contiguous().t(), False, 0),
        (good[:3], good[:3], True, 2),
        (good, good, False, 3),
        (good.long(), good.long(), False, 0),
    ]:
        with pytest.raises(RuntimeError, match="normalized_mse_loss"):
            op(*arguments, False, False)
