"""benchmarks/evidence.py: rows as promised, equal conditions for every method, nothing done twice, AP that is AP."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import evidence
import evidence_detector
import evidence_runs
from evidence_runs import MEASURES, METHODS, Budget, Line

from scrl_fast.data import DemoScenes
from scrl_fast.data.demo import NUM_DIGITS
from scrl_fast.models import build_encoder

TINY = Budget(1, 64, 32, 2, 24, 24, 16, 16, 2, 4)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setitem(evidence_runs.BUDGETS, "smoke", TINY)
    monkeypatch.setattr(evidence, "run_lines", lambda lines, jobs: [evidence.run_line(line, 1) for line in lines])


def line(method, folder, **options):
    values = {"seed": 0, "budget": TINY, "lr": 16.0, "ema": 0.9} | options
    return Line(method, folder=folder / f"{method}-{values['seed']}", **values)


def test_rows_of_every_method_and_seed(tmp_path, capsys):
    command = ["--budget=smoke", "--seeds", "0", f"--work={tmp_path / 'work'}", f"--json={tmp_path / 'evidence.json'}"]
    assert evidence.main([*command, "--minutes=0"]) == 0 and not (tmp_path / "evidence.json").exists()
    assert "0 of 3 done; call again" in capsys.readouterr().out
    assert evidence.main(command) == 0
    document = json.loads((tmp_path / "evidence.json").read_text())
    assert document["command"].startswith("python benchmarks/evidence.py --budget=smoke")
    rows = document["rows"]
    assert [(row["method"], row["seed"]) for row in rows] == [(method, 0) for method in METHODS]
    assert all(set(row) == {"method", "seed", *MEASURES} and all(0 <= row[n] <= 1 for n in MEASURES) for row in rows)
    curves = {each["method"]: [point["step"] for point in each["curve"]] for each in document["details"]}
    assert curves == {"random": [0], "byol": [1, 2], "scrl": [1, 2]}
    assert document["summary"]["scrl"]["roi_linear"]["mean"] == rows[2]["roi_linear"]
    assert (tmp_path / "evidence.png").stat().st_size > 10_000
    capsys.readouterr()
    assert evidence.main(command) == 0  # all of it is there
    again = capsys.readouterr().out
    assert "roi_linear" not in again and json.loads((tmp_path / "evidence.json").read_text())["rows"] == rows
    with pytest.raises(SystemExit, match="begun with other settings"):
        evidence.main([*command, "--lr", "scrl=3"])


def test_every_method_starts_from_the_same_weights(tmp_path):
    from scrl_fast.trainer import SCRLTrainer

    random = line("random", tmp_path).encoder()
    for method in ("byol", "scrl"):
        one = line(method, tmp_path)
        start = SCRLTrainer(one.config(), source=one.scenes()).model.online.encoder
        for (name, ours), theirs in zip(random.named_parameters(), start.parameters(), strict=True):
            assert torch.equal(ours, theirs), name
    configs = [line(method, tmp_path).config().to_dict() for method in ("byol", "scrl")]
    for config in configs:
        config["model"].pop("method")
        config["run"].pop("dir")
    assert configs[0] == configs[1]


def test_detectors_of_one_seed_differ_by_their_encoder_only():
    heads = [
        evidence_detector.detector(build_encoder("resnet10_tiny"), 96, (0.5,) * 3, (0.25,) * 3, 3) for _ in range(2)
    ]
    pairs = zip(heads[0].head.parameters(), heads[1].head.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert not torch.equal(heads[0].backbone.encoder.body.conv1.weight, heads[1].backbone.encoder.body.conv1.weight)
    assert all(parameter.requires_grad for parameter in heads[0].parameters())


def test_average_precision_of_known_detections():
    scenes = DemoScenes(12, 96, split="test")
    exact = [
        {"image_id": i + 1, "category_id": label + 1, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": 0.9}
        for i in range(12)
        for (x0, y0, x1, y1), label in zip(scenes.boxes(i).tolist(), scenes.labels(i).tolist(), strict=True)
    ]
    assert evidence_detector.coco_ap(scenes, exact) == {"ap": 1.0, "ap50": 1.0}
    assert evidence_detector.coco_ap(scenes, []) == {"ap": 0.0, "ap50": 0.0}
    other = [{**row, "category_id": (row["category_id"] + 4) % NUM_DIGITS + 1} for row in exact]
    assert evidence_detector.coco_ap(scenes, other)["ap"] < 0.1
    shifted = [{**row, "bbox": [row["bbox"][0] + 4, *row["bbox"][1:]]} for row in exact]
    found = evidence_detector.coco_ap(scenes, shifted)
    assert found["ap"] < 0.7 < found["ap50"]


def test_the_table_gives_mean_and_spread():
    rows = [dict.fromkeys(MEASURES, 0.2 * seed) | {"method": "scrl", "seed": seed} for seed in (1, 2, 3)]
    head, only = evidence.table(rows)
    assert "3 seeds" in head and only.split() == ["scrl", *["40.0", "+-", "20.0"] * 4]
