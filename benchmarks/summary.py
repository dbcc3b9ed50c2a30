"""The tables of measurements, from the rows that `run_all.sh` wrote. Nothing here measures.

``python benchmarks/summary.py`` prints the whole; ``--write README.md docs/operations.md`` puts the short table or the
whole between the markers there, ``--check FILES`` fails where what stands there is not what the rows say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report import duration, name_of

RESULTS = Path(__file__).parent / "results"
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

SHORT = {
    "RoIAlign forward, 128 x 2048 x 7 x 7, 1280 boxes, NCHW": "RoIAlign forward, 1280 boxes on 128 maps",
    "RoIAlign backward, NCHW, by autograd": "RoIAlign backward",
    "two_view_loss, forward + backward, 5120 x 256": "two-view loss, forward + backward",
    "LARS + SGD + moving average": "LARS + moving average, 37 M numbers",
    "box pairs, NumPy's stream replayed bit for bit": "box pairs, 256 images x 10, the same bits",
}
"""The rows of the short table, and their words there."""
MARKED = {
    "measured": {text: text for text, *_ in LINES},
    "measured in short": SHORT,
}
"""The tables by the name in their markers, ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``."""


def find(rows: list[Row], case: str, provider: str) -> Row | None:
    return next((row for row in rows if row["case"].startswith(case) and name_of(row) == provider), None)


def load(folder: Path, bench: str, suffix: str) -> list[Row]:
    file = folder / f"{bench}_{suffix}.json"
    return json.loads(file.read_text()) if file.exists() else []


def measured(folder: Path = RESULTS, suffix: str = "cpu") -> Iterator[tuple[str, Row, list[Row], str]]:
    """Each of LINES that was measured: its words, our row, the rivals' rows, and the machine."""
    for text, bench, case, mine, rivals in LINES:
        rows = load(folder, bench, suffix)
        timed = [row for row in rows if "provider" in row]
        ours = find(timed, case, mine)
        theirs = [row for rival in rivals if (row := find(timed, case, rival))]
        if ours is not None and len(theirs) == len(rivals):
            yield text, ours, theirs, described(next(row for row in rows if row["case"] == "environment"))


def table(folder: Path = RESULTS, suffix: str = "cpu", words: dict[str, str] | None = None) -> str:
    """Markdown; one line for each of LINES that was measured. words: for the rows that are taken, all by default."""
    lines = ["| | ours | rival | times as fast |", "|---|---|---|---|"]
    machines: dict[str, None] = {}
    for text, ours, theirs, machine in measured(folder, suffix):
        if words is not None and text not in words:
            continue
        pairs = [(row, row["p50_ms"] / ours["p50_ms"]) for row in theirs]
        names = "; ".join(f"{name_of(row)} {duration(row['p50_ms'])}" for row, _ in pairs)
        times = "; ".join(f"{ratio:.0f}x" if ratio >= 20 else f"{ratio:.1f}x" for _, ratio in pairs)
        lines.append(f"| {(words or {}).get(text, text)} | {duration(ours['p50_ms'])} | {names} | {times} |")
        machines[machine] = None
    return "\n".join([*lines, "", f"Medians; {'; '.join(machines)}."]) if machines else ""


def ratios(folder: Path = RESULTS) -> list[tuple[str, str, float]]:
    """The rows of the short table: words, the first rival, and how many times as long it takes."""
    rows = [(text, ours, theirs[0]) for text, ours, theirs, _ in measured(folder) if text in SHORT]
    return [(SHORT[text], name_of(rival), rival["p50_ms"] / ours["p50_ms"]) for text, ours, rival in rows]


def described(environment: Row) -> str:
    return (
        f"{environment['device_name']}, {environment['threads']} threads, torch {environment['versions']['torch']}, "
        f"commit {environment['commit']}"
    )


def with_tables(text: str, folder: Path, suffix: str) -> str:
    """The text with the table of each pair of markers in it made anew. Raises SystemExit where it has none."""
    found = False
    for name, words in MARKED.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        head, opening, rest = text.partition(begin)
        _, closing, tail = rest.partition(end)
        if opening and closing:
            text, found = f"{head}{begin}\n{table(folder, suffix, words)}\n{end}{tail}", True
    if not found:
        raise SystemExit(f"the file has no lines <!-- {' or '.join(MARKED)}: begin --> with their end")
    return text


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description="The tables of measurements.")
    p.add_argument("--results", type=Path, default=RESULTS)
    p.add_argument("--suffix", default="cpu", help="of the files: cpu, cuda_bfloat16, ... (default: %(default)s)")
    p.add_argument("--write", type=Path, metavar="FILE", nargs="+", default=[])
    p.add_argument("--check", type=Path, metavar="FILE", nargs="+", default=[])
    args = p.parse_args(argv)
    if not args.write and not args.check:
        print(f"\n{table(args.results, args.suffix)}\n")
    wrong = 0
    for file in [*args.write, *args.check]:
        text = file.read_text()
        made = with_tables(text, args.results, args.suffix)
        if file in args.write:
            file.write_text(made)
        elif made != text:
            print(f"{file}: the table is not what the rows say; run benchmarks/summary.py --write {file}")
            wrong = 1
    return wrong


if __name__ == "__main__":
    sys.exit(main())
