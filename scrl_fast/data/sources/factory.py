"""The source of images that a configuration asks for."""

from __future__ import annotations

import os

from scrl_fast.config.schema import Config, DataConfig
from scrl_fast.data.image_files import ImageLimits
from scrl_fast.data.sources.base import Source
from scrl_fast.data.sources.demo import DemoScenes
from scrl_fast.data.sources.files import class_folders, image_folder, image_list
from scrl_fast.data.sources.hub import hub_dataset
from scrl_fast.data.sources.shards import packed_shards, tar_shards
from scrl_fast.errors import UsageError


def make_source(config: Config | DataConfig, *, seed: int | None = None) -> Source:
    """The source of a configuration. seed: of the generated scenes; a Config brings its own (train.seed).

    Raises UsageError that says what to change, before any image is read, when the images are not where data.root says.
    """
    data = config.data if isinstance(config, Config) else config
    if seed is None:
        seed = config.train.seed if isinstance(config, Config) else 0
    root, limits = os.path.expanduser(data.root), ImageLimits.of(data)
    if data.source == "demo":
        return DemoScenes(data.demo_images, data.demo_size, seed)
    if data.source == "folder":
        return image_folder(root, limits=limits)
    if data.source in ("imagefolder", "imagenet"):
        return class_folders(root, limits=limits, train_split=data.source == "imagenet")
    if data.source == "list":
        return image_list(root, limits=limits)
    if data.source == "tar":
        return tar_shards(root, limits=limits)
    if data.source == "packed":
        return packed_shards(root, limits=limits)
    if data.source == "hf":
        return hub_dataset(root, limits=limits)
    raise UsageError(f"data.source is {data.source!r}, which is none of its choices")
