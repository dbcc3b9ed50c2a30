"""benchmarks/evidence.py: rows as promised, equal conditions for every method, nothing done twice, AP that is AP."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import evidence
import evidence_report
import evidence_runs
from evidence_runs import MEASURES, METHODS, Budget, Trial

from scrl_fast.evaluate import softmax_regression
from scrl_fast.evaluate.dense import DenseResult
from scrl_fast.models import build_encoder

TINY = Budget(1, 64, 32, 2, 24, 24, 16, 16, 2, 4, detector_test=8)


NOTHING = DenseResult(*[0.0] * len(fields(DenseResult)))


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setitem(evidence_runs.BUDGETS, "smoke", TINY)
    monkeypatch.setattr(softmax_regression, "LBFGS_STEPS", 5)  # accuracies are not the question here
    monkeypatch.setattr(evidence, "run_trials", lambda trials, jobs: [evidence.run_trial(each, 1) for each in trials])


def trial(method, folder, **options):
    values = {"seed": 0, "budget": TINY, "lr": 16.0, "ema": 0.9} | options
    return Trial(method, folder=folder / f"{method}-{values['seed']}", **values)


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
    assert all(set(each["commits"]) == set(each["seconds"]) >= {*MEASURES} for each in document["details"])
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

    random = trial("random", tmp_path).encoder()
    for method in ("byol", "scrl"):
        one = trial(method, tmp_path)
        start = SCRLTrainer(one.config(), source=one.scenes()).model.online.encoder
        for (name, ours), theirs in zip(random.named_parameters(), start.parameters(), strict=True):
            assert torch.equal(ours, theirs), name
    configs = [trial(method, tmp_path).config().to_dict() for method in ("byol", "scrl")]
    for config in configs:
        config["model"].pop("method")
        config["run"].pop("dir")
    assert configs[0] == configs[1]


def test_detectors_of_one_seed_differ_by_their_encoder_only(tmp_path, monkeypatch):
    found = {}
    for method in ("random", "byol", "scrl"):  # an untrained encoder of its own for each, in place of a trained one
        one = trial(method, tmp_path)
        torch.manual_seed(len(found))
        encoder = build_encoder("resnet10_tiny")
        monkeypatch.setattr(one, "encoder", lambda encoder=encoder: encoder)
        monkeypatch.setattr(evidence_runs, "fine_tune", lambda network, *_, **__: found.setdefault(method, network))  # noqa: B023
        monkeypatch.setattr(evidence_runs, "average_precision", lambda *_, **__: {"AP": 0.5, "AP50": 0.75})
        assert one.detection_ap() == {"value": 0.5, "ap": 0.5, "ap50": 0.75}
        body = found[method].backbone.body
        assert torch.equal(body.conv1.weight, encoder.body.conv1.weight)
    states = [network.state_dict() for network in found.values()]
    for name in states[0]:
        if "backbone.body." not in name:
            assert torch.equal(states[0][name], states[1][name]) and torch.equal(states[0][name], states[2][name]), name


def test_tuning_tries_the_same_grid_for_both_methods(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        evidence_runs.Trial, "run", lambda one: {"method": one.method, "seed": one.seed, "roi_linear": one.lr / 100}
    )
    file = tmp_path / "tuning.json"
    assert evidence.main(["--tune", "--budget=smoke", f"--work={tmp_path}", f"--json={file}"]) == 0
    rows = json.loads(file.read_text())["rows"]
    settings = [{(row["lr"], row["ema"]) for row in rows if row["method"] == method} for method in ("byol", "scrl")]
    assert settings[0] == settings[1] == set(evidence.GRID)
    assert {row["seed"] for row in rows} == set(evidence.TUNING_SEEDS)
    assert all(row["roi_linear"] == row["lr"] / 100 for row in rows)
    assert not set(evidence.TUNING_SEEDS) & set(evidence.parse([]).seeds)
    assert evidence.parse([]).json and not evidence.parse(["--seeds=7"]).json, "other rows replace the documented ones"
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * len(evidence.GRID) + 1


def test_options_of_training_are_changed_for_both_methods_alike_and_not_the_measures(tmp_path, capsys, monkeypatch):
    where = [f"--work={tmp_path}", f"--json={tmp_path / 'a.json'}"]
    args = evidence.parse(["--set", "boxes.per_image=1", "views.scale=[0.5, 1]", *where])
    for each in evidence.planned(args)[1:3]:
        config = each.config()
        assert config.boxes.per_image == 1 and config.views.scale == (0.5, 1)
    seen = []
    monkeypatch.setattr(Trial, "encoder", lambda one: None)
    monkeypatch.setattr(evidence_runs, "dense_consistency", lambda *args, **_: seen.append(args[2:]) or NOTHING)
    for each in evidence.planned(args)[:3]:
        each.dense_retrieval()
    assert seen[0] == seen[1] == seen[2] and seen[0][1].per_image > 1
    for wrong, said in (("boxes.perimage=1", "with an option of"), ("boxes.per_image=1", "its own --work and --json")):
        with pytest.raises(SystemExit):
            evidence.parse(["--set", wrong])
        assert said in capsys.readouterr().err


def test_the_table_gives_mean_and_spread():
    rows = [dict.fromkeys(MEASURES, 0.2 * seed) | {"method": "scrl", "seed": seed} for seed in (1, 2, 3)]
    head, only = evidence.table(rows)
    assert "3 seeds" in head and only.split() == ["scrl", *["40.0", "+-", "20.0"] * 4]


def test_the_tables_of_the_documentation_are_what_the_rows_say(tmp_path):
    results = Path(evidence.__file__).parent / "results"
    found = [file for file in sorted(results.glob("evidence*_cpu.json")) if file.name in evidence.DOCUMENT.read_text()]
    assert results / "evidence_cpu.json" in found
    copy = tmp_path / "evidence.md"
    copy.write_text(evidence.DOCUMENT.read_text())
    for file in found:
        evidence_report.write_markdown(copy, file)
    assert copy.read_text() == evidence.DOCUMENT.read_text()
