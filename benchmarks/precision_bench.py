"""What bf16 costs in learning: the demo in fp32 and in bf16, seed by seed, and the error of the gradient by parts.

    python benchmarks/precision_bench.py [--seeds 0 1 2] [--precisions fp32 bf16] [--json FILE]
    python benchmarks/precision_bench.py --gradients CHECKPOINT ... [--json FILE]

Without bf16 hardware the products of bf16 tensors are computed in float32 and rounded once to bf16, which is what such
hardware returns up to the order of summation; rows then say "by rounding". No row holds a time. The gradient of the
demo's first batches at a checkpoint is taken in fp32 and with parts of the networks in bf16: ``error`` is its
distance from fp32's over fp32's norm, ``systematic`` how much of it all batches share (1/sqrt(batches) is none).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scrl_fast.config.schema import Config, load_recipe
from scrl_fast.models.heads import ProjectionHead
from scrl_fast.run.precision import cpu_bf16
from scrl_fast.trainer import SCRLTrainer

aten = torch.ops.aten
PRODUCTS = (aten.convolution.default, aten.convolution_backward.default, aten.mm.default, aten.addmm.default)
BATCHES = 4
PARTS = ("all in bf16", "heads in fp32")


class Bf16ByRounding(TorchDispatchMode):
    """Products of bf16 tensors in float32, rounded once: the numbers of bf16 hardware at the speed of float32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in PRODUCTS or not any(_is_bf16(arg) for arg in args):
            return func(*args, **(kwargs or {}))
        result = func(*(arg.float() if _is_bf16(arg) else arg for arg in args), **(kwargs or {}))
        if isinstance(result, Tensor):
            return result.bfloat16()
        return tuple(each if each is None else each.bfloat16() for each in result)


def _is_bf16(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


def bf16_numbers() -> tuple[AbstractContextManager[Any], str]:
    """Under what bf16 is computed here, and its name."""
    return (nullcontext(), "native") if cpu_bf16().native else (Bf16ByRounding(), "by rounding")


# ---- the demo ----


def demo(precision: str, seed: int, threads: int, folder: Path) -> dict[str, Any]:
    """One run of the demo from its start to its measurement."""
    config = load_recipe("demo")
    train = replace(config.train, seed=seed, precision=precision, threads=threads, device="cpu")
    config = replace(config, train=train, run=replace(config.run, dir=str(folder), tensorboard=False))
    numbers, name = bf16_numbers() if precision == "bf16" else (nullcontext(), "native")
    with numbers:
        summary = SCRLTrainer(config).fit()
    row = {key: summary[key] for key in ("step", "loss", "feature_std", "rankme")}
    measured = {key: value["accuracy"] for key, value in summary["roi_linear"].items()}
    return (
        {"case": f"demo {precision} seed={seed}", "precision": precision, "seed": seed, "numbers": name}
        | row
        | measured
    )


# ---- the gradient ----


def gradients(path: str) -> list[dict[str, Any]]:
    """Rows of `PARTS` at one checkpoint of the demo."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = demo_trainer(folder)
        trainer.model.load_state(torch.load(path, weights_only=True)["model"], strict=False)
        stream = trainer.batches()
        batches = [next(stream)[0] for _ in range(BATCHES)]
        stream.close()
        trainer.loader.close()
    exact = [gradient(trainer, batch, None) for batch in batches]
    rows = []
    for part in PARTS:
        errors = [
            {name: value - before[name] for name, value in gradient(trainer, batch, part).items()}
            for batch, before in zip(batches, exact, strict=True)
        ]
        for name in exact[0]:
            norms = sum(error[name].norm().item() for error in errors)
            rows.append(
                {
                    "case": f"gradient at {Path(path).name}",
                    "bf16": part,
                    "numbers": bf16_numbers()[1],
                    "of": name,
                    "error": norms / sum(each[name].norm().item() for each in exact),
                    "systematic": sum(error[name] for error in errors).norm().item() / norms,
                }
            )
    return rows


def demo_trainer(folder: str) -> SCRLTrainer:
    config: Config = load_recipe("demo")
    config = replace(config, data=replace(config.data, demo_images=BATCHES * config.train.batch_size))
    train = replace(config.train, precision="bf16", device="cpu")
    return SCRLTrainer(replace(config, train=train, run=replace(config.run, dir=folder, tensorboard=False)))


def gradient(trainer: SCRLTrainer, batch: Any, part: str | None) -> dict[str, Tensor]:
    """The gradient by parts of the network, float64. part: of `PARTS`, None for fp32."""
    model: Any = trainer.model
    model.zero_grad(set_to_none=True)
    numbers = bf16_numbers()[0] if part else nullcontext()
    plain: Callable[..., Tensor] = ProjectionHead.forward
    if part == "all in bf16":
        ProjectionHead.forward = lambda self, rows: self.net(rows)  # type: ignore[method-assign]
    try:
        with numbers:
            with torch.autocast("cpu", torch.bfloat16, enabled=part is not None):
                loss = model(batch.views if part else batch.views.float(), batch.boxes).loss
            loss.backward()
    finally:
        ProjectionHead.forward = plain  # type: ignore[method-assign]
    found: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[_part_of(name)].append(parameter.grad.flatten().double())
    return {name: torch.cat(each) for name, each in found.items()}


def _part_of(name: str) -> str:
    words = name.split(".")
    if words[:2] != ["online", "encoder"]:
        return words[1] if words[0] == "online" else words[0]
    return words[3] if words[3].startswith("layer") else "stem"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--gradients", nargs="+", metavar="CHECKPOINT", default=[], help="instead of the demo")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows are added to those that it holds")
    args = parser.parse_args()
    found = cpu_bf16()
    bf16 = found.why if found.native else f"by rounding, no bf16 hardware: {found.why}"
    environment = harness.environment("precision", "cpu") | {"bf16": bf16}
    work: list[Callable[[], list[dict[str, Any]]]] = [lambda path=path: gradients(path) for path in args.gradients]
    if not work:
        work = [
            lambda seed=seed, precision=precision: [run(precision, seed, args.threads)]
            for seed in args.seeds
            for precision in args.precisions
        ]
    for each in work:
        for row in each():
            row |= {"commit": environment["commit"]}
            print(json.dumps(row), flush=True)
            if args.json:
                add(args.json, row, environment)
    return 0


def run(precision: str, seed: int, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return demo(precision, seed, threads, Path(folder))


def add(path: Path, row: dict[str, Any], environment: dict[str, Any]) -> None:
    """The row in the file, in place of one of the same run, before the environment of the last one."""
    same = lambda other: all(other.get(name) == row.get(name) for name in ("case", "bf16", "of"))  # noqa: E731
    before = json.loads(path.read_text())[:-1] if path.exists() else []
    rows = [*(other for other in before if not same(other)), row, environment]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
