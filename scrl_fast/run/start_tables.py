"""What the tables of a comparison of starts have in common: names, cells, and the words for what is beyond chance."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scrl_fast.config.backbones import is_named
from scrl_fast.config.run_folder import folder_of
from scrl_fast.run.statistics import Difference


def labels_of(starts: Sequence[str]) -> list[str]:
    """A short name for each start: that of its run folder or file, with a number behind it where two are alike."""
    labels: list[str] = []
    for start in starts:
        path = Path(start)
        named = path.name if is_named(start) else ((folder_of(path) or path).absolute().name)
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", named).strip("-.") or "start"
        label, number = plain, 2
        while label in labels:
            label, number = f"{plain}-{number}", number + 1
        labels.append(label)
    return labels


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:g} %"


def verdict(difference: Difference, first: str) -> str:
    """Whether a start differs from the first one, in words."""
    if not difference.beyond_chance:
        return "no: within chance"
    return f"yes: {'above' if difference.mean > 0 else 'below'} {first}"


def mean_cell(mean: float, deviation: float | None) -> str:
    """Mean and standard deviation of a cell."""
    return f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def difference_cell(found: Mapping[str, Any] | None, digits: int = 2) -> str:
    """A difference with its interval. found: a `Difference` as a dict."""
    if found is None:
        return "-"
    interval = found["interval"]
    mean, *ends = (f"{value:+.{digits}f}" for value in (found["mean"], *(interval or ())))
    return mean + (f" ({' to '.join(ends)})" if ends else "")


def difference_values(difference: Difference) -> dict[str, Any]:
    """A difference as JSON takes it."""
    return {
        "mean": difference.mean,
        "interval": difference.interval and list(difference.interval),
        "pairs": difference.pairs,
        "beyond_chance": difference.beyond_chance,
    }


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first row is its head, with columns of equal widths."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(t.ljust(width) for t, width in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return lines


def chance_note(count: int) -> list[str]:
    """How many of several differences that are nothing but chance would pass."""
    if count < 2:
        return []
    return [f"Of {count} differences that are nothing but chance, {count / 20:g} would pass on average."]
