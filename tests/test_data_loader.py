"""Batches: what is in them, and that their stream does not depend on how they are made."""

from __future__ import annotations

import os
import time
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_loader import SCENES, Pictures, config_of, epoch_of, same

from scrl_fast.data import Batch, Loader, batch_builder
from scrl_fast.data import reader as reader_module
from scrl_fast.data.views import crops_of, draw_views
from scrl_fast.data.workers import worker_count
from scrl_fast.errors import UsageError
from scrl_fast.ops import augment_views, pack_images, sample_box_pairs
from scrl_fast.ops.philox import permutation

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
    part = replace(batch, views=batch.views.to("meta")).to("meta", channels_last=False)  # as views made on a GPU are
    assert part.boxes is not None and part.labels.is_meta and all(boxes.is_meta for boxes in part.boxes)


def test_the_gpu_without_a_number_is_the_present_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(name: str) -> Any:
        def move(*_: object, **__: object) -> None:
            raise NotImplementedError("copied")

        return SimpleNamespace(device=torch.device(name), is_contiguous=lambda memory_format: True, to=move)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    here, there = on("cuda:1"), on("cuda:0")
    batch = Batch(here, (here, here), here, here, here)
    assert batch.to("cuda") is batch is batch.to("cuda:1")
    cases = [(replace(batch, labels=there), "cuda"), (replace(batch, boxes=(here, there)), "cuda"), (batch, "cuda:0")]
    for other, asked in cases:
        with pytest.raises(NotImplementedError, match="copied"):
            other.to(asked)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("CUDA initialised for a CPU batch"))
    plain = epoch_of(SCENES, config_of())[0].to("cpu")
    assert plain.to("cpu") is plain


# ---- the stream does not depend on how it is made ----


@pytest.mark.parametrize("workers, prefetch", [(0, 2), (0, 0), (1, 0), (1, 3), (3, 1), (7, 20)])
def test_any_number_of_workers(workers: int, prefetch: int) -> None:
    expected = epoch_of(SCENES, config_of(), epoch=1)
    found = epoch_of(SCENES, config_of(data__workers=workers, data__prefetch=prefetch), epoch=1)
    assert len(found) == len(expected) and all(map(same, found, expected))


@pytest.mark.parametrize(
    ("cores", "processes", "on_gpu", "workers"),
    [(2, 1, False, 1), (8, 1, False, 6), (8, 1, True, 7), (64, 8, True, 7), (4, 8, True, 1)],
)
def test_auto_takes_the_cores_that_training_leaves(monkeypatch, cores, processes, on_gpu, workers) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert worker_count("auto", on_gpu) == workers
    assert worker_count(5, on_gpu) == 5


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


def test_a_stream_goes_on_over_the_ends_of_epochs() -> None:
    loader = Loader(SCENES, config_of(train__epochs=3))
    expected = [batch for epoch in (0, 1, 2) for batch in loader.epoch(epoch)]
    found = list(loader.stream(0, 4, 10))
    loader.close()
    assert len(found) == 10 and all(map(same, found, expected[4:14]))


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
    monkeypatch.setattr(batch_builder, "_MOST_HELD", 5 * 48 * 48 * 3)
    monkeypatch.setattr(batch_builder, "_MOST_PACKED", 0)
    draw = reader_module.draw_views

    def spy(views: Any, sizes: Any, **options: Any) -> np.ndarray:
        lots.append(len(sizes))
        return draw(views, sizes, **options)

    monkeypatch.setattr(reader_module, "draw_views", spy)
    found = epoch_of(SCENES, config_of(train__batch_size=24, data__workers=1), dtype=torch.uint8, packed=packed)
    assert max(lots) == 5 and sum(lots[:6]) == 24 and all(map(same, found, plain))


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
