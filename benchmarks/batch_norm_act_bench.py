"""batch_norm_act, forward + backward: against BatchNorm, addition and ReLU as torchvision's ResNets call them.

The maps are those of a ResNet-50 at views of 224 pixels, channels_last: the stem, and of each stage the norm inside a
block and the one before the addition. Benchmark `encoder` times the whole ResNet-50 with and without the operation:
online forward and backward, and the target's forward pass.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import harness
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet50

from scrl_fast.models.fused_norm import fuse_norms
from scrl_fast.ops import backends, batch_norm_act

# channels, side of the map, with residual
MAPS = [
    (64, 112, False),
    (64, 56, False),
    (256, 56, True),
    (128, 28, False),
    (512, 28, True),
    (256, 14, False),
    (1024, 14, True),
    (512, 7, False),
    (2048, 7, True),
]
Norm = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """As torchvision's blocks compute it: addition and ReLU in place."""
    out = F.batch_norm(x, None, None, weight, bias, True, 0.1, 1e-5)
    if residual is not None:
        out += residual
    return F.relu(out, inplace=True)


def norms(device: str) -> dict[str, Norm]:
    """Ours in every form that runs on the device, then the rival."""
    operation = backends.OPERATIONS["batch_norm_act"]
    forms = [name for name in ("native", "triton") if not operation.failure(name, device)]
    ours = {f"scrl_fast/{form}": lambda *args, f=form: batch_norm_act(*args, backend=f) for form in forms}
    return {**ours, "torch/eager": plain}


def case(bench: harness.Bench, images: int, channels: int, side: int, residual: bool) -> None:
    generator = torch.Generator(bench.device).manual_seed(0)

    def random_map() -> Tensor:
        shape = (images, channels, side, side)
        values = torch.randn(shape, device=bench.device, dtype=bench.dtype, generator=generator)
        return values.contiguous(memory_format=torch.channels_last)

    x, other, cotangent = random_map().requires_grad_(), random_map().requires_grad_(residual), random_map()
    weight, bias = torch.rand(2, channels, device=bench.device, generator=generator).add(0.5)
    z = other if residual else None
    inputs = [x, *([other] if residual else [])]

    def call(norm: Norm) -> Callable[[], object]:
        return lambda: torch.autograd.grad(norm(x, weight, bias, z), inputs, cotangent)

    providers = norms(bench.device.type)

    def agree(name: str) -> None:
        """One provider, output and gradient, against float64; where rounding decides a ReLU nothing is compared."""
        wide = [each.detach().double().requires_grad_() for each in inputs]
        before = F.batch_norm(wide[0], None, None, weight.double(), bias.double(), True, 0.1, 1e-5)
        before = before + wide[1] if residual else before
        made = providers[name](x, weight, bias, z)
        tolerance = max(1e-5, 4 * torch.finfo(bench.dtype).eps)
        torch.testing.assert_close(made.double(), before.relu(), rtol=tolerance, atol=8 * tolerance)
        slopes = torch.autograd.grad(before * (made > 0), wide, cotangent.double())
        for grad, exact in zip(torch.autograd.grad(made, inputs, cotangent), slopes, strict=True):
            distance = float((grad.double() - exact).norm() / exact.norm())
            if not distance <= tolerance:
                raise AssertionError(f"a gradient is off by {distance:.1e}, more than {tolerance:.1e}")

    kind = "residual" if residual else "plain"
    name = harness.case_name(kind, images=images, map=f"{channels}x{side}x{side}")
    passes = 3 + 5 + residual * 4  # forward: read twice, write; backward: read four times, write; with z each once more
    bytes_moved = passes * x.numel() * x.element_size()
    forms = {key: call(norm) for key, norm in providers.items()}
    bench.case(name, forms, bytes=bytes_moved, items=images, check_each=agree)


def encoder(bench: harness.Bench, images: int) -> None:
    """Online forward and backward, and the target's forward pass, of a whole ResNet-50."""
    torch.manual_seed(0)
    net: nn.Module = resnet50()
    net.fc = nn.Identity()
    net = net.to(bench.device, memory_format=torch.channels_last)
    fused = copy.deepcopy(net)
    fuse_norms(fused)
    views = torch.randn(images, 3, 224, 224, device=bench.device).contiguous(memory_format=torch.channels_last)

    def step(network: nn.Module) -> Callable[[], object]:
        def run() -> None:
            network(views).square().mean().backward()
            with torch.no_grad():
                network(views)

        return run

    def check() -> None:
        with torch.no_grad():
            torch.testing.assert_close(fused(views), net(views), rtol=1e-2, atol=1e-2)

    bench.case(
        harness.case_name("encoder resnet50", images=images),
        {"scrl_fast/fused": step(fused), "torch/eager": step(net)},
        items=images,
        check=check,
    )


def main() -> int:
    parser = harness.parser("batch_norm_act", __doc__)
    parser.add_argument("--images", type=int, default=16, help="views of 224 pixels (default: %(default)s)")
    parser.add_argument("--no-encoder", action="store_true", help="the maps alone")
    args = parser.parse_args()
    bench = harness.Bench("batch_norm_act", args)
    for channels, side, residual in MAPS:
        case(bench, args.images, channels, side, residual)
    if not args.no_encoder and bench.dtype is torch.float32:
        encoder(bench, args.images)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
