"""Images that cannot be read: replaced, counted, named once, and a run stopped when there are too many."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from photos import write_bad, write_photos
from tiny_loader import Pictures, config_of, epoch_of

from scrl_fast.data import BadImage, Loader, TooManyBadImages, image_files, make_source
from scrl_fast.data import bad_images as bad_module
from scrl_fast.data.bad_images import BadFiles
from scrl_fast.data.image_files import MemoryBudget
from scrl_fast.errors import UsageError
from scrl_fast.ops.philox import permutation


def test_a_bad_image_is_replaced_counted_and_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "bad_files.jsonl"
    config = config_of(data__max_bad_fraction=0.5, data__workers=1)  # two may find one in the next epoch first
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
    state = first.state_dict()
    assert len(state["bad"][0]) >= 12 and len(list(second.stream(0, 13, 12))) == 12  # alone, half of them are allowed
    third = Loader(Pictures(100, bad=bad), config)
    third.load_state_dict([state])
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
    again.load_state_dict([stopped.state_dict()])
    add(again, 10)
    running.load_state_dict([again.state_dict()])
    with pytest.raises(TooManyBadImages, match="11 of the 100"):
        running.add(BadImage("10", "no picture"), 0)


def test_another_number_of_processes_shares_what_was_counted() -> None:
    states = [{0: ["a", "b"], 1: ["f"]}, {0: ["b", "c", "d"]}, {0: ["e"]}]
    tallies = [BadFiles(100, 0.1) for _ in range(2)]
    for rank, tally in enumerate(tallies):
        tally.load_state_dict(states, rank, 2)
        tally.add(BadImage("b", "no picture"), 0)  # which both now find
        tally.add(BadImage(f"new {rank}", "no picture"), 0)
    assert [tally.state_dict() for tally in tallies] == [
        {0: ["a", "c", "e", "new 0"], 1: ["f"]},
        {0: ["b", "d", "new 1"]},
    ]
    for index in range(7):
        tallies[1].add(BadImage(f"more {index}", "no picture"), 0)
    with pytest.raises(TooManyBadImages, match="11 of the 100"):
        tallies[1].add(BadImage("last", "no picture"), 0)


def counted(images: int, names: Iterable[str]) -> BadFiles:
    """A tally of 1 % that has met these names, until they stopped it."""
    tally = BadFiles(images, 0.01)
    with suppress(TooManyBadImages):
        for name in names:
            tally.add(BadImage(name, "no picture"), 0)
            tally.good()
    return tally


def test_what_stopped_one_process_is_not_held_against_several() -> None:
    stopped = counted(100_000, map(str, range(2000))).state_dict()
    four = [BadFiles(25_000, 0.01) for _ in range(4)]
    for rank, tally in enumerate(four):
        tally.load_state_dict([stopped], rank, 4)
        for index in range(250):
            tally.add(BadImage(f"{rank} {index}", "no picture"), 0)
            tally.good()


def test_what_stopped_no_process_is_held_against_one() -> None:
    four = [counted(250, [f"{rank} {index}" for index in range(9)]).state_dict() for rank in range(4)]
    one = BadFiles(1000, 0.01)
    one.load_state_dict(four)
    for state in four:  # counted, all of them, though one process would have been stopped by them
        for name in state[0]:
            one.add(BadImage(name, "no picture"), 0)
    with pytest.raises(TooManyBadImages, match="11 of the 1000"):
        one.add(BadImage("new", "no picture"), 0)


def test_another_process_still_holds_its_names_after_a_second_resume() -> None:
    states = [{0: ["a", "b"]}]
    for _ in range(2):
        tallies = [BadFiles(100, 0.1) for _ in range(2)]
        for rank, tally in enumerate(tallies):
            tally.load_state_dict(states, rank, 2)
        states = [tally.state_dict() for tally in tallies]
    tallies[1].add(BadImage("a", "no picture"), 0)
    assert [tally.state_dict() for tally in tallies] == [{0: ["a"]}, {0: ["b"]}]


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


def test_names_that_are_no_utf_8_and_a_list_that_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = BadImage("stra\udcdfe.jpg", "no picture")
    assert str(bad) == "stra\\udcdfe.jpg: no picture" and bad.name == "stra\udcdfe.jpg"
    assert str(pickle.loads(pickle.dumps(bad))) == str(bad)
    tally = BadFiles(100, 0.5, tmp_path / "bad_files.jsonl")
    tally.add(bad, 0)
    caplog.text.encode("utf-8")  # what is logged can be written anywhere
    (line,) = (tmp_path / "bad_files.jsonl").read_text(encoding="ascii").splitlines()
    assert json.loads(line)["path"] == bad.name
    (tmp_path / "folder.jsonl").mkdir()
    lost = BadFiles(100, 0.5, tmp_path / "folder.jsonl")
    lost.add(bad, 0)  # costs the list, not the run
    assert "folder.jsonl cannot be written" in caplog.text and lost.errors


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_pipe_among_the_images_neither_hangs_nor_stops_a_run(tmp_path: Path, workers: int) -> None:
    write_photos(tmp_path, 12, 60, 80)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    config = config_of(data__source="folder", data__root=str(tmp_path), data__workers=workers, data__timeout=60.0)
    loader = Loader(make_source(config), config)
    assert len(list(loader.epoch(0))) == 3
    assert loader.bad_files == {
        f"{tmp_path}/pipe.jpg": "is a named pipe, not a regular file",
        f"{tmp_path}/zero.jpg": "is a device, not a regular file",
    }
    loader.close()


def test_memory_is_held_for_what_takes_the_place_of_a_bad_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a thread holds can grow and shrink; what it held before is given back while it waits."""
    monkeypatch.setattr(image_files, "_ALWAYS_FREE", 0)
    budget = MemoryBudget(1000)
    with budget.reserved(100) as held:
        held.add(500)
        assert held.share == budget._held == 600
        held.add(5000)  # more than there is: all of it
        assert held.share == budget._held == 1000
        held.add(-5590)
        assert held.share == budget._held == 10
    assert budget._held == 0
