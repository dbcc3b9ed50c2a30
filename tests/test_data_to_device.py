from __future__ import annotations

from collections.abc import Generator
from contextlib import closing, contextmanager
from typing import Any

import pytest
import torch

from scrl_fast.config.schema import Config
from scrl_fast.data import Batch, DemoScenes, Loader, on_device, to_device


def loader_of(dtype: torch.dtype, channels_last: bool = True) -> Loader:
    config = Config()
    config.train.batch_size, config.train.channels_last, config.data.workers = 4, channels_last, 0
    config.views.size, config.boxes.min_size = 32, 8
    return Loader(DemoScenes(12, 48), config, dtype=dtype)


@pytest.mark.parametrize("channels_last", [True, False])
def test_levels_become_the_views_that_the_loader_makes(channels_last: bool) -> None:
    plain, levels = loader_of(torch.float32, channels_last), loader_of(torch.uint8, channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    batches = on_device(levels.epoch(0), "cpu", levels.config.views, channels_last=channels_last)
    count = 0
    for one, other in zip(plain.epoch(0), batches, strict=True):
        assert other.views.dtype == torch.float32 and other.views.is_contiguous(memory_format=layout)
        assert torch.allclose(one.views, other.views, rtol=0, atol=1e-6)
        assert torch.equal(one.labels, other.labels) and torch.equal(one.crops, other.crops)
        assert one.boxes is not None and other.boxes is not None and torch.equal(one.boxes[1], other.boxes[1])
        count += 1
    assert count == 3
    half = next(on_device(levels.epoch(0), "cpu", levels.config.views, dtype=torch.bfloat16))
    assert half.views.dtype == torch.bfloat16


def test_views_that_are_normalised_already_pass_untouched_on_the_cpu() -> None:
    loader = loader_of(torch.float32)
    made = list(loader.epoch(0))
    for before, after in zip(made, on_device((batch for batch in made), "cpu", loader.config.views), strict=True):
        assert after.views is before.views and after.labels is before.labels


def test_the_cpu_reads_nothing_ahead_and_closing_closes() -> None:
    seen: list[Any] = []

    def numbered() -> Generator[Batch, None, None]:
        try:
            for number, batch in enumerate(loader_of(torch.uint8).epoch(0)):
                seen.append(number)
                yield batch
        finally:
            seen.append("closed")

    with closing(on_device(numbered(), "cpu", Config().views)) as batches:
        next(batches)
        assert seen == [0]
    assert seen == [0, "closed"]


# ---- the order of events on a GPU, with streams that only write down what is asked of them ----


class FakeStream:
    device = torch.device("cuda:0")

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told, self.events = name, told, 0

    def record_event(self) -> str:
        self.events += 1
        self.told.append(f"{self.name} records {self.events - 1}")
        return f"{self.events - 1}"

    def wait_event(self, event: str) -> None:
        self.told.append(f"{self.name} waits for {event}")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], FakeStream]:
    told: list[str] = []
    copies, consumer, working = FakeStream("copies", told), FakeStream("consumer", told), ["consumer"]

    @contextmanager
    def work_on(stream: FakeStream) -> Generator[None, None, None]:
        working.append(stream.name)
        yield
        working.pop()

    monkeypatch.setattr(torch.cuda, "stream", work_on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: consumer)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: told.append(f"kept for {stream.name}"))
    monkeypatch.setattr(to_device, "_told_by", lambda: working[-1], raising=False)
    return told, copies


def test_one_ahead_in_the_right_order(streams: tuple[list[str], FakeStream]) -> None:
    told, copies = streams

    def move(batch: Batch) -> Batch:
        told.append(f"moved by {to_device._told_by()}")  # type: ignore[attr-defined]
        return batch

    made = list(loader_of(torch.uint8).epoch(0))
    batches = to_device._one_ahead(iter(made), move, copies)  # type: ignore[arg-type]
    first = next(batches)
    moved = ["moved by copies", "copies records 0", "moved by copies", "copies records 1"]
    assert first is made[0] and told == [*moved, "consumer waits for 0", *["kept for consumer"] * 4]
    told.clear()
    assert [next(batches) is made[1], next(batches) is made[2]] == [True, True]
    moved = ["moved by copies", "copies records 2"]
    kept = ["kept for consumer"] * 4
    assert told == [*moved, "consumer waits for 1", *kept, "consumer waits for 2", *kept]
    assert next(batches, None) is None
    assert list(to_device._one_ahead(iter([]), move, copies)) == []  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    plain, levels = loader_of(torch.float32), loader_of(torch.uint8)
    levels._pin_memory = True
    moved = on_device(levels.epoch(0), "cuda", levels.config.views)
    for one, other in zip(plain.epoch(0), moved, strict=True):
        assert other.views.is_cuda and other.labels.is_cuda and not other.crops.is_cuda
        assert torch.allclose(one.views, other.views.cpu(), rtol=0, atol=1e-6)
        del other
        torch.empty(1 << 20, device="cuda").fill_(float("nan"))
