"""Batches of two views with their matched boxes, made ahead by threads, in an order that never depends on them.

Everything about batch b of epoch e follows from (seed, e, b, rank, world size): any number of workers and any start
give the same stream, so a checkpoint needs to hold no more of the loader than epoch and batch.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scrl_fast.config.schema import Config, check_enough
from scrl_fast.data.bad_images import BadFiles
from scrl_fast.data.batch import Batch, PackedBatch
from scrl_fast.data.batch_builder import BatchBuilder, BatchSpec
from scrl_fast.data.crash_trace import Trace
from scrl_fast.data.pinned import RING
from scrl_fast.data.prefetch import PrefetchQueue
from scrl_fast.data.reader import Reader
from scrl_fast.data.sources.base import Source
from scrl_fast.data.workers import LoaderStalled, Workers, worker_count
from scrl_fast.errors import UsageError
from scrl_fast.ops.philox import permutation

_KILLED = (
    "the process before this one was killed, or crashed, while it was reading %s. If a decoder crashed, one of these "
    "files made it: move it away, or have it decoded by another library (SCRL_FAST_JPEG=pillow)"
)
_log = logging.getLogger("scrl_fast")


class Loader:
    """Batches of a source as a configuration wants them; `epoch(e)` iterates them.

    config: uses data (workers, prefetch, timeout, max_bad_fraction), views, boxes, model.method and, of train,
    batch_size, accumulate, seed, epochs, max_steps, channels_last. rank, world_size: this process takes every
    world_size-th image of the epoch's order; what does not fill a step (`accumulate` batches in every process) is left
    out of that epoch.
    dtype: of the views. pin_memory: put batches where a GPU can copy them from without waiting.
    packed: hand over decoded images, for a GPU to make the views of; batches too large for that come with views.
    gpu: where JPEGs are to be decoded, if packed; None: on the CPU.
    longest: seconds that batches may be waited for between two calls of `begin_step`, however steadily images come:
    other processes wait, too. Without workers nothing is waited for, and the limit does not hold.
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
        longest: float = math.inf,
        bad_files_path: str | os.PathLike[str] | None = None,
        reading_path: str | os.PathLike[str] | None = None,
    ) -> None:
        _check(source, config, rank, world_size)
        self.workers = worker_count(config.data.workers, on_gpu=pin_memory)
        self.source, self.config, self.rank, self.world_size = source, config, rank, world_size
        self.batch_size, self._seed = config.train.batch_size, config.train.seed
        self.longest, self._spent = longest, 0.0  # since the present step was begun
        self._bad = BadFiles(len(self) * self.batch_size, config.data.max_bad_fraction, bad_files_path)
        trace = Trace(reading_path, max(1, self.workers)) if reading_path else None
        if trace and trace.left:
            _log.warning(_KILLED, "; ".join(trace.left))
        self._workers = Workers(self.workers, trace)
        if pin_memory:  # here, not in a thread, whose device is the first one
            RING.device = torch.cuda.current_device()
        reader = Reader(source, config, self._bad, self._workers, keep=packed)
        self._spec = BatchSpec(config, reader, self.workers, dtype, pin_memory, packed, gpu)
        self._ahead: PrefetchQueue[BatchBuilder] = PrefetchQueue(self._workers, config.data.timeout)
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
                self._ahead.cancel()

    def begin_step(self) -> None:
        """Start the limit `longest` anew: all waits until the next call count towards it.

        The caller knows where a step begins: on a GPU, one more batch is waited for in the first step.
        """
        self._spent = 0.0

    def stream(self, epoch: int, start_batch: int, count: int) -> Generator[Any, None, None]:
        """`count` batches from start_batch of an epoch on, over the ends of epochs; raises as `epoch` does."""
        while count > 0:
            here = min(count, len(self) - start_batch)
            with closing(self.epoch(epoch, start_batch)) as made:
                yield from islice(made, here)
            epoch, start_batch, count = epoch + 1, 0, count - here

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of each process beside epoch and batch: the bad images counted so far."""
        return {"bad": self._bad.state_dict()}

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from what `state_dict` gave in each process, in however many there were; from {} too."""
        self._bad.load_state_dict([state.get("bad", {}) for state in states], self.rank, self.world_size)

    def close(self) -> None:
        """End the threads. The loader cannot be used after it."""
        self._ahead.cancel()
        self._workers.stop()
        if self._spec.pin_memory:
            RING.release()

    def _fill_up(self, epoch: int, number: int) -> None:
        """Keep the wanted batch and the `prefetch` after it in the making, into the next epoch, not past the last step.

        Without workers the wanted one is made here and now, and none ahead of it.
        """
        wanted = (epoch, number)
        if self._ahead and self._ahead.first.place != wanted:
            self._ahead.cancel()
        place = self._after(self._ahead.last.place) if self._ahead else wanted
        data, train = self.config.data, self.config.train
        end = max(train.epochs, epoch + 1) * len(self)
        if train.max_steps:
            end = min(end, train.max_steps * train.accumulate)
        ahead = data.prefetch if self.workers else 0
        while not self._ahead or (len(self._ahead) <= ahead and place[0] * len(self) + place[1] < end):
            self._ahead.begin(self._build(place))
            place = self._after(place)

    def _after(self, place: tuple[int, int]) -> tuple[int, int]:
        epoch, number = place
        return (epoch, number + 1) if number + 1 < len(self) else (epoch + 1, 0)

    def _next(self) -> Batch | PackedBatch:
        epoch, number = self._ahead.first.place
        start = time.monotonic()
        builder = self._ahead.take(self.longest - self._spent)
        self._spent += time.monotonic() - start
        if builder is None:
            raise LoaderStalled(self._why_stalled(epoch, number))
        error = builder.work.error
        if isinstance(error, (UsageError, LoaderStalled, KeyboardInterrupt)):
            raise error
        if error is not None:
            raise RuntimeError(
                f"batch {number} of epoch {epoch} cannot be made: {type(error).__name__}: {error}"
            ) from error
        return builder.batch()

    def _why_stalled(self, epoch: int, number: int) -> str:
        if self._spent < self.longest:
            return self._workers.why_stalled(
                self._ahead.timeout, f" while batch {number} of epoch {epoch} was waited for"
            )
        return (
            f"batch {number} of epoch {epoch} is not complete after {self._spent:.0f} s, and other processes wait no "
            f"longer; the workers are reading {self._workers.stalled()}. The disk or network share is too slow: "
            f"--data.timeout={2 * self.longest:.0f} lets all wait longer, smaller files "
            "(python -m scrl_fast.data.pack) are read sooner"
        )

    def _build(self, place: tuple[int, int]) -> BatchBuilder:
        epoch, number = place
        if self._order[0] != epoch:
            order = permutation(self._seed, epoch, len(self.source))
            self._order = epoch, order[self.rank :: self.world_size]
        keys = self._order[1][number * self.batch_size : (number + 1) * self.batch_size]
        step = (epoch * len(self) + number) // self.config.train.accumulate + 1
        return BatchBuilder(self._spec, place, keys, step)


def _check(source: Source, config: Config, rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in 0..world_size-1, got rank {rank} of {world_size}")
    for name, count in (("workers", worker_count(config.data.workers)), ("prefetch", config.data.prefetch)):
        if not count >= 0:
            raise UsageError(f"data.{name} must be at least 0, got {count}")
    if not config.train.batch_size > 0:
        raise UsageError(f"train.batch_size must be positive, got {config.train.batch_size}")
    check_enough(len(source), config, world_size)
