"""What the loader hands over: both views of some images with their boxes, or what a GPU makes the views from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scrl_fast.config.schema import ViewsConfig
from scrl_fast.data.pinned import RING
from scrl_fast.ops.augment_views import augment_views
from scrl_fast.ops.view_table import PackedImages


@dataclass
class Batch:
    """Both views of B images.

    views: `[2B, 3, S, S]`, view 1 of all images, then view 2. boxes: two `[N, 5]` float32 of rows (row of views, x0,
    y0, x1, y1) in view pixels, or None (BYOL). crops: int64 `[2, B, 5]`, rows (y, x, h, w, flip) in image pixels.
    labels: int64 `[B]`, -1 where there is none. keys: int64 `[B]`, which image of the source each is.
    """

    views: Tensor
    boxes: tuple[Tensor, Tensor] | None
    crops: Tensor
    labels: Tensor
    keys: Tensor

    @property
    def pairs(self) -> int:
        """Box pairs; without boxes (BYOL) images."""
        return self.views.shape[0] // 2 if self.boxes is None else self.boxes[0].shape[0]

    def to(self, device: torch.device | str, channels_last: bool = True) -> Batch:
        """The batch on a device; copies from pinned memory do not wait. crops and keys stay where they are."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        device = torch.device(device)
        there = all(_is(tensor.device, device) for tensor in (self.views, self.labels, *(self.boxes or ())))
        if there and self.views.is_contiguous(memory_format=layout):
            return self  # each operation would let go of the interpreter, and have to wait until a loader's thread does
        views = self.views.to(device, non_blocking=True)
        if views.is_cuda:
            RING.copied(self.views, device)
        return replace(
            self,
            views=views.contiguous(memory_format=layout),
            boxes=each_of(self.boxes, lambda boxes: boxes.to(device, non_blocking=True)),
            labels=self.labels.to(device, non_blocking=True),
        )


@dataclass
class PackedBatch:
    """Decoded images of which a GPU makes the views; all else as in `Batch`.

    images: what both views are cut from, in one pinned buffer. table: VIEW_DTYPE `[2, B]`.
    """

    images: PackedImages
    table: np.ndarray
    boxes: tuple[Tensor, Tensor] | None
    crops: Tensor
    labels: Tensor
    keys: Tensor

    def make(
        self,
        device: torch.device | str,
        views: ViewsConfig,
        channels_last: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> Batch:
        """The batch on a device, its views made there: uint8 `[bytes]` cross the bus, and nothing is waited for."""
        images = self.images.to(device)
        if images.device.type == "cuda" and isinstance(self.images.buffer, Tensor):
            RING.copied(self.images.buffer, images.device)
        if isinstance(images.buffer, Tensor) and images.buffer.is_cuda:  # decoded there, on another stream
            images.buffer.record_stream(torch.cuda.current_stream(images.device))
        made = augment_views(
            images,
            self.table,
            size=views.size,
            mean=views.mean,
            std=views.std,
            solarize_threshold=views.solarize_threshold,
            dtype=dtype,
            channels_last=channels_last,
        )
        return Batch(made, self.boxes, self.crops, self.labels, self.keys).to(device, channels_last)


def _is(place: torch.device, asked: torch.device) -> bool:
    """Whether a tensor's device is the one asked for, which is the present one of its type if it has no number."""
    if place.type == asked.type == "cuda" and asked.index is None:
        return place.index == torch.cuda.current_device()  # initialised, since a tensor is there
    return place == asked


def each_of(pair: tuple[Any, Any] | None, function: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor] | None:
    """`function` of both, or None for None."""
    return None if pair is None else (function(pair[0]), function(pair[1]))
