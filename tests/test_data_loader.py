from __future__ import annotations

import gc
import json
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
from typing import Any

import numpy as np
import pytest
import torch
from photos import write_bad, write_photos

from scrl_fast.config import Config
from scrl_fast.data import BadImage, Batch, DemoScenes, Loader, LoaderStalled, TooManyBadImages, make_source
from scrl_fast.data import bad as bad_module
from scrl_fast.data import pending as pending_module
from scrl_fast.data import reader as reader_module
from scrl_fast.data.bad import BadFiles
from scrl_fast.data.trace import Trace
from scrl_fast.errors import UsageError
from scrl_fast.ops import augment_views, pack_images, sample_box_pairs
from scrl_fast.philox import permutation
from scrl_fast.views import crops_of, draw_views


def config_of(**changes: Any) -> Config:
    """Small views, six batches of four an epoch from 25 scenes; `group__field=value` changes the rest."""
    config = Config()
    for name, value in {
        "train__batch_size": 4,
        "train__epochs": 2,
        "views__size": 32,
        "boxes__min_size": 8,
        "data__demo_images": 25,
        "data__demo_size": 48,
        "data__workers": 2,
        **changes,
    }.items():
        group, _, field = name.partition("__")
        setattr(getattr(config, group), field, value)
    return config


SCENES = DemoScenes(25, 48)


class Pictures:
    """A source whose read is what a test makes it."""

    num_classes = 3

    def __init__(self, count: int = 25, bad: Any = (), slow: Any = ()) -> None:
        self.count, self.bad, self.slow, self.reads = count, set(bad), set(slow), []
        self.release = threading.Event()

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> np.ndarray:
        self.reads.append(index)
        if index in self.slow:
            self.release.wait(20)
        if index in self.bad:
            raise BadImage(self.name_of(index), "no picture")
        return np.full((40 + index, 50, 3), index, np.uint8)

    def label(self, index: int) -> int:
        return index % 3 - 1

    def name_of(self, index: int) -> str:
        return f"picture {index}"


def epoch_of(source: Any, config: Config, epoch: int = 0, start: int = 0, **options: Any) -> list[Batch]:
    loader = Loader(source, config, **options)
    try:
        return list(loader.epoch(epoch, start))
    finally:
        loader.close()


def same(a: Batch, b: Batch) -> bool:
    tensors = [(a.views, b.views), (a.crops, b.crops), (a.labels, b.labels), (a.keys, b.keys)]
    assert a.boxes is not None and b.boxes is not None
    tensors += zip(a.boxes, b.boxes, strict=True)
    return all(torch.equal(x, y) for x, y in tensors)


# ---- what a batch is ----


def test_a_batch_is_what_its_parts_make() -> None:
    config = config_of()
    batches = epoch_of(SCENES, config)
    order = permutation(0, 0, 25)
    assert len(batches) == len(Loader(SCENES, config)) == 6
    for number, batch in enumerate(batches):
        keys = order[4 * number : 4 * number + 4]
        assert batch.keys.tolist() == keys.tolist() and batch.labels.tolist() == [-1] * 4
        table = draw_views(config.views, [[48, 48]] * 4, seed=0, epoch=0, keys=keys)
        assert np.array_equal(batch.crops.numpy(), crops_of(table))
        packed = pack_images([SCENES.read(key) for key in keys])
        views = augment_views(packed, table, size=32, mean=config.views.mean, std=config.views.std)
        assert torch.equal(batch.views, views)
        assert batch.views.is_contiguous(memory_format=torch.channels_last)
        boxes = sample_box_pairs(*crops_of(table), view_size=32, min_size=8, seed=0, step=0, keys=keys)
        assert batch.boxes is not None and all(
            np.array_equal(ours.numpy(), theirs) for ours, theirs in zip(batch.boxes, boxes, strict=True)
        )


def test_box_options_reach_the_sampler() -> None:
    batch = epoch_of(SCENES, config_of(boxes__per_image=3, boxes__grid=False, boxes__iou_threshold=1.0))[0]
    assert batch.boxes is not None and 0 < len(batch.boxes[0]) <= 12
    assert batch.boxes[1][:, 0].min() >= 4


def test_byol_has_no_boxes() -> None:
    assert epoch_of(SCENES, config_of(model__method="byol"))[0].boxes is None


def test_labels_and_mixed_sizes() -> None:
    for batch in epoch_of(Pictures(), config_of()):
        assert batch.labels.tolist() == [key % 3 - 1 for key in batch.keys.tolist()]
        assert (batch.crops[:, :, 2] <= batch.keys + 40).all()


def test_layout_and_dtype() -> None:
    batch = epoch_of(SCENES, config_of(train__channels_last=False), dtype=torch.bfloat16)[0]
    assert batch.views.dtype == torch.bfloat16 and batch.views.is_contiguous()
    assert batch.to("cpu", channels_last=False) is batch  # a step need not wait for a copy that changes nothing
    moved = batch.to("cpu", channels_last=True)
    assert moved.views.is_contiguous(memory_format=torch.channels_last) and torch.equal(moved.views, batch.views)
    assert moved.boxes is not None and len(moved.boxes) == 2 and moved.keys is batch.keys


# ---- the stream does not depend on how it is made ----


@pytest.mark.parametrize("workers, prefetch", [(0, 2), (0, 0), (1, 0), (1, 3), (3, 1), (7, 20)])
def test_any_number_of_workers(workers: int, prefetch: int) -> None:
    expected = epoch_of(SCENES, config_of(), epoch=1)
    found = epoch_of(SCENES, config_of(data__workers=workers, data__prefetch=prefetch), epoch=1)
    assert len(found) == len(expected) and all(map(same, found, expected))


@pytest.mark.parametrize("start", range(7))
def test_any_start(start: int) -> None:
    expected = epoch_of(Pictures(bad=[3, 11]), config_of(data__max_bad_fraction=0.5))
    found = epoch_of(Pictures(bad=[3, 11]), config_of(data__max_bad_fraction=0.5, data__workers=3), start=start)
    assert len(found) == 6 - start and all(map(same, found, expected[start:]))


def test_epochs_one_after_the_other_and_out_of_order() -> None:
    loader = Loader(SCENES, config_of())
    epochs = [list(loader.epoch(epoch)) for epoch in (0, 1)]
    assert not any(same(a, b) for a, b in zip(*epochs, strict=True))
    assert all(map(same, loader.epoch(0, 2), epochs[0][2:]))
    assert all(map(same, loader.epoch(0, 3), epochs[0][3:]))  # though epoch 1 has been begun
    for _ in loader.epoch(0):
        break  # what was made ahead is dropped
    assert all(map(same, loader.epoch(1), epochs[1]))
    loader.close()


def test_seeds_differ() -> None:
    assert not same(epoch_of(SCENES, config_of())[0], epoch_of(SCENES, config_of(train__seed=1))[0])


def test_batches_of_the_next_epoch_are_made_ahead_but_none_after_the_last() -> None:
    source = Pictures(8)
    loader = Loader(source, config_of(data__workers=1, data__prefetch=2))
    with closing(loader.epoch(0)) as stream:  # as the trainer does: it stops asking after the last batch
        for _ in range(2):
            next(stream)
    deadline = time.monotonic() + 10
    while len(source.reads) < 16 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(source.reads) == 16
    list(loader.epoch(1))
    loader.close()
    assert len(source.reads) == 16


def test_only_whole_steps_are_read_and_the_queue_goes_on_into_the_next_epoch() -> None:
    source = Pictures(31)  # seven batches of four, of which two steps of three are used
    loader = Loader(source, config_of(train__accumulate=3, train__max_steps=3, data__workers=1))
    assert len(loader) == 6
    first = list(loader.epoch(0))
    assert len(first) == 6
    deadline = time.monotonic() + 10
    while len(source.reads) < 4 * 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(source.reads) == 4 * 8  # two ahead, in epoch 1
    with closing(loader.epoch(1)) as stream:
        third = [next(stream) for _ in range(3)]  # the last step
    loader.close()
    assert len(source.reads) == 4 * 9
    again = epoch_of(Pictures(31), config_of(train__accumulate=3), epoch=1)
    assert len(again) == 6 and all(map(same, third, again[:3]))


def test_prefetch_bounds_what_is_made() -> None:
    source = Pictures(100)
    loader = Loader(source, config_of(data__prefetch=1))
    stream = loader.epoch(0)
    next(stream)
    time.sleep(0.3)
    assert len(source.reads) <= 12  # the batch in use, the next, and none beyond
    stream.close()
    loader.close()


# ---- ranks ----


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_epoch(world_size: int) -> None:
    config = config_of(train__batch_size=2)
    ranks = [epoch_of(SCENES, config, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {25 // world_size // 2}
    keys = [int(key) for batches in ranks for batch in batches for key in batch.keys]
    assert len(set(keys)) == len(keys)
    together = epoch_of(SCENES, config_of(train__batch_size=2 * world_size))
    for number, batch in enumerate(together[: len(ranks[0])]):
        for rank, batches in enumerate(ranks):
            assert batch.keys[rank::world_size].tolist() == batches[number].keys.tolist()
            assert torch.equal(batch.crops[:, rank::world_size], batches[number].crops)
            views = batch.views.unflatten(0, (2, -1))[:, rank::world_size]
            assert torch.equal(views.flatten(0, 1), batches[number].views)


# ---- bad images ----


def test_a_bad_image_is_replaced_counted_and_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "bad_files.jsonl"
    config = config_of(data__max_bad_fraction=0.5)
    loader = Loader(Pictures(24, bad=[3, 11]), config, bad_files_path=file)
    with caplog.at_level(logging.WARNING, "scrl_fast"):
        epochs = [list(loader.epoch(epoch)) for epoch in (0, 1)]
    loader.close()
    for batches in epochs:
        keys = torch.cat([batch.keys for batch in batches])
        assert len(keys) == 24 and not {3, 11} & set(keys.tolist())
        labels = torch.cat([batch.labels for batch in batches])
        assert torch.equal(labels, keys % 3 - 1)
    assert loader.bad_files == {"picture 3": "no picture", "picture 11": "no picture"}
    assert sorted(record.getMessage() for record in caplog.records) == [
        f"skipped an image that cannot be read: picture {index}: no picture" for index in (11, 3)
    ]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(line["path"] for line in lines) == ["picture 11", "picture 3"]
    assert all(line["error"] == "no picture" and line["epoch"] == 0 for line in lines)
    place = permutation(0, 0, 24).tolist()
    assert {line["path"]: line["step"] for line in lines} == {f"picture {k}": place.index(k) // 4 + 1 for k in (3, 11)}
    # a resumed run goes on in the same file
    with file.open("a") as cut:
        cut.write('{"path": "pic')
    again = Loader(Pictures(24, bad=[3, 11, 12]), config, bad_files_path=file)
    list(again.epoch(0))
    again.close()
    assert file.read_text().count("picture 3") == 1 and file.read_text().count("picture 12") == 1


def test_a_handful_of_bad_files_in_a_small_folder_does_not_stop_it(tmp_path: Path) -> None:
    write_photos(tmp_path / "good", 12, 60, 80)
    bad = write_bad(tmp_path)
    config = config_of(data__source="folder", data__root=str(tmp_path))
    loader = Loader(make_source(config), config)
    assert len(list(loader.epoch(0))) == 4
    assert set(loader.bad_files) == {str(path) for path in bad}
    loader.close()


@pytest.mark.parametrize("fraction, bad", [(0.01, 11), (0.2, 20), (0.0, 1), (0.5, 100)])
def test_too_many_bad_images_stop_the_run(fraction: float, bad: int) -> None:
    config = config_of(data__max_bad_fraction=fraction, train__batch_size=10)
    allowed = Pictures(100, bad=range(bad - 1)) if bad < 100 else Pictures(100)
    assert len(epoch_of(allowed, config)) == 10
    source = Pictures(100, bad=range(bad + 1) if bad > 1 else [0])
    with pytest.raises(TooManyBadImages, match=r"of the 100 images of epoch 0 cannot be read.*picture \d+: no picture"):
        epoch_of(source, config)
    assert issubclass(TooManyBadImages, UsageError)


def test_bad_images_are_counted_by_epoch_and_a_good_one_breaks_the_row() -> None:
    tally = BadFiles(100, 0.1)
    for epoch in (0, 1, 0, 1, 2):  # the next epoch is begun before the last batch of this one is done
        for index in range(9):
            tally.add(BadImage(f"{epoch}-{index}", "no picture"), epoch)
    tally.add(BadImage("2-9", "no picture"), 2)
    tally.add(BadImage("1-9", "no picture"), 1)
    with pytest.raises(TooManyBadImages, match="11 of the 100 images of epoch 1"):
        tally.add(BadImage("1-10", "no picture"), 1)
    tally = BadFiles(100, 0.1)
    for index in range(300):
        tally.add(BadImage(f"{index % 5}", "no picture"), 0)
        if index % 99 == 98:
            tally.good()


def test_a_resumed_epoch_stops_where_an_uninterrupted_one_would() -> None:
    bad = [int(key) for key in permutation(0, 0, 100)[[*range(0, 48, 4), *range(52, 100, 4)]]]
    config = config_of(data__max_bad_fraction=0.2, data__workers=0, train__epochs=1)
    first, second = (Loader(Pictures(100, bad=bad), config) for _ in range(2))
    assert len(list(first.stream(0, 0, 12))) == 12
    state = first.state()
    assert len(state["bad"][0]) >= 12 and len(list(second.stream(0, 13, 12))) == 12  # alone, half of them are allowed
    third = Loader(Pictures(100, bad=bad), config)
    third.load_state(state)
    with pytest.raises(TooManyBadImages, match="21 of the 100"):
        list(third.stream(0, 13, 12))


def test_what_stopped_a_run_is_not_held_against_the_next() -> None:
    """A disk that was away for a while: the names that it took stay in the checkpoint."""

    def add(tally: BadFiles, count: int) -> None:
        for index in range(count):
            tally.add(BadImage(f"{index}", "no picture"), 0)

    stopped, again, running = (BadFiles(100, 0.1) for _ in range(3))
    with pytest.raises(TooManyBadImages):
        add(stopped, 30)
    again.load_state(stopped.state())
    add(again, 10)
    running.load_state(again.state())
    with pytest.raises(TooManyBadImages, match="11 of the 100"):
        running.add(BadImage("10", "no picture"), 0)


def test_a_stream_goes_on_over_the_ends_of_epochs() -> None:
    loader = Loader(SCENES, config_of(train__epochs=3))
    expected = [batch for epoch in (0, 1, 2) for batch in loader.epoch(epoch)]
    found = list(loader.stream(0, 4, 10))
    loader.close()
    assert len(found) == 10 and all(map(same, found, expected[4:14]))


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


def test_a_hundred_in_a_row_stop_a_run_long_before_the_share_is_reached() -> None:
    source = Pictures(10_000, bad=range(10_000))
    config = config_of(data__max_bad_fraction=0.5)
    with pytest.raises(TooManyBadImages, match="100 images in a row cannot be read"):
        epoch_of(source, config)
    assert len(source.reads) < 150


def test_bad_images_opened_ahead_are_no_row_if_good_ones_lie_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_module, "IN_A_ROW", 12)
    keys = permutation(0, 0, 96).tolist()
    config = config_of(data__max_bad_fraction=1.0, data__workers=1, train__batch_size=48)
    assert len(epoch_of(Pictures(96, bad=keys[::2]), config)) == 2


# ---- failures ----


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
    assert time.monotonic() - start < 3
    source.release.set()
    loader.close()


def test_slow_but_steady_reading_is_no_stall() -> None:
    class Slow(Pictures):
        def read(self, index: int) -> np.ndarray:
            time.sleep(0.1)
            return super().read(index)

    config = config_of(train__batch_size=24, data__workers=1, data__timeout=1.0)  # a batch takes 2.4 s
    assert len(epoch_of(Slow(24), config)) == 1


def test_without_workers_nothing_is_made_ahead() -> None:
    source = Pictures(24)
    loader = Loader(source, config_of(data__workers=0, data__prefetch=2))
    for number, _ in enumerate(loader.epoch(0), 1):
        assert len(source.reads) == 4 * number
    loader.close()


@pytest.mark.parametrize("packed", [False, True])
def test_large_images_are_not_all_held_at_once(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = epoch_of(SCENES, config_of(train__batch_size=24), dtype=torch.uint8)
    lots: list[int] = []
    monkeypatch.setattr(pending_module, "_MOST_HELD", 5 * 48 * 48 * 3)
    monkeypatch.setattr(pending_module, "_MOST_PACKED", 0)
    draw = reader_module.draw_views

    def spy(views: Any, sizes: Any, **options: Any) -> np.ndarray:
        lots.append(len(sizes))
        return draw(views, sizes, **options)

    monkeypatch.setattr(reader_module, "draw_views", spy)
    found = epoch_of(SCENES, config_of(train__batch_size=24, data__workers=1), dtype=torch.uint8, packed=packed)
    assert max(lots) == 5 and sum(lots[:6]) == 24 and all(map(same, found, plain))


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
        from scrl_fast.config import Config
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


# ---- wrong use ----


def test_batch_larger_than_the_data() -> None:
    with pytest.raises(
        UsageError, match=r"train\.batch_size=26 needs 26 images .* has 25: use --train.batch_size=25 or"
    ):
        Loader(SCENES, config_of(train__batch_size=26))
    with pytest.raises(
        UsageError, match=r"batch_size=10 x 4 processes needs 40 images .*: use --train.batch_size=6 or less"
    ):
        Loader(SCENES, config_of(train__batch_size=10), world_size=4)
    with pytest.raises(UsageError, match=r"26 processes needs .*there must be more images"):
        Loader(SCENES, config_of(), world_size=26)


@pytest.mark.parametrize(
    "named, changes",
    [
        ("data.workers", {"data__workers": -1}),
        ("data.prefetch", {"data__prefetch": -1}),
        ("train.batch_size", {"train__batch_size": 0}),
    ],
)
def test_wrong_options(named: str, changes: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=named):
        Loader(SCENES, config_of(**changes))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="rank"):
        Loader(SCENES, config_of(), rank=2, world_size=2)
    loader = Loader(SCENES, config_of())
    with pytest.raises(ValueError, match="start_batch"):
        next(loader.epoch(0, 7))
    loader.close()
