"""Box sampling from NumPy's legacy stream: the boxes of the published implementation, bit for bit, for a given seed."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scrl_fast.ops import _native
from scrl_fast.ops.backends import Backend, Operation, register
from scrl_fast.ops.sample_box_pairs import (
    TRIES,
    Array,
    Box,
    Options,
    checked_crops,
    checked_options,
    draw_box,
    jittered,
    overlap_of,
    refuse_bad_crops,
    shared_area,
)


def sample_box_pairs_replay(
    crops1: Array,
    crops2: Array,
    *,
    view_size: int,
    boxes_per_image: int = 10,
    min_size: int = 32,
    iou_threshold: float = 0.5,
    grid: bool = True,
    jitter: float = 0.0,
    random_state: np.random.RandomState | None = None,
    backend: Backend | None = None,
) -> tuple[Array, Array]:
    """`sample_box_pairs` drawn from random_state as the published implementation draws: same numbers, same boxes.

    Arguments and results are those of `sample_box_pairs`. random_state: None is NumPy's global state
    (`numpy.random.seed`); it is advanced just as far as the published sampler advances it, so that whatever draws from
    it afterwards goes on as published, too.
    Raises TypeError where random_state is no `numpy.random.RandomState`, and what `sample_box_pairs` raises.
    Source: kakaobrain/scrl at its last commit (January 2024), with `box_jittering` for jitter > 0.
    """
    if random_state is not None and not isinstance(random_state, np.random.RandomState):
        raise TypeError(f"random_state must be a numpy.random.RandomState or None, got {type(random_state).__name__}")
    options = checked_options(view_size, boxes_per_image, min_size, iou_threshold, grid, jitter)
    rows1, rows2 = checked_crops(crops1, crops2)
    boxes1, boxes2 = _OPERATION.resolve("cpu", backend)(rows1, rows2, options, random_state)
    return (boxes1, boxes2) if isinstance(crops1, np.ndarray) else (torch.from_numpy(boxes1), torch.from_numpy(boxes2))


def sample_box_pairs_replay_reference(
    crops1: NDArray[np.int64], crops2: NDArray[np.int64], options: Options, random_state: np.random.RandomState | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The published sampler step by step, on checked arguments. It differs from our own in three places: it draws the
    jitter of rejected tries, too, compares a box that is not yet clipped, and clips near and far edges on one side."""
    refuse_bad_crops(crops1, crops2)
    random: Any = np.random if random_state is None else random_state
    rows1: list[tuple[float, ...]] = []
    rows2: list[tuple[float, ...]] = []
    size, jitter = options.view_size, options.jitter
    for image, (crop1, crop2) in enumerate(zip(crops1.tolist(), crops2.tolist(), strict=True)):
        overlap = overlap_of(crop1, crop2, options)
        if overlap is None:
            continue
        accepted: list[Box] = []
        for _ in range(options.boxes_per_image):
            for _ in range(TRIES):
                draw = draw_box(overlap, options, lambda count: int(random.randint(0, count)))
                box1, box2 = overlap.to_view(0, draw, size), overlap.to_view(1, draw, size)
                if jitter > 0:
                    box2 = jittered(box2, random.uniform(1.0 - jitter, 1.0 + jitter, 4).tolist())
                if options.iou_threshold == 1 or all(_iou(box1, b) < options.iou_threshold for b in accepted):
                    break
            accepted.append(_clip(box1, size))
            rows1.append((image, *accepted[-1]))
            rows2.append((image + len(crops1), *_clip(box2, size)))
    return np.array(rows1, np.float32).reshape(-1, 5), np.array(rows2, np.float32).reshape(-1, 5)


def _iou(a: Box, b: Box) -> float:
    shared = shared_area(a, b)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def _clip(box: Box, size: int) -> Box:
    return max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(size)), min(box[3], float(size))


def _native_sample_box_pairs_replay(
    crops1: NDArray[np.int64], crops2: NDArray[np.int64], options: Options, random_state: np.random.RandomState | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    o = options
    generator: Any = np.random.mtrand.get_bit_generator() if random_state is None else random_state._bit_generator
    with generator.lock:
        boxes = _native.host().sample_box_pairs_replay(
            crops1, crops2, o.view_size, o.boxes_per_image, o.min_size, o.iou_threshold, o.grid, o.jitter,
            generator.capsule, type(generator) is np.random.MT19937 and _twister_is_known(),
        )  # fmt: skip
    if boxes is None:  # a crop out of range: say which
        refuse_bad_crops(crops1, crops2)
    return boxes


@functools.cache
def _twister_is_known() -> bool:
    """Whether a Mersenne Twister lies in memory as the compiled sampler reads it: 624 words, then the place in them.

    NumPy keeps that layout to itself, so it is compared with what a generator says of itself; where it is another, the
    sampler asks the generator for one number at a time.
    """
    generator = np.random.MT19937(7)
    np.random.RandomState(generator).randint(0, 1 << 20, 5)
    said: Any = generator.state["state"]
    words = (ctypes.c_uint32 * 625).from_address(int(generator.ctypes.state_address))
    return bool(np.array_equal(words, [*said["key"], said["pos"]]))


_OPERATION = register(
    Operation(
        "sample_box_pairs_replay",
        reference=sample_box_pairs_replay_reference,
        native=_native_sample_box_pairs_replay,
        native_failure=lambda device_type: _native.host_failure("sample_box_pairs_replay"),
    )
)
