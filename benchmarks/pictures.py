"""The pictures of README and docs, from kept results and our own drawn scenes: ``python benchmarks/pictures.py``.

``--run=RUN`` is a run of the demo for views_and_features.png and dense_consistency.png; where RUN does not exist, the
demo is trained into it first, for minutes. Without the option only the pictures that need no network are drawn.
Everything goes to docs/pictures. Nothing here measures.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image
from summary import RESULTS, ratios

from scrl_fast.build import build_model
from scrl_fast.config.schema import Config, ViewsConfig
from scrl_fast.data import DemoScenes
from scrl_fast.evaluate.config import RankOptions
from scrl_fast.evaluate.dense import view_pairs
from scrl_fast.evaluate.encoder import load_evaluated
from scrl_fast.evaluate.images import ImageLoader, frozen_copy, measure_batchnorm_on_images
from scrl_fast.evaluate.pca import dense_features, principal_components
from scrl_fast.evaluate.plots import draw_similarity
from scrl_fast.models import Encoder
from scrl_fast.run.plots import outline, to_picture

matplotlib.use("Agg")
ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs/pictures"
SCENES = 64
"""Held-out scenes that the components are taken from."""
SHOWN = (2, 11)
ENLARGED = 3
DPI = 90
BOXES = 4
"""Box pairs that are drawn of a pair of views; the demo has up to eight."""


def views_and_features(run: str, file: Path, shown: tuple[int, ...] = SHOWN) -> None:
    """A row a held-out scene: two views with matched boxes, the scene, and its features before and after the run."""
    trained = load_evaluated(RankOptions(checkpoint=run, device="cpu"))
    config = Config.from_dict(trained.training)
    source = DemoScenes(SCENES, config.data.demo_size, config.train.seed, "test")
    untrained = build_model(config, source.num_classes).online.encoder
    columns = [_colours(encoder, source, config) for encoder in (untrained, trained.encoder)]
    titles = ("view 1", "view 2: the same boxes", "scene", "features before", "features after")
    figure = Figure(figsize=(9, 1.8 * len(shown) + 0.2), layout="constrained")
    panels = figure.subplots(len(shown), len(titles), squeeze=False)
    for row, index in zip(panels, shown, strict=True):
        pair = view_pairs(source, config.views, config.boxes, range(index, index + 1), photometric=False)
        boxes = [each[:BOXES] for each in pair.boxes]
        side = config.views.size * ENLARGED
        for place, view in enumerate(pair.views):
            picture = to_picture(view, config.views.mean, config.views.std).resize(
                (side, side), Image.Resampling.BICUBIC
            )
            outline(picture, boxes[place], place, ENLARGED)
            row[place].imshow(picture)
        row[2].imshow(source.read(index))
        for place, colours in enumerate(columns, start=3):
            row[place].imshow(colours[index].numpy(), interpolation="nearest")
        for axes in row:
            axes.set_axis_off()
    for axes, title in zip(panels[0], titles, strict=True):
        axes.set_title(title, fontsize=9)
    _save(figure, file)


def similarity(run: str, file: Path) -> None:
    """Similarity maps of chosen points on held-out scenes, as ``evaluate dense-consistency`` draws them."""
    trained = load_evaluated(RankOptions(checkpoint=run, device="cpu"))
    config = Config.from_dict(trained.training)
    source = DemoScenes(SCENES, config.data.demo_size, config.train.seed, "test")
    encoder = frozen_copy(trained.encoder)
    draw_similarity(file, encoder, source, config.views, config.boxes, images=SHOWN, points=3, seed=0)


def train_demo(run: str) -> None:
    """The demo's run in the folder, made where there is none."""
    if not Path(run).exists():
        subprocess.run([sys.executable, "-m", "scrl_fast.train", f"--run.dir={run}"], check=True, cwd=ROOT)


def _colours(encoder: Encoder, source: DemoScenes, config: Config) -> torch.Tensor:
    """The first three components of the scenes' features, ``[n, h, w, 3]``, with statistics measured on the scenes."""
    views = ViewsConfig(recipe="none", size=config.data.demo_size, mean=config.views.mean, std=config.views.std)
    loader, frozen = ImageLoader(views), frozen_copy(encoder)
    measure_batchnorm_on_images(frozen, source, loader)
    (batch,) = loader.batches(range(len(source)))
    return principal_components(dense_features(frozen, loader.load(source, batch))).colours


def operations(file: Path) -> None:
    """How many times as fast as its usual alternative each operation of README's table is."""
    rows = ratios(RESULTS)
    figure = Figure(figsize=(8, 0.5 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([text for text, _, _ in rows], [ratio for _, _, ratio in rows], color="C0")
    axes.bar_label(bars, [f" {ratio:.3g} x ({rival})" for _, rival, ratio in rows], fontsize=8)
    axes.set(xscale="log", xlim=(1, 40 * max(ratio for _, _, ratio in rows)), xlabel="times as fast (CPU, 2 threads)")
    axes.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    _save(figure, file)


def floors(file: Path) -> None:
    """The floors of CONTRIBUTING.md's table, the lowest at the bottom: which module may import which."""
    table = re.findall(
        r"(?m)^\| (.+?) \| (.+?) \|$", (ROOT / "CONTRIBUTING.md").read_text().partition("## The rooms")[0]
    )
    rows = [
        (re.sub(r"`| \(.*?\)", "", names), holds.replace("`", ""))
        for names, holds in table
        if names not in ("floor", "---")
    ]
    figure = Figure(figsize=(9, 0.62 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for level, (names, holds) in enumerate(rows):
        axes.barh(level, 1, height=0.86, color=matplotlib.colormaps["Blues"](0.12 + 0.05 * level), edgecolor="grey")
        axes.text(0.015, level + 0.17, names, va="center", fontsize=9, fontweight="bold")
        axes.text(0.015, level - 0.2, holds, va="center", fontsize=8)
    axes.annotate("", (1.04, -0.3), (1.04, len(rows) - 0.7), arrowprops={"arrowstyle": "->"}, annotation_clip=False)
    axes.text(1.06, (len(rows) - 1) / 2, "imports", rotation=90, va="center", fontsize=9)
    axes.set(xlim=(0, 1.1), ylim=(-0.6, len(rows) - 0.4))
    axes.set_axis_off()
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    """Write the file without a date or a version, so that the same picture is the same file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=DPI, metadata={"Software": None})


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description="Draw the pictures of README and docs.")
    p.add_argument("--run", default="", help="a run of the demo, trained where there is none; for two of the pictures")
    p.add_argument("--out", type=Path, default=PICTURES)
    args = p.parse_args(argv)
    drawn: list[Any] = [args.out / "operations.png", args.out / "floors.png"]
    operations(drawn[0])
    floors(drawn[1])
    if args.run:
        run = os.path.abspath(args.run)
        train_demo(run)
        drawn += [args.out / "views_and_features.png", args.out / "dense_consistency.png"]
        views_and_features(run, drawn[-2])
        similarity(run, drawn[-1])
    print("\n".join(f"{file}: {file.stat().st_size:,} bytes" for file in drawn))
    return 0


if __name__ == "__main__":
    sys.exit(main())
