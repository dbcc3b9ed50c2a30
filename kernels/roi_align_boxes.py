"""What RoIAlign's Triton kernels know of the boxes before they pool: weights of every box and axis, the boxes of every
image, and of every strip of its rows.

No atomics and no wait for the device: every program owns what it writes and visits boxes in their order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SHARED = tl.constexpr(4)  # cells, at most, that neighbouring bins both read, as `_axis` cuts their weights
BOXES = 1024  # that a program of `group_by_image` or `list_by_strip` looks at together
ORDERED = 256  # boxes of a program of `take_order`
MOST_LOOKS = 1 << 24  # images x boxes; beyond, a sort groups boxes faster than a look at each for every image
STRIP_ROWS = 8  # of a map, at least, that share a list of boxes: lists take an eighth of the weights of rows, or less


@triton.jit
def strip_length(size, bins):
    """Of a box and an axis of so many cells and bins."""
    return size + (bins - 1) * SHARED


@triton.jit
def load_bin(bins_ptr, k, bins, bin):
    """The cells [first, last) that a bin reads; the weight of a cell lies at shift + cell of its box's strip."""
    made = bins_ptr + (k * (bins + 1) + bin) * 3
    return tl.load(made), tl.load(made + 1), tl.load(made + 2)


@triton.jit
def load_reach(bins_ptr, k, bins):
    """The cells [first, last) that the bins of box k read together."""
    made = bins_ptr + (k * (bins + 1) + bins) * 3
    return tl.load(made), tl.load(made + 1)


@triton.jit
def _divide(a, b, WIDE: tl.constexpr):
    """Rounded to nearest: the sample count is the ceiling of a quotient."""
    return a / b if WIDE else tl.div_rn(a, b)


@triton.jit
def _axis(
    box, strip_ptr, bins_ptr, scale, bins, size, sampling_ratio, fine,
    LOW: tl.constexpr, ALIGNED: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """box [5] -> strip [size + SHARED (bins - 1)] of the axis whose low edge is box[LOW], bins [bins + 1, 3]; and
    whether the edges are finite."""
    real = tl.float64 if WIDE else tl.float32
    offset = 0.5 if ALIGNED else 0.0
    low = tl.load(box + LOW).to(real) * scale - offset
    extent = (tl.load(box + LOW + 2).to(real) * scale - offset) - low
    fine = fine & (low - low == 0) & (extent - extent == 0)  # finite
    if not ALIGNED:
        extent = tl.maximum(extent, 1.0)
    bin_size = _divide(extent, tl.cast(bins, real), WIDE)
    samples = tl.where(sampling_ratio > 0, sampling_ratio.to(real), tl.ceil(bin_size))
    samples = tl.where(fine & (samples >= 1) & (samples <= 2147483648.0), samples, 0.0)
    half = samples * 0 + 0.5
    cell = tl.arange(0, SIZE)
    box_first = size
    box_last = size * 0
    for bin in range(bins):
        first = low + bin * bin_size
        begin = samples * 0
        end = samples
        if (samples > 64) & (bin_size > 0):  # a huge box: only the samples near the map, whatever its size
            per_cell = samples / bin_size
            slack = 3.0 + samples * 1e-6
            begin = tl.minimum(tl.maximum((-1.0 - first) * per_cell - slack, 0.0), samples)
            end = tl.minimum(tl.maximum((size - first) * per_cell + slack, 0.0), samples)
        weight = tl.zeros([SIZE], real)
        for sample in range(begin.to(tl.int64), end.to(tl.int64)):
            position = first + _divide((sample + half) * bin_size, samples, WIDE)
            inside = (position >= -1) & (position <= size)
            position = tl.minimum(tl.maximum(position, 0.0), tl.cast(size - 1, real))
            weight += tl.where(inside, tl.maximum(1.0 - tl.abs(position - cell), 0.0), 0.0)
        weight = weight / tl.maximum(samples, 1.0)
        # A sample lies between its bin's edges but for rounding. That exceeds a cell only in boxes millions of cells
        # long; what lies further out would meet the next bin's weights in the strip, and is left out.
        edge = tl.floor(first)
        next_edge = tl.floor(low + (bin + 1) * bin_size)
        near = (cell >= tl.minimum(edge, next_edge) - 1.0) & (cell < tl.maximum(edge, next_edge) + 3.0)
        has_weight = near & (weight > 0)
        bin_first = tl.min(tl.where(has_weight, cell, size), 0)
        bin_last = tl.max(tl.where(has_weight, cell + 1, 0), 0)
        shift = tl.where(bin_size < 0, bins - 1 - bin, bin) * SHARED  # of a box turned round, from the last bin on
        tl.store(strip_ptr + shift + cell, weight, (cell >= bin_first) & (cell < bin_last))
        made = bins_ptr + 3 * bin
        tl.store(made, bin_first)
        tl.store(made + 1, bin_last)
        tl.store(made + 2, shift)
        box_first = tl.minimum(box_first, bin_first)
        box_last = tl.maximum(box_last, bin_last)
    tl.store(bins_ptr + 3 * bins, box_first)
    tl.store(bins_ptr + 3 * bins + 1, box_last)
    return fine


@triton.jit(do_not_specialize=["images", "scale", "sampling_ratio", "pooled_height", "pooled_width"])
def box_weights(
    boxes_ptr, y_ptr, x_ptr, y_bins_ptr, x_bins_ptr, fine_ptr,
    images, scale, height, width, pooled_height, pooled_width, sampling_ratio,
    ALIGNED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """boxes [K, 5] -> strips y [K, height + SHARED (pooled_height - 1)] and x [K, width + SHARED (pooled_width - 1)],
    y_bins [K, pooled_height + 1, 3], x_bins [K, pooled_width + 1, 3], fine [K]. A program a box.

    Of a box and axis: weight[bin, cell] = sum over the bin's samples s of max(0, 1 - |clamp(p_s) - cell|) / samples
    where p_s = start + bin_size (bin + (s + 1/2) / samples) lies in [-1, size].

    bins[box, bin] = (first cell, last cell + 1, shift) of the cells with a weight, which lies at shift + cell of the
    box's strip; bins[box, bins] the cells of all bins. Bins follow each other on the map, so that a strip holds all of
    them, each shifted by SHARED cells against the one before it. fine[box]: 0 for a box with a non-finite edge or an
    image index outside the batch; it has no weights.
    """
    k = tl.program_id(0).to(tl.int64)
    box = boxes_ptr + k * 5
    image = tl.load(box)
    fine = (image >= 0) & (image < images)
    # Both axes must be finite before either may have weights: the first look at x only asks.
    x_extent = tl.load(box + 3) * scale - tl.load(box + 1) * scale
    fine = fine & (x_extent - x_extent == 0)
    fine = _axis(
        box, y_ptr + k * strip_length(height, pooled_height), y_bins_ptr + k * 3 * (pooled_height + 1),
        scale, pooled_height, height, sampling_ratio, fine, 2, ALIGNED, HEIGHT, WIDE,
    )  # fmt: skip
    fine = _axis(
        box, x_ptr + k * strip_length(width, pooled_width), x_bins_ptr + k * 3 * (pooled_width + 1),
        scale, pooled_width, width, sampling_ratio, fine, 1, ALIGNED, WIDTH, WIDE,
    )  # fmt: skip
    tl.store(fine_ptr + k, fine.to(tl.int8))


@triton.jit
def _image(boxes_ptr, k, known, images):
    """Of box k; `images` where the index is none of the batch."""
    index = tl.load(boxes_ptr + k.to(tl.int64) * 5, known, other=-1.0)
    inside = (index >= 0) & (index < images)
    return tl.where(inside, tl.where(inside, index, 0.0).to(tl.int32), images)


@triton.jit(do_not_specialize=["count", "images", "steps"])
def take_order(
    boxes_ptr, image_ptr, order_ptr, first_ptr, unsorted_ptr, count, images, steps, ORDERED: tl.constexpr
):  # fmt: skip
    """boxes [K, 5] -> image [K] (N for those of no image), unsorted [programs], order [K], first [N + 1].

    order and first are what `group_by_image` describes if no program finds a box that is unsorted: boxes come in the
    order of their images, as those of a training step do. A program: ORDERED boxes, and the first boxes of as many
    images, each found by halving the boxes so many times (steps)."""
    k = tl.program_id(0) * ORDERED + tl.arange(0, ORDERED)
    own = _image(boxes_ptr, k, k < count, images)
    follows = (k > 0) & (k < count)
    before = _image(boxes_ptr, k - 1, follows, images)
    tl.store(unsorted_ptr + tl.program_id(0), tl.max((follows & (own < before)).to(tl.int32), 0))
    tl.store(image_ptr + k, own, k < count)
    tl.store(order_ptr + k, k, k < count)
    low = k * 0
    high = low + count
    for _step in range(steps):
        middle = (low + high) // 2
        between = low < high
        less = between & (_image(boxes_ptr, middle, between, images) < k)
        low = tl.where(less, middle + 1, low)
        high = tl.where(less, high, middle)
    tl.store(first_ptr + k, low, k <= images)


@triton.jit(do_not_specialize=["count", "flags"])
def group_by_image(image_ptr, order_ptr, first_ptr, unsorted_ptr, count, flags, BOXES: tl.constexpr):
    """image [K] -> order [K], first [N + 1] of boxes in any order; `take_order` has done it for sorted ones:

    order[first[n] : first[n + 1]] = the boxes of image n in their order; behind them, those of no image. A program an
    n in [0, N]."""
    n = tl.program_id(0)
    unsorted = 0
    for start in range(0, flags, BOXES):
        flag = start + tl.arange(0, BOXES)
        unsorted = tl.maximum(unsorted, tl.max(tl.load(unsorted_ptr + flag, flag < flags, other=0), 0))
    if unsorted != 0:
        before = 0
        for start in range(0, count, BOXES):
            k = start + tl.arange(0, BOXES)
            image = tl.load(image_ptr + k, k < count, other=n)
            before += tl.sum((image < n).to(tl.int32), 0)
        tl.store(first_ptr + n, before)
        for start in range(0, count, BOXES):
            k = start + tl.arange(0, BOXES)
            mine = tl.load(image_ptr + k, k < count, other=-1) == n
            place = before + tl.cumsum(mine.to(tl.int32), 0) - 1
            tl.store(order_ptr + place, k, mine)
            before += tl.sum(mine.to(tl.int32), 0)


@triton.jit(do_not_specialize=["count", "strips"])
def list_by_strip(
    y_bins_ptr, order_ptr, first_ptr, lists_ptr, ends_ptr, count, cells, width, pooled_height, strip_cells, strips,
    BOXES: tl.constexpr,
):  # fmt: skip
    """y_bins [K, pooled_height + 1, 3], order [K], first [N + 1] -> lists [strips, K], ends [N, strips]:

    lists[strip, first[n] : ends[n, strip]] = the boxes of image n that reach the strip's rows, in their order.

    A program a strip of an image."""
    n = tl.program_id(0) // strips
    strip = tl.program_id(0) % strips
    first_row = strip * strip_cells // width
    last_row = (tl.minimum((strip + 1) * strip_cells, cells) - 1) // width
    lists = lists_ptr + strip.to(tl.int64) * count
    begin = tl.load(first_ptr + n)
    end = tl.load(first_ptr + n + 1)
    place = begin
    for start in range(begin, end, BOXES):
        entry = start + tl.arange(0, BOXES)
        k = tl.load(order_ptr + entry, entry < end, other=0)
        first, last = load_reach(y_bins_ptr, k.to(tl.int64), pooled_height)
        reached = (entry < end) & (first <= last_row) & (last > first_row)
        tl.store(lists + place + tl.cumsum(reached.to(tl.int32), 0) - 1, k, reached)
        place += tl.sum(reached.to(tl.int32), 0)
    tl.store(ends_ptr + tl.program_id(0), place)


class BoxWeights:
    """What `box_weights` makes for boxes ``[K, 5]`` on a map of height x width cells.

    It allocates height + width + SHARED (pooled_height + pooled_width - 2) numbers a box and three integers a bin of
    each axis: 24 MB for 8,192 boxes of 14 x 14 bins on 200 x 336 cells. A row of cells for every bin would take 246.
    """

    def __init__(
        self, boxes: Tensor, images: int, size: tuple[int, int], pooled: tuple[int, int], options: tuple[Any, ...]
    ) -> None:
        scale, sampling_ratio, aligned = options
        self.wide = boxes.dtype is torch.float64
        if self.wide and scale != 1:  # numbers reach a kernel as float32
            boxes, scale = torch.cat([boxes[:, :1], boxes[:, 1:] * scale], 1), 1.0
        self.boxes = boxes.contiguous()
        (height, width), (pooled_height, pooled_width), count = size, pooled, boxes.shape[0]
        shared = SHARED.value
        self.y = boxes.new_empty((count, height + shared * (pooled_height - 1)))
        self.x = boxes.new_empty((count, width + shared * (pooled_width - 1)))
        self.y_bins = boxes.new_empty((count, pooled_height + 1, 3), dtype=torch.int32)
        self.x_bins = boxes.new_empty((count, pooled_width + 1, 3), dtype=torch.int32)
        self.fine = boxes.new_empty(count, dtype=torch.int8)
        if count:
            box_weights[(count,)](
                self.boxes, *self.tensors(), self.fine,
                images, scale, height, width, pooled_height, pooled_width, sampling_ratio,
                ALIGNED=aligned, HEIGHT=triton.next_power_of_2(height), WIDTH=triton.next_power_of_2(width),
                WIDE=self.wide, num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip

    def tensors(self) -> tuple[Tensor, ...]:
        return self.y, self.x, self.y_bins, self.x_bins


def boxes_of_images(boxes: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """boxes ``[K, 5]`` -> order ``[K]``, first ``[images + 1]`` of `group_by_image`.

    Sorted boxes are looked at a few times each, whatever the number of images, and unsorted ones once or twice for
    every image, up to MOST_LOOKS.
    """
    count = boxes.shape[0]
    programs = triton.cdiv(max(count, images + 1), ORDERED)
    image, order = (boxes.new_empty(count, dtype=torch.int32) for _ in range(2))
    first = boxes.new_empty(images + 1, dtype=torch.int32)
    unsorted = boxes.new_empty(programs, dtype=torch.int32)
    take_order[(programs,)](
        boxes, image, order, first, unsorted, count, images, count.bit_length(), ORDERED=ORDERED, num_warps=4
    )
    if images * count > MOST_LOOKS:
        ordered, places = torch.sort(image, stable=True)
        borders = torch.arange(images + 1, dtype=torch.int32, device=boxes.device)
        return places.to(torch.int32), torch.searchsorted(ordered, borders, out_int32=True)
    if count > 1:
        group_by_image[(images + 1,)](image, order, first, unsorted, count, programs, BOXES=BOXES, num_warps=4)
    return order, first


def boxes_of_strips(
    weights: BoxWeights, order: Tensor, first: Tensor, size: tuple[int, int], block: int
) -> tuple[Tensor, Tensor, int]:
    """lists ``[strips, K]`` and ends ``[images, strips]`` of `list_by_strip`, and the blocks of cells a strip.

    A strip is as many blocks of consecutive cells as hold STRIP_ROWS rows. A map of one strip needs no list of its own.
    """
    height, width = size
    count, images = order.shape[0], first.shape[0] - 1
    blocks = triton.cdiv(STRIP_ROWS * width, block)
    strips = triton.cdiv(height * width, blocks * block)
    if strips == 1:
        return order, first[1:], blocks
    lists = order.new_empty((strips, count))
    ends = order.new_empty((images, strips))
    list_by_strip[(images * strips,)](
        weights.y_bins, order, first, lists, ends,
        count, height * width, width, weights.y_bins.shape[1] - 1, blocks * block, strips,
        BOXES=BOXES, num_warps=4,
    )  # fmt: skip
    return lists, ends, blocks
