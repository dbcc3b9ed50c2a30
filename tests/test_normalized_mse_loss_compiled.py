"""The Triton kernel of the losses compiles for A100, H100 and B200, without one."""

from __future__ import annotations

import re

from aot import GPUS, Kernel, compile_for_gpus, needs_compiler


def kernel(dtype: str, columns: int, grad_target: bool = False) -> Kernel:
    wide = "*fp64" if dtype == "*fp64" else "*fp32"
    pointers = {
        "input_ptr": dtype,
        "target_ptr": dtype,
        "loss_ptr": wide,
        "sums_ptr": wide,
        "arrived_ptr": "*i32",
        "grad_input_ptr": dtype,
        "grad_target_ptr": dtype,
    }
    sizes = dict.fromkeys(
        ("rows", "columns", "input_stride", "target_stride", "shift", "divisor", "gradient_divisor"), "i32"
    )
    tile = min(columns, 4096)
    return Kernel(
        "scrl_fast.kernels.normalized_mse_loss:row_losses",
        pointers | sizes,
        {"ROWS": max(2048 // tile, 1), "COLUMNS": tile, "ONE_TILE": columns <= tile, "REDUCE": True, "GRAD_INPUT": True}
        | {"GRAD_TARGET": grad_target, "WIDE": dtype == "*fp64", "SUMS": 1024},
        divisible_by_16=(*pointers, "columns", "input_stride", "target_stride"),
        num_warps=4 if tile <= 2048 else 8,
    )


@needs_compiler
def test_compiles_for_gpus_that_are_not_here() -> None:
    kernels = [kernel("*bf16", 256), kernel("*fp16", 256), kernel("*fp32", 256), kernel("*fp64", 256)]
    kernels += [kernel("*bf16", 4096, True), kernel("*fp32", 8192, True)]
    for made_of, gpu, made in compile_for_gpus(kernels):
        case = GPUS[gpu], made_of.arguments["input_ptr"], made_of.constexprs["COLUMNS"]
        assert made.stack_bytes == 0, (case, made)
        assert made.registers <= (176 if case[1] == "*fp64" else 80), (case, made)
        assert made.shared_bytes <= 256, (case, made)
        assert re.search(r"ld\.global\S*\.v[24]", made.ptx), f"{case}: loads are narrower than 16 bytes"
        atomics = re.findall(r"\b(?:atom|red)\.global\S*", made.ptx)
        assert len(atomics) == 1 and "acq_rel" in atomics[0], f"{case}: {atomics}, one counter and no sum"
        assert re.search(r"\.u32|\.s32", atomics[0]), (case, atomics)
