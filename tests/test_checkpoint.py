"""Checkpoints: what is written comes back, what is damaged is never used, and no crash loses the last good one."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import subprocess
import sys
import warnings
from collections import OrderedDict, defaultdict
from fractions import Fraction
from pathlib import Path

import crash_saves
import numpy as np
import pytest
import torch

from scrl_fast import atomic_files
from scrl_fast.run.checkpoint import (
    CHECKPOINT_KEYS,
    CheckpointError,
    CheckpointManager,
    CheckpointWriteError,
    find,
    load,
)


def make_state(step: int = 1) -> dict:
    generator = torch.Generator().manual_seed(step)
    weights = OrderedDict(weight=torch.randn(64, 64, generator=generator), steps=torch.tensor(step))
    return {
        "model": {"online": weights, "target": OrderedDict(weight=torch.randn(3, generator=generator).bfloat16())},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "step": step,
        "epoch": 0,
        "config": "train:\n  seed: 3\n",
        "rng": {"torch": torch.get_rng_state(), "python": random.Random(step).getstate()},
        "loader": {"next_batch": 7, "shape": torch.Size([2, 3])},
        "version": "0.1.0",
    }


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


@pytest.fixture
def manager(tmp_path: Path) -> CheckpointManager:
    return CheckpointManager(tmp_path / "checkpoints", keep=2)


def names(manager: CheckpointManager) -> list[str]:
    return sorted(path.name for path in manager.folder.iterdir() if path.suffix == ".pt")


def test_everything_comes_back(manager):
    state = make_state(3)
    path = manager.save(state, 3)
    assert path.name == "step_00000003.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(load(path, expect=CHECKPOINT_KEYS), state)
        assert_same(torch.load(manager.folder / "last.pt", weights_only=True), state)


def test_last_and_best_and_how_many_stay(manager):
    manager.save(make_state(1), 1, best=True)
    for step in (2, 3, 4):
        manager.save(make_state(step), step)
    assert names(manager) == ["best.pt", "last.pt", "step_00000003.pt", "step_00000004.pt"]
    assert load(manager.folder / "best.pt")["step"] == 1
    assert load(manager.folder / "last.pt")["step"] == 4
    assert os.path.samefile(manager.folder / "last.pt", manager.folder / "step_00000004.pt")
    sidecars = {path.name for path in manager.folder.iterdir()} - set(names(manager))
    assert sidecars == {f"{name}.sha256" for name in names(manager)}, "a checksum each and nothing else"


def test_checksums_are_those_of_sha256sum(manager):
    manager.save(make_state(1), 1, best=True)
    for name in names(manager):
        subprocess.run(["sha256sum", "--check", "--status", f"{name}.sha256"], cwd=manager.folder, check=True)


def test_the_same_step_may_be_written_again(manager):
    manager.save(make_state(1), 1, best=True)
    manager.save({**make_state(1), "epoch": 9}, 1, best=True)
    assert {load(manager.folder / name)["epoch"] for name in names(manager)} == {9}
    assert not list(manager.folder.glob(".*"))


def test_copies_where_there_are_no_hard_links(manager, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    manager.save(make_state(1), 1, best=True)
    assert not os.path.samefile(manager.folder / "last.pt", manager.folder / "step_00000001.pt")
    assert load(manager.folder / "best.pt", expect=CHECKPOINT_KEYS)["step"] == 1


def test_moved_run_folder_still_loads(manager, tmp_path):
    manager.save(make_state(1), 1, best=True)
    manager.folder.parent.joinpath("run").mkdir()
    moved = shutil.move(manager.folder, tmp_path / "run" / "checkpoints")
    assert load(tmp_path / "run")["step"] == 1
    assert load(Path(moved) / "best.pt")["step"] == 1


def test_newest_good_of_nothing(manager):
    assert manager.newest_good() is None
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*nowhere"):
        manager.folder.joinpath("nowhere").mkdir(parents=True)
        find(manager.folder / "nowhere")


def damage_bit(path: Path, seed: int) -> None:
    data = bytearray(path.read_bytes())
    place = random.Random(seed).randrange(len(data) * 8)
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)


def damage_truncate(path: Path, seed: int) -> None:
    os.truncate(path, random.Random(seed).randrange(path.stat().st_size))


def damage_garbage(path: Path, seed: int) -> None:
    path.write_bytes((b"", b"<html>404</html>", os.urandom(4096))[seed % 3])


@pytest.mark.parametrize(("damage", "times"), [(damage_bit, 200), (damage_truncate, 20), (damage_garbage, 3)])
def test_damage_is_noticed_and_the_one_before_is_used(manager, damage, times):
    manager.save(make_state(1), 1)
    newest = manager.save(make_state(2), 2)
    good = newest.read_bytes()
    for seed in range(times):
        damage(newest, seed)
        with pytest.warns(RuntimeWarning, match=r"step_00000002\.pt is damaged.*trying the one before"):
            assert manager.newest_good() == manager.folder / "step_00000001.pt"
        with pytest.raises(CheckpointError, match=r"step_00000002\.pt"):
            load(newest)
        newest.write_bytes(good)
    assert manager.newest_good() == newest


@pytest.mark.parametrize("damage", [damage_bit, damage_truncate, damage_garbage])
def test_damage_without_a_checksum_file(manager, damage):
    manager.save(make_state(1), 1)
    newest = manager.save(make_state(2), 2)
    for sidecar in manager.folder.glob("*.sha256"):
        sidecar.unlink()
    with pytest.warns(RuntimeWarning, match="no .sha256 beside it"):
        assert manager.newest_good() == newest
    damage(newest, 17)
    with pytest.warns(RuntimeWarning) as seen:
        assert manager.newest_good() == manager.folder / "step_00000001.pt"
    assert any("step_00000002.pt" in str(warning.message) and "trying" in str(warning.message) for warning in seen)


def test_all_damaged_is_an_error_not_a_new_start(manager):
    for step in (1, 2):
        damage_truncate(manager.save(make_state(step), step, best=step == 1), 0)
    with pytest.warns(RuntimeWarning), pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        manager.newest_good()


def test_best_is_the_last_resort(manager):
    manager.save(make_state(1), 1, best=True)
    for step in (2, 3):
        damage_truncate(manager.save(make_state(step), step), 0)
    with pytest.warns(RuntimeWarning):
        assert manager.newest_good() == manager.folder / "best.pt"


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("writer", [torch.save, lambda value, path: Path(path).write_bytes(pickle.dumps(value))])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_foreign_file_runs_no_code(tmp_path, writer):
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    writer({"model": Evil(marker)}, path)
    with pytest.raises(CheckpointError, match=r"cannot load .*evil\.pt"):
        load(path)
    assert not marker.exists()


def test_messages_name_the_file_and_the_reason(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*none\.pt"):
        load(tmp_path / "none.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"list\.pt: it holds a list, not a dict"):
        load(tmp_path / "list.pt")
    torch.save({"model": {}, "state_dict": {}}, tmp_path / "other.pt")
    assert load(tmp_path / "other.pt") == {"model": {}, "state_dict": {}}
    with (
        pytest.warns(RuntimeWarning, match="sha256"),
        pytest.raises(CheckpointError, match=r"other\.pt is no training checkpoint of scrl_fast: it lacks optimizer"),
    ):
        load(tmp_path / "other.pt", expect=CHECKPOINT_KEYS)
    torch.save({"a": defaultdict(list), "b": Path("x"), "c": Fraction(1, 2)}, tmp_path / "objects.pt")
    with pytest.raises(CheckpointError, match=r"objects\.pt: it holds objects other than .*: fractions\.Fraction"):
        load(tmp_path / "objects.pt")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.zeros(2), "numpy.ndarray"),
        (np.float64(1.0), "numpy.float64"),
        (np.random.RandomState(0).get_state(), "numpy.ndarray"),
        (Path("x"), r"pathlib\.[\w.]*Path"),
        (defaultdict(int), "collections.defaultdict"),
        ({Path("x"): 1}, r"pathlib\.[\w.]*Path"),
    ],
)
def test_what_would_not_load_again_is_refused_before_writing(manager, value, kind):
    with pytest.raises(TypeError, match=rf"state\['loader'\].* is a {kind}"):
        manager.save({"model": {}, "loader": value}, 1)
    assert not manager.folder.exists()


def test_wrong_arguments(tmp_path, manager):
    with pytest.raises(ValueError, match="keep=1 checkpoints: at least 2"):
        CheckpointManager(tmp_path, keep=1)
    with pytest.raises(ValueError, match="step=-1"):
        manager.save(make_state(), -1)


@pytest.fixture(scope="module")
def crashes(tmp_path_factory):
    """(folder, what was printed) of a process whose children are killed while saving, and which finds the disk full."""
    folder = tmp_path_factory.mktemp("crashes")
    command = [sys.executable, crash_saves.__file__, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done.stdout


def test_kill_at_any_moment_loses_at_most_the_step_being_written(crashes):
    """What each kill left is looked at in between, by crash_saves.py."""
    manager = CheckpointManager(crashes[0] / "killed")
    assert load(manager.newest_good(), expect=["step"])["step"] >= crash_saves.KILLS


def test_full_disk_leaves_the_old_files_and_says_so(crashes):
    manager, said = CheckpointManager(crashes[0] / "full"), crashes[1]
    assert "step_00000002.pt: File too large (disk full? " in said
    assert "about 4000000 needed" in said and "checkpoints before it are untouched" in said
    assert names(manager) == ["last.pt", "step_00000001.pt"]
    assert not list(manager.folder.glob(".*")), "the unfinished file is gone"
    assert manager.newest_good() == manager.folder / "step_00000001.pt"


def test_a_folder_that_cannot_be_made(tmp_path):
    tmp_path.joinpath("file").write_text("in the way")
    with pytest.raises(CheckpointWriteError, match=r"cannot write .*step_00000001\.pt"):
        CheckpointManager(tmp_path / "file").save(make_state(), 1)


def test_write_text_replaces_at_once(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    atomic_files.write_text(path, "old\n")

    def fail(*_):
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        atomic_files.write_text(path, "new\n")
    assert path.read_text() == "old\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)])
def test_what_is_no_file_is_named_and_passed_over(tmp_path, make):
    manager = CheckpointManager(tmp_path)
    good = manager.save({"step": 1}, step=1)
    make(tmp_path / "step_00000002.pt")
    with pytest.warns(RuntimeWarning, match=r"step_00000002\.pt.*; trying the one before"):
        assert manager.newest_good().samefile(good)
    for step in (3, 4, 5):  # it is in nobody's way
        manager.save({"step": step}, step=step)
    assert manager.newest_good() == tmp_path / "step_00000005.pt"


def test_a_pipe_named_as_the_checksum_is_none(tmp_path):
    (tmp_path / "x.pt").touch()
    os.mkfifo(tmp_path / "x.pt.sha256")
    assert atomic_files.expected_digest(tmp_path / "x.pt") is None
