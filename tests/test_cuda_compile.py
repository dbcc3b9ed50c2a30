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
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.parent
SOURCES = sorted(ROOT.glob("csrc/cuda/*.cu"))
CAPABILITIES = ("80", "90", "100")
# Registers a thread. At 256 threads a block, 80 leave three blocks on a multiprocessor and 128 two.
REGISTERS = {"ema_update": 48, "lars_step": 80, "roi_align": 112}
REGISTERS_ELSEWHERE = 128
SPILLED_BYTES = {"lars_step": 16}  # stored + loaded: the norms of float64 parameters on an H100; everything else none
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
