"""Where images come from: the small protocol of a source, and the one that a configuration asks for."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from scrl_fast.config.schema import Config, DataConfig
from scrl_fast.data.decode import Encoded

UNLABELLED = -1


class Source(Protocol):
    """A fixed, ordered set of images. `read` is called from several threads at once."""

    num_classes: int
    """Classes of `label`; 0 where there are no labels."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> NDArray[np.uint8]:
        """Image `index` as RGB, uint8 `[H, W, 3]`, not to be written to. Raises BadImage if it cannot be read."""
        ...

    def label(self, index: int) -> int:
        """Class of image `index`, or -1."""
        ...

    def name_of(self, index: int) -> str:
        """What to call image `index` in a message: its path."""
        ...


class EncodedImages:
    """What the sources of image files share: they bring `data`, `name_of` and `max_pixels`."""

    max_pixels: int

    def data(self, index: int) -> bytes:
        """The file of image `index`. Raises BadImage if it cannot be read."""
        raise NotImplementedError

    def name_of(self, index: int) -> str:
        raise NotImplementedError

    def open(self, index: int) -> Encoded:
        """Image `index` before it is decoded. Raises BadImage."""
        return Encoded(self.data(index), max_pixels=self.max_pixels, name=self.name_of(index))

    def read(self, index: int) -> NDArray[np.uint8]:
        return self.open(index).decode()


def make_source(config: Config | DataConfig, *, seed: int | None = None) -> Source:
    """The source of a configuration. seed: of the generated scenes; a Config brings its own (train.seed).

    Raises UsageError that says what to change, before any image is read, when the images are not where data.root says.
    """
    from scrl_fast.data.sources.demo import DemoScenes
    from scrl_fast.data.sources.files import class_folders, image_folder, image_list
    from scrl_fast.data.sources.hub import hub_dataset
    from scrl_fast.data.sources.shards import packed_shards, tar_shards

    data = config.data if isinstance(config, Config) else config
    if seed is None:
        seed = config.train.seed if isinstance(config, Config) else 0
    if data.source == "demo":
        return DemoScenes(data.demo_images, data.demo_size, seed)
    if data.source == "folder":
        return image_folder(data.root, max_pixels=data.max_pixels)
    if data.source in ("imagefolder", "imagenet"):
        return class_folders(data.root, max_pixels=data.max_pixels, train_split=data.source == "imagenet")
    if data.source == "list":
        return image_list(data.root, max_pixels=data.max_pixels)
    if data.source == "tar":
        return tar_shards(data.root, max_pixels=data.max_pixels)
    if data.source == "packed":
        return packed_shards(data.root, max_pixels=data.max_pixels)
    if data.source == "hf":
        return hub_dataset(data.root, max_pixels=data.max_pixels)
    raise ValueError(f"data.source is {data.source!r}, which is none of its choices")
