"""Reads that hang, crash or raise, interrupts, and what threads leave behind."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tiny_loader import SCENES, Pictures, config_of, epoch_of

from scrl_fast.data import Loader, LoaderStalled
from scrl_fast.data.crash_trace import Trace
from scrl_fast.ops.philox import permutation


def test_a_crash_leaves_the_name_of_what_was_being_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Deadly(Pictures):
        def read(self, index: int) -> np.ndarray:
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

    file, config = tmp_path / "reading.txt", config_of(data__workers=0)
    if not (child := os.fork()):
        try:
            next(Loader(Deadly(), config, reading_path=file).epoch(0))
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    with caplog.at_level(logging.WARNING, "scrl_fast"):
        again = Loader(Pictures(), config_of(data__workers=2), reading_path=file)
    first = int(permutation(0, 0, 25)[0])
    assert [
        f"was reading picture {first}. If a decoder crashed" in record.getMessage() for record in caplog.records
    ] == [True]
    assert len(list(again.epoch(0))) == 6 and len(file.read_text()) == 2 * 1024
    again.close()
    assert not file.exists()  # nothing is left for the next one to warn of


def test_two_at_one_place_leave_each_other_alone(tmp_path: Path) -> None:
    file = tmp_path / "reading.txt"
    first = Trace(file, 1)
    first.note("a\u2028b")  # for Unicode the end of a line
    second = Trace(file, 1)
    assert second.left == ["a\u2028b"]
    first.note("c")
    second.note("d")
    first.close()
    assert file.read_text().split() == ["d"]
    second.close()
    assert not file.exists()


@pytest.mark.skipif(os.name == "nt", reason="POSIX")
@pytest.mark.parametrize("fault", ["cut", "removed", "a folder", "a pipe"])
def test_what_happens_to_the_file_of_notes_does_not_end_the_process(tmp_path: Path, fault: str) -> None:
    file = tmp_path / "reading.txt"
    if fault == "a folder":
        file.mkdir()
    elif fault == "a pipe":
        os.mkfifo(file)
    trace = Trace(file, 2)
    trace.note("one")
    if fault == "cut":
        os.truncate(file, 0)  # a mapped file would now end the process by SIGBUS
    elif fault == "removed":
        file.unlink()
    trace.note("caf\udce9.jpg")
    if fault in ("cut", "a pipe"):
        assert Trace(file, 2).left == ["caf\\udce9.jpg"]
    trace.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_in_a_worker_surfaces_with_its_cause(workers: int) -> None:
    class Broken(Pictures):
        def read(self, index: int) -> np.ndarray:
            if index == 7:
                raise KeyError("lost")
            return super().read(index)

    loader = Loader(Broken(), config_of(data__workers=workers))
    with pytest.raises(RuntimeError, match=r"batch \d of epoch 0 cannot be made: KeyError: 'lost'") as error:
        list(loader.epoch(0))
    assert isinstance(error.value.__cause__, KeyError)
    loader.close()


def test_a_read_that_stalls_is_named(tmp_path: Path) -> None:
    source = Pictures(slow=[int(permutation(0, 0, 25)[5])])
    loader = Loader(source, config_of(data__timeout=0.4))
    stream = loader.epoch(0)
    next(stream)
    start = time.monotonic()
    said = (
        r"no image was finished for 0\.4 s \(data\.timeout\) while batch 1 of epoch 0 .*picture \d+ for \d+ s"
        r".*--data\.timeout=0\.8"
    )
    with pytest.raises(LoaderStalled, match=said):
        next(stream)
    assert time.monotonic() - start < 30  # it does not wait for the read
    source.release.set()
    loader.close()


class Slow(Pictures):
    def read(self, index: int) -> np.ndarray:
        time.sleep(0.05)
        return super().read(index)


def test_slow_but_steady_reading_is_no_stall() -> None:
    config = config_of(train__batch_size=24, data__workers=1, data__timeout=1.0, train__epochs=1)  # a batch takes 1.2 s
    assert len(epoch_of(Slow(24), config)) == 1


def test_no_step_is_waited_for_longer_than_other_processes_wait() -> None:
    """0.2 s and more a batch: a few are in time if each is a step, but all six of one step are not."""
    config = config_of(data__workers=1, data__timeout=60.0, data__prefetch=0)
    loader = Loader(Slow(24), config, longest=0.9)
    said = (
        r"batch [0-5] of epoch 0 is not complete after \d+ s, and other .* reading picture \d+ for \d+ s"
        r".* --data.timeout=2 "
    )
    with pytest.raises(LoaderStalled, match=said):
        list(loader.epoch(0))
    with closing(loader.epoch(0)) as stream:
        for _ in range(6):
            loader.begin_step()
            next(stream)
    loader.close()


def test_threads_end_with_the_loader() -> None:
    before = threading.active_count()
    loader = Loader(SCENES, config_of(data__workers=3))
    stream = loader.epoch(0)
    next(stream)
    loader.close()
    assert threading.active_count() == before
    loader = Loader(SCENES, config_of(data__workers=3))
    list(loader.epoch(0, 5))
    del loader, stream
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        gc.collect()  # batches made ahead and their loader hold each other
        time.sleep(0.01)
    assert threading.active_count() == before


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("slow", [0.01, 60])
def test_interrupt_ends_the_process_at_once(slow: float) -> None:
    program = f"""
        import signal, time, sys
        import numpy as np
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without it
        from scrl_fast.config.schema import Config
        from scrl_fast.data import Loader
        class Slow:
            num_classes = 0
            def __len__(self): return 10_000
            def read(self, index):
                time.sleep({slow})
                return np.zeros((40, 50, 3), np.uint8)
            def label(self, index): return -1
            def name_of(self, index): return str(index)
        config = Config()
        config.train.batch_size, config.views.size, config.boxes.min_size = 4, 16, 4
        loader = Loader(Slow(), config)
        print("ready", flush=True)
        try:
            for batch in loader.epoch(0): pass
        except KeyboardInterrupt:
            sys.exit(7)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 7 and time.monotonic() - start < 10
    assert not errors
