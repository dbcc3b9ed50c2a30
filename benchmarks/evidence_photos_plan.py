"""What is measured on photographs: every stage as a command of scrl_fast, in the order in which they run.

A table of the stages that are finished says what can be said so far. In the words of a command, WORK and DATA stand
for the folders given to the script: the repository holds no path.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

METHODS = ("byol", "scrl")
SUPERVISED = "WORK/supervised.safetensors"
VOC = "DATA/voc2007/VOCdevkit"
DATA_SETS = {"voc": (VOC, "test"), "aquarium": ("DATA/aquarium", "val+test")}
"""Of detection: folder, and the split to measure on."""


@dataclass(frozen=True)
class Group:
    """Starts that are compared with one another: one encoder, one recipe of pre-training."""

    name: str
    backbone: str
    views: tuple[str, ...]
    """The normalisation of its images."""
    starts: tuple[str, ...]
    """In the order of the table."""
    epochs: str = "epochs"
    """The field of `Budget` that holds the length of pre-training."""
    seeds: str = "pretraining_seeds"
    """The field of `Budget` that holds how often pre-training is repeated."""
    tuned: bool = True
    """Whether the grid chooses the setting of each method."""


_HALF = "[0.5,0.5,0.5]"
SCRATCH = Group("scratch", "evidence_encoder:resnet10_quarter", (), ("random", *METHODS))
CONTINUED = Group(
    "continued",
    "timm:tf_efficientnet_lite0",
    (f"--views.mean={_HALF}", f"--views.std={_HALF}"),
    ("supervised", *METHODS),
    epochs="continued_epochs",
    seeds="continued_seeds",
    tuned=False,
)
SHORT = replace(SCRATCH, name="short", starts=METHODS, epochs="short_epochs")
"""As from scratch, with every setting of the grid, for a shorter time: what the setting is chosen by."""
CELLS = replace(SCRATCH, name="cells", backbone="evidence_encoder:resnet10_quarter_stride16", seeds="cells_seeds")
"""As from scratch, settings too, but with 7 x 7 cells in a view in place of 4 x 4: do they limit what is learned?"""
GROUPS = (SCRATCH, CONTINUED)
"""Those that detectors are trained from."""


@dataclass(frozen=True)
class Budget:
    """How much is spent on each start of a group, whatever its method."""

    epochs: int = 50
    short_epochs: int = 10
    batch_size: int = 64
    view: int = 112
    continued_epochs: int = 5
    pretraining_seeds: int = 5
    continued_seeds: int = 1
    cells_seeds: int = 2
    images: int = 0
    """Of RoI linear, 0: all; else so many of each split."""
    dense_images: int = 990
    label_seeds: int = 5
    """How often a share of the labels is drawn for RoI linear."""
    detector_steps: tuple[int, int] = (2000, 800)
    """From scratch, and from ImageNet weights: these know more, and a step of their network takes longer."""
    detector_batch: int = 8
    detector_side: int = 128
    detector_images: int = 0
    """To measure on, 0: all."""
    detector_seeds: int = 3
    shares: tuple[float, ...] = (0.1, 1.0)
    grid: tuple[tuple[float, float], ...] = ((8.0, 0.99), (16.0, 0.97), (4.0, 0.99))
    """(lr, EMA) tried for both methods; held photographs choose, which are none of the test split."""


BUDGETS = {
    "standard": Budget(),
    "smoke": Budget(
        epochs=2, short_epochs=1, continued_epochs=1, pretraining_seeds=1, detector_seeds=1,
        batch_size=4, view=64, images=8, dense_images=4, label_seeds=2,
        detector_steps=(1, 1), detector_batch=2, detector_side=64, detector_images=2,
        grid=((8.0, 0.99), (16.0, 0.97)),
    ),  # does it run?
}  # fmt: skip
HELD_FOLD = 5  # every fifth photograph of trainval chooses the setting


@dataclass(frozen=True)
class Stage:
    """One command. An empty one waits for results of others."""

    name: str
    words: tuple[str, ...]
    facts: tuple[tuple[str, Any], ...]
    """What its result stands for in the table: group, start, measure, ...."""
    needs: tuple[str, ...] = ()
    """Stages that must be finished before."""


def planned(budget: Budget, results: Mapping[str, Any]) -> list[Stage]:
    """Every stage in its order. results: of finished stages, by name; settings are chosen by those of tuning."""
    stages = [*measures(SCRATCH, "random", 0, budget)]
    stages.append(_stage("supervised", ("supervised",), group="continued", start="supervised", measure="weights"))
    stages += [*measures(CONTINUED, "supervised", 0, budget), *tuning(budget)]
    for group in (SCRATCH, CONTINUED, CELLS):
        for seed in range(getattr(budget, group.seeds)):
            stages += measures(group, "random", seed, budget)
            for method in ("scrl", "byol"):
                stages += trained(group, method, seed, budget, results)
    for seed in range(budget.pretraining_seeds):
        for start in SCRATCH.starts:
            stages += few_labels(SCRATCH, start, seed, budget)
    for share, data, seed in itertools.product(budget.shares, DATA_SETS, range(budget.detector_seeds)):
        for group in GROUPS:
            stages += detectors(group, data, share, seed, budget)
    return [_when_ready(stage, results) for stage in {stage.name: stage for stage in stages}.values()]


def _when_ready(stage: Stage, results: Mapping[str, Any]) -> Stage:
    """The stage, without its command as long as what the command reads is not there."""
    return stage if all(name in results for name in stage.needs) else replace(stage, words=())


def _stage(name: str, words: tuple[str, ...], needs: tuple[str, ...] = (), **facts: Any) -> Stage:
    return Stage(name, words, tuple(facts.items()), needs)


# ---- pre-training ----


def tuning(budget: Budget) -> list[Stage]:
    """The grid, for both methods alike, and what each setting gives on held photographs of trainval and on the test."""
    stages = []
    for (lr, ema), method in itertools.product(budget.grid, ("scrl", "byol")):
        start = f"{method}-lr{lr:g}-ema{ema:g}"
        words = _pretraining(SHORT, method, 0, budget.short_epochs, budget, f"WORK/short/{start}")
        words = (*words, f"--optim.lr={lr:g}", f"--optim.ema_momentum={ema:g}")
        facts: dict[str, Any] = {"group": "short", "start": method, "lr": lr, "ema": ema, "epochs": budget.short_epochs}
        stages.append(_stage(f"short/{start}/pretrain", words, measure="pretrain", **facts))
        split = ("--data.root=WORK/voc", "--data.train=tune", "--data.test=held")
        words = _roi_linear(SHORT, f"WORK/short/{start}", 0, budget, split)
        held = _stage(f"short/{start}/held", words, (f"short/{start}/pretrain",), measure="held", **facts)
        stages += [held, *measures(SHORT, start, 0, budget, facts)]
    return stages


def chosen(method: str, budget: Budget, results: Mapping[str, Any]) -> tuple[float, float] | None:
    """(lr, EMA) with the best RoI linear accuracy on held photographs; None before all of the grid is measured."""
    names = {setting: f"short/{method}-lr{setting[0]:g}-ema{setting[1]:g}/held" for setting in budget.grid}
    if not all(name in results for name in names.values()):
        return None
    return max(names, key=lambda setting: results[names[setting]]["result"]["accuracy"])


def trained(group: Group, method: str, seed: int, budget: Budget, results: Mapping[str, Any]) -> list[Stage]:
    """Pre-training of a start and its measures."""
    run = run_of(group, method, seed)
    epochs = getattr(budget, group.epochs)
    words = _pretraining(group, method, seed, epochs, budget, run)
    facts: dict[str, Any] = {"group": group.name, "start": method, "seed": seed, "epochs": epochs}
    if group.tuned:
        setting = chosen(method, budget, results)
        lr, ema = setting or (None, None)
        words = (*words, f"--optim.lr={lr:g}", f"--optim.ema_momentum={ema:g}") if setting else ()
        facts |= {"lr": lr, "ema": ema}
    needs = ("supervised",) if group is CONTINUED else ()
    stage = _stage(f"{group.name}/{method}-{seed}/pretrain", words, needs, measure="pretrain", **facts)
    return [stage, *measures(group, method, seed, budget)]


def run_of(group: Group, start: str, seed: int) -> str:
    """The weights of a start, as ``--init`` takes them."""
    if start in ("random", "supervised"):
        return SUPERVISED if start == "supervised" else start
    return f"WORK/{_place(group, start, seed)}"


def _place(group: Group, start: str, seed: int) -> str:
    """What the stages and the run of a start are called; settings of the grid have one seed."""
    return f"{group.name}/{start}" if group is SHORT else f"{group.name}/{start}-{seed}"


def _needs(group: Group, start: str, seed: int) -> tuple[str, ...]:
    """The stage that makes the weights of a start."""
    if start == "random":
        return ()
    return ("supervised",) if start == "supervised" else (f"{_place(group, start, seed)}/pretrain",)


def _pretraining(group: Group, method: str, seed: int, epochs: int, budget: Budget, run: str) -> tuple[str, ...]:
    recipe: tuple[str, ...] = ("--config=demo", f"--optim.warmup_epochs={max(0.5, epochs / 20):g}")
    if group is CONTINUED:  # its optimizer, rate and moving average, made for trained weights
        recipe = ("--config=continue", f"--init={SUPERVISED}", "--optim.lr=4e-4")
        # bf16 takes longer there: the backward of depthwise convolutions
        recipe = (*recipe, f"--optim.warmup_epochs={epochs / 10:g}", "--train.precision=fp32")
    return (
        *("scrl_fast.train", *recipe, "--data.source=list", "--data.root=WORK/trainval.txt"),
        *(f"--model.method={method}", f"--model.backbone={group.backbone}"),
        *("--model.hidden_dim=512", "--model.projection_dim=128"),
        *(*_views_and_boxes(group, budget), *PUBLISHED_COLOURS),
        *(f"--train.batch_size={budget.batch_size}", f"--train.epochs={epochs}", f"--train.seed={seed}"),
        *(f"--run.dir={run}", "--run.log_every=20", "--run.tensorboard=false", "--eval.roi_linear=false"),
        "--resume=auto",
    )


PUBLISHED_COLOURS = (
    *("--views.brightness=0.4", "--views.contrast=0.4", "--views.saturation=0.2", "--views.hue=0.1"),
    *("--views.grayscale=0.2", "--views.blur_probability=[1.0,0.1]"),
)
"""The demo's recipe is stronger in them, for generated scenes."""


def _views_and_boxes(group: Group, budget: Budget) -> tuple[str, ...]:
    """A box is a cell of the last feature map at least (four where the stride is 16), as in the paper's recipe."""
    return (f"--views.size={budget.view}", *group.views, "--boxes.per_image=8", "--boxes.min_size=32")


# ---- measures ----


def measures(
    group: Group, start: str, seed: int, budget: Budget, facts: Mapping[str, Any] | None = None
) -> list[Stage]:
    """RoI linear and dense retrieval on photographs of the test split. facts: of the start, where they are more."""
    weights = run_of(group, start, seed)
    facts = {"group": group.name, "start": start, "seed": seed, **(facts or {})}
    place, needs = _place(group, start, seed), _needs(group, start, seed)
    roi = _roi_linear(group, weights, seed, budget, (f"--data.root={VOC}",))
    dense = (
        *("scrl_fast.evaluate", "dense-consistency", f"--checkpoint={weights}", f"--backbone={group.backbone}"),
        *("--data.source=list", "--data.root=WORK/test.txt", f"--images={budget.dense_images}", "--plot="),
        *(*_views_and_boxes(group, budget), "--batchnorm=measured", f"--seed={seed}", "--workers=1"),
    )
    return [
        _stage(f"{place}/roi", roi, needs, measure="roi", **facts),
        _stage(f"{place}/dense", dense, needs, measure="dense", **facts),
    ]


def _roi_linear(group: Group, weights: str, seed: int, budget: Budget, split: tuple[str, ...]) -> tuple[str, ...]:
    return (
        *("scrl_fast.evaluate", "roi-linear", f"--checkpoint={weights}", f"--backbone={group.backbone}"),
        *("--data.source=voc", *split, f"--data.max_images={budget.images}"),
        *("--cache=", f"--seed={seed}", "--workers=1"),
    )


def few_labels(group: Group, start: str, seed: int, budget: Budget) -> list[Stage]:
    """RoI linear with a share of the labels, drawn several times alike for every start, on both sets of photographs."""
    stages = []
    for data, share in itertools.product(DATA_SETS, budget.shares):
        if data == "voc" and share == 1:
            continue  # `measures` has it
        words = (
            *("scrl_fast.evaluate", "compare", f"--data.root={DATA_SETS[data][0]}", f"--backbone={group.backbone}"),
            *(f"--checkpoints={run_of(group, start, seed)}", f"--shares={share:g}", f"--seeds={budget.label_seeds}"),
            # photographs of its own for every pre-training: draws that several shared would not be independent
            *(f"--seed={seed * budget.label_seeds}", "--cache=WORK/features", "--workers=1"),
        )
        facts = {"group": group.name, "start": start, "seed": seed, "measure": "few", "data": data, "share": share}
        name = f"{_place(group, start, seed)}/few-{data}-{share:g}"
        stages.append(_stage(name, words, _needs(group, start, seed), **facts))
    return stages


# ---- detection ----


def detectors(group: Group, data: str, share: float, seed: int, budget: Budget) -> list[Stage]:
    """A row of each start: one data set, one share of the labels, one seed of fine-tuning.

    Each seed has the encoder of a pre-training of its own, as far as there are as many.
    """
    stages = []
    for start in group.starts:
        pretraining = seed % getattr(budget, group.seeds)
        name = f"detectors/{group.name}-{data}/{start}-{share:g}-{seed}"
        row = (f"--inits={run_of(group, start, pretraining)}", f"--shares={share:g}", f"--train.seed={seed}")
        row = (*row, "--seeds=1", *(("--compare.leaks=off",) if seed else ()))  # the first seed looks for them
        words = (*_comparing(group, data, budget), f"--compare.dir=WORK/{name}", *row)
        facts = {"measure": "ap", "data": data, "share": share, "pretraining_seed": pretraining}
        needs = _needs(group, start, pretraining)
        stages.append(_stage(name, words, needs, group=group.name, start=start, seed=seed, **facts))
    return stages


def _comparing(group: Group, data: str, budget: Budget) -> tuple[str, ...]:
    root, measured_on = DATA_SETS[data]
    side, steps = budget.detector_side, budget.detector_steps[GROUPS.index(group)]
    return (
        *("scrl_fast.transfer", "compare", "custom", f"--data.root={root}", f"--data.val={measured_on}"),
        "--compare.keep_detectors=false",
        *(f"--model.backbone={group.backbone}", *(word.replace("views", "model") for word in group.views)),
        *(f"--model.short_side=[{side},{side + 32}]", f"--model.test_short_side={side}"),
        *("--model.fpn_channels=32", "--model.head_channels=128", "--model.anchor_scale=4"),
        *("--model.proposals_before_nms=[200,100]", "--model.proposals=[100,50]", "--model.rois_per_image=32"),
        *(f"--train.steps={steps}", f"--train.batch_size={budget.detector_batch}", "--train.precision=fp32"),
        *("--optim.lr=0.04", "--optim.clip_norm=5", f"--eval.images={budget.detector_images}", "--eval.batch_size=8"),
        *(
            "--data.workers=1",
            "--run.tensorboard=false",
            f"--run.checkpoint_every={max(1, steps // 4)}",
        ),
    )
