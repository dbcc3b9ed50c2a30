"""Work on many batches: several at once on a CPU, and shared by the processes that torchrun started."""

from __future__ import annotations

import math
import threading
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

    A context manager: inside it a thread says the lines that are due while a unit takes long, the first one included.
    stage: what is being done. total: how many units there are. unit: in the plural. say: a function, or an object that
    is told of the units, too, by its method ``advance``; it may be called by that thread. What it raises there is
    raised by the next `advance`, or at the end of the block. at_most: the stage may end before ``total``.
    What iterates over a generator that holds the block open must close it, else the thread speaks on after an error.
    """

    FIRST, EVERY = 2.0, 10.0

    def __init__(self, stage: str, total: int, unit: str, say: Say = silent, *, at_most: bool = False) -> None:
        self.stage, self.total, self.unit, self.say = stage, total, unit, say
        self.of = f"of at most {total}" if at_most else f"of {total}"
        self.tell_units: Callable[[int, str], None] | None = getattr(say, "advance", None)
        self.done = 0
        self.started = time.monotonic()
        self.next_line = self.started + self.FIRST
        self.spoke = False
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def __enter__(self) -> Progress:
        if self.say is not silent:
            self._thread = threading.Thread(target=self._speak_when_due, name="scrl_fast-progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()  # no line comes after the last one, or after an error
        if error is not None:
            return
        self._raise_failure()
        if self.spoke:
            self.say(f"{self.stage}: {self.done} {self.unit} in {time.monotonic() - self.started:.1f} s")

    def advance(self, count: int = 1) -> None:
        """So many more units are done."""
        self.done += count
        if self.tell_units is not None:
            self.tell_units(count, self.unit)
        self._raise_failure()
        self._speak()

    def over(self, units: Iterable[Unit]) -> Iterator[Unit]:
        """The units, each told of when the next one is asked for; to be used inside the block."""
        for unit in units:
            yield unit
            self.advance()

    def _speak_when_due(self) -> None:
        try:
            while not self._ended.wait(max(0.01, self.next_line - time.monotonic())):
                self._speak()
        except Exception as error:
            self._failure = error

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _speak(self) -> None:
        """Says the line that is due, if one is."""
        with self._lock:
            now, done = time.monotonic(), self.done
            if now < self.next_line or self._ended.is_set():
                return
            self.next_line = now + self.EVERY
            if done < self.total:
                pace = f", {done / (now - self.started):.3g}/s" if done else " so far"
                self.say(f"{self.stage}: {done} {self.of} {self.unit}{pace}")
                self.spoke = True
