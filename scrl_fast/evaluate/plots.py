"""The pictures of the evaluation tasks. Each function draws to a file, or returns False where matplotlib is missing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scrl_fast.config.schema import BoxesConfig, ViewsConfig
from scrl_fast.data import Source
from scrl_fast.evaluate.dense import similarity_maps, view_pairs
from scrl_fast.evaluate.pca import Components
from scrl_fast.models import Encoder
from scrl_fast.run.plots import to_picture

PathLike = str | os.PathLike[str]


def draw_similarity(
    path: PathLike,
    encoder: Encoder,
    source: Source,
    views: ViewsConfig,
    boxes: BoxesConfig,
    *,
    images: Iterable[int] = (0, 1, 2),
    points: int = 3,
    seed: int = 0,
) -> bool:
    """One row an image pair: view 1 with chosen points, then view 2 under the similarity to each point.

    The points are the centres of the image's first box pairs; a circle marks each one's place in view 2. Images
    without box pairs are left out.
    """
    figure = _figure(2.4 * (points + 1), 2.5)
    if figure is None:
        return False
    device = next(encoder.parameters()).device
    rows = []
    for index in images:
        pair = view_pairs(source, views, boxes, range(index, index + 1), seed=seed, photometric=False)
        if len(pair.boxes[0]):
            centres = [(b[:points, 1:3] + b[:points, 3:5]) / 2 for b in pair.boxes]
            maps = similarity_maps(encoder, pair.views.to(device), centres[0].to(device)).cpu()
            rows.append((pair.views, centres, maps))
    figure.set_size_inches(2.4 * (points + 1), 2.5 * max(1, len(rows)))
    panels = figure.subplots(max(1, len(rows)), points + 1, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for (pixels, centres, maps), line in zip(rows, panels, strict=False):
        pictures = [to_picture(view, views.mean, views.std) for view in pixels]
        _draw_pair(line, pictures, centres, maps, pixels.shape[-2:])
    figure.savefig(path, dpi=110)
    return True


def _draw_pair(line: Any, pictures: list[Any], centres: list[Tensor], maps: Tensor, size: torch.Size) -> None:
    """One row of `draw_similarity`. centres: two ``[P, 2]`` in pixels. maps: ``[P, h, w]``, enlarged to the view."""
    line[0].imshow(pictures[0])
    line[0].set_title("view 1", fontsize=8)
    for k, axes in zip(range(len(maps)), line[1:], strict=False):
        colour = f"C{k}"
        x, y = centres[0][k].tolist()
        line[0].plot(x, y, "o", color=colour, markeredgecolor="white", markersize=8)
        axes.imshow(pictures[1])
        heat = F.interpolate(maps[k][None, None], size=size, mode="bilinear")[0, 0].numpy()
        axes.imshow(heat, cmap="inferno", alpha=0.6)
        x, y = centres[1][k].tolist()
        axes.plot(x, y, "o", markerfacecolor="none", markeredgecolor=colour, markersize=11, markeredgewidth=2)
        axes.set_title(f"view 2, similarity {heat.min():.2f} to {heat.max():.2f}", fontsize=8)


def draw_spectrum(path: PathLike, features: Tensor, title: str) -> bool:
    """Singular values of the unit-length, centred features ``[N, D]``, largest first."""
    figure = _figure(6, 3.6)
    if figure is None:
        return False
    rows = F.normalize(features.float(), dim=1)
    values = torch.linalg.svdvals(rows - rows.mean(0)).cpu()
    axes = figure.subplots()
    axes.semilogy(range(1, len(values) + 1), (values / values[0]).clamp_min(1e-8), linewidth=1.4)
    axes.set(xlabel="direction", ylabel="singular value, largest = 1", title=title)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return True


def draw_class_accuracies(path: PathLike, per_class: Mapping[str, dict[str, Any]]) -> bool:
    """A bar a class that occurs. per_class: ``{name: {"accuracy": 0 to 1, "boxes": n}}``."""
    found = sorted((v["accuracy"], n) for n, v in per_class.items() if v["boxes"])
    figure = _figure(6, 1 + 0.2 * len(found))
    if figure is None:
        return False
    axes = figure.subplots()
    axes.barh([name for _, name in found], [100 * value for value, _ in found])
    axes.set(xlabel="accuracy, %")
    axes.tick_params(labelsize=7)
    axes.margins(y=0.01)
    figure.savefig(path, dpi=110)
    return True


def draw_components(path: PathLike, pictures: Sequence[Any], columns: Sequence[tuple[str, Components]]) -> bool:
    """One row an image: the picture, then its cells in the colours of each encoder. columns: name and components."""
    figure = _figure(2.2 * (len(columns) + 1), 2.2 * len(pictures) + 0.3)
    if figure is None:
        return False
    panels = figure.subplots(len(pictures), len(columns) + 1, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for row, picture in zip(panels, pictures, strict=True):
        row[0].imshow(picture)
    for place, (name, components) in enumerate(columns, start=1):
        for row, colours in zip(panels, components.colours, strict=True):
            row[place].imshow(colours.numpy(), interpolation="nearest")
        title = f"{name}\n{sum(components.shares):.0%} of the variance"
        panels[0][place].set_title(title, fontsize=8)
    figure.savefig(path, dpi=110)
    return True


def _figure(width: float, height: float) -> Any:
    """An empty figure of so many inches; None where matplotlib is not installed, or is but fails to load."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except Exception:  # a broken installation raises anything: ImportError, AttributeError, RuntimeError, ...
        return None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
