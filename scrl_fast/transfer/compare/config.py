"""The options of a comparison: those of a transfer, and its starts, shares and seeds. Nothing here imports torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import Literal

from scrl_fast.config.backbones import RANDOM, TIMM_WEIGHTS, TORCHVISION_WEIGHTS, is_named
from scrl_fast.config.validation import (
    at_least,
    check_distinct,
    check_fields,
    check_writable,
    clean_path,
    clean_paths,
    from_above,
    option_error,
    within,
)
from scrl_fast.errors import UsageError, did_you_mean
from scrl_fast.transfer.config import TransferConfig

LABELLED = "labelled images"
"""In place of a start's name: what all of them are fine-tuned on."""
MAX_DISTANCE = 64  # of 256 bits: two photographs of nothing in common differ in about 128

REFUSED_OPTIONS = {
    "init": "a comparison has several starts: --inits=random,torchvision,RUN",
    "resume": "a comparison goes on by itself with what is in compare.dir",
    "run.dir": "every row has a run folder of its own in --compare.dir",
    "data.subset": "a comparison has shares of the training images: --shares=0.1,1",
    "eval.only": "a comparison trains",
}
"""Options of a transfer that a comparison decides row by row."""


@dataclass
class CompareOptions:
    """Where a comparison keeps its rows, and how it looks for validation images among those of pre-training."""

    dir: str = ""
    """Folder of rows, table and picture; empty: runs/compare-TASK. The same command goes on there."""
    leaks: Literal["all", "exact", "off"] = "all"
    """Look for validation images among the images that a start was pre-trained on: all: the same file, the same pixels,
    and pictures that look alike; exact: the same file only, which decodes nothing; off."""
    near_distance: int = 16
    """Two pictures look alike from so many different bits of 256 on downwards (difference hash, 16 x 16)."""
    keep_detectors: bool = True
    """Keep the checkpoints of finished rows; false removes them once a row's result is written."""

    def __post_init__(self) -> None:
        check_fields(self, "compare", near_distance=within(0, MAX_DISTANCE))
        clean_paths(self, "dir")


@dataclass
class CompareConfig(TransferConfig):
    """Train the same detector from several starts, on shares of the labels, with several seeds, and compare."""

    inits: tuple[str, ...] = ("random", "torchvision")
    """Starts, separated by commas; the others are compared with the first one. Each is what --init takes."""
    shares: tuple[float, ...] = (0.1, 1.0)
    """Shares of the training images, above 0 to 1, separated by commas."""
    seeds: int = 3
    """Repeats, numbered from train.seed on. Each has its own images of a share, order of images and initial heads, the
    same for every start."""
    minutes: float = 0.0
    """Stop in time with the table so far; the same command goes on. 0 is off."""
    compare: CompareOptions = field(default_factory=CompareOptions)
    """Where the rows are kept, and what is checked."""
    json: str = ""
    """File for rows, table, shared images and options."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "", shares=from_above(0, 1), seeds=at_least(1), minutes=at_least(0))
        self.inits = tuple(map(clean_path, self.inits))
        for name in ("inits", "shares"):
            check_distinct(name, getattr(self, name))
        self.shares = tuple(sorted(self.shares))

    def check_ready(self) -> None:
        """Raise UsageError when what the user must give is missing, and for options that the rows decide."""
        if self.task == "coco10":
            raise UsageError("the task coco10 is detection on a tenth of the labels: compare detection --shares=0.1")
        given = {"init": self.init != "random", "resume": self.resume, "run.dir": self.run.dir}
        given |= {"data.subset": self.data.subset != 1, "eval.only": self.eval.only}
        for option, is_given in given.items():
            if is_given:
                section, _, name = option.rpartition(".")
                raise option_error(
                    option, getattr(getattr(self, section) if section else self, name), REFUSED_OPTIONS[option]
                )
        for init in self.inits:
            if not (is_named(init) or os.path.exists(init)):
                hint = did_you_mean(init, (RANDOM, TORCHVISION_WEIGHTS, TIMM_WEIGHTS))
                raise UsageError(f"inits: there is no such checkpoint or run folder: {init!r}{hint}")
        check_writable("json", self.json)
        if self.compare.dir and os.path.exists(self.compare.dir) and not os.path.isdir(self.compare.dir):
            raise option_error("compare.dir", self.compare.dir, "is a file; give the name of a folder")
        super().check_ready()

    def transfer_options(self) -> TransferConfig:
        """The options that all rows share; start, share, seed and folder are not set yet."""
        shared = {item.name: getattr(self, item.name) for item in fields(TransferConfig)}
        return TransferConfig(**(shared | {"json": ""}))
