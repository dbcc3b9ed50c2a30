"""fp32 or bf16: what ``precision=auto`` takes on this machine, and what a run that goes on keeps."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from scrl_fast.distributed.world import World

Options = TypeVar("Options", bound=Any)
NATIVE_FLAGS = ("amx_bf16", "avx512_bf16")
"""Extensions of the instruction set that multiply bf16, as Linux and PyTorch name them."""
NARROW_ONEDNN = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
"""Values of ONEDNN_MAX_CPU_ISA that leave those extensions out."""
NARROW_ATEN = ("DEFAULT", "NO AVX", "AVX2")
"""Capabilities of PyTorch's own kernels below AVX-512."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class CpuBf16(NamedTuple):
    """native: the processor multiplies bf16 here. why: by what, or why not."""

    native: bool
    why: str


def cpu_bf16() -> CpuBf16:
    """Whether bf16 is multiplied by this processor or emulated by PyTorch: a question of capability, not of speed."""
    return judge_cpu(
        processor_flags(),
        os.environ,
        aten=torch.backends.cpu.get_cpu_capability(),
        onednn=torch.backends.mkldnn.is_available(),
    )


def judge_cpu(flags: Collection[str], environment: Mapping[str, str], *, aten: str, onednn: bool) -> CpuBf16:
    """`cpu_bf16` of any machine.

    flags: those of `NATIVE_FLAGS` that the processor has. aten: the capability of PyTorch's own kernels.
    onednn: PyTorch was built with it; its other convolutions emulate bf16.
    """
    found = [flag for flag in NATIVE_FLAGS if flag in flags]
    if not found:
        return CpuBf16(False, "the processor has neither AMX nor AVX512_BF16")
    if not onednn:
        return CpuBf16(False, "this PyTorch has no oneDNN")
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        if environment.get(name, "").upper() in NARROW_ONEDNN:
            return CpuBf16(False, f"{name}={environment[name]} forces it off")
    if aten in NARROW_ATEN:
        asked = environment.get("ATEN_CPU_CAPABILITY")
        why = f"ATEN_CPU_CAPABILITY={asked} forces it off" if asked else f"PyTorch's kernels are those of {aten}"
        return CpuBf16(False, why)
    return CpuBf16(True, " and ".join(found))


def processor_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Those of `NATIVE_FLAGS` that the processor has. cpuinfo: read where PyTorch does not tell."""
    if capabilities := getattr(torch.cpu, "get_capabilities", None):  # not in the first releases that we support
        return {flag for flag in NATIVE_FLAGS if capabilities().get(flag)}
    try:
        text = cpuinfo.read_text()
    except OSError:
        return set()
    cores = [line.split() for line in text.splitlines() if line.startswith("flags")]
    return set(NATIVE_FLAGS).intersection(*cores) if cores else set()


class Precision:
    """Of one run: chosen when it starts, kept when it goes on.

    asked: the option, fp32, bf16 or fp16, or auto: bf16 on a GPU and where the processors of all processes multiply
    bf16, else fp32.
    """

    def __init__(self, asked: str, device: torch.device, world: World) -> None:
        self.asked, self.on_gpu = asked, device.type == "cuda"
        self.emulates = not self.on_gpu and bool(world.all_reduce_ints([int(not cpu_bf16().native)])[0])
        self.chosen = asked if asked != "auto" else "fp32" if self.emulates else "bf16"

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of autocast, None for float32."""
        return DTYPES.get(self.chosen)

    @property
    def bf16(self) -> bool:
        """Whether the networks run under bf16 autocast."""
        return self.chosen == "bf16"

    def noted_in(self, config: Options) -> Options:
        """The options of the run with the precision that was chosen."""
        return replace(config, train=replace(config.train, precision=self.chosen))

    def resume(self, config: Options, saved: Mapping[str, Any]) -> Options:
        """`noted_in` where the run goes on: in the precision of the checkpoint, if the option is auto.

        saved: the options in the checkpoint.
        """
        if self.asked == "auto":
            self.chosen = self.settled(saved)["train"]["precision"]
        return self.noted_in(config)

    def settled(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a checkpoint with the precision that they mean.

        Earlier releases kept ``auto``, which was bf16 on a GPU and fp32 elsewhere.
        """
        train = dict(saved.get("train", {}))
        if train.setdefault("precision", "auto") == "auto":
            train["precision"] = "bf16" if self.on_gpu else "fp32"
        return {**saved, "train": train}

    def notes(self) -> list[str]:
        """A line for the log where bf16 is emulated."""
        if not self.bf16 or not self.emulates:
            return []
        why = cpu_bf16()
        where = "the processor of another process" if why.native else f"this processor ({why.why})"
        return [f"bf16 is only emulated on {where}, several times slower than --train.precision=fp32"]
