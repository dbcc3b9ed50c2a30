"""What the evidence is shown as: tables for the terminal and for docs/evidence.md, and the picture."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import evidence_photos_report
from evidence_runs import BUDGETS, MEASURES, METHODS

DOCUMENT = Path(__file__).parents[1] / "docs" / "evidence.md"
NAMES = {"random": "random", "byol": "BYOL", "scrl": "SCRL"}
TITLES = {
    "roi_linear": "RoI linear",
    "dense_retrieval": "dense retrieval",
    "image_probe": "image probe",
    "detection_ap": "detection AP",
}


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean, standard deviation over seeds and extremes of every measure, by method."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        for name in _measured(rows):
            values = [row[name] for row in rows if row["method"] == method]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            figures = {"mean": statistics.fmean(values), "std": spread, "min": min(values), "max": max(values)}
            result.setdefault(method, {})[name] = figures
    return result


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Percent, mean +- standard deviation over seeds."""
    seeds = len({row["seed"] for row in rows})
    lines = [f"{'percent, ' + str(seeds) + ' seeds':18}" + "".join(f"{TITLES[name]:>18}" for name in _measured(rows))]
    for method, figures in summary(rows).items():
        cells = [f"{100 * figures[n]['mean']:.1f} +- {100 * figures[n]['std']:.1f}" for n in figures]
        lines.append(f"{method:18}" + "".join(f"{cell:>18}" for cell in cells))
    return lines


def tuning_table(rows: list[dict[str, Any]]) -> list[str]:
    """Percent for every setting of the grid, the mean over its seeds."""
    names = _measured(rows)
    lines = [f"{'method':8}{'lr':>6}{'ema':>6}{'seeds':>7}" + "".join(f"{TITLES[name]:>18}" for name in names)]
    for (method, lr, ema), some in _settings(rows).items():
        cells = "".join(f"{_mean(some, name):18.1f}" for name in names)
        lines.append(f"{method:8}{lr:6g}{ema:6g}{len(some):7}{cells}")
    return lines


def _settings(rows: list[dict[str, Any]]) -> dict[tuple[str, float, float], list[dict[str, Any]]]:
    """The rows of every method and setting."""
    result: dict[tuple[str, float, float], list[dict[str, Any]]] = {}
    for row in rows:
        result.setdefault((row["method"], row["lr"], row["ema"]), []).append(row)
    return result


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return 100 * statistics.fmean(row[name] for row in rows)


def _measured(rows: list[dict[str, Any]]) -> list[str]:
    return [name for name in MEASURES if name in rows[0]]


def markdown(document: dict[str, Any]) -> str:
    """The document's rows as a table for docs/evidence.md."""
    rows, names = document["rows"], _measured(document["rows"])
    head = "".join(f" {TITLES[name]} |" for name in names)
    if "lr" in rows[0]:
        lines = [f"| | lr | EMA | seeds |{head}", "|---" * (len(names) + 4) + "|"]
        for (method, lr, ema), some in _settings(rows).items():
            each = [f"{_mean(some, name):.1f}" for name in names]
            if len(some) > 1:
                each = [
                    f"{m} ({', '.join(f'{100 * row[n]:.0f}' for row in some)})"
                    for m, n in zip(each, names, strict=True)
                ]
            lines.append(f"| {NAMES[method]} | {lr:g} | {ema:g} | {len(some)} | {' | '.join(each)} |")
    else:
        lines = [f"| |{head}", "|---" * (len(names) + 1) + "|"]
        for method, figures in summary(rows).items():
            cells = "".join(f" {100 * f['mean']:.1f} ± {100 * f['std']:.1f} |" for f in figures.values())
            lines.append(f"| {NAMES[method]} |{cells}")
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(row["seed"] for row in rows))
    where = document["environment"]
    if any(document["settings"].get(name) != value for name, value in asdict(BUDGETS[document["budget"]]).items()):
        lines += [
            "",
            "**Of an earlier state**, with other settings than today's, before the tuning below: to be run anew.",
        ]
    spread = "" if "lr" in rows[0] else ", mean ± standard deviation over seeds"
    said = f"Percent{spread}; seeds {seeds}; {where['device_name']}, torch {where['torch']}, commit {where['commit']};"
    return "\n".join([*lines, "", f"{said} `{document['command']}`."])


def write_markdown(file: Path, rows: Path) -> None:
    """Put the table of ``rows`` between its markers in ``file``, where it has such."""
    text = file.read_text(encoding="utf-8")
    begin, end = f"<!-- {rows.name}: begin -->", f"<!-- {rows.name}: end -->"
    if begin in text and end in text:
        document = json.loads(rows.read_text())
        made = evidence_photos_report.markdown(document) if document.get("data") == "voc" else markdown(document)
        head, rest = text.split(begin)
        file.write_text(f"{head}{begin}\n{made}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def draw(path: Path, document: dict[str, Any]) -> None:
    """RoI linear accuracy over steps, each seed a thin line, the mean a thick one; random weights a dashed level."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.2])
    for colour, method in zip(("0.5", "C0", "C3"), METHODS, strict=True):
        curves = [each["curve"] for each in document["details"] if each["method"] == method]
        if not curves or not all(curves):  # left out by --methods or --measures
            continue
        means = [100 * statistics.fmean(p["roi_linear"] for p in points) for points in zip(*curves, strict=False)]
        if method == "random":
            left.axhline(means[0], color=colour, linestyle="--", label=method)
            continue
        steps = [point["step"] for point in curves[0]]
        for curve in curves:
            left.plot(steps, [100 * point["roi_linear"] for point in curve], color=colour, alpha=0.3, linewidth=1)
        left.plot(steps, means, color=colour, marker="o", markersize=3, label=method)
    left.set(xlabel="step", ylabel="RoI linear accuracy, %", title="learning curves")
    if left.get_legend_handles_labels()[0]:
        left.legend()
    left.grid(alpha=0.3)
    _bars(right, document["summary"])
    figure.savefig(path, dpi=120)


def _bars(axes: Any, figures: dict[str, Any]) -> None:
    width = 0.8 / len(figures)
    for k, (method, values) in enumerate(figures.items()):
        places = [i + (k - (len(figures) - 1) / 2) * width for i in range(len(MEASURES))]
        means, spreads = ([100 * values[n][what] for n in MEASURES] for what in ("mean", "std"))
        colour = dict(zip(METHODS, ("0.6", "C0", "C3"), strict=True))[method]
        axes.bar(places, means, width, yerr=spreads, capsize=2, color=colour, label=method)
    axes.set_xticks(range(len(MEASURES)), [TITLES[n] for n in MEASURES], fontsize=8)
    axes.set(ylabel="%", title="mean and standard deviation over seeds")
    axes.legend()
    axes.grid(axis="y", alpha=0.3)
