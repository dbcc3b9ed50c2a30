"""The losses inside PyTorch: only their own memory, the same bits for any threads, operator checks, one graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import guarded, implementations, num_threads, poisoned_allocator
from tiny_normalized_mse_loss import SIZES, dtypes, everywhere, gradients, rows

from scrl_fast.ops import _native, normalized_mse_loss, two_view_loss

# ---- memory and threads ----


@everywhere
@dtypes
def test_reads_and_writes_nothing_beside_its_rows(
    device: str, backend: str, dtype: torch.dtype, guarded_outputs: None
) -> None:
    for count, width in SIZES:
        padded = [F.pad(rows(count, width, dtype, device, seed=s).detach(), (3, 5)) for s in (0, 1)]
        views = [t.as_strided((count, width), (width + 8, 1), 3).requires_grad_() for t in padded]
        with guarded(*views) as (online, target), poisoned_allocator():
            results = gradients(two_view_loss(online, target, backend=backend), online, target)
            losses = normalized_mse_loss(online, target, "none", backend=backend)
        assert not any(result.isnan().any() for result in (*results, losses)), (count, width)


@pytest.mark.parametrize(
    "backend", [p.values[1] for p in implementations("two_view_loss") if p.values == ("cpu", "native")]
)
@dtypes
def test_bits_do_not_depend_on_threads(backend: str, dtype: torch.dtype) -> None:
    online, target = rows(5126, 40, dtype), rows(5126, 40, dtype, seed=1)
    results = []
    for threads in (1, 2, 3, 5):
        with num_threads(threads):
            results.append(gradients(two_view_loss(online, target, backend=backend), online, target))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- PyTorch's machinery ----


def operators() -> list[tuple[str, str]]:
    names = {"native": "normalized_mse_loss", "triton": "normalized_mse_loss_triton"}
    return [(p.values[0], names[p.values[1]]) for p in implementations("two_view_loss") if p.values[1] in names]


@pytest.mark.parametrize("device, operator", operators())
@pytest.mark.parametrize("two_views, reduction", [(False, 0), (False, 1), (True, 2)])
def test_opcheck(device: str, operator: str, two_views: bool, reduction: int) -> None:
    _native.load_failure("_cpu"), _native.load_failure("_cuda")
    op = getattr(torch.ops.scrl_fast, operator).default
    input, target = rows(6, 5, torch.float32, device), rows(6, 5, torch.float32, device, seed=1)
    for wanted in ((True, True), (True, False)):
        other = target if wanted[1] else target.detach()
        torch.library.opcheck(op, (input, other, two_views, reduction, *wanted))


@everywhere
def test_compiles_without_graph_break(device: str, backend: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(
        lambda x, t: two_view_loss(x * 2, t, backend=backend) + normalized_mse_loss(x, t, backend=backend),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for count in (6, 10, 14):  # boxes vary in number: one graph for all
        online, target = rows(count, 5, device=device), rows(count, 5, device=device, seed=1)
        made = gradients(compiled(online, target) * 1.5, online, target)
        loss = two_view_loss(online * 2, target, backend=backend) + normalized_mse_loss(online, target, backend=backend)
        for a, b in zip(made, gradients(loss * 1.5, online, target), strict=True):
            torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("device", [p.values[0] for p in implementations("two_view_loss") if p.values[1] == "triton"])
@dtypes
def test_triton_adds_up_in_its_only_launch(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of many programs adds up the sums of all."""
    from scrl_fast.kernels import normalized_mse_loss as form

    monkeypatch.setattr(form, "SUMS", 4)
    monkeypatch.setattr(form, "TILE", 64)  # two rows a program
    monkeypatch.setattr(torch.Tensor, "sum", None)  # no launch of PyTorch's behind it
    online, target = (rows(50, 32, dtype, device, seed=seed).detach() for seed in (0, 1))
    losses = [form.normalized_mse_loss(online, target, True, 2, False, False)[0] for _ in range(3)]
    assert all(torch.equal(losses[0], loss) for loss in losses[1:])
    monkeypatch.undo()
    exact = two_view_loss(online.double(), target.double(), backend="reference")
    torch.testing.assert_close(losses[0].double(), exact, rtol=1e-6, atol=1e-6)
