"""The pictures of a run folder, boxes.png (what the network is asked to match) and curves.png; and of a comparison."""

from __future__ import annotations

import colorsys
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from scrl_fast.run.start_tables import percent
from scrl_fast.run.statistics import Spread

MARGIN = 6
PAIRS_PER_ROW = 4
CURVES = ("loss", "lr", "ema_momentum", "feature_std", "rankme", "probe_accuracy", "images_per_s", "data_wait")
MONITORS = ("feature_std", "rankme")
MOST_MARKED = 30
"""A curve of so few points shows each of them."""
HOLLOW: dict[str, Any] = {"marker": "o", "markerfacecolor": "white", "linestyle": "none"}
"""How a value without a deviation is drawn."""


def draw_boxes(
    path: str | os.PathLike[str],
    views: Tensor,
    boxes: tuple[Tensor, Tensor] | None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    images: int = 8,
    min_side: int = 160,
) -> None:
    """Writes a grid of view pairs, view 1 left and view 2 right, with matched boxes in the same colour.

    views: ``[2B, 3, S, S]``, normalised with mean and std; view 1 of all images, then view 2.
    boxes: two ``[N, 5]`` of rows (image index into views, x0, y0, x1, y1) in view pixels, or None (BYOL).
    images: how many of the B images at most. min_side: views smaller than this are drawn enlarged.
    """
    count = views.shape[0] // 2
    side = views.shape[-1]
    scale = max(1, -(-min_side // side))
    tile, shown = side * scale, min(images, count)
    columns = min(PAIRS_PER_ROW, shown)
    rows = -(-shown // columns)
    pair = 2 * tile + MARGIN
    sheet = Image.new(
        "RGB", (columns * pair + (columns + 1) * 2 * MARGIN, rows * tile + (rows + 1) * 2 * MARGIN), "white"
    )
    for image in range(shown):
        left = 2 * MARGIN + (image % columns) * (pair + 2 * MARGIN)
        top = 2 * MARGIN + (image // columns) * (tile + 2 * MARGIN)
        for view in range(2):
            row = image + view * count
            picture = to_picture(views[row], mean, std).resize((tile, tile), Image.Resampling.BICUBIC)
            if boxes is not None:
                outline(picture, boxes[view], row, scale)
            sheet.paste(picture, (left + view * (tile + MARGIN), top))
    sheet.save(path)


def to_picture(view: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """A normalised ``[3, S, S]`` view as an RGB picture."""
    pixels = view.detach().float().cpu() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def outline(picture: Image.Image, boxes: Tensor, index: int, scale: int) -> None:
    """Draws the boxes of one view onto it; the i-th box of an image has the same colour in both views."""
    mine = boxes[boxes[:, 0] == index][:, 1:].tolist()
    draw = ImageDraw.Draw(picture)
    for i, (x0, y0, x1, y1) in enumerate(mine):
        colour = colorsys.hsv_to_rgb(i / len(mine), 0.9, 1.0)
        corners = [x0 * scale, y0 * scale, max(x1 * scale - 1, x0 * scale), max(y1 * scale - 1, y0 * scale)]
        draw.rectangle(corners, outline=tuple(round(255 * c) for c in colour), width=2)


def draw_curves(path: str | os.PathLike[str], rows: Sequence[dict[str, Any]]) -> None:
    """Writes the run's curves over steps, one panel a metric. Raises what the import of matplotlib raises."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    present = [name for name in CURVES if any(row.get(name) is not None for row in rows)]
    if not present:
        return
    columns = 2
    rows_of_panels = -(-len(present) // columns)
    height = 2.2 * rows_of_panels
    figure = Figure(figsize=(10, height))  # margins in inches: a layout that looks for them itself draws twice
    FigureCanvasAgg(figure)
    figure.subplots_adjust(0.07, 0.45 / height, 0.98, 1 - 0.3 / height, wspace=0.18, hspace=0.45)
    panels = figure.subplots(rows_of_panels, columns, squeeze=False).flat
    for name, axes in zip(present, panels, strict=False):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        axes.plot(*zip(*points, strict=True), linewidth=1.2, marker="." if len(points) <= MOST_MARKED else "")
        if name in MONITORS:
            top = max((value for _, value in points if math.isfinite(value)), default=0)
            axes.set_ylim(0, 1.1 * top or 1)  # a collapse is a fall to 0, not to the panel's floor
        axes.set_title(name, fontsize=9)  # in the middle: on the left matplotlib writes a power of ten
        axes.grid(alpha=0.3)
    for axes in list(figure.axes)[len(present) :]:
        axes.set_visible(False)
    for axes in list(figure.axes)[-columns:]:
        axes.set_xlabel("step")
    temporary = Path(path).with_suffix(".tmp")
    figure.savefig(temporary, format="png", dpi=110)
    os.replace(temporary, path)


def draw_shares(
    path: str | os.PathLike[str], lines: Mapping[str, Mapping[float, Spread]], *, ylabel: str, title: str
) -> None:
    """Writes a picture of values against the share of the labels, a line a start, bars of one standard deviation.

    lines: of each start the value by share. A value of a single repeat has no deviation: its marker is hollow, and the
    legend says why. Raises what the import of matplotlib raises.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shares = sorted({share for points in lines.values() for share in points})
    for place, (label, points) in enumerate(lines.items()):
        # side by side where bars would hide one another
        apart = 1 + 0.02 * (place - (len(lines) - 1) / 2)
        places, means = [share * apart for share in points], [point.mean for point in points.values()]
        (line,) = axes.plot(places, means, marker="o", linewidth=1.4, label=label)
        for x, point in zip(places, points.values(), strict=True):
            if point.deviation is None:
                axes.plot(x, point.mean, **HOLLOW, color=line.get_color())
            else:
                axes.errorbar(x, point.mean, yerr=point.deviation, capsize=3, color=line.get_color())
    axes.set_xscale("log")
    axes.set_xticks(shares, [percent(share) for share in shares])
    axes.minorticks_off()
    if len(shares) == 1:
        axes.set_xlim(shares[0] / 1.2, shares[0] * 1.2)
    axes.set(xlabel="share of the labels", ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.legend(handles=[*axes.get_legend_handles_labels()[0], *_keys_of_bars(lines)], fontsize=8)
    temporary, kind = Path(path).with_suffix(".tmp"), Path(path).suffix.lower()[1:]
    figure.savefig(temporary, format=kind if kind in ("pdf", "svg") else "png", dpi=110)
    os.replace(temporary, path)


def _keys_of_bars(lines: Mapping[str, Mapping[float, Spread]]) -> list[Any]:
    """Entries of the legend of `draw_shares` about the bars that there are, and the points without."""
    from matplotlib.lines import Line2D

    counts = {point.count for points in lines.values() for point in points.values()}
    keys = []
    if several := sorted(count for count in counts if count > 1):
        repeats = str(several[0]) if len(several) == 1 else f"{several[0]} to {several[-1]}"
        label = f"standard deviation, {repeats} repeats"
        keys.append(Line2D([], [], color="grey", marker="|", linestyle="none", label=label))
    if 1 in counts:
        keys.append(Line2D([], [], color="grey", **HOLLOW, label="one repeat: no deviation"))
    return keys
