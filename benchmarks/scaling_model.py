"""What many GPUs would make of the step, on paper: exchanges and bytes counted on the networks, links and step assumed.

    python benchmarks/scaling_model.py [--step-ms 120] [--json FILE]

Prints the table of docs/distributed.md. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from scrl_fast.models import SCRL

BUCKET_BYTES = 25 * 2**20  # of DDP: the last one waits for the last gradient, so nothing hides it
LINKS = ((8, 300.0, 30.0), (32, 40.0, 60.0), (256, 40.0, 120.0))  # GPUs, GB/s, microseconds an exchange: assumed


@dataclass
class Exchanged:
    """What a step exchanges: gradient_bytes; exchanges of BatchNorm statistics and bytes of one encoder's pass."""

    gradient_bytes: int
    exchanges: int
    statistics_bytes: int


def exchanged(backbone: str = "resnet50", num_classes: int = 1000) -> Exchanged:
    """Counted on networks without memory. Each norm exchanges in every pass: forward, and backward where it learns."""
    with torch.device("meta"):
        model = SCRL(backbone, num_classes=num_classes)

    def norms(*parts: torch.nn.Module) -> list[_BatchNorm]:
        return [m for part in parts for m in part.modules() if isinstance(m, _BatchNorm)]

    learning, following = norms(model.online, model.predictor), norms(model.target)
    return Exchanged(
        gradient_bytes=sum(4 * p.numel() for p in model.parameters() if p.requires_grad),
        exchanges=2 * len(learning) + len(following),
        statistics_bytes=sum(4 * (2 * norm.num_features + 1) for norm in norms(model.online.encoder)),
    )


def predict(what: Exchanged, step_ms: float, gpus: int, gb_per_s: float, latency_us: float) -> dict[str, Any]:
    """Milliseconds of a step with `gpus` GPUs, each with the batch of one, by ring all-reduce."""
    ring = 2 * (gpus - 1) / gpus / gb_per_s * 1e-6
    norms, bare = what.exchanges * latency_us * 1e-3, min(BUCKET_BYTES, what.gradient_bytes) * ring
    whole = step_ms + norms + bare
    return {
        "gpus": gpus,
        "gb_per_s": gb_per_s,
        "latency_us": latency_us,
        "all_reduce_ms": what.gradient_bytes * ring,
        "not_hidden_ms": bare,
        "batch_norm_ms": norms,
        "step_ms": whole,
        "efficiency": step_ms / whole,
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows in Markdown."""
    return [
        f"| {row['all_reduce_ms']:.1f} ms | {row['not_hidden_ms']:.1f} ms | {row['batch_norm_ms']:.1f} ms "
        f"| {row['step_ms']:.0f} ms | {100 * row['efficiency']:.0f} % |"
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--step-ms", type=float, default=120.0, help="the step on one GPU (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    what = exchanged(args.backbone)
    rows = [predict(what, args.step_ms, *link) for link in LINKS]
    print(asdict(what))
    for row, line in zip(rows, table(rows), strict=True):
        print(f"{row['gpus']:4d} GPUs, {row['gb_per_s']:g} GB/s, {row['latency_us']:g} us {line}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"assumed": {"step_ms": args.step_ms, "links": LINKS}, "counted": asdict(what), "rows": rows}
        args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
