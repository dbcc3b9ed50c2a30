"""Threads that make batches ahead of the training step.

Threads, not processes: decoders, Pillow and our host library all release the GIL, and batches need not be carried from
one process to another.
"""

from __future__ import annotations

import math
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable

import torch

from scrl_fast.data.crash_trace import Trace
from scrl_fast.data.image_files import printable

JOIN_SECONDS = 2.0
"""That an end waits for threads that read files."""


def worker_count(asked: int | str, on_gpu: bool = False) -> int:
    """The number of threads that ``data.workers`` asks for.

    ``auto`` is this process's share of the cores without those that training keeps busy, and at least 1: on a CPU
    torch's threads, on a GPU the one that launches kernels. Containers that limit time instead of cores are not seen.
    """
    if asked != "auto":
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, cores // processes - (1 if on_gpu else torch.get_num_threads()))


class LoaderStalled(RuntimeError):
    """No image was finished within the time limit, or a batch not as long as other processes wait."""


class Work:
    """One batch in the making: parts that threads take up in any order. `finish` runs after the last, in its thread."""

    def __init__(self, parts: int, make: Callable[[int], None], finish: Callable[[], None] = lambda: None) -> None:
        self.parts, self.cancelled = parts, False
        self.error: BaseException | None = None
        self._make, self._finish = make, finish
        self._left, self._lock, self._done = parts, threading.Lock(), threading.Event()
        if not parts:
            self._done.set()

    def run(self, part: int) -> None:
        try:
            if not self.cancelled and self.error is None:
                self._make(part)
            with self._lock:
                self._left -= 1
                last = self._left == 0
            if last:
                if not self.cancelled and self.error is None:
                    self._finish()
                self._done.set()
        except BaseException as error:  # handed to the thread that waits for the batch
            self.error = self.error or error
            self._done.set()

    def wait(self, seconds: float, progress: Callable[[], float], at_most: float = math.inf) -> bool:
        """Wait until it is done; False once `seconds` went by since the call and since the time `progress()`, or
        `at_most` since the call."""
        called = time.monotonic()
        while (left := min(max(called, progress()) + seconds, called + at_most) - time.monotonic()) > 0:
            if self._done.wait(min(left, threading.TIMEOUT_MAX)):
                return True
        return self._done.is_set()


class Workers:
    """`count` threads working through a queue in order; with count 0 the work is done where it is submitted.

    trace: where to note what they are reading, to be named after a crash.
    patience: seconds that `stop` waits for what the threads are at. One that is left behind in compiled code when
    Python ends takes the process with it (SIGABRT): for work that always ends, wait for it.
    """

    def __init__(self, count: int, trace: Trace | None = None, patience: float = JOIN_SECONDS) -> None:
        self._trace = trace
        self._queue: queue.SimpleQueue[tuple[Work, int] | None] = queue.SimpleQueue()
        self._reading: dict[int, tuple[str, float]] = {}
        self._finished = time.monotonic()
        arguments = (self._queue, self._reading, trace)
        # daemons, so that a read that never returns cannot keep the process alive
        self._threads = [
            threading.Thread(target=_serve, args=arguments, name=f"scrl_fast-data-{index}", daemon=True)
            for index in range(count)
        ]
        for thread in self._threads:
            thread.start()
        self.stop = weakref.finalize(self, _stop, self._queue, self._threads, trace, patience)

    def submit(self, work: Work) -> None:
        for part in range(work.parts):
            if self._threads:
                self._queue.put((work, part))
            else:
                work.run(part)
                _idle(self._reading, self._trace)

    def reads(self, name: str) -> None:
        """Note what the calling thread is about to read, for the message of a stall."""
        self._reading[threading.get_ident()] = name, time.monotonic()
        if self._trace is not None:
            self._trace.note(name)

    def finished(self) -> None:
        """Note that the calling thread has finished an image, whatever came of it."""
        self._finished = time.monotonic()

    def progress(self) -> float:
        """The monotonic time at which an image was last finished."""
        return self._finished

    def stalled(self) -> str:
        """What the threads have been reading for how long, the longest first."""
        now = time.monotonic()
        readings = sorted(((now - since, name) for name, since in list(self._reading.values())), reverse=True)
        return "; ".join(f"{printable(name)} for {seconds:.0f} s" for seconds, name in readings[:3]) or "nothing"

    def why_stalled(self, timeout: float, waited_for: str = "") -> str:
        """What to say when no image was finished for `timeout` seconds, the option data.timeout."""
        return (
            f"no image was finished for {timeout:g} s (data.timeout){waited_for}; the workers are reading "
            f"{self.stalled()}. Is the disk or network share answering? If it is only slow, use "
            f"--data.timeout={2 * timeout:g}"
        )


def _serve(
    tasks: queue.SimpleQueue[tuple[Work, int] | None], reading: dict[int, tuple[str, float]], trace: Trace | None
) -> None:
    while (task := tasks.get()) is not None:
        work, part = task
        work.run(part)
        _idle(reading, trace)
        del work, task  # the batch must not live on in an idle thread


def _idle(reading: dict[int, tuple[str, float]], trace: Trace | None) -> None:
    """Note that the calling thread reads nothing: once for many images, since each note is a write."""
    reading.pop(threading.get_ident(), None)
    if trace is not None:
        trace.note("")


def _stop(
    tasks: queue.SimpleQueue[tuple[Work, int] | None],
    threads: list[threading.Thread],
    trace: Trace | None,
    patience: float,
) -> None:
    """End the threads once their present image is done; one that takes longer, as in a read that hangs, is left."""
    while True:
        try:
            tasks.get_nowait()
        except queue.Empty:
            break
    for _ in threads:
        tasks.put(None)
    deadline = time.monotonic() + patience
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX))
    if trace is not None:
        trace.close()
