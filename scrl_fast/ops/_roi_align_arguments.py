"""What `roi_align` takes: its arguments, checked and in the form that every implementation reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scrl_fast.config.defaults import MAX_SAMPLES
from scrl_fast.ops._arguments import FLOAT_DTYPES, as_integer, as_number, check_flag, check_integer, check_room, shown

_LARGEST_INT = (1 << 31) - 1
Options = tuple[tuple[int, int], float, int, bool]
"""Bins (height, width), scale, sampling ratio, aligned."""


def check_arguments(
    input: Tensor, output_size: Any, spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Options:
    if not isinstance(input, Tensor) or input.dtype not in FLOAT_DTYPES:
        got = input.dtype if isinstance(input, Tensor) else type(input).__name__
        raise TypeError(f"input must be a float32, float64, bfloat16 or float16 tensor, got {got}")
    if input.ndim != 4:
        raise ValueError(f"input must be [N, C, H, W], got shape {list(input.shape)}")
    return check_options(output_size, spatial_scale, sampling_ratio, aligned)


def check_options(output_size: Any, spatial_scale: float, sampling_ratio: int, aligned: bool) -> Options:
    try:
        sides = list(output_size) if isinstance(output_size, Iterable) else [output_size] * 2
        height, width = (check_integer("output_size", side, 1, _LARGEST_INT) for side in sides)
    except (TypeError, ValueError):
        wanted = "one or two positive integers"
        raise ValueError(f"output_size must be {wanted}, got {shown(output_size)}") from None
    if height * width > _LARGEST_INT:
        raise ValueError(f"output_size must have at most {_LARGEST_INT} bins, got {output_size}")
    scale = as_number("spatial_scale", spatial_scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"spatial_scale must be positive and finite, got {shown(spatial_scale)}")
    ratio = max(check_sampling_ratio(sampling_ratio), -1)  # of -2**70 no kernel would hear
    return (height, width), scale, ratio, check_flag("aligned", aligned)


def check_sampling_ratio(sampling_ratio: int) -> int:
    ratio = as_integer("sampling_ratio", sampling_ratio)
    if ratio > MAX_SAMPLES:
        raise ValueError(f"sampling_ratio must be at most {MAX_SAMPLES}, or -1 (adapts), got {shown(ratio)}")
    return ratio


def box_rows(input: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
    """Boxes as ``[K, 5]`` in the dtype in which their geometry is computed."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    if not isinstance(boxes, Tensor):
        boxes = _stack_boxes(input, boxes, dtype)
    if boxes.ndim != 2 or boxes.shape[1] != 5:
        raise ValueError(f"boxes must be [K, 5] or a list of [L, 4], got shape {list(boxes.shape)}")
    if not boxes.is_floating_point():
        raise TypeError(f"boxes must be floating point, got {boxes.dtype}")
    if boxes.device != input.device:
        raise ValueError(f"boxes are on {boxes.device}, input is on {input.device}")
    if boxes.shape[0] and not (input.shape[2] and input.shape[3]):
        raise ValueError(f"input has no cells to sample, shape {list(input.shape)}")
    return boxes.to(dtype)


def _stack_boxes(input: Tensor, boxes: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    if not isinstance(boxes, (list, tuple)) or not all(isinstance(each, Tensor) for each in boxes):
        raise TypeError(f"boxes must be a tensor or a list of tensors, got {type(boxes).__name__}")
    if len(boxes) != input.shape[0]:
        raise ValueError(f"boxes must hold one tensor an image: {len(boxes)} tensors for {input.shape[0]} images")
    for index, each in enumerate(boxes):
        if each.ndim != 2 or each.shape[1] != 4:
            raise ValueError(f"boxes[{index}] must be [L, 4], got shape {list(each.shape)}")
    if not boxes:
        return input.new_empty((0, 5), dtype=dtype)
    rows = [nn.functional.pad(each.to(dtype), (1, 0), value=float(index)) for index, each in enumerate(boxes)]
    return torch.cat(rows)


def check_result(input: Tensor, rows: Tensor, size: tuple[int, int]) -> None:
    """Raises ValueError where the map, or what comes of it, is more than memory holds."""
    device_type = input.device.type
    if device_type != "meta":
        check_room("input", input.numel(), input.itemsize, device_type)
        check_room("the result", rows.shape[0] * input.shape[1] * size[0] * size[1], input.itemsize, device_type)


def check_image_index(rows: Tensor, images: int) -> None:
    """Raises ValueError for the first row whose image index is outside the batch. Looks at CPU tensors only."""
    if rows.device.type != "cpu" or torch.compiler.is_compiling() or rows.shape[0] == 0:
        return
    bad = ~((rows[:, 0] >= 0) & (rows[:, 0] < images))
    if bad.any():
        row = int(bad.int().argmax())
        raise ValueError(f"boxes: row {row} has image index {rows[row, 0]:g}, outside 0..{images - 1}")
