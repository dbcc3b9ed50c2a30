"""Small sources and batches for the tests of the loader."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch

from scrl_fast.config.schema import Config
from scrl_fast.data import BadImage, Batch, DemoScenes, Loader


def config_of(**changes: Any) -> Config:
    """Small views, six batches of four an epoch from 25 scenes; `group__field=value` changes the rest."""
    config = Config()
    for name, value in {
        "train__batch_size": 4,
        "train__epochs": 2,
        "views__size": 32,
        "boxes__min_size": 8,
        "data__demo_images": 25,
        "data__demo_size": 48,
        "data__workers": 2,
        **changes,
    }.items():
        group, _, field = name.partition("__")
        setattr(getattr(config, group), field, value)
    return config


SCENES = DemoScenes(25, 48)


class Pictures:
    """A source whose read is what a test makes it."""

    num_classes = 3

    def __init__(self, count: int = 25, bad: Any = (), slow: Any = ()) -> None:
        self.count, self.bad, self.slow, self.reads = count, set(bad), set(slow), []
        self.release = threading.Event()

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> np.ndarray:
        self.reads.append(index)
        if index in self.slow:
            self.release.wait(20)
        if index in self.bad:
            raise BadImage(self.name_of(index), "no picture")
        return np.full((40 + index, 50, 3), index, np.uint8)

    def label(self, index: int) -> int:
        return index % 3 - 1

    def name_of(self, index: int) -> str:
        return f"picture {index}"


def epoch_of(source: Any, config: Config, epoch: int = 0, start: int = 0, **options: Any) -> list[Batch]:
    loader = Loader(source, config, **options)
    try:
        return list(loader.epoch(epoch, start))
    finally:
        loader.close()


def same(a: Batch, b: Batch) -> bool:
    tensors = [(a.views, b.views), (a.crops, b.crops), (a.labels, b.labels), (a.keys, b.keys)]
    assert a.boxes is not None and b.boxes is not None
    tensors += zip(a.boxes, b.boxes, strict=True)
    return all(torch.equal(x, y) for x, y in tensors)
