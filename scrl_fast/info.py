"""``python -m scrl_fast.info [--json]``: versions, device, and which implementation of each operation runs and why.

`collect()` returns the same as a dict; a run keeps it as env.json. Nothing raises: what cannot be found out is said.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scrl_fast.atomic_files import write_text
from scrl_fast.config.command_line import CommandParser
from scrl_fast.errors import friendly_errors

PACKAGES = ("torch", "torchvision", "triton", "numpy", "pillow", "timm", "torchcodec", "simplejpeg")
CPU_NUMBERS = (("family", "cpu family"), ("model", "model"))
"""How processor() names a line of Linux's /proc/cpuinfo."""
NUMERIC_VARIABLES = {
    "SCRL_FAST_BACKEND": "forces one implementation of every operation",
    "SCRL_FAST_JPEG": "forces a JPEG decoder",
    "TRITON_INTERPRET": "1: Triton kernels run interpreted, on the CPU",
    "TRITON_DEFAULT_FP_FUSION": "multiply-add fusion in other packages' Triton kernels; ours set it themselves",
    "NVIDIA_TF32_OVERRIDE": "0: no TF32 in cuBLAS and cuDNN",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1: TF32 in matrix products",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8 or :16:8 make cuBLAS deterministic",
    "ONEDNN_DEFAULT_FPMATH_MODE": "bf16 lets float32 convolutions on the CPU round",
    "ONEDNN_MAX_CPU_ISA": "limits the instruction set of oneDNN's convolutions and matrix products",
    "ATEN_CPU_CAPABILITY": "limits the instruction set of PyTorch's CPU kernels",
    "OMP_NUM_THREADS": "CPU threads; no result of ours depends on it",
    "CUDA_VISIBLE_DEVICES": "which GPUs are seen",
}


def collect() -> dict[str, Any]:
    """Everything printed, ready for JSON.

    versions: package -> version or None. scrl_fast: version, commit, folder. device: type, name, what there is of it.
    libraries: name -> {loaded, why}. operations: operation -> device -> {runs, why: {backend: reason}}; runs is None
    when SCRL_FAST_BACKEND forces one that cannot. build, decoders, variables, torch_settings: as their names say.
    """
    return {
        "versions": _said(_versions),
        "scrl_fast": _said(_package),
        "device": _said(_device),
        "libraries": _said(_libraries),
        "build": _said(_build),
        "operations": _said(_operations),
        "decoders": _said(_decoders),
        "torch_settings": _said(_torch_settings),
        "variables": {name: os.environ[name] for name in NUMERIC_VARIABLES if name in os.environ},
    }


def measured_on() -> dict[str, Any]:
    """What a figure needs beside it: processor or GPU, cores, threads, versions and commit."""
    device, versions, package = _said(_device), _said(_versions), _said(_package)
    kept = {name: device.get(name) for name in ("cpu", "cores", "threads", "gpus")}
    return kept | {"python": versions.get("python"), "torch": versions.get("torch"), "commit": package.get("commit")}


def write_environment(path: Path) -> None:
    """Writes what `collect` returns as JSON, at once and durably: a run's env.json."""
    write_text(path, json.dumps(collect(), indent=2, default=str) + "\n")


def _said(question: Callable[[], Any]) -> Any:
    """The answer, or why there is none: a broken package must not silence the rest."""
    try:
        return question()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    torch = _said(lambda: importlib.import_module("torch").__version__)  # with its build's suffix, +cpu or +cu132
    return found | ({"torch": torch} if isinstance(torch, str) else {})


def _package() -> dict[str, Any]:
    from scrl_fast._version import __version__

    folder = Path(__file__).parent
    return {"version": __version__, "commit": _commit(folder), "folder": str(folder)}


def _commit(folder: Path) -> str | None:
    """Of the working copy that runs, if it is one; else of the build."""
    if (folder.parent / ".git").exists():
        git = ["git", "-C", str(folder.parent), "describe", "--always", "--dirty"]
        try:
            return subprocess.run(git, capture_output=True, text=True, check=True, timeout=2).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass
    from scrl_fast.ops import _native

    return _native.build_info().get("commit")


def _device() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "precision_auto": _said(_precision),
        "cuda": torch.version.cuda,
        "gpus": [],
    }
    if not torch.cuda.is_available():
        return found | {"type": "cpu"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found["gpus"].append(
            {
                "name": gpu.name,
                "capability": f"{gpu.major}.{gpu.minor}",
                "memory_gib": round(gpu.total_memory / 2**30, 1),
            }
        )
    return found | {
        "type": "cuda",
        "driver": _said(_driver),
        "nccl": _said(lambda: ".".join(map(str, torch.cuda.nccl.version()))),
    }


def _precision() -> str:
    """What ``train.precision=auto`` takes here, and why."""
    import torch

    from scrl_fast.run.precision import cpu_bf16

    found = cpu_bf16()
    on_cpu = f"bf16 on the CPU: {found.why}" if found.native else f"fp32 on the CPU, which emulates bf16: {found.why}"
    return f"bf16 on a GPU; {on_cpu}" if torch.cuda.is_available() else on_cpu


def _driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, timeout=2).stdout.split("\n")[0]


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU by name, family and model: rented machines of different generations share a name."""
    try:
        lines = [line.split(":", 1) for line in cpuinfo.read_text(errors="replace").splitlines() if ":" in line]
        found = {name.strip(): value.strip() for name, value in reversed(lines)}  # of the first core
        numbers = [f"{name} {found[key]}" for name, key in CPU_NUMBERS if key in found]
        return ", ".join([found["model name"], *numbers])
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def _libraries() -> dict[str, dict[str, Any]]:
    from scrl_fast.ops import _native

    return {name: {"loaded": not (why := _native.load_failure(name)), "why": why} for name in _native.LIBRARIES}


def _build() -> dict[str, Any]:
    from scrl_fast.ops import _native

    return {**_native.build_info(), "gpu_architectures": _said(_gpu_architectures)}


def _gpu_architectures() -> list[str]:
    """What the _cuda library holds, asked from the file where cuobjdump is at hand, else as noted by the build."""
    from scrl_fast.ops import _native

    files = sorted(Path(__file__).parent.glob("_cuda.*"))
    if not files:
        return []
    found: list[str] = []
    if tool := _cuobjdump():
        for kind, pattern in (("--list-elf", r"sm_\d+\w?"), ("--list-ptx", r"sm_\d+\w?(?=\.ptx)")):
            listed = subprocess.run([tool, kind, files[0]], capture_output=True, text=True, timeout=2).stdout
            names = sorted(set(re.findall(pattern, listed)))
            found += names if kind == "--list-elf" else [f"{name} as PTX" for name in names]
    noted = (_native.build_info().get("arch_list") or "").replace(" ", ";").split(";")
    return found or list(filter(None, noted))


def _cuobjdump() -> str | None:
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return str(bundled) if bundled and bundled.exists() else shutil.which("cuobjdump")


def _operations() -> dict[str, dict[str, Any]]:
    import scrl_fast.ops  # noqa: F401  registers them
    from scrl_fast.ops import backends

    devices = ["cpu"] + (["cuda"] if _said(_device).get("type") == "cuda" else [])
    return {
        name: {device: _choice(operation, device) for device in devices}
        for name, operation in backends.OPERATIONS.items()
    }


def _choice(operation: Any, device: str) -> dict[str, Any]:
    from scrl_fast.ops import backends

    why = {backend: operation.failure(backend, device) for backend in backends.BACKENDS}
    try:
        implementation = operation.resolve(device)
    except (ValueError, RuntimeError) as error:
        return {"runs": None, "why": {backend: reason or str(error) for backend, reason in why.items()}}
    runs = next(backend for backend in backends.BACKENDS if getattr(operation, backend) is implementation)
    return {
        "runs": runs,
        "why": {b: reason or f"available, {runs} comes first" for b, reason in why.items() if b != runs},
    }


def _decoders() -> dict[str, str]:
    """The JPEG decoder in use and why none before it is; those after it are not tried, since that takes a second."""
    from scrl_fast.data.jpeg import decoders

    return decoders(try_all=False)


def _torch_settings() -> dict[str, Any]:
    import torch

    return {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "flush_denormals": bool(torch.tensor([1e-310], dtype=torch.float64).mul(1).item() == 0),
    }


# ---- on screen ----


def describe(info: Mapping[str, Any]) -> str:
    """The dict of `collect` as text: aligned columns, one section each."""
    sections = [
        ("Versions", _pairs({"scrl_fast": _one_line(info["scrl_fast"]), **_versions_found(info["versions"])})),
        ("Device", _pairs(_mapping(info["device"]))),
        ("Libraries", _pairs({name: _loaded(found) for name, found in _mapping(info["libraries"]).items()})),
        ("Build: what the compiled libraries were made with", _pairs(_mapping(info["build"]))),
        ("Operations: what runs, and why the others do not", _operation_lines(_mapping(info["operations"]))),
        ("JPEG decoders", _pairs(_mapping(info["decoders"]))),
        ("PyTorch settings", _pairs(_mapping(info["torch_settings"]))),
        ("Environment variables that change numbers or speed", _pairs(_explained(info["variables"])) or ["none set"]),
    ]
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {"": value}


def _versions_found(versions: Any) -> dict[str, Any]:
    return {name: "not installed" if version is None else version for name, version in _mapping(versions).items()}


def _one_line(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_one_line(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return "; ".join(map(_one_line, value)) or "none"
    return "-" if value is None or value == "" else str(value)


def _loaded(found: Any) -> str:
    return (
        "loaded" if isinstance(found, Mapping) and found.get("loaded") else _one_line(_mapping(found).get("why", found))
    )


def _explained(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: f"{value}  ({NUMERIC_VARIABLES[name]})" for name, value in variables.items()}


def _pairs(pairs: Mapping[str, Any]) -> list[str]:
    return _columns((name, _one_line(value)) for name, value in pairs.items())


def _operation_lines(operations: Mapping[str, Any]) -> list[str]:
    rows: list[tuple[str, ...]] = []
    for name, devices in operations.items():
        for device, choice in _mapping(devices).items():
            if not isinstance(choice, Mapping):
                rows.append((name, device, _one_line(choice)))
                continue
            rows.append((name, device, choice["runs"] or "NOTHING", ""))
            rows += [("", "", f"  {backend}", reason) for backend, reason in choice["why"].items()]
    return _columns(rows)


def _columns(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Every column but the last as wide as its widest cell."""
    table = list(rows)
    count = max(map(len, table), default=0)
    widths = [max((len(row[i]) for row in table if len(row) > i + 1), default=0) for i in range(count)]
    return ["  ".join([*(cell.ljust(w) for cell, w in zip(row[:-1], widths)), row[-1]]).rstrip() for row in table]  # noqa: B905


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, those of the process by default; return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    with friendly_errors("scrl_fast.info", debug="--debug" in argv):
        description = "Show versions, device, and which implementation of each operation runs and why."
        parser = CommandParser(prog="python -m scrl_fast.info", description=description)
        parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
        as_json = parser.parse(argv).json
        info = collect()
        print(json.dumps(info, indent=2, default=str) if as_json else describe(info))
    return 0


if __name__ == "__main__":
    sys.exit(main())
