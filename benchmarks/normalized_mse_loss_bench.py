"""two_view_loss, forward + backward: against plain PyTorch eager and under torch.compile.

The shape of record is 2560 pairs of 256 numbers: 256 images with ten boxes each. Four pairs show what a call costs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from scrl_fast.ops import backends, two_view_loss
from scrl_fast.ops.normalized_mse_loss import REDUCTIONS

MOSTLY_OVERHEAD = 64  # pairs: fewer show what a call costs

Loss = Callable[[Tensor, Tensor], Tensor]


def plain(online: Tensor, target: Tensor) -> Tensor:
    """The loss as it is commonly written."""
    (p1, p2), (z1, z2) = online.chunk(2), target.chunk(2)
    return (_rows(p1, z2) + _rows(p2, z1)).mean()


def _rows(input: Tensor, target: Tensor) -> Tensor:
    return 2 - 2 * (F.normalize(input, dim=-1) * F.normalize(target, dim=-1)).sum(-1)


def losses(device: str) -> dict[str, Loss]:
    """Ours in every form that runs on the device, then the rivals."""
    operation = backends.OPERATIONS["two_view_loss"]
    forms = [name for name in ("native", "triton") if not operation.failure(name, device)]
    ours = {f"scrl_fast/{name}": lambda p, z, b=name: two_view_loss(p, z, backend=b) for name in forms}
    return {**ours, "torch/eager": plain, "torch/compile": torch.compile(plain, dynamic=False)}


def case(bench: harness.Bench, pairs: int, width: int, backward: bool) -> None:
    generator = torch.Generator(bench.device).manual_seed(0)

    def random_rows() -> Tensor:
        return torch.randn(2 * pairs, width, device=bench.device, dtype=bench.dtype, generator=generator)

    online, target = random_rows().requires_grad_(backward), random_rows()

    def call(loss: Loss) -> Callable[[], object]:
        if backward:
            return lambda: torch.autograd.grad(loss(online, target), online)
        return lambda: loss(online, target)

    providers = losses(bench.device.type)

    def agree(name: str) -> None:
        """One provider, loss and gradient, against float64."""
        wide = online.detach().double().requires_grad_()
        exact = plain(wide, target.double())
        (slope,) = torch.autograd.grad(exact, wide)
        tolerance = max(1e-5, 4 * torch.finfo(bench.dtype).eps)
        made = providers[name](online, target)
        torch.testing.assert_close(made.double(), exact, rtol=tolerance, atol=tolerance, check_dtype=False)
        if backward:
            (grad,) = torch.autograd.grad(made, online)
            distance = float((grad.double() - slope).norm() / slope.norm())
            if not distance <= tolerance:
                raise AssertionError(f"the gradient is off by {distance:.1e}, more than {tolerance:.1e}")

    name = harness.case_name("forward + backward" if backward else "forward", pairs=pairs, width=width)
    passes = 3 if backward else 2  # read both; write the gradient
    bytes_moved = passes * 2 * pairs * width * online.element_size()
    forms = {k: call(loss) for k, loss in providers.items()}
    bench.case(name, forms, bytes=bytes_moved, items=pairs, check_each=agree, wall=pairs < MOSTLY_OVERHEAD)


def bound(bench: harness.Bench, pairs: int, width: int) -> None:
    """The operator without autograd, beside an addition that moves the same bytes to memory that is there already."""
    generator = torch.Generator(bench.device).manual_seed(0)
    shape, options = (2 * pairs, width), {"device": bench.device, "dtype": bench.dtype}
    online, target = (torch.randn(shape, generator=generator, **options) for _ in range(2))
    result = torch.empty_like(online)
    providers = {"torch/add_out": lambda: torch.add(online, target, out=result)}
    check = None
    form = "native" if bench.device.type == "cpu" else "triton"
    if not backends.OPERATIONS["two_view_loss"].failure(form, bench.device.type):
        name = "normalized_mse_loss" + ("" if form == "native" else "_triton")
        operator = getattr(torch.ops.scrl_fast, name).default
        ours = {f"scrl_fast/{form}": lambda: operator(online, target, True, REDUCTIONS.index("mean"), True, False)}
        providers = ours | providers

        def check() -> None:
            wide = online.double().requires_grad_()
            (slope,) = torch.autograd.grad(plain(wide, target.double()), wide)
            made = operator(online, target, True, REDUCTIONS.index("mean"), True, False)[1].double()
            if not float((made - slope).norm() / slope.norm()) <= max(1e-5, 4 * torch.finfo(bench.dtype).eps):
                raise AssertionError("the operator's gradient is not the loss's")

    bytes_moved = 3 * 2 * pairs * width * online.element_size()
    name = harness.case_name("operator", pairs=pairs, width=width)
    bench.case(name, providers, bytes=bytes_moved, items=pairs, check=check)


def main() -> int:
    parser = harness.parser("normalized_mse_loss", __doc__)
    parser.add_argument("--pairs", type=int, nargs="+", default=[4, 640, 2560], help="box pairs (default: 4 640 2560)")
    parser.add_argument("--width", type=int, default=256, help="numbers a row (default: %(default)s)")
    args = parser.parse_args()
    bench = harness.Bench("normalized_mse_loss", args)
    for pairs in args.pairs:
        case(bench, pairs, args.width, backward=True)
    case(bench, max(args.pairs), args.width, backward=False)
    bound(bench, max(args.pairs), args.width)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
