"""The examples run: scripts for a step or two, notebooks with small settings on drawn pictures."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from labelled_folders import yolo_part
from tiny_transfer import SMALL

EXAMPLES = Path(__file__).parent.parent / "examples"
PRETRAINING = {
    **{"train__epochs": 1, "train__max_steps": 2, "train__batch_size": 4, "views__size": 32, "boxes__min_size": 8},
    **{"model__hidden_dim": 32, "model__projection_dim": 16, "optim__warmup_epochs": 0.5, "train__device": "cpu"},
    **{"run__log_every": 1, "run__tensorboard": False},
}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(name: str) -> list[dict[str, Any]]:
    return json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def run_notebook(name: str, **settings: Any) -> dict[str, Any]:
    """Run the code of a notebook with other settings in the place of its first cell's; its variables at the end."""
    pytest.importorskip("matplotlib", reason="the notebooks draw")
    first, *code = ["".join(cell["source"]) for cell in cells(name) if cell["cell_type"] == "code"]
    variables: dict[str, Any] = {}
    exec(first, variables)
    assert set(settings) <= set(variables)
    variables |= settings
    for number, source in enumerate(code, 2):
        exec(compile(source, f"{name}, code cell {number}", "exec"), variables)
    return variables


@pytest.fixture
def labelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for part, count, first in (("train", 8, 0), ("valid", 3, 8)):
        yolo_part(tmp_path / f"labelled/{part}/images", tmp_path / f"labelled/{part}/labels", count, first=first)
    (tmp_path / "labelled/data.yaml").write_text("train: train/images\nval: valid/images\nnames: [square]\n")
    return tmp_path / "labelled"


@pytest.mark.parametrize("name", ["own_training_loop", "torchvision_detector"])
def test_scripts_run(name: str) -> None:
    losses = script(name).main(steps=2)
    assert len(losses) == 2 and all(map(math.isfinite, losses))


def test_photographs_become_maps(labelled: Path) -> None:
    small = {"BACKBONE": "resnet10_tiny", "INIT": "random", "OPTIONS": PRETRAINING, "SHOWN": 2, "SIZE": 64}
    made = run_notebook("photographs_to_pca", PICTURES=str(labelled / "train/images"), **small)
    assert made["columns"]["trained"].colours.shape == (2, 8, 8, 3)
    assert made["result"].summary["step"] == 2


def test_labels_become_a_table(labelled: Path) -> None:
    starts = {"BACKBONE": "resnet10_tiny", "INIT": "random", "PRETRAINING": PRETRAINING}
    detector = [*SMALL, "--train.steps=2", "--shares=1", "--seeds=1", "--compare.leaks=exact"]
    made = run_notebook("labels_to_compare", DETECTOR=detector, **starts)
    assert {row["start"] for row in made["rows"]} == {"random", "unlabelled"}
    assert made["detector"].classes == ["square"]


@pytest.mark.parametrize("name", ["photographs_to_pca", "labels_to_compare"])
def test_notebooks_hold_no_output(name: str) -> None:
    for cell in cells(name):
        assert not cell.get("outputs") and cell.get("execution_count") is None
