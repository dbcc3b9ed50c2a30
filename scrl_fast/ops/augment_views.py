"""From decoded images to normalised views: crop, resize, flip, colour, blur, solarise, in one operation.

The reference makes one view at a time with Pillow and torchvision, as the published pipelines do. What a view looks
like is decided before, in a table (`scrl_fast.data.views.draw_views`), so every implementation makes the same picture.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

from scrl_fast.ops import _native
from scrl_fast.ops._arguments import check_integer, check_number, check_room, shown
from scrl_fast.ops.augment_views_triton import triton_augment_views
from scrl_fast.ops.backends import Backend, Operation, register, triton_failure
from scrl_fast.ops.view_table import (
    GAUSSIAN_BLUR,
    GAUSSIAN_TAPS,
    NO_BLUR,
    RESIZE_BLUR,
    VIEW_DTYPE,
    PackedImages,
    blurred_side,
    normalization,
)

_LARGEST_SIZE = 1 << 14  # a view's pixels are counted in 32 bits
_LARGEST_CROP = 1 << 24  # and so are the pixels of a crop's row in vectors
_JITTERS = ("brightness", "contrast", "saturation", "hue")
_NEUTRAL = {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)  # in the order of the compiled form


def augment_views(
    images: PackedImages,
    table: np.ndarray,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    solarize_threshold: int = 128,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    threads: int = 1,
    out: Tensor | None = None,
    checked: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """Make the views of a table: `[V, 3, size, size]`, row v from `table.reshape(-1)[v]` (`[2, B]`: all view 1 first).

    Per view: crop (taps never reach outside the crop), bicubic antialiased resize with Pillow's filter, flip, jitter in
    the drawn order (contrast towards the mean grey of the picture at that moment), grayscale, blur, solarise, each on
    uint8; then `(value / 255 - mean) / std`.
    images: packed RGB; from a GPU's memory the views are made on that GPU. table: VIEW_DTYPE. size: pixels.
    mean, std: three each, for values in 0..1.
    solarize_threshold: values from this on are inverted. dtype: float32, bfloat16, float16, or uint8 for levels 0..255
    as they are before normalisation (mean and std are then not used).
    channels_last: memory format of the result. threads: at most so many; 1 for callers that run many calls at once.
    out: written and returned if given; dtype and channels_last are then its own. Each view must be dense in either
    memory format, but other views may lie between them (`all_views[3::batch_size]`).
    checked: `check_views` has been called for these images and rows; for callers with few views a call.
    Raises TypeError or ValueError naming the argument and the first bad row before any pixel is touched.
    Source: SCRL section 4, BYOL appendix B; semantics of torchvision's transforms on Pillow images.
    """
    if not checked and isinstance(table, np.ndarray):
        check_room("table", table.size, table.itemsize)
    rows = table.reshape(-1) if checked else check_views(table, images)
    size, threads = check_integer("size", size, 1, _LARGEST_SIZE), check_integer("threads", threads, 1, 1 << 16)
    mean, std = (
        values.tolist() if isinstance(values, Tensor) and values.ndim == 1 else values for values in (mean, std)
    )
    solarize_threshold = _check_numbers(mean, std, solarize_threshold)
    shape, device = (len(rows), 3, size, size), images.device
    if out is None:
        check_room("the views", math.prod(shape), getattr(dtype, "itemsize", 1), device.type)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        out = torch.empty(shape, dtype=dtype, device=device, memory_format=layout)
    _check_out(out, shape, device)
    if len(rows):
        make = _OPERATION.resolve(device.type, backend)
        make(images, rows, out, mean=mean, std=std, solarize_threshold=solarize_threshold, threads=threads)
    return out


def augment_views_reference(
    images: PackedImages,
    rows: np.ndarray,
    out: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    solarize_threshold: int = 128,
    threads: int = 1,
) -> None:
    """One view after the other with Pillow and torchvision, on one thread; arguments checked by `augment_views`."""
    scale, shift = normalization(mean, std)
    images, result = images.numpy(), out
    if result.device.type != "cpu":
        out = torch.empty_like(result, device="cpu")
    for row, view in zip(rows, out, strict=True):
        picture = view_reference(images.image(row["image"]), row, out.shape[-1], solarize_threshold)
        values = np.transpose(picture if out.dtype == torch.uint8 else picture * scale + shift, (2, 0, 1))
        if out.dtype in (torch.float32, torch.uint8):  # PyTorch would start threads of its own in every loader thread
            view.numpy()[:] = values
        else:
            view.copy_(torch.from_numpy(values))
    if result is not out:
        result.copy_(out)


def view_reference(image: NDArray[np.uint8], row: np.void, size: int, solarize_threshold: int) -> NDArray[np.uint8]:
    """One view before normalisation: uint8 `[size, size, 3]`."""
    from PIL import Image

    y, x, h, w = (int(row[name]) for name in "yxhw")
    return np.asarray(picture_reference(Image.fromarray(image[y : y + h, x : x + w]), row, size, solarize_threshold))


def picture_reference(picture: Image.Image, row: np.void, size: int, solarize_threshold: int) -> Image.Image:
    """What becomes of the crop of a view, Pillow image in and out."""
    from PIL import Image
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    if row["flip"]:
        picture = F.horizontal_flip(picture)
    if row["jitter"]:
        for name in (_JITTERS[step] for step in row["order"]):
            if row[name] != _NEUTRAL[name]:  # the way to hue and back alone would move pixels by one or two
                picture = getattr(F, f"adjust_{name}")(picture, float(row[name]))
    if row["grayscale"]:
        picture = F.rgb_to_grayscale(picture, num_output_channels=3)
    if row["blur"] == RESIZE_BLUR:
        small = blurred_side(size, float(row["blur_amount"]))
        for side in (small, size):
            picture = F.resize(picture, [side, side], InterpolationMode.BICUBIC)
    elif row["blur"] == GAUSSIAN_BLUR:
        taps = min(GAUSSIAN_TAPS, 2 * size - 1)  # reflection reaches at most size - 1 pixels beyond the edge
        picture = F.gaussian_blur(picture, [taps, taps], [float(row["blur_amount"])] * 2)
    if row["solarize"]:
        picture = F.solarize(picture, solarize_threshold)
    return picture


def check_views(table: np.ndarray, images: PackedImages) -> np.ndarray:
    """The rows of a table, flat. Raises TypeError or ValueError as `augment_views` does."""
    if not isinstance(table, np.ndarray) or table.dtype != VIEW_DTYPE:
        raise TypeError(f"table must be a NumPy array of VIEW_DTYPE, got {getattr(table, 'dtype', type(table))}")
    _check_images(images)
    rows = table.reshape(-1)
    _refuse(
        rows, (rows["image"] < 0) | (rows["image"] >= len(images.offsets)), "image", f"0..{len(images.offsets) - 1}"
    )
    heights, widths = images.heights[rows["image"]], images.widths[rows["image"]]
    y, x, h, w = (rows[name].astype(np.int64) for name in "yxhw")
    inside = (y >= 0) & (x >= 0) & (h > 0) & (w > 0) & (y + h <= heights) & (x + w <= widths)
    _refuse(rows, ~inside, ["y", "x", "h", "w"], "a crop inside its image")
    _refuse(rows, (h > _LARGEST_CROP) | (w > _LARGEST_CROP), ["h", "w"], f"at most {_LARGEST_CROP}")
    _refuse(rows, (np.sort(rows["order"]) != np.arange(4)).any(axis=1), "order", "a permutation of 0, 1, 2, 3")
    for name in ("brightness", "contrast", "saturation"):
        _refuse(rows, ~((rows[name] >= 0) & np.isfinite(rows[name])), name, "a factor >= 0")
    _refuse(rows, ~(np.abs(rows["hue"]) <= 0.5), "hue", "-0.5 to 0.5")
    _refuse(rows, rows["blur"] > GAUSSIAN_BLUR, "blur", "0, 1 or 2")
    least = np.where(rows["blur"] == RESIZE_BLUR, 1.0, 1e-3)
    enough = (rows["blur_amount"] >= least) & np.isfinite(rows["blur_amount"])
    _refuse(
        rows, (rows["blur"] != NO_BLUR) & ~enough, "blur_amount", "a factor >= 1 (resize) or a sigma > 0 (gaussian)"
    )
    return rows


def _refuse(rows: np.ndarray, bad: np.ndarray, names: str | list[str], wanted: str) -> None:
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"table row {row}: {names} must be {wanted}, got {rows[names][row]}")


def _check_numbers(mean: Sequence[float], std: Sequence[float], threshold: float) -> int:
    """The least level that is solarised."""
    for name, values in (("mean", mean), ("std", std)):
        fits = isinstance(values, Sequence) or (isinstance(values, np.ndarray) and values.ndim == 1)
        if isinstance(values, str) or not fits or len(values) != 3:
            raise ValueError(f"{name} must hold three numbers, got {shown(values)}")
        for value in values:
            if check_number(name, value) <= 0 and name == "std":
                raise ValueError(f"std must be positive, got {shown(value)}")
    return math.ceil(min(max(check_number("solarize_threshold", threshold, finite=False), 0), 256))


def _check_images(images: PackedImages) -> None:
    count = len(images.offsets)
    buffer = images.buffer
    dense = buffer.is_contiguous() if isinstance(buffer, Tensor) else buffer.flags.c_contiguous
    if buffer.dtype not in (np.uint8, torch.uint8) or buffer.ndim != 1 or not dense:
        raise TypeError(f"images.buffer must be contiguous uint8 [bytes], got {buffer.dtype} {list(buffer.shape)}")
    for name, values in (("offsets", images.offsets), ("heights", images.heights), ("widths", images.widths)):
        if not isinstance(values, np.ndarray) or values.dtype != np.int64 or values.shape != (count,):
            got = f"{values.dtype} {list(values.shape)}" if isinstance(values, np.ndarray) else type(values).__name__
            raise TypeError(f"images.{name} must be an int64 array [{count}], as offsets is, got {got}")
    bytes = len(images.buffer)  # by division: a product of sizes that no image has would wrap
    fine = (images.offsets >= 0) & (images.offsets <= bytes) & (images.heights > 0)
    fine &= (images.widths > 0) & (images.widths <= bytes)
    rows = (bytes - np.where(fine, images.offsets, 0)) // (3 * np.where(fine, images.widths, 1))
    bad = ~fine | (images.heights > rows)
    if bad.any():
        raise ValueError(f"images: image {int(bad.argmax())} is empty or reaches outside the buffer")


def _check_out(out: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if out.dtype not in DTYPES or out.device != device:
        known = "float32, bfloat16, float16 or uint8"
        raise TypeError(f"dtype must be {known}, on {device} as the images are, got {out.dtype} on {out.device}")
    if out.shape != shape:
        raise ValueError(f"out must have shape {list(shape)}, got {list(out.shape)}")
    if len(out) and _is_nchw(out) is None:
        raise ValueError(f"out must hold views that are dense, NCHW or channels_last, got strides {out.stride()}")


def _is_nchw(out: Tensor) -> bool | None:
    """Whether each view lies plane by plane; False for channels_last, None for neither."""
    side, strides = out.shape[-1], out.stride()[1:]
    if strides == (side * side, side, 1):
        return True
    if strides == (1, 3 * side, 3):
        return False
    if out[:1].is_contiguous():  # of one pixel, or no view at all
        return True
    return False if out[:1].is_contiguous(memory_format=torch.channels_last) else None


def _native_augment_views(
    images: PackedImages,
    rows: np.ndarray,
    out: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    solarize_threshold: int = 128,
    threads: int = 1,
) -> None:
    buffer = images.buffer if isinstance(images.buffer, np.ndarray) else images.numpy().buffer
    scale, shift = ((1.0,) * 3, (0.0,) * 3) if out.dtype == torch.uint8 else _scale_and_shift((*mean,), (*std,))
    _native.host().augment_views(
        buffer, images.offsets, images.widths, rows if rows.flags.c_contiguous else rows.copy(), out.data_ptr(),
        out.stride(0) * out.element_size(), out.shape[-1], DTYPES.index(out.dtype), not _is_nchw(out), scale, shift,
        solarize_threshold, GAUSSIAN_TAPS, threads,
    )  # fmt: skip


@functools.cache
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[list[float], list[float]]:
    scale, shift = normalization(mean, std)
    return scale.tolist(), shift.tolist()


def _native_failure(device_type: str) -> str:
    return _native.host_failure("augment_views")


_OPERATION = register(
    Operation(
        "augment_views",
        reference=augment_views_reference,
        native=_native_augment_views,
        triton=triton_augment_views,
        native_failure=_native_failure,
        triton_failure=triton_failure,
        native_on=("cpu",),  # the loader's side, also of a run on a GPU
        triton_on=("cpu", "cuda") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",),
    )
)
