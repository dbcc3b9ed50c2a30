"""Memory of the step: what each encoder keeps for its backward pass; on a CPU, what keeping freed memory is worth.

    python benchmarks/memory_bench.py [--backbones resnet50 ...] [--json FILE]

Activations are counted, on networks without memory, for one image (its two views) in float32. The time is taken with
malloc as it comes and as ``train.keep_memory`` sets it, in turns, in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import harness
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from scrl_fast.models import build_encoder
from scrl_fast.models.encoders import TORCHVISION_NAMES
from scrl_fast.run.numerics import keep_memory
from scrl_fast.run.precision import cpu_bf16

ROUNDS, FILL_BYTES = 3, 51_380_224  # 32 maps of 2048 x 14 x 14 in float32
CHILD = "--child"


def kept_bytes(encoder: nn.Module, views: Tensor) -> int:
    """What the encoder keeps for its backward pass, each storage once, beside its parameters."""
    kept: dict[int, Tensor] = {}
    parameters = {p.untyped_storage()._cdata for p in encoder.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = encoder(views)  # what was kept lives as long as this
    total = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in parameters)
    del result
    return total


def activations(name: str, size: int = 224) -> dict[str, Any]:
    """``{backbone, bytes_per_image, checkpointed_bytes_per_image}`` for views of `size` pixels in float32.

    ``bf16_bytes_per_image``: under bf16 autocast, beside one bf16 copy of the weights.
    """
    row: dict[str, Any] = {"case": f"activations {name} views={size}", "backbone": name}
    with torch.device("meta"):
        encoder, views = build_encoder(name), torch.empty(2, 3, size, size)
    for key, on in (("bytes_per_image", False), ("checkpointed_bytes_per_image", True)):
        encoder.checkpointing = on
        row[key] = kept_bytes(encoder, views)
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):  # autocast knows no meta device
        encoder = build_encoder(name)
        one, two = (kept_bytes(encoder, torch.empty(count, 3, size, size)) for count in (2, 4))
    row["bf16_bytes_per_image"] = two - one
    return row


def timed(keep: bool) -> dict[str, float]:
    """Milliseconds of a fresh 51 MB output and of ResNet-50's forward and backward pass of 4 views, fp32 and bf16."""
    if keep:
        keep_memory()
    encoder = build_encoder("resnet50").to(memory_format=torch.channels_last)
    views = torch.randn(4, 3, 224, 224).contiguous(memory_format=torch.channels_last)

    def step(bf16: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            features = encoder(views)
        features.float().sum().backward()

    passes = "resnet50 forward and backward, 4 views"
    bf16 = f"{passes}, bf16" if cpu_bf16().native else f"{passes}, bf16 (emulated)"
    works = {"fill 51 MB": fill, passes: lambda: step(False), bf16: lambda: step(True)}
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(4):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            times[name].append((time.perf_counter() - started) * 1e3)
    return {name: median(each[1:]) for name, each in times.items()}


def fill() -> None:
    torch.empty(FILL_BYTES, dtype=torch.uint8).fill_(1)


def compare() -> list[dict[str, Any]]:
    """Rows of `timed`, by turns in processes of their own, since malloc cannot be set back."""
    found: dict[str, dict[str, list[float]]] = {"returned": {}, "kept": {}}
    for _ in range(ROUNDS):
        for memory, times in found.items():
            command = [sys.executable, __file__, CHILD, memory]
            said = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
            for name, ms in json.loads(said).items():
                times.setdefault(name, []).append(ms)
    return [
        {"case": name, "memory": memory, "p50_ms": median(each), "min_ms": min(each)}
        for memory, times in found.items()
        for name, each in times.items()
    ]


def main() -> int:
    if sys.argv[1:2] == [CHILD]:
        print(json.dumps(timed(sys.argv[2] == "kept")))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--backbones", nargs="+", default=list(TORCHVISION_NAMES))
    parser.add_argument("--size", type=int, default=224, help="of a view in pixels (default: %(default)s)")
    parser.add_argument("--no-times", action="store_true", help="count activations only")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rows = [activations(name, args.size) for name in args.backbones]
    for row in rows:
        kept, checkpointed = (row[key] / 1e6 for key in ("bytes_per_image", "checkpointed_bytes_per_image"))
        half = row["bf16_bytes_per_image"] / 1e6
        line = f"{row['backbone']:18s} {kept:6.1f} MB an image, {checkpointed:6.1f} MB checkpointed"
        print(f"{line}, {half:6.1f} MB in bf16", flush=True)
    if not args.no_times:
        rows += compare()
        for row in rows[len(args.backbones) :]:
            print(f"{row['case']:40s} memory {row['memory']:9s} {row['p50_ms']:9.1f} ms", flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([*rows, harness.environment("memory", "cpu")], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
