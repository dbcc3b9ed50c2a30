"""The options of every evaluation task. Names, types, defaults and ranges; nothing here imports torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from scrl_fast.config.backbones import RANDOM, TIMM_WEIGHTS, TORCHVISION_WEIGHTS, is_named
from scrl_fast.config.defaults import IMAGENET_MEAN, IMAGENET_STD
from scrl_fast.config.schema import BoxesConfig, DataConfig, ViewsConfig
from scrl_fast.config.validation import (
    above,
    at_least,
    check_device,
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
from scrl_fast.evaluate.data_config import ImageData, RegionData


@dataclass
class Common:
    """What every task takes."""

    checkpoint: str = ""
    """Weights: a run folder or checkpoint, the published layout, a ResNet of torchvision, timm, detectron2 or mmdet;
    torchvision, timm or hf-hub:OWNER/NAME for trained weights of that zoo; or random for an untrained encoder."""
    backbone: str = ""
    """resnet50, resnet10_tiny, timm:NAME, package.module:function, ...; empty: what the weights say or show (random:
    resnet50)."""
    branch: Literal["online", "target"] = "online"
    """Which network of a checkpoint that holds both."""
    batchnorm: Literal["auto", "stored", "measured"] = "auto"
    """Statistics of BatchNorm: as stored, or measured on the training images as they are; auto: measured where they
    were never trained, and for roi-linear, else stored."""
    batch_size: int = 128
    """Images at a time (linear and finetune: also of a training step, in all processes together)."""
    workers: int = 2
    """Threads that read and resize images."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: int = 0
    """Seed of everything random."""
    json: str = ""
    """Write {task, result, config, checkpoint, seconds, environment} to this file."""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Types and ranges, the sections' included. A task with ranges of its own adds to it."""
        check_fields(self, "", batch_size=at_least(1), workers=at_least(0), seed=within(0, 2**31))
        clean_paths(self, *(name for name in ("checkpoint", "json", "cache", "plot") if hasattr(self, name)))
        check_device("device", self.device)

    def check_ready(self) -> None:
        """Raise UsageError when an option without a default is missing."""
        if not self.checkpoint:
            raise UsageError("--checkpoint is missing: a run folder, a file of weights, or --checkpoint=random")
        self.check_files()

    def check_files(self) -> None:
        """Raise UsageError for data that are not named, and files that cannot be written."""
        for name in ("json", "plot"):
            check_writable(name, getattr(self, name, ""))
        data = getattr(self, "data", None)
        files = data is not None and data.source == "labelled" and ".json" in data.train  # FILE.json:FOLDER
        if data is not None and data.source != "demo" and not (data.root or files):
            raise UsageError(f"data.source={data.source} needs --data.root, the folder of the data set")


# ---- tasks ----

TRAINING_RANGES = {"size": at_least(0), "crop_scale": within(0, 1), "epochs": at_least(1), "warmup_epochs": at_least(0)}
"""Ranges of the options that every task which trains on crops has."""


@dataclass
class LinearOptions(Common):
    """Linear evaluation: classifiers on the frozen, average-pooled feature."""

    data: ImageData = field(default_factory=ImageData)
    """Labelled images."""
    size: int = 0
    """Side of the crops in pixels; 0: that of the views in training, or 224."""
    augment: Literal["crop", "none"] = "crop"
    """crop: random crops and flips, the published protocol, the encoder runs in every epoch; none: centre crops, so
    features are extracted once (and cached) and the rest takes seconds."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Range of a random crop's area, as a share of the image (augment=crop)."""
    lrs: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
    """Learning rates for 256 images, a classifier each, all trained in the same pass."""
    fixed_lr: float = 0.2
    """Learning rate whose classifier is reported beside the best one, of the last epoch: no choice on the test set."""
    optim: Literal["sgd", "lars"] = "sgd"
    """lars: scale the gradients of weight and bias by LARS (trust coefficient 0.001), as the published implementation
    does."""
    epochs: int = 80
    """Passes over the training images."""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up, at most half of all."""
    head: Literal["train", "probe"] = "train"
    """train: train classifiers; probe: test the checkpoint's own online probe, nothing is trained."""
    cache: str = "auto"
    """Folder in which extracted features are kept; auto: ~/.cache/scrl_fast (up to 2 GB each); empty: nowhere."""

    def check(self) -> None:
        super().check()
        check_fields(
            self,
            "",
            lrs=above(0),
            fixed_lr=above(0),
            **TRAINING_RANGES,
        )


@dataclass
class FinetuneOptions(Common):
    """Fine-tuning: the encoder and a classifier on its pooled feature, trained together."""

    data: ImageData = field(default_factory=ImageData)
    """Labelled images."""
    size: int = 0
    """Side of the crops in pixels; 0: that of the views in training, or 224."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Range of a random crop's area, as a share of the image."""
    lr: float = 0.05
    """Learning rate for 256 images."""
    optim: Literal["sgd", "lars"] = "sgd"
    """lars: scale every gradient by LARS (trust coefficient 0.001), as the published implementation does."""
    weight_decay: float = 0.0
    """L2 penalty on all parameters."""
    epochs: int = 30
    """Passes over the training images."""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up, at most half of all."""
    save: str = ""
    """Write encoder and classifier to this file under torchvision's names."""

    def check(self) -> None:
        super().check()
        check_fields(
            self,
            "",
            lr=above(0),
            weight_decay=at_least(0),
            **TRAINING_RANGES,
        )


@dataclass
class KnnOptions(Common):
    """Weighted k-nearest-neighbour classification of the frozen, average-pooled feature."""

    data: ImageData = field(default_factory=ImageData)
    """Labelled images."""
    size: int = 0
    """Side of the centre crop in pixels; 0: that of the views in training, or 224."""
    k: tuple[int, ...] = (20, 200)
    """Neighbours that vote; each k gives a result."""
    temperature: float = 0.1
    """A neighbour's vote weighs exp(cosine / temperature)."""
    cache: str = "auto"
    """Folder in which extracted features are kept; auto: ~/.cache/scrl_fast (up to 2 GB each); empty: nowhere."""

    def check(self) -> None:
        super().check()
        check_fields(self, "", size=at_least(0), k=at_least(1), temperature=above(0))


@dataclass
class RegionOptions(Common):
    """What the tasks about labelled boxes take."""

    data: RegionData = field(default_factory=RegionData)
    """Images with labelled boxes."""
    pool_size: int = 1
    """RoIAlign output is pool_size x pool_size."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Normalisation of the images, for random weights and for those that do not say theirs."""
    std: tuple[float, float, float] = IMAGENET_STD
    """As mean."""
    cache: str = "auto"
    """Folder in which extracted features are kept; auto: ~/.cache/scrl_fast (up to 2 GB each); empty: nowhere."""

    def check(self) -> None:
        super().check()
        check_fields(self, "", pool_size=at_least(1), std=above(0))


@dataclass
class RoiLinearOptions(RegionOptions):
    """RoI linear evaluation: a linear classifier on RoIAligned features of ground-truth boxes."""

    plot: str = ""
    """Draw the accuracy of each class to this file."""


@dataclass
class CompareOptions(RegionOptions):
    """Is pre-training worth it on your data? RoI linear from several starts, with error bars, in minutes on a CPU."""

    data: RegionData = field(default_factory=lambda: RegionData(source="labelled"))
    """Images with labelled boxes; labelled: YOLO, COCO or VOC."""
    checkpoint: str = ""
    """Not taken here, where there are several: --checkpoints."""
    checkpoints: tuple[str, ...] = ()
    """Starts, separated by commas; the others are compared with the first one. Each is what --checkpoint takes in the
    other tasks. Without --backbone, random, torchvision and timm have the backbone of the first of the others."""
    shares: tuple[float, ...] = (0.1, 1.0)
    """Shares of the training images, above 0 to 1, separated by commas."""
    seeds: int = 5
    """Repeats of each share below 1, numbered from --seed on. Each has its own images, the same for every start."""
    batch_size: int = 16
    """Images at a time."""
    plot: str = ""
    """Draw accuracy against the share of the labels to this file."""

    def check(self) -> None:
        super().check()
        check_fields(self, "", shares=from_above(0, 1), seeds=within(1, 1000))
        self.checkpoints = tuple(map(clean_path, self.checkpoints))
        for name in ("checkpoints", "shares"):
            if values := getattr(self, name):
                check_distinct(name, values)
        self.shares = tuple(sorted(self.shares))

    def seeds_of(self, share: float) -> tuple[int, ...]:
        """The seeds of a share: one for all images, which are the same for every seed."""
        return tuple(range(self.seed, self.seed + (self.seeds if share < 1 else 1)))

    def check_ready(self) -> None:
        if self.checkpoint:
            raise option_error("checkpoint", self.checkpoint, "compare takes several: --checkpoints=random,RUN")
        if not self.checkpoints:
            raise UsageError("--checkpoints is missing: the starts, as in --checkpoints=random,timm,RUN")
        for start in self.checkpoints:
            if not (is_named(start) or os.path.exists(start)):
                hint = did_you_mean(start, (RANDOM, TORCHVISION_WEIGHTS, TIMM_WEIGHTS))
                raise UsageError(f"checkpoints: there is no such checkpoint or run folder: {start!r}{hint}")
        self.check_files()


@dataclass
class DenseOptions(Common):
    """Dense consistency: does a region of one view find itself in the other?"""

    data: DataConfig = field(default_factory=DataConfig)
    """Images, as for training; no labels are read."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """The two views; defaults are those that our checkpoint was trained with, else the recipe's."""
    boxes: BoxesConfig = field(default_factory=BoxesConfig)
    """The matched boxes; defaults likewise."""
    images: int = 1024
    """Images used, the first ones."""
    plot: str = "dense_consistency.png"
    """Draw image pairs with similarity maps of chosen points to this file; empty: none."""
    plot_images: tuple[int, ...] = (0, 1, 2)
    """Images drawn, by number."""
    plot_points: int = 3
    """Points of each."""

    def check(self) -> None:
        super().check()
        check_fields(self, "", images=at_least(1), plot_images=at_least(0), plot_points=at_least(1))


@dataclass
class RankOptions(Common):
    """Collapse and rank of the frozen, average-pooled feature: RankMe and feature deviation."""

    data: DataConfig = field(default_factory=DataConfig)
    """Images, as for training; no labels are read."""
    size: int = 0
    """Side of the centre crop in pixels; 0: that of the views in training, or 224."""
    images: int = 2048
    """Images used, the first ones."""
    plot: str = ""
    """Draw the spectrum of singular values to this file."""

    def check(self) -> None:
        super().check()
        check_fields(self, "", size=at_least(0), images=at_least(1))


@dataclass
class PcaOptions(Common):
    """Dense features as colours: the three principal components of every cell, beside the image."""

    data: DataConfig = field(default_factory=lambda: DataConfig(source="folder"))
    """Images, as for training; no labels are read."""
    beside: tuple[str, ...] = ()
    """More weights, a column each: what --checkpoint takes, as in [random,runs/a]. Without --backbone, random has the
    backbone of --checkpoint, and the others have their own."""
    images: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    """Images drawn, by number; those beyond the last one are left out."""
    size: int = 448
    """Side of the centre crops in pixels; larger ones give more cells. 0: that of the views in training."""
    plot: str = "pca.png"
    """Draw to this file."""

    def check(self) -> None:
        super().check()
        check_fields(self, "", size=at_least(0), images=at_least(0))
        if not self.images:
            raise option_error("images", self.images, "must name an image at least")

    def check_ready(self) -> None:
        super().check_ready()
        if not self.plot:
            raise UsageError("--plot is missing: the file to draw to")


TASK_OPTIONS = {
    "linear": LinearOptions,
    "finetune": FinetuneOptions,
    "knn": KnnOptions,
    "roi-linear": RoiLinearOptions,
    "compare": CompareOptions,
    "dense-consistency": DenseOptions,
    "rank": RankOptions,
    "pca": PcaOptions,
}
"""Every task of ``python -m scrl_fast.evaluate`` with its options."""
