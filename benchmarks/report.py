"""What becomes of a benchmark's rows: the table on screen, the CSV file, the plot. Nothing here measures.

``python benchmarks/report.py ROWS.json [MORE.json ...] [--plot FILE]`` prints (and draws) rows written before.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

OURS = "scrl_fast"
Row = dict[str, Any]


def heading(environment: Row) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in environment["versions"].items() if value)
    return (
        f"{environment['bench']} on {environment['device_name']}, {environment['threads']} threads, "
        f"copy {environment['copy_gb_per_s']:.1f} GB/s, {versions}, commit {environment['commit']}"
    )


def table(case: str, rows: list[Row], copy_gb_per_s: float) -> str:
    """One case as text. The last column is rival over ours: how many times longer that provider takes."""
    ours = next((row["p50_ms"] for row in rows if row["provider"] == OURS), None)
    head = ("provider", "p50", "p20 - p80", "GB/s", "of copy", "items/s", "peak", "vs ours")
    lines = [head]
    for row in rows:
        rate, items, peak = row["gb_per_s"], row["items_per_s"], row["peak_bytes"]
        lines.append(
            (
                name_of(row),
                duration(row["p50_ms"]),
                f"{duration(row['p20_ms'])} - {duration(row['p80_ms'])}",
                f"{rate:.1f}" if rate else "",
                f"{rate / copy_gb_per_s:.0%}" if rate else "",
                f"{items:.3g}" if items else "",
                f"{peak / 1e6:.1f} MB" if peak is not None else "",
                f"{row['p50_ms'] / ours:.2f}x" if ours else "",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([f"\n{case}", *(f"  {line.rstrip()}" for line in text)])


def duration(ms: float) -> str:
    return f"{ms:.2f} ms" if ms >= 1 else f"{ms * 1e3:.1f} us"


def name_of(row: Row) -> str:
    return f"{row['provider']}/{row['backend']}" if row["backend"] else row["provider"]


def write_csv(rows: list[Row], environment: Row, file: Path) -> None:
    """One line per row, the environment repeated in its last columns: a file that can be read alone."""
    keys = ("device_name", "threads", "cache", "copy_gb_per_s", "commit", "compile", "cuda_graphs", "deterministic")
    about = {key: environment[key] for key in keys if key in environment}
    about |= {f"{name}_version": value for name, value in environment["versions"].items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        fields = dict.fromkeys(key for row in rows for key in row)  # rows of the step's stages hold others, too
        writer = csv.DictWriter(stream, list(dict.fromkeys([*fields, *about])))
        writer.writeheader()
        writer.writerows(about | row for row in rows)  # what a row says of its own cache counts


def parameters(case: str) -> tuple[str, dict[str, float]]:
    """A case's label (with its words) and its numbers: ``forward layout=nchw batch=256`` -> batch is a number."""
    numbers = {key: float(value) for key, value in re.findall(r"(\w+)=(\d+(?:\.\d+)?)(?=\s|$)", case)}
    label = re.sub(r"\s*\b\w+=\d+(?:\.\d+)?(?=\s|$)", "", case)
    return label, numbers


def curves(rows: list[Row]) -> dict[str, dict[str, list[tuple[float, Row]]]]:
    """Rows as lines to draw: parameter -> line's name -> points (value, row). A line holds everything else constant."""
    found: dict[str, dict[str, list[tuple[float, Row]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        label, numbers = parameters(row["case"])
        for key, value in numbers.items():
            rest = [f"{k}={v:g}" for k, v in numbers.items() if k != key]
            found[key][" ".join([name_of(row), label, *rest])].append((value, row))
    longest = {key: {name: sorted(line, key=lambda p: p[0]) for name, line in lines.items() if len(line) > 1}
               for key, lines in found.items()}  # fmt: skip
    return {key: lines for key, lines in longest.items() if lines}


def pyplot(file: Path) -> Any:
    """matplotlib's, to draw a file without a display; None where it is not installed, which is told."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot
    except ImportError:
        print(f"{file} not drawn: matplotlib is not installed", file=sys.stderr)
        return None
    return matplotlib.pyplot


def plot(rows: list[Row], file: Path) -> None:
    """Latency and GB/s against every number that changes between cases; bars of latency where none does."""
    if (plt := pyplot(file)) is None:
        return
    rows = [row for row in rows if "p50_ms" in row]
    drawn = curves(rows)
    height = 4 * len(drawn) if drawn else 1 + 0.3 * len(rows)
    figure, axes = plt.subplots(max(len(drawn), 1), 2, figsize=(18, height), squeeze=False, layout="constrained")
    for (left, right), (key, lines) in zip(axes, drawn.items(), strict=False):
        for name, points in lines.items():
            x = [value for value, _ in points]
            marks = {"marker": "o", "label": name, "linestyle": "-" if name.startswith(OURS) else "--"}
            left.plot(x, [row["p50_ms"] for _, row in points], **marks)
            right.plot(x, [row["gb_per_s"] or float("nan") for _, row in points], **marks)
        left.set(xlabel=key, ylabel="latency, ms", xscale="log", yscale="log")
        right.set(xlabel=key, ylabel="GB/s", xscale="log")
        right.legend(*left.get_legend_handles_labels(), fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    if not drawn:
        names = [f"{row['case']}: {name_of(row)}" for row in rows]
        for axis, field, label in zip(axes[0], ("p50_ms", "gb_per_s"), ("latency, ms", "GB/s"), strict=True):
            colours = ["C0" if row["provider"] == OURS else "C1" for row in rows]
            axis.barh(names, [row[field] or 0 for row in rows], color=colours)
            axis.set(xlabel=label)
            axis.invert_yaxis()
        axes[0][0].set_xscale("log")
        axes[0][1].set_yticks([])
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description="Print and draw benchmark rows.")
    p.add_argument("files", type=Path, nargs="+", help="what --json wrote")
    p.add_argument("--plot", type=Path, metavar="FILE")
    args = p.parse_args(argv)
    every: list[Row] = []
    for file in args.files:
        rows = json.loads(file.read_text())
        environment = next(row for row in rows if row["case"] == "environment")
        print(f"\n{heading(environment)}")
        cases = list(dict.fromkeys(row["case"] for row in rows if "p50_ms" in row))
        for case in cases:
            print(table(case, [row for row in rows if row["case"] == case], environment["copy_gb_per_s"]))
        every += rows
    if args.plot:
        plot(every, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
