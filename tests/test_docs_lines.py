"""Commands of README and docs run as they stand, on tiny data under the names that the pages use.

Small sizes stand behind each line: an option that is given twice counts as given last.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from labelled_folders import LINE, picture, yolo_part
from test_docs_commands import RUN_AS_IT_STANDS, ours, shell_lines
from tiny_transfer import SMALL

from scrl_fast.commands import main

TRAIN = [
    *("--model.backbone=resnet10_tiny", "--model.hidden_dim=16", "--model.projection_dim=8", "--views.size=32"),
    *("--boxes.min_size=8", "--train.max_steps=2", "--train.batch_size=4", "--train.device=cpu", "--data.workers=0"),
    *("--optim.warmup_epochs=0.5", "--run.tensorboard=false", "--run.log_every=1"),
]
TWO = LINE + "1 0.1 0.15 0.18 0.25\n"
SMALLER = {
    ("train",): TRAIN,
    ("evaluate", "pca"): ["--size=64", "--workers=0"],
    ("evaluate", "compare"): ["--checkpoints=random,runs/mine", "--workers=0", "--seeds=2", "--plot=compare.png"],
    ("evaluate", "rank"): ["--size=32", "--images=8", "--workers=0", "--data.source=folder", "--data.root=PICTURES"],
    ("transfer", "custom"): [*SMALL, "--train.steps=2", "--init=runs/mine"],
    ("transfer", "compare"): [*SMALL, "--train.steps=2", "--inits=random,runs/mine", "--shares=1", "--seeds=1"],
    ("transfer", "predict"): ["--workers=0", "--device=cpu"],
    ("info",): [],
    ("pack",): [],
}
"""What is added to a line of each command."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PICTURES and LABELLED, the placeholders of the pages."""
    made = tmp_path_factory.mktemp("user")
    for number in range(8):
        picture(made / f"PICTURES/{number}.jpg", number)
    for part, count, first in (("train", 8, 0), ("valid", 3, 8)):
        yolo_part(made / f"LABELLED/{part}/images", made / f"LABELLED/{part}/labels", count, TWO, first=first)
    (made / "LABELLED/data.yaml").write_text("train: train/images\nval: valid/images\nnames: [square, corner]\n")
    return made


def test_the_lines_run_one_after_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    calls = [argv for line in shell_lines() for argv in ours(line.text) if tuple(argv) in RUN_AS_IT_STANDS]
    assert {tuple(argv) for argv in calls} == RUN_AS_IT_STANDS  # none is left that no page has any more
    for argv in dict.fromkeys(map(tuple, calls)):
        shutil.rmtree("OUT", ignore_errors=True)
        words = [*argv, *next(more for start, more in SMALLER.items() if argv[: len(start)] == start)]
        assert main(words) in (0, None), words
        if "--run.dir=runs/mine" in argv:
            Path("RUN").symlink_to("runs/mine")
            shutil.copytree("PICTURES", "DIR")
    assert Path("features.png").stat().st_size > 1000
    assert Path("compare.png").stat().st_size > 1000
    assert len(list(Path("found/pictures").iterdir())) == 8
    assert "| mine " in (next(Path("runs").glob("compare*")) / "table.md").read_text()
