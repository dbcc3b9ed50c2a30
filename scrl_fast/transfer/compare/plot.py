"""The picture of a comparison: AP against the share of the labels, a line a start, bars of one standard deviation."""

from __future__ import annotations

import os

from scrl_fast.run.plots import draw_shares
from scrl_fast.run.statistics import spread
from scrl_fast.transfer.compare.table import Results


def draw_comparison(path: str | os.PathLike[str], results: Results, title: str) -> None:
    """Writes the picture. Raises what the import of matplotlib raises."""
    lines = {}
    for label in results.labels:
        found = {share: list(results.by_seed(label, share, "AP").values()) for share in results.shares}
        lines[label] = {share: spread(values) for share, values in found.items() if values}
    draw_shares(path, lines, ylabel="AP, mean over seeds", title=title)
