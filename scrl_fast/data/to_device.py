"""Batches on a GPU: levels 0..255 cross the bus one batch ahead of the step, and become views where they arrive.

Either as views, which are then normalised, or as decoded images, of which the views are then made: a quarter of the
bytes of float32 views, or somewhat less than half, and copy and work run beside the computation.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from scrl_fast.config.schema import ViewsConfig
from scrl_fast.data.batch import Batch, PackedBatch
from scrl_fast.ops.view_table import normalization


def on_device(
    batches: Generator[Batch | PackedBatch, None, None],
    device: torch.device | str,
    views: ViewsConfig,
    *,
    channels_last: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Generator[Batch, None, None]:
    """The batches on the device; on a GPU the next one is copied while the present one is in use.

    batches: `Loader.epoch(...)`, of a Loader with `dtype=torch.uint8, pin_memory=True` for a GPU, packed or not. Views
    of uint8 become `(level / 255 - views.mean) / views.std` in `dtype`, those of packed images are made in it, all
    others stay as they are; `crops` and `keys` stay on the CPU. For the CPU nothing is read ahead or copied. Closing
    this iterator closes `batches`.
    """
    device = torch.device(device)
    stream = None if device.type == "cpu" else torch.cuda.Stream(device)
    with closing(batches):
        with _work_on(stream):  # what is made on a stream is given back to it, so nothing of it is overwritten too soon
            scale, shift = (torch.from_numpy(c).to(device) for c in normalization(views.mean, views.std))

        def move(batch: Batch | PackedBatch) -> Batch:
            if isinstance(batch, PackedBatch):
                return batch.make(device, views, channels_last, dtype)
            moved = batch.to(device, channels_last)
            if moved.views.dtype != torch.uint8:
                return moved
            return replace(moved, views=normalize(moved.views, scale, shift, dtype))

        yield from map(move, batches) if stream is None else _one_ahead(batches, move, stream)


def normalize(levels: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`level * scale + shift` of uint8 `[N, 3, H, W]`, computed in float32, same layout; see `normalization`."""
    values = levels.to(torch.float32)
    return values.mul_(scale.view(3, 1, 1)).add_(shift.view(3, 1, 1)).to(dtype)


def _one_ahead(
    batches: Iterator[Batch | PackedBatch], move: Callable[[Batch | PackedBatch], Batch], stream: torch.cuda.Stream
) -> Generator[Batch, None, None]:
    """Batches moved on `stream`, the next one begun before each is handed over.

    The consumer's stream waits for the event of its batch, the CPU for nothing. Pinned memory that a copy still reads
    is kept by `PinnedRing` and PyTorch's host allocator.
    """

    def begin() -> tuple[Batch, torch.cuda.Event] | None:
        batch = next(batches, None)
        if batch is None:
            return None
        with _work_on(stream):
            moved = move(batch)
        return moved, stream.record_event()

    ahead = begin()
    while ahead is not None:
        present, ahead = ahead, begin()
        batch, ready = present
        consumer = torch.cuda.current_stream(stream.device)
        consumer.wait_event(ready)
        for tensor in (batch.views, batch.labels, *(batch.boxes or ())):
            tensor.record_stream(consumer)  # else its memory could be filled anew before the consumer is done with it
        del present
        yield batch
        del batch, tensor


def _work_on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)
