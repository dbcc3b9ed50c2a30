"""The examples run: scripts for a step or two, notebooks with small settings on drawn pictures."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import os
import sys
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


def run_notebook(name: str, check: str, **settings: Any) -> None:
    """Run a notebook with other settings behind those of its first code cell, and ``check`` as its last one.

    Jupyter runs it where nbclient and a kernel are installed, as in .ci/run; elsewhere its code runs here.
    """
    pytest.importorskip("matplotlib", reason="the notebooks draw")
    code = ["".join(cell["source"]) for cell in cells(name) if cell["cell_type"] == "code"]
    assert set(settings) <= {target.id for target in _assigned(code[0])}
    code[1:1] = [f"{variable} = {value!r}" for variable, value in settings.items()]
    code.append(check)
    if all(importlib.util.find_spec(package) for package in ("nbclient", "ipykernel")):
        _run_in_jupyter(code)
        return
    variables: dict[str, Any] = {}
    for number, source in enumerate(code, 1):
        exec(compile(source, f"{name}, code cell {number}", "exec"), variables)


def _assigned(source: str) -> list[ast.Name]:
    return [node.targets[0] for node in ast.parse(source).body if isinstance(node, ast.Assign)]  # type: ignore[misc]


def _run_in_jupyter(code: list[str]) -> None:
    """Raises CellExecutionError, which shows the cell and what it raised."""
    import nbformat.v4
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, code)))
    NotebookClient(
        notebook, kernel_name="python3", timeout=600, resources={"metadata": {"path": os.getcwd()}}
    ).execute()
    assert all(cell.execution_count for cell in notebook.cells)


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
    check = 'assert columns["trained"].colours.shape == (2, 8, 8, 3) and result.summary["step"] == 2'
    run_notebook("photographs_to_pca", check, PICTURES=str(labelled / "train/images"), **small)


def test_labels_become_a_table(labelled: Path) -> None:
    starts = {"BACKBONE": "resnet10_tiny", "INIT": "random", "PRETRAINING": PRETRAINING}
    detector = [*SMALL, "--train.steps=2", "--shares=1", "--seeds=1", "--compare.leaks=exact"]
    check = 'assert {row["start"] for row in rows} == {"random", "unlabelled"} and detector.classes == ["square"]'
    run_notebook("labels_to_compare", check, DETECTOR=detector, **starts)


def test_a_cell_that_fails_fails_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = ["PICTURES = 3", "assert PICTURES == 4, 'the check'"]
    monkeypatch.setattr(sys.modules[__name__], "cells", lambda _: [{"cell_type": "code", "source": code[:1]}])
    with pytest.raises(Exception, match=r"the check|AssertionError"):
        run_notebook("any", code[1], PICTURES=3)


@pytest.mark.parametrize("name", ["photographs_to_pca", "labels_to_compare"])
def test_notebooks_hold_no_output(name: str) -> None:
    for cell in cells(name):
        assert not cell.get("outputs") and cell.get("execution_count") is None
