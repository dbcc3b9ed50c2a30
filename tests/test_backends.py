"""The choice of an implementation: automatic order, forced ones, reasons; and the same numbers from all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from scrl_fast import ops
from scrl_fast.ops import _native, backends
from scrl_fast.ops.backends import OPERATIONS, Operation, register


@pytest.fixture
def operation(monkeypatch: pytest.MonkeyPatch) -> Iterator[Operation]:
    """native runs on the CPU only, triton on CUDA only."""
    monkeypatch.delenv("SCRL_FAST_BACKEND", raising=False)
    made = Operation(
        "made_up",
        reference=lambda: "reference",
        native=lambda: "native",
        native_failure=lambda device: "" if device == "cpu" else "not compiled for it",
        triton=lambda: "triton",
        triton_failure=lambda device: "" if device == "cuda" else "interpreted only",
    )
    yield register(made)
    del OPERATIONS["made_up"]


def test_native_first_then_triton_on_gpus_only(operation: Operation) -> None:
    assert operation.resolve("cpu")() == "native"
    assert operation.resolve("cuda")() == "triton"
    assert operation.resolve("xpu")() == "reference"


def test_triton_is_never_chosen_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted it is a thousand times slower: it runs there only when asked for."""
    monkeypatch.setenv("SCRL_FAST_BACKEND", "")
    backends.forget()
    only = register(Operation("made_up", reference=lambda: 0, triton=lambda: 1, triton_failure=lambda device: ""))
    try:
        assert only.resolve("cpu") is only.reference
        assert only.resolve("cpu", "triton") is only.triton
        assert only.resolve("cuda") is only.triton
    finally:
        del OPERATIONS["made_up"]


@pytest.mark.parametrize("how", ["argument", "variable"])
def test_a_forced_one_runs_or_says_why_not(operation: Operation, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(device: str, backend: str) -> str:
        if how == "argument":
            return operation.resolve(device, backend)()
        monkeypatch.setenv("SCRL_FAST_BACKEND", backend)
        backends.forget()
        return operation.resolve(device)()

    assert resolve("cpu", "reference") == "reference"
    assert resolve("cuda", "triton") == "triton"
    with pytest.raises(RuntimeError, match="made_up: backend 'native' cannot run on cuda: not compiled for it"):
        resolve("cuda", "native")
    with pytest.raises(ValueError, match="backend 'cutlass' is unknown; choose one of native, triton, reference"):
        resolve("cpu", "cutlass")


def test_the_argument_comes_before_the_variable(operation: Operation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRL_FAST_BACKEND", "reference")
    backends.forget()
    assert operation.resolve("cpu", "native")() == "native"


def test_the_variable_is_read_once(operation: Operation, monkeypatch: pytest.MonkeyPatch) -> None:
    backends.forget()
    assert operation.resolve("cpu")() == "native"
    monkeypatch.setenv("SCRL_FAST_BACKEND", "reference")
    assert operation.resolve("cpu")() == "native"
    backends.forget()
    assert operation.resolve("cpu")() == "reference"


def test_a_blank_is_named() -> None:
    assert Operation("made_up", reference=print).failure("triton", "cuda") == "made_up has no triton form"


def test_triton_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = backends.triton_failure.__wrapped__  # without its memory
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: "found")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in failure("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert failure("cuda") == "no GPU is available"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    releases = {"triton": "3.6.0", "numpy": "2.5.5"}
    monkeypatch.setattr(backends, "version", releases.__getitem__)
    assert "NumPy 2.5" in failure("cpu") and "NumPy" not in failure("cuda")
    releases["triton"] = "3.10.1"
    assert failure("cpu") == ""
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in failure("cpu")


def test_libraries_answer_with_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "build_info", lambda: {"missing": {"_cuda": "no nvcc"}})
    monkeypatch.setattr(_native, "_FOLDER", _native._FOLDER / "nowhere")
    assert _native.load_failure.__wrapped__("_cpu").startswith("not built: install the package with a C++ compiler")
    if torch.version.cuda is not None:
        assert _native.load_failure.__wrapped__("_cuda") == "not built: no nvcc"
    assert _native.op_failure("roi_align", "mps") == "no compiled kernel for device 'mps'"


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("8.0;9.0+PTX", (8, 0), True),
        ("8.0;9.0+PTX", (8, 6), True),  # a newer one of the same generation
        ("8.0;9.0+PTX", (12, 0), True),  # compiled from PTX when it loads
        ("8.0;9.0+PTX", (7, 5), False),
        ("8.6", (8, 0), False),
        ("8.0;9.0", (10, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),
        ("8.0 9.0+PTX", (7, 0), False),
        ("Ampere", (7, 5), True),  # nothing is known
        ("", (7, 5), True),
    ],
)
def test_gpus_that_a_build_runs_on(built: str, capability: tuple[int, int], runs: bool) -> None:
    assert _native.runs_on(built, capability) is runs


def test_another_gpu_than_built_for_takes_triton_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """It loaded the library without a word, and the first call died with "no kernel image"."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((9, 0), (7, 5))[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ("H100", "Tesla T4")[index])
    monkeypatch.setattr(_native, "build_info", lambda: {"arch_list": "8.0;9.0+PTX"})
    monkeypatch.setattr(_native, "load_failure", lambda library: "")
    monkeypatch.delenv("SCRL_FAST_BACKEND", raising=False)
    memories = (_native.gpu_failure, backends._tell_of_wrong_gpu)
    for memory in memories:
        memory.cache_clear()
    backends.forget()
    made = Operation(
        "made_up", len, native=len, native_failure=lambda d: _native.op_failure("x", d), triton=len,
        triton_failure=lambda d: "",
    )  # fmt: skip
    monkeypatch.setitem(OPERATIONS, "made_up", made)
    try:
        with pytest.warns(RuntimeWarning, match=r"built for 8.0;9.0\+PTX, not for Tesla T4 \(7.5\)"):
            assert backends._chosen("made_up", "cuda", None) == "triton"
        with pytest.raises(RuntimeError, match="set TORCH_CUDA_ARCH_LIST and build again"):
            made.resolve("cuda", "native")
    finally:
        for memory in memories:
            memory.cache_clear()


def test_every_operation_has_a_reference_and_a_registered_name() -> None:
    for name, known in OPERATIONS.items():
        assert known.name == name and callable(known.reference)
        assert not known.failure("reference", "cpu")
        assert known.resolve("cpu") is not None


def test_a_process_can_be_held_to_the_reference() -> None:
    """SCRL_FAST_BACKEND=reference loads no library of ours for the operation that it runs."""
    program = (
        "import torch; from scrl_fast.ops import two_view_loss\n"
        "print(two_view_loss(torch.eye(4), torch.eye(4)).item())\n"
        "print(any('_cpu' in path for path in torch.ops.loaded_libraries))"
    )
    environment = {**os.environ, "SCRL_FAST_BACKEND": "reference"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["4.0", "False"]


@pytest.mark.parametrize(
    ("forced", "device", "chosen"),
    [
        ("native", "cpu", "native"),
        ("native", "cuda", "triton"),
        ("triton", "cpu", "native"),
        ("triton", "cuda", "triton"),
    ],
)
def test_the_environment_passes_over_forms_that_are_blank_on_purpose(monkeypatch, forced, device, chosen):
    pixels = Operation(
        "pixels",
        reference=len,
        native=len,
        triton=len,
        triton_failure=lambda _: "",
        native_on=("cpu",),
        triton_on=("cuda",),
    )
    monkeypatch.setitem(OPERATIONS, "pixels", pixels)
    monkeypatch.setenv("SCRL_FAST_BACKEND", forced)
    backends.forget()
    assert backends._chosen("pixels", device, None) == chosen
    assert pixels.failure("native", "cuda") == "pixels has no native form for cuda"
    with pytest.raises(RuntimeError, match="pixels has no native form for cuda"):
        backends._chosen("pixels", "cuda", "native")


def every_triton_operation():
    """Each of them once, with its smallest input."""
    one, box = torch.ones(1, 1, 2, 2, requires_grad=True), torch.tensor([[0.0, 0, 0, 2, 2]])
    rows = one.detach().view(2, 2)
    yield "roi_align", lambda: ops.roi_align(one, box, 1, backend="triton").sum().backward()
    yield "normalized_mse_loss", lambda: ops.normalized_mse_loss(rows, rows, backend="triton")
    yield "two_view_loss", lambda: ops.two_view_loss(rows, rows, backend="triton")
    yield "ema_update_", lambda: ops.ema_update_([rows.clone()], [rows], 0.5, backend="triton")
    yield "lars_step_", lambda: ops.lars_step_([rows.clone()], [rows], [rows.clone()], lr=0.1, backend="triton")


@pytest.mark.parametrize("place", range(5))
def test_triton_launches_where_its_tensors_are_not_on_the_current_gpu(monkeypatch, place):
    """Compiled kernels have such a guard from PyTorch's dispatcher or their own; Triton's have none."""
    name, call = list(every_triton_operation())[place]
    if reason := OPERATIONS[name].failure("triton", "cpu"):
        pytest.skip(reason)
    entered, plain = [], torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: entered.append(tensor) or plain(tensor))
    call()
    assert len(entered) == (2 if name == "roi_align" else 1)
