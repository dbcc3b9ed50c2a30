"""The training step whole, by stage, and beside what its backbone alone costs in the same run.

Ours is the trainer's own step, fed by the trainer's own loader (decoded images in memory, views made ahead by threads
while the step runs). The floor is online encoder forward and backward and target encoder forward, nothing else. The
rival is the step that a reader of the paper would write in plain PyTorch; its views are ready, making them is not in
its time, and on a CPU it has a process, and so a malloc, of its own. Stages are taken inside our timed steps. Beyond
floor and heads is said twice: what is neither encoder nor head by stages, and the step less the floor and the stages of
the heads, which also holds what the encoders lose inside the step. Floor and rival run between our steps while the
threads go on making views, so an input slower than the step does not show here but in input_bench.py.

On a CPU our step runs in the precision that ``train.precision=auto`` takes there, and with ``--both-precisions`` (the
default where the processor multiplies bf16) the other one and the plain step under bf16 autocast run in turns with it.
Rows in bf16 of a processor that only emulates it say so in their dtype.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import harness
import numpy as np
import report
import timing
import torch
from memory_bench import kept_bytes
from sample_box_pairs_bench import random_crops
from step_precisions import PRECISIONS, OtherPrecision, name_precisions
from step_rival import PlainProcess, PlainStep
from torch import Tensor, nn

from scrl_fast.config.schema import (
    BACKBONE_STRIDES,
    BoxesConfig,
    Config,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    ViewsConfig,
)
from scrl_fast.run.precision import cpu_bf16
from scrl_fast.trainer import SCRLTrainer

BACKBONE = ("encoder forward", "target encoder forward", "encoder backward")
HEADS = ("heads forward", "target heads forward", "heads backward")
GREYS = {"floor": "0.7", "scrl_fast": "0.55", "torch": "0.4"}
"""Of bars that are not stages, by provider."""


class Images:
    """Decoded images in memory, so that no decoder is timed here."""

    num_classes = 0

    def __init__(self, count: int, height: int, width: int) -> None:
        self.count = count
        self.images = np.random.default_rng(0).integers(0, 256, (min(count, 32), height, width, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> np.ndarray:
        return self.images[index % len(self.images)]

    def label(self, index: int) -> int:
        return -1

    def name_of(self, index: int) -> str:
        return f"image {index}"


class Stages:
    """Time between marks, by the mark that ends it; one dict of stage -> seconds for each step."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.steps = device.type == "cuda", []
        self.marks: list[tuple[str, Any]] = []

    def mark(self, stage: str) -> None:
        if self.cuda:
            moment: Any = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = timing.time.perf_counter()
        self.marks.append((stage, moment))

    def end(self) -> None:
        self.steps.append(self.marks)
        self.marks = []

    def seconds(self) -> dict[str, list[float]]:
        """Of the timed steps, neither those to warm up and to set the pace nor the one for the peak of memory."""
        steps = self.steps[timing.WARM_UP_CALLS + 1 : -1]
        if self.cuda:
            torch.cuda.synchronize()
        found: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(steps))
        for number, marks in enumerate(steps):
            for (_, before), (stage, after) in itertools.pairwise(marks):
                found[stage][number] += before.elapsed_time(after) * 1e-3 if self.cuda else after - before
        return found


class Timed(nn.Module):
    """A part of the network that marks when it begins, ends, and has handed its input's gradient on."""

    def __init__(self, part: Any, stages: Stages, before: str, during: str, backward: str = "", of_input: bool = False):
        super().__init__()
        self.part, self.stages = part, stages
        self.names, self.of_input = (before, during, backward), of_input
        self.stride = getattr(part, "stride", 0)

    def forward(self, x: Tensor) -> Tensor:
        before, during, backward = self.names
        self.stages.mark(before)
        y = self.part(x)
        self.stages.mark(during)
        watched = x if self.of_input else y
        if backward and watched.requires_grad:
            watched.register_hook(lambda grad: self.stages.mark(backward))
        return y


def instrument(trainer: SCRLTrainer, stages: Stages) -> None:
    """Marks around the parts, in the order in which they run; what lies between two of them belongs to the later."""
    model: Any = trainer.model
    online, target = model.online, model.target
    online.encoder = Timed(online.encoder, stages, "batch to the step", "encoder forward", "RoIAlign backward")
    target.encoder = Timed(target.encoder, stages, "other", "target encoder forward")
    target.projector = Timed(target.projector, stages, "RoIAlign target", "target heads forward")
    online.projector = Timed(online.projector, stages, "RoIAlign forward", "heads forward", "heads backward", True)
    model.predictor = Timed(model.predictor, stages, "other", "heads forward", "loss")
    optimizer = trainer.optimizer
    optimizer.register_step_pre_hook(lambda *_: stages.mark("encoder backward"))
    optimizer.register_step_post_hook(lambda *_: stages.mark("update"))


def configuration(args: argparse.Namespace, batch: int, folder: str, dtype: str) -> Config:
    size = args.size or (224 if BACKBONE_STRIDES.get(args.backbone, 32) >= 32 else 64)
    return Config(
        data=DataConfig(workers=args.workers),
        views=ViewsConfig(size=size),
        boxes=BoxesConfig(min_size=max(8, size // 7)),
        model=ModelConfig(backbone=args.backbone),
        run=RunConfig(dir=folder, tensorboard=False),
        train=TrainConfig(
            batch_size=batch,
            epochs=100_000,
            device=args.device,
            compile=args.compile,
            cuda_graphs=args.cuda_graphs,
            checkpoint_activations=args.checkpoint_activations,
            deterministic=args.deterministic,
            precision=PRECISIONS[dtype],
        ),
    )


def step_of(trainer: SCRLTrainer, stages: Stages) -> timing.Call:
    stream = trainer.batches()

    def step() -> None:
        stages.mark("")
        group = next(stream)
        stages.mark("input wait")
        trainer.train_step(group)
        stages.mark("other")
        stages.end()
        if len(trainer.meter.rows) >= 10:
            trainer.meter.drain()

    return step


def floor_of(trainer: SCRLTrainer, views: Tensor, bf16: bool) -> timing.Call:
    online, target = trainer.model.online.encoder, trainer.model.target.encoder
    cotangent: list[Tensor] = []

    def floor() -> None:
        if trainer.config.train.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(views.device.type, torch.bfloat16, enabled=bf16):
            features = online(views)
            with torch.no_grad():
                target(views)
        if not cotangent:
            cotangent.append(torch.randn_like(features) * 1e-3)
        features.backward(cotangent[0])
        online.zero_grad(set_to_none=True)

    return floor


def activation_bytes(trainer: SCRLTrainer, views: Tensor) -> int:
    """What the online encoder keeps for its backward pass, beside its parameters."""
    with autocast(trainer):
        return kept_bytes(trainer.model.online.encoder, views)


def other_precision(bench: harness.Bench, batch: int, size: int, folder: str) -> OtherPrecision:
    """Our step in the precision that --dtype is not, and the plain step under bf16 autocast."""
    dtype = next(name for name in PRECISIONS if name != bench.args.dtype)
    trainer = SCRLTrainer(configuration(bench.args, batch, folder, dtype), source=Images(4 * batch, 375, 500))
    stream = trainer.batches()
    kept = activation_bytes(trainer, next(stream)[0].views) // batch
    stream.close()
    plain = PlainProcess(bench.args.backbone, batch, size, bf16=True)
    return OtherPrecision(dtype, trainer, step_of(trainer, Stages(bench.device)), kept, plain)


def agree_with_eager(trainer: SCRLTrainer, ready: Any) -> None:
    """The compiled encoders give the loss of those that are not."""
    losses, graphs = [], trainer.config.train.cuda_graphs
    for stance in ("default", "force_eager"):
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        # with gradients, as the step runs: without, the encoder would be compiled once more
        with torch.compiler.set_stance(stance), autocast(trainer):
            losses.append(trainer.model(ready.views, ready.boxes).loss.detach().clone())
    torch.testing.assert_close(*losses, rtol=2e-2 if trainer.precision.bf16 else 1e-3, atol=0)


def autocast(trainer: SCRLTrainer) -> torch.autocast:
    return torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.precision.bf16)


def measure(bench: harness.Bench, batch: int, rival: bool) -> None:
    args = bench.args
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(args, batch, f"{folder}/own", args.dtype)
        trainer = SCRLTrainer(config, source=Images(4 * batch, 375, 500))
        stream = trainer.batches()
        (ready,) = next(stream)
        stream.close()
        views = ready.views
        model, stages = trainer.model, Stages(bench.device)
        plain = PlainStep(model, views.float(), random_crops(batch)) if rival else None
        timed = PlainProcess(args.backbone, batch, views.shape[-1]) if rival and args.device == "cpu" else plain
        kept = activation_bytes(trainer, views) // batch
        floor = floor_of(trainer, views, trainer.precision.bf16)
        floor_trainer_parts = (model.online.encoder, model.target.encoder)

        def agree() -> None:
            if plain is None:
                if args.compile or args.cuda_graphs:
                    agree_with_eager(trainer, ready)
                return
            with torch.no_grad():
                with autocast(trainer):
                    ours = model(views, ready.boxes).loss
                expected = plain.loss(ready.boxes)
            torch.testing.assert_close(ours, expected, rtol=2e-2 if trainer.precision.bf16 else 1e-3, atol=0)

        both = rival and args.device == "cpu" and args.both_precisions
        other = other_precision(bench, batch, views.shape[-1], f"{folder}/other") if both else None
        providers: dict[str, timing.Call] = {"scrl_fast/step": step_of(trainer, stages), "floor/encoders": floor}
        providers |= other.providers if other else {}
        if timed is not None:
            providers["torch/plain step"] = timed
        case = harness.case_name(f"step {args.backbone}", batch=batch)

        def check() -> None:
            agree()
            instrument(trainer, stages)
            assert model.online.encoder.part is floor_trainer_parts[0]

        rows = bench.case(case, providers, items=batch, check=check)
        if isinstance(timed, PlainProcess):
            timed.close()
        name_precisions(rows, other.dtypes if other else {"plain step": "float32"} if args.device == "cpu" else {})
        if rows:
            tell(bench, batch, rows, stages, kept, other.shares(rows) if other else {})
        if other:
            other.close()
        trainer.loader.close()


def tell(
    bench: harness.Bench, batch: int, rows: list[dict[str, Any]], stages: Stages, kept: int, other: dict[str, Any]
) -> None:
    """The stages as rows of their own, and the shares that were promised. other: those of the other precision."""
    medians, backbone = {}, bench.args.backbone
    for stage, seconds in stages.seconds().items():
        p20, p50, p80 = np.percentile(seconds, [20, 50, 80]) * 1e3
        medians[stage] = float(p50)
        values = (bench.name, f"stages {backbone} batch={batch}", "scrl_fast", stage, bench.args.device)
        values += (
            bench.args.dtype,
            float(p20),
            float(p50),
            float(p80),
            0,
            None,
            batch / p50 * 1e3 if p50 else None,
            None,
        )
        bench.rows.append(dict(zip(harness.ROW, values, strict=True)))
        name_precisions(bench.rows[-1:], {})
    whole = sum(medians.values())
    encoders, heads = (sum(medians.get(stage, 0.0) for stage in parts) for parts in (BACKBONE, HEADS))
    main = ("step", "encoders", "plain step")
    by_name = {row["provider"]: row["p50_ms"] for row in rows if row["backend"] in main}
    shares = {
        "beyond_floor_and_heads": 1 - (encoders + heads) / whole,
        "beyond_floor_and_heads_by_difference": (
            1 - (by_name["floor"] + heads) / by_name["scrl_fast"] if "floor" in by_name else None
        ),
        "encoders_over_floor": encoders / by_name["floor"] if "floor" in by_name else None,
        "beyond_floor": 1 - by_name["floor"] / by_name["scrl_fast"] if "floor" in by_name else None,
        "plain_over_ours": by_name["torch"] / by_name["scrl_fast"] if "torch" in by_name else None,
        "images_per_s": batch / by_name["scrl_fast"] * 1e3,
        "activation_bytes_per_image": kept,
        **other,
    }
    bench.rows.append({"bench": bench.name, "case": f"shares {backbone} batch={batch}", **shares})
    print(f"\nstages of our step, {backbone}, batch {batch}")
    for stage, ms in medians.items():
        print(f"  {stage:24s}{ms:10.2f} ms  {ms / whole:6.1%}")
    print(f"  beyond floor and heads, by stages: {shares['beyond_floor_and_heads']:.1%} of the step")
    if shares["encoders_over_floor"] is not None:
        print(f"  the encoders take {shares['encoders_over_floor']:.3f} times as long inside the step as alone")
    if shares["beyond_floor"] is not None:
        less = shares["beyond_floor_and_heads_by_difference"]
        print(f"  by difference: {less:.1%}, and with the heads {shares['beyond_floor']:.1%}")
    if shares["plain_over_ours"] is not None:
        print(f"  the plain step takes {shares['plain_over_ours']:.2f} times as long")
    print(f"  encoder activations kept: {kept / 1e6:.1f} MB an image", flush=True)
    for name, value in other.items():
        print(f"  {name}: {value:.4g}")


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """One bar a case: our stages stacked, the floor and the rival beside them."""
    if (plt := report.pyplot(file)) is None:
        return
    cases = [
        row["case"].removeprefix("step ")
        for row in rows
        if row["case"].startswith("step ") and row["backend"] == "step"
    ]
    figure, axes = plt.subplots(1, len(cases), figsize=(5.5 * len(cases), 5.5), squeeze=False, layout="constrained")
    for axis, case in zip(axes[0], cases, strict=True):
        below = 0.0
        staged = [row for row in rows if row["case"] == f"stages {case}"]
        for colour, row in enumerate(staged):
            axis.bar("scrl_fast", row["p50_ms"], bottom=below, color=plt.cm.tab20(colour % 20), label=row["backend"])
            below += row["p50_ms"]
        for row in rows:
            if row["case"] == f"step {case}" and row["backend"] != "step":
                name = row["backend"] if row["provider"] != "scrl_fast" else f"scrl_fast {row['backend'].split()[-1]}"
                axis.bar(name.replace(" step", "\nstep"), row["p50_ms"], color=GREYS[row["provider"]])
        axis.set(title=case, ylabel="ms a step")
        axis.tick_params("x", labelsize=7)
    handles, labels = axes[0][0].get_legend_handles_labels()  # the same stages, in the same colours, in every case
    figure.legend(handles[::-1], labels[::-1], fontsize=7, loc="outside right upper")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> int:
    cuda = torch.cuda.is_available()
    parser = harness.parser("step", __doc__, dtype="bfloat16" if cuda or cpu_bf16().native else "float32")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--batch", type=int, nargs="+", default=[256] if cuda else [8, 16], help="images a step")
    parser.add_argument("--rival-batch", type=int, help="at which the plain step runs (default: the first; 0: none)")
    parser.add_argument("--size", type=int, help="of the views in pixels (default: 224, or 64 for resnet10_tiny)")
    parser.add_argument("--workers", type=int, default=16 if cuda else 2, help="threads that make views")
    parser.add_argument("--compile", action="store_true", help="torch.compile for the encoders, the floor's too")
    parser.add_argument("--cuda-graphs", action="store_true", help="replay the encoders as graphs, the floor's too")
    parser.add_argument("--checkpoint-activations", action="store_true")
    parser.add_argument("--deterministic", action="store_true", help="train.deterministic; needs --rival-batch 0")
    both = {"action": argparse.BooleanOptionalAction, "default": cpu_bf16().native}
    parser.add_argument("--both-precisions", **both, help="on a CPU: fp32 and bf16 in turns (default: %(default)s)")
    parser.set_defaults(repeats=20 if cuda else 5, seconds=30.0, cache="warm")
    args = parser.parse_args()
    if args.dtype not in ("float32", "bfloat16"):
        parser.error("--dtype must be float32 or bfloat16")
    if args.deterministic and args.rival_batch != 0:  # it would run torchvision's slow path, or on a CPU hear nothing
        parser.error("--deterministic needs --rival-batch 0: it is not a mode of the plain step's process")
    timing.WARM_UP_CALLS = 3 if args.device == "cuda" else 1  # a step of seconds is warm after one
    bench = harness.Bench("step", args)
    bench.environment["bf16"] = cpu_bf16().why
    bench.environment |= {name: getattr(args, name) for name in ("compile", "cuda_graphs", "deterministic")}
    for batch in args.batch:
        measure(bench, batch, rival=batch == (args.batch[0] if args.rival_batch is None else args.rival_batch))
    picture, args.plot = args.plot, None
    if picture and bench.rows:
        draw(bench.rows, picture)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
