"""Tar shards: order, labels, exact resume, and archives that are cut, hostile or written by other tools.

This file is long because each kind of odd archive is made here, header by header.
"""

from __future__ import annotations

import io
import logging
import os
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photos import NAMES, crop

from scrl_fast.config.schema import DataConfig
from scrl_fast.data import BadImage, make_source
from scrl_fast.data.sources.shard_index import INDEX_SUFFIX
from scrl_fast.data.sources.shards import TarImages, expand_braces
from scrl_fast.errors import UsageError

IMAGES = [crop(name, 40, 50) for name in NAMES]


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    IMAGES[number % len(IMAGES)].save(file, "PNG")  # without loss; the name does not matter
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> list[int]:
    """A tar of these files; returns where the header of each begins, and where the end mark does."""
    places = []
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in files.items():
            places.append(archive.offset)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        places.append(archive.offset)
    return places


def source(root: Path | str, kind: str = "tar", **options: Any) -> TarImages:
    return make_source(DataConfig(source=kind, root=str(root), **options))  # type: ignore[return-value, arg-type]


def is_image(pixels: np.ndarray, number: int) -> bool:
    return np.array_equal(pixels, np.asarray(IMAGES[number % len(IMAGES)]))


def names(found: TarImages) -> list[str]:
    return [found.name_of(index).partition(".tar:")[2] for index in range(len(found))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of 2, 3 and 1 images with labels, the second in pax format with a name of 300 letters."""
    write_tar(
        tmp_path / "s-00.tar", {"a.jpg": jpeg(0), "a.cls": b"3", "b.cls": b"1\n", "b.PNG": jpeg(1), "b.json": b"{}"}
    )
    long = "deep/" * 30 + "x" * 150
    files = {"a.jpg": jpeg(2), f"{long}.jpg": jpeg(3), f"{long}.cls": b"7", "n/é.jpeg": jpeg(4)}
    write_tar(tmp_path / "s-01.tar", files, tarfile.PAX_FORMAT)
    write_tar(tmp_path / "s-02.tar", {f"{long}.jpg": jpeg(5), "a.txt": b"?"}, tarfile.GNU_FORMAT)
    (tmp_path / "notes.txt").touch()
    return tmp_path


def test_shards(folder: Path) -> None:
    found = source(folder)
    assert [found.label(index) for index in range(6)] == [3, 1, -1, 7, -1, -1] and found.num_classes == 8
    assert names(found)[:3] == ["a.jpg", "b.PNG", "a.jpg"] and names(found)[4] == "n/é.jpeg"
    assert names(found)[3] == names(found)[5] and len(names(found)[3]) == 304
    assert all(is_image(found.read(index), index) for index in (5, 0, 3, 1, 4, 2))
    assert not found.problems
    assert sorted(folder.glob("*.tar")) == [Path(path) for path in found.shards]  # and nothing else was made of them
    with pytest.raises(IndexError):
        found.read(6)


def test_what_names_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(source(folder / "s-01.tar")) == 3
    assert len(source(folder / "s-{00..01}.tar")) == 5
    assert len(source(folder / "s-0{2,0}.tar")) == 3
    assert names(source(folder / "s-0{2,0}.tar"))[1] == "a.jpg"  # their order is kept
    assert len(source(folder / "*-0[12].tar")) == 4
    monkeypatch.chdir(folder)
    assert len(source("s-00.tar")) == 2
    assert list(expand_braces("{8..11}-{a,b}")) == [f"{n}-{c}" for n in (8, 9, 10, 11) for c in "ab"]
    assert list(expand_braces("{08..10}")) == ["08", "09", "10"] and list(expand_braces("{x}")) == ["{x}"]


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("", r"--data\.root=DIR, FILE\.tar or a pattern"),
        ("gone.tar", r"gone\.tar' does not exist"),
        ("*.tgz", "matches no file"),
        ("s-{00..04}.tar", r"names 5 shards, of which 2 do not exist, the first being 's-03\.tar'"),
        ("{0..99999999}.tar", "more than a million"),
        ("empty", r"holds no \.tar files, but its folders train do"),
        ("notes.tar", r"no images in the 1 shards of data\.root='notes\.tar': looked for members ending in \.jpg"),
        ("text.tar", "no images .*is no tar archive"),
        ("nothing.tar", "no images .*ends without the end mark"),
    ],
)
def test_no_shards(folder: Path, monkeypatch: pytest.MonkeyPatch, root: str, message: str) -> None:
    monkeypatch.chdir(folder)
    (folder / "empty" / "train").mkdir(parents=True)
    write_tar(folder / "empty" / "train" / "0.tar", {"a.jpg": jpeg(0)})
    write_tar(folder / "notes.tar", {"a.txt": b"1"})
    (folder / "text.tar").write_text("x" * 5000)
    (folder / "nothing.tar").touch()
    with pytest.raises(UsageError, match=message):
        source(root)


# ---- the index ----


def test_the_index_is_kept_and_made_again_when_the_shard_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard, index = folder / "s-00.tar", folder / f"s-00.tar{INDEX_SUFFIX}"
    assert names(source(shard)) == ["a.jpg", "b.PNG"] and index.exists()
    monkeypatch.setattr("scrl_fast.data.sources.shard_index._scan", lambda *_: pytest.fail("indexed twice"))
    again = source(shard)
    assert names(again) == ["a.jpg", "b.PNG"] and again.label(0) == 3 and is_image(again.read(1), 1)
    monkeypatch.undo()
    write_tar(shard, {"c.jpg": jpeg(2)})
    os.utime(shard, ns=(0, 1))
    assert names(source(shard)) == ["c.jpg"]
    data = index.read_bytes()
    for damaged in (b"", data[:100], data[: len(data) // 2], b"PK" + data[2:90] + bytes(200) + data[290:]):
        index.write_bytes(damaged)
        assert names(source(shard)) == ["c.jpg"]


def test_an_index_that_points_outside_is_not_believed(folder: Path) -> None:
    shard, index = folder / "s-00.tar", folder / f"s-00.tar{INDEX_SUFFIX}"
    source(shard)
    with np.load(index) as file:
        arrays = dict(file)
    for name, value in (("sizes", 1 << 50), ("offsets", -1), ("name_ends", 1 << 40), ("labels", 1 << 30)):
        np.savez(index, **{**arrays, name: np.full_like(arrays[name], value)})
        found = source(shard)
        assert names(found) == ["a.jpg", "b.PNG"] and found.num_classes == 4 and is_image(found.read(1), 1)


def test_a_folder_that_cannot_be_written_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert len(source(folder)) == 6
    assert not list(folder.glob("*.npz")) and not list(folder.glob(".*"))


def test_more_shards_than_may_be_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scrl_fast.data.sources.tar._files_to_keep_open", lambda: 1)
    found = source(folder)
    assert all(is_image(found.read(index), index) for index in (5, 0, 3, 1, 4, 2)) and len(found._handles._open) == 1


def test_indexing_is_quick(tmp_path: Path) -> None:
    write_tar(tmp_path / "many.tar", {f"{number:06d}.jpg": b"x" * 700 for number in range(5000)})
    start = time.process_time()
    assert len(source(tmp_path)) == 5000
    assert time.process_time() - start < 2  # takes 0.1 s


# ---- grouping ----


def test_labels_and_images_of_a_key(tmp_path: Path) -> None:
    files = {
        "a.cls": b"0", "a.seg.png": jpeg(5), "a.jpg": jpeg(0), "a.JPEG": jpeg(1),  # the mask is no picture of its own
        "holiday.1.jpg": jpeg(2), "holiday.2.jpg": jpeg(3),  # these are
        "x/a.jpg": jpeg(4), "b.jpg": jpeg(5), "b.cls": b"cat", "c.cls": b"-1", "c.jpg": jpeg(0), "d.cls": b"1",
        "._e.jpg": b"",
    }  # fmt: skip
    write_tar(tmp_path / "0.tar", files)
    found = source(tmp_path)
    assert names(found) == ["a.jpg", "a.JPEG", "holiday.1.jpg", "holiday.2.jpg", "x/a.jpg", "b.jpg", "c.jpg"]
    assert [found.label(index) for index in range(7)] == [0, 0, -1, -1, -1, -1, -1] and found.num_classes == 1
    assert len(found.problems) == 2 and "1 x label that is no class number, left out: 'b.cls'" in found.problems[0]
    assert "1 x label without an image of its name in the shard, left out: 'd.cls'" in found.problems[1]


# ---- damage and malice ----


def test_a_shard_cut_anywhere_gives_its_whole_members_and_says_so(tmp_path: Path) -> None:
    whole = tmp_path / "whole.tar"
    places = write_tar(whole, {f"{number}.jpg": jpeg(number) for number in range(4)})
    data = whole.read_bytes()
    ends = [place + 512 + len(jpeg(number)) for number, place in enumerate(places[:-1])]
    cuts = [100, 512, *ends, *(end - 1 for end in ends), *places[1:], places[-1] + 512, places[2] + 300]
    for number, cut in enumerate(cuts):
        shard = tmp_path / f"cut{number}.tar"
        shard.write_bytes(data[:cut])
        there = sum(end <= cut for end in ends)
        if not there:
            with pytest.raises(UsageError, match="is cut in"):
                source(shard)
            continue
        found = source(shard)
        assert len(found) == there and all(is_image(found.read(index), index) for index in range(there))
        assert bool(found.problems) == (cut <= places[-1]), cut
        again = source(shard)  # from the index beside it
        assert again.problems == found.problems


def test_problems_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    places = write_tar(tmp_path / "0.tar", {"a.jpg": jpeg(0), "b.jpg": jpeg(1)})
    data = bytearray((tmp_path / "0.tar").read_bytes())
    data[places[1] + 20] ^= 1  # one bit of a header
    (tmp_path / "0.tar").write_bytes(data)
    for number in range(1, 10):
        (tmp_path / f"{number}.tar").write_bytes(data)
    with caplog.at_level(logging.WARNING, "scrl_fast"):
        found = source(tmp_path)
    assert len(found) == 10 and len(found.problems) == 10
    assert f"damaged header at byte {places[1]}" in caplog.messages[0] and str(tmp_path / "0.tar") in caplog.messages[0]
    assert len(caplog.messages) == 6 and "5 more problems" in caplog.messages[5]


def test_joined_and_compressed_archives_are_told(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.jpg": jpeg(0)})
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "two.tar").write_bytes(data + data)
    found = source(tmp_path / "two.tar")
    assert len(found) == 1 and "goes on after its end mark" in found.problems[0]
    with tarfile.open(tmp_path / "gz.tar", "w:gz") as archive:
        archive.add(tmp_path / "a.tar", "a.jpg")
    with pytest.raises(UsageError, match="gunzip"):
        source(tmp_path / "gz.tar")


def test_nothing_reaches_outside(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jpeg(5))
    before = set(Path("/tmp").glob("scrl-evil*"))
    inner = tmp_path / "inner"
    inner.mkdir()
    with tarfile.open(inner / "evil.tar", "w") as archive:

        def add(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes = b"") -> None:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, link, len(data)
            archive.addfile(member, io.BytesIO(data) if data else None)

        add("../up.jpg", data=jpeg(0))
        add("/tmp/scrl-evil.jpg", data=jpeg(1))
        add("soft.jpg", tarfile.SYMTYPE, str(secret))
        add("hard.jpg", tarfile.LNKTYPE, "../secret.jpg")
        add("device.jpg", tarfile.CHRTYPE)
        add("pipe.jpg", tarfile.FIFOTYPE)
        add("folder.jpg", tarfile.DIRTYPE)
        add("good.jpg", data=jpeg(2))
    found = source(inner)
    assert names(found) == ["../up.jpg", "/tmp/scrl-evil.jpg", "good.jpg"]
    assert all(is_image(found.read(index), index) for index in range(3))
    told = "\n".join(found.problems)
    for what in ("symbolic link, left out: 'soft.jpg'", "hard link, left out: 'hard.jpg'", "device, left out"):
        assert what in told
    assert "2 x name outside the archive, read all the same: '../up.jpg', ..." in told and "folder" not in told
    assert {path.name for path in inner.iterdir()} == {"evil.tar", f"evil.tar{INDEX_SUFFIX}"}
    assert {path.name for path in tmp_path.iterdir()} == {"inner", "secret.jpg"}
    assert set(Path("/tmp").glob("scrl-evil*")) == before


def test_hostile_headers_cost_nothing(tmp_path: Path) -> None:
    """Long names of gigabytes, negative and absurd sizes, pax records that lie: an end, soon, without much memory."""
    shard = tmp_path / "0.tar"
    places = write_tar(shard, {"a.jpg": jpeg(0), "b.jpg": jpeg(1)})
    good = shard.read_bytes()

    def header(kind: bytes, size: bytes) -> bytes:
        block = bytearray(512)
        block[:5], block[124 : 124 + len(size)], block[156:157] = b"n.jpg", size, kind
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        return bytes(block)

    huge = b"\x80" + (1 << 62).to_bytes(11, "big")
    lies = [b"", b"x", b"99999 path=a\n", b"0 path=a\n", b"9" * 300, b"11 path=ab", b"-5 size=7\n", b"6 size\n"]
    evil = [
        header(kind, size) for kind in (b"0", b"L", b"x", b"g", b"5") for size in (huge, b"\xff" * 12, b"77777777777")
    ]
    evil += [header(b"x", b"%011o" % 512) + lie.ljust(512, b"\0") for lie in lies]
    for block in evil:
        shard.write_bytes(good[: places[1]] + block + good[places[1] :])
        start = time.process_time()
        found = source(shard)
        assert time.process_time() - start < 1
        assert is_image(found.read(0), 0) and len(found) in (1, 2, 3)
    shard.write_bytes(good[: places[1]] + header(b"L", b"%011o" % (1 << 17)) + bytes(1 << 17) + good[places[1] :])
    assert "a name of 131072 bytes" in source(shard).problems[0]
    shard.write_bytes(good[: places[1]] + header(b"1", b"00000007000") + good[places[1] :])
    assert len(source(shard)) == 2  # nothing follows a link, whatever it claims
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = np.frombuffer(good, np.uint8).copy()
        damaged[places[1] + rng.integers(0, 512, 3)] = rng.integers(0, 256, 3)
        shard.write_bytes(damaged.tobytes())
        assert is_image(source(shard).read(0), 0)


def test_a_shard_that_shrinks_under_way(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a.jpg": jpeg(0), "b.jpg": jpeg(1)})
    found = source(tmp_path)
    os.truncate(tmp_path / "0.tar", 600)
    with pytest.raises(BadImage, match=r"0\.tar:b\.jpg: the shard has become shorter"):
        found.read(1)


def test_bad_images_in_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a.jpg": b"no picture", "b.jpg": b"", "c.jpg": jpeg(0)})
    found = source(tmp_path, max_pixels=1000)
    for index, message in enumerate(("a.jpg: not an image", "b.jpg: the file is empty", "max_pixels=1000")):
        with pytest.raises(BadImage, match=message):
            found.read(index)


# ---- shards from elsewhere ----


def raw_header(name: bytes, size: int, kind: bytes = b"0") -> bytearray:
    block = bytearray(512)
    block[: len(name)], block[124:136], block[156:157] = name, b"%011o\0" % size, kind
    return block


def sealed(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_a_sparse_member_is_left_out_and_what_follows_is_read(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    places = write_tar(shard, {"a.jpg": jpeg(0), "b.jpg": jpeg(1)})
    good = shard.read_bytes()
    old, pax = raw_header(b"old.jpg", 512, b"S"), b"22 GNU.sparse.major=1\n"
    old[482] = 1  # the map goes on in a block of its own
    assert len(pax) == 22
    records = sealed(raw_header(b"x", len(pax), b"x")) + pax.ljust(512, b"\0")
    sparse = sealed(old) + bytes(512) + bytes(512) + records + sealed(raw_header(b"new.jpg", 512)) + bytes(512)
    shard.write_bytes(good[: places[1]] + sparse + good[places[1] :])
    found = source(shard)
    assert names(found) == ["a.jpg", "b.jpg"] and is_image(found.read(1), 1)
    assert "has 2 x sparse file, left out: 'old.jpg', ..." in found.problems[0]


def test_a_member_of_40_gigabytes_is_one_bad_image(tmp_path: Path) -> None:
    shard, size = tmp_path / "0.tar", 40 << 30
    head = raw_header(b"huge.jpg", 0)
    head[124:136] = b"\x80" + size.to_bytes(11, "big")
    with open(shard, "wb") as file:  # sparse: it takes no room on the disk
        file.write(sealed(head))
        file.seek(512 + size)
        file.write(sealed(raw_header(b"a.jpg", len(jpeg(0)))) + jpeg(0))
        file.truncate(512 + size + 512 + 102400)
    found = source(shard)
    with pytest.raises(BadImage, match=r"huge\.jpg: 42949672960 bytes are more than data\.max_file_bytes"):
        found.read(0)
    assert is_image(found.read(1), 0)


def test_member_names_that_are_no_utf_8(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as archive:
        for name, data in (("caf\xe9.jpg", jpeg(0)), ("caf\xe8.jpg", b"no picture"), ("caf\xe9.cls", b"1")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    for _ in range(2):  # the second time from the index
        found = source(tmp_path)
        assert names(found) == ["caf\udce9.jpg", "caf\udce8.jpg"] and found.label(0) == 1
        assert is_image(found.read(0), 0)
        with pytest.raises(BadImage) as error:
            found.read(1)
        assert str(error.value) == f"{tmp_path}/0.tar:caf\\udce8.jpg: not an image of a known format"


def test_an_index_that_is_a_bomb_is_made_anew(folder: Path) -> None:
    shard, index = folder / "s-00.tar", folder / f"s-00.tar{INDEX_SUFFIX}"
    source(shard)
    good = index.read_bytes()
    with np.load(index) as file:
        arrays = {name: file[name] for name in file.files}
    names_of_two = ["a.jpg", "b.PNG"]

    def written(change: dict[str, Any], save: Any = np.savez) -> bytes:
        file = io.BytesIO()
        save(file, **arrays | change)
        return file.getvalue()

    many = np.zeros(100_000, np.int64)
    bombs = [
        written({}, np.savez_compressed),
        written({"offsets": np.zeros(1 << 24, np.int64)}, np.savez_compressed),
        written({"more": many}),
        written({"offsets": arrays["offsets"].astype(np.float64)}),
        written({"offsets": arrays["offsets"].reshape(1, -1)}),
        written({"problems": np.frombuffer(b"[" * 100_000, np.uint8)}),
        written({"problems": np.frombuffer(b'{"a": 1}', np.uint8)}),
        written({"offsets": many, "sizes": many, "labels": many.astype(np.int32), "name_ends": many}),
        good.replace(b"'shape': (2,)", b"'shape': (9,)"),
        good.replace(b"'shape': (2,)", b"'shape': 2**9"),
        b"PK\x05\x06" + bytes(18),
    ]
    for bomb in bombs:
        index.write_bytes(bomb)
        before = time.perf_counter()
        assert names(source(shard)) == names_of_two
        assert time.perf_counter() - before < 1
        assert index.read_bytes() != bomb  # and written again
    index.unlink()
    os.mkfifo(index)
    assert names(source(shard)) == names_of_two


def test_a_manifest_from_elsewhere_is_checked(tmp_path: Path) -> None:
    for text in (
        "[" * 100_000,
        '{"images": 1, "classes": [], "shards": [5]}',
        '{"images": "1", "classes": 3, "shards": 0}',
    ):
        (tmp_path / "packed.json").write_text(text)
        with pytest.raises(UsageError, match=r"packed\.json"):
            source(tmp_path, "packed")
    (tmp_path / "packed.json").unlink()
    os.mkfifo(tmp_path / "packed.json")
    with pytest.raises(UsageError, match=r"packed\.json.*named pipe"):
        source(tmp_path, "packed")


def test_large_pax_records_are_skipped(tmp_path: Path) -> None:
    """Extended attributes and comments before a member may be of any length; only its path must stay short."""
    shard = tmp_path / "0.tar"
    for comment in (10, 60_000, 70_000, 300_000, 3_000_000):
        with tarfile.open(shard, "w", format=tarfile.PAX_FORMAT) as archive:
            for number, name in enumerate(("a" * 200 + ".jpg", "b.jpg")):
                member, data = tarfile.TarInfo(name), jpeg(number)
                member.size, member.pax_headers = len(data), {"comment": "x" * comment, "zzz": "y" * 90}
                archive.addfile(member, io.BytesIO(data))
        found = source(shard)
        assert names(found) == ["a" * 200 + ".jpg", "b.jpg"] and is_image(found.read(1), 1), comment
    with tarfile.open(shard, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("a" * 70_000 + ".jpg"))
    with pytest.raises(UsageError, match="a name of 70004 bytes"):
        source(shard)
