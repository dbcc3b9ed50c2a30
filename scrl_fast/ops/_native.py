"""Finds and loads the compiled libraries once, and remembers why one could not be had.

A library that is absent or does not load never takes another down: every question here answers with a reason instead
of raising, and ``scrl_fast.ops.backends`` turns reasons into choices.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_FOLDER = Path(__file__).parents[1]
LIBRARIES = ("_ops", "_cpu", "_cuda", "_host")
_KEYS = {"cpu": ("_cpu", "CPU"), "cuda": ("_cuda", "CUDA")}


@functools.cache
def build_info() -> dict[str, Any]:
    """What setup.py noted: libraries built and missing (with reasons), torch, Python, GPU architectures, commit."""
    try:
        return json.loads((_FOLDER / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}


@functools.cache
def load_failure(library: str) -> str:
    """'' when the library of LIBRARIES is loaded (now or before), else the reason why it is not."""
    if library in ("_cpu", "_cuda") and (failure := load_failure("_ops")):
        return failure
    if library == "_cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if library == "_host":
        try:
            importlib.import_module("scrl_fast._host")
            return ""
        except ImportError as error:
            return _reason(library, error)
    files = sorted(_FOLDER.glob(f"{library}.*so")) + sorted(_FOLDER.glob(f"{library}.*pyd"))
    if not files:
        return _reason(library, None)
    try:
        torch.ops.load_library(files[0])
        return ""
    except (OSError, RuntimeError) as error:
        return _reason(library, error)


def _reason(library: str, error: Exception | None) -> str:
    if (why := build_info().get("missing", {}).get(library)) is not None:
        return f"not built: {why}"
    if error is None or isinstance(error, ModuleNotFoundError):
        return "not built: install the package with a C++ compiler at hand (pip install -e .)"
    return f"does not load: {str(error.__cause__ or error).splitlines()[0]}"  # torch's own message names the file only


def op_failure(name: str, device_type: str) -> str:
    """'' when torch.ops.scrl_fast.<name> has a compiled kernel for device_type ('cpu' or 'cuda'), else the reason."""
    if device_type not in _KEYS:
        return f"no compiled kernel for device {device_type!r}"
    library, key = _KEYS[device_type]
    if failure := load_failure(library):
        return f"library {library} {failure}"
    if device_type == "cuda" and (failure := gpu_failure()):
        return failure
    has_kernel = getattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: True)
    if not has_kernel(f"scrl_fast::{name}", key):
        return f"not part of library {library}"
    return ""


@functools.cache
def gpu_failure() -> str:
    """'' when library _cuda holds code for every GPU here, as far as its build noted, else for which it does not."""
    if not torch.cuda.is_available():
        return ""
    built = str(build_info().get("arch_list") or "")
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not runs_on(built, capability):
            gpu = f"{torch.cuda.get_device_name(index)} ({capability[0]}.{capability[1]})"
            return f"library _cuda was built for {built}, not for {gpu}: set TORCH_CUDA_ARCH_LIST and build again"
    return ""


def runs_on(arch_list: str, capability: tuple[int, int]) -> bool:
    """Whether code built for TORCH_CUDA_ARCH_LIST runs on a GPU: of its generation and no newer, or PTX of any older.

    True for a list that names no number: nothing is known of it.
    """
    entries = re.findall(r"(\d+)\.(\d)([a-z]?)(\+PTX)?", arch_list)
    for major, minor, special, ptx in entries:
        built = (int(major), int(minor))
        if special and built != capability:  # 9.0a: for that GPU alone
            continue
        if (built[0] == capability[0] and built <= capability) or (ptx and built <= capability):
            return True
    return not entries


def host_failure(function: str) -> str:
    """'' when scrl_fast._host.<function> can be called, else the reason."""
    if failure := load_failure("_host"):
        return f"library _host {failure}"
    return "" if hasattr(host(), function) else "not part of library _host (rebuild the package)"


def host() -> ModuleType:
    """The input-side library (box sampling, pixels). Call only where host_failure answered ''."""
    return importlib.import_module("scrl_fast._host")
