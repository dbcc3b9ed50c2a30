"""Does SCRL earn its place? Random weights, BYOL and SCRL on generated scenes, at the same encoder, budget and tuning.

Every (method, seed) is pre-trained and measured four ways: RoI linear accuracy and dense retrieval on held-out scenes
(what is where), an image-level probe (what is there), and AP of a small Faster R-CNN fine-tuned from it. Finished
stages are kept under --work and never done twice, so the command can be stopped, given --minutes, and called again.
`--tune` is how LR and EMA below were chosen: both methods, the same grid, seeds that are not reported.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shlex
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import evidence_photos
import harness
import torch
from evidence_report import DOCUMENT, draw, summary, table, tuning_table, write_markdown
from evidence_runs import BUDGETS, MEASURES, METHODS, OBJECTS, STAGES, Deadline, Trial

from scrl_fast.config.schema import Config

# the best of the finalists in the mean of both TUNING_MEASURES over TUNING_SEEDS: docs/evidence.md
LR = {"byol": 32.0, "scrl": 32.0}
EMA = {"byol": 0.9, "scrl": 0.9}
FINALISTS = ((16.0, 0.99), (16.0, 0.97), (32.0, 0.99), (32.0, 0.97), (32.0, 0.9))  # (lr, ema)
GRID = ((8.0, 0.99), *FINALISTS, (64.0, 0.97))
TUNING_SEEDS = {100: GRID, 101: FINALISTS, 102: FINALISTS}
SEEDS = (0, 1, 2)
TUNING_MEASURES = ("roi_linear", "image_probe")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    p = argparse.ArgumentParser(prog="evidence.py", description=(__doc__ or "").split("\n\n")[0])
    data = "voc: photographs, with options of its own (--data=voc --help)"
    p.add_argument("--data", choices=("scenes", "voc"), default="scenes", help=data)
    p.add_argument("--budget", choices=BUDGETS, default="long" if device == "cuda" else "standard")
    p.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    p.add_argument("--lr", nargs="+", default=[], metavar="METHOD=LR", help=f"in place of {LR}")
    p.add_argument("--ema", nargs="+", default=[], metavar="METHOD=MOMENTUM", help=f"in place of {EMA}")
    p.add_argument("--tune", action="store_true", help=f"try each (lr, ema) of {GRID} for both methods instead")
    p.add_argument("--objects", choices=OBJECTS, default="many", help="digits in a scene of pre-training")
    changes = "options of training; the measures stay as they are, but for views.mean and views.std"
    p.add_argument("--set", nargs="+", default=[], metavar="SECTION.FIELD=VALUE", help=changes)
    p.add_argument("--measures", nargs="*", choices=STAGES, default=list(STAGES), help="fewer of them, for tuning")
    p.add_argument("--device", default=device, choices=("cpu", "cuda"))
    jobs = 1 if device == "cuda" else min(4, os.cpu_count() or 1)
    p.add_argument("--jobs", type=int, default=jobs, help="so many at once, each on its share of cores (%(default)s)")
    p.add_argument("--minutes", type=float, default=math.inf, help="begin no further stage after this long")
    p.add_argument("--work", type=Path, help="where runs are kept (default: runs/evidence-BUDGET)")
    p.add_argument("--json", type=Path, help="default: benchmarks/results/evidence_DEVICE.json for a whole set")
    p.add_argument("--plot", type=Path, help="learning curves (default: beside the JSON file)")
    args = p.parse_args(argv)
    args.rates, args.momenta = _given(p, args.lr, LR), _given(p, args.ema, EMA)
    args.changes = tuple(_change(p, word) for word in args.set)
    if args.set and not (args.work and args.json):
        p.error("--set makes another experiment: give it its own --work and --json")
    kind = "-tuning" if args.tune else "-one" if args.objects == "one" else ""
    args.work = args.work or Path(f"runs/evidence-{args.budget}{kind}")
    args.measures = tuple(name for name in (TUNING_MEASURES if args.tune else STAGES) if name in args.measures)
    measured = bool(args.tune or kind or args.measures == STAGES)
    given = args.lr or args.ema or (args.seeds, args.methods) != (list(SEEDS), list(METHODS))
    # another set of rows must not take the place of the documented one
    whole = args.json is None and measured and not given and args.budget in ("standard", "long")
    args.documented = whole and args.budget == "standard" and args.device == "cpu"
    if whole:
        args.json = Path(__file__).parent / "results" / f"evidence{kind.replace('-', '_')}_{args.device}.json"
    return args


def _given(parser: argparse.ArgumentParser, words: list[str], default: dict[str, float]) -> dict[str, float]:
    result = dict(default)
    for word in words:
        method, _, value = word.partition("=")
        if method not in result:
            parser.error(f"{word}: METHOD=NUMBER with one of {', '.join(result)}")
        result[method] = float(value)
    return result


def _change(parser: argparse.ArgumentParser, word: str) -> tuple[str, Any]:
    """('boxes.per_image', 1) of boxes.per_image=1; the field must exist."""
    name, equals, text = word.partition("=")
    section, _, field = name.partition(".")
    if not equals or not hasattr(getattr(Config(), section, None), field):
        parser.error(f"{word}: SECTION.FIELD=VALUE as in boxes.per_image=1, with an option of scrl_fast.train")
    value = json.loads(text)
    return name, tuple(value) if isinstance(value, list) else value


def main(argv: list[str] | None = None) -> int:
    which = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    which.add_argument("--data", choices=("scenes", "voc"), default="scenes")
    chosen, argv = which.parse_known_args(argv)
    if chosen.data == "voc":
        return evidence_photos.main(argv)
    args = parse(argv)
    trials = planned(args)
    found = run_trials(trials, args.jobs)
    tuned = [{"lr": trial.lr, "ema": trial.ema} if args.tune else {} for trial in trials]
    rows = [row | setting for row, setting in zip(found, tuned, strict=False) if row is not None]
    if len(rows) < len(trials):
        print(f"{len(rows)} of {len(trials)} done; call again to go on", flush=True)
        return 0
    if not args.measures:
        return 0
    rows.sort(key=lambda row: (METHODS.index(row["method"]), row["seed"]))
    print("\n".join(tuning_table(rows) if args.tune else table(rows)))
    if args.json:
        for trial in trials:
            trial.reload()
        document = report(args, trials, rows, argv)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=1) + "\n")
        if not args.tune and set(args.measures) >= set(MEASURES):
            draw(args.plot or args.json.with_suffix(".png"), document)
        if args.documented:
            write_markdown(DOCUMENT, args.json)
        print(f"written: {args.json}")
    return 0


def planned(args: argparse.Namespace) -> list[Trial]:
    """Every method and seed; for tuning, every setting of the grid on one seed and the best of them on two more."""
    deadline = time.monotonic() + 60 * args.minutes
    common = {"deadline": deadline, "measures": args.measures, "objects": args.objects, "changes": args.changes}
    budget = BUDGETS[args.budget]
    if args.tune:
        return [
            Trial(
                method, seed, budget, lr, ema, args.work / f"{method}-lr{lr:g}-ema{ema:g}-{seed}", args.device, **common
            )
            for seed, settings in TUNING_SEEDS.items()
            for lr, ema in settings
            for method in args.rates
            if method in args.methods
        ]
    return [
        Trial(method, seed, budget, rate, momentum, args.work / f"{method}-{seed}", args.device, **common)
        for seed in args.seeds
        for method in args.methods
        for rate, momentum in [(args.rates.get(method, 0.0), args.momenta.get(method, 0.0))]
    ]


def run_trials(trials: list[Trial], jobs: int) -> list[dict[str, Any] | None]:
    """Every trial's row, so many at once; a signal to this process ends the others too, each after saving."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    if jobs == 1:
        found: list[dict[str, Any] | None] = []
        for trial in trials:
            found.append(run_trial(trial, torch.get_num_threads()))
            if found[-1] is None:  # stopped: the others would be as well
                break
        return found
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(f"stopped; call again to go on from {trials[0].folder.parent}"))
    try:
        return list(pool.map(run_trial, trials, [threads] * len(trials)))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():  # must not outlive this process
            child.join(10)  # where the signal went to all, it is saving now, and a second one would break that off
            child.terminate()
            child.join()


def run_trial(trial: Trial, threads: int) -> dict[str, Any] | None:
    """The row of one method and seed, in a process of its own; None when its time was up."""
    torch.set_num_threads(threads)
    try:
        return trial.run()
    except Deadline:
        return None


def report(
    args: argparse.Namespace, trials: list[Trial], rows: list[dict[str, Any]], argv: list[str]
) -> dict[str, Any]:
    """What is saved."""
    settings = trials[0].settings["budget"] | {name: trials[0].settings[name] for name in ("objects", "changes")}
    return {
        "command": shlex.join(["python", "benchmarks/evidence.py", *argv]),
        "budget": args.budget,
        "settings": settings | ({} if args.tune else {"lr": args.rates, "ema": args.momenta}),
        "environment": {
            "device": args.device,
            "device_name": harness.device_name(args.device),
            "threads": max(1, (os.cpu_count() or 1) // args.jobs),
            "torch": torch.__version__,
            "commit": harness._commit(),
        },
        "rows": rows,
        "summary": {} if args.tune else summary(rows),
        "details": [{"method": trial.method, "seed": trial.seed, **_details(trial)} for trial in trials],
    }


def _details(trial: Trial) -> dict[str, Any]:
    return {key: value for key, value in trial.state.items() if key != "settings"}


if __name__ == "__main__":
    sys.exit(main())
