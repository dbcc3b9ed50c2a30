"""What every test of an operation shares: poisoned memory, guard bands, backends, thread counts, the accuracy rule.

Import the helpers with ``from conftest import available_backends, implementations, guarded, assert_as_accurate``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # PyTorch reads it once, at the process's first product
if not torch.cuda.is_available():  # before the first kernel is decorated: the decorator reads it
    os.environ.setdefault("TRITON_INTERPRET", "1")

from scrl_fast.ops import backends

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
_device_constructors()  # fills its cache with the real torch.empty, before that is replaced below
GUARD = 256  # elements before and behind; whole cache lines in every dtype, so alignment stays what an allocator gives
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
INTEGER_POISON = 85  # 0b01010101 in every byte: far outside any index, and a legal value of every integer dtype


if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:  # of this process and of those it starts
    torch.set_num_threads(max(1, CORES // workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes ``pytest`` alone takes: a core each, at most 4. Tests that are named run in this process."""
    alone = config.args_source is pytest.Config.ArgsSource.TESTPATHS and DEVICES == ("cpu",)
    return min(4, CORES) if alone else 0


def available_backends(operation: str, device: str = "cpu") -> list[str]:
    """The backends that can run the operation (its name in DESIGN's table) on the device, native first."""
    import scrl_fast.ops  # noqa: F401  registers them

    known = backends.OPERATIONS[operation]
    return [name for name in backends.BACKENDS if not known.failure(name, device)]


def implementations(operation: str) -> list[Any]:
    """(device, backend) of everything that runs here, for ``@pytest.mark.parametrize("device, backend", ...)``."""
    return [
        pytest.param(device, backend, id=f"{device}-{backend}")
        for device in DEVICES
        for backend in available_backends(operation, device)
    ]


def triton_devices() -> list[Any]:
    """Devices on which Triton's kernels run here, a CPU under the interpreter, for tests of kernels that no backend
    names."""
    return [pytest.param(device, id=f"{device}-triton") for device in DEVICES if not backends.triton_failure(device)]


# ---- memory ----


def poison_(buffer: Tensor) -> Tensor:
    """Fill with NaN, or with bytes no result holds by accident where the dtype has no NaN."""
    if buffer.is_floating_point() or buffer.is_complex():
        return buffer.fill_(float("nan"))
    if buffer.dtype is torch.bool:
        return buffer.fill_(True)
    return buffer.fill_(int.from_bytes(bytes([INTEGER_POISON]) * buffer.element_size(), "little"))


class Guarded:
    """A tensor inside poisoned memory: reading beside it yields NaN, writing beside it fails ``check()``.

    ``tensor`` has the values, sizes and strides of the one given; gaps between its elements are poisoned too.
    """

    def __init__(self, tensor: Tensor, guard: int = GUARD) -> None:
        extent = (
            1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
        )
        self._buffer = poison_(torch.empty(extent + 2 * guard, dtype=tensor.dtype, device=tensor.device))
        self._outside = torch.ones(extent + 2 * guard, dtype=torch.bool, device=tensor.device)
        self._outside.as_strided(tensor.shape, tensor.stride(), guard).fill_(False)
        inside = torch.empty(0, dtype=tensor.dtype, device=tensor.device)  # set_: an ordinary tensor, not a view
        self.tensor = inside.set_(self._buffer.untyped_storage(), guard, tensor.shape, tensor.stride())
        self.tensor.copy_(tensor.detach())
        self._before = self._bits().clone()
        self.tensor.requires_grad_(tensor.requires_grad)

    def _bits(self) -> Tensor:
        return self._buffer[self._outside].view(torch.uint8)

    def check(self) -> None:
        """Fail if anything outside the tensor's own elements was written."""
        changed = (self._bits() != self._before).sum().item()
        assert not changed, f"{changed} bytes outside a tensor of shape {list(self.tensor.shape)} were written"


@contextmanager
def guarded(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """``with guarded(a, b) as (a, b):`` copies inside guard bands, checked when the block is left without an error."""
    guards = [Guarded(tensor) for tensor in tensors]
    yield [guard.tensor for guard in guards]
    for guard in guards:
        guard.check()


_outputs: list[Guarded] | None = None  # while a list: what the package allocated, inside guard bands


@pytest.fixture
def guarded_outputs() -> Iterator[None]:
    """What the package's Python code allocates (the outputs of Triton kernels) lies in guard bands."""
    global _outputs
    _outputs = []
    yield
    outputs, _outputs = _outputs, None
    for guard in outputs:
        guard.check()


@contextmanager
def poisoned_allocator() -> Iterator[None]:
    """PyTorch's own switch: memory that any code, C++ included, gets uninitialised is NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _poisoning(allocate: Any) -> Any:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return allocate(*args, **kwargs)
        result = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if not caller.startswith("scrl_fast") or type(result) is not Tensor or result.device.type == "meta":
            return result
        poison_(result)
        if _outputs is None:
            return result
        _outputs.append(Guarded(result))
        return _outputs[-1].tensor

    return poisoned


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
        (Tensor, "new_empty_strided"),
    ]:
        monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _backends_chosen_anew() -> Iterator[None]:
    yield
    backends.forget()


@pytest.fixture(scope="module")
def no_curves() -> Iterator[None]:
    """Runs of a module draw no curves.png, which would take longer than all their steps; it has tests of its own."""
    from scrl_fast.run import plots

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw_curves", lambda *_, **__: None)
        yield


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data sets of the transfer tasks, tiny, in their official layouts. A test that changes one copies it first."""
    from tiny_transfer import write_all

    return write_all(tmp_path_factory.mktemp("data"))


# ---- threads and accuracy ----


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Run the block on so many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=[1, 2, 3], ids="{}-threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The test runs with 1, 2 and 3 CPU threads."""
    with num_threads(request.param):
        yield request.param


def assert_as_accurate(ours: Tensor, pytorch: Tensor, exact: Tensor, name: str = "result") -> None:
    """The house rule: ``err(ours) <= 2 * err(PyTorch in the same dtype) + eps``, errors being maxima against float64.

    eps is one rounding of the largest exact value in ours' dtype, 64 in float64, where "exact" is no more exact than
    ours. Shape and dtype must equal PyTorch's.
    """
    assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)}, expected {list(exact.shape)}"
    assert ours.dtype == pytorch.dtype, f"{name}: dtype {ours.dtype}, expected {pytorch.dtype}"
    if not exact.numel():
        return
    exact = exact.double().cpu()
    error, allowed = ((t.double().cpu() - exact).abs().max().item() for t in (ours.detach(), pytorch.detach()))
    rounding = torch.finfo(ours.dtype).eps * exact.abs().max().item() * (64 if ours.dtype is torch.float64 else 1)
    assert error <= 2 * allowed + rounding, (
        f"{name}: error {error:.3e}, PyTorch's own {allowed:.3e} (eps {rounding:.3e})"
    )
