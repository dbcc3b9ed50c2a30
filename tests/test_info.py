"""python -m scrl_fast.info: says what runs, in JSON and as a table, whatever is missing."""

from __future__ import annotations

import builtins
import json
import platform
import subprocess
import sys
from typing import Any

import pytest
import torch

from scrl_fast import info
from scrl_fast.ops import _native, backends


@pytest.fixture(autouse=True)
def _own_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCRL_FAST_BACKEND", raising=False)


def test_a_processor_has_its_generation_in_its_name(tmp_path) -> None:
    cores = "model name\t: AMD EPYC\ncpu family\t: {}\nmodel\t\t: 17\nbugs :\n\n"
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(cores.format(25) + cores.format(26))
    assert info.processor(cpuinfo) == "AMD EPYC, family 25, model 17", "of the first core"
    cpuinfo.write_bytes(b"CPU implementer : 0x41\n\xff\n")
    assert info.processor(cpuinfo) == (platform.processor() or platform.machine()), "there is no such line"


def test_schema() -> None:
    found = info.collect()
    assert set(found) == {
        *("versions", "scrl_fast", "device", "libraries", "build", "operations", "decoders", "torch_settings"),
        "variables",
    }
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] == sys.version.split()[0]
    assert found["device"]["type"] in ("cpu", "cuda") and found["device"]["threads"] == torch.get_num_threads()
    assert set(found["libraries"]) == set(_native.LIBRARIES)
    assert all(library["loaded"] or library["why"] for library in found["libraries"].values())
    assert "in use" in found["decoders"].values()
    assert not any("error" in section for section in found.values())
    json.dumps(found)


def test_every_operation_says_what_runs_and_why_no_other() -> None:
    operations = info.collect()["operations"]
    assert {"roi_align", "two_view_loss", "normalized_mse_loss", "ema_update_", "lars_step_"} <= set(operations)
    for name, devices in operations.items():
        choice = devices["cpu"]
        assert choice["runs"] in backends.BACKENDS
        assert {choice["runs"], *choice["why"]} == set(backends.BACKENDS), name
        assert all(choice["why"].values()), name
        assert backends.OPERATIONS[name].resolve("cpu") is getattr(backends.OPERATIONS[name], choice["runs"])


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "load_failure", lambda library: f"not built: no {library}")
    monkeypatch.setattr(_native, "op_failure", lambda name, device: "library _cpu not built: no compiler")
    backends.forget()
    found = info.collect()
    assert found["libraries"]["_cpu"] == {"loaded": False, "why": "not built: no _cpu"}
    loss = found["operations"]["two_view_loss"]["cpu"]
    assert loss["runs"] == "reference" and loss["why"]["native"] == "library _cpu not built: no compiler"
    assert "library _cpu not built: no compiler" in info.describe(found)


def test_a_forced_backend_that_cannot_run_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRL_FAST_BACKEND", "cutlass")
    backends.forget()
    found = info.collect()
    assert found["variables"]["SCRL_FAST_BACKEND"] == "cutlass"
    choice = found["operations"]["two_view_loss"]["cpu"]
    assert choice["runs"] is None and "'cutlass' is unknown" in choice["why"]["reference"]
    assert "NOTHING" in info.describe(found)


@pytest.mark.parametrize("broken", ["torch", "scrl_fast", "PIL", "triton", "numpy", "subprocess"])
def test_nothing_that_breaks_silences_the_rest(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every later import of a package raises, and so does every child process."""
    true_import, true_module = builtins.__import__, info.importlib.import_module

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == broken:
            raise OSError(f"lib{broken}.so: undefined symbol")
        return true_import(name, *args, **kwargs)

    def refuse_module(name: str) -> Any:
        return refuse(name) if name == broken else true_module(name)

    def run(*args: Any, **kwargs: Any) -> None:
        raise OSError("no such program")

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(info.importlib, "import_module", refuse_module)
    monkeypatch.setattr(subprocess, "run", run)
    found = info.collect()
    text = info.describe(found)
    json.dumps(found)
    assert "Versions" in text and "Operations" in text
    if broken == "torch":
        assert "libtorch.so: undefined symbol" in text


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(arguments) == 0
    printed = capsys.readouterr().out
    if arguments:
        assert set(json.loads(printed)) == set(info.collect())
    else:
        assert "two_view_loss" in printed and max(map(len, printed.splitlines())) < 200


def test_columns_are_aligned() -> None:
    lines = info._columns([("roi_align", "cpu", "native"), ("ema", "cuda", "triton"), ("", "", "reason")])
    assert len({line.index(word) for line, word in zip(lines, ("native", "triton", "reason"), strict=True)}) == 1


def test_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scrl_fast.info", "--json"], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout)["device"]["threads"] >= 1
