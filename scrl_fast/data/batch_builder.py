"""One batch in the making: its memory, and what the threads do to fill it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scrl_fast.config.schema import Config
from scrl_fast.data import pinned
from scrl_fast.data.batch import Batch, PackedBatch, each_of
from scrl_fast.data.gpu import cut_to_views, decode_on_gpu, pack_regions
from scrl_fast.data.image_files import Reservation
from scrl_fast.data.reader import BatchItem, Reader
from scrl_fast.data.scaled import DecodedImage, fit_to_shrunk
from scrl_fast.data.workers import Work
from scrl_fast.ops.augment_views import augment_views
from scrl_fast.ops.view_table import VIEW_DTYPE, PackedImages, pack_images

_PART = 16  # images a thread takes at a time: enough to make the drawing of their views cheap
_MOST_HELD = 1 << 26  # bytes of files, or of images that come decoded, at which a thread makes their views
_IN_CACHE = 1 << 19  # bytes of pixels that stay in a core's second cache until their views are made
_MOST_PACKED = 1 << 29  # bytes of a batch's images: 2 MB each for 256; photographs of 500 x 375 take 0.6


@dataclass(frozen=True)
class BatchSpec:
    """How a loader makes its batches; the fields are the arguments and attributes of `Loader` with the same names."""

    config: Config
    reader: Reader
    workers: int
    dtype: torch.dtype
    pin_memory: bool
    packed: bool
    gpu: torch.device | None


class BatchBuilder:
    """A batch in the making: its memory, and what the threads do to fill it.

    place: (epoch, batch). keys: which images of the source. step: the step that the batch is for.
    """

    def __init__(self, spec: BatchSpec, place: tuple[int, int], keys: NDArray[np.int64], step: int) -> None:
        count = len(keys)
        self.place, self._spec, self._keys, self._step = place, spec, keys.copy(), step
        self._views: Tensor | None = None
        self._images: list[Any] = [None] * count  # packed: pixels that both views are cut from
        self._table = np.zeros((2, count), VIEW_DTYPE)
        self._packed: PackedImages | None = None
        self._bytes, self._lock = 0, threading.Lock()
        self._crops = np.empty((2, count, 5), np.int64)
        self._labels = np.empty(count, np.int64)
        self._boxes: tuple[Any, Any] | None = None
        self._part = min(_PART, -(-count // max(1, spec.workers)))
        self.work = Work(-(-count // self._part), self._make, self._finish)

    def _empty_views(self) -> Tensor:
        config, count = self._spec.config, len(self._keys)
        layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
        shape = 2 * count, 3, config.views.size, config.views.size
        return pinned.empty(shape, pin_memory=self._spec.pin_memory, dtype=self._spec.dtype, memory_format=layout)

    def _make(self, part: int) -> None:
        reader, epoch = self._spec.reader, self.place[0]
        first, end = part * self._part, min((part + 1) * self._part, len(self._keys))
        for low, items in self._open(first, end):
            table = reader.draw(items, epoch)
            for start, stop in _groups(items):
                with reader.memory.reserved(sum(item.image.decoding_bytes for item in items[start:stop])) as held:
                    self._make_group(items[start:stop], table[:, start:stop], low + start, held)

    def _make_group(self, items: list[BatchItem], table: np.ndarray, place: int, held: Reservation) -> None:
        """The images of `items` with the rows `[2, n]` of their views, for the places from `place` on.

        held: the memory that the thread holds for decoding them.

        As much as can be is done for all at once: what is done for each holds the interpreter, which training needs.
        """
        reader, images, shrinks = self._spec.reader, list[Any](), list[int]()
        for index, item in enumerate(items):
            rows = table[:, index]
            alone = len(items) == 1
            items[index], pixels, shrink = reader.decode(item, rows, self.place[0], self._step, held=held, alone=alone)
            images.append(pixels)
            shrinks.append(shrink)
        table, crops = fit_to_shrunk(table, shrinks)
        here = slice(place, place + len(items))
        self._keys[here] = [item.key for item in items]
        self._labels[here] = [reader.source.label(item.key) for item in items]
        self._crops[:, here] = crops
        if self._spec.packed:
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

    def _make_held_views(self, items: range) -> None:
        for item in items:
            if self._images[item] is not None:
                image, self._images[item] = self._images[item], None
                packed = pack_regions([image], gpu=self._spec.gpu, on_host=True).numpy()
                self._make_views(packed, self._table[:, item : item + 1].copy(), item)

    def _open(self, first: int, end: int) -> Iterator[tuple[int, list[BatchItem]]]:
        """Images `first` to `end` with the place of the first of them, in lots that end at `_MOST_HELD` bytes."""
        spec, epoch = self._spec, self.place[0]
        low, held, items = first, 0, list[BatchItem]()
        for place in range(first, end):
            items.append(spec.reader.open(int(self._keys[place]), epoch, self._step))
            data = items[-1].image.data
            held += len(data) if isinstance(data, bytes) else data.nbytes
            if place + 1 == end or held >= _MOST_HELD:
                if spec.gpu is not None:
                    self._decode_on_gpu(items, spec.gpu)
                yield low, items
                low, held, items = place + 1, 0, []

    def _decode_on_gpu(self, items: list[BatchItem], gpu: torch.device) -> None:
        """Puts pixels in place of the files that the GPU decodes; the others stay, and are not read again."""
        reader, first = self._spec.reader, self._spec.reader.source.name_of(items[0].key)
        with reader.reading(f"{first} and {len(items) - 1} others"):
            for index, pixels in decode_on_gpu([item.image for item in items], gpu).items():
                items[index] = items[index]._replace(image=DecodedImage(pixels))

    def _make_views(self, packed: PackedImages, rows: np.ndarray, place: int) -> None:
        """The views of n images with rows `[2, n]`, into their places from `place` on."""
        views, count, several = self._spec.config.views, len(self._keys), rows.shape[1]
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
        config = self._spec.config
        if self._spec.packed:
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
            seed=config.train.seed,
            step=self.place[0],
            keys=self._keys,
        )

    def _pack(self) -> None:
        if self._views is None:
            self._packed = pack_regions(self._images, pin_memory=self._spec.pin_memory, gpu=self._spec.gpu)
        else:  # on the GPU they would need more memory than is saved: also the views of those held so far are made here
            self._make_held_views(range(len(self._images)))
        self._images = []

    def batch(self) -> Batch | PackedBatch:
        pin = Tensor.pin_memory if self._spec.pin_memory else lambda tensor: tensor
        boxes = each_of(self._boxes, lambda rows: pin(torch.from_numpy(rows)))
        rest = (
            *(boxes, torch.from_numpy(self._crops)),
            *(pin(torch.from_numpy(self._labels)), torch.from_numpy(self._keys)),
        )
        if self._packed is not None:
            return PackedBatch(self._packed, self._table, *rest)
        assert self._views is not None
        return Batch(self._views, *rest)


def _groups(items: Sequence[BatchItem]) -> Iterator[tuple[int, int]]:
    """Starts and ends of images that together fill the cache, so that they are decoded and made views of together.

    Each of 500 x 375 is one; of smaller ones, several share what a call costs.
    """
    start, size = 0, 0
    for stop, item in enumerate(items, 1):
        size += item.image.height * item.image.width * 3
        if size >= _IN_CACHE or stop == len(items):
            yield start, stop
            start, size = stop, 0
