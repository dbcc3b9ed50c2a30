"""``precision=auto``: what it takes on which processor, that the choice is written down, and that a run keeps it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny_trainer import Pictures, make_config
from tiny_transfer import transfer
from torchvision.models.detection.anchor_utils import AnchorGenerator

from scrl_fast import info
from scrl_fast.distributed.world import World
from scrl_fast.models import projection_head
from scrl_fast.run import checkpoint, precision
from scrl_fast.run.metrics_file import read_metrics
from scrl_fast.run.precision import CpuBf16, Precision, judge_cpu, processor_flags
from scrl_fast.trainer import SCRLTrainer
from scrl_fast.transfer import build_detector

pytestmark = pytest.mark.usefixtures("no_curves")
ZEN4, AMX = {"avx512_bf16"}, {"avx512_bf16", "amx_bf16"}
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def processor(monkeypatch):
    """``processor(True)``: from here on the processor multiplies bf16; with False it emulates it."""

    def become(native: bool) -> None:
        monkeypatch.setattr(precision, "cpu_bf16", lambda: CpuBf16(native, "for the test"))

    return become


# ---- the decision ----


@pytest.mark.parametrize(
    ("flags", "environment", "aten", "native", "why"),
    [
        (ZEN4, {}, "AVX512", True, "avx512_bf16"),
        (AMX, {}, "AVX512", True, "amx_bf16 and avx512_bf16"),
        (set(), {}, "AVX512", False, "neither AMX nor AVX512_BF16"),
        (set(), {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "AVX2", False, "neither AMX nor AVX512_BF16"),
        (AMX, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "AVX512", True, "avx512_bf16"),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "ALL"}, "AVX512", True, "avx512_bf16"),
        (AMX, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, "AVX512", False, "ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI"),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "avx2"}, "AVX512", False, "ONEDNN_MAX_CPU_ISA=avx2 forces it off"),
        (ZEN4, {"DNNL_MAX_CPU_ISA": "SSE41"}, "AVX512", False, "DNNL_MAX_CPU_ISA=SSE41 forces it off"),
        (ZEN4, {"ATEN_CPU_CAPABILITY": "avx2"}, "AVX2", False, "ATEN_CPU_CAPABILITY=avx2 forces it off"),
        (ZEN4, {"ATEN_CPU_CAPABILITY": "default"}, "DEFAULT", False, "ATEN_CPU_CAPABILITY=default forces it off"),
        (ZEN4, {}, "AVX2", False, "PyTorch's kernels are those of AVX2"),
    ],
)
def test_a_processor_is_judged_by_its_capability_and_the_environment(flags, environment, aten, native, why):
    found = judge_cpu(flags, environment, aten=aten, onednn=True)
    assert found.native is native and why in found.why
    assert not judge_cpu(flags, environment, aten=aten, onednn=False).native


def test_capabilities_come_from_torch_and_else_from_cpuinfo(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": False}, raising=False)
    assert processor_flags(tmp_path / "none") == ZEN4
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert processor_flags(tmp_path / "none") == set()
    cores = "processor : {}\nflags\t\t: fpu avx512f {}\n\n"
    (tmp_path / "cpuinfo").write_text(cores.format(0, "amx_bf16 avx512_bf16") + cores.format(1, "avx512_bf16"))
    assert processor_flags(tmp_path / "cpuinfo") == ZEN4  # what every core has
    (tmp_path / "cpuinfo").write_text("Features : asimd bf16\n")
    assert processor_flags(tmp_path / "cpuinfo") == set()


@pytest.mark.parametrize(
    ("asked", "device", "native", "chosen", "told"),
    [
        ("auto", CPU, True, "bf16", False),
        ("auto", CPU, False, "fp32", False),
        ("auto", GPU, False, "bf16", False),
        ("fp32", CPU, True, "fp32", False),
        ("bf16", CPU, True, "bf16", False),
        ("bf16", CPU, False, "bf16", True),
        ("fp16", CPU, False, "fp16", False),
    ],
)
def test_auto_follows_device_and_processor(processor, asked, device, native, chosen, told):
    processor(native)
    found = Precision(asked, device, World())
    assert (found.chosen, bool(found.notes())) == (chosen, told)
    assert found.autocast == {"bf16": torch.bfloat16, "fp16": torch.float16}.get(chosen)


def test_one_processor_that_emulates_bf16_keeps_the_whole_run_in_fp32(processor):
    processor(True)
    world = SimpleNamespace(all_reduce_ints=lambda own: [own[0] + 1])  # the other process has none
    assert Precision("auto", CPU, world).chosen == "fp32"
    assert "another process" in Precision("bf16", CPU, world).notes()[0]


def test_info_says_what_auto_takes_and_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(precision, "processor_flags", lambda: ZEN4)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    assert info.collect()["device"]["precision_auto"] == "bf16 on the CPU: avx512_bf16"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    said = info.collect()["device"]["precision_auto"]
    assert said == "fp32 on the CPU, which emulates bf16: ONEDNN_MAX_CPU_ISA=AVX2 forces it off"


def test_heads_stay_in_float32_on_a_cpu():
    head, rows = projection_head(8, 16, 4), torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(rows.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, head(rows.bfloat16().float()), rtol=0, atol=0)


# ---- the run ----


def run(folder, *, resume="", asked="auto", **options):
    config = make_config(folder, **{"precision": asked, "epochs": 1, "threads": 1} | options)
    config.run.checkpoint_every, config.resume = 1, resume
    trainer = SCRLTrainer(config, source=Pictures(num_classes=3))
    trainer.fit()
    return trainer


def written(folder):
    """The precision in config.yaml and in the newest checkpoint."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    state = checkpoint.load(folder / "checkpoints" / "last.pt")
    return config["train"]["precision"], state["config"]["train"]["precision"]


def weights(trainer):
    return [tensor for part in trainer.model.state().values() if part for tensor in part.values()]


def test_the_choice_is_written_down(tmp_path, processor):
    for native, chosen in ((True, "bf16"), (False, "fp32")):
        processor(native)
        trainer = run(tmp_path / chosen, max_steps=1)
        assert written(tmp_path / chosen) == (chosen, chosen)
        assert trainer.config.train.precision == chosen
        assert f"on cpu in {chosen};" in (tmp_path / chosen / "log.txt").read_text()


@pytest.mark.parametrize(("first", "then", "kept"), [(True, False, "bf16"), (False, True, "fp32")])
def test_a_resumed_run_keeps_its_precision_on_another_machine(tmp_path, processor, first, then, kept):
    processor(first)
    whole = run(tmp_path / "whole")
    run(tmp_path / "part", max_steps=1)
    processor(then)
    rest = run(tmp_path / "part", resume="auto")
    assert written(tmp_path / "part") == (kept, kept)
    assert all(torch.equal(a, b) for a, b in zip(weights(rest), weights(whole), strict=True))
    said = (tmp_path / "part" / "log.txt").read_text()
    assert "options have changed" not in said
    line = "bf16 is only emulated on this processor (for the test), several times slower than --train.precision=fp32"
    assert said.count(line) == (kept == "bf16")


def test_a_precision_that_is_asked_for_wins_and_is_told(tmp_path, processor):
    processor(True)
    run(tmp_path, max_steps=1)
    run(tmp_path, resume="auto", asked="fp32", max_steps=2)
    assert written(tmp_path) == ("fp32", "fp32")
    assert "options have changed: train.precision bf16 -> fp32" in (tmp_path / "log.txt").read_text()


def test_a_checkpoint_from_before_the_choice_was_kept_goes_on_in_fp32(tmp_path, processor):
    processor(True)
    run(tmp_path, asked="fp32", max_steps=1)
    path = tmp_path / "checkpoints" / "step_00000001.pt"
    state = torch.load(path, weights_only=True)
    state["config"]["train"]["precision"] = "auto"  # as earlier releases wrote it
    checkpoint.CheckpointManager(path.parent).save(state, 1)
    run(tmp_path, resume="auto", max_steps=2)
    assert written(tmp_path) == ("fp32", "fp32")
    assert "options have changed" not in (tmp_path / "log.txt").read_text()


def test_bf16_forced_off_by_the_environment_goes_on_in_bf16_and_says_so(tmp_path, processor, monkeypatch):
    monkeypatch.setattr(precision, "processor_flags", lambda: ZEN4)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    run(tmp_path, max_steps=1)
    assert "emulated" not in (tmp_path / "log.txt").read_text()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    run(tmp_path, resume="auto", max_steps=2)
    assert written(tmp_path) == ("bf16", "bf16")
    said = "bf16 is only emulated on this processor (ONEDNN_MAX_CPU_ISA=AVX512_CORE forces it off)"
    assert said in (tmp_path / "log.txt").read_text()
    assert run(tmp_path / "new", max_steps=1).precision.chosen == "fp32"


def test_two_runs_in_bf16_are_bit_equal(tmp_path):
    first, second = (run(tmp_path / name, asked="bf16") for name in "ab")
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))
    rows = [[row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")] for name in "ab"]
    assert rows[0] == rows[1]


def test_bf16_learns_as_fp32_does(tmp_path):
    losses = []
    for asked in ("fp32", "bf16"):
        run(tmp_path / asked, asked=asked, epochs=4)
        losses.append([row["loss"] for row in read_metrics(tmp_path / asked / "metrics.jsonl")])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[0] != losses[1]


# ---- transfer ----


@pytest.mark.parametrize("name", ["faster_rcnn", "mask_rcnn", "keypoint_rcnn", "retinanet", "fcos"])
def test_boxes_of_a_detector_are_float32_under_autocast(name):
    torch.manual_seed(0)
    small = {"backbone": "resnet10_tiny", "short_side": 600, "long_side": 700, "fpn_channels": 32, "head_channels": 16}
    small |= {"mask_channels": 8, "keypoint_channels": 8, "score_threshold": 0.0, "detections": 20}
    network = build_detector(name, 3, keypoints=4, **small).eval()
    seen = []
    anchors = next(module for module in network.modules() if isinstance(module, AnchorGenerator))
    anchors.register_forward_hook(lambda _, args, found: seen.extend(found))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (found,) = network([torch.rand(3, 600, 700)])
    assert {each.dtype for each in seen} == {torch.float32}
    assert (seen[0] != seen[0].bfloat16()).any()  # such places as bf16 does not know
    boxes = found["boxes"]
    assert boxes.dtype == torch.float32 and len(boxes) and (boxes != boxes.bfloat16()).any()
    assert {found[part].dtype for part in found} <= {torch.float32, torch.int64}


def test_a_detector_keeps_its_precision_on_another_machine(data_root, tmp_path, processor):
    more = ("--run.checkpoint_every=1", "--eval.images=1")
    processor(True)
    transfer("detection", data_root, tmp_path, *more, "--train.steps=2", "--train.max_steps=1").fit()
    assert written(tmp_path) == ("bf16", "bf16")
    processor(False)
    rest = transfer("detection", data_root, tmp_path, *more, "--train.steps=2", "--resume=auto")
    rest.fit()
    assert rest.precision.autocast == torch.bfloat16 and written(tmp_path) == ("bf16", "bf16")
    said = (tmp_path / "log.txt").read_text()
    assert "bf16 is only emulated" in said and "options have changed" not in said
