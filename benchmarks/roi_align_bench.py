"""RoIAlign against torchvision's: the pooling of SCRL's box pairs, and of a detector's boxes on a pyramid level.

The map of record is 2048 x 7 x 7 with ten boxes an image and one bin a box: 128 images of it (512 on a GPU), then fewer
images and other numbers of boxes, for the cost of each. `pyramid` is a detector's level; `call` shows a call's cost.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import harness
import torch
from timing import Call
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from scrl_fast.ops import backends, roi_align

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def random_boxes(images: int, count: int, side: float, device: torch.device) -> Tensor:
    """Rows (image, x0, y0, x1, y1), edges 32 to half the picture long, images in order as the sampler gives them."""
    generator = torch.Generator().manual_seed(0)
    image = torch.arange(count).mul(images).div(count, rounding_mode="floor")[:, None].float()
    size = 32 + torch.rand(count, 2, generator=generator) * (side / 2 - 32)
    corner = torch.rand(count, 2, generator=generator) * (side - size)
    return torch.cat([image, corner, corner + size], 1).to(device)


def providers(device: str, dtype: torch.dtype, deterministic: bool) -> dict[str, Callable[..., Tensor]]:
    """Ours in every form that runs here, then torchvision, which knows no 16-bit maps beside float32 boxes and is cast
    around; deterministic: also the form that it takes on a GPU under PyTorch's switch."""
    operation = backends.OPERATIONS["roi_align"]
    forms = [name for name in ("native", "triton") if not operation.failure(name, device)]
    ours = {f"scrl_fast/{name}": lambda *a, b=name: roi_align(*a, backend=b) for name in forms}

    def cast_around(input: Tensor, boxes: Tensor, *options: object) -> Tensor:
        return torchvision_roi_align(input.float(), boxes, *options).to(input.dtype)

    plain = dtype in (torch.float32, torch.float64)
    theirs = {"torchvision": torchvision_roi_align if plain else cast_around}
    if deterministic:
        theirs["torchvision/deterministic"] = deterministically(theirs["torchvision"])
    return {**ours, **theirs}


MATMUL = "scrl_fast/triton-matmul"


def matmul_form(map: Tensor, grad: Tensor, rows: Tensor, options: tuple[Any, ...]) -> tuple[Call, Call] | None:
    """Forward and backward of the matrix-product form, which `roi_align` does not choose; None where it takes no such
    map."""
    if not map.is_cuda or backends.triton_failure("cuda"):
        return None
    from scrl_fast.kernels import roi_align_matmul as form

    bins, *rest = options
    if form.failure(map):
        return None
    return (
        lambda *_: form.roi_align(map, rows, rest[0], bins, bins, *rest[1:]),
        lambda: (form.roi_align_backward(grad, rows, *rest, tuple(map.shape)),),
    )


def into(out: Tensor, grad: Tensor, rows: Tensor, scale: float, ratio: int) -> Callable[[], object]:
    """The backward pass into memory that is there already, as a training loop's allocator has it on a GPU."""
    return lambda: torch.ops.scrl_fast.roi_align_backward_out(grad, rows, scale, ratio, False, out)


def deterministically(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*arguments: object) -> Tensor:
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            return call(*arguments)
        finally:
            torch.use_deterministic_algorithms(False)

    return run


def check_close(made: Tensor, exact: Tensor, cells: int) -> None:
    """Positions of up to so many cells in float32, then one rounding to the dtype."""
    single = 4 * cells * torch.finfo(torch.float32).eps
    own = 0.0 if made.dtype is torch.float64 else torch.finfo(made.dtype).eps
    torch.testing.assert_close(made.double(), exact, rtol=own + 1e-12, atol=single * float(exact.abs().max()))


def case(
    bench: harness.Bench, label: str, shape: tuple[int, ...], boxes: int, bins: int, layout: str, ratio: int = -1
) -> None:
    """Forward; backward through autograd and, natively, into reused memory."""
    images, channels, height, width = shape
    scale = 1 / 32 if height < 32 else 1 / 4
    rows = random_boxes(images, boxes, min(height, width) / scale, bench.device)
    generator = torch.Generator(bench.device).manual_seed(0)
    input = torch.randn(shape, device=bench.device, dtype=bench.dtype, generator=generator)
    input = input.contiguous(memory_format=LAYOUTS[layout])
    wanted = input.clone(memory_format=torch.preserve_format).requires_grad_()
    forms = providers(bench.device.type, bench.dtype, bench.args.deterministic)
    cotangent = torch.randn(boxes, channels, bins, bins, device=bench.device, dtype=bench.dtype, generator=generator)
    options = (bins, scale, ratio, False)
    matmul = matmul_form(input, cotangent, rows, options)

    @functools.cache
    def exact_forward() -> Tensor:
        return torchvision_roi_align(input.double(), rows.double(), *options)

    @functools.cache
    def exact_backward() -> Tensor:
        wide = input.double().requires_grad_()
        made = torchvision_roi_align(wide, rows.double(), *options)
        return torch.autograd.grad(made, wide, cotangent.double())[0]

    def agree(name: str) -> None:
        """One provider, every box, against torchvision in float64."""
        check_close(forms[name](input, rows, *options), exact_forward(), max(height, width))

    def gradients_agree(name: str) -> None:
        result = backward[name]()
        check_close(reused if result is None else result[0], exact_backward(), max(height, width))

    if matmul:
        forms[MATMUL] = matmul[0]
    moved = (input.numel() + cotangent.numel()) * input.element_size()
    parameters = {
        "images": images,
        "map": f"{channels}x{height}x{width}",
        "boxes": boxes // images,
        "bins": bins,
        "samples": ratio,
    }
    name = harness.case_name(f"{label} forward {layout}", **parameters)
    bench.case(name, {k: lambda f=f: f(input, rows, *options) for k, f in forms.items()}, bytes=moved, items=boxes,
               check_each=agree, wall=label == "call")  # fmt: skip
    graphs = {k: f(wanted, rows, *options) for k, f in forms.items() if k != MATMUL}
    name = harness.case_name(f"{label} backward {layout}", **parameters)
    backward = {k: lambda o=o: torch.autograd.grad(o, wanted, cotangent, retain_graph=True) for k, o in graphs.items()}
    reused = torch.empty_like(input)
    if matmul:
        backward[MATMUL] = matmul[1]
    if "scrl_fast/native" in forms:
        backward["scrl_fast/native-reused"] = into(reused, cotangent, rows, scale, ratio)
    bench.case(name, backward, bytes=moved, items=boxes, check_each=gradients_agree, wall=label == "call")


def main() -> int:
    parser = harness.parser("roi_align", __doc__)
    parser.set_defaults(seconds=0.7)
    parser.add_argument("--batch", type=int, nargs="+", help="images (128 32 8; on a GPU 512 128 32)")
    parser.add_argument("--boxes", type=int, nargs="+", default=[10, 3, 30], help="boxes an image (%(default)s); the"
                        " first goes with every batch, the others with the second batch")  # fmt: skip
    parser.add_argument("--channels", type=int, default=2048, help="channels of that map (default: %(default)s)")
    parser.add_argument("--pyramid-boxes", type=int, default=128, help="boxes on the pyramid level (%(default)s)")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="memory formats (all)")
    parser.add_argument("--deterministic", action="store_true", help="also time torchvision's deterministic form, which"
                        " it has on a GPU only and compiles on first use")  # fmt: skip
    args = parser.parse_args()
    bench = harness.Bench("roi_align", args)
    batch = args.batch or ([512, 128, 32] if args.device == "cuda" else [128, 32, 8])
    sizes = [(images, args.boxes[0]) for images in batch]
    sizes += [(batch[:2][-1], boxes) for boxes in args.boxes[1:]]
    for layout in args.layout:
        for images, boxes in sizes:
            case(bench, "record", (images, args.channels, 7, 7), images * boxes, 1, layout)
    for layout in args.layout:
        for ratio in (-1, 2) if layout == args.layout[0] else (2,):
            case(bench, "pyramid", (1, 256, 200, 336), args.pyramid_boxes, 7, layout, ratio)
    case(bench, "call", (1, 8, 7, 7), 4, 1, args.layout[0])
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
