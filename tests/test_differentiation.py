"""The losses and roi_align under every way PyTorch has to differentiate, beside the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import implementations
from torch import Tensor
from torch.autograd import forward_ad, functional
from torch.fx.experimental.proxy_tensor import make_fx

from scrl_fast.ops import normalized_mse_loss, roi_align, two_view_loss

Function = Callable[[Tensor], Tensor]
OURS = [p for p in implementations("two_view_loss") if "reference" not in p.values]
compiled = pytest.mark.parametrize("device, backend", OURS)
one_of_ours = pytest.mark.parametrize("device, backend", OURS[:1])  # for what is decided alike for all
operations = pytest.mark.parametrize("operation", ["normalized_mse_loss", "two_view_loss", "roi_align"])


def rows(seed: int, device: str) -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def scalar_of(operation: str, device: str) -> tuple[Callable[[Tensor, str], Tensor], Tensor]:
    """A scalar function (point, backend) made of the operation, and a point."""
    if operation == "roi_align":
        boxes = torch.tensor([[0, 0.0, 0, 1.5, 2], [0, 1, 0.5, 3, 2]], dtype=torch.float64, device=device)
        point = rows(0, device).flatten()[:8].reshape(1, 1, 2, 4)
        return lambda x, backend: roi_align(x, boxes, 2, backend=backend).square().sum(), point
    loss = two_view_loss if operation == "two_view_loss" else normalized_mse_loss
    target = rows(1, device)
    return lambda x, backend: loss(x, target, backend=backend), rows(0, device)


def forward_mode(f: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def forward_mode_without_graph(f: Function, x: Tensor) -> Tensor:
    with torch.no_grad():
        return forward_mode(f, x)


def vmapped_backward(f: Function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    loss = f(x)
    return torch.func.vmap(lambda v: torch.autograd.grad(loss, x, v)[0])(torch.ones(3, dtype=x.dtype, device=x.device))


def batched_backward(f: Function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x, torch.ones(3, dtype=x.dtype, device=x.device), is_grads_batched=True)[0]


def tangent(f: Function, x: Tensor) -> Tensor:
    return torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]


def gradient_of_vmap(f: Function, x: Tensor) -> Tensor:
    return torch.func.grad(lambda both: torch.func.vmap(f)(both).sum())(torch.stack([x, 2 * x]))


def backward_through_vmap(f: Function, x: Tensor) -> Tensor:
    both = torch.stack([x, 2 * x]).requires_grad_()
    return torch.autograd.grad(torch.func.vmap(f)(both).sum(), both)[0]


ONCE: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "torch.func.grad": lambda f, x: torch.func.grad(f)(x),
    "torch.func.vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "torch.func.jvp": tangent,
    "torch.func.vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    "torch.func.grad of vmap": gradient_of_vmap,
    "torch.func.vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, 2 * x])),
    "torch.func.vmap of backward": vmapped_backward,
    "backward through torch.func.vmap": backward_through_vmap,
    "forward mode": forward_mode,
    "forward mode without a graph": forward_mode_without_graph,
    "forward mode beside a graph": lambda f, x: forward_mode(f, x.clone().requires_grad_()),
    "batched backward": batched_backward,
    "vectorised jacobian": lambda f, x: functional.jacobian(f, x, vectorize=True),
}


@compiled
@operations
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:`torch.jit.script")
@pytest.mark.parametrize("way", ONCE)
def test_first_derivatives(device: str, backend: str, operation: str, way: str) -> None:
    function, point = scalar_of(operation, device)
    ours, reference = (ONCE[way](lambda x: function(x, name), point) for name in (backend, "reference"))  # noqa: B023
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)
    assert ours.abs().sum() > 0


def through_compiler(f: Function, x: Tensor, backend: str | Callable[..., Any]) -> Tensor:
    torch._dynamo.reset()  # one function for all cases: it would meet the limit of recompilations
    return torch.compile(f, fullgraph=True, backend=backend)(x)


COMPILED: dict[str, tuple[str, Callable[[Function, Tensor], Tensor]]] = {
    "torch.func.grad": ("eager", lambda f, x: torch.func.grad(f)(x)),
    "torch.func.jvp": ("aot_eager", tangent),
    "torch.func.jacfwd": ("aot_eager", lambda f, x: torch.func.jacfwd(f)(x)),
    "torch.func.grad of vmap": ("eager", gradient_of_vmap),
    "torch.func.hessian": ("eager", lambda f, x: torch.func.hessian(f)(x)),
}


@one_of_ours
@operations
@pytest.mark.filterwarnings("ignore:`torch.jit.script")
@pytest.mark.parametrize("way", COMPILED)
def test_compiled_derivatives(device: str, backend: str, operation: str, way: str) -> None:
    function, point = scalar_of(operation, device)
    compiler, derivative = COMPILED[way]
    ours = through_compiler(lambda x: derivative(lambda x: function(x, backend), x), point, compiler)
    reference = derivative(lambda x: function(x, "reference"), point)
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)
    assert ours.abs().sum() > 0


@one_of_ours
@operations
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_compiled_vmap_keeps_our_operation(device: str, backend: str, operation: str) -> None:
    function, point = scalar_of(operation, device)
    called: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    through_compiler(torch.func.vmap(lambda x: function(x, backend)), torch.stack([point, point]), look)
    assert any(target.startswith("scrl_fast.") for target in called), called


@compiled
@operations
def test_traced_backward(device: str, backend: str, operation: str) -> None:
    function, point = scalar_of(operation, device)

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x, backend), x)[0]

    torch.testing.assert_close(make_fx(gradient)(point)(point), gradient(point))


def penalised(f: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf, and a loss with its gradient's length added."""
    leaf = x.clone().requires_grad_()
    loss = f(leaf * 2)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    return leaf, loss + 10 * gradient.square().sum()


def penalty_through_backward(f: Function, x: Tensor) -> Tensor:
    leaf, loss = penalised(f, x)
    loss.backward()
    return leaf.grad


def penalty_through_named_inputs(f: Function, x: Tensor) -> Tensor:
    leaf, loss = penalised(f, x)
    loss.backward(inputs=[leaf])
    return leaf.grad


def penalty_through_grad(f: Function, x: Tensor) -> Tensor:
    leaf, loss = penalised(f, x)
    return torch.autograd.grad(loss, leaf)[0]


TWICE: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "backward": penalty_through_backward,
    "backward, inputs named": penalty_through_named_inputs,
    "autograd.grad": penalty_through_grad,
    "hessian": lambda f, x: functional.hessian(f, x),
    "hessian, vectorised": lambda f, x: functional.hessian(f, x, vectorize=True),
    "hessian-vector product": lambda f, x: functional.hvp(f, x, torch.ones_like(x))[1],
}


@compiled
@operations
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("way", TWICE)
def test_second_derivatives_are_right_or_refused(device: str, backend: str, operation: str, way: str) -> None:
    function, point = scalar_of(operation, device)
    if operation == "roi_align":
        ours, reference = (TWICE[way](lambda x: function(x, name), point) for name in (backend, "reference"))  # noqa: B023
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)
        return
    with pytest.raises(RuntimeError, match="normalized_mse_loss is differentiable once"):
        TWICE[way](lambda x: function(x, backend), point)


@compiled
@pytest.mark.parametrize("source", ["input", "target", "incoming gradient"])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_gradient_of_the_loss_refuses_for_all_it_depends_on(
    device: str, backend: str, source: str, factor: float
) -> None:
    input, target = (rows(seed, device).requires_grad_() for seed in (0, 1))
    incoming = torch.tensor(factor, dtype=torch.float64, device=device, requires_grad=True)
    loss = two_view_loss(input, target, backend=backend)
    (gradient,) = torch.autograd.grad(loss, input, incoming, create_graph=True)
    by = {"input": input, "target": target, "incoming gradient": incoming}[source]
    with pytest.raises(RuntimeError, match="normalized_mse_loss is differentiable once"):
        torch.autograd.grad(gradient.square().sum(), by)
