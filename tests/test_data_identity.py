"""The identity of a source: the same images give the same one wherever they lie, other images another."""

from __future__ import annotations

import shutil
import tarfile
import time
from pathlib import Path

import pytest
from photos import write_photos
from tiny_data import write_coco
from tiny_loader import Pictures

from scrl_fast.config.schema import DataConfig
from scrl_fast.data import DemoScenes, identity_of, make_source
from scrl_fast.data.sources.base import identity_of_names
from scrl_fast.data.sources.coco import read_coco


def folder_of(root: Path, count: int = 6) -> Path:
    write_photos(root / "a", count, 40, 60)
    write_photos(root / "b", count, 40, 60)
    return root


def tar_of(root: Path, folder: Path) -> Path:
    root.mkdir()
    with tarfile.open(root / "0.tar", "w") as archive:
        for path in sorted(folder.rglob("*.jpg")):
            archive.add(path, path.name if path.parent.name == "a" else f"b/{path.name}")
    return root


@pytest.mark.parametrize("kind", ["folder", "imagefolder", "list", "tar"])
def test_moved_images_are_the_same_and_others_are_not(tmp_path: Path, kind: str) -> None:
    def source(root: Path) -> object:
        place = tar_of(root / "tar", root) if kind == "tar" else root
        if kind == "list":
            place = root / "list.txt"
            place.write_text("".join(f"{path.relative_to(root)}\n" for path in sorted(root.rglob("*.jpg"))))
        return make_source(DataConfig(source=kind, root=str(place)))  # type: ignore[arg-type]

    first = folder_of(tmp_path / "one")
    shutil.copytree(first, tmp_path / "moved")
    shutil.copytree(first, tmp_path / "other")
    (tmp_path / "other" / "a" / "0000.jpg").rename(tmp_path / "other" / "a" / "0009.jpg")
    shutil.copytree(first, tmp_path / "less")
    (tmp_path / "less" / "b" / "0003.jpg").unlink()
    found = [identity_of(source(tmp_path / name)) for name in ("one", "moved", "other", "less")]
    assert found[0] == found[1] and [one["images"] for one in found] == [12, 12, 12, 11]
    assert len({one["names"] for one in found}) == 3


def test_every_source_has_one(tmp_path: Path) -> None:
    write_coco(tmp_path)
    coco = identity_of(read_coco(str(tmp_path)))
    shutil.move(tmp_path / "val2017", tmp_path / "else")
    again = identity_of(read_coco(str(tmp_path), image_folder=str(tmp_path / "else")))
    assert coco == again and coco["images"] == 6
    scenes = [DemoScenes(4, 32), DemoScenes(4, 32), DemoScenes(4, 32, seed=1), DemoScenes(4, 32, split="test")]
    assert len({str(identity_of(scene)) for scene in scenes}) == 3
    assert identity_of(Pictures(25)) == identity_of(Pictures(25)) != identity_of(Pictures(24))  # the user's own


def test_a_million_names_take_no_time() -> None:
    names = [f"/data/train/n{index // 1300:08d}/n{index // 1300:08d}_{index}.JPEG" for index in range(1_000_000)]
    start = time.process_time()
    assert identity_of_names(names)["images"] == 1_000_000
    assert time.process_time() - start < 10  # some tenths of a second
    assert identity_of_names([]) == {"images": 0, "names": identity_of_names([])["names"]}
    assert identity_of_names(["a/b\udce9.jpg"])["images"] == 1
