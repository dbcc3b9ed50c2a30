"""The Triton kernels of lars_step_ compile for A100, H100 and B200, without one."""

from __future__ import annotations

from aot import GPUS, Kernel, compile_for_gpus, needs_compiler

NUMBERS = ("lr", "momentum", "decay", "trust", "eps", "scale", "ema")
FLAGS = {"ADAPT": True, "BY_LR": False, "FIRST": True, "CHUNK": 16384, "BLOCK": 1024, "PARTIALS": 1024, "ALIGNED": True}
KERNELS = [
    kernel
    for like in ("*fp32", "*bf16")
    for kernel in (
        Kernel(
            "scrl_fast.kernels.lars_step:squares_of_chunk",
            {"table_ptr": "*i64", "like_ptr": like, "partials_ptr": "*fp64"},
            {"CHUNK": 16384, "BLOCK": 1024, "ALIGNED": True},
            divisible_by_16=("table_ptr", "like_ptr", "partials_ptr"),
        ),
        Kernel(
            "scrl_fast.kernels.lars_step:update_chunk",
            {"table_ptr": "*i64", "like_ptr": like, "partials_ptr": "*fp64", "all_partials_ptr": "*fp64"}
            | {"all_chunks": "i32", "counter_ptr": "*i64", "lr_ptr": "*fp32", "ema_ptr": "*fp64"}
            | {f"{name}_{half}": "fp32" for name in NUMBERS for half in ("high", "low")},
            {**FLAGS, "momentum_ptr": None, "WIDE": False, "TARGET": True},
            divisible_by_16=("table_ptr", "like_ptr", "partials_ptr"),
        ),
    )
]


@needs_compiler
def test_compiles_for_gpus_that_are_not_here() -> None:
    for kernel, gpu, made in compile_for_gpus(KERNELS):
        assert made.stack_bytes == 0 and made.registers <= 80, (kernel, GPUS[gpu], made)
        assert made.ptx.count("ld.global.v4") + made.ptx.count("ld.global.v2.b64") > 0, (kernel, "16 bytes a load")
