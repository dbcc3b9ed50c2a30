"""The options of labelled data: which images, and where their labels are. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scrl_fast.config.defaults import DEMO_IMAGES, DEMO_SIZE, DEMO_TEST_IMAGES
from scrl_fast.config.image_limits import IMAGE_LIMIT_RANGES, ImageLimitOptions
from scrl_fast.config.validation import SEED_RANGE, at_least, between, check_fields, clean_paths, option_error


@dataclass
class ImageData(ImageLimitOptions):
    """Labelled images for linear and knn: one folder a class, in a folder each for training and test."""

    source: Literal["demo", "imagenet"] = "demo"
    """imagenet: ROOT/train/CLASS/* and ROOT/val/CLASS/*; demo: generated scenes of one digit each."""
    root: str = ""
    """Folder of the images; the demo needs none."""
    train: str = "train"
    """Folder of the training images, in root."""
    test: str = "val"
    """Folder of the test images, in root."""
    demo_images: int = DEMO_IMAGES
    """Training scenes (source=demo)."""
    demo_test: int = DEMO_TEST_IMAGES
    """Test scenes (source=demo)."""
    demo_size: int = DEMO_SIZE
    """Height and width of a scene (source=demo)."""

    def __post_init__(self) -> None:
        _check_data(self)


@dataclass
class RegionData(ImageLimitOptions):
    """Images with labelled boxes for roi-linear and compare."""

    source: Literal["demo", "coco", "voc", "labelled"] = "demo"
    """coco: ROOT/annotations/instances_SPLIT.json and ROOT/SPLIT; voc: ROOT/VOC2007/{Annotations,ImageSets,JPEGImages};
    labelled: any folder in the layout of YOLO, COCO or VOC, as the detectors' task custom takes it; demo: generated
    scenes of digits."""
    root: str = ""
    """Folder of the data set; the demo needs none."""
    train: str = ""
    """Split the classifier is trained on; empty: train2017 (coco), trainval (voc). labelled: name of a part, several
    joined by +, or FILE.json:FOLDER with COCO's annotations and their images; empty: found by its name."""
    test: str = ""
    """Split it is tested on; empty: val2017 (coco), test (voc). labelled: as data.train; empty: the validation part,
    else the test part, else a share of the training images."""
    layout: Literal["auto", "yolo", "coco", "voc"] = "auto"
    """How labels are written in data.root (labelled)."""
    val_share: float = 0.2
    """Share of the training images that is tested on and not trained on, where there is no other part (labelled)."""
    val_seed: int = 0
    """Which images that share has."""
    year: str = "2007"
    """Year of VOC."""
    classes: str = ""
    """Names of classes, separated by commas. voc: of files that have others than VOC's own twenty. labelled: those to
    tell apart; objects of others are left out. Empty: all."""
    short_side: int = 0
    """Enlarge or shrink images until the shorter side has this many pixels; 0: as they are."""
    max_images: int = 0
    """Use only so many images of each split; 0: all."""
    demo_images: int = DEMO_IMAGES
    """Training scenes (source=demo)."""
    demo_test: int = DEMO_TEST_IMAGES
    """Test scenes (source=demo)."""
    demo_size: int = DEMO_SIZE
    """Height and width of a scene (source=demo)."""

    def __post_init__(self) -> None:
        share, seed = between(0, 1), SEED_RANGE
        _check_data(self, short_side=at_least(0), max_images=at_least(0), val_share=share, val_seed=seed)
        for name, sources in _OPTIONS_OF_SOURCES.items():
            if self.source not in sources and (value := getattr(self, name)) != getattr(RegionData, name):
                raise option_error(f"data.{name}", value, f"not with source={self.source}; source={sources[0]} has it")


_OPTIONS_OF_SOURCES = {
    "classes": ("labelled", "voc"),
    "layout": ("labelled",),
    "val_share": ("labelled",),
    "val_seed": ("labelled",),
    "year": ("voc",),
}
"""Options that other sources do not read: given there, they are refused."""


def _check_data(data: ImageData | RegionData, **ranges) -> None:  # type: ignore[no-untyped-def]
    sizes = dict.fromkeys(("demo_images", "demo_test"), at_least(1)) | IMAGE_LIMIT_RANGES
    check_fields(data, "data", demo_size=at_least(16), **sizes, **ranges)
    clean_paths(data, "root")
