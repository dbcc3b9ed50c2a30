"""The Triton kernels of batch_norm_act compile for A100, H100 and B200, without one."""

from __future__ import annotations

import re

from aot import GPUS, Kernel, compile_for_gpus, needs_compiler


def kernels(dtype: str) -> list[Kernel]:
    wide = "*fp64" if dtype == "*fp64" else "*fp32"
    tile = {"ROWS": 32, "CHANNELS": 64}
    flags = {"WEIGHT": True, "BIAS": True, "RELU": True, "WIDE": dtype == "*fp64"}
    affine = dict.fromkeys(("weight_ptr", "bias_ptr", "statistics_ptr"), wide)

    def kernel(name: str, pointers: dict[str, str], sizes: tuple[str, ...], constexprs: dict[str, object]) -> Kernel:
        arguments = pointers | dict.fromkeys(sizes, "i32")
        aligned = (*pointers, "channels")
        return Kernel(f"scrl_fast.kernels.batch_norm_act:{name}", arguments, constexprs, divisible_by_16=aligned)

    return [
        kernel(
            "block_statistics",
            {"input_ptr": dtype, "mean_ptr": wide, "deviations_ptr": wide},
            ("rows", "channels", "rows_a_split"),
            tile | {"WIDE": dtype == "*fp64"},
        ),
        kernel(
            "merged_statistics",
            {"mean_ptr": wide, "deviations_ptr": wide, "merged_ptr": wide},
            ("rows", "channels", "splits", "rows_a_split"),
            {"CHANNELS": 64},
        ),
        kernel(
            "apply_rows",
            {"input_ptr": dtype, "residual_ptr": dtype, **affine, "output_ptr": dtype},
            ("rows", "channels"),
            tile | flags | {"eps": 1e-5, "RESIDUAL": True},
        ),
        kernel(
            "block_backward_sums",
            {"grad_ptr": dtype, "input_ptr": dtype, "output_ptr": dtype, **affine, "masked_ptr": dtype}
            | {"sum_ptr": wide, "cross_ptr": wide},
            ("rows", "channels", "rows_a_split"),
            tile | flags | {"eps": 1e-5, "OUTPUT": True},
        ),
        kernel(
            "backward_rows",
            {"grad_ptr": dtype, "input_ptr": dtype, **affine, "sums_ptr": wide, "result_ptr": dtype},
            ("rows", "channels"),
            tile | flags | {"eps": 1e-5},
        ),
    ]


@needs_compiler
def test_compiles_for_gpus_that_are_not_here() -> None:
    for made_of, gpu, made in compile_for_gpus([*kernels("*bf16"), *kernels("*fp32"), *kernels("*fp64")]):
        dtype = made_of.arguments.get("input_ptr", "*fp32")
        case = GPUS[gpu], made_of.function, dtype
        assert made.stack_bytes == 0, (case, made)
        if dtype != "*fp64" and "merged" not in made_of.function:
            assert made.registers <= 128, (case, made)
            assert re.search(r"ld\.global\S*\.v[24]", made.ptx), f"{case}: loads are narrower than 16 bytes"
