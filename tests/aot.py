"""Compiles Triton kernels for GPUs that are not here, and says what the compiler made of them.

    from aot import GPUS, Kernel, compile_for_gpus, needs_compiler

    KERNELS = [
        Kernel(
            "scrl_fast.kernels.roi_align:forward",  # module:function
            {"input": "*bf16", "output": "*fp32", "rows": "i32", "scale": "fp32"},  # its run-time arguments
            {"ROWS": 8, "COLUMNS": 256},  # its constexprs
            divisible_by_16=("input", "output"),  # as the launcher would see them
        ),
    ]

    @needs_compiler
    def test_compiles_for_gpus_that_are_not_here():
        for kernel, gpu, made in compile_for_gpus(KERNELS):  # one process for all of them, about 3 s and 0.3 s a kernel
            assert made.stack_bytes == 0 and made.registers <= 128, (kernel, GPUS[gpu], made)

Everything runs in a fresh process without TRITON_INTERPRET, under which kernels are interpreted functions.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

GPUS = {80: "A100", 90: "H100", 100: "B200"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """function: "module:name". arguments: name -> Triton type of every run-time argument. options: num_warps, ..."""

    function: str
    arguments: Mapping[str, str]
    constexprs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    divisible_by_16: Sequence[str] = ()
    num_warps: int = 4
    num_stages: int = 3
    enable_fp_fusion: bool = True


@dataclasses.dataclass(frozen=True)
class Compiled:
    """registers: a thread. stack_bytes: a thread's local memory, where spills go. ptx: to look for opcodes in."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    ptx: str = dataclasses.field(repr=False)


def compiler_failure() -> str:
    """'' when kernels can be compiled here, else why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return "" if tool("cuobjdump") else "triton came without cuobjdump"


def needs_compiler(test: Any) -> Any:
    """Skips the test, with the reason, where Triton's compiler is missing."""
    import pytest

    failure = compiler_failure()
    return pytest.mark.skipif(bool(failure), reason=failure)(test)


def compile_for_gpus(
    kernels: Sequence[Kernel], gpus: Sequence[int] = tuple(GPUS)
) -> list[tuple[Kernel, int, Compiled]]:
    """Every kernel for every compute capability (80, 90, 100); fails with the compiler's words where one cannot be."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    order = json.dumps({"kernels": [dataclasses.asdict(kernel) for kernel in kernels], "gpus": list(gpus)})
    done = subprocess.run([sys.executable, __file__], input=order, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"ahead-of-time compilation failed:\n{done.stderr[-4000:]}"
    made = [Compiled(**fields) for fields in json.loads(done.stdout.splitlines()[-1])]
    return [(kernel, gpu, compiled) for (kernel, gpu), compiled in zip(_product(kernels, gpus), made, strict=True)]


def _product(kernels: Sequence[Any], gpus: Sequence[int]) -> list[tuple[Any, int]]:
    return [(kernel, gpu) for kernel in kernels for gpu in gpus]


def tool(name: str) -> Path | None:
    """A program that came with Triton."""
    import triton.backends.nvidia

    path = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    return path if path.exists() else None


def _compile(kernel: Mapping[str, Any], capability: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = kernel["function"].split(":")
    function = getattr(importlib.import_module(module), name)
    places = {argument: place for place, argument in enumerate(function.arg_names)}
    source = ASTSource(
        fn=function,
        signature={argument: kernel["arguments"].get(argument, "constexpr") for argument in function.arg_names},
        constexprs=dict(kernel["constexprs"]),
        attrs={(places[argument],): [["tt.divisibility", 16]] for argument in kernel["divisible_by_16"]},
    )
    options = {key: kernel[key] for key in ("num_warps", "num_stages", "enable_fp_fusion")}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool("cuobjdump"), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))  # type: ignore[index]
    return Compiled(registers, stack, binary.metadata.shared, binary.asm["ptx"])


if __name__ == "__main__":
    order = json.load(sys.stdin)
    made = [_compile(kernel, gpu) for kernel, gpu in _product(order["kernels"], order["gpus"])]
    print(json.dumps([dataclasses.asdict(compiled) for compiled in made]))
