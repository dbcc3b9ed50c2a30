"""The CUDA kernels run on the CPU, thread by thread, under AddressSanitizer: their numbers without a GPU.

tests/cuda_on_cpu stands in for the toolkit's headers. What it cannot show: launches, streams, and the order in which a
GPU would run threads between two barriers.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import assert_as_accurate
from torch import Tensor

from scrl_fast.ops.roi_align import roi_align_reference

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("g++")
Run = Callable[..., Tensor]


def compiled(name: str, folder: Path) -> Path:
    """The program that tests/cuda_on_cpu/<name>.cpp makes."""
    flags = ["-std=c++20", "-O1", "-g1", "-ffp-contract=off", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    includes = [f"-I{ROOT / 'tests/cuda_on_cpu'}", f"-I{ROOT / 'csrc'}"]
    source, program = ROOT / f"tests/cuda_on_cpu/{name}.cpp", folder / name
    done = subprocess.run([str(COMPILER), *flags, *includes, source, "-o", program], capture_output=True, text=True)
    if "cannot find" in done.stderr:
        pytest.skip("g++ came without its sanitizers")
    assert done.returncode == 0, done.stderr[-4000:]
    return program


@pytest.mark.skipif(not COMPILER, reason="no g++")
def test_moving_average_and_lars(tmp_path: Path) -> None:
    """Against plain loops: sizes around packs and chunks, misaligned tensors, skipped steps, any number of blocks."""
    done = subprocess.run([compiled("tensor_lists", tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run(kernel, grid, boxes, size, ...): `pool`, `staged`, `planes` or `tile`, forward or (with grad) backward."""
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    program = compiled("roi_align", folder)

    def call(
        kernel: str,
        grid: Tensor,
        boxes: Tensor,
        size: tuple[int, int],
        ratio: int = -1,
        aligned: bool = False,
        *,
        grad: Tensor | None = None,
        packs: bool = False,
    ) -> Tensor:
        """grad: of the bins, else the forward pass. packs: a lane takes 16 bytes."""
        extent = 1 + sum((n - 1) * s for n, s in zip(grid.shape, grid.stride(), strict=True))
        numbers = (packs, grad is not None, aligned, ratio, *grid.shape, len(boxes), *size, *grid.stride(), extent)
        source = grid.as_strided((extent,), (1,)) if grad is None else grad.permute(0, 2, 3, 1).contiguous()
        wide = torch.float64 if grid.dtype == torch.float64 else torch.float32
        parts = (struct.pack("<16qd", *map(int, numbers), 1 / 32), raw(boxes.to(wide)), raw(source))
        (folder / "in").write_bytes(b"".join(parts))
        arguments = [program, str(grid.dtype).removeprefix("torch."), kernel, folder / "in", folder / "out"]
        ran = subprocess.run(arguments, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr[-3000:]
        flat = torch.frombuffer(bytearray((folder / "out").read_bytes()), dtype=grid.dtype)
        return (
            flat.view(len(boxes), grid.shape[1], *size) if grad is None else flat.as_strided(grid.shape, grid.stride())
        )

    return call


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def some_boxes(count: int, images: int, h: int, w: int) -> Tensor:
    """In no order of images; beyond the map's edges, without area, and two that cannot be sampled."""
    generator = torch.Generator().manual_seed(count)
    corner = (torch.rand(count, 2, generator=generator) * 1.2 - 0.3) * torch.tensor([w * 32.0, h * 32.0])
    extent = torch.rand(count, 2, generator=generator) * torch.tensor([w * 24.0, h * 24.0])
    image = torch.randint(images, (count, 1), generator=generator).float()
    boxes = torch.cat([image, corner, corner + extent], 1)
    boxes[1, 3:] = boxes[1, 1:3]
    boxes[2, 4] = float("nan")
    boxes[3, 0] = images
    return boxes


CASES = [  # kernel, layout, channels, (h, w), bins, packs
    ("pool", "channels_last", 40, (5, 9), (1, 1), True),
    ("pool", "channels_last", 33, (3, 40), (2, 3), False),
    ("pool", "contiguous", 40, (11, 10), (2, 2), True),
    ("staged", "channels_last", 296, (9, 21), (7, 7), True),
    ("staged", "channels_last", 43, (12, 9), (3, 2), False),
    ("planes", "contiguous", 19, (6, 11), (3, 2), False),
    ("planes", "transposed", 5, (6, 4), (1, 1), False),
    ("tile", "channels_last", 264, (7, 7), (1, 1), True),
    ("tile", "channels_last", 37, (8, 11), (2, 2), False),
    ("tile", "contiguous", 264, (7, 7), (1, 1), True),
    ("tile", "contiguous", 72, (6, 7), (2, 1), True),
    ("tile", "contiguous", 45, (5, 3), (1, 2), False),
]


def lay(map: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return map.mT.contiguous().mT
    return map.contiguous(memory_format=getattr(torch, f"{layout}_format" if layout == "contiguous" else layout))


@pytest.mark.skipif(not COMPILER, reason="no g++")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel, layout, channels, size, bins, packs", CASES)
def test_numbers(run: Run, kernel: str, layout: str, channels: int, size, bins, packs: bool, dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    map = torch.randn(3, channels, *size, generator=generator, dtype=torch.float64).to(dtype)
    boxes = some_boxes(14, 4, *size)  # none of some image
    boxes[boxes[:, 0] == 1, 0] = 2
    boxes[boxes[:, 0] == 3, 0] = 0
    boxes[3, 0] = 7
    fine = boxes.isfinite().all(1) & (boxes[:, 0] < 3)
    exact_map = map.double().requires_grad_()
    exact = roi_align_reference(exact_map, boxes[fine].to(torch.float32).double(), bins, 1 / 32)
    same = map.detach().clone().requires_grad_()
    pytorch = roi_align_reference(same, boxes[fine], bins, 1 / 32)

    if kernel != "pool" or layout != "contiguous":
        made = run(kernel, lay(map, layout), boxes, bins, packs=packs)
        assert made[~fine].isnan().all()
        assert_as_accurate(made[fine], pytorch, exact, "output")
    if kernel != "planes":
        grad = torch.randn(len(boxes), channels, *bins, generator=generator, dtype=torch.float64).to(dtype)
        (exact_grad,) = torch.autograd.grad(exact, exact_map, grad[fine].double())
        (pytorch_grad,) = torch.autograd.grad(pytorch, same, grad[fine])
        made = run(kernel, lay(map, layout), boxes, bins, grad=grad, packs=packs)
        assert_as_accurate(made, pytorch_grad, exact_grad, "gradient")


@pytest.mark.skipif(not COMPILER, reason="no g++")
def test_sampling_options_and_no_boxes(run: Run) -> None:
    map = torch.randn(2, 8, 7, 7, generator=torch.Generator().manual_seed(0))
    boxes = some_boxes(9, 2, 7, 7)[4:]
    for kernel in ("pool", "planes", "tile"):
        laid = map if kernel == "planes" else map.contiguous(memory_format=torch.channels_last)
        for ratio, aligned in ((2, False), (3, True), (-1, True)):
            made = run(kernel, laid, boxes, (2, 3), ratio, aligned, packs=True)
            exact = roi_align_reference(map, boxes, (2, 3), 1 / 32, ratio, aligned)
            torch.testing.assert_close(made, exact, rtol=1e-5, atol=1e-5)
    for kernel in ("pool", "tile"):
        for laid in (map, map.contiguous(memory_format=torch.channels_last)):
            made = run(kernel, laid, boxes[:0], (1, 1), grad=torch.zeros(0, 8, 1, 1), packs=True)
            assert torch.equal(made, torch.zeros_like(map))


@pytest.mark.skipif(not COMPILER, reason="no g++")
@pytest.mark.parametrize("order", ["sorted", "mixed", "backwards"])
def test_many_boxes_in_any_order(run: Run, order: str) -> None:
    """More boxes than one word of bits or one warp holds; images without boxes; edges the wrong way round."""
    map = torch.randn(5, 8, 13, 30, generator=torch.Generator().manual_seed(0))
    map = map.contiguous(memory_format=torch.channels_last)
    boxes = some_boxes(90, 3, 13, 30)[4:]
    boxes[:, 0] *= 2  # none in images 1 and 3
    boxes[::3, [1, 3]] = boxes[::3, [3, 1]]
    boxes[::5, [2, 4]] = boxes[::5, [4, 2]]
    boxes[7, 1:] = torch.tensor([-3e8, -2e8, 3e8, 2.5e8])  # more cells than float32 counts
    boxes[9, 1] = float("inf")
    fine = boxes.isfinite().all(1)
    if order != "mixed":
        boxes = boxes[torch.where(fine, boxes[:, 0], 9.0).argsort(stable=True, descending=order == "backwards")]
        fine = boxes.isfinite().all(1)
    grad = torch.randn(len(boxes), 8, 3, 2, generator=torch.Generator().manual_seed(1))
    exact_map = map.double().requires_grad_()
    exact = roi_align_reference(exact_map, boxes[fine].double(), (3, 2), 1 / 32, -1, True)
    (exact_grad,) = torch.autograd.grad(exact, exact_map, grad[fine].double())
    for kernel in ("pool", "staged"):
        made = run(kernel, map, boxes, (3, 2), -1, True, packs=True)
        assert made[~fine].isnan().all()
        torch.testing.assert_close(made[fine].double(), exact, rtol=1e-4, atol=1e-4)
        made = run(kernel, map, boxes, (3, 2), -1, True, grad=grad, packs=True)
        torch.testing.assert_close(made.double(), exact_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not COMPILER, reason="no g++")
def test_gradients_have_the_same_bits_in_any_order_of_images(run: Run) -> None:
    """Boxes of an image keep their order, so its gradient cannot tell whether they came sorted."""
    map = torch.zeros(3, 8, 12, 10).contiguous(memory_format=torch.channels_last)
    boxes = some_boxes(50, 3, 12, 10)[4:]
    grad = torch.randn(len(boxes), 8, 2, 2, generator=torch.Generator().manual_seed(1))
    order = boxes[:, 0].argsort(stable=True)
    mixed, sorted = (
        run("pool", map, b, (2, 2), grad=g, packs=True) for b, g in ((boxes, grad), (boxes[order], grad[order]))
    )
    assert torch.equal(mixed, sorted) and sorted.abs().sum() > 0
