"""Box sampling: pairs of boxes that show the same region of an image in its two views."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scrl_fast.ops import _native
from scrl_fast.ops._arguments import as_integer, as_number, check_flag, check_integer, check_room, shown
from scrl_fast.ops.backends import Backend, Operation, register
from scrl_fast.ops.philox import philox4x32

TRIES = 50
_PURPOSE = 0x626F7873  # "boxs": keeps this draw apart from others of the same seed
_WORD_BITS = 32
_LIMIT = 1 << 20  # sizes up to here keep every product of the sampler exact in 64 bits
_ROWS_LIMIT = 1 << 24  # float32 holds an image index exactly up to here

Array = TypeVar("Array", NDArray[Any], Tensor)
Box: TypeAlias = tuple[float, float, float, float]  # x0, y0, x1, y1


def sample_box_pairs(
    crops1: Array,
    crops2: Array,
    *,
    view_size: int,
    boxes_per_image: int = 10,
    min_size: int = 32,
    iou_threshold: float = 0.5,
    grid: bool = True,
    jitter: float = 0.0,
    seed: int,
    step: int,
    keys: Array | None = None,
    backend: Backend | None = None,
) -> tuple[Array, Array]:
    """Draw boxes in the overlap of the two crops of each image and map them into both views: `(boxes1, boxes2)`.

    crops1, crops2: `[B, 5]` integers, rows `(y, x, h, w, flip)` in pixels of the original image; NumPy arrays or CPU
    tensors. Returns the same type as the input (ndarray or CPU tensor). Both views have view_size x view_size pixels.
    boxes1, boxes2: float32 `[N, 5]`, rows `(image, x0, y0, x1, y1)` in pixels of the view, by image, then by box; row i
    of both shows the same region. The image index of boxes2 counts on from B: views are stacked as [view 1; view 2].
    An image gives boxes_per_image rows, or none where the overlap is min_size or less in either direction.
    min_size: least side of a box, in pixels of the view that shows the overlap smaller. iou_threshold: in (0, 1]; a box
    is drawn again, at most 49 times, while its IoU in view 1 with an accepted one reaches it; 1 accepts all.
    grid: draw in the cells of a random grid, else anywhere. jitter: in [0, 1), shift and stretch of the box in view 2.
    seed, step: choose the random numbers, together with keys (int64 `[B]`, default 0..B-1), which name the images: an
    image's boxes depend on (seed, step, its key) and on nothing else in the batch. seed: any integer, 64 bits count.
    Raises TypeError or ValueError naming the argument and its value. Source: SCRL, arXiv 2103.06122, section 3.2.
    """
    options = checked_options(view_size, boxes_per_image, min_size, iou_threshold, grid, jitter)
    step, seed = check_integer("step", step, 0, (1 << _WORD_BITS) - 1), as_integer("seed", seed) & (1 << 64) - 1
    rows1, rows2 = checked_crops(crops1, crops2)
    check_room("boxes_per_image", len(rows1) * options.boxes_per_image, 2 * 5 * 4)
    names = None if keys is None else _checked_keys(keys, crops1)
    sample = _OPERATION.resolve("cpu", backend)
    boxes1, boxes2 = sample(rows1, rows2, names, options, seed, step)
    return (boxes1, boxes2) if isinstance(crops1, np.ndarray) else (torch.from_numpy(boxes1), torch.from_numpy(boxes2))


@dataclass(frozen=True)
class Options:
    """The checked options of a call; the names are those of `sample_box_pairs`."""

    view_size: int
    boxes_per_image: int
    min_size: int
    iou_threshold: float
    grid: bool
    jitter: float


@dataclass(frozen=True)
class Overlap:
    """What the two crops of one image share. Boxes are drawn in `width` x `height` pixels, then mapped by `to_view`."""

    width: int
    height: int
    unscale: tuple[float, float]  # from drawn pixels to original ones, x and y
    scale: tuple[tuple[float, float], tuple[float, float]]  # of each view: from original pixels to the view's, x and y
    offset: tuple[tuple[float, float], tuple[float, float]]  # of each view: where the overlap starts, x and y
    flip: tuple[bool, bool]

    def to_view(self, view: int, box: tuple[int, int, int, int], size: int) -> Box:
        """A drawn box (x, y, width, height) in pixels of a view. The order of operations is the published one."""
        (sx, sy), (ox, oy), (ux, uy) = self.scale[view], self.offset[view], self.unscale
        x, y, w, h = box
        x0, y0 = x * ux * sx + ox, y * uy * sy + oy
        x1, y1 = x0 + w * ux * sx, y0 + h * uy * sy
        return (size - x1, y0, size - x0, y1) if self.flip[view] else (x0, y0, x1, y1)


def overlap_of(crop1: list[int], crop2: list[int], options: Options) -> Overlap | None:
    """The overlap of two crops; None where it leaves no room for a box."""
    (top1, left1, h1, w1, flip1), (top2, left2, h2, w2, flip2) = crop1, crop2
    left, right = max(left1, left2), min(left1 + w1, left2 + w2)
    top, bottom = max(top1, top2), min(top1 + h1, top2 + h2)
    if left >= right or top >= bottom:
        return None
    size = options.view_size
    scale = ((size / w1, size / h1), (size / w2, size / h2))
    least_x, least_y = min(scale[0][0], scale[1][0]), min(scale[0][1], scale[1][1])
    width, height = round((right - left) * least_x), round((bottom - top) * least_y)
    if width <= options.min_size or height <= options.min_size:
        return None
    offset = (
        ((left - left1) * scale[0][0], (top - top1) * scale[0][1]),
        ((left - left2) * scale[1][0], (top - top2) * scale[1][1]),
    )
    return Overlap(width, height, (1 / least_x, 1 / least_y), scale, offset, (bool(flip1), bool(flip2)))


def draw_box(overlap: Overlap, options: Options, below: Callable[[int], int]) -> tuple[int, int, int, int]:
    """One try: a box (x, y, width, height) inside the overlap. below(n) is uniform in 0..n-1; its calls are ordered."""
    least = options.min_size
    if not options.grid:
        w, h = least + below(overlap.width - least), least + below(overlap.height - least)
        return below(overlap.width - w), below(overlap.height - h), w, h
    columns, rows = 1 + below(overlap.width // least), 1 + below(overlap.height // least)
    cell_w, cell_h = overlap.width / columns, overlap.height / rows
    column, row = below(columns), below(rows)
    w, h = least + below(int(cell_w) - least + 1), least + below(int(cell_h) - least + 1)
    x = below(int(cell_w - w) + 1) + int(column * cell_w)
    y = below(int(cell_h - h) + 1) + int(row * cell_h)
    return x, y, w, h


def shared_area(a: Box, b: Box) -> float:
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0.0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)


def reaches(a: Box, b: Box, threshold: float) -> bool:
    """Whether intersection over union is the threshold or more; multiplied out, as the compiled sampler has it."""
    shared = shared_area(a, b)
    return shared >= threshold * ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def sample_box_pairs_reference(
    crops1: NDArray[np.int64],
    crops2: NDArray[np.int64],
    keys: NDArray[np.int64] | None,
    options: Options,
    seed: int,
    step: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The sampler step by step, on checked arguments; the compiled one agrees with it bit for bit."""
    refuse_bad_crops(crops1, crops2)
    rows1: list[tuple[float, ...]] = []
    rows2: list[tuple[float, ...]] = []
    size = options.view_size
    for image, (crop1, crop2) in enumerate(zip(crops1.tolist(), crops2.tolist(), strict=True)):
        overlap = overlap_of(crop1, crop2, options)
        if overlap is None:
            continue
        words = _words(image if keys is None else int(keys[image]), options.boxes_per_image, seed, step)
        accepted: list[Box] = []
        for tries in words:
            for numbers in tries:
                draw = draw_box(overlap, options, _below(iter(numbers)))
                box1 = _clip(overlap.to_view(0, draw, size), size)
                if options.iou_threshold == 1 or not any(reaches(box1, b, options.iou_threshold) for b in accepted):
                    break
            accepted.append(box1)
            box2 = overlap.to_view(1, draw, size)
            if options.jitter > 0:
                box2 = jittered(box2, _factors(options.jitter, numbers[8:]))
            rows1.append((image, *box1))
            rows2.append((image + len(crops1), *_clip(box2, size)))
    return np.array(rows1, np.float32).reshape(-1, 5), np.array(rows2, np.float32).reshape(-1, 5)


def _words(key: int, boxes: int, seed: int, step: int) -> list[list[list[int]]]:
    """The random words of an image, `[boxes, TRIES, 12]`: eight for the box, four for its jitter."""
    counter = np.empty((4, boxes, TRIES, 3), np.uint64)
    place = np.arange(boxes)[:, None, None] << 8 | np.arange(TRIES)[:, None] << 2 | np.arange(3)
    counter[0] = place.astype(np.uint64)
    counter[1], counter[2], counter[3] = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF, step
    words = philox4x32(counter, np.array([seed & 0xFFFFFFFF, (seed >> 32) ^ _PURPOSE], np.uint64))
    return np.moveaxis(words, 0, -1).reshape(boxes, TRIES, 12).tolist()


def _below(words: Iterator[int]) -> Callable[[int], int]:
    return lambda count: next(words) * count >> _WORD_BITS


def _factors(ratio: float, words: list[int]) -> list[float]:
    low, high = 1.0 - ratio, 1.0 + ratio
    return [low + (high - low) * (word * 2.0**-_WORD_BITS) for word in words]


def jittered(box: Box, factors: list[float]) -> Box:
    """Shift by the first two factors less one, stretch by the other two, in shares of width and height."""
    x0, y0, x1, y1 = box
    w, h = x1 - x0, y1 - y0
    x0, y0 = x0 + w * (factors[0] - 1.0), y0 + h * (factors[1] - 1.0)
    return x0, y0, x0 + w * factors[2], y0 + h * factors[3]


def _clip(box: Box, size: int) -> Box:
    x0, y0, x1, y1 = (min(max(edge, 0.0), float(size)) for edge in box)
    return x0, y0, x1, y1


def checked_options(view_size, boxes_per_image, min_size, iou_threshold, grid, jitter) -> Options:
    for name, value in (("view_size", view_size), ("boxes_per_image", boxes_per_image), ("min_size", min_size)):
        check_integer(name, value, 1, _LIMIT - 1)
    if min_size > view_size:
        raise ValueError(f"min_size must not exceed view_size {view_size}, got {min_size}")
    if not 0 < as_number("iou_threshold", iou_threshold) <= 1:
        raise ValueError(f"iou_threshold must lie in (0, 1], got {shown(iou_threshold)}")
    if not 0 <= as_number("jitter", jitter) < 1:
        raise ValueError(f"jitter must lie in [0, 1), got {shown(jitter)}")
    grid = check_flag("grid", grid)
    return Options(int(view_size), int(boxes_per_image), int(min_size), float(iou_threshold), grid, float(jitter))


def checked_crops(crops1: Any, crops2: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    for name, crops in (("crops1", crops1), ("crops2", crops2)):
        check_room(name, math.prod(getattr(crops, "shape", ())), 8)
    rows1, rows2 = _integers("crops1", crops1), _integers("crops2", crops2)
    for name, rows in (("crops1", rows1), ("crops2", rows2)):
        if rows.ndim != 2 or rows.shape[1] != 5:
            raise ValueError(f"{name} must be [B, 5], rows (y, x, h, w, flip), got {list(rows.shape)}")
    if type(crops1) is not type(crops2):
        raise TypeError(f"crops1 and crops2 must be of one kind, got {_kind(crops1)} and {_kind(crops2)}")
    if len(rows1) != len(rows2):
        raise ValueError(f"crops1 and crops2 must have as many rows, got {len(rows1)} and {len(rows2)}")
    if 2 * len(rows1) > _ROWS_LIMIT:
        raise ValueError(f"crops1 has {len(rows1)} rows; float32 counts at most {_ROWS_LIMIT // 2} images exactly")
    return rows1, rows2


def _checked_keys(keys: Any, crops1: Any) -> NDArray[np.int64]:
    names = _integers("keys", keys)
    if names.shape != (len(crops1),):
        raise ValueError(f"keys must be [{len(crops1)}], one for each image, got {list(names.shape)}")
    return names


def _integers(name: str, values: Any) -> NDArray[np.int64]:
    """values as a contiguous int64 array, without a copy where it is one."""
    if isinstance(values, Tensor):
        if values.device.type != "cpu":
            raise TypeError(f"{name} must be on the CPU, got a tensor on {values.device}")
        values = values.detach().numpy()
    elif not isinstance(values, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array or a CPU tensor, got {_kind(values)}")
    if values.dtype.kind not in "iub":
        raise TypeError(f"{name} must hold integers, got {values.dtype}")
    return np.ascontiguousarray(values, np.int64)


def refuse_bad_crops(crops1: NDArray[np.int64], crops2: NDArray[np.int64]) -> None:
    for name, rows in (("crops1", crops1), ("crops2", crops2)):
        bad = (rows[:, 2:4] < 1).any(axis=1) | (np.abs(rows[:, :4]) >= _LIMIT).any(axis=1)
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(
                f"{name}[{row}] is no crop: (y, x, h, w) = {tuple(rows[row, :4].tolist())}; "
                f"h and w must be at least 1, all below {_LIMIT}"
            )


def _kind(value: Any) -> str:
    return type(value).__name__


def _native_sample_box_pairs(crops1, crops2, keys, options: Options, seed: int, step: int):
    o = options
    boxes = _native.host().sample_box_pairs(
        crops1, crops2, keys, o.view_size, o.boxes_per_image, o.min_size, o.iou_threshold, o.grid, o.jitter, seed, step,
        torch.get_num_threads(),
    )  # fmt: skip
    if boxes is None:  # a crop out of range: say which
        refuse_bad_crops(crops1, crops2)
    return boxes


_OPERATION = register(
    Operation(
        "sample_box_pairs",
        reference=sample_box_pairs_reference,
        native=_native_sample_box_pairs,
        native_failure=lambda device_type: _native.host_failure("sample_box_pairs"),
    )
)
