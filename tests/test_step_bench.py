"""The benchmark of the step: its stages add up to the step, and ours agrees with the plain one before any number."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import memory_bench
import scaling_model
import step_bench
import step_precisions
import step_rival
import timing

from scrl_fast.models import build_encoder
from scrl_fast.run.precision import CpuBf16


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setitem(timing._COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setattr(timing, "WARM_UP_CALLS", timing.WARM_UP_CALLS)
    options = "--device=cpu --backbone=resnet10_tiny --dtype=float32 --batch 2 --workers=1 --seconds=0.1 --repeats=5"
    options += " --no-both-precisions"  # the default where the processor multiplies bf16
    files = [f"--json={tmp_path}/rows.json", f"--plot={tmp_path}/stages.png"]
    monkeypatch.setattr(sys, "argv", ["step_bench.py", *options.split(), *files])


def test_stages_shares_and_picture(tmp_path):
    assert step_bench.main() == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    step = {row["provider"]: row["p50_ms"] for row in rows if row["case"] == "step resnet10_tiny batch=2"}
    assert set(step) == {"scrl_fast", "floor", "torch"} and step["torch"] > 0
    (peak,) = {row["peak_bytes"] for row in rows if row.get("backend") == "plain step"}
    assert peak > 1e6  # of the process that the plain step has of its own
    stages = {row["backend"]: row["p50_ms"] for row in rows if row["case"].startswith("stages ")}
    assert {*step_bench.BACKBONE, *step_bench.HEADS, "input wait", "RoIAlign forward", "loss", "update"} <= set(stages)
    assert sum(stages.values()) == pytest.approx(step["scrl_fast"], rel=0.3)
    (shares,) = [row for row in rows if row["case"].startswith("shares ")]
    assert 0 < shares["beyond_floor_and_heads"] < 1
    heads = sum(stages[name] for name in step_bench.HEADS)
    assert shares["beyond_floor_and_heads_by_difference"] == pytest.approx(
        1 - (step["floor"] + heads) / step["scrl_fast"]
    )
    assert shares["activation_bytes_per_image"] > 0
    assert (tmp_path / "stages.png").stat().st_size > 1000


def test_both_precisions_run_in_turns_and_say_what_is_emulated(monkeypatch, tmp_path):
    emulates = CpuBf16(False, "for the test")
    monkeypatch.setattr(step_precisions, "cpu_bf16", lambda: emulates)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--both-precisions"])
    assert step_bench.main() == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    dtypes = {row["backend"]: row["dtype"] for row in rows if row["case"] == "step resnet10_tiny batch=2"}
    emulated = dict.fromkeys(("step bf16", "plain step bf16"), "bfloat16 (emulated)")
    assert dtypes == {**dict.fromkeys(("step", "encoders", "plain step"), "float32"), **emulated}
    (shares,) = [row for row in rows if row["case"].startswith("shares ")]
    assert shares["bf16_over_ours"] > 0 and shares["plain_bf16_over_ours"] > 0
    memory = [shares[f"activation_bytes_per_image{name}"] for name in ("_bf16", "")]
    assert 0.4 < memory[0] / memory[1] < 1
    step_precisions.name_precisions(row := [{"backend": "step", "device": "cpu", "dtype": "bfloat16"}], {})
    assert row[0]["dtype"] == "bfloat16 (emulated)"
    monkeypatch.setattr(step_precisions, "cpu_bf16", lambda: CpuBf16(True, "for the test"))
    step_precisions.name_precisions(row := [{"backend": "step", "device": "cpu", "dtype": "bfloat16"}], {})
    assert row[0]["dtype"] == "bfloat16"


def test_no_number_where_the_plain_step_disagrees(monkeypatch, capsys):
    plain = step_rival.PlainStep.loss
    monkeypatch.setattr(step_rival.PlainStep, "loss", lambda self, boxes: 1.1 * plain(self, boxes))
    assert step_bench.main() == 1
    assert "check is red" in capsys.readouterr().out
    assert torch.is_grad_enabled()


def test_no_number_where_the_compiler_disagrees(monkeypatch, capsys):
    def wrong(graph, inputs):
        return lambda *values: [part.square() if part.is_floating_point() else part for part in graph(*values)]

    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: plain(self, backend=wrong))
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--compile", "--rival-batch=0"])
    assert step_bench.main() == 1
    assert "check is red" in capsys.readouterr().out


def test_deterministic_is_refused_beside_the_plain_step(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--deterministic"])
    with pytest.raises(SystemExit):
        step_bench.main()
    assert "--rival-batch 0" in capsys.readouterr().err


# ---- what the documents say ----

DOCS = Path(__file__).parents[1] / "docs"


def test_activations_are_those_of_the_document_and_of_real_networks():
    text = (DOCS / "determinism.md").read_text()
    for name in ("resnet18", "resnet50"):
        row = memory_bench.activations(name)
        kept, checkpointed = (row[key] / 1e6 for key in ("bytes_per_image", "checkpointed_bytes_per_image"))
        assert f"| {name} | {kept:.0f} | {checkpointed:.0f} |" in text
        assert row["bf16_bytes_per_image"] == pytest.approx(row["bytes_per_image"] / 2, rel=0.1)  # "half"
    encoder = build_encoder("resnet10_tiny")
    real = memory_bench.kept_bytes(encoder, torch.randn(2, 3, 64, 64))
    assert real == memory_bench.activations("resnet10_tiny", size=64)["bytes_per_image"] > 2 * 16 * 32 * 32 * 4


def test_the_paper_model_is_that_of_the_document():
    what = scaling_model.exchanged()
    assert what == scaling_model.Exchanged(gradient_bytes=148_463_776, exchanges=164, statistics_bytes=212_692)
    lines = scaling_model.table([scaling_model.predict(what, 120.0, *link) for link in scaling_model.LINKS])
    assert all(line in (DOCS / "distributed.md").read_text() for line in lines)
