"""The benchmark harness: rows as tools expect them, no number on a red check, plots and tables from rows alone."""

import csv
import json
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import harness
import report
import step_bench
import summary
import timing

KEYS = [  # what DESIGN promises to tools
    *["bench", "case", "provider", "backend", "device", "dtype", "p20_ms", "p50_ms", "p80_ms"],
    *["bytes", "gb_per_s", "items_per_s", "peak_bytes"],
]


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    monkeypatch.setitem(timing._COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)  # seconds, with all that a test process holds


def start(*options: str) -> harness.Bench:
    arguments = ["--device=cpu", "--seconds=0.05", "--repeats=5", *options]
    return harness.Bench("nap", harness.parser("nap").parse_args(arguments))


def nap(milliseconds: float):
    return lambda: time.sleep(milliseconds * 1e-3)


def test_rows_and_environment(tmp_path):
    bench = start(f"--json={tmp_path}/deep/rows.json", f"--csv={tmp_path}/rows.csv", "--dtype=bfloat16")
    bench.case("short n=1", {"scrl_fast/native": nap(1), "rival": nap(20)}, bytes=4_000_000, items=10)
    assert bench.finish() == 0
    *rows, environment = json.loads((tmp_path / "deep/rows.json").read_text())
    assert [list(row) for row in rows] == [KEYS, KEYS]
    ours, rival = rows
    assert (ours["provider"], ours["backend"], rival["provider"], rival["backend"]) == (
        "scrl_fast",
        "native",
        "rival",
        "",
    )
    assert ours["case"] == rival["case"] == "short n=1" and ours["dtype"] == "bfloat16"
    assert 1 <= ours["p20_ms"] <= ours["p50_ms"] <= ours["p80_ms"] and ours["p50_ms"] < rival["p50_ms"]
    assert ours["gb_per_s"] == pytest.approx(4 / ours["p50_ms"])
    assert ours["items_per_s"] == pytest.approx(10_000 / ours["p50_ms"])
    assert environment["case"] == "environment" and environment["copy_gb_per_s"] > 0
    assert {"device_name", "threads", "versions", "commit"} <= set(environment)
    table = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [row["provider"] for row in table] == ["scrl_fast", "rival"] and table[0][
        "torch_version"
    ] == torch.__version__


@pytest.mark.parametrize("check", [lambda: False, lambda: torch.testing.assert_close(torch.ones(1), torch.zeros(1))])
def test_red_check_gives_no_number(check, capsys):
    bench = start()
    assert bench.case("wrong", {"scrl_fast": nap(0)}, check=check) == []
    assert bench.rows == [] and bench.finish() == 1
    assert "red" in capsys.readouterr().out


def test_a_red_rival_costs_its_own_number_alone(tmp_path, capsys):
    bench = start(f"--json={tmp_path}/rows.json")
    rows = bench.case("case", {"scrl_fast": nap(0), "rival": nap(0)}, check_each=lambda name: name != "rival")
    assert [row["provider"] for row in rows] == ["scrl_fast"]
    assert "case: rival: its check is red" in capsys.readouterr().out
    kept = json.loads((tmp_path / "rows.json").read_text())
    assert [row["case"] for row in kept] == ["case", "environment"], "rows are on disk before the run ends"
    assert bench.finish() == 1


def test_the_commit_can_be_told(monkeypatch):
    monkeypatch.setenv("SCRL_FAST_COMMIT", "abc1234")
    assert harness.environment("nap", "cpu")["commit"] == "abc1234"


def test_a_gpu_sleeps_until_the_call_is_enqueued(monkeypatch):
    """Played by the CPU: sweep by reading, sleep, start event, call, end event; the sleep outlasts the host's time."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 1.0

    slept = []
    monkeypatch.setattr(timing.torch.cuda, "Event", Event)
    monkeypatch.setattr(timing.torch.cuda, "_sleep", lambda cycles: (done.append("sleep"), slept.append(cycles)))
    timer = timing.Timer(torch.device("cpu"), cold=True)
    timer._sweep = torch.ones(4, dtype=torch.int64)
    timer.cuda = True
    monkeypatch.setattr(timer, "_synchronize", lambda: None)

    def slow():
        done.append("call")
        time.sleep(2e-3)

    assert timer._by_events(slow) == 1e-3 and timer._by_events(slow) == 1e-3
    assert done == ["call", *["sleep", "event", "call", "event"] * 2], "one call tells how long the host takes"
    assert slept[0] == slept[1] >= 2 * 2e-3 * 2.6e9 and timer._sweep.tolist() == [1, 1, 1, 1]
    timer._by_events(lambda: None)
    assert slept[-1] == round(timing._SLEEP_LEAST_S * timing._CYCLES_PER_S)


def test_failing_rival_is_named_and_others_run(capsys):
    bench = start()

    def broken():
        raise RuntimeError("needs a compiler")

    rows = bench.case("case", {"scrl_fast": nap(0), "rival": broken})
    assert [row["provider"] for row in rows] == ["scrl_fast"] and bench.finish() == 1
    assert "needs a compiler" in capsys.readouterr().out


def test_rounds_are_interleaved_and_bounded():
    calls = []
    timer = timing.Timer(torch.device("cpu"), cold=False)
    work = {name: lambda name=name: (calls.append(name), time.sleep(1e-3)) for name in "ab"}
    times = timer.interleaved(work, rounds=6, seconds=60)
    assert [len(t) for t in times.values()] == [6, 6]
    assert "".join(calls[2:]) == "abba" * 3
    assert [len(t) for t in timer.interleaved(work, rounds=50, seconds=0).values()] == [timing.MIN_ROUNDS] * 2


def test_beside_a_short_call_all_but_very_long_ones_are_warm(monkeypatch):
    calls, seconds = [], {"a": 0.8e-3, "b": 20e-3, "c": 60e-3}

    def played(call, times):
        for _ in range(times):
            call()
        return seconds[call.args[0]]

    monkeypatch.setattr(timing, "_seconds", played)
    work = {name: partial(calls.append, name) for name in seconds}
    timer = timing.Timer(torch.device("cpu"), cold=False)
    timer.interleaved(work, rounds=2, seconds=60)
    assert "".join(calls[3:]) == "aabbc" + "bbcaa", "of two, the first is not timed"
    del work["a"], calls[:]
    timer.interleaved(work, rounds=1, seconds=60)
    assert "".join(calls[2:]) == "bc"


def test_only_selects_cases():
    bench = start("--only=b=2")
    assert bench.case("a b=1", {"scrl_fast": nap(0)}) == []
    assert len(bench.case("a b=2", {"scrl_fast": nap(0)})) == 1


def test_peak_memory_of_a_call():
    timer = timing.Timer(torch.device("cpu"), cold=False)
    peak = timer.peak_bytes(lambda: torch.ones(64 << 20, dtype=torch.uint8))
    if peak is None:
        pytest.skip("this kernel keeps no high-water mark of memory")
    assert 60 << 20 < peak < 80 << 20


def test_table_shows_ratio_to_ours():
    row = dict.fromkeys(KEYS) | {"case": "c", "backend": "", "p20_ms": 1.0, "p80_ms": 1.0, "gb_per_s": 5.0}
    rows = [row | {"provider": "rival", "p50_ms": 6.0}, row | {"provider": "scrl_fast", "p50_ms": 2.0}]
    text = report.table("c", rows, copy_gb_per_s=10.0)
    assert "3.00x" in text and "50%" in text


def test_without_matplotlib_no_picture_is_drawn_and_nothing_else_is_lost(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    row = dict.fromkeys(KEYS) | {"provider": "scrl_fast", "backend": "step", "case": "step x batch=2", "p50_ms": 2.0}
    for draw in (report.plot, step_bench.draw):
        draw([row], tmp_path / "x.png")
        assert "x.png not drawn: matplotlib is not installed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_plot_from_rows_alone(tmp_path):
    pytest.importorskip("matplotlib")
    row = dict.fromkeys(KEYS) | {"provider": "scrl_fast", "backend": "", "p50_ms": 2.0, "gb_per_s": 5.0}
    rows = [row | {"case": f"forward layout=nchw batch={n}"} for n in (64, 128)]
    (line,) = report.curves(rows)["batch"].items()
    assert line[0] == "scrl_fast forward layout=nchw" and [x for x, _ in line[1]] == [64, 128]
    for some in (rows, rows[:1]):
        file = tmp_path / f"{len(some)}.png"
        report.plot(some, file)
        assert file.read_bytes()[1:4] == b"PNG"


def test_saved_rows_can_be_printed(tmp_path, capsys):
    bench = start(f"--json={tmp_path}/rows.json")
    bench.case("case", {"scrl_fast": nap(0)})
    bench.finish()
    capsys.readouterr()
    assert report.main([f"{tmp_path}/rows.json"]) == 0
    assert "scrl_fast" in capsys.readouterr().out


def test_rows_by_the_clock_on_a_gpu_say_that_caches_were_warm(tmp_path, monkeypatch):
    bench = start("--cache=cold", f"--csv={tmp_path}/rows.csv")
    monkeypatch.setattr(bench.timer, "cuda", True)  # played by the CPU
    monkeypatch.setattr(bench.timer, "_synchronize", lambda: None)
    monkeypatch.setattr(bench.timer, "peak_bytes", lambda call: None)
    bench.case("call", {"scrl_fast": nap(0)}, wall=True)
    monkeypatch.setattr(bench.timer, "cuda", False)
    bench.case("work", {"scrl_fast": nap(0)}, wall=True)
    bench.finish()
    assert [row["cache"] for row in csv.DictReader((tmp_path / "rows.csv").open())] == ["warm", "cold"]


def test_rows_of_different_fields_share_a_csv_file(tmp_path):
    environment = dict.fromkeys(("device_name", "threads", "copy_gb_per_s", "commit")) | {"versions": {}}
    report.write_csv([{"case": "step"}, {"case": "stages", "beyond_floor": 0.5}], environment, tmp_path / "rows.csv")
    assert [row["beyond_floor"] for row in csv.DictReader((tmp_path / "rows.csv").open())] == ["", "0.5"]


def test_the_table_says_what_the_rows_say(tmp_path, capsys):
    rows = [
        {"case": "resnet50 tensors=164 numbers=9", "provider": provider, "backend": backend, "p50_ms": p50}
        for provider, backend, p50 in (
            ("scrl_fast", "native", 10.0),
            ("torch", "foreach_lerp", 12.0),
            ("torch", "data_loop", 450.0),
        )
    ]
    about = {"device_name": "a machine", "threads": 2, "versions": {"torch": "2.12"}, "commit": "abc"}
    rows.append({"case": "environment", **about})
    (tmp_path / "ema_update_cpu.json").write_text(json.dumps(rows))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nafter\n")
    arguments = ["--results", str(tmp_path)]
    assert summary.main([*arguments, "--check", str(readme)]) == 1
    assert summary.main([*arguments, "--write", str(readme)]) == 0
    assert summary.main([*arguments, "--check", str(readme)]) == 0
    text = readme.read_text()
    line = "| 10.00 ms | torch/foreach_lerp 12.00 ms; torch/data_loop 450.00 ms | 1.2x; 45x |"
    assert text.startswith("before\n") and text.endswith("after\n") and line in text
    assert text.count("\n| ") == 2  # the head and the one line that was measured
    assert "Medians; a machine, 2 threads, torch 2.12, commit abc." in text


def test_readme_and_docs_hold_the_tables_of_the_kept_results():
    if not any(summary.RESULTS.glob("*_cpu.json")):
        pytest.skip("no results are kept")
    root = Path(__file__).parents[1]
    assert summary.main(["--check", str(root / "README.md"), str(root / "docs/operations.md")]) == 0
    assert len(summary.ratios()) == len(summary.SHORT) == 5
