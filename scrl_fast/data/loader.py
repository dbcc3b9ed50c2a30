"""Batches of two views with their matched boxes, made ahead by threads, in an order that never depends on them.

Everything about batch b of epoch e follows from (seed, e, b, rank, world size): any number of workers and any start
give the same stream, so a checkpoint needs to hold no more of the loader than epoch and batch.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scrl_fast.config import Config
from scrl_fast.data.bad import BadFiles
from scrl_fast.data.batch import Batch, PackedBatch, each_of
from scrl_fast.data.gpu import cut_to_views, decode_on_gpu, pack_regions
from scrl_fast.data.reader import Reader, Slot
from scrl_fast.data.scaled import Whole
from scrl_fast.data.source import Source
from scrl_fast.data.trace import Trace
from scrl_fast.data.workers import Work, Workers
from scrl_fast.errors import UsageError
from scrl_fast.ops.augment_views import VIEW_DTYPE, PackedImages, augment_views, pack_images
from scrl_fast.philox import permutation

_PART = 16  # images a thread takes at a time: enough to make the drawing of their views cheap
_MOST_HELD = 1 << 26  # bytes of files, or of images that come decoded, at which a thread makes their views
_IN_CACHE = 1 << 19  # bytes of pixels that stay in a core's second cache until their views are made
_MOST_PACKED = 1 << 29  # bytes of a batch's images: 2 MB each for 256; photographs of 500 x 375 take 0.6
_KILLED = (
    "the process before this one was killed, or crashed, while it was reading %s. If a decoder crashed, one of these "
    "files made it: move it away, or have it decoded by another library (SCRL_FAST_JPEG=pillow)"
)
_log = logging.getLogger("scrl_fast")


class LoaderStalled(RuntimeError):
    """No image was finished within the time limit."""


class Loader:
    """Batches of a source as a configuration wants them; `epoch(e)` iterates them.

    config: uses data (workers, prefetch, timeout, max_bad_fraction), views, boxes, model.method and, of train,
    batch_size, accumulate, seed, epochs, max_steps, channels_last. rank, world_size: this process takes every
    world_size-th image of the epoch's order; what does not fill a step (`accumulate` batches in every process) is left
    out of that epoch.
    dtype: of the views. pin_memory: put batches where a GPU can copy them from without waiting.
    packed: hand over decoded images, for a GPU to make the views of; batches too large for that come with views.
    gpu: where JPEGs are to be decoded, if packed; None: on the CPU.
    bad_files_path: bad_files.jsonl. reading_path: a file that names what is being read, should the process crash; what
    one that did left there is said in a warning.
    Raises UsageError if the source has fewer images than one step of all processes.
    """

    def __init__(
        self,
        source: Source,
        config: Config,
        *,
        rank: int = 0,
        world_size: int = 1,
        dtype: torch.dtype = torch.float32,
        pin_memory: bool = False,
        packed: bool = False,
        gpu: torch.device | None = None,
        bad_files_path: str | os.PathLike[str] | None = None,
        reading_path: str | os.PathLike[str] | None = None,
    ) -> None:
        _check(source, config, rank, world_size)
        self.source, self.config, self.rank, self.world_size = source, config, rank, world_size
        self.batch_size, self._seed = config.train.batch_size, config.train.seed
        self._dtype, self._pin_memory = dtype, pin_memory
        self._packed, self._gpu = packed, gpu
        self._bad = BadFiles(len(self) * self.batch_size, config.data.max_bad_fraction, bad_files_path)
        trace = Trace(reading_path, max(1, config.data.workers)) if reading_path else None
        if trace and trace.left:
            _log.warning(_KILLED, "; ".join(trace.left))
        self._workers = Workers(config.data.workers, trace)
        self._reader = Reader(source, config, self._bad, self._workers, keep=packed)
        self._ahead: deque[_Pending] = deque()
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        """Batches per epoch: whole steps of `train.accumulate`."""
        accumulate = self.config.train.accumulate
        return len(self.source) // self.world_size // self.batch_size // accumulate * accumulate

    @property
    def bad_files(self) -> dict[str, str]:
        """Every image that could not be read so far, and why."""
        return dict(self._bad.errors)

    def epoch(self, epoch: int, start_batch: int = 0) -> Generator[Any, None, None]:
        """The batches of an epoch from start_batch on: each a `Batch`, or a `PackedBatch` where they were asked for.

        Raises TooManyBadImages, LoaderStalled, or RuntimeError with the cause when a batch cannot be made.
        """
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch must lie in 0..{len(self)}, got {start_batch}")
        last = False
        try:
            for number in range(start_batch, len(self)):
                self._fill_up(epoch, number)
                batch = self._next()
                last = number + 1 == len(self)
                yield batch
        finally:
            if not last:  # broken off: nothing made ahead is wanted any more
                self._drop()

    def stream(self, epoch: int, start_batch: int, count: int) -> Generator[Any, None, None]:
        """`count` batches from start_batch of an epoch on, over the ends of epochs; raises as `epoch` does."""
        while count > 0:
            here = min(count, len(self) - start_batch)
            with closing(self.epoch(epoch, start_batch)) as made:
                yield from islice(made, here)
            epoch, start_batch, count = epoch + 1, 0, count - here

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside epoch and batch: the bad images counted so far."""
        return {"bad": self._bad.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; from {} too."""
        self._bad.load_state(state.get("bad", {}))

    def close(self) -> None:
        """End the threads. The loader cannot be used after it."""
        self._drop()
        self._workers.stop()

    def _fill_up(self, epoch: int, number: int) -> None:
        """Keep the wanted batch and the `prefetch` after it in the making, into the next epoch, not past the last step.

        Without workers the wanted one is made here and now, and none ahead of it.
        """
        wanted = (epoch, number)
        if self._ahead and self._ahead[0].place != wanted:
            self._drop()
        place = self._after(self._ahead[-1].place) if self._ahead else wanted
        data, train = self.config.data, self.config.train
        end = max(train.epochs, epoch + 1) * len(self)
        if train.max_steps:
            end = min(end, train.max_steps * train.accumulate)
        ahead = data.prefetch if data.workers else 0
        while not self._ahead or (len(self._ahead) <= ahead and place[0] * len(self) + place[1] < end):
            self._ahead.append(self._start(place))
            place = self._after(place)

    def _after(self, place: tuple[int, int]) -> tuple[int, int]:
        epoch, number = place
        return (epoch, number + 1) if number + 1 < len(self) else (epoch + 1, 0)

    def _drop(self) -> None:
        for pending in self._ahead:
            pending.work.cancelled = True
        self._ahead.clear()

    def _next(self) -> Batch | PackedBatch:
        pending = self._ahead.popleft()
        epoch, number = pending.place
        timeout = self.config.data.timeout
        if not pending.work.wait(timeout, self._workers.progress):
            pending.work.cancelled = True
            raise LoaderStalled(
                f"no image was finished for {timeout:g} s (data.timeout) while batch {number} of epoch {epoch} was "
                f"waited for; the workers are reading {self._workers.stalled()}. Is the disk or network share "
                f"answering? If it is only slow, use --data.timeout={2 * timeout:g}"
            )
        error = pending.work.error
        if isinstance(error, (UsageError, KeyboardInterrupt)):
            raise error
        if error is not None:
            raise RuntimeError(
                f"batch {number} of epoch {epoch} cannot be made: {type(error).__name__}: {error}"
            ) from error
        return pending.batch()

    def _start(self, place: tuple[int, int]) -> _Pending:
        epoch, number = place
        if self._order[0] != epoch:
            order = permutation(self._seed, epoch, len(self.source))
            self._order = epoch, order[self.rank :: self.world_size]
        keys = self._order[1][number * self.batch_size : (number + 1) * self.batch_size]
        pending = _Pending(self, place, keys)
        self._workers.submit(pending.work, pending.parts)
        return pending


class _Pending:
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
        loader, reader, epoch = self._loader, self._loader._reader, self.place[0]
        first, end = part * self._part, min((part + 1) * self._part, len(self._keys))
        for low, slots in self._open(first, end):
            table = reader.draw(slots, epoch).T.copy()
            for start, stop in _groups(slots):
                made = [
                    reader.decode(slot, drawn, epoch, self._step, alone=stop - start == 1)
                    for slot, drawn in zip(slots[start:stop], table[start:stop], strict=True)
                ]
                for place, (slot, pixels, rows, crops) in enumerate(made, low + start):
                    self._keys[place], self._labels[place] = slot.key, loader.source.label(slot.key)
                    self._crops[:, place] = crops
                    if loader._packed:
                        self._keep(pixels, rows, place)
                if not loader._packed:
                    fitted = np.stack([rows for _, _, rows, _ in made])
                    self._make_views(pack_images([pixels for _, pixels, _, _ in made]), fitted, low + start)
                del made, pixels  # before the next are decoded

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
                self._make_views(packed, self._table[:, slot][None].copy(), slot)

    def _open(self, first: int, end: int) -> Iterator[tuple[int, list[Slot]]]:
        """Images `first` to `end` with the place of the first of them, in lots that end at `_MOST_HELD` bytes."""
        loader, epoch = self._loader, self.place[0]
        ready: dict[int, Tensor] = {}
        if loader._gpu is not None:
            with loader._reader.reading(
                f"{loader.source.name_of(int(self._keys[first]))} and {end - first - 1} others"
            ):
                ready = decode_on_gpu(loader.source, self._keys[first:end], loader._gpu)
        low, held, slots = first, 0, list[Slot]()
        for place in range(first, end):
            key = int(self._keys[place])
            slots.append(
                Slot(key, 0, key, Whole(ready.pop(key)))
                if key in ready
                else loader._reader.open(key, epoch, self._step)
            )
            data = slots[-1].image.data
            held += len(data) if isinstance(data, bytes) else data.nbytes
            if place + 1 == end or held >= _MOST_HELD:
                yield low, slots
                low, held, slots = place + 1, 0, []

    def _make_views(self, packed: PackedImages, rows: np.ndarray, place: int) -> None:
        """The views of n images with rows `[n, 2]`, into their places from `place` on."""
        views, count, several = self._loader.config.views, len(self._keys), len(rows)
        with self._lock:  # not where the batch is begun: that would have training wait for the interpreter's lock
            if self._views is None:
                self._views = self._empty_views()
        rows["image"] = np.arange(several)[:, None]
        if several == 1:
            parts = [(rows, self._views[place::count])]
        else:
            parts = [(rows[:, view], self._views[view * count + place :][:several]) for view in (0, 1)]
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


def _check(source: Source, config: Config, rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in 0..world_size-1, got rank {rank} of {world_size}")
    for name, least in (("workers", 0), ("prefetch", 0)):
        if not getattr(config.data, name) >= least:
            raise UsageError(f"data.{name} must be at least {least}, got {getattr(config.data, name)}")
    if not config.train.batch_size > 0:
        raise UsageError(f"train.batch_size must be positive, got {config.train.batch_size}")
    check_enough(len(source), config, world_size)


def check_enough(images: int, config: Config, world_size: int = 1) -> None:
    """Raises UsageError, with what would do, unless a data set of so many images fills a step of all processes."""
    train = config.train
    fewest = train.accumulate * world_size  # images in a step of the smallest batch
    if images >= train.batch_size * fewest:
        return
    factors = [f"train.batch_size={train.batch_size}"]
    factors += [f"train.accumulate={train.accumulate}"] if train.accumulate > 1 else []
    factors += [f"{world_size} processes"] if world_size > 1 else []
    smaller = f"use --train.batch_size={images // fewest} or less" if images >= fewest else "there must be more images"
    needed = train.batch_size * fewest
    raise UsageError(f"{' x '.join(factors)} needs {needed} images a step, but the data set has {images}: {smaller}")
