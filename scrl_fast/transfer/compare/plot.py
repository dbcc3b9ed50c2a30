"""The picture of a comparison: AP against the share of the labels, a line a start, bars of one standard deviation."""

from __future__ import annotations

import os
from pathlib import Path

from scrl_fast.transfer.compare.rows import percent
from scrl_fast.transfer.compare.statistics import spread
from scrl_fast.transfer.compare.table import Results


def draw_comparison(path: str | os.PathLike[str], results: Results, title: str) -> None:
    """Writes the picture. Raises what the import of matplotlib raises."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shares = results.shares
    for place, label in enumerate(results.labels):
        found = {share: list(results.by_seed(label, share, "AP").values()) for share in shares}
        points = {share: spread(values) for share, values in found.items() if values}
        # side by side where bars would hide one another
        apart = 1 + 0.02 * (place - (len(results.labels) - 1) / 2)
        axes.errorbar(
            [share * apart for share in points],
            [point.mean for point in points.values()],
            yerr=[point.deviation or 0.0 for point in points.values()],
            marker="o",
            capsize=3,
            linewidth=1.4,
            label=label,
        )
    axes.set_xscale("log")
    axes.set_xticks(shares, [percent(share) for share in shares])
    axes.minorticks_off()
    axes.set(xlabel="share of the labels", ylabel="AP, mean and standard deviation over seeds", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    temporary = Path(path).with_suffix(".tmp")
    figure.savefig(temporary, format="png", dpi=110)
    os.replace(temporary, path)
