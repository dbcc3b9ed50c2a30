"""Which implementation of an operation runs: native (compiled), triton, or reference (plain PyTorch).

Automatic choice: native, then triton (on a GPU only), then reference; decided once for each operation and device. The
argument ``backend=`` of an operation, or the environment variable SCRL_FAST_BACKEND, forces one, and a forced one that
cannot run raises with the reason instead of falling back. The variable is read once, at the first call of any
operation (`forget` has it read again), and speaks for all of them, so those that have no such form on purpose (box
sampling has no Triton, the pixels no CUDA C++) go on as without it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, get_args

import torch

from scrl_fast.errors import UsageError
from scrl_fast.ops import _native

Backend = Literal["native", "triton", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)


@functools.cache
def triton_failure(device_type: str) -> str:
    """'' when Triton kernels run on device_type: on a GPU compiled, on a CPU under TRITON_INTERPRET=1."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (it comes with torch's CUDA build)"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type == "cpu" and not interpreted:
        return "on a CPU Triton runs only under TRITON_INTERPRET=1"
    if device_type == "cpu" and _release("triton") < (3, 7) and _release("numpy") >= (2, 5):
        return "Triton before 3.7 cannot interpret kernels with NumPy 2.5 or newer"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "no GPU is available"
    return ""


def _release(package: str) -> tuple[int, ...]:
    try:
        found = version(package)
    except PackageNotFoundError:  # as pytorch-triton and others bring it
        found = importlib.import_module(package).__version__
    return tuple(int(number) for number in re.findall(r"\d+", found)[:2])


@dataclass(frozen=True, eq=False)  # one of a name: told apart, and looked up, by identity
class Operation:
    """The implementations of one operation.

    native, triton, reference: callables of one signature; None where DESIGN leaves the blank on purpose.
    native_on, triton_on: device types for which there is such a form.
    native_failure(device_type), triton_failure(device_type): '' when it can run there, else the reason.
    """

    name: str
    reference: Callable[..., Any]
    native: Callable[..., Any] | None = None
    native_failure: Callable[[str], str] = lambda device_type: ""
    triton: Callable[..., Any] | None = None
    triton_failure: Callable[[str], str] = triton_failure
    native_on: tuple[str, ...] = ("cpu", "cuda")
    triton_on: tuple[str, ...] = ("cpu", "cuda")  # on a CPU under its interpreter

    def has_form(self, backend: str, device_type: str) -> bool:
        """Whether there is such a form, be it able to run here or not."""
        if backend == "reference":
            return True
        devices = self.native_on if backend == "native" else self.triton_on
        return getattr(self, backend) is not None and device_type in devices

    def failure(self, backend: str, device_type: str) -> str:
        """'' when backend runs on device_type, else the reason why not."""
        if backend == "reference":
            return ""
        implementation = self.native if backend == "native" else self.triton
        if not self.has_form(backend, device_type):
            return f"{self.name} has no {backend} form" + (f" for {device_type}" if implementation else "")
        return self.native_failure(device_type) if backend == "native" else self.triton_failure(device_type)

    def resolve(self, device_type: str, backend: str | None = None) -> Callable[..., Any]:
        """The callable that runs on device_type ('cpu' or 'cuda'); backend forces one.

        Raises ValueError for an unknown backend name and RuntimeError for a forced one that cannot run.
        """
        return getattr(self, _chosen(self.name, device_type, backend))


@functools.cache  # to look up a variable that is not set takes longer than all else here: 16 us with cold caches
def _variable() -> str | None:
    return os.environ.get("SCRL_FAST_BACKEND")


def _chosen(name: str, device_type: str, backend: str | None) -> str:
    return _choose(OPERATIONS[name], device_type, backend, _variable() if backend is None else None)


def check_forced(device_type: str) -> None:
    """Raises ValueError when SCRL_FAST_BACKEND asks for what cannot run, before anything is allocated.

    device_type: where the networks are. Operations without a form for it are those of the data's side, on the CPU.
    """
    for operation in OPERATIONS.values():
        try:
            _choose(operation, device_type, None, _variable())
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"SCRL_FAST_BACKEND: {error}") from error


# torch.compile calls `_chosen` once and keeps the answer instead of tracing into library loading. This is what
# torch.compiler.assume_constant_result sets; calling that would import all of torch._dynamo here.
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _forced_by(environment: str | None, operation: Operation, device_type: str) -> str | None:
    if not environment or (environment in BACKENDS and not operation.has_form(environment, device_type)):
        return None
    return environment


@functools.cache
def _choose(operation: Operation, device_type: str, backend: str | None, environment: str | None) -> str:
    forced = _forced_by(environment, operation, device_type) if backend is None else backend
    if forced is not None:
        if forced not in BACKENDS:
            raise UsageError(f"backend {forced!r} is unknown; choose one of {', '.join(BACKENDS)}")
        if failure := operation.failure(forced, device_type):
            raise RuntimeError(f"{operation.name}: backend {forced!r} cannot run on {device_type}: {failure}")
        return forced
    if not operation.failure("native", device_type):
        return "native"
    if device_type == "cuda":
        _tell_of_wrong_gpu()
    if device_type != "cpu" and not operation.failure("triton", device_type):
        return "triton"
    return "reference"


@functools.cache  # once a process
def _tell_of_wrong_gpu() -> None:
    if failure := _native.gpu_failure():
        warnings.warn(f"scrl_fast: {failure}. Triton's kernels run instead.", RuntimeWarning, stacklevel=2)


def forget() -> None:
    """Forgets all choices, for a program that changes SCRL_FAST_BACKEND or TRITON_INTERPRET while it runs."""
    for decided in (_variable, _choose, triton_failure):
        decided.cache_clear()


OPERATIONS: dict[str, Operation] = {}
"""Every operation of scrl_fast.ops by name; filled as its module is imported, read by scrl_fast.info."""


def register(operation: Operation) -> Operation:
    OPERATIONS[operation.name] = operation
    return operation
