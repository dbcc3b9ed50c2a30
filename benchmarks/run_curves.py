"""Curves of pre-training runs, side by side: kept in one small JSON file, and drawn from it.

``python benchmarks/run_curves.py --json FILE --keep "TITLE=RUN" [--keep ...]`` copies what a run's metrics.jsonl,
config.yaml and env.json hold into FILE; a title that is there already is replaced. With ``--plot FILE`` the picture is
drawn, from the kept rows alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

PANELS = {
    "loss": "loss",
    "feature_std": "deviation of the projections",
    "rankme": "RankMe of the projections",
    "lr": "learning rate",
}
"""Columns of the picture: a field of metrics.jsonl and its title."""
DIGITS = 5


def kept(run: Path) -> dict[str, Any]:
    """What the picture and its page need of a run folder, with the options that tell the runs apart."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    environment = json.loads((run / "env.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    device = environment["device"]
    return {
        "options": {name: config[name] for name in ("model", "optim", "boxes", "train")},
        "views_size": config["views"]["size"],
        "commit": environment["scrl_fast"]["commit"],
        "device": f"{device['cpu']}, {device['cores']} cores, torch {environment['versions']['torch']}",
        "rows": [
            {"step": row["step"]} | {name: _rounded(row[name]) for name in PANELS if row.get(name) is not None}
            for row in rows
        ],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def draw(path: Path, runs: dict[str, dict[str, Any]]) -> None:
    """A row a run, a column a field. A column has one vertical scale for all runs, except that of the learning rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.6 * len(runs) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(runs), len(PANELS), squeeze=False)
    for line, (title, run) in zip(panels, runs.items(), strict=True):
        for axes, name in zip(line, PANELS, strict=True):
            points = [(row["step"], row[name]) for row in run["rows"] if name in row]
            axes.plot(*zip(*points, strict=True), linewidth=1.2)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
            most = max(row.get(name, 0) for other in runs.values() for row in other["rows"])
            if name == "rankme":
                axes.set_yscale("log")
                axes.set_ylim(1, 1.3 * most)
            elif name != "lr":
                axes.set_ylim(0, 1.05 * most)
        line[0].set_ylabel(title.replace(": ", "\n"), fontsize=8)
    for axes, title in zip(panels[0], PANELS.values(), strict=True):
        axes.set_title(title, fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("step", fontsize=8)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", required=True, help="the kept runs")
    parser.add_argument("--keep", action="append", default=[], metavar="TITLE=RUN", help="add this run folder to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the kept runs (needs matplotlib)")
    args = parser.parse_args()
    runs = json.loads(args.json.read_text()) if args.json.exists() else {}
    for given in args.keep:
        title, _, run = given.rpartition("=")
        runs[title or Path(run).name] = kept(Path(run))
    if args.keep:
        lines = [f" {json.dumps(title)}: {_entry(run)}" for title, run in runs.items()]
        args.json.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    if args.plot:
        draw(args.plot, runs)


def _entry(run: dict[str, Any]) -> str:
    """A run as JSON with a line for each row."""
    head = json.dumps({name: value for name, value in run.items() if name != "rows"})[1:-1]
    rows = ",\n  ".join(json.dumps(row) for row in run["rows"])
    return "{" + head + ', "rows": [\n  ' + rows + "]}"


if __name__ == "__main__":
    main()
