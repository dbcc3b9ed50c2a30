"""roi_align inside PyTorch: gradients of gradients, tracing, the same bits for any threads, only its own memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import guarded, num_threads, poisoned_allocator
from tiny_roi_align import (
    LAYOUTS,
    dtypes,
    everywhere,
    feature_map,
    interpreted,
    run,
    some_boxes,
)

from scrl_fast.ops import RoIAlign, _native, roi_align

# ---- gradients, tracing ----


@everywhere
@pytest.mark.parametrize("size", [1, (2, 2)], ids=str)
def test_gradcheck_and_second_derivative(device: str, backend: str, size) -> None:
    input, boxes = feature_map(2, 2, 4, 5, device=device), some_boxes(5, 2, 4, 5).to(device)
    check = lambda x: roi_align(x, boxes, size, 1 / 32, -1, True, backend=backend)  # noqa: E731
    torch.autograd.gradcheck(check, input, fast_mode=True)
    torch.autograd.gradgradcheck(check, input, fast_mode=True)


@pytest.mark.skipif(bool(_native.load_failure("_cpu")), reason="the compiled library is not here")
@pytest.mark.parametrize("name", ["roi_align", "roi_align_triton"])
def test_opcheck(name: str) -> None:
    for dtype, layout in ((torch.float32, "contiguous"), (torch.bfloat16, "channels_last")):
        input = LAYOUTS[layout](feature_map(2, 4, 3, 5, dtype).detach()).requires_grad_()
        boxes = some_boxes(4, 2, 3, 5).float()
        torch.library.opcheck(getattr(torch.ops.scrl_fast, name).default, (input, boxes, 1 / 32, 2, 2, -1, False))


@everywhere
@pytest.mark.filterwarnings("ignore:Guards may run slower")
def test_compiles_without_graph_break(device: str, backend: str) -> None:
    if backend == "reference":  # its work depends on the boxes' values; it is there to be compared with
        return
    torch._dynamo.reset()
    module = RoIAlign(2, 1 / 32, backend=backend)
    compiled = torch.compile(lambda x, b: module(x * 2, b).sum(), fullgraph=True, backend="aot_eager")
    input, boxes = feature_map(device=device, dtype=torch.float32), some_boxes().float().to(device)
    (made,) = torch.autograd.grad(compiled(input, boxes), input)
    (expected,) = torch.autograd.grad(module(input * 2, boxes).sum(), input)
    torch.testing.assert_close(made, expected)


# ---- the same bits, clean memory ----


@everywhere
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [1, (3, 3)], ids=str)
def test_same_bits_for_any_number_of_threads(device: str, backend: str, layout: str, size) -> None:
    if backend == "triton" and device == "cpu":
        return  # the interpreter has one
    input = LAYOUTS[layout](feature_map(4, 64, 7, 7, torch.float32).detach()).to(device).requires_grad_()
    boxes = some_boxes(60, 4, 7, 7).to(device)
    results = []
    for count in (1, 2, 3):
        with num_threads(count):
            results.append(run(input, boxes, (size, -1, False), backend=backend))
    for output, grad in results[1:]:
        assert torch.equal(output, results[0][0]) and torch.equal(grad, results[0][1])


@everywhere
@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_reads_and_writes_only_its_own(
    device: str, backend: str, dtype: torch.dtype, layout: str, guarded_outputs: None
) -> None:
    input, boxes = feature_map(dtype=dtype, device=device), some_boxes().float().to(device)
    if interpreted(device, backend):
        input, boxes = input[:, :4], boxes[:5]
    with guarded(LAYOUTS[layout](input.detach()), boxes) as (laid, laid_boxes), poisoned_allocator():
        for size in (1, 2):
            output, grad = run(laid.requires_grad_(), laid_boxes, (size, -1, False), backend=backend)
            assert output.isfinite().all() and grad.isfinite().all()


def test_large_map_needs_no_large_workspace() -> None:
    """FPN sizes: weights for boxes x HW would be 537 MB here; what grows is the output and its gradient.

    Beside those one thread holds, of one image's boxes, 8 to 12 bytes for each tap along an axis, at most H + 2 bins or
    W + 2 bins of them, and one vector of channels (64 bytes a bin) of their gradients.
    """
    code = (
        "import resource, torch; from scrl_fast.ops import roi_align; torch.set_num_threads(1)\n"
        "most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "x = torch.randn(1, 16, 200, 336, requires_grad=True); b = torch.rand(2000, 5) * 1000; b[:, 0] = 0\n"
        "b[:, 3:] += b[:, 1:3]; roi_align(x, b[:2], 7, 0.25, 2).sum().backward()\n"
        "if hasattr(torch.ops.scrl_fast, 'roi_align_backward_out'):\n"
        "    grad, out = torch.randn(2000, 16, 7, 7), torch.zeros_like(x.detach()); before = most()\n"
        "    torch.ops.scrl_fast.roi_align_backward_out(grad, b, 0.25, 2, False, out); print(most() - before)\n"
        "before = most(); roi_align(x, b, 7, 0.25, 2).sum().backward(); print(most() - before)\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    *into_memory, with_results = map(int, printed.split())  # KiB
    if not _native.load_failure("_cpu"):
        taps, gradients = 12 * 2000 * (200 + 14) + 8 * 2000 * (336 + 14), 64 * 2000 * 49
        assert with_results < 100_000 and into_memory[0] * 1024 < 2 * (taps + gradients)  # vectors grow by doubling
