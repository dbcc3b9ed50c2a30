"""Batches whose views a GPU makes: regions of decoded images in one buffer, and JPEGs decoded by the GPU itself."""

from __future__ import annotations

import functools
import io
import logging
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scrl_fast.config.schema import DataConfig
from scrl_fast.data import pinned
from scrl_fast.data.decode import Encoded
from scrl_fast.errors import UsageError
from scrl_fast.ops.backends import triton_failure
from scrl_fast.ops.view_table import PackedImages

_log = logging.getLogger("scrl_fast")


def views_on_gpu(data: DataConfig, device: torch.device) -> bool:
    """Whether `data.pixels` and `data.decode` put the views on the GPU that trains.

    Raises ValueError naming the option and what is missing when one asks for what cannot be had.
    """
    missing = "training runs on the CPU" if device.type != "cuda" else triton_failure("cuda")
    if data.pixels == "gpu" and missing:
        raise UsageError(f"data.pixels=gpu cannot be had: {missing}; use --data.pixels=cpu")
    if data.decode == "gpu":
        missing = missing or ("data.pixels=cpu" if data.pixels == "cpu" else gpu_decoder_failure(device))
        if missing:
            raise UsageError(f"data.decode=gpu cannot be had: {missing}; use --data.decode=cpu")
    return data.pixels != "cpu" and not missing


def cut_to_views(pixels: Any, rows: np.ndarray) -> Any:
    """The part of an image `[H, W, 3]` that its views are cut from; their crops move with it, in place.

    Of an array, a clearly smaller part is a copy, so that a whole photograph is not kept for a corner of it.
    """
    y, x = int(rows["y"].min()), int(rows["x"].min())
    bottom, right = int((rows["y"] + rows["h"]).max()), int((rows["x"] + rows["w"]).max())
    rows["y"] -= y
    rows["x"] -= x
    region = pixels[y:bottom, x:right]
    return region.copy() if isinstance(region, np.ndarray) and 4 * region.nbytes < 3 * pixels.nbytes else region


def pack_regions(
    images: Sequence[Any], *, pin_memory: bool = False, gpu: torch.device | None = None, on_host: bool = False
) -> PackedImages:
    """Images `[H, W, 3]`, arrays or tensors, side by side in one tensor: pinned if asked for, or on a GPU.

    gpu: where `decode_on_gpu` made some of them; the result lies there too, unless on_host.
    """
    sizes = np.array([image.shape[0] * image.shape[1] * 3 for image in images], np.int64)
    offsets = np.cumsum(sizes) - sizes
    shapes = np.array([image.shape[:2] for image in images], np.int64).reshape(-1, 2)
    with _beside_training(gpu):
        if gpu is None or on_host:
            buffer = pinned.empty([int(sizes.sum())], dtype=torch.uint8, pin_memory=pin_memory)
        else:
            buffer = torch.empty(int(sizes.sum()), dtype=torch.uint8, device=gpu)
        for image, start, size in zip(images, offsets, sizes, strict=True):
            place = buffer[start : start + size].view(image.shape)
            if isinstance(image, Tensor) or buffer.is_cuda:
                place.copy_(image if isinstance(image, Tensor) else torch.from_numpy(np.array(image)))
            else:
                place.numpy()[:] = image
        if gpu is not None and gpu.type == "cuda":
            torch.cuda.current_stream(gpu).synchronize()  # the batch is used on another stream
    return PackedImages(buffer, offsets, shapes[:, 0].copy(), shapes[:, 1].copy())


def decode_on_gpu(images: Sequence[Any], gpu: torch.device) -> dict[int, Tensor]:
    """Those of the opened images that are plain, upright JPEGs, decoded by the GPU: place -> uint8 `[H, W, 3]` there.

    images: `Encoded`, or others, which are left out. Damaged ones are left to the CPU's decoders, which name what is
    wrong. When the GPU decodes none of them, out of memory for example, the first error of each kind is logged.
    """
    found = {
        place: image
        for place, image in enumerate(images)
        if isinstance(image, Encoded) and image.is_upright_baseline_jpeg
    }
    try:
        with _beside_training(gpu):
            pixels = _decode([encoded.data for encoded in found.values()], gpu)
    except RuntimeError as error:  # one damaged file fails all
        _tell_once(type(error), f"{error}".partition("\n")[0])
        return {}
    made = {}
    for (place, encoded), image in zip(found.items(), pixels, strict=True):
        if image.shape == (encoded.height, encoded.width, 3):
            made[place] = image
    return made


_told: set[type] = set()


def _tell_once(kind: type, text: str) -> None:
    if kind not in _told:
        _told.add(kind)
        _log.warning(
            "data.decode=gpu: some images at a time that hold a damaged one, or for which memory lacks, are decoded by "
            "the CPU; the first such error: %s: %s",
            *(kind.__name__, text),
        )


def _beside_training(gpu: torch.device | None) -> AbstractContextManager[object]:
    """Work on a stream of the loader's own: that of training would make threads wait for whole steps."""
    return nullcontext() if gpu is None or gpu.type != "cuda" else torch.cuda.stream(_stream(gpu))


@functools.cache
def _stream(gpu: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(gpu)


def gpu_decoder_failure(device: torch.device) -> str:
    """'' when torchvision decodes JPEGs on the device, else why not."""
    return _failure(str(device))


@functools.cache
def _failure(device: str) -> str:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 90)).save(file, "JPEG")
    try:
        shape = tuple(_decode([file.getvalue()], torch.device(device))[0].shape)
        return "" if shape == (16, 16, 3) else f"torchvision's decoder gives a picture of shape {shape}"
    except Exception as error:  # no nvJPEG in this torchvision, no driver, no such function any more
        return f"torchvision.io.decode_jpeg on {device}: {type(error).__name__}: {error}".splitlines()[0]


def _decode(files: Sequence[bytes], device: torch.device) -> list[Tensor]:
    """RGB, uint8 `[H, W, 3]` on the device, not turned by EXIF."""
    if not files:
        return []
    from torchvision.io import ImageReadMode, decode_jpeg

    encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces its removal on every call
        pixels = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)
    return [image.permute(1, 2, 0) for image in pixels]
