"""The detector of a run, for images: `load_detector` reads it, `TrainedDetector.predict` uses it."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scrl_fast.config.defaults import MAX_RESIZED, SHOWN_SCORE
from scrl_fast.config.files import Settings, build, under_present_names
from scrl_fast.config.run_folder import BEST, CHECKPOINTS
from scrl_fast.config.yaml_text import shortened
from scrl_fast.data.image_inputs import ImageInput, rgb_of
from scrl_fast.distributed.rendezvous import device_of
from scrl_fast.errors import UsageError
from scrl_fast.ops._arguments import check_integer, check_number
from scrl_fast.transfer.categories import Categories, stored_categories
from scrl_fast.transfer.config import LARGEST_SIDE, DetectorConfig, TransferConfig
from scrl_fast.transfer.dataset import KEYPOINTS
from scrl_fast.transfer.detections import to_arrays
from scrl_fast.transfer.detector import build_detector
from scrl_fast.weights.checkpoint_files import find, load
from scrl_fast.weights.errors import CheckpointError
from scrl_fast.weights.tensor_values import check_values
from scrl_fast.weights.training_state import check_training_state

RETINANET_ANCHORS = 9  # of a cell: three sizes, three shapes
MOST_FOUND = 10_000
"""Boxes of an image, before and after suppression, that the options in a file may ask for."""


@dataclass(frozen=True)
class Prediction:
    """The objects that a detector found in one image, the best score first; n may be 0.

    boxes: float32 ``[n, 4]`` as x0, y0, x1, y1 in pixels of the upright image. labels: int64 ``[n]``, 0 to classes - 1.
    names: of the classes. scores: float32 ``[n]``, 0 to 1. masks: bool ``[n, H, W]``; None but for Mask R-CNN.
    keypoints: float32 ``[n, K, 3]`` as x, y in pixels and 1; None but for Keypoint R-CNN.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    names: list[str]
    scores: NDArray[np.float32]
    masks: NDArray[np.bool_] | None = None
    keypoints: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.scores)


class TrainedDetector:
    """A detector, the names of its classes, and how its images are made.

    network: torchvision's, in eval mode; it takes lists of images ``[3, H, W]`` with values from 0 to 1.
    config: the ``model`` section of its run. classes: names by label. category_ids: their numbers in annotations.
    path: its checkpoint.
    The detector computes in float32.
    """

    def __init__(self, network: nn.Module, config: DetectorConfig, categories: Categories, path: Path) -> None:
        self.network, self.config, self.path = network.eval(), config, path
        self.classes, self.category_ids = list(categories.names), list(categories.ids)
        self._lock = threading.Lock()  # the threshold lies in the network

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @torch.no_grad()
    def predict(self, image: ImageInput, *, score: float = SHOWN_SCORE) -> Prediction:
        """The objects in one image.

        image: a path; an array ``[H, W, 3]`` of uint8; a picture of Pillow's; or a tensor ``[3, H, W]`` of uint8 or of
            floats from 0 to 1. Files and Pillow's pictures are turned upright by their EXIF orientation.
        score: objects that score more are kept.
        Raises BadImage for a file that cannot be read, TypeError or ValueError naming the argument.
        """
        score = check_number("score", score, 0, 1)
        pixels = torch.tensor(rgb_of(image)).permute(2, 0, 1).contiguous()  # a copy: arrays may be read-only
        with self._lock:
            set_threshold(self.network, score)  # what is weaker costs nothing then, above all no masks
            (found,) = self.network([pixels.to(self.device).float().div_(255)])
        arrays = to_arrays(self.network, found)
        return Prediction(names=[self.classes[label] for label in arrays["labels"]], **arrays)


def load_detector(
    run: str | os.PathLike[str], *, device: str = "auto", backbone: str = "", max_pixels: int = MAX_RESIZED
) -> TrainedDetector:
    """The detector of a transfer run.

    run: a checkpoint, or a run folder: its ``best.pt`` where the run measured on the way (``eval.every``), else its
        newest good checkpoint; ``path`` of the result tells which. No code of the file is run.
    backbone: ``package.module:function`` of a detector on a network of the user's own; a file alone may not name code.
    device: auto, cpu, cuda or cuda:N.
    max_pixels: a file whose options resize images to more is refused, since the file decides how much memory that takes
        (about 400 bytes a pixel with ResNet-50).
    Raises CheckpointError (a UsageError) for a file that is missing, damaged or holds no detector.
    """
    max_pixels = check_integer("max_pixels", max_pixels, 1, LARGEST_SIDE**2)
    path, state = _checkpoint_of(run)
    if missing := [key for key in ("model", "config") if key not in state]:
        raise CheckpointError(f"{path} is no checkpoint of a detector: it lacks {', '.join(missing)}")
    check_training_state(path, state)
    config = _detector_config(state["config"], path, run, backbone)
    _check_sizes(config, path, max_pixels)
    classes, keypoints = sizes_of(config.detector, state["model"])
    arguments: dict[str, Any] = {"backbone": config.backbone, "branch": config.branch, "config": config}
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):  # options and tensors of a file that contradict each other must not take memory
                expected = build_detector(config.detector, classes, keypoints=keypoints, **arguments).state_dict()
        except (RuntimeError, OverflowError) as error:  # sizes that no memory has
            raise CheckpointError(f"{path}: its options do not make a detector: {shortened(error)}") from error
        _check_tensors(expected, state["model"], config, path)
        network = build_detector(config.detector, classes, keypoints=keypoints, **arguments)
    network.load_state_dict(state["model"])
    return TrainedDetector(network.to(device_of(device)), config, stored_categories(state, classes), path)


def _checkpoint_of(run: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """The checkpoint to use and what it holds. A best.pt that no measurement chose may be older than the newest one."""
    for best in (Path(run, CHECKPOINTS, BEST), Path(run, BEST)):
        if best.is_file():
            try:
                state = load(best)
                if state.get("best"):
                    return best, state
            except CheckpointError as error:
                warnings.warn(f"{error}; taking the newest checkpoint", RuntimeWarning, stacklevel=3)
    path = find(run)
    return path, load(path)


def _detector_config(options: dict[str, Any], path: Path, run: Any, backbone: str) -> DetectorConfig:
    model = under_present_names(TransferConfig, options).get("model")
    if not isinstance(model, dict) or "detector" not in model:
        raise CheckpointError(
            f"{path} holds no detector but a pre-trained encoder; one is trained from it by "
            f"python -m scrl_fast.transfer TASK --init={run}"
        )
    if backbone:
        model = {**model, "backbone": backbone}
    tokens = [f"--backbone={backbone}"] if backbone else []
    try:
        return build(DetectorConfig, Settings(model, f"{path}: model"), tokens=tokens)
    except UsageError as error:
        raise error if str(path) in str(error) else CheckpointError(f"{path}: {error}") from error


def _check_sizes(config: DetectorConfig, path: Path, max_pixels: int) -> None:
    """Raise CheckpointError where the options in a file ask for more memory than a detector needs."""
    short, long = min(config.test_short_side, config.long_side), config.long_side
    if short * long > max_pixels:
        raise CheckpointError(
            f"{path}: its options model.test_short_side={config.test_short_side} and model.long_side={long} make "
            f"images of up to {short * long} pixels, more than max_pixels={max_pixels}: "
            f"--max_pixels={short * long} takes them"
        )
    for name in ("detections", "proposals", "proposals_before_nms"):
        value = getattr(config, name)
        if (value[1] if isinstance(value, tuple) else value) > MOST_FOUND:  # of (training, test) the latter
            raise CheckpointError(
                f"{path}: its option model.{name}={value}: at most {MOST_FOUND} are taken from a file"
            )


def sizes_of(detector: str, state: Mapping[str, Any]) -> tuple[int, int]:
    """Classes without background, and keypoints (17 where there are none), of a detector's tensors."""
    keypoints = state.get("roi_heads.keypoint_predictor.kps_score_lowres.weight")
    state = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.ndim}
    if detector.endswith("rcnn"):
        scores = state.get("roi_heads.box_predictor.cls_score.weight")
        classes = 0 if scores is None else len(scores) - 1
    else:
        scores = state.get("head.classification_head.cls_logits.weight")
        classes = 0 if scores is None else len(scores) // (RETINANET_ANCHORS if detector == "retinanet" else 1)
    return max(1, classes), KEYPOINTS if keypoints is None or keypoints.ndim < 2 else max(1, keypoints.shape[1])


def _check_tensors(
    expected: Mapping[str, Tensor], found: Mapping[str, Any], config: DetectorConfig, path: Path
) -> None:
    wrong = [name for name, tensor in expected.items() if getattr(found.get(name), "shape", None) != tensor.shape] + [
        name for name in found if name not in expected
    ]
    if wrong:
        raise CheckpointError(
            f"{path}: its options are those of {config.detector} with {config.backbone}, but {len(wrong)} of its "
            f"tensors are missing, left over or of another shape: {', '.join(wrong[:3])}"
        )
    check_values(path, found, expected)


def set_threshold(network: Any, score: float) -> None:
    """Keep detections of one of torchvision's detectors that score more than ``score``.

    The same as leaving the others out afterwards: neither suppression nor the limit of their number lets a weaker one
    go before a stronger one.
    """
    if hasattr(network, "roi_heads"):
        network.roi_heads.score_thresh = score
    else:
        network.score_thresh = score
