"""`python -m scrl_fast.train` on a folder of real photographs in every format, with files that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from photos import write_bad, write_formats

from scrl_fast import runlog, train


@pytest.mark.parametrize("given", [[], ["--config=byol_200ep", "--optim.warmup_epochs=1"]], ids=["scrl", "byol"])
def test_a_folder_of_photographs_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str]) -> None:
    pictures, run = tmp_path / "pictures", tmp_path / "run"
    good = write_formats(pictures)
    bad = {str(path) for path in write_bad(pictures)}
    arguments = [
        *given,
        *("--data.source=folder", f"--data.root={pictures}", "--train.epochs=2", f"--run.dir={run}"),
        *("--data.workers=1", "--train.batch_size=4", "--views.size=64", "--run.log_every=1"),
        *("--model.backbone=resnet10_tiny", "--model.hidden_dim=32", "--model.projection_dim=16"),
        "--run.tensorboard=false",
    ]
    assert train.main(arguments) == 0
    steps = 2 * ((len(good) + len(bad)) // 4)
    assert [row["step"] for row in runlog.read_metrics(run / "metrics.jsonl")] == list(range(1, steps + 1))
    listed = [json.loads(line)["path"] for line in (run / "bad_files.jsonl").read_text().splitlines()]
    assert len(listed) == len(set(listed)) > 0
    assert set(listed) <= bad
    said = capsys.readouterr().err
    assert all(said.count(f"{path}:") == 1 for path in listed), said
