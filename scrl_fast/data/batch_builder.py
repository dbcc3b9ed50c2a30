"""One batch in the making: its memory, and what the threads do to fill it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scrl_fast.data.batch import Batch, PackedBatch, each_of
from scrl_fast.data.gpu import cut_to_views, decode_on_gpu, pack_regions
from scrl_fast.data.reader import Slot
from scrl_fast.data.scaled import Whole, fit_to_shrunk
from scrl_fast.data.workers import Work
from scrl_fast.ops.augment_views import VIEW_DTYPE, PackedImages, augment_views, pack_images

if TYPE_CHECKING:
    from scrl_fast.data.loader import Loader

_PART = 16  # images a thread takes at a time: enough to make the drawing of their views cheap
_MOST_HELD = 1 << 26  # bytes of files, or of images that come decoded, at which a thread makes their views
_IN_CACHE = 1 << 19  # bytes of pixels that stay in a core's second cache until their views are made
_MOST_PACKED = 1 << 29  # bytes of a batch's images: 2 MB each for 256; photographs of 500 x 375 take 0.6


class Pending:
    """A batch being made: its memory, and what the threads do to fill it."""

    def __init__(self, loader: Loader, place: tuple[int, int], keys: NDArray[np.int64]) -> None:
        config, count = loader.config, len(keys)
        self.place, self._loader, self._keys = place, loader, keys.copy()
        self._step = (place[0] * len(loader) + place[1]) // config.train.accumulate + 1
        self._views: Tensor | None = None
        self._images: list[Any] = [None] * count  # packed: pixels that both views are cut from
        self._table = np.zeros((2, count), VIEW_DTYPE)
        self._packed: PackedImages | None = None
        self._bytes, self._lock = 0, threading.Lock()
        self._crops = np.empty((2, count, 5), np.int64)
        self._labels = np.empty(count, np.int64)
        self._boxes: tuple[Any, Any] | None = None
        self._part = min(_PART, -(-count // max(1, config.data.workers)))
        self.parts = -(-count // self._part)
        self.work = Work(self.parts, self._make, self._finish)

    def _empty_views(self) -> Tensor:
        config, count = self._loader.config, len(self._keys)
        layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
        return torch.empty(
            (2 * count, 3, config.views.size, config.views.size),
            dtype=self._loader._dtype,
            pin_memory=self._loader._pin_memory,
            memory_format=layout,
        )

    def _make(self, part: int) -> None:
        reader, epoch = self._loader._reader, self.place[0]
        first, end = part * self._part, min((part + 1) * self._part, len(self._keys))
        for low, slots in self._open(first, end):
            table = reader.draw(slots, epoch)
            for start, stop in _groups(slots):
                self._make_group(slots[start:stop], table[:, start:stop], low + start)

    def _make_group(self, slots: list[Slot], table: np.ndarray, place: int) -> None:
        """The images of `slots` with the rows `[2, n]` of their views, for the places from `place` on.

        As much as can be is done for all at once: what is done for each holds the interpreter, which training needs.
        """
        loader, images, shrinks = self._loader, list[Any](), list[int]()
        for index, slot in enumerate(slots):
            rows = table[:, index]
            slots[index], pixels, shrink = loader._reader.decode(
                slot, rows, self.place[0], self._step, alone=len(slots) == 1
            )
            images.append(pixels)
            shrinks.append(shrink)
        table, crops = fit_to_shrunk(table, shrinks)
        here = slice(place, place + len(slots))
        self._keys[here] = [slot.key for slot in slots]
        self._labels[here] = [loader.source.label(slot.key) for slot in slots]
        self._crops[:, here] = crops
        if loader._packed:
            for index, pixels in enumerate(images):
                self._keep(pixels, table[:, index], place + index)
        else:
            self._make_views(pack_images(images), table, place)

    def _keep(self, pixels: Any, rows: np.ndarray, place: int) -> None:
        """Hold what views are cut from, or make the views if the batch has grown too large for the GPU to do it."""
        region = cut_to_views(pixels, rows)
        self._table[:, place] = rows
        self._table["image"][:, place] = place
        with self._lock:
            self._bytes += region.nbytes
            if self._views is None and self._bytes > _MOST_PACKED:
                self._views = self._empty_views()
        self._images[place] = region
        if self._views is not None:
            self._make_held_views(range(place, place + 1))

    def _make_held_views(self, slots: range) -> None:
        for slot in slots:
            if self._images[slot] is not None:
                image, self._images[slot] = self._images[slot], None
                packed = pack_regions([image], gpu=self._loader._gpu, on_host=True).numpy()
                self._make_views(packed, self._table[:, slot : slot + 1].copy(), slot)

    def _open(self, first: int, end: int) -> Iterator[tuple[int, list[Slot]]]:
        """Images `first` to `end` with the place of the first of them, in lots that end at `_MOST_HELD` bytes."""
        loader, epoch = self._loader, self.place[0]
        low, held, slots = first, 0, list[Slot]()
        for place in range(first, end):
            slots.append(loader._reader.open(int(self._keys[place]), epoch, self._step))
            data = slots[-1].image.data
            held += len(data) if isinstance(data, bytes) else data.nbytes
            if place + 1 == end or held >= _MOST_HELD:
                if loader._gpu is not None:
                    self._decode_on_gpu(slots, loader._gpu)
                yield low, slots
                low, held, slots = place + 1, 0, []

    def _decode_on_gpu(self, slots: list[Slot], gpu: torch.device) -> None:
        """Puts pixels in place of the files that the GPU decodes; the others stay, and are not read again."""
        reader, first = self._loader._reader, self._loader.source.name_of(slots[0].key)
        with reader.reading(f"{first} and {len(slots) - 1} others"):
            for index, pixels in decode_on_gpu([slot.image for slot in slots], gpu).items():
                slots[index] = slots[index]._replace(image=Whole(pixels))

    def _make_views(self, packed: PackedImages, rows: np.ndarray, place: int) -> None:
        """The views of n images with rows `[2, n]`, into their places from `place` on."""
        views, count, several = self._loader.config.views, len(self._keys), rows.shape[1]
        with self._lock:  # not where the batch is begun: that would have training wait for the interpreter's lock
            if self._views is None:
                self._views = self._empty_views()
        rows["image"] = np.arange(several)
        if several == 1:
            parts = [(rows, self._views[place::count])]
        else:
            parts = [(rows[view], self._views[view * count + place :][:several]) for view in (0, 1)]
        for part, out in parts:
            augment_views(
                packed,
                part,
                size=views.size,
                mean=views.mean,
                std=views.std,
                solarize_threshold=views.solarize_threshold,
                out=out,
                checked=True,  # drawn for the sizes that `decode` makes sure of
            )

    def _finish(self) -> None:
        config = self._loader.config
        if self._loader._packed:
            self._pack()
        if config.model.method == "byol":
            return
        from scrl_fast.ops import sample_box_pairs

        self._boxes = sample_box_pairs(
            self._crops[0],
            self._crops[1],
            view_size=config.views.size,
            boxes_per_image=config.boxes.per_image,
            min_size=config.boxes.min_size,
            iou_threshold=config.boxes.iou_threshold,
            grid=config.boxes.grid,
            jitter=config.boxes.jitter,
            seed=self._loader._seed,
            step=self.place[0],
            keys=self._keys,
        )

    def _pack(self) -> None:
        if self._views is None:
            self._packed = pack_regions(self._images, pin_memory=self._loader._pin_memory, gpu=self._loader._gpu)
        else:  # on the GPU they would need more memory than is saved: also the views of those held so far are made here
            self._make_held_views(range(len(self._images)))
        self._images = []

    def batch(self) -> Batch | PackedBatch:
        pin = Tensor.pin_memory if self._loader._pin_memory else lambda tensor: tensor
        boxes = each_of(self._boxes, lambda rows: pin(torch.from_numpy(rows)))
        rest = (
            *(boxes, torch.from_numpy(self._crops)),
            *(pin(torch.from_numpy(self._labels)), torch.from_numpy(self._keys)),
        )
        if self._packed is not None:
            return PackedBatch(self._packed, self._table, *rest)
        assert self._views is not None
        return Batch(self._views, *rest)


def _groups(slots: Sequence[Slot]) -> Iterator[tuple[int, int]]:
    """Starts and ends of images that together fill the cache, so that they are decoded and made views of together.

    Each of 500 x 375 is one; of smaller ones, several share what a call costs.
    """
    start, size = 0, 0
    for stop, slot in enumerate(slots, 1):
        size += slot.image.height * slot.image.width * 3
        if size >= _IN_CACHE or stop == len(slots):
            yield start, stop
            start, size = stop, 0
