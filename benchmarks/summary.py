"""The README's table of measurements, from the rows that `run_all.sh` wrote. Nothing here measures.

``python benchmarks/summary.py`` prints it; ``--write README.md`` puts it between the markers there, ``--check
README.md`` fails where what stands there is not what the rows say.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from report import duration, name_of

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
Row = dict[str, Any]

# what the table says, the benchmark, the start of its case's name, ours, and its rivals
LINES = [
    ("RoIAlign forward, 128 x 2048 x 7 x 7, 1280 boxes, NCHW", "roi_align", "record forward nchw images=128",
     "scrl_fast/native", ["torchvision"]),
    ("the same, channels_last", "roi_align", "record forward channels_last images=128", "scrl_fast/native",
     ["torchvision"]),
    ("RoIAlign backward, NCHW, by autograd", "roi_align", "record backward nchw images=128", "scrl_fast/native",
     ["torchvision"]),
    ("the same, into memory that is there already", "roi_align", "record backward nchw images=128",
     "scrl_fast/native-reused", ["torchvision"]),
    ("RoIAlign backward, channels_last, into memory that is there", "roi_align",
     "record backward channels_last images=128", "scrl_fast/native-reused", ["torchvision"]),
    ("RoIAlign forward, pyramid level 256 x 200 x 336, 128 boxes, 7 x 7 bins", "roi_align",
     "pyramid forward nchw images=1 map=256x200x336 boxes=128 bins=7 samples=2", "scrl_fast/native", ["torchvision"]),
    ("the same, backward", "roi_align", "pyramid backward nchw images=1 map=256x200x336 boxes=128 bins=7 samples=2",
     "scrl_fast/native", ["torchvision"]),
    ("two_view_loss, forward + backward, 5120 x 256", "normalized_mse_loss", "forward + backward pairs=2560",
     "scrl_fast/native", ["torch/eager", "torch/compile"]),
    ("moving average, 33 M numbers in 164 tensors", "ema_update", "resnet50", "scrl_fast/native",
     ["torch/foreach_lerp", "torch/data_loop"]),
    ("LARS + SGD, 37 M numbers in 171 tensors", "lars_step", "resnet50 ", "scrl_fast/native",
     ["torch/composite", "torch/loops"]),
    ("LARS + SGD + moving average", "lars_step", "resnet50+ema", "scrl_fast/native",
     ["torch/composite", "torch/loops"]),
    ("the same as the trainer calls it: a gradient that is not finite changes nothing", "lars_step", "resnet50+ema",
     "scrl_fast/skipping", ["torch/composite", "torch/loops"]),
    ("box pairs, 256 images x 10", "sample_box_pairs", "draw images=256 boxes=10", "scrl_fast/native",
     ["numpy/step-by-step"]),
    ("box pairs, NumPy's stream replayed bit for bit", "sample_box_pairs", "replay images=256 boxes=10",
     "scrl_fast/native", ["numpy/step-by-step"]),
]  # fmt: skip


def find(rows: list[Row], case: str, provider: str) -> Row | None:
    return next((row for row in rows if row["case"].startswith(case) and name_of(row) == provider), None)


def load(folder: Path, bench: str, suffix: str) -> list[Row]:
    file = folder / f"{bench}_{suffix}.json"
    return json.loads(file.read_text()) if file.exists() else []


def table(folder: Path = RESULTS, suffix: str = "cpu") -> str:
    """Markdown; one line for each of LINES that was measured."""
    lines = ["| | ours | rival | times as fast |", "|---|---|---|---|"]
    machines: dict[str, None] = {}
    for text, bench, case, mine, rivals in LINES:
        rows = load(folder, bench, suffix)
        ours = find([row for row in rows if "provider" in row], case, mine)
        theirs = [find([row for row in rows if "provider" in row], case, rival) for rival in rivals]
        if ours is None or not all(theirs):
            continue
        pairs = [(row, row["p50_ms"] / ours["p50_ms"]) for row in theirs if row]
        names = "; ".join(f"{name_of(row)} {duration(row['p50_ms'])}" for row, _ in pairs)
        ratios = "; ".join(f"{ratio:.0f}x" if ratio >= 20 else f"{ratio:.1f}x" for _, ratio in pairs)
        lines.append(f"| {text} | {duration(ours['p50_ms'])} | {names} | {ratios} |")
        machines[described(next(row for row in rows if row["case"] == "environment"))] = None
    return "\n".join([*lines, "", f"Medians; {'; '.join(machines)}."]) if machines else ""


def described(environment: Row) -> str:
    return (
        f"{environment['device_name']}, {environment['threads']} threads, torch {environment['versions']['torch']}, "
        f"commit {environment['commit']}"
    )


def between_markers(text: str) -> tuple[int, int]:
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise SystemExit(f"the file has no lines {BEGIN} and {END}")
    return begin + len(BEGIN), end


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description="The table of measurements.")
    p.add_argument("--results", type=Path, default=RESULTS)
    p.add_argument("--suffix", default="cpu", help="of the files: cpu, cuda_bfloat16, ... (default: %(default)s)")
    p.add_argument("--write", type=Path, metavar="FILE")
    p.add_argument("--check", type=Path, metavar="FILE")
    args = p.parse_args(argv)
    made = f"\n{table(args.results, args.suffix)}\n"
    if file := args.write or args.check:
        text = file.read_text()
        begin, end = between_markers(text)
        if args.check:
            if text[begin:end] != made:
                print(f"{file}: the table is not what the rows say; run benchmarks/summary.py --write {file}")
            return int(text[begin:end] != made)
        file.write_text(text[:begin] + made + text[end:])
        return 0
    print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
