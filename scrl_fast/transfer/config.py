"""The options of a transfer: one tree of dataclasses, and for each task of the paper's comparison what differs.

Defaults are those of detectron2's 1x schedule with SyncBatchNorm everywhere, which the paper's comparison follows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from scrl_fast.config.backbones import backbone_fault
from scrl_fast.config.defaults import BACKBONE, DATA_TIMEOUT, IMAGENET_MEAN, IMAGENET_STD, SCORE_THRESHOLD
from scrl_fast.config.image_limits import IMAGE_LIMIT_RANGES, ImageLimitOptions
from scrl_fast.config.schema import RunConfig
from scrl_fast.config.validation import (
    FRACTION_RANGE,
    SAMPLES_RANGE,
    SEED_RANGE,
    TIMEOUT_RANGE,
    above,
    at_least,
    between,
    check_device,
    check_fields,
    check_writable,
    clean_paths,
    from_above,
    from_below,
    option_error,
    to_plain,
    within,
)
from scrl_fast.errors import UsageError

DETECTORS = ("faster_rcnn", "mask_rcnn", "keypoint_rcnn", "retinanet", "fcos")

LARGEST_SIDE, MOST_CHANNELS, MOST_BOXES = 16_384, 65_536, 100_000
"""Bounds of images in pixels, of a layer's channels, and of the boxes of an image."""


@dataclass
class TransferDataConfig(ImageLimitOptions):
    """Where images and annotations come from."""

    root: str = ""
    """Folder in the data set's official layout: COCO's with annotations/ and the images, VOCdevkit, or Cityscapes'
    with leftImg8bit/ and gtFine/. custom: any folder in the layout of YOLO, COCO or VOC."""
    train: str = "train2017"
    """Split to train on. COCO: name of the split; voc: YEAR_SPLIT, several joined by +; cityscapes: name. custom: the
    name of a split, several joined by +, or FILE.json:FOLDER with COCO's annotations and their images; empty: found by
    its name."""
    val: str = "val2017"
    """Split to measure on. custom: as data.train; empty: found by its name, or a part of the training images."""
    layout: Literal["auto", "yolo", "coco", "voc"] = "auto"
    """How labels are written in data.root (custom)."""
    classes: tuple[str, ...] = ()
    """Classes to detect, by label (custom); objects of others are left out. Empty: all that the annotations name, which
    the run then keeps here."""
    val_share: float = 0.2
    """Share of the training images that is measured on and not trained on, where there is no other part (custom)."""
    val_seed: int = 0
    """Which images that share has."""
    subset: float = 1.0
    """Share of the training images that is used, the same for the same subset_seed."""
    subset_seed: int = 0
    """Which images a subset below 1 has."""
    keep_empty: bool = False
    """Train on images without objects, too."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    workers: int = 4
    """Threads that read images."""
    prefetch: int = 2
    """Batches read ahead of the one in training."""
    timeout: float = DATA_TIMEOUT
    """Stop when a batch is waited for and no image was finished for so many seconds."""

    def __post_init__(self) -> None:
        counts = {"workers": at_least(1), "prefetch": at_least(1)}
        counts |= {"subset_seed": SEED_RANGE, "val_seed": SEED_RANGE}
        shares = {"flip": within(0, 1), "subset": from_above(0, 1), "val_share": between(0, 1)}
        check_fields(self, "data", timeout=TIMEOUT_RANGE, **shares, **counts, **IMAGE_LIMIT_RANGES)
        clean_paths(self, "root")


@dataclass
class DetectorConfig:
    """The detector."""

    detector: Literal["faster_rcnn", "mask_rcnn", "keypoint_rcnn", "retinanet", "fcos"] = "faster_rcnn"
    """Which one, on a feature pyramid."""
    backbone: str = BACKBONE
    """resnet10_tiny, one of torchvision's ResNet family, or timm:NAME or package.module:function with feature maps of
    stride 4, 8, 16 and 32."""
    branch: Literal["online", "target"] = "online"
    """Which network of a checkpoint that --init names."""
    norm: Literal["syncbn", "frozen"] = "syncbn"
    """syncbn: BatchNorm over the images of all processes; frozen: the pre-trained statistics, never changed."""
    norm_in_heads: bool = True
    """Normalisation in feature pyramid and convolutional heads too (not with norm=frozen)."""
    frozen_stages: int = 0
    """Stages of the backbone that stay as they are: 0 none, 1 the stem, ... 5 all; 1 to 4 are torchvision's alone."""
    short_side: tuple[int, int] = (640, 800)
    """Range of the images' shorter side in training, in pixels."""
    short_side_step: int = 32
    """Sides in that range are this far apart."""
    test_short_side: int = 800
    """The images' shorter side in evaluation."""
    long_side: int = 1333
    """Images are made smaller where their longer side would exceed this."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of red, green, blue that is taken off, for values in 0..1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Deviation of red, green, blue that is divided by."""
    roi_align: Literal["torchvision", "scrl_fast"] = "scrl_fast"
    """Whose RoIAlign: ours is deterministic and takes half precision as it is."""
    roi_sampling_ratio: int = -1
    """Samples per bin and axis; -1 adapts to the box, as detectron2 does; torchvision's detectors take 2."""
    roi_aligned: bool = True
    """Shift boxes by half a pixel, as detectron2 does; not with roi_align=torchvision."""
    fpn_channels: int = 256
    """Channels of the feature pyramid."""
    head_channels: int = 1024
    """Width of the box head's two layers."""
    mask_channels: int = 256
    """Channels of the mask head's four convolutions."""
    keypoint_channels: int = 512
    """Channels of the keypoint head's eight convolutions."""
    anchor_scale: float = 8.0
    """Side of an anchor in steps of its feature map (RPN; half of it for RetinaNet)."""
    proposals_before_nms: tuple[int, int] = (2000, 1000)
    """Proposals of a level before suppression, in training and in evaluation."""
    proposals: tuple[int, int] = (1000, 1000)
    """Proposals of an image after suppression, in training and in evaluation."""
    rois_per_image: int = 512
    """Proposals of an image that the heads are trained on."""
    rpn_smooth_l1_beta: float = 0.0
    """Beta of the smooth L1 loss of proposals' boxes: squared below it, linear above; 0 is plain L1, as in detectron2;
    torchvision's detectors have 1/9. RetinaNet has no proposals; FCOS's box loss is GIoU."""
    box_smooth_l1_beta: float = 0.0
    """Beta of the smooth L1 loss of the box head, and of RetinaNet's boxes."""
    score_threshold: float = SCORE_THRESHOLD
    """Detections below this score are dropped."""
    nms_threshold: float = 0.5
    """Of two detections of a class whose IoU exceeds this, the weaker one is dropped."""
    detections: int = 100
    """Detections kept of an image."""

    def __post_init__(self) -> None:
        counts = ("fpn_channels", "head_channels", "mask_channels", "keypoint_channels")
        sides = ("short_side", "short_side_step", "test_short_side", "long_side")
        found = ("rois_per_image", "detections", "proposals", "proposals_before_nms")
        check_fields(
            self,
            "model",
            frozen_stages=within(0, 5),
            std=above(0),
            roi_sampling_ratio=SAMPLES_RANGE,
            anchor_scale=from_above(0, LARGEST_SIDE),
            rpn_smooth_l1_beta=at_least(0),
            box_smooth_l1_beta=at_least(0),
            score_threshold=FRACTION_RANGE,
            nms_threshold=FRACTION_RANGE,
            **dict.fromkeys(counts, within(1, MOST_CHANNELS)),
            **dict.fromkeys(sides, within(1, LARGEST_SIDE)),
            **dict.fromkeys(found, within(1, MOST_BOXES)),
        )
        if self.short_side[0] > self.short_side[1]:
            raise option_error("model.short_side", self.short_side, "must be a range, the smaller number first")
        if fault := backbone_fault(self.backbone):
            raise option_error("model.backbone", self.backbone, fault)
        if self.roi_aligned and self.roi_align == "torchvision":
            raise option_error("model.roi_aligned", True, "not with roi_align=torchvision: --model.roi_aligned=false")

    def short_sides(self) -> tuple[int, ...]:
        """The sides to choose from in training."""
        low, high = self.short_side
        return tuple(range(low, high + 1, self.short_side_step))


@dataclass
class TransferOptimConfig:
    """SGD with warm-up and steps."""

    lr: float = 0.02
    """Learning rate for reference_batch images; scaled by train.batch_size."""
    reference_batch: int = 16
    """Batch for which lr is given."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 1.0e-4
    """Weight decay."""
    norm_weight_decay: float = 0.0
    """Weight decay of normalisation layers."""
    lr_steps: tuple[int, int] = (60000, 80000)
    """Steps at which the learning rate falls; a change of train.steps leaves them as they are. -1: two thirds and eight
    ninths of train.steps."""
    lr_gamma: float = 0.1
    """Factor of the learning rate at each of lr_steps."""
    warmup_steps: int = 1000
    """Steps of linear warm-up; -1: a tenth of train.steps, at most 1,000."""
    warmup_factor: float = 0.001
    """Where the warm-up starts, as a share of the learning rate."""
    clip_norm: float = 0.0
    """Gradients are scaled down to this norm; 0 is off."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "optim",
            lr=above(0),
            reference_batch=at_least(1),
            momentum=from_below(0, 1),
            weight_decay=at_least(0),
            norm_weight_decay=at_least(0),
            lr_steps=at_least(-1),
            lr_gamma=FRACTION_RANGE,
            warmup_steps=at_least(-1),
            warmup_factor=FRACTION_RANGE,
            clip_norm=at_least(0),
        )

    def rate(self, step: int, batch_size: int) -> float:
        """Learning rate of the update after ``step`` updates."""
        rate = self.lr * batch_size / self.reference_batch
        if step < self.warmup_steps:
            share = step / self.warmup_steps
            rate *= self.warmup_factor * (1 - share) + share
        return rate * self.lr_gamma ** sum(step >= milestone for milestone in self.lr_steps)


@dataclass
class TransferTrainConfig:
    """Length, batch and numerics."""

    batch_size: int = 16
    """Images a step, over all processes together."""
    steps: int = 90000
    """Updates; -1: as many as train.passes need."""
    passes: float = 0.0
    """Passes over the training images, where train.steps is -1; 0: 36, kept within train.steps_range."""
    steps_range: tuple[int, int] = (1000, 36000)
    """Fewest and most steps where both train.steps and train.passes are left to the data."""
    max_steps: int = 0
    """Stop after this many; schedules stay as planned. 0 is off."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: as in pre-training; a resumed run keeps the choice. fp16 scales the loss. A CPU measures in fp32."""
    channels_last: bool = True
    """Memory layout of the network."""
    deterministic: bool = False
    """Make torch's own operations bit-equal from run to run as well (slower on GPU)."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "train",
            batch_size=at_least(1),
            steps=at_least(-1),
            passes=at_least(0),
            steps_range=at_least(1),
            max_steps=at_least(0),
            seed=SEED_RANGE,
        )
        check_device("train.device", self.device)
        if self.steps_range[0] > self.steps_range[1]:
            raise option_error("train.steps_range", self.steps_range, "must be a range, the smaller number first")

    @property
    def last_step(self) -> int:
        """Where the run ends."""
        return min(self.steps, self.max_steps or self.steps)


@dataclass
class TransferEvalConfig:
    """When and on what it is measured."""

    every: int = 0
    """Steps between measurements, of which the best by AP is kept as best.pt; 0: at the end only."""
    only: bool = False
    """Measure the detector of --resume, without training."""
    images: int = 0
    """Measure on the first so many images of the split; 0: all."""
    batch_size: int = 1
    """Images a forward pass."""

    def __post_init__(self) -> None:
        check_fields(self, "eval", every=at_least(0), images=at_least(0), batch_size=at_least(1))


@dataclass
class TransferConfig:
    """Fine-tune a detector from pre-trained weights and measure it."""

    task: Literal["detection", "instance", "keypoints", "coco10", "voc", "cityscapes", "custom"] = "detection"
    """Data set and metric."""
    data: TransferDataConfig = field(default_factory=TransferDataConfig)
    """Where images and annotations come from."""
    model: DetectorConfig = field(default_factory=DetectorConfig)
    """The detector."""
    optim: TransferOptimConfig = field(default_factory=TransferOptimConfig)
    """The optimizer and the schedule."""
    train: TransferTrainConfig = field(default_factory=TransferTrainConfig)
    """Length, batch and numerics."""
    run: RunConfig = field(default_factory=RunConfig)
    """What is written, and where."""
    eval: TransferEvalConfig = field(default_factory=TransferEvalConfig)
    """When and on what it is measured."""
    init: str = "random"
    """Weights of the backbone: whatever scrl_fast.train's --init takes (files, torchvision, timm, hf-hub:OWNER/NAME),
    or random."""
    resume: str = ""
    """auto: continue the run in run.dir from its newest good checkpoint; or the path of a checkpoint."""
    json: str = ""
    """File for the result: task, result, config, checkpoint and seconds."""

    renamed: ClassVar[dict[str, str]] = {
        "model.rpn_loss_knee": "model.rpn_smooth_l1_beta",
        "model.box_loss_knee": "model.box_smooth_l1_beta",
        "optim.decay_at": "optim.lr_steps",
        "optim.decay": "optim.lr_gamma",
    }

    def __post_init__(self) -> None:
        check_fields(self, "")
        clean_paths(self, "init", "resume", "json")
        needs = {"instance": "mask_rcnn", "cityscapes": "mask_rcnn", "keypoints": "keypoint_rcnn"}.get(self.task)
        if needs and self.model.detector != needs:
            raise option_error("model.detector", self.model.detector, f"the task {self.task} needs {needs}")

    def check_ready(self) -> None:
        """Raise UsageError when what a task leaves to the user is missing, or an option is given that it ignores."""
        for name in () if self.task == "custom" or self.resume else ("layout", "classes", "val_share", "val_seed"):
            if (value := getattr(self.data, name)) != getattr(TransferDataConfig, name):  # old runs may hold one
                raise option_error(f"data.{name}", value, f"not with the task {self.task}; the task custom has it")
        if not self.data.root and not (self.task == "custom" and self.data.train):
            raise UsageError(f"the task {self.task} needs --data.root, the folder of the data set in its own layout")
        check_writable("json", self.json)
        if self.eval.only and not self.resume:
            raise UsageError("eval.only=True measures a detector that was trained: name its checkpoint with --resume")

    def to_dict(self) -> dict[str, Any]:
        """Nested dict of plain values, ranges as lists: what YAML and a checkpoint can hold."""
        return to_plain(self)


# Sources: detectron2's config files at its commit 02b5c4e (docs/transfer.md names the file of each task)
TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "detection": {},
    "instance": {"model": {"detector": "mask_rcnn"}},
    "keypoints": {"model": {"detector": "keypoint_rcnn", "proposals": [1500, 1000], "box_smooth_l1_beta": 0.5}},
    # a tenth of the images and of the steps: as many epochs as with all of them (no source gives the paper's)
    "coco10": {"data": {"subset": 0.1}, "train": {"steps": 9000}, "optim": {"lr_steps": [6000, 8000]}},
    "voc": {
        "data": {"train": "2007_trainval+2012_trainval", "val": "2007_test"},
        "model": {"short_side": [480, 800]},
        "train": {"steps": 18000},
        "optim": {"lr_steps": [12000, 16000], "warmup_steps": 100},
    },
    # one decay only: the second would come when it is over
    "cityscapes": {
        "data": {"train": "train", "val": "val"},
        "model": {
            "detector": "mask_rcnn",
            "short_side": [800, 1024],
            "test_short_side": 1024,
            "long_side": 2048,
        },
        "train": {"batch_size": 8, "steps": 24000},
        "optim": {"lr": 0.01, "reference_batch": 8, "lr_steps": [18000, 24000]},
    },
    # the length follows the data: scrl_fast.transfer.schedule
    "custom": {
        "data": {"train": "", "val": ""},
        "train": {"steps": -1},
        "optim": {"lr_steps": [-1, -1], "warmup_steps": -1},
    },
}
"""What differs from the defaults above, for each task."""

TASK_SUMMARIES = {
    "detection": "boxes on COCO (Faster R-CNN)",
    "instance": "masks on COCO (Mask R-CNN)",
    "keypoints": "keypoints of persons on COCO (Keypoint R-CNN)",
    "coco10": "boxes on a tenth of COCO",
    "voc": "boxes on VOC 2007 and 2012",
    "cityscapes": "masks on Cityscapes",
    "custom": "boxes or masks on your own images, labelled in YOLO's, COCO's or VOC's way",
}
"""A line on each task."""

DETECTOR_DEFAULTS: dict[str, dict[str, Any]] = {
    "retinanet": {"model": {"box_smooth_l1_beta": 0.1}, "optim": {"lr": 0.01}},
    "fcos": {"model": {"score_threshold": 0.2, "nms_threshold": 0.6}, "optim": {"lr": 0.01}},
}
"""What differs from the task's, for detectors that are trained otherwise."""
