"""The ring of page-locked memory, with a GPU that is played: no piece is filled while anything may read it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from scrl_fast.data import pinned
from scrl_fast.data.pinned import PinnedRing

MB = 1 << 20
GPU = torch.device("cuda", 1)


class Gpu:
    """What the ring asks of CUDA."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}
        self.done, self.waited, self.full = True, 0, False
        self.stream = ""
        self.current = 0  # device of the thread
        self.locked_on: list[int] = []

    def lock(self, address: int, size: int) -> bool:
        assert address % 4096 == 0
        self.locked_on.append(self.current)
        if not self.full:
            self.locked[address] = size
        return not self.full

    def unlock(self, address: int) -> None:
        del self.locked[address]

    def wait(self, *_: object) -> None:
        self.waited += 1
        self.done = True


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    gpu = Gpu()

    class Event:
        def record(self, stream: str) -> None:
            gpu.done, gpu.stream = False, stream

        def query(self) -> bool:
            return gpu.done

        synchronize = gpu.wait

    monkeypatch.setattr(pinned, "lock", gpu.lock)
    monkeypatch.setattr(pinned, "unlock", gpu.unlock)

    @contextmanager
    def device(index: int | None) -> Iterator[None]:
        before, gpu.current = gpu.current, gpu.current if index is None else index
        yield
        gpu.current = before

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.wait)
    yield gpu


def test_a_piece_is_about_as_large_as_its_batch(gpu: Gpu) -> None:
    ring = PinnedRing()
    batch = ring.empty([140 * MB])
    assert batch.nbytes == 140 * MB and 140 * MB <= sum(gpu.locked.values()) <= 150 * MB, "256 MB by powers of two"


def test_shapes_and_layouts() -> None:
    for shape, dtype, layout in (
        ((2, 3, 4, 5), torch.float32, torch.channels_last),
        ((2, 3, 4, 5), torch.bfloat16, torch.contiguous_format),
        ((7,), torch.uint8, torch.contiguous_format),
    ):
        plain = torch.empty(shape, dtype=dtype, memory_format=layout)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pinned, "lock", lambda *_: True)
            patch.setattr(torch.cuda, "device", lambda _: nullcontext())
            made = PinnedRing().empty(shape, dtype, layout)
        assert (made.shape, made.dtype, made.stride()) == (plain.shape, plain.dtype, plain.stride())
        made.fill_(1)


def test_a_piece_is_used_again_when_copied_and_let_go(gpu: Gpu) -> None:
    ring = PinnedRing()
    batch = ring.empty([3 * MB])
    address = batch.data_ptr()
    ring.copied(batch, GPU)
    piece = batch[5:9]
    del batch
    gc.collect()
    gpu.done = True
    other = ring.empty([3 * MB])
    assert other.data_ptr() != address, "a part of the batch is still held"
    del piece
    gc.collect()
    gpu.done = False
    third = ring.empty([3 * MB])
    assert third.data_ptr() not in (address, other.data_ptr()), "the copy is not done"
    gpu.done = True
    assert ring.empty([3 * MB]).data_ptr() == address and gpu.waited == 0


def test_a_piece_whose_copy_nobody_told_of_is_not_filled_again(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop of one's own copies as it likes: after two such pieces PyTorch's allocator serves it."""
    ring, plain = PinnedRing(), torch.empty
    monkeypatch.setattr(torch, "empty", lambda shape, *, pin_memory, **options: plain(shape, **options))
    places = []
    for _ in range(4):
        places.append(ring.empty([MB]).data_ptr())
        gc.collect()
    assert len(set(places[:2])) == 2 and not set(places[2:]) & set(places[:2])
    assert len(ring.pieces) == 2 and gpu.waited == 0, "to wait for the GPU would break the capture of a graph"
    ring.release()
    assert gpu.locked == {}


def test_memory_is_locked_for_the_gpu_of_the_process(gpu: Gpu) -> None:
    """A loader's threads begin with the first GPU as theirs; the event lies on the stream that copies."""
    ring = PinnedRing()
    ring.device = 1
    ring.copied(ring.empty([MB]), GPU)
    assert gpu.locked_on == [1] and gpu.stream == "stream of cuda:1" and gpu.current == 0


def test_batches_of_many_sizes_keep_to_few_pieces(gpu: Gpu) -> None:
    """Two batches in flight, each of another size: the pieces grow to the largest, and no third one is made."""
    ring, before = PinnedRing(), None
    for size in (5, 3, 9, 30, 29, 7, 31, 12, 31, 30):
        batch = ring.empty([size * MB])
        ring.copied(batch, GPU)
        gpu.done, before = True, batch
        del batch
    assert len(ring.pieces) == 2 and sum(gpu.locked.values()) <= 2 * 34 * MB
    del before
    gc.collect()
    ring.release()
    assert ring.pieces == [] and gpu.locked == {}


def test_without_room_pytorch_locks_the_memory(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.full = True
    asked = []
    monkeypatch.setattr(torch, "empty", lambda shape, **options: asked.append((shape, options["pin_memory"])))
    ring = PinnedRing()
    for _ in range(2):
        ring.empty([3, 4])
    assert asked == [((3, 4), True)] * 2
    assert len(gpu.locked_on) == 1, "a system that has refused is not asked again"
