"""`python -m scrl_fast.train` on a folder of real photographs in every format, with files that cannot be read."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from photos import write_bad, write_formats

from scrl_fast import train
from scrl_fast.run.metrics_file import read_metrics

pytestmark = pytest.mark.usefixtures("no_curves")


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
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(1, steps + 1))
    listed = [json.loads(line)["path"] for line in (run / "bad_files.jsonl").read_text().splitlines()]
    assert len(listed) == len(set(listed)) > 0
    assert set(listed) <= bad
    said = capsys.readouterr().err
    assert all(said.count(f"{path}:") == 1 for path in listed), said


def test_a_folder_of_nothing_but_bad_files_ends_at_once_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, run = tmp_path / "pictures", tmp_path / "run"
    for name in "abcd":
        (pictures / name).mkdir(parents=True)
        write_bad(pictures / name)
    arguments = [f"--data.root={pictures}", f"--run.dir={run}", "--train.batch_size=4", "--views.size=64"]
    arguments += ["--data.source=folder", "--model.backbone=resnet10_tiny", "--run.tensorboard=false"]
    started = time.monotonic()
    with pytest.raises(SystemExit) as end:
        train.main(arguments)
    assert time.monotonic() - started < 60 and end.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be read" in said and str(pictures) in said
    assert len((run / "bad_files.jsonl").read_text().splitlines()) >= 8
    assert not (run / "checkpoints").exists()
