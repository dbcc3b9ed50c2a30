from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photos import photo, write_bad, write_photos
from PIL import Image

from scrl_fast.config.schema import Config, DataConfig
from scrl_fast.data import Loader, make_source
from scrl_fast.data.decode import Encoded
from scrl_fast.data.pack import main, pack, smaller


def source(root: Path | str, kind: str = "packed") -> Any:
    return make_source(DataConfig(source=kind, root=str(root)))  # type: ignore[arg-type]


def run(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Nine photographs in two classes, one PNG, one turned, and four files that are none."""
    write_photos(tmp_path / "in" / "cat", 5, 120, 160)
    write_photos(tmp_path / "in" / "dog", 2, 300, 200)
    picture = Image.open(tmp_path / "in" / "dog" / "0000.jpg")
    picture.save(tmp_path / "in" / "dog" / "z.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "in" / "dog" / "turned.jpg", exif=exif)
    write_bad(tmp_path / "in" / "dog")
    return tmp_path / "in"


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}


def test_pack_and_train(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = (tree, out, "--source=imagefolder", "--shorter-side=100", "--shard-images=4")
    code, told, errors = run(*command, capsys=capsys)
    assert (code, errors) == (0, "")
    assert told.startswith("9 images in 4 shards, 4 that cannot be read are listed in ")
    assert f"--data.source=packed --data.root={out}" in told
    packed = source(out)
    assert len(packed) == 9 and packed.classes == ["cat", "dog"] and packed.num_classes == 2
    assert [packed.label(index) for index in range(9)] == [0] * 5 + [1] * 4
    assert sorted({packed.read(index).shape for index in range(9)}) == [(100, 133, 3), (100, 150, 3), (150, 100, 3)]
    listed = [json.loads(line)["path"] for line in (out / "bad_files.jsonl").read_text().splitlines()]
    assert sorted(Path(path).name for path in listed) == ["cut.jpg", "cut.png", "empty.png", "text.jpg"]
    original = Image.fromarray(source(tree, "imagefolder").read(0)).resize((133, 100), Image.Resampling.BICUBIC)
    assert np.abs(packed.read(0).astype(int) - np.asarray(original)).mean() < 4  # JPEG of quality 92
    assert len(source(out, "tar")) == 9 and len(list(out.glob("*.tar.sha256"))) == 4

    config = Config()
    config.train.batch_size, config.views.size, config.boxes.min_size, config.data.workers = 4, 32, 8, 0
    assert sum(len(batch.labels) for batch in Loader(packed, config).epoch(0)) == 8

    before = files(out)
    code, again, _ = run(*command, capsys=capsys)
    assert (code, again) == (0, told) and files(out) == before
    assert len((out / "bad_files.jsonl").read_text().splitlines()) == 4


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL on Windows")
def test_a_kill_loses_nothing(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", 60, 290, 380)
    found = source(tmp_path / "in", "folder")
    pack(found, tmp_path / "whole", shorter_side=64, shard_images=4)
    out = tmp_path / "out"
    options = ["--shorter-side=64", "--shard-images=4", "--workers=1"]
    command = [sys.executable, "-m", "scrl_fast.data.pack", str(tmp_path / "in"), str(out), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while len(list(out.glob("*.tar"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = files(out)
    assert 2 <= len(done) < 15
    (out / ".00099.tar.tmp").write_bytes(b"what a kill may leave")
    with pytest.raises(ValueError, match="was not finished"):
        source(out)
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    manifest = pack(found, out, shorter_side=64, shard_images=4)
    assert all(path.stat().st_mtime_ns == at for path, at in times.items())  # none was made twice
    assert files(out) == files(tmp_path / "whole") and manifest["images"] == 60
    assert not list(out.glob("*.tmp")) and not list(out.glob(".*.tmp")) and len(source(out)) == 60


def test_every_source_can_be_packed(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tree, tmp_path / "a", "--source=imagefolder", capsys=capsys)[0] == 0
    assert run(tmp_path / "a", tmp_path / "b", "--source=tar", "--shorter-side=50", capsys=capsys)[0] == 0
    assert [source(tmp_path / "b").label(index) for index in range(9)] == [0] * 5 + [1] * 4
    (tree / "list.txt").write_text("cat/0001.jpg\n")
    assert run(tree / "list.txt", tmp_path / "c", "--source=list", capsys=capsys)[0] == 0
    assert source(tmp_path / "c").num_classes == 0


def test_what_is_small_already_is_kept() -> None:
    def encoded(**options: Any) -> Encoded:
        file = io.BytesIO()
        Image.fromarray(photo("coffee")).save(file, "JPEG", quality=95, **options)
        return Encoded(file.getvalue(), max_pixels=10**6)

    kept = encoded()
    assert smaller(kept, 400, 92) is kept.data and smaller(kept, 399, 92) is not kept.data
    exif = Image.Exif()
    exif[0x0112] = 3
    assert smaller(encoded(progressive=True), 512, 92) != encoded(progressive=True).data
    upright = Encoded(smaller(encoded(exif=exif), 512, 92), max_pixels=10**6)
    assert upright.is_upright_baseline_jpeg
    assert np.abs(upright.decode().astype(int) - photo("coffee")[::-1, ::-1]).mean() < 4
    tiny = Encoded(smaller(kept, 100, 92), max_pixels=10**6)
    assert (tiny.height, tiny.width) == (100, 150)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone", "out"], "data.root='gone' does not exist"),
        (["in"], "the following arguments are required: OUT (see --help)"),
        (["in", "out", "--source=films"], "invalid choice: 'films'"),
        (["in", "out", "--quality=101"], "quality must lie in 1..100, got 101"),
        (["in", "out", "--shard-images=0"], "shard_images must be at least 1, got 0"),
        (["in", "done", "--quality=50"], "'done' holds a pack with {'shorter_side': 512, 'quality': 92,"),
        (["in/cat", "done"], "'done' holds a pack of other images"),
        (["in", "other"], "'other' holds shards of something else"),
        (["bad", "out"], "none of the 4 images can be read; the first: bad/"),
    ],
)
def test_usage(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list, message: str
) -> None:
    monkeypatch.chdir(tree.parent)
    write_photos(Path("one"), 1, 40, 50)
    Path("bad").mkdir()
    write_bad(Path("bad"))
    pack(source("in", "folder"), "done")
    Path("other").mkdir()
    Path("other", "x.tar").touch()
    code, _, errors = run(*arguments, capsys=capsys)
    assert code == 2 and message in errors.splitlines()[-1] and errors.startswith("scrl_fast.data.pack: ")


def test_a_lost_disk_is_no_set_of_bad_images(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", 40, 40, 50)
    found = source(tmp_path / "in", "folder")
    for path in sorted((tmp_path / "in").iterdir())[20:]:
        path.unlink()
    with pytest.raises(ValueError, match="is the disk still there"):
        pack(found, tmp_path / "out", shard_images=10)
    assert sorted(files(tmp_path / "out")) == ["00000.tar", "00001.tar"]


def test_two_at_once_and_damage_of_the_pack(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import fcntl

    write_photos(tmp_path / "in", 4, 40, 50)
    found, out = source(tmp_path / "in", "folder"), tmp_path / "out"
    pack(found, out, shard_images=2)
    with open(out / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another pack is being written"):
            pack(found, out, shard_images=2)
    os.truncate(out / "00001.tar", 700)
    with pytest.raises(ValueError, match=r"should hold 4 images and holds 2: .*is cut inside"):
        source(out)
    whole = files(out)["00000.tar"]
    with caplog.at_level("WARNING", "scrl_fast"):
        assert pack(found, out, shard_images=2)["images"] == 4  # the same command makes it good
    assert "00001.tar is cut inside" in caplog.text and len(source(out)) == 4 and files(out)["00000.tar"] == whole
    (out / "00001.tar").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 shards .* are gone"):
        source(out)
    (out / "packed.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        source(out)
    (out / "packed.json").unlink()
    with pytest.raises(ValueError, match=r"holds no packed\.json"):
        source(out)
