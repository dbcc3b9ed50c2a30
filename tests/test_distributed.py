"""Several processes are one process: statistics, loss, weights and metrics, with uneven and missing boxes."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import gloo_cases as cases
import pytest
import torch
import torch.distributed as dist
from torch import nn

from scrl_fast.distributed import rendezvous
from scrl_fast.distributed.sync_batch_norm import SyncBatchNorm, synchronize_batch_norm
from scrl_fast.distributed.world import World
from scrl_fast.run.metrics_file import read_metrics

pytestmark = pytest.mark.usefixtures("no_curves")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def gloo(tmp_path_factory):
    """(folder, results of each of the four processes); two of the cases run in pairs of them."""
    folder = tmp_path_factory.mktemp("gloo")
    command = [sys.executable, str(HERE / "gloo_cases.py"), str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, [torch.load(folder / f"results_{rank}.pt", weights_only=False) for rank in range(cases.SIZE)]


# ---- BatchNorm ----


@pytest.mark.parametrize("shape", cases.SHAPES)
@pytest.mark.parametrize("kind", cases.ROWS)
def test_batch_norm_over_processes_equals_the_full_batch(gloo, kind, shape):
    parts = [result["norm"][kind, shape] for result in gloo[1]]
    layer = cases.norm(shape)
    whole = cases.pass_through(layer, torch.cat(cases.batches(kind, shape)))
    for name in ("output", "gradient"):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), whole[name], rtol=1e-12, atol=1e-12)
    for name in ("0.weight", "0.bias"):
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name], rtol=1e-12, atol=1e-12)
    for part in parts:
        for name in ("0.running_mean", "0.running_var", "0.num_batches_tracked"):
            torch.testing.assert_close(part[name], whole[name], rtol=1e-12, atol=1e-12)


def test_batch_norm_is_the_same_compiled(gloo):
    parts = [result["compiled norm"] for result in gloo[1][:2]]
    rows = torch.cat(cases.batches("uneven", "channels last")[:2])
    whole = cases.pass_through(cases.norm("channels last"), rows)
    for name in ("output", "gradient"):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), whole[name], rtol=1e-12, atol=1e-12)
    for name in ("0.weight", "0.bias"):
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name], rtol=1e-12, atol=1e-12)
    for name in ("0.running_mean", "0.running_var", "0.num_batches_tracked"):
        torch.testing.assert_close(parts[1][name], whole[name], rtol=1e-12, atol=1e-12)


def test_plain_batch_norm_would_not(gloo):
    parts = cases.batches("even", "rows")
    alone = torch.cat([cases.pass_through(cases.norm("rows"), part)["output"] for part in parts])
    together = torch.cat([result["norm"]["even", "rows"]["output"] for result in gloo[1]])
    assert (alone - together).abs().max() > 1e-2


def test_batch_norm_of_no_rows_anywhere_changes_nothing(gloo):
    for result in gloo[1]:
        nothing = result["norm"]["nothing", "rows"]
        assert nothing["output"].shape == nothing["gradient"].shape == (0, 5)
        assert not nothing["0.weight"].any() and not nothing["0.running_mean"].any()
        assert nothing["0.num_batches_tracked"] == 0 and (nothing["0.running_var"] == 1).all()


def test_batch_norm_in_eval_mode_waits_for_nobody(gloo):
    part = cases.batches("uneven", "rows")[1]
    torch.testing.assert_close(gloo[1][1]["norm"]["eval"], cases.norm("rows").eval()(part), rtol=1e-12, atol=1e-12)


def test_norms_are_replaced_in_place_and_unknown_ones_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    names, weight = list(model.state_dict()), model[1].weight
    synchronize_batch_norm(model)
    assert isinstance(model[1], SyncBatchNorm)
    assert list(model.state_dict()) == names and model[1].weight is weight

    class Other(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match=r"norm of kind .*Other has no form for several processes"):
        synchronize_batch_norm(nn.Sequential(Other(3)))


def test_timms_norms_keep_their_activation():
    timm = pytest.importorskip("timm", reason="timm is an optional dependency")
    norm = timm.layers.BatchNormAct2d(3).eval()
    sync = synchronize_batch_norm(norm)
    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(sync(images), norm(images))
    assert sync(images).min() == 0


# ---- training ----


def same_weights(ours, theirs):
    for part, weights in theirs.items():
        for name, value in weights.items():
            torch.testing.assert_close(ours[part][name], value, rtol=1e-9, atol=1e-9, msg=f"{part} {name}")


def rows_of(folder):
    names = ("step", "epoch", "loss", "lr", "ema_momentum", "pairs_per_image", "probe_loss", "probe_accuracy")
    names += ("feature_std", "rankme")
    return [[row[name] for name in names] for row in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("processes", "case", "options"),
    [
        (2, "step", {}),
        (4, "step", {}),
        (2, "accumulated", {"batch_size": 4, "accumulate": 2}),
        (2, "compiled", {}),
    ],
    ids=["2", "4", "2, accumulated", "2, compiled"],
)
def test_processes_train_as_one_does(gloo, tmp_path, processes, case, options):
    """Six steps; in one a process has no boxes, in one nobody has any; some images have no label."""
    folder, results = gloo
    single = cases.train(tmp_path, World(), processes, **({"batch_size": 8} | options))
    for result in results[:processes]:
        same_weights(result[str(processes)][case]["model"], single["model"])
    theirs = rows_of(folder / (f"of{processes}" if case == "step" else case))
    assert len(theirs) == 6
    assert theirs[3][2] == 0 < theirs[1][2]
    for ours, row in zip(rows_of(tmp_path), theirs, strict=True):
        assert row == pytest.approx(ours, rel=1e-9)


def test_encoders_of_several_processes_are_compiled_once_and_cut_only_between_buckets(gloo):
    """Two graphs of the online one, whose gradients fill two buckets, and one of the target; none in later steps."""
    assert [result["2"]["compiled"]["graphs"] for result in gloo[1][:2]] == [3, 3]


def test_only_the_first_process_writes(gloo):
    for run in ("of2", "of4", "accumulated", "moved"):
        names = {path.name for path in (gloo[0] / run).iterdir()}
        assert {"config.yaml", "metrics.jsonl", "log.txt", "checkpoints"} <= names
        assert (gloo[0] / run / "log.txt").read_text().count("run folder") == 1


def test_a_run_moves_from_two_processes_to_one(gloo, tmp_path):
    whole = cases.trainer_of(tmp_path, World(), batch_size=8)
    whole.fit()
    moved = cases.trainer_of(gloo[0] / "moved", World(), batch_size=8, resume="auto")
    moved.fit()
    same_weights(moved.model.state(), whole.model.state())
    assert rows_of(gloo[0] / "moved") == [pytest.approx(row, rel=1e-9) for row in rows_of(tmp_path)]
    log = (gloo[0] / "moved" / "log.txt").read_text()
    assert "1 processes instead of 2: the same images" in log
    assert "not the same run" not in log


def test_each_process_goes_on_counting_bad_images_from_its_own(gloo, tmp_path):
    (first, again), (second, other) = (gloo[1][rank]["bad"] for rank in (2, 3))
    assert first == again != second == other and first["bad"][0] and second["bad"][0]
    path = gloo[0] / "bad" / "checkpoints" / "last.pt"
    assert torch.load(path, weights_only=True)["loader"]["processes"] == [first, second]
    alone = cases.trainer_of(tmp_path, World(), cases.SomeBad, batch_size=8, epochs=1, resume=str(path))
    alone.loop.restore()
    assert alone.loader.state_dict()["bad"] == {0: sorted({*first["bad"][0], *second["bad"][0]})}
    alone.fit()  # from the same file: nothing is counted twice, and nothing is left out
    assert alone.loader.state_dict()["bad"] == {0: sorted(f"picture {index}" for index in range(0, 24, 3))}


def test_another_global_batch_is_refused_on_resume(gloo):
    trainer = cases.trainer_of(gloo[0] / "of2", World(), batch_size=4, resume="auto")
    with pytest.raises(ValueError, match=r"train\.batch_size=4 x .* makes 4 images a step.* 4 x 1 x 2 = 8: .*--init"):
        trainer.fit()


def test_data_that_fail_in_one_process_end_all_with_a_checkpoint(gloo):
    folder, results = gloo
    assert results[3]["failing"] == "ValueError: the disk is gone"
    assert results[2]["failing"].startswith("PeerFailed: stopped because the data of another process failed")
    state = torch.load(folder / "failing" / "checkpoints" / "last.pt", weights_only=True)
    assert state["step"] == 2
    assert "the data failed; all 2 steps are saved" in (folder / "failing" / "log.txt").read_text()


def test_a_signal_to_one_process_that_waits_for_data_stops_all(gloo):
    folder, results = gloo
    assert results[3]["waiting"] == "SIGTERM after step 2"
    assert results[2]["waiting"] == "a signal to another process after step 2"
    assert torch.load(folder / "waiting" / "checkpoints" / "last.pt", weights_only=True)["step"] == 2


# ---- messages ----


def test_what_the_first_process_decides_and_refuses_reaches_all(gloo):
    for result in gloo[1]:
        messages = result["messages"]
        assert (messages["sums"], messages["first"]) == ([6, 4], 0)
        assert messages["refused"] == "all of them are damaged"


def test_rows_of_all_processes_come_in_order_as_many_from_each(gloo):
    for result in gloo[1]:
        rows, some, none = (result["messages"][name] for name in ("rows", "some rows", "no rows"))
        assert rows[:, 0].tolist() == [0, 3, 6, 9, 3, 6, 9, 6, 9, 9]
        assert some[:, 0].tolist() == [0, 3, 3, 6, 6, 9, 9]
        assert none.shape == (0, 3)


def test_devices_of_several_processes(monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert rendezvous.device_of("auto") == rendezvous.device_of("cuda") == torch.device("cuda:1")
    assert rendezvous.device_of("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="'cuda:0', one GPU for 2 processes"):
        rendezvous.device_of("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"finds 1 CUDA devices for process 1 of this machine: --nproc-per-node=1"):
        rendezvous.device_of("auto")


def test_the_gpu_of_a_single_process_has_a_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert rendezvous.device_of("auto") == rendezvous.device_of("cuda") == torch.device("cuda:1")
    assert rendezvous.device_of("cuda:0") == torch.device("cuda:0")


@pytest.mark.parametrize("several", [False, True])
def test_the_gpu_of_a_process_is_its_current_one_and_a_running_group_must_carry_both(monkeypatch, several):
    chosen, cuda = [], torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert rendezvous.join(torch.device("cpu")) == rendezvous.join(torch.device("cuda")) == World()
    assert rendezvous.join(cuda) == World() and chosen == [cuda]
    if several:
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_rank", lambda: 1)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        refused = [("nccl", "cuda:1", "cpu"), ("nccl", "cpu", "cpu"), ("cpu:gloo", "cuda:0", "cuda")]
        for backend, device, lacks in refused:
            monkeypatch.setattr(dist, "get_backend_config", lambda name=backend: str(dist.BackendConfig(name)))
            with pytest.raises(ValueError, match=f"carries nothing for {lacks}: begin with init_process_group"):
                rendezvous.join(torch.device(device))
        for backend in ("cpu:gloo,cuda:nccl", "gloo"):
            monkeypatch.setattr(dist, "get_backend_config", lambda name=backend: str(dist.BackendConfig(name)))
            assert rendezvous.join(cuda) == World(1, 2)


def test_the_others_wait_longer_than_any_process_for_its_data(gloo, monkeypatch):
    minutes = [rendezvous.exchange_timeout(60.0 * least).total_seconds() / 60 for least in (1, 5, 20)]
    assert minutes == [10, 10, 25]
    assert 300 < gloo[1][3]["longest"] < 600
    monkeypatch.setattr(rendezvous, "_store", dist.HashStore())
    monkeypatch.setattr(rendezvous, "NOTE_TIMEOUT", timedelta(milliseconds=1))
    said = str(
        rendezvous.to_peer_error(RuntimeError("gloo: Timed out waiting 600000ms for recv operation to complete"))
    )
    assert "has not answered for so long that it or its machine must hang" in said


def test_processes_of_an_attempt_find_each_other_whatever_dead_ones_left_in_the_store():
    """As after a failure on one of several machines, where torchrun's own count of restarts differs."""
    store, names = dist.HashStore(), []
    for rank in (1, 2):
        store.set(f"scrl_fast/process_{rank}", "one that died before anybody answered")
    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda rank: rendezvous._attempt(store, rank, 3), (0, 1, 2)))
        assert len(set(found)) == 1
        names += found[:1]
    assert names[0] != names[1]


def test_a_process_that_does_not_start_is_named(monkeypatch):
    monkeypatch.setattr(rendezvous, "STORE_TIMEOUT", timedelta(milliseconds=50))
    store = dist.HashStore()
    store.set("scrl_fast/process_1", "one that died")
    with pytest.raises(dist.DistStoreError, match="process 1 of 2 did not start"):
        rendezvous._attempt(store, 0, 2)
    with pytest.raises(dist.DistStoreError, match="process 0 of 2 did not start"):
        rendezvous._attempt(store, 1, 2)


def test_what_was_decided_before_a_restart_holds_after_it(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(rendezvous, "_open_store", lambda rank, size: store)
    assert rendezvous.get_or_set_in_store("run.dir", lambda: "runs/a b") == ("runs/a b", False)
    assert rendezvous.get_or_set_in_store("run.dir", lambda: "runs/c") == (
        "runs/c",
        False,
    )  # a second run of this process
    monkeypatch.setattr(rendezvous, "_ME", "the process that stands in for it after a restart")
    assert rendezvous.get_or_set_in_store("run.dir", lambda: "runs/d") == ("runs/c", True)


def test_the_command_to_resume_starts_as_many_again(monkeypatch):
    assert rendezvous.launcher() == "python"
    for name, value in {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert rendezvous.launcher() == "torchrun --nnodes=2 --nproc-per-node=4"
