"""Shards in a store: the images, order and resume of local shards, whatever the store does meanwhile."""

from __future__ import annotations

import logging
import re
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from test_data_shards import jpeg, names, source, write_tar
from tiny_loader import config_of

from scrl_fast.data import BadImage, Loader, LoaderStalled, identity_of
from scrl_fast.data.sources import remote
from scrl_fast.data.sources.shards import tar_shards
from scrl_fast.errors import UsageError
from scrl_fast.evaluate.__main__ import main as evaluate_main


class OddStore(MemoryFileSystem):
    """The files of memory:// by a store that fails, hangs or lies as a test wants it."""

    protocol = "odd"
    failures: ClassVar[list[BaseException]] = []
    asked: ClassVar[list[tuple[str, Any, Any]]] = []
    hold: ClassVar[threading.Event] = threading.Event()
    cuts: ClassVar[list[int]] = []
    fault: ClassVar[str] = ""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.removeprefix("odd://"))

    def unstrip_protocol(self, name: str) -> str:
        return f"odd://{name}"

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        found = super().info(path, **options)
        if self.fault == "no version":
            return {name: found[name] for name in ("name", "size", "type")}
        return found | {"no size": {"size": None}, "no ranges": {"partial": False}}.get(self.fault, {})

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        self.asked.append((path, start, end))
        if self.fault == "down":
            raise ConnectionError("unreachable")
        if self.fault == "hangs":
            self.hold.wait(20)
        if self.failures:
            raise self.failures.pop(0)
        whole = self.fault == "whole files"
        data: bytes = super().cat_file(path, None if whole else start, None if whole else end, **options)
        return data[: self.cuts.pop(0)] if self.cuts else data


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Shards of 9, 8 and 8 images in a folder and under memory://bucket; odd:// reads the latter."""
    (tmp_path / "shards").mkdir()
    files = fsspec.filesystem("memory")
    for shard, numbers in enumerate((range(9), range(9, 17), range(17, 25))):
        path = tmp_path / f"shards/t-{shard:02d}.tar"
        write_tar(path, {f"{n}.{kind}": jpeg(n) if kind == "png" else b"5" for n in numbers for kind in ("png", "cls")})
        files.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    files.pipe_file("/bucket/notes.txt", b"")
    fsspec.register_implementation("odd", OddStore, clobber=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.001)
    OddStore.failures, OddStore.asked, OddStore.fault, OddStore.hold = [], [], "", threading.Event()
    OddStore.cuts = []
    yield files
    OddStore.hold.set()
    OddStore.fault = ""
    files.store.clear()


def urls(tmp_path: Path) -> list[str]:
    return [
        *("memory://bucket/t-{00..02}.tar", "memory://bucket", "memory://bucket/t-*.tar", "odd://bucket/"),
        *(f"file://{tmp_path}/shards", f"file://{tmp_path}/shards/t-{{00..02}}.tar"),
    ]


def test_the_same_images_as_local_shards(tmp_path: Path) -> None:
    local = source(tmp_path / "shards")
    for url in urls(tmp_path):
        found = source(url)
        assert names(found) == names(local) and found.num_classes == local.num_classes == 6
        assert identity_of(found) == identity_of(local)  # so that a run goes on where its shards have moved to
        assert found.data(24) == local.data(24) and np.array_equal(found.read(3), local.read(3))
        assert not found.problems
    assert found.name_of(9) == f"file://{tmp_path}/shards/t-01.tar:9.png"
    assert names(source("memory://bucket/t-0{2,0}.tar"))[0] == "17.png"  # their order is kept


def test_several_places_near_and_far(tmp_path: Path) -> None:
    found = source(f"memory://bucket/t-00.tar,{tmp_path}/shards/t-01.tar")
    assert len(found) == 17 and np.array_equal(found.read(16), source(tmp_path / "shards").read(16))


def test_order_and_resume_are_those_of_local_shards(tmp_path: Path) -> None:
    batches = {}
    for place in (str(tmp_path / "shards"), "memory://bucket/t-{00..02}.tar"):
        with closing(Loader(source(place), config_of())) as loader:
            batches[place] = [batch.views.clone() for batch in loader.epoch(1)]
        with closing(Loader(source(place), config_of(data__workers=1))) as loader:
            rest = [batch.views.clone() for batch in loader.epoch(1, 4)]
        assert all(bool((a == b).all()) for a, b in zip(rest, batches[place][4:], strict=True))
    near, far = batches.values()
    assert len(near) == 6 and all(bool((a == b).all()) for a, b in zip(near, far, strict=True))


def test_the_index_is_kept_here_and_only_ranges_are_read(tmp_path: Path, store: Any) -> None:
    first = source("odd://bucket/t-00.tar")
    assert OddStore.asked == [("/bucket/t-00.tar", 0, store.info("/bucket/t-00.tar")["size"])]  # at most 4 MiB at once
    (kept,) = (tmp_path / "cache/scrl_fast/shards").iterdir()
    OddStore.asked = []
    again = source("odd://bucket/t-00.tar")
    assert not OddStore.asked and names(again) == names(first)
    again.data(3)
    ((_, start, end),) = OddStore.asked
    assert end - start == len(jpeg(3))
    before = kept.read_bytes()
    store.pipe_file("/bucket/t-00.tar", (tmp_path / "shards/t-01.tar").read_bytes())
    assert names(source("odd://bucket/t-00.tar"))[0] == "9.png" and kept.read_bytes() != before


def test_a_failure_is_tried_again_and_named(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    OddStore.failures = [ConnectionResetError("reset"), TimeoutError()]
    with caplog.at_level(logging.WARNING, "scrl_fast"):
        found = source("odd://bucket/t-00.tar")
        OddStore.failures = [RuntimeError("503 Slow Down")]
        assert found.data(0) == jpeg(0)
    said = [record.getMessage() for record in caplog.records]
    file = "odd://bucket/t-00.tar"
    assert said == [
        f"{file}: ConnectionResetError: reset; try 2 follows in 0.001 s; such waits end after 30 s in all",
        f"{file}: TimeoutError: no message; try 3 follows in 0.002 s",
        f"{file}: RuntimeError: 503 Slow Down; try 2 follows in 0.001 s; such waits end after 300 s in all",
    ]


def test_waits_grow_to_a_limit_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.5)
    monkeypatch.setattr(remote.time, "sleep", slept.append)

    def fails() -> None:
        raise ConnectionError("unreachable")

    with pytest.raises(OSError, match="failed 11 times, the last time with ConnectionError: unreachable"):
        remote.ask("a", fails, 125.0)
    assert slept == [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 3.5]
    slept.clear()
    with pytest.raises(OSError, match="failed 7 times"):
        remote.ask("a", fails, remote._START_PATIENCE)
    assert sum(slept) == 30


@pytest.mark.parametrize(("status", "tries"), [(403, 1), (410, 1), (429, 3), (503, 3)])
def test_a_web_server_that_refuses_is_not_asked_again(status: int, tries: int) -> None:
    class Answer(Exception):
        def __init__(self) -> None:
            self.status = status

    asked: list[int] = []

    def question() -> bytes:
        asked.append(1)
        if len(asked) < 3:
            raise Answer
        return b"x"

    if tries == 1:
        with pytest.raises(OSError, match="Answer"):
            remote.ask("a", question, 1.0)
    else:
        assert remote.ask("a", question, 1.0) == b"x"
    assert len(asked) == tries


def test_an_answer_that_is_cut_is_asked_for_again(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    OddStore.cuts = [300]
    found = source("odd://bucket/t-00.tar")
    assert names(found) == names(source(tmp_path / "shards"))[:9] and not found.problems
    OddStore.cuts = [10]
    assert found.data(2) == jpeg(2)
    assert [re.search(r"\d+ of \d+ bytes came", r.getMessage()) is not None for r in caplog.records] == [True, True]


def test_no_index_is_kept_of_a_store_that_tells_no_version(store: Any, tmp_path: Path) -> None:
    OddStore.fault = "no version"
    assert names(source("odd://bucket/t-00.tar"))[0] == "0.png"
    store.pipe_file("/bucket/t-00.tar", (tmp_path / "shards/t-01.tar").read_bytes())
    assert names(source("odd://bucket/t-00.tar"))[0] == "9.png"


@pytest.mark.parametrize("fault", ["down", "hangs"])
def test_a_store_that_stays_away_is_a_disk_that_does_not_answer(fault: str) -> None:
    config = config_of(data__timeout=0.2)
    found = source("odd://bucket")
    OddStore.fault = fault
    with closing(Loader(found, config)) as loader:
        with pytest.raises(
            LoaderStalled,
            match=r"no image was finished for 0\.2 s .*reading odd:///bucket/t-0\d\.tar:|tried again for 0\.2 s",
        ):
            next(loader.epoch(0))
        assert not loader.bad_files  # and none was replaced
        OddStore.fault = ""
        OddStore.hold.set()


def test_evaluation_waits_for_a_store_no_longer_than_data_timeout(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    found = tar_shards("odd://bucket", patience=0.01)
    OddStore.fault = "down"
    with pytest.raises(
        LoaderStalled, match=r"t-00\.tar: the store failed \d+ times, .*unreachable; it was tried again"
    ):
        found.data(0)
    images = ["--data.source=tar", "--data.root=odd://bucket", "--data.timeout=0.01", "--size=32", "--images=4"]
    with pytest.raises(SystemExit, match=r"^1$"):
        evaluate_main(["rank", "--checkpoint=random", "--backbone=resnet10_tiny", *images])
    assert "such waits end after 0.01 s in all" in caplog.text
    assert "If it is only slow, use --data.timeout=0.02" in capfd.readouterr().err.splitlines()[-1]


def test_training_without_workers_ends_by_the_same_limit() -> None:
    config = config_of(data__timeout=0.01, data__workers=0)
    found = tar_shards("odd://bucket", patience=config.data.timeout)
    OddStore.fault = "down"
    with closing(Loader(found, config)) as loader:
        with pytest.raises(LoaderStalled, match="tried again for"):
            next(loader.epoch(0))
        assert not loader.bad_files


def test_an_image_that_is_gone_for_good_is_a_bad_file(store: Any) -> None:
    found = source("odd://bucket/t-00.tar")
    OddStore.failures = [PermissionError("no access")]
    with pytest.raises(BadImage, match=r"t-00\.tar:0\.png: no access"):
        found.data(0)
    store.pipe_file("/bucket/t-00.tar", b"short")
    with pytest.raises(BadImage, match="has become shorter"):
        found.data(8)


def test_a_store_is_not_trusted(store: Any, tmp_path: Path) -> None:
    small = source("odd://bucket/t-00.tar", max_file_bytes=10)
    with pytest.raises(BadImage, match=r"more than data\.max_file_bytes=10"):
        small.data(0)
    found = source("odd://bucket/t-00.tar")
    OddStore.fault = "whole files"
    with pytest.raises(BadImage, match="sends whole files instead of the ranges"):
        found.data(0)
    OddStore.fault = "no size"
    with pytest.raises(UsageError, match=r"t-01\.tar' cannot be read: the store does not tell its size"):
        source("odd://bucket/t-01.tar")
    OddStore.fault = "no ranges"
    with pytest.raises(UsageError, match=r"t-01\.tar' cannot be read: the store does not send ranges of it"):
        source("odd://bucket/t-01.tar")
    OddStore.fault = ""
    store.pipe_file("/bucket/t-02.tar", (tmp_path / "shards/t-02.tar").read_bytes()[:-20_000])
    assert any("is cut" in problem for problem in source("odd://bucket").problems)


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("memory://bucket/gone.tar", r"shard 'memory://bucket/gone\.tar' cannot be read"),
        ("memory://bucket/x-*.tar", r"holds no \.tar files"),
        ("memory://bucket/notes.txt", "no images in the 1 shards"),
        ("s3nope://b/{0..1}.tar", "cannot be opened: Protocol not known: s3nope"),
        ("simplecache::memory://bucket", "chains of file systems"),
        ("ftp://me:secret@host/a.tar", r"^data\.root holds a password"),
        ("https://me:se/secret@host/a.tar", r"^data\.root holds a password"),
        ("https://host/a.tar?X-Amz-Signature=secret", r"^data\.root holds a password, or a query"),
        ("https://host:8080/a@secret/gone.txt", "cannot be read|one more package|cannot be opened"),
    ],
)
def test_a_place_that_cannot_be_read_is_named(root: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        tar_shards(root)
    assert "secret" not in str(error.value).replace("a@secret", "")


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", refuse)
    with pytest.raises(UsageError, match=r"one more package beside scrl-fast\[remote\]: Install s3fs to access S3"):
        tar_shards("s3://bucket/{000..146}.tar")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(UsageError, match=re.escape("pip install 'scrl-fast[remote]'")):
        tar_shards("s3://bucket/{000..146}.tar")


def test_other_sources_read_no_url() -> None:
    with pytest.raises(UsageError, match=r"data\.source=folder reads no URL \(s3://bucket\)"):
        source("s3://bucket", "folder")
