from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from photos import write_bad, write_formats, write_photos

from scrl_fast.config.schema import Config, DataConfig
from scrl_fast.data import BadImage, DemoScenes, make_source
from scrl_fast.errors import UsageError


def source(kind: str, root: Path | str, **options: object):
    return make_source(DataConfig(source=kind, root=str(root), **options))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders b (3 images), a (2, one nested), empty (0), beside hidden and other files."""
    root = tmp_path_factory.mktemp("tree")
    write_photos(root / "b", 3, 40, 50)
    write_photos(root / "a" / "inner", 2, 40, 50)
    (root / "a" / "inner" / "0001.jpg").rename(root / "a" / "z.JPG")
    (root / "empty").mkdir()
    write_photos(root / ".thumbnails", 1, 40, 50)
    (root / "b" / "._0000.jpg").write_text("what some systems leave behind")
    (root / "b" / "notes.txt").touch()
    return root


def names(found, root: Path) -> list[str]:
    return [os.path.relpath(found.name_of(index), root) for index in range(len(found))]


def test_folder(tree: Path) -> None:
    found = source("folder", tree)
    assert names(found, tree) == ["a/inner/0000.jpg", "a/z.JPG", "b/0000.jpg", "b/0001.jpg", "b/0002.jpg"]
    assert found.num_classes == 0 and {found.label(index) for index in range(5)} == {-1}
    assert found.read(1).shape == (40, 50, 3)


def test_folder_of_every_format(tmp_path: Path) -> None:
    files = write_formats(tmp_path)
    found = source("folder", tmp_path)
    assert names(found, tmp_path) == sorted(files)
    assert all(found.read(index).shape == (90, 120, 3) for index in range(len(found)))


def test_bad_images_are_found_when_read(tmp_path: Path) -> None:
    bad = write_bad(tmp_path)
    found = source("folder", tmp_path)
    assert len(found) == len(bad)
    for index in range(len(found)):
        with pytest.raises(BadImage):
            found.read(index)
    with pytest.raises(BadImage, match="max_pixels=5"):
        write_photos(tmp_path / "good", 1, 40, 50)
        source("folder", tmp_path / "good", max_pixels=5).read(0)


@pytest.mark.skipif(os.name == "nt", reason="links need privileges on Windows")
def test_links_are_followed_once(tmp_path: Path) -> None:
    write_photos(tmp_path / "real", 2, 40, 50)
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(root)
    assert names(source("folder", root), root) == ["link/0000.jpg", "link/0001.jpg"]


def test_imagefolder(tree: Path) -> None:
    found = source("imagefolder", tree)
    assert found.classes == ["a", "b", "empty"] and found.num_classes == 3  # numbered as torchvision does
    assert [found.label(index) for index in range(len(found))] == [0, 0, 1, 1, 1]
    assert names(found, tree)[0] == "a/inner/0000.jpg"


def test_imagenet_takes_the_train_folder_where_there_is_one(tree: Path, tmp_path: Path) -> None:
    assert len(source("imagenet", tree)) == 5
    write_photos(tmp_path / "train" / "n01440764", 2, 40, 50)
    write_photos(tmp_path / "val" / "n01440764", 1, 40, 50)
    found = source("imagenet", tmp_path)
    assert found.classes == ["n01440764"] and len(found) == 2


def test_list(tree: Path) -> None:
    file = tree / "list.txt"
    elsewhere = str(tree / "b" / "0000.jpg")
    file.write_text(f"# photographs\nb/0002.jpg\n\n a/z.JPG \n{elsewhere}\n")
    found = source("list", file)
    assert names(found, tree) == ["b/0002.jpg", "a/z.JPG", "b/0000.jpg"]  # its order is kept
    assert found.read(2).shape == (40, 50, 3) and found.num_classes == 0


def test_demo() -> None:
    config = Config()
    config.data.demo_images, config.data.demo_size = 3, 48
    found = make_source(config)
    assert isinstance(found, DemoScenes) and len(found) == 3 and found.read(0).shape == (48, 48, 3)
    config.train.seed = 1
    assert not np.array_equal(make_source(config).read(0), found.read(0))


# ---- what is wrong is said, before anything is read ----


@pytest.mark.parametrize("kind", ["folder", "imagefolder", "imagenet", "list"])
def test_missing_root(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--data\.root"):
        source(kind, "")
    with pytest.raises(UsageError, match="gone' does not exist"):
        source(kind, tmp_path / "gone")


@pytest.mark.parametrize("kind", ["folder", "imagefolder", "imagenet"])
def test_root_that_is_a_file(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").touch()
    with pytest.raises(UsageError, match="is a file, not a folder"):
        source(kind, tmp_path / "file.txt")


@pytest.mark.parametrize("kind", ["folder", "imagefolder", "imagenet"])
def test_no_images(kind: str, tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    with pytest.raises(UsageError, match=r"looked for \.jpg, .* found no files at all"):
        source(kind, tmp_path)
    for name in ("one.npy", "two.NPY", "notes", "a.txt"):
        (tmp_path / "class" / name).touch()
    with pytest.raises(UsageError, match=r"found 4 other files \(2 x \.npy, "):
        source(kind, tmp_path)


def test_no_class_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no class folders"):
        source("imagefolder", tmp_path)
    write_photos(tmp_path, 2, 40, 50)
    with pytest.raises(UsageError, match=r"holds 2 images but no class folders; --data\.source=folder"):
        source("imagefolder", tmp_path)


def test_bad_lists(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        source("list", tmp_path)
    file = tmp_path / "list.txt"
    file.write_text("# nothing\n\n")
    with pytest.raises(UsageError, match="names no images"):
        source("list", file)
    write_photos(tmp_path, 1, 40, 50)
    file.write_text("0000.jpg\ngone/a.jpg\nb.jpg\n")
    with pytest.raises(UsageError, match=r"names 2 files that do not exist, the first being 'gone/a\.jpg'"):
        source("list", file)
    with pytest.raises(UsageError, match="not a text file"):
        source("list", tmp_path / "0000.jpg")


def test_unknown_source() -> None:
    data = DataConfig()
    data.source = "films"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="films"):
        make_source(data)


# ---- files from elsewhere ----


@pytest.mark.parametrize(
    "text",
    [
        b"./a b.jpg\r\n  sub/c.jpg  \r\n",
        b"\xef\xbb\xbfa b.jpg\nsub/c.jpg",
        "\ufeffa b.jpg\r\nsub\\c.jpg\r\n".encode("utf-16-le"),
        b"'a b.jpg'\n\"sub/c.jpg\"\n\n# the end\n",
        b"~/a b.jpg\n$HOME/sub/c.jpg\n",
        b"a b.jpg\rsub/c.jpg",
    ],
)
def test_a_list_is_read_as_shells_and_editors_write_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_photos(tmp_path / "sub", 2, 40, 50)
    (tmp_path / "sub" / "0000.jpg").rename(tmp_path / "a b.jpg")
    (tmp_path / "sub" / "0001.jpg").rename(tmp_path / "sub" / "c.jpg")
    (tmp_path / "list.txt").write_bytes(text)
    for root in (tmp_path / "list.txt", "~/list.txt"):
        found = source("list", root)
        assert len(found) == 2 and [found.read(index).shape for index in (0, 1)] == [(40, 50, 3)] * 2


@pytest.mark.skipif(os.name == "nt", reason="names of bytes are POSIX's")
def test_a_list_keeps_names_that_are_no_utf_8_and_odd_line_separators(tmp_path: Path) -> None:
    write_photos(tmp_path, 2, 40, 50)
    names = [b"caf\xe9.jpg", "a\u2028b\x0c.jpg".encode()]
    for old, new in zip(("0000.jpg", "0001.jpg"), names, strict=True):
        os.rename(os.fsencode(tmp_path / old), os.fsencode(tmp_path) + b"/" + new)
    (tmp_path / "list.txt").write_bytes(b"\n".join(names))
    assert [source("list", tmp_path / "list.txt").read(index).shape for index in (0, 1)] == [(40, 50, 3)] * 2


def test_a_list_with_labels_or_of_another_kind_says_so(tmp_path: Path) -> None:
    write_photos(tmp_path, 1, 40, 50)
    (tmp_path / "list.txt").write_text("0000.jpg 3\n")
    with pytest.raises(UsageError, match="a label behind the path is not read"):
        source("list", tmp_path / "list.txt")
    with pytest.raises(UsageError, match="not a text file of paths"):
        source("list", tmp_path / "0000.jpg")


def test_a_missing_path_of_a_list_is_shortened_and_gets_no_hint_that_does_not_fit(tmp_path: Path) -> None:
    for line in ("a" * 10_000_000, "<!doctype html>", "gone.jpg,1"):
        (tmp_path / "list.txt").write_text(line + "\n")
        with pytest.raises(UsageError, match="names 1 files that do not exist") as error:
            source("list", tmp_path / "list.txt")
        assert len(str(error.value)) < 1000 and "label" not in str(error.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_what_is_no_regular_file_is_one_bad_image(tmp_path: Path) -> None:
    write_photos(tmp_path, 1, 40, 50)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(40 << 30)
    (tmp_path / "list.txt").write_text("0000.jpg\npipe.jpg\nzero.jpg\nfolder\nsparse.jpg\n/proc/self/environ\n")
    for found in (source("folder", tmp_path), source("list", tmp_path / "list.txt")):
        said = {}
        for index in range(len(found)):
            try:
                assert found.read(index).shape == (40, 50, 3)
            except BadImage as bad:
                said[os.path.basename(bad.name)] = bad.cause
        assert said["pipe.jpg"] == "is a named pipe, not a regular file"
        assert said["zero.jpg"] == "is a device, not a regular file"
        assert said["sparse.jpg"] == "42949672960 bytes are more than data.max_file_bytes=268435456"
        assert said.get("folder", "is a folder, not a regular file") == "is a folder, not a regular file"
        assert (
            said.get("environ", "the file is empty") == "the file is empty"
        )  # as the kernel says: nothing is waited for
    with pytest.raises(UsageError, match="is a named pipe"):
        source("list", tmp_path / "pipe.jpg")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_may_not_be_listed_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_photos(tmp_path / "open", 1, 40, 50)
    (tmp_path / "shut").mkdir(mode=0)
    assert len(source("folder", tmp_path)) == 1 and "shut (Permission denied)" in caplog.text
    assert len(source("imagefolder", tmp_path)) == 1


def test_a_folder_that_cannot_be_listed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_photos(tmp_path / "good", 1, 40, 50)
    write_photos(tmp_path / "lost", 1, 40, 50)
    scandir = os.scandir

    def failing(path: str) -> object:
        if os.fspath(path).endswith("lost"):
            raise OSError(5, "Input/output error", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    assert len(source("folder", tmp_path)) == 1
    assert f"1 folders cannot be listed, their images are left out: {tmp_path}/lost (Input/output error)" in caplog.text
    with pytest.raises(UsageError, match=r"1 folders cannot be listed, the first: .*lost \(Input/output error\)"):
        source("folder", tmp_path / "lost")


def test_classes_are_counted_and_what_lies_beside_them_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_photos(tmp_path / "b", 2, 40, 50)
    write_photos(tmp_path / "a", 1, 40, 50)
    write_photos(tmp_path, 3, 40, 50)
    (tmp_path / "empty").mkdir()
    found = source("imagefolder", tmp_path)
    assert found.summary == "3 images in 3 classes: a (1), b (2), empty (0)"
    assert "3 images lie outside of the class folders" in caplog.text and "0002.jpg" in caplog.text
    assert "1 of the class folders" in caplog.text and "hold no images: empty" in caplog.text
