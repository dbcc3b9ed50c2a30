"""Run folders and checkpoints of an earlier release resume and load; see ``kept_runs/README.md``."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from tiny_data import write_coco

from scrl_fast import train, weights
from scrl_fast.config.schema import Config
from scrl_fast.transfer.__main__ import main as transfer_main
from scrl_fast.transfer.__main__ import parse as parse_transfer

PRETRAINING_LOSSES = {3: 1.20294, 4: 0.96193, 5: 0.99788, 6: 0.96040}
TRANSFER_LOSSES = {3: 2.20281, 4: 2.13864, 5: 2.03998, 6: 1.92237}
RENAMED = {"rpn_loss_knee": ("rpn_smooth_l1_beta", 0.1), "box_loss_knee": ("box_smooth_l1_beta", 0.5)}
pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """``kept("transfer")`` unpacks a run folder into the working directory, as its config names it."""
    monkeypatch.chdir(tmp_path)

    def unpack(name: str) -> Path:
        with tarfile.open(Path(__file__).parent / "kept_runs" / f"{name}.tar.xz") as archive:
            archive.extractall(tmp_path, filter="data")
        return Path(name)

    return unpack


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def assert_resumed(folder: Path, expected: dict[int, float], tolerance: float) -> None:
    """The later steps' losses are those that the release itself wrote, and no option counts as changed."""
    found = losses(folder)
    assert sorted(found) == [1, 2, *expected]
    assert {step: found[step] for step in expected} == pytest.approx(expected, rel=tolerance)
    log = (folder / "log.txt").read_text()
    assert "at step 2" in log and "have changed" not in log and "damaged" not in log


def test_a_pretraining_run_resumes_by_its_folder(kept):
    folder = kept("pretraining")
    assert train.main([f"--run.dir={folder}", "--resume=auto", "--train.max_steps=0"]) == 0
    assert_resumed(folder, PRETRAINING_LOSSES, 2e-3)


def test_a_pretraining_run_resumes_by_its_config(kept):
    folder = kept("pretraining")
    assert train.main([f"--config={folder}/config.yaml", "--resume=auto", "--train.max_steps=4"]) == 0
    assert_resumed(folder, {step: PRETRAINING_LOSSES[step] for step in (3, 4)}, 2e-3)


def test_a_pretraining_run_resumes_by_its_checkpoint_alone(kept):
    """The options come from the checkpoint where the folder has no config."""
    folder = kept("pretraining")
    (folder / "config.yaml").unlink()
    checkpoint = folder / "checkpoints/step_00000002.pt"
    assert train.main([f"--resume={checkpoint}", "--train.max_steps=3"]) == 0
    assert_resumed(folder, {3: PRETRAINING_LOSSES[3]}, 2e-3)


def test_a_transfer_run_resumes(kept):
    folder = kept("transfer")
    write_coco(Path("data"), "train2017", images=9)
    write_coco(Path("data"), "val2017", images=3, seed=1)
    assert transfer_main(["detection", f"--config={folder}/config.yaml", "--resume=auto", "--train.max_steps=0"]) == 0
    assert_resumed(folder, TRANSFER_LOSSES, 2e-2)  # a detector samples by the order of its scores


@pytest.mark.parametrize("branch, mean, part", [("online", 0.00041, (2, 0.026324)), ("target", 0.00066, (0, 0.042093))])
def test_the_encoder_loads(kept, branch, mean, part):
    checkpoint = kept("pretraining") / "checkpoints/step_00000002.pt"
    encoder = weights.load_encoder(checkpoint, branch=branch)
    ramp = torch.linspace(-1, 1, 3 * 24 * 24).reshape(1, 3, 24, 24)
    with torch.no_grad():
        features = encoder(ramp)
    assert features.mean().item() == pytest.approx(mean, rel=2e-2)
    assert features[0, part[0]].item() == pytest.approx(part[1], rel=1e-3)


def test_the_options_of_a_pretraining_run_are_read(kept):
    config = Config.from_yaml(kept("pretraining") / "config.yaml")
    assert (config.model.projection_dim, config.boxes.min_size, config.train.max_steps) == (4, 8, 2)


def test_options_are_read_under_their_old_names(kept):
    """A config file and a command line of that release set what has another name today."""
    folder = kept("transfer")
    from_file = parse_transfer(["detection", f"--config={folder}/config.yaml"]).model
    flags = [f"--model.{old}={value}" for old, (_, value) in RENAMED.items()]
    from_flags = parse_transfer(["detection", "--data.root=data", *flags]).model
    for old, (new, value) in RENAMED.items():
        name = new if hasattr(from_file, new) else old
        assert getattr(from_file, name) == getattr(from_flags, name) == value
