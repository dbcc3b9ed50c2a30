"""The Triton kernels of RoIAlign compile for A100, H100 and B200, without one."""

from __future__ import annotations

from aot import GPUS, Kernel, compile_for_gpus, needs_compiler

MODULE, BOXES = "scrl_fast.kernels.roi_align", "scrl_fast.kernels.roi_align_boxes"
INTEGERS = ("channels", "height", "width", "pooled_height", "pooled_width")
STRIDES = ("image_stride", "channel_stride", "row_stride", "column_stride")


def kernels(dtype: str, real: str, cells: int) -> list[Kernel]:
    """As the launchers in kernels/roi_align.py call them, for a map of cells x cells."""
    wide = real == "fp64"
    weights = {"y_ptr": f"*{real}", "x_ptr": f"*{real}", "y_bins_ptr": "*i32", "x_bins_ptr": "*i32"}
    numbers = dict.fromkeys((*INTEGERS, *STRIDES), "i32")
    sizes = {"images": "i32", "scale": "fp32", **dict.fromkeys(INTEGERS[1:], "i32"), "sampling_ratio": "i32"}
    by_image = {"order_ptr": "*i32", "first_ptr": "*i32"}
    strips = {"lists_ptr": "*i32", "first_ptr": "*i32", "ends_ptr": "*i32"}
    one_cell = {"height": 1, "width": 1} if cells == 1 else {}  # Triton compiles a number of 1 in
    return [
        Kernel(
            f"{BOXES}:box_weights",
            {"boxes_ptr": f"*{real}", **weights, "fine_ptr": "*i8"}
            | {name: kind for name, kind in sizes.items() if name not in one_cell},
            {"ALIGNED": False, "HEIGHT": cells, "WIDTH": cells, "WIDE": wide, **one_cell},
            divisible_by_16=("boxes_ptr", *weights),
            num_warps=1,
            enable_fp_fusion=False,
        ),
        Kernel(
            f"{MODULE}:pool",
            {"map_ptr": f"*{dtype}", "boxes_ptr": f"*{real}", **weights, "fine_ptr": "*i8", "out_ptr": f"*{dtype}"}
            | numbers,
            {"BLOCK": {"bf16": 256, "fp32": 128, "fp64": 64}[dtype], "WIDE": wide},
            divisible_by_16=("map_ptr", "out_ptr", "channels", "image_stride", "row_stride", "column_stride"),
            num_warps=1,
        ),
        Kernel(
            f"{MODULE}:pool_backward",
            {"grad_ptr": f"*{dtype}", **weights, **strips, "out_ptr": f"*{dtype}", **numbers}
            | {"count": "i32", "blocks_a_strip": "i32"},
            {"CELLS": 16, "CHANNELS": 64, "WIDE": wide},
            divisible_by_16=("grad_ptr", "out_ptr", "channels", "image_stride", "row_stride", "column_stride"),
        ),
        Kernel(
            f"{BOXES}:take_order",
            {"boxes_ptr": f"*{real}", "image_ptr": "*i32", **by_image, "unsorted_ptr": "*i32"}
            | {"count": "i32", "images": "i32", "steps": "i32"},
            {"ORDERED": 256},
            divisible_by_16=("boxes_ptr", "image_ptr", *by_image, "unsorted_ptr"),
        ),
    ]


def list_kernels() -> list[Kernel]:
    """Those that read no floating point."""
    by_image = {"order_ptr": "*i32", "first_ptr": "*i32"}
    strips = {"lists_ptr": "*i32", "ends_ptr": "*i32"}
    numbers = dict.fromkeys(("count", "cells", "width", "pooled_height", "strip_cells", "strips"), "i32")
    return [
        Kernel(
            f"{BOXES}:group_by_image",
            {"image_ptr": "*i32", **by_image, "unsorted_ptr": "*i32", "count": "i32", "flags": "i32"},
            {"BOXES": 1024},
            divisible_by_16=("image_ptr", *by_image, "unsorted_ptr"),
        ),
        Kernel(
            f"{BOXES}:list_by_strip",
            {"y_bins_ptr": "*i32", **by_image, **strips, **numbers},
            {"BOXES": 1024},
            divisible_by_16=("y_bins_ptr", *by_image, *strips),
        ),
    ]


@needs_compiler
def test_compiles_for_gpus_that_are_not_here() -> None:
    cases = [
        *kernels("bf16", "fp32", 8),
        *kernels("fp32", "fp32", 512),
        *kernels("fp64", "fp64", 8),
        kernels("bf16", "fp32", 1)[0],
        *list_kernels(),
    ]
    for kernel, gpu, made in compile_for_gpus(cases):
        case = f"{kernel.function} {dict(kernel.arguments)} on {GPUS[gpu]}: {made}"
        backward = kernel.function.endswith("pool_backward")
        assert made.registers <= (112 if backward else 144), case
        assert made.stack_bytes <= (8 if backward and gpu == 80 else 0), case  # two registers, by Triton 3.6
