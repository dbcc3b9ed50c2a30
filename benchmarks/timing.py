"""How calls are timed: several at once, in turns, by the clock on a CPU and by events on a GPU.

Events must see the GPU's time alone. The stream therefore sleeps for longer than the host needs to enqueue the call.
The start event comes after that sleep, so the call's kernels follow each other without a gap. Cases that measure the
host's time (`wall`) go by the clock on a GPU, too: many calls, then one wait for the last of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

Call = Callable[[], Any]

MIN_ROUNDS = 5
WARM_UP_CALLS = 3
# Shorter calls are timed several at a time: reading the clock then costs under a percent.
_SHORT_CALL_S = 1e-3
# Beside such a call, each of the same case goes after one of its own that is not timed, ours and rivals' alike: caches,
# freed memory and sleeping threads are then as the call itself leaves them ("warm"), not as the provider before it did.
# Longer ones than this do without: it is a small part of them. `cold` is for the other question.
_LONG_CALL_S = 50e-3
_CALLS_BY_THE_WALL = 50
_SWEEP_BYTES = 256 << 20
# A GPU sleeps so much longer than its host took to enqueue the call, and at least so long. Cycles are those of the
# fastest clock that a GPU of today has (2.6 GHz), since a slower clock only sleeps longer.
_SLEEP_SHARE, _SLEEP_LEAST_S, _CYCLES_PER_S = 2.0, 200e-6, 2.6e9
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}


class Timer:
    """Times calls on one device. cold: a large buffer sweeps the caches before each call, so none holds its inputs.

    On a GPU the buffer is read: written lines would be carried back to memory inside the timed call. On a CPU it is
    written, as its caches are swept by either.
    """

    def __init__(self, device: torch.device, *, cold: bool) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self._sweep = torch.zeros(_SWEEP_BYTES // 8, dtype=torch.int64, device=device) if cold else None
        self._enqueue_s: dict[Call, float] = {}

    def warm_up(self, call: Call) -> None:
        for _ in range(WARM_UP_CALLS):
            call()
        self._synchronize()

    def interleaved(
        self, calls: Mapping[str, Call], *, rounds: int, seconds: float, wall: bool = False
    ) -> dict[str, list[float]]:
        """Seconds of each call: rounds over all of them, each round in another order, until rounds or time run out.

        At least MIN_ROUNDS (or `rounds`, if fewer) whatever the time. wall: by the clock on a GPU as well, caches as
        they are; on a CPU it changes nothing.
        """
        wall = wall and self.cuda
        inner = dict.fromkeys(calls, (1, _CALLS_BY_THE_WALL)) if wall else self._calls_at_a_time(calls)
        times: dict[str, list[float]] = {name: [] for name in calls}
        order, started = list(calls), time.perf_counter()
        gc.collect()
        gc.disable()
        try:
            for done in range(max(rounds, 1)):
                if done >= MIN_ROUNDS and time.perf_counter() - started > seconds:
                    break
                for name in order:
                    once = self._by_the_wall if wall else self._once
                    times[name].append(once(calls[name], *inner[name]))
                order = order[1:] + order[:1]
        finally:
            gc.enable()
        return times

    def peak_bytes(self, call: Call) -> int | None:
        """Memory that one call allocates at its peak, beyond what was there before; None where it cannot be known."""
        if (elsewhere := getattr(call, "peak_bytes", None)) is not None:  # it runs in a process of its own
            return elsewhere()
        if not self.cuda:
            return _peak_resident(call)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def copy_bandwidth(self) -> float:
        """GB/s, read + written, of a plain large copy: about what a memory-bound operation can reach."""
        source = torch.ones(_COPY_BYTES[self.device.type], dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        sweep, self._sweep = self._sweep, None
        self.warm_up(lambda: target.copy_(source))
        times = self.interleaved({"copy": lambda: target.copy_(source)}, rounds=20, seconds=1.0)["copy"]
        self._sweep = sweep
        return 2 * source.numel() / float(np.percentile(times, 20)) / 1e9

    def _calls_at_a_time(self, calls: Mapping[str, Call]) -> dict[str, tuple[int, int]]:
        """Of each provider, calls that are not timed, and calls that are timed after them."""
        if self.cuda or self._sweep is not None:
            return dict.fromkeys(calls, (0, 1))
        took = {name: max(_seconds(call, 1), 1e-9) for name, call in calls.items()}
        short = min(took.values(), default=1.0) < _SHORT_CALL_S
        return {
            name: (int(short and seconds < _LONG_CALL_S), max(1, min(1000, round(_SHORT_CALL_S / seconds))))
            for name, seconds in took.items()
        }

    def _once(self, call: Call, untimed: int, timed: int) -> float:
        if self.cuda:
            return self._by_events(call)
        if self._sweep is not None:
            self._sweep.zero_()
        for _ in range(untimed):
            call()
        return _seconds(call, timed)

    def _by_events(self, call: Call) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if self._sweep is not None:
            self._sweep.sum()
        torch.cuda._sleep(self._sleep_cycles(call))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def _sleep_cycles(self, call: Call) -> int:
        """How long the stream must sleep so that the host has enqueued the whole call before it wakes."""
        if call not in self._enqueue_s:  # the call returns when all is enqueued; one that waits inside is bounded by it
            self._synchronize()
            self._enqueue_s[call] = _seconds(call, 1)
            self._synchronize()
        return round(max(_SLEEP_SHARE * self._enqueue_s[call], _SLEEP_LEAST_S) * _CYCLES_PER_S)

    def _by_the_wall(self, call: Call, untimed: int, timed: int) -> float:
        for _ in range(untimed):
            call()
        self._synchronize()
        started = time.perf_counter()
        for _ in range(timed):
            call()
        self._synchronize()
        return (time.perf_counter() - started) / timed

    def _synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def _seconds(call: Call, times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - started) / times


def _peak_resident(call: Call) -> int | None:
    """Growth of resident memory during a call, by the kernel's high-water mark (Linux)."""
    try:
        with contextlib.suppress(OSError, AttributeError):  # give back what malloc keeps: reuse must not hide a need
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return max(_status("VmHWM") - before, 0)
    except (OSError, KeyError):
        return None


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
