"""The source of images that a configuration asks for."""

from __future__ import annotations

import os

from scrl_fast.config.schema import Config, DataConfig
from scrl_fast.data.image_files import ImageLimits
from scrl_fast.data.sources.base import Source
from scrl_fast.data.sources.demo import DemoScenes
from scrl_fast.data.sources.files import ImageFiles, class_folders, image_folder, image_list
from scrl_fast.data.sources.hub import DatasetImages, hub_dataset
from scrl_fast.data.sources.joined import JoinedImages, check_apart
from scrl_fast.data.sources.remote import is_url
from scrl_fast.data.sources.shards import TarImages, packed_shards, tar_shards
from scrl_fast.errors import UsageError


def make_source(config: Config | DataConfig, *, seed: int | None = None) -> Source:
    """The source of a configuration. seed: of the generated scenes; a Config brings its own (train.seed).

    Raises UsageError that says what to change, before any image is read, when the images are not where data.root says.
    """
    data = config.data if isinstance(config, Config) else config
    if seed is None:
        seed = config.train.seed if isinstance(config, Config) else 0
    if data.source == "demo":
        return DemoScenes(data.demo_images, data.demo_size, seed)
    roots, limits = list(map(os.path.expanduser, data.roots)), ImageLimits.of(data)
    if len(roots) > 1:
        check_apart(roots)
        return JoinedImages([_source_at(data.source, root, limits, data.timeout) for root in roots])
    return _source_at(data.source, "".join(roots), limits, data.timeout)


def _source_at(kind: str, root: str, limits: ImageLimits, patience: float) -> ImageFiles | TarImages | DatasetImages:
    if is_url(root) and kind not in ("tar", "hf"):
        raise UsageError(f"data.source={kind} reads no URL ({root}); data.source=tar reads shards from a store")
    if kind == "folder":
        return image_folder(root, limits=limits)
    if kind in ("imagefolder", "imagenet"):
        return class_folders(root, limits=limits, train_split=kind == "imagenet")
    if kind == "list":
        return image_list(root, limits=limits)
    if kind == "tar":
        return tar_shards(root, limits=limits, patience=patience)
    if kind == "packed":
        return packed_shards(root, limits=limits)
    if kind == "hf":
        return hub_dataset(root, limits=limits)
    raise UsageError(f"data.source is {kind!r}, which is none of its choices")
