"""Every CUDA source compiles for A100, H100 and B200 within register and spill limits. Needs nvcc, no GPU."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from aot import tool
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.parent
SOURCES = sorted(ROOT.glob("csrc/cuda/*.cu"))
CAPABILITIES = ("80", "90", "100")
# Registers a thread. At 256 threads a block, 80 leave three blocks on a multiprocessor and 128 two.
REGISTERS = {"ema_update": 48, "lars_step": 80, "roi_align": 128}
REGISTERS_ELSEWHERE = 128
SPILLED_BYTES = {"lars_step": 16}  # stored + loaded: the norms of float64 parameters on an H100; everything else none
WHOLE_PACKS = (
    r"(4pool|11pool_staged|13pool_backward)I.+Li[48]EEE|9pool_tileI.+Li[48]ELb0E|18pool_tile_backwardI.+Li[48]E"
)
"""RoIAlign's kernels whose lanes write packs of 4 or 8 numbers, as the compiler mangles their names."""
KERNEL = re.compile(
    r"Compiling entry function '(?P<kernel>\S+)' for 'sm_(?P<capability>\d+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@functools.cache
def compiler() -> str:
    """nvcc with its headers beside it, or "". What is on PATH may be a wrapper script, which is asked for its TOP."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), cpp_extension.CUDA_HOME]
    if found := shutil.which("nvcc"):
        said = subprocess.run([found, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = re.search(r"TOP=(\S+)", said.stdout + said.stderr)
        roots.append(top and os.path.realpath(top[1]))
    for root in map(Path, filter(None, roots)):
        if (root / "bin/nvcc").exists() and (root / "include/cuda_runtime.h").exists():
            return str(root / "bin/nvcc")
    return ""


def compile_for_all(source: Path, folder: Path) -> str:
    """What ptxas said of the source's kernels."""
    known = subprocess.run([compiler(), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    capabilities = [capability for capability in CAPABILITIES if f"sm_{capability}\n" in known]
    includes = [f"-I{ROOT / 'csrc'}", *(f"--system-include={path}" for path in cpp_extension.include_paths())]
    done = subprocess.run(
        [compiler(), "-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
        + ["--expt-relaxed-constexpr", "-Xptxas=-v", "-fatbin", "--threads=2", *includes]
        + [f"-gencode=arch=compute_{c},code=sm_{c}" for c in capabilities]
        + [str(source), "-o", str(folder / "out.fatbin")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{source.name} does not compile:\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def machine_code(fatbin: Path) -> dict[str, str]:
    """The machine code of every kernel for an H100, by mangled name; empty where Triton's disassembler is missing."""
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        return {}
    path = {"PATH": os.pathsep.join((str(nvdisasm.parent), os.environ["PATH"]))}
    done = subprocess.run(
        [cuobjdump, "-sass", "-arch", "sm_90", fatbin],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | path,
    )
    kernels = (part.partition("\n") for part in done.stdout.split("Function : ")[1:])
    return {name.strip(): code for name, _, code in kernels}


@pytest.mark.skipif(not compiler(), reason="no nvcc with headers (set CUDA_HOME)")
@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch's headers lack CUDA")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles_within_limits(source: Path, tmp_path: Path) -> None:
    kernels = [match.groupdict() for match in KERNEL.finditer(compile_for_all(source, tmp_path))]
    assert kernels, f"{source.name} holds no kernel, or ptxas speaks another language"
    limit = REGISTERS.get(source.stem, REGISTERS_ELSEWHERE)
    for kernel in kernels:
        case = f"{source.name}: {kernel['kernel']} on sm_{kernel['capability']}"
        spilled = int(kernel["stores"]) + int(kernel["loads"])
        assert spilled <= SPILLED_BYTES.get(source.stem, 0), f"{case} spills {spilled} bytes"
        assert int(kernel["registers"]) <= limit, f"{case} uses {kernel['registers']} registers, more than {limit}"
    if source.stem == "roi_align" and (code := machine_code(tmp_path / "out.fatbin")):
        in_packs = {name: each for name, each in code.items() if re.search(WHOLE_PACKS, name)}
        assert len(in_packs) == 3 * 6  # dtypes, kernels
        for name, each in in_packs.items():
            assert "STG.E.128" in each, f"{name} stores its packs of 16 bytes in parts"
            narrow = set(re.findall(r"STG\.E(?!\.128)\S*", each))
            assert "pool_staged" not in name or not narrow, f"{name} stores single numbers: {narrow}"
