"""What is refused, and that it is refused before a network is allocated; the folder of a run; the seeds of a step."""

from __future__ import annotations

import os
import platform
import resource
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from tiny_trainer import Pictures, make_config, make_trainer

from scrl_fast import build
from scrl_fast.distributed import rendezvous
from scrl_fast.distributed.world import World
from scrl_fast.models.encoders import Encoder
from scrl_fast.ops import backends
from scrl_fast.run import folder, numerics
from scrl_fast.trainer import SCRLTrainer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train.batch_size": 13}, r"train\.batch_size=13 .* 12: use --train\.batch_size=12 or less"),
        (
            {"train.accumulate": 4},
            r"train\.batch_size=4 x train\.accumulate=4 needs 16 .* has 12: .*batch_size=3 or less",
        ),
        ({"optim.momentum": 1.5}, r"optim\.momentum=1\.5"),  # though it was assigned, not given
        ({"views.scale": (0.9, 0.2)}, r"views\.scale=.*0\.9"),
        ({"optim.ema_momentum": 1.2}, r"optim\.ema_momentum=1\.2"),
        ({"train.epochs": 0}, r"train\.epochs=0"),
        ({"views.size": 7}, r"views\.size=7.*at least 8, the stride of resnet10_tiny"),
        ({"boxes.min_size": 32}, r"boxes\.min_size=32"),
        ({"boxes.per_image": 0}, r"boxes\.per_image=0"),
        ({"run.dir": "/dev/null/run"}, r"run\.dir .*/dev/null/run.* cannot be written"),
        ({"resume": "auto", "run.dir": ""}, r"resume=auto .* --run\.dir"),
        ({"resume": "/no/such.pt"}, r"resume=/no/such\.pt: there is no such checkpoint"),
        ({"init": "/no/such.pt"}, r"init=/no/such\.pt: there is no such checkpoint"),
        ({"train.device": "cuda:99"}, r"train\.device is 'cuda:99'"),
        ({"data.source": "folder"}, r"data\.source=folder needs --data\.root"),
    ],
)
def test_mistakes_are_named_before_a_network_is_allocated(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(build, "build_model", lambda *_: pytest.fail("a network was allocated"))
    config = make_config(tmp_path)
    for name, value in options.items():
        section, _, field = name.rpartition(".")
        setattr(getattr(config, section) if section else config, field, value)
    with pytest.raises(ValueError, match=message):
        SCRLTrainer(config, source=Pictures())


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    make_trainer(tmp_path)  # what failed before its first row was no run yet
    (tmp_path / "checkpoints" / "step_00000001.pt").touch()
    with pytest.raises(ValueError, match=r"already holds a run \(checkpoints\).*--run\.dir=NEW"):
        make_trainer(tmp_path)


def test_a_restart_by_torchrun_goes_on_only_from_what_its_job_has_saved(tmp_path, monkeypatch):
    store, attempts = dist.HashStore(), iter(range(9))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(rendezvous, "_open_store", lambda rank, size: store)
    (tmp_path / "checkpoints").mkdir()
    old, new = (tmp_path / "checkpoints" / f"step_0000000{step}.pt" for step in (3, 4))
    old.touch()

    def attempt(**options):
        monkeypatch.setattr(rendezvous, "_ME", f"process_{next(attempts)}")
        config = folder.place_run(replace(make_config(tmp_path), **options), World(), "x")
        return config.run.dir, config.resume, config.init

    for _ in range(2):  # what was refused is not a run of this job
        with pytest.raises(ValueError, match="already holds a run"):
            attempt()
    for _ in range(2):
        assert attempt(resume=str(old)) == (str(tmp_path), str(old), "")
    os.utime(old, ns=(0, 0))  # written anew under the same name
    assert attempt(resume=str(old)) == (str(tmp_path), "auto", "")
    new.touch()
    assert attempt(resume=str(old)) == (str(tmp_path), "auto", "")


def test_weights_that_are_gone_are_missed_only_where_a_run_begins(tmp_path):
    config = replace(make_config(tmp_path), resume="auto", init="/no/such.pt")
    with pytest.raises(ValueError, match=r"init=/no/such\.pt: there is no such"):
        folder.choose_folder(config, "demo-scrl")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000003.pt").touch()
    assert folder.choose_folder(config, "demo-scrl") == str(tmp_path)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_that_cannot_run_is_named_at_once(tmp_path, monkeypatch, backend):
    monkeypatch.setattr(build, "build_model", lambda *_: pytest.fail("a network was allocated"))
    monkeypatch.setenv("SCRL_FAST_BACKEND", backend)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backends.forget()
    with pytest.raises(ValueError, match=rf"SCRL_FAST_BACKEND: .*backend '{backend}'"):
        make_trainer(tmp_path)


def test_half_an_announcement_of_several_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2, but RANK.*torchrun --nproc-per-node=N -m scrl_fast.train"):
        make_trainer(tmp_path)


def test_without_a_name_the_run_goes_under_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folder.choose_folder(make_config(""), "demo-scrl").startswith("runs/demo-scrl-")
    config = make_config("")
    (tmp_path / "x" / "checkpoints").mkdir(parents=True)
    (tmp_path / "x" / "checkpoints" / "last.pt").touch()
    (tmp_path / "downloaded.pt").touch()
    config.resume = "x/checkpoints/last.pt"  # no options and no metrics beside it: a folder that a file was put in
    assert folder.choose_folder(config, "demo-scrl").startswith("runs/demo-scrl-")
    (tmp_path / "x" / "config.yaml").touch()
    for path in ("x", "x/checkpoints", "x/checkpoints/last.pt"):
        config.resume = path
        assert folder.choose_folder(config, "demo-scrl") == "x"
    config.resume = "downloaded.pt"
    assert folder.choose_folder(config, "demo-scrl").startswith("runs/demo-scrl-")


def test_every_step_and_process_has_a_seed_of_its_own():
    seeds = {numerics.step_seed(seed, step, rank) for seed in (0, 2**63 - 1) for step in range(50) for rank in range(4)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert numerics.step_seed(3, 4, 5) == numerics.step_seed(3, 4, 5)


def test_deterministic_runs_use_torchs_switch(tmp_path):
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    try:
        trainer = make_trainer(tmp_path, Pictures(num_classes=3), deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        stream = trainer.batches()
        trainer.train_step(next(stream))  # no operation of the step is refused
        stream.close()
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_large_tensors_get_memory_that_was_touched_before():
    assert numerics.keep_memory()

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(10_000_000)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert sum(faults() for _ in range(8)) < 0.7 * 8 * 9766  # of 9,766 pages each time, were they mapped anew


def test_missing_wandb_is_told_before_a_network_is_allocated(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "build_model", lambda *_: pytest.fail("a network was allocated"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = make_config(tmp_path)
    config.run.wandb = "project"
    with pytest.raises(ValueError, match=r"run\.wandb is 'project', but wandb is not installed: pip install wandb"):
        SCRLTrainer(config, source=Pictures())


def test_a_view_below_the_stride_of_an_encoder_of_timm_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(build.SCRL.__init__.__globals__, "build_encoder", deep_encoder)
    config = make_config(tmp_path)
    config.model.backbone, config.views.size, config.boxes.min_size = "timm:deep", 32, 4
    with pytest.raises(ValueError, match=r"views\.size=32: must be at least 64, the stride of timm:deep"):
        SCRLTrainer(config, source=Pictures())


def deep_encoder(name, size=None):
    return Encoder(name, torch.nn.Identity(), out_channels=4, stride=64)
