"""The options of a run: one tree of dataclasses, filled from a recipe, YAML files and the command line.

This file holds names, types, defaults and ranges; ``files.py`` and ``command_line.py`` hold the parsing. Each field's
docstring is what ``python -m scrl_fast.train --help`` shows. Whatever way a config is made, a value out of range or of
the wrong type is a UsageError that names the option, the value and the values allowed. This file is long because all
options stand in one place.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from scrl_fast.config.backbones import backbone_fault
from scrl_fast.config.defaults import (
    BACKBONE,
    BACKBONE_STRIDES,
    DATA_TIMEOUT,
    DEMO_IMAGES,
    DEMO_SIZE,
    DEMO_TEST_IMAGES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LOG_EVERY,
    LOG_POINTS,
    VIEW_SIZE,
)
from scrl_fast.config.files import Settings, build, read_settings, recipe_names
from scrl_fast.config.image_limits import IMAGE_LIMIT_RANGES, ImageLimitOptions
from scrl_fast.config.validation import (
    FRACTION_RANGE,
    SAMPLES_RANGE,
    SEED_RANGE,
    TIMEOUT_RANGE,
    above,
    at_least,
    check_device,
    check_fields,
    clean_paths,
    from_above,
    from_below,
    option_error,
    or_auto,
    split_places,
    to_plain,
    within,
)
from scrl_fast.config.yaml_text import dump
from scrl_fast.errors import UsageError


@dataclass
class DataConfig(ImageLimitOptions):
    """Where the images come from."""

    source: Literal["demo", "folder", "imagefolder", "imagenet", "list", "tar", "packed", "hf"] = "demo"
    """demo: generated digit scenes; folder: any tree of images; imagefolder, imagenet: one folder a class; list: a
    text file with one path a line; tar: shards in WebDataset's layout; packed: what scrl_fast.data.pack wrote; hf: a
    dataset of the Hugging Face package datasets."""
    root: str | tuple[str, ...] = ""
    """Folder of the images; list: the file; tar: folder, file or pattern like DIR/{000..146}.tar, or a URL such as
    s3://BUCKET/{000..146}.tar; hf: NAME_OR_PATH[:split[:column]]; the demo needs none. Several are joined by commas,
    or are a list in YAML."""
    workers: int | Literal["auto"] = "auto"
    """Threads that read images and make views; auto: the cores that training leaves free, at least 1; 0: the training
    thread does it between the steps, none ahead."""
    prefetch: int = 2
    """Batches prepared ahead of the one in training, unless workers is 0."""
    timeout: float = DATA_TIMEOUT
    """Stop when a batch is waited for and no image was finished for so many seconds, unless workers is 0."""
    max_bad_fraction: float = 0.01
    """Stop when more than this share of an epoch's images cannot be read (unless 0, ten never stop a run, or half of
    the images if those are fewer)."""
    scaled_decode: bool = True
    """Decode large JPEGs at 1/2, 1/4 or 1/8 of their size where both crops stay at least as large as a view: several
    times faster for photographs of many megapixels, and pixels differ a little from decoding in full."""
    pixels: Literal["auto", "cpu", "gpu"] = "auto"
    """Where views are made: cpu: by the workers; gpu: by Triton on the GPU that trains, so that the workers only
    decode; auto: on the GPU where there is one with Triton."""
    decode: Literal["cpu", "gpu"] = "cpu"
    """gpu: plain JPEGs are decoded by the GPU (nvJPEG through torchvision), in full, and a few levels off the CPU's."""
    demo_images: int = DEMO_IMAGES
    """Scenes in the generated training set (source=demo)."""
    demo_size: int = DEMO_SIZE
    """Height and width of a generated scene in pixels (source=demo)."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "data",
            workers=or_auto(at_least(0)),
            prefetch=at_least(1),
            timeout=TIMEOUT_RANGE,
            max_bad_fraction=FRACTION_RANGE,
            demo_images=at_least(1),
            demo_size=at_least(16),
            **IMAGE_LIMIT_RANGES,
        )
        self.root = split_places(self.root)

    @property
    def roots(self) -> tuple[str, ...]:
        """``root`` as a tuple, empty where none is given."""
        return (self.root,) if isinstance(self.root, str) and self.root else tuple(self.root)


@dataclass
class ViewsConfig:
    """The two random views of an image (SCRL section 4; BYOL appendix B)."""

    recipe: Literal["simclr", "simple", "none"] = "simclr"
    """simclr: all transforms; simple: crop and flip; none: resize and centre crop."""
    size: int = VIEW_SIZE
    """Height and width of a view in pixels."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Range of a crop's area, as a share of the image."""
    ratio: tuple[float, float] = (0.75, 4.0 / 3.0)
    """Range of a crop's width over height."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of colour jitter."""
    brightness: float = 0.4
    """Brightness factor is drawn from [1 - x, 1 + x]."""
    contrast: float = 0.4
    """Contrast factor is drawn from [1 - x, 1 + x]."""
    saturation: float = 0.2
    """Saturation factor is drawn from [1 - x, 1 + x]."""
    hue: float = 0.1
    """Hue shift is drawn from [-x, x], in turns of the colour circle."""
    grayscale: float = 0.2
    """Probability of turning grey."""
    blur: Literal["resize", "gaussian"] = "resize"
    """resize: bicubic down by 1.1, 1.2 or 1.5 and up again; gaussian: 23 taps, sigma from blur_sigma."""
    blur_probability: tuple[float, float] = (1.0, 0.1)
    """Probability of blur in view 1 and in view 2."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of sigma in pixels (blur=gaussian)."""
    solarize_probability: tuple[float, float] = (0.0, 0.2)
    """Probability of solarisation in view 1 and in view 2."""
    solarize_threshold: int = 128
    """Values from this on (0..255) are inverted by solarisation."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of red, green, blue that is taken off, for values in 0..1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Deviation of red, green, blue that is divided by."""

    def __post_init__(self) -> None:
        probabilities = ("flip", "jitter", "grayscale", "blur_probability", "solarize_probability")
        check_fields(
            self,
            "views",
            size=at_least(1),
            scale=within(0, 1),
            ratio=above(0),
            brightness=at_least(0),
            contrast=at_least(0),
            saturation=at_least(0),
            hue=within(0, 0.5),
            blur_sigma=above(0),
            solarize_threshold=within(0, 256),
            std=above(0),
            **dict.fromkeys(probabilities, FRACTION_RANGE),
        )
        for name in ("scale", "ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise option_error(f"views.{name}", (low, high), "must be a range above 0, the smaller number first")


@dataclass
class BoxesConfig:
    """The matched boxes drawn in the overlap of the two views."""

    per_image: int = 10
    """Box pairs per image."""
    min_size: int = 32
    """Least box side, in pixels of a view."""
    iou_threshold: float = 0.5
    """A box is drawn again when its IoU with an accepted one reaches this; 1 accepts all."""
    grid: bool = True
    """Draw boxes inside the cells of a random grid (else anywhere in the overlap)."""
    jitter: float = 0.0
    """Random shift and stretch of the box in view 2, as a share of its size; 0 is off, 0.1 the published value."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "boxes",
            per_image=at_least(0),
            min_size=at_least(1),
            iou_threshold=from_above(0, 1),
            jitter=from_below(0, 1),
        )


@dataclass
class ModelConfig:
    """The networks."""

    method: Literal["scrl", "byol"] = "scrl"
    """scrl: matched boxes; byol: the same without boxes, on the average-pooled feature."""
    backbone: str = BACKBONE
    """resnet10_tiny (demo), resnet18/34/50/101/152, resnext*, wide_resnet* of torchvision, timm:NAME, or
    package.module:function, which makes any network with a feature map (docs/encoders.md)."""
    hidden_dim: int = 4096
    """Width of the hidden layer of projector and predictor."""
    projection_dim: int = 256
    """Width of the projections that are compared."""
    pool_size: int = 1
    """RoIAlign output is pool_size x pool_size."""
    pool_reduce: Literal["flatten", "average"] = "flatten"
    """What a pool_size above 1 hands to the projector: all bins side by side, or their mean."""
    sampling_ratio: int = -1
    """Samples per bin and axis, at most 4096; -1 adapts to the box size."""
    aligned: bool = False
    """Shift boxes by half a cell (RoIAlign v2)."""
    target_init: Literal["online", "random"] = "online"
    """Where the target network starts: a copy of the online one, or its own random weights."""

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("hidden_dim", "projection_dim", "pool_size"), at_least(1))
        check_fields(self, "model", sampling_ratio=SAMPLES_RANGE, **sizes)
        if fault := backbone_fault(self.backbone):
            raise option_error("model.backbone", self.backbone, fault)


@dataclass
class OptimConfig:
    """The optimizer with warm-up and cosine, and the momentum of the target network."""

    name: Literal["lars", "adamw"] = "lars"
    """lars: for large batches and ResNets; adamw: for ConvNeXt and transformers, and to continue from trained weights
    (then give lr and weight_decay as well: the defaults are those of lars)."""
    lr: float = 0.45
    """Learning rate for reference_batch images; scaled by the global batch."""
    reference_batch: int = 256
    """Batch for which lr is given."""
    momentum: float = 0.9
    """Momentum of SGD inside LARS, and of the probe's."""
    weight_decay: float = 1.0e-6
    """Weight decay of parameters with two or more axes."""
    trust_coefficient: float = 1.0e-3
    """LARS trust coefficient."""
    eps: float = 1.0e-8
    """Added to the denominator of LARS or AdamW."""
    beta1: float = 0.9
    """Decay rate of AdamW's average of the gradient."""
    beta2: float = 0.999
    """Decay rate of AdamW's average of the squared gradient."""
    clip_norm: float = 0.0
    """Gradients of encoder and heads together are scaled down to this norm; 0 is off."""
    warmup_epochs: float = 10.0
    """Epochs of linear warm-up, counted per step."""
    ema_momentum: float = 0.97
    """Momentum of the target network at the first step; rises to 1 on a cosine."""
    probe_lr: float = 0.2
    """Learning rate of the online linear probe (plain SGD with momentum), for reference_batch images."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "optim",
            lr=above(0),
            reference_batch=at_least(1),
            momentum=from_below(0, 1),
            weight_decay=at_least(0),
            trust_coefficient=above(0),
            eps=at_least(0),
            beta1=from_below(0, 1),
            beta2=from_below(0, 1),
            clip_norm=at_least(0),
            warmup_epochs=at_least(0),
            ema_momentum=FRACTION_RANGE,
            probe_lr=at_least(0),
        )


@dataclass
class TrainConfig:
    """Length, batch and numerics."""

    batch_size: int = 256
    """Images per process and step."""
    accumulate: int = 1
    """Batches whose gradients are added up before a step; the global batch grows with it."""
    epochs: int = 200
    """Passes over the images."""
    max_steps: int = 0
    """Stop after this many steps; schedules stay as planned for all epochs. 0 is off."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int = 0
    """CPU threads of PyTorch; 0: its own choice, which a resumed run keeps, since the last digits of its convolutions
    and norms depend on it (device=cpu)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on a GPU and on a CPU that multiplies bf16 (AMX or AVX512_BF16), else fp32. The choice is
    written into config.yaml and the checkpoints, and a resumed run keeps it on any machine."""
    channels_last: bool = True
    """Memory layout of images and encoder."""
    compile: bool = False
    """torch.compile for the encoders; for GPUs, on a CPU it is slower. Not with checkpoint_activations."""
    cuda_graphs: bool = False
    """Replay the compiled encoders as CUDA graphs (includes compile): pays where starting kernels takes longer than
    running them, as with small batches; one GPU, without accumulate and checkpoint_activations."""
    checkpoint_activations: bool = False
    """Keep only the block boundaries of the online encoder and compute the rest again in the backward pass: less
    memory, about a third more time in the encoder, the same numbers."""
    keep_memory: bool = True
    """On a CPU, keep freed memory for the next step instead of returning it to the system (Linux with glibc)."""
    deterministic: bool = False
    """Make torch's own operations bit-equal from run to run as well (slower on GPU)."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "train",
            batch_size=at_least(1),
            accumulate=at_least(1),
            epochs=at_least(1),
            max_steps=at_least(0),
            threads=at_least(0),
            seed=SEED_RANGE,
        )
        check_device("train.device", self.device)


@dataclass
class RunConfig:
    """What is written, and where."""

    dir: str = ""
    """Run folder; empty: runs/<source>-<method>-<time>."""
    log_every: int = 0
    """Steps between logging points; 0: ten, and fewer in a run of less than 300 steps, for at least 30 points."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: once an epoch."""
    keep: int = 2
    """Checkpoints kept beside the best one; at least 2, since the newest may be the one being written."""
    tensorboard: bool = True
    """Write TensorBoard events where tensorboard is installed."""
    wandb: str = ""
    """Name of a Weights & Biases project; empty is off."""

    def __post_init__(self) -> None:
        check_fields(self, "run", log_every=at_least(0), checkpoint_every=at_least(0), keep=at_least(2))
        clean_paths(self, "dir")

    def log_interval(self, steps: int) -> int:
        """Steps between logging points in a run of so many steps."""
        return self.log_every or max(1, min(LOG_EVERY, steps // LOG_POINTS))


@dataclass
class EvalConfig:
    """What is measured beside training and when the run ends."""

    validation: str = ""
    """Folder of validation images, one folder a class as in training: the online probe's top-1 on them is measured at
    each planned checkpoint (after every epoch, or every run.checkpoint_every steps) and decides which one is best.pt.
    Empty: off."""

    roi_linear: bool = False
    """Compare RoI linear accuracy of random and trained encoder on held-out scenes (source=demo)."""
    scenes: int = DEMO_TEST_IMAGES
    """Held-out scenes used for it."""

    def __post_init__(self) -> None:
        check_fields(self, "eval", scenes=at_least(1))
        clean_paths(self, "validation")


@dataclass
class Config:
    """Self-supervised pre-training for localisation (SCRL)."""

    data: DataConfig = field(default_factory=DataConfig)
    """Where the images come from."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """The two random views of an image."""
    boxes: BoxesConfig = field(default_factory=BoxesConfig)
    """The matched boxes."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The networks."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer and the schedules."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batch and numerics."""
    run: RunConfig = field(default_factory=RunConfig)
    """What is written, and where."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """What is measured beside training and when the run ends."""
    compat: Literal["none", "kakaobrain"] = "none"
    """kakaobrain: reproduce the published implementation, quirks included."""
    resume: str = ""
    """auto: continue the run in run.dir from its newest good checkpoint; or the path of a checkpoint."""
    init: str = ""
    """Start from the weights of this file, with a fresh optimizer and schedule: a checkpoint of ours or of the
    published implementation (heads included), or a ResNet of torchvision, timm, detectron2, mmdet or safetensors; or of
    a zoo: torchvision, timm (both by model.backbone) or hf-hub:OWNER/NAME, which are downloaded once. With resume=auto
    only as long as the run has no checkpoint of its own."""
    init_momentum: bool = False
    """Take the optimizer's momentum from init as well, where the file holds it."""

    def __post_init__(self) -> None:
        check_fields(self, "")
        clean_paths(self, "resume", "init")
        self._check_together()

    def _check_together(self) -> None:
        stride = BACKBONE_STRIDES.get(self.model.backbone, 1)
        if self.views.size < stride:  # before the boxes: smaller boxes would not help such views
            reason = f"must be at least {stride}, the stride of {self.model.backbone}"
            raise option_error("views.size", self.views.size, reason)
        if self.model.method == "scrl":
            if self.boxes.per_image < 1:
                reason = "model.method=scrl needs at least 1 box; --model.method=byol trains without boxes"
                raise option_error("boxes.per_image", self.boxes.per_image, reason)
            if self.views.size <= self.boxes.min_size:
                reason = f"views of views.size={self.views.size} pixels have no room for such boxes; choose less"
                raise option_error("boxes.min_size", self.boxes.min_size, reason)
        if self.optim.name != "lars":
            if self.compat == "kakaobrain":
                reason = "compat=kakaobrain reproduces an implementation that trains with lars"
                raise option_error("optim.name", self.optim.name, reason)
            if self.init_momentum:
                raise option_error("init_momentum", True, f"takes the momentum of lars, not of {self.optim.name}")
        if self.init_momentum and self.init in ("", "random"):
            raise UsageError(
                "init_momentum=True takes the momentum out of the file that --init names, and there is none"
            )
        if self.resume not in ("", "auto") and self.init:
            raise UsageError(
                f"resume={self.resume} and init={self.init}: give one, since a resumed run has its weights already"
            )

    def check_ready(self) -> None:
        """Raise UsageError when an option that a recipe leaves to the user is still missing."""
        if self.data.source != "demo" and not self.data.root:
            what = {
                "list": "text file with the images' paths",
                "tar": "folder, file or pattern of the shards",
                "packed": "folder that scrl_fast.data.pack wrote",
                "hf": "name or path of the dataset, as NAME[:split[:column]]",
            }.get(self.data.source, "folder of the images")
            raise UsageError(f"data.source={self.data.source} needs --data.root, the {what}")

    def to_dict(self) -> dict[str, Any]:
        """Nested dict of plain values, ranges as lists: what YAML and a checkpoint can hold."""
        return to_plain(self)

    def to_yaml(self) -> str:
        """The whole config as YAML, which ``--config`` and `from_yaml` accept."""
        return dump(self.to_dict())

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Config:
        """Config of a nested dict that may hold any part of the options; the rest keep their defaults.

        Raises UsageError for an unknown or ill-typed option, naming the nearest valid one.
        """
        return build(cls, Settings(options))

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Config:
        """Config of a YAML file, ours or the published implementation's, or of a recipe by name.

        Raises UsageError naming the nearest recipe when there is neither.
        """
        return build(cls, read_settings(os.fspath(path), recipe_names()))


def load_recipe(name: str) -> Config:
    """Config of a recipe by name (``demo``, ``scrl_200ep``, ...) or of a YAML file by path.

    Raises UsageError naming the nearest recipe when there is neither.
    """
    return Config.from_yaml(name)


def check_enough(images: int, config: Config, world_size: int = 1) -> None:
    """Check that a data set of so many images fills a step of all processes.

    Raises UsageError with a batch size that fits.
    """
    train = config.train
    fewest = train.accumulate * world_size  # images in a step of the smallest batch
    if images >= train.batch_size * fewest:
        return
    factors = [f"train.batch_size={train.batch_size}"]
    factors += [f"train.accumulate={train.accumulate}"] if train.accumulate > 1 else []
    factors += [f"{world_size} processes"] if world_size > 1 else []
    smaller = f"use --train.batch_size={images // fewest} or less" if images >= fewest else "there must be more images"
    needed = train.batch_size * fewest
    raise UsageError(f"{' x '.join(factors)} needs {needed} images a step, but the data set has {images}: {smaller}")
