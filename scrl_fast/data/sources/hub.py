"""Images of a dataset of the Hugging Face package `datasets`, which is needed only for this."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import numpy as np

from scrl_fast.data.image_files import DEFAULT_LIMITS, BadImage, ImageLimits, check_size, read_file
from scrl_fast.data.sources.base import UNLABELLED, EncodedImages, identity_of_names
from scrl_fast.errors import UsageError, did_you_mean

_DEFAULT_SPLIT = "train"
_LABEL_NAMES = ("label", "labels", "fine_label")


class DatasetImages(EncodedImages):
    """One image column of a map-style dataset, read as the files' bytes and decoded as all our images are.

    dataset: a `datasets.Dataset`. column: of feature Image; label_column: of integers, or None.
    """

    def __init__(
        self,
        dataset: Any,
        column: str,
        label_column: str | None = None,
        *,
        limits: ImageLimits = DEFAULT_LIMITS,
        name: str = "dataset",
    ) -> None:
        from datasets import Image

        self.name, self.column, self.limits = name, column, limits
        # only bytes and path: the package's own decoding would be Pillow's, without our size check
        self._images = dataset.select_columns([column]).cast_column(column, Image(decode=False)).with_format(None)
        self.classes: list[str] = []
        self.num_classes, self._labels = 0, None
        if label_column is not None:
            self._labels = np.array(
                [UNLABELLED if label is None else label for label in dataset.with_format(None)[label_column]], np.int64
            )
            most = int(self._labels.max(initial=UNLABELLED)) + 1
            self.classes = list(getattr(dataset.features[label_column], "names", None) or map(str, range(most)))
            self.num_classes = max(len(self.classes), most)

    def __len__(self) -> int:
        return len(self._images)

    def data(self, index: int) -> bytes:
        image = self._images[index][self.column]
        if image is None:
            raise BadImage(self.name_of(index), "the row has no image")
        if image["bytes"] is None:
            return read_file(image["path"], self.name_of(index), limit=self.limits.max_file_bytes)
        check_size(len(image["bytes"]), self.limits.max_file_bytes, self.name_of(index))
        return image["bytes"]

    def label(self, index: int) -> int:
        return UNLABELLED if self._labels is None else int(self._labels[index])

    def name_of(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def identity(self) -> dict[str, Any]:
        """See `identity_of`: rows have no names, so the paths, sizes and labels of their images are hashed."""
        import pyarrow.compute

        column = self._images.data.column(self.column)  # of all rows, also where the dataset is a selection of them
        paths = pyarrow.compute.struct_field(column, "path")
        sizes = pyarrow.compute.binary_length(pyarrow.compute.struct_field(column, "bytes"))
        found = hashlib.sha256(identity_of_names(list(map(str, paths.to_pylist())))["names"].encode())
        found.update(str(sizes.to_pylist()).encode())
        if self._labels is not None:
            found.update(self._labels.astype("<i8").tobytes())
        return {"images": len(self), "names": found.hexdigest()}


def hub_dataset(root: str, *, limits: ImageLimits = DEFAULT_LIMITS) -> DatasetImages:
    """The dataset of `NAME_OR_PATH[:split[:column]]`: on the hub, a folder of images or parquet files, or a saved one.

    split: `train` or the only one by default. column: the first of feature Image by default. Labels come from a column
    called label, labels or fine_label, or else the only one of feature ClassLabel.
    Raises UsageError if the package, the dataset, the split, the column or any image is missing.
    """
    if not root:
        raise UsageError("data.source=hf needs the dataset: --data.root=NAME_OR_PATH[:split[:column]]")
    try:
        import datasets
    except ImportError:
        raise UsageError(
            "data.source=hf needs the package datasets: pip install datasets (or pip install 'scrl-fast[hf]')"
        ) from None
    name, split, column = _parts(root)
    dataset = _choose_split(_load(datasets, name), split, name)
    column = _image_column(datasets, dataset, column, name)
    if not len(dataset):
        raise UsageError(f"the dataset {root!r} has no rows")
    labels = _label_column(datasets, dataset)
    return DatasetImages(dataset, column, labels, limits=limits, name=name)


def _parts(root: str) -> tuple[str, str, str]:
    if os.path.exists(root):  # a path with a colon in it
        return root, "", ""
    name, split, column = [*root.split(":", 2), "", ""][:3]
    return name, split, column


def _load(datasets: Any, name: str) -> Any:
    try:
        if any(os.path.isfile(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json")):
            return datasets.load_from_disk(name)
        return datasets.load_dataset(name)
    except Exception as error:  # the package raises many kinds, all of which mean that this is not to be had
        cause = " ".join(str(error).split())
        raise UsageError(f"the dataset {name!r} cannot be loaded: {type(error).__name__}: {cause}") from error


def _choose_split(loaded: Any, split: str, name: str) -> Any:
    if not hasattr(loaded, "keys"):
        if split:
            raise UsageError(f"the dataset {name!r} has no splits, so none called {split!r}; leave it out")
        return loaded
    splits = list(loaded.keys())
    if not split:
        split = splits[0] if len(splits) == 1 else _DEFAULT_SPLIT
    if split not in splits:
        raise UsageError(
            f"the dataset {name!r} has no split {split!r}, but {', '.join(splits)}{did_you_mean(split, splits)}"
        )
    return loaded[split]


def _image_column(datasets: Any, dataset: Any, column: str, name: str) -> str:
    images = [key for key, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if column and column not in dataset.features:
        columns = ", ".join(dataset.features)
        raise UsageError(
            f"the dataset {name!r} has no column {column!r}, but {columns}{did_you_mean(column, dataset.features)}"
        )
    if column and column not in images:
        raise UsageError(f"column {column!r} of the dataset {name!r} holds no images, but {dataset.features[column]}")
    if not images:
        raise UsageError(f"the dataset {name!r} has no column of images, but {', '.join(dataset.features)}")
    return column or images[0]


def _label_column(datasets: Any, dataset: Any) -> str | None:
    def integers(feature: Any) -> bool:
        return isinstance(feature, datasets.ClassLabel) or str(getattr(feature, "dtype", "")).startswith(
            ("int", "uint")
        )

    for key in _LABEL_NAMES:
        if key in dataset.features and integers(dataset.features[key]):
            return key
    classes = [key for key, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    return classes[0] if len(classes) == 1 else None
