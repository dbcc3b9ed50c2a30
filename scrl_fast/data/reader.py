"""Images by place, for the threads that make batches: opened first, decoded when their views are known, and another in
place of each that cannot be read."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from scrl_fast.config.schema import Config
from scrl_fast.data.bad_images import IN_A_ROW, BadFiles, TooManyBadImages
from scrl_fast.data.decode import Encoded, PixelBuffer
from scrl_fast.data.image_files import BadImage, Reservation, memory_budget
from scrl_fast.data.scaled import DecodedImage, largest_shrink, open_image
from scrl_fast.data.sources.base import Source
from scrl_fast.data.views import draw_views
from scrl_fast.data.workers import Workers
from scrl_fast.ops.philox import uniforms

_BUFFER_BYTES = 1 << 24  # bytes a thread keeps for the pixels of one image: 5.6 megapixels
_REPLACEMENT = 0x72657061


class BatchItem(NamedTuple):
    """A place in a batch: the image asked for, how many were tried before the one that it got, that one's key."""

    asked: int
    attempt: int
    key: int
    image: Encoded | DecodedImage


class Reading:
    """Context: reports to the workers the file that the calling thread is reading."""

    __slots__ = ("_name", "_workers")  # made for every image: a generator would take longer than some reads

    def __init__(self, workers: Workers, name: str) -> None:
        self._workers, self._name = workers, name

    def __enter__(self) -> None:
        self._workers.reads(self._name)

    def __exit__(self, *_: object) -> None:
        self._workers.finished()


class Reader:
    """What is read depends on (seed, epoch, image asked for) only.

    bad: counts what cannot be read. workers: told what its threads are reading. keep: pixels of one image must outlast
    the reading of the next.
    """

    def __init__(self, source: Source, config: Config, bad: BadFiles, workers: Workers, *, keep: bool) -> None:
        self.source, self._views, self._seed = source, config.views, config.train.seed
        self._scaled, self._bad, self._workers, self._keep = config.data.scaled_decode, bad, workers, keep
        self.memory = memory_budget(config.data.decode_memory)
        self._buffers = threading.local()

    def open(self, key: int, epoch: int, step: int = 0, attempt: int = 0) -> BatchItem:
        """Image `key`, or in place of one that cannot be read another that (seed, epoch, key) decides.

        step: for which it is read, to be named with what is bad. attempt: how many images were tried before.
        Raises TooManyBadImages.
        """
        for number in range(attempt, IN_A_ROW):
            candidate = key
            if number:
                u = uniforms(self._seed, epoch, [key], number, purpose=_REPLACEMENT)[0, number - 1]
                candidate = int(u * len(self.source))
            try:
                with self.reading(self.source.name_of(candidate)):
                    image = open_image(self.source, candidate)
            except BadImage as bad:
                self._bad.add(bad, epoch, step)
            else:
                self._bad.good()  # not only once it is decoded: many are opened before, by many threads
                return BatchItem(key, number, candidate, image)
        raise TooManyBadImages(f"{IN_A_ROW} images drawn in place of {self.source.name_of(key)} cannot be read either")

    def draw(self, items: Sequence[BatchItem], epoch: int) -> np.ndarray:
        """The table `[2, len(items)]` of their views."""
        sizes = [(item.image.height, item.image.width) for item in items]
        return draw_views(self._views, sizes, seed=self._seed, epoch=epoch, keys=[item.key for item in items])

    def decode(
        self,
        item: BatchItem,
        rows: np.ndarray,
        epoch: int,
        step: int = 0,
        *,
        held: Reservation | None = None,
        alone: bool = False,
    ) -> tuple[BatchItem, Any, int]:
        """An item, or what takes its place; its pixels; by what its sides were divided in decoding.

        rows: VIEW_DTYPE `[2]`, as drawn; filled anew for what takes the place. held: memory that the calling
        thread holds for the item, changed to what the other one takes. alone: the pixels may be gone with the
        next call, unless all are to be kept.
        """
        buffer = self._buffer() if alone and not self._keep else None
        while True:
            if isinstance(item.image, DecodedImage):
                return item, item.image.data, 1
            shrink = largest_shrink(item.image, rows, self._views.size) if self._scaled else 1
            try:
                with self.reading(self.source.name_of(item.key)):
                    pixels = item.image.decode(shrink, buffer)
            except BadImage as bad:
                self._bad.add(bad, epoch, step)
                freed = item.image.decoding_bytes
                item = self.open(item.asked, epoch, step, item.attempt + 1)
                if held is not None:
                    held.add(item.image.decoding_bytes - freed)
                rows[:] = self.draw([item], epoch)[:, 0]
            else:
                return item, pixels, shrink

    def reading(self, name: str) -> Reading:
        """For a `with` around whatever may hang or crash over the image of that name."""
        return Reading(self._workers, name)

    def _buffer(self) -> PixelBuffer:
        """The calling thread's memory for the pixels of one image."""
        if not hasattr(self._buffers, "buffer"):
            self._buffers.buffer = PixelBuffer(_BUFFER_BYTES)
        return self._buffers.buffer
