"""Checkpoints that a run does not go on from, and images that are not those of the checkpoint."""

from __future__ import annotations

import pytest
import torch
from tiny_trainer import Pictures, make_config

from scrl_fast.errors import UsageError
from scrl_fast.trainer import SCRLTrainer

pytestmark = pytest.mark.usefixtures("no_curves")


def run(folder, *, resume="", **options):
    config = make_config(folder, **({"epochs": 3} | options))
    config.run.checkpoint_every, config.resume = 2, resume
    trainer = SCRLTrainer(config, source=Pictures(num_classes=3))
    trainer.fit()
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


def resaved(folder, change):
    """The path of a checkpoint of a finished run, outside its folder, after change(state)."""
    state = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    change(state)
    torch.save(state, folder / "changed.pt")
    return str(folder / "changed.pt")


def set_at(place, value):
    """Replaces what lies at a place such as ``loader/epoch``."""

    def change(state):
        *way, last = place.split("/")
        for key in way:
            state = state[int(key) if key.isdecimal() else key]
        state[last] = value

    return change


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("step", -1, "step"),
        ("step", 3.0, "step"),
        ("step", float("nan"), "step"),
        ("step", True, "step"),
        ("step", 2**60, "step"),
        ("epoch", "1", "epoch"),
        ("config", [], "config"),
        ("config/train", {}, "config"),
        ("config/train/batch_size", "many", "config"),
        ("model/online", None, "online"),
        ("model/online", {}, "online"),
        ("optimizer/state", {}, "optimizer"),
        ("optimizer/state/0/momentum_buffer", torch.zeros(3), "optimizer"),
        ("optimizer/state/0/momentum_buffer", "x", "optimizer"),
        ("optimizer/param_groups", [], "optimizer"),
        ("rng/torch", torch.zeros(3, dtype=torch.uint8), "rng"),
        ("rng/torch", torch.zeros(5056), "rng"),
        ("rng", {}, "rng"),
        ("loader/processes", 3, "loader"),
        ("loader/processes", [[]], "loader"),
        ("loader/world_size", 0, "loader"),
        ("log", [], "log"),
        ("log/pending", [["x"]], "log"),
        ("log/pending", [[1.0]], "log"),
        ("log/best", None, "log"),
    ],
)
def test_a_checkpoint_with_a_part_that_no_run_wrote_is_refused_by_name(tmp_path, whole, place, value, said):
    with pytest.raises(UsageError, match=said) as refused:
        run(tmp_path, resume=resaved(whole.folder, set_at(place, value)))
    assert "changed.pt" in str(refused.value) or "config" in said
    assert not list(tmp_path.glob("checkpoints/*"))


def test_an_older_file_under_the_newest_name_is_not_taken_silently(tmp_path, whole):
    run(tmp_path, max_steps=4)
    old, new = (tmp_path / "checkpoints" / f"step_0000000{step}.pt" for step in (2, 4))
    new.unlink()
    new.write_bytes(old.read_bytes())
    (tmp_path / "checkpoints" / "step_00000004.pt.sha256").unlink()
    with pytest.raises(UsageError, match=r"step_00000004\.pt holds step 2, not what its name says"):
        run(tmp_path, resume="auto")


def test_other_images_are_told_like_changed_options(tmp_path):
    config = make_config(tmp_path, max_steps=2)
    SCRLTrainer(config, source=Pictures()).fit()
    more, renamed = Pictures(16), Pictures()
    renamed.name_of = lambda index: f"{index}.jpg"
    for source, said in ((renamed, "12 images with other names"), (more, "16 images, the checkpoint was made with 12")):
        config.resume, config.train.max_steps = "auto", config.train.max_steps + 1
        SCRLTrainer(config, source=source).fit()
        log = (tmp_path / "log.txt").read_text()
        assert log.count(f"not the same data any more: {said}") == 1
    config.train.max_steps += 1
    SCRLTrainer(config, source=more).fit()
    assert (tmp_path / "log.txt").read_text().count("not the same data") == 2
