from __future__ import annotations

import builtins
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photos import NAMES, crop, write_photos

from scrl_fast.config.schema import DataConfig
from scrl_fast.data import BadImage, make_source
from scrl_fast.errors import UsageError

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the package is imported
PHOTOS = [crop(name, 40, 50) for name in NAMES]


def source(root: Path | str, **options: Any) -> Any:
    return make_source(DataConfig(source="hf", root=str(root), **options))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved dataset: split train of four rows with a second image column and classes, split extra of two."""
    datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "picture": datasets.Image(),
            "mask": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog", "owl"]),
        }
    )

    def rows(numbers: list[int]) -> Any:
        found = [{"id": str(n), "picture": PHOTOS[n], "mask": PHOTOS[n + 1], "label": n % 2} for n in numbers]
        return datasets.Dataset.from_list(found, features=features)

    folder = tmp_path_factory.mktemp("hub") / "saved"
    datasets.DatasetDict(train=rows([0, 1, 2, 3]), extra=rows([4, 2])).save_to_disk(str(folder))
    return folder


def same(pixels: np.ndarray, number: int) -> bool:
    return np.array_equal(pixels, np.asarray(PHOTOS[number]))  # saved as PNG


def test_saved_dataset(saved: Path) -> None:
    found = source(saved)
    assert len(found) == 4 and found.classes == ["cat", "dog", "owl"] and found.num_classes == 3
    assert [found.label(index) for index in range(4)] == [0, 1, 0, 1]
    assert all(same(found.read(index), index) for index in range(4))
    assert found.name_of(2) == f"{saved}[2]"
    assert len(source(f"{saved}:extra")) == 2 and same(source(f"{saved}:extra").read(0), 4)
    assert same(source(f"{saved}:train:mask").read(0), 1) and same(source(f"{saved}::mask").read(0), 1)
    with pytest.raises(BadImage, match=r"saved\[0\]: .*max_pixels=10"):
        source(saved, max_pixels=10).read(0)


def test_one_saved_split_parquet_and_a_folder(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    one = datasets.load_from_disk(str(saved))["extra"]
    one.save_to_disk(str(tmp_path / "one"))
    assert same(source(tmp_path / "one").read(1), 2)
    with pytest.raises(UsageError, match="no splits, so none called 'test'"):
        source(f"{tmp_path / 'one'}:test")
    (tmp_path / "parquet").mkdir()
    one.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    found = source(tmp_path / "parquet")
    assert len(found) == 2 and same(found.read(0), 4) and found.num_classes == 3
    write_photos(tmp_path / "tree" / "b", 2, 40, 50)
    write_photos(tmp_path / "tree" / "a", 1, 40, 50)
    found = source(tmp_path / "tree")
    assert len(found) == 3 and [found.label(index) for index in range(3)] == [0, 1, 1] and found.classes == ["a", "b"]
    assert found.read(0).shape == (40, 50, 3)


def test_rows_without_an_image_or_a_label(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = [
        {"image": None, "label": 2},
        {"image": {"bytes": b"no picture", "path": None}, "label": None},
        {"image": {"bytes": None, "path": str(tmp_path / "gone.jpg")}, "label": 0},
    ]
    (tmp_path / "gone.jpg").touch()
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "odd"))
    (tmp_path / "gone.jpg").unlink()
    found = source(tmp_path / "odd")
    assert [found.label(index) for index in range(3)] == [2, -1, 0] and found.num_classes == 3
    for index, cause in enumerate((r"odd\[0\]: the row has no image", r"odd\[1\]: not an image", r"odd\[2\]: ")):
        with pytest.raises(BadImage, match=cause):
            found.read(index)


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (":tran", r"no split 'tran', but train, extra; did you mean 'train'\?"),
        (":train:pictur", r"no column 'pictur', but id, picture, .*; did you mean 'picture'\?"),
        (":train:id", "column 'id' .* holds no images"),
    ],
)
def test_wrong_names(saved: Path, suffix: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        source(f"{saved}{suffix}")


def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
    with pytest.raises(UsageError, match="NAME_OR_PATH"):
        source("")
    with pytest.raises(UsageError, match="cannot be loaded"):
        source(tmp_path)
    datasets.Dataset.from_list([{"text": "x"}]).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(UsageError, match="no column of images, but text"):
        source(tmp_path / "text")
    empty = datasets.Dataset.from_dict({"image": []}, features=datasets.Features({"image": datasets.Image()}))
    monkeypatch.setattr("scrl_fast.data.sources.hub._load", lambda *_: empty)
    with pytest.raises(UsageError, match="has no rows"):
        source(tmp_path / "empty")


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name == "datasets":
            raise ImportError
        return plain(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"needs the package datasets: pip install datasets .*scrl-fast\[hf\]"):
        source("someone/something")
