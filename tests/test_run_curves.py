"""The kept curves of docs/reading_a_run.md: copied from a run folder, drawn from the file alone."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import run_curves

RESULTS = Path(__file__).parents[1] / "benchmarks/results/run_curves_cpu.json"


def test_a_run_is_kept_and_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    run, kept, picture = tmp_path / "run", tmp_path / "kept.json", tmp_path / "curves.png"
    run.mkdir()
    sections = "".join(f"{name}: {{seed: 1}}\n" for name in ("model", "optim", "boxes", "train"))
    (run / "config.yaml").write_text(sections + "views: {size: 64}\n")
    environment = {"scrl_fast": {"commit": "abc"}, "device": {"cpu": "x", "cores": 2}, "versions": {"torch": "2"}}
    (run / "env.json").write_text(json.dumps(environment))
    row = {"step": 1, "loss": 1.23456789, "lr": 1, "feature_std": 0.5, "rankme": 9.0, "images_per_s": 3}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row | {"step": step}) + "\n" for step in (1, 2)))
    arguments = ["run_curves.py", f"--json={kept}", "--keep", f"a=b: c={run}", f"--plot={picture}"]
    monkeypatch.setattr(sys, "argv", arguments)
    run_curves.main()
    (found,) = json.loads(kept.read_text()).items()
    assert found[0] == "a=b: c" and found[1]["commit"] == "abc" and found[1]["device"] == "x, 2 cores, torch 2"
    assert found[1]["rows"][1] == {"step": 2, "loss": 1.2346, "feature_std": 0.5, "rankme": 9, "lr": 1}
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_the_kept_runs_are_healthy_and_collapsed_as_the_page_says():
    runs = list(json.loads(RESULTS.read_text()).values())
    ranks = [run["rows"][-1]["rankme"] for run in runs]
    assert [run["options"]["model"]["method"] for run in runs] == ["scrl", "scrl", "byol", "byol"]
    assert min(ranks[:2]) > 10 and max(ranks[2:]) < 6
    deviations = [run["rows"][-1]["feature_std"] for run in runs]
    assert min(deviations[:3]) > 0.06 and deviations[3] < 0.03
