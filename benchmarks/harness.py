"""The one way benchmarks are taken here: rival and ours interleaved in one run, checked first, rows first, plots after.

A benchmark is a script of this folder:

    parser = harness.parser("ema_update", __doc__)
    parser.add_argument("--tensors", type=int, default=164)
    args = parser.parse_args()
    bench = harness.Bench("ema_update", args)
    case = harness.case_name("resnet50", tensors=args.tensors)
    bench.case(case, {"scrl_fast/native": ours, "torch/foreach": rival}, bytes=12 * numbers, check_each=agree)
    sys.exit(bench.finish())

Providers are named ``package`` or ``package/backend``; ours is ``scrl_fast``. Each is a callable without arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch
from timing import Call, Timer

ROW = (
    *("bench", "case", "provider", "backend", "device", "dtype", "p20_ms", "p50_ms", "p80_ms"),
    *("bytes", "gb_per_s", "items_per_s", "peak_bytes"),
)


def parser(name: str, description: str | None = None, *, dtype: str = "float32") -> argparse.ArgumentParser:
    """The options that every benchmark has; a script adds its own sizes."""
    p = argparse.ArgumentParser(prog=f"{name}_bench.py", description=(description or "").split("\n\n")[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("--device", default=device, choices=("cpu", "cuda"), help="where to run (default: %(default)s)")
    p.add_argument("--dtype", default=dtype, choices=("float32", "float64", "bfloat16", "float16"))
    p.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    p.add_argument("--repeats", type=int, default=200, help="most rounds of a case (default: %(default)s)")
    p.add_argument("--seconds", type=float, default=2.0, help="time for a case, all providers (default: %(default)s)")
    p.add_argument("--cache", choices=("warm", "cold"), help="cold: sweep caches before each call (default on cuda)")
    p.add_argument("--only", default="", help="run only the cases whose name contains this")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the environment")
    p.add_argument("--csv", type=Path, metavar="FILE", help="write the rows, the environment in each of them")
    p.add_argument("--plot", type=Path, metavar="FILE", help="draw the rows (needs matplotlib)")
    return p


def case_name(label: str, **parameters: Any) -> str:
    """``label key=value ...``: what a case is called; numbers that change between cases become a plot's axis."""
    return " ".join([label, *(f"{key}={value}" for key, value in parameters.items())])


def environment(name: str, device: str) -> dict[str, Any]:
    """On what a benchmark ran: the last row of its results."""
    return {
        "bench": name,
        "case": "environment",
        "device": device,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "commit": _commit(),
    }


class Bench:
    """One benchmark run: cases in, rows out.

    args: parsed by `parser`. device, dtype: as torch has them, for the script to build its inputs with.
    rows: one dict per case and provider, keys ROW. failures: red checks and providers that raised, as text.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.args = name, args
        if args.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit(f"{name}: --device cuda, but this PyTorch finds no CUDA device")
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        self.device, self.dtype = torch.device(args.device), getattr(torch, args.dtype)
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []
        cache = args.cache or ("cold" if args.device == "cuda" else "warm")
        self.timer = Timer(self.device, cold=cache == "cold")
        self.environment = environment(name, args.device)
        self.environment |= {"cache": cache, "copy_gb_per_s": self.timer.copy_bandwidth()}
        print(report.heading(self.environment), flush=True)

    def case(
        self,
        case: str,
        providers: Mapping[str, Call],
        *,
        bytes: int = 0,
        items: int = 0,
        check: Callable[[], Any] | None = None,
        check_each: Callable[[str], Any] | None = None,
        dtype: str | None = None,
        wall: bool = False,
    ) -> list[dict[str, Any]]:
        """Time every provider of a case, interleaved, and print the table; returns its rows.

        bytes: least memory traffic of the work (read + written), the same for all providers.
        items: images, boxes or numbers of one call.
        check: runs first; when it raises or returns False the case gives no number.
        check_each: takes a provider's name; when it raises or returns False only that provider gets no number.
        dtype: where it is not that of --dtype.
        wall: the host's time is asked for, so a GPU's calls go by the clock, too.
        """
        if self.args.only not in case:
            return []
        if (red := _red(check)) is not None:
            self._fail(f"{case}: check is red, no number taken ({red})")
            return []
        runnable = {name: call for name, call in providers.items() if self._runs(case, name, call, check_each)}
        times = self.timer.interleaved(runnable, rounds=self.args.repeats, seconds=self.args.seconds, wall=wall)
        rows = []
        for name, call in runnable.items():
            provider, _, backend = name.partition("/")
            p20, p50, p80 = np.percentile(times[name], [20, 50, 80]).tolist()
            values = (
                *(self.name, case, provider, backend, self.args.device, dtype or self.args.dtype),
                *(p20 * 1e3, p50 * 1e3, p80 * 1e3),
                *(bytes, bytes / p50 / 1e9 if bytes else None, items / p50 if items else None),
                self.timer.peak_bytes(call),
            )
            rows.append(dict(zip(ROW, values, strict=True)))
            if wall and self.timer.cuda:  # the environment's is that of the other rows
                rows[-1]["cache"] = "warm"
        self.rows += rows
        print(report.table(case, rows, self.environment["copy_gb_per_s"]), flush=True)
        self._write_json()  # a run that is cut off keeps what it has measured
        return rows

    def finish(self) -> int:
        """Write what --json, --csv and --plot ask for; the exit code: 1 if a check was red or a provider failed."""
        self._write_json()
        if self.args.csv:
            report.write_csv(self.rows, self.environment, self.args.csv)
        if self.args.plot:
            report.plot([*self.rows, self.environment], self.args.plot)
        for failure in self.failures:
            print(f"FAILED {failure}")
        return 1 if self.failures else 0

    def _write_json(self) -> None:
        if self.args.json:
            self.args.json.parent.mkdir(parents=True, exist_ok=True)
            self.args.json.write_text(json.dumps([*self.rows, self.environment], indent=1) + "\n")

    def _runs(self, case: str, name: str, call: Call, check: Callable[[str], Any] | None) -> bool:
        if check is not None and (red := _red(lambda: check(name))) is not None:
            self._fail(f"{case}: {name}: its check is red, no number taken ({red})")
            return False
        try:
            self.timer.warm_up(call)
        except Exception as error:  # a rival that cannot run here must not stop the others
            self._fail(f"{case}: {name} raised {_in_a_line(error)}")
            return False
        return True

    def _fail(self, text: str) -> None:
        self.failures.append(text)
        print(f"{self.name}: {text}", flush=True)


def _red(check: Callable[[], Any] | None) -> str | None:
    """Why the check is red; None when it is green."""
    if check is None:
        return None
    try:
        return "it returned False" if check() is False else None
    except Exception as error:
        return _in_a_line(error)


def _in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def device_name(device: str) -> str:
    """The GPU, or the CPU and its cores, as results name it."""
    from scrl_fast.info import processor

    return torch.cuda.get_device_name() if device == "cuda" else f"{processor()} ({os.cpu_count()} cores)"


def _commit() -> str | None:
    """The commit, with -dirty where something that could change a number differs: results and documents do not.

    ``SCRL_FAST_COMMIT`` names it where the tree travels without its ``.git``.
    """
    if named := os.environ.get("SCRL_FAST_COMMIT"):
        return named
    git = ["git", "-C", str(Path(__file__).parents[1])]
    try:
        commit = subprocess.run(
            [*git, "describe", "--always"], capture_output=True, text=True, check=True
        ).stdout.strip()
        others = ["--", ".", ":(exclude)benchmarks/results", ":(exclude)*.md"]
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD", *others]).returncode
        return commit + "-dirty" * bool(dirty)
    except (OSError, subprocess.CalledProcessError):
        return None
