"""Work that threads do ahead of its use, handed over in the order in which it was begun.

`PrefetchQueue` is under all that is read ahead: the batches of the `Loader`, the examples of a detector, the images of
an evaluation. `Prefetcher` is its form for a function and items.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any, Generic, Protocol, TypeVar

from scrl_fast.data.workers import JOIN_SECONDS, LoaderStalled, Work, Workers


class Job(Protocol):
    """What holds a piece of work and, once it is done, its results."""

    work: Work


JobT = TypeVar("JobT", bound=Job)
Item = TypeVar("Item")
Made = TypeVar("Made")


class PrefetchQueue(Generic[JobT]):
    """Jobs in the making, first begun, first taken.

    workers: the threads that do them. timeout: seconds for which `take` waits while no image is finished.
    """

    def __init__(self, workers: Workers, timeout: float = math.inf) -> None:
        self.workers, self.timeout = workers, timeout
        self._jobs: deque[JobT] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def first(self) -> JobT:
        return self._jobs[0]

    @property
    def last(self) -> JobT:
        return self._jobs[-1]

    def begin(self, job: JobT) -> None:
        self._jobs.append(job)
        self.workers.submit(job.work)

    def take(self, at_most: float = math.inf) -> JobT | None:
        """The first job once it is done, or None when it is not done in time; then it is cancelled.

        at_most: seconds to wait, however steadily images are finished. A job that failed holds its error.
        """
        job = self._jobs.popleft()
        if job.work.wait(self.timeout, self.workers.progress, at_most):
            return job
        job.work.cancelled = True
        return None

    def cancel(self) -> None:
        """Drop all jobs; what the threads have not begun of them is not done."""
        for job in self._jobs:
            job.work.cancelled = True
        self._jobs.clear()


class Prefetcher:
    """Calls of a function, made by threads ahead of the use of their results.

    workers: threads; 0: the calling thread makes each group when it is wanted.
    ahead: groups begun beyond the one that is wanted, unless workers is 0.
    timeout: seconds that may pass without a finished call while a group is waited for.
    name_of: what an item is called in the message of a stall.
    patience: as of `Workers`. The threads are daemons: a read that never returns keeps no process alive.
    """

    def __init__(
        self,
        workers: int,
        ahead: int,
        *,
        timeout: float = math.inf,
        name_of: Callable[[Any], str] = str,
        patience: float = JOIN_SECONDS,
    ) -> None:
        self._workers, self._ahead = Workers(workers, patience=patience), ahead if workers else 0
        self._timeout, self._name_of = timeout, name_of

    def map(self, make: Callable[[Item], Made], groups: Iterable[Sequence[Item]]) -> Iterator[list[Made]]:
        """For each group of items the list of what `make` returns for them, in order.

        Raises LoaderStalled, or what a call raised.
        """
        queue: PrefetchQueue[_Calls] = PrefetchQueue(self._workers, self._timeout)
        try:
            for group in groups:
                queue.begin(_Calls(make, group, self._workers, self._name_of))
                if len(queue) > self._ahead:
                    yield self._results(queue)
            while queue:
                yield self._results(queue)
        finally:
            queue.cancel()

    def close(self) -> None:
        """End the threads; what they have not begun is not done."""
        self._workers.stop()

    def _results(self, queue: PrefetchQueue[_Calls]) -> list[Any]:
        calls = queue.take()
        if calls is None:
            raise LoaderStalled(self._workers.why_stalled(self._timeout))
        if calls.work.error is not None:
            raise calls.work.error
        return calls.results


def prefetched(make: Callable[[Item], Made], items: Iterable[Item], workers: int) -> Iterator[Made]:
    """`make` of every item, in order, by so many threads (0: the caller's own), a few ahead of the one wanted."""
    with closing(Prefetcher(workers, 2 * workers)) as prefetcher:
        for (made,) in prefetcher.map(make, ((item,) for item in items)):
            yield made


class _Calls:
    """The calls for one group of items, each a part of the work."""

    def __init__(
        self, make: Callable[[Any], Any], group: Sequence[Any], workers: Workers, name_of: Callable[[Any], str]
    ) -> None:
        self.results: list[Any] = [None] * len(group)

        def call(part: int) -> None:
            workers.reads(name_of(group[part]))
            self.results[part] = make(group[part])
            workers.finished()

        self.work = Work(len(group), call)
