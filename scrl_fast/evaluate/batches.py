"""Work on many batches: several at once on a CPU, and shared by the processes that torchrun started."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from scrl_fast.data.prefetch import Prefetcher, prefetched
from scrl_fast.distributed.world import World

Batch = TypeVar("Batch")
Loaded = TypeVar("Loaded")
Unit = TypeVar("Unit")
Results = tuple[Tensor, ...]
Say = Callable[[str], None]
"""Takes a line for the terminal."""

CONCURRENT = 4  # batches in work at once on a CPU: their activations lie in memory together


def silent(line: str) -> None:
    """Say nothing."""


def map_batches(
    load: Callable[[Batch], Loaded],
    compute: Callable[[Loaded], Results],
    batches: Sequence[Batch],
    *,
    device: torch.device,
    workers: int = 0,
    world: World = World(),  # noqa: B008 (frozen)
) -> Iterator[Results]:
    """``compute(load(batch))`` of every batch, in order, without gradients.

    load: called by ``workers`` threads ahead of use (0: by the caller's). compute: on a CPU called for several batches
    at once, each with its share of torch's threads, since threads that share one batch wait for the slowest of them in
    every layer; on a GPU one call after the other.
    world: every rank takes each ``size``-th batch. Rank 0 yields all results, on the CPU; other ranks yield nothing,
    but must be iterated to their end.
    """
    results = _computed(load, compute, batches[world.rank :: world.size], device, workers)
    if not world.is_distributed:
        yield from results
        return
    for _ in range(0, len(batches), world.size):
        own = [tuple(tensor.cpu() for tensor in found) for found in islice(results, 1)]
        gathered = world.gather_objects(own)
        if world.rank == 0:
            yield from gathered


def _computed(
    load: Callable[[Batch], Loaded],
    compute: Callable[[Loaded], Results],
    batches: Sequence[Batch],
    device: torch.device,
    workers: int,
) -> Iterator[Results]:
    threads = torch.get_num_threads()
    concurrent = min(CONCURRENT, threads) if device.type == "cpu" and threads > 1 else 0

    def work(loaded: Loaded) -> Results:
        if concurrent:
            torch.set_num_threads(threads // concurrent)  # of this thread, and of threads that begin later
        with torch.no_grad():
            return compute(loaded)

    try:
        with closing(Prefetcher(concurrent, concurrent - 1, patience=math.inf)) as pool:
            for (results,) in pool.map(work, ((loaded,) for loaded in prefetched(load, batches, workers))):
                yield results
    finally:
        if concurrent:
            torch.set_num_threads(threads)


class Progress:
    """How far a stage is: a line after two seconds, then one every ten, and one at its end if any came before.

    stage: what is being done. total: how many units there are. unit: in the plural. say: a function, or an object that
    is told of the units, too, by its method ``advance``.
    """

    FIRST, EVERY = 2.0, 10.0

    def __init__(self, stage: str, total: int, unit: str, say: Say = silent) -> None:
        self.stage, self.total, self.unit, self.say = stage, total, unit, say
        self.tell_units: Callable[[int, str], None] | None = getattr(say, "advance", None)
        self.done = 0
        self.started = time.monotonic()
        self.next_line = self.started + self.FIRST
        self.spoke = False

    def advance(self, count: int = 1) -> None:
        self.done += count
        if self.tell_units is not None:
            self.tell_units(count, self.unit)
        now = time.monotonic()
        if now >= self.next_line and self.done < self.total:
            rate = self.done / (now - self.started)
            self.say(f"{self.stage}: {self.done} of {self.total} {self.unit}, {rate:.3g}/s")
            self.next_line, self.spoke = now + self.EVERY, True

    def over(self, units: Iterable[Unit]) -> Iterator[Unit]:
        """The units, each told of when the next one is asked for."""
        for unit in units:
            yield unit
            self.advance()
        self.finish()

    def finish(self) -> None:
        if self.spoke:
            self.say(f"{self.stage}: {self.done} {self.unit} in {time.monotonic() - self.started:.1f} s")
