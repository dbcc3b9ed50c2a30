"""RoI linear accuracy: can a linear classifier name what lies in a box, from the frozen feature map alone?

SCRL (arXiv 2103.06122) reports it on COCO's ground-truth boxes. The same protocol for every encoder, whatever its
weights:

1. The encoder is frozen. Its BatchNorm statistics are measured anew on the training images: those of a random
   initialisation (mean 0, variance 1) describe no data, and those of a trained one describe augmented views.
2. RoIAlign on the ground-truth boxes gives one feature a box, extracted once, standardised by the training boxes.
3. Multinomial logistic regression with an L2 penalty (`scrl_fast.evaluate.softmax_regression`, no randomness). The
   penalty is the best of five on every fifth training image, then the classifier is fitted to all of them.

The result is deterministic for a given number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scrl_fast.config.defaults import IMAGENET_MEAN, IMAGENET_STD
from scrl_fast.config.schema import Config
from scrl_fast.data import DemoScenes, ImagesWithBoxes
from scrl_fast.distributed.world import World
from scrl_fast.errors import UsageError
from scrl_fast.evaluate import softmax_regression
from scrl_fast.evaluate.batches import Progress, Say, map_batches, silent
from scrl_fast.evaluate.images import frozen_copy, measure_batchnorm, read_image
from scrl_fast.evaluate.softmax_regression import accuracy, fit, predict, standardised
from scrl_fast.models import Encoder
from scrl_fast.ops import roi_align

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
VALIDATION_FOLD = 5  # every fifth training image chooses the penalty

LabelledRegions = ImagesWithBoxes  # its public name here


@dataclass(frozen=True)
class RoILinearResult:
    """What `roi_linear` measured."""

    accuracy: float
    """Top-1 over the test boxes, 0 to 1."""
    boxes: int
    """Test boxes."""
    train_boxes: int
    """Boxes the classifier was fitted to."""
    classes: int
    """Classes of the classifier."""
    penalty: float
    """The L2 penalty that was chosen."""


def roi_linear(
    encoder: Encoder,
    train: ImagesWithBoxes,
    test: ImagesWithBoxes,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    pool_size: int = 1,
    sampling_ratio: int = -1,
    aligned: bool = False,
    batch_size: int = 128,
    measure_batchnorm: bool = True,
) -> RoILinearResult:
    """Top-1 accuracy of a linear classifier on RoIAligned features of the frozen encoder.

    encoder: left as it is; the work is done on a copy, on the encoder's device, in float32.
    mean, std: of the encoder's input, for values in 0..1.
    pool_size, sampling_ratio, aligned: of RoIAlign; bins are laid side by side.
    measure_batchnorm: step 1 of the protocol; False evaluates the stored statistics.
    Raises UsageError when train or test holds no boxes.
    """
    encoder = frozen_copy(encoder)
    loader = BoxLoader(mean, std, batch_size)
    if measure_batchnorm:
        measure_batchnorm_on_boxes(encoder, train, loader)
    pooling = pool_size, sampling_ratio, aligned
    features = [box_features(encoder, r, loader, pooling, name=n) for n, r in (("train", train), ("test", test))]
    return classify(*features)[0]


def demo_roi_linear(
    encoders: Mapping[str, Encoder], config: Config, *, train: ImagesWithBoxes | None = None
) -> dict[str, RoILinearResult]:
    """`roi_linear` of each encoder on the demo's own scenes: fitted to the training ones, tested on held-out ones.

    train: the scenes that the configuration describes, where they exist already; else they are made anew.
    """
    data, model, seed = config.data, config.model, config.train.seed
    train = train or DemoScenes(data.demo_images, data.demo_size, seed)
    test = DemoScenes(config.eval.scenes, data.demo_size, seed, "test")
    options: dict[str, Any] = {
        "mean": config.views.mean,
        "std": config.views.std,
        "sampling_ratio": model.sampling_ratio,
        "aligned": model.aligned,
    }
    return {name: roi_linear(encoder, train, test, **options) for name, encoder in encoders.items()}


# ---- features ----


@dataclass(frozen=True)
class BoxFeatures:
    """One row a box."""

    features: Tensor  # [n, C, P, P]
    labels: Tensor  # [n] int64
    images: Tensor  # [n] int64, index of the image that the box lies in


def box_features(
    encoder: Encoder,
    regions: ImagesWithBoxes,
    loader: BoxLoader,
    pooling: tuple[int, int, bool],
    *,
    name: str,
    say: Say = silent,
    world: World = World(),  # noqa: B008
) -> BoxFeatures:
    """RoIAligned features of every box. pooling: output size, sampling ratio, aligned.

    Shared over the processes of ``world``: ranks above 0 do their part and return no rows.
    Raises UsageError, in which ``name`` stands for the set, when there are no boxes.
    """
    size, ratio, aligned = pooling
    device = next(encoder.parameters()).device

    def compute(batch: LoadedBoxes) -> tuple[Tensor, ...]:
        maps = encoder(loader.normalised(batch.pictures.to(device)))
        return roi_align(maps, batch.boxes.to(device), size, 1 / encoder.stride, ratio, aligned), *batch[2:]

    none = torch.empty(0, encoder.out_channels, size, size), torch.empty(0).long(), torch.empty(0).long()
    parts: list[tuple[Tensor, ...]] = [(none[0].to(device), *none[1:])]
    batches = loader.batches(regions)
    found = map_batches(
        lambda batch: loader.load(regions, batch), compute, batches, device=device, workers=loader.workers, world=world
    )
    with Progress(f"features of {name}", len(regions), "images", say) as progress:
        for batch, rows in zip(batches, found, strict=not world.rank):
            parts.append((rows[0].to(device), *rows[1:]))
            progress.advance(len(batch))
    features = BoxFeatures(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
    if world.rank == 0 and not len(features.labels):
        raise UsageError(f"{name} holds no boxes in its {len(regions)} images")
    return features


class LoadedBoxes(NamedTuple):
    """Images of one size and the boxes in them, on the CPU."""

    pictures: Tensor  # [b, H, W, 3] uint8
    boxes: Tensor  # [n, 5], the first column counts from 0 to b - 1
    labels: Tensor  # [n] int64
    images: Tensor  # [n] int64, index of the image that the box lies in


@dataclass(frozen=True)
class BoxLoader:
    """Images and their boxes, in batches of one size, in order."""

    mean: Sequence[float]
    std: Sequence[float]
    batch_size: int
    workers: int = 0

    def batches(self, regions: ImagesWithBoxes) -> list[NDArray[np.int64]]:
        """Indices of images: runs of one size, none longer than ``batch_size``.

        A set of images that can tell sizes without decoding has a method ``size_of``; others are read for it.
        """
        size_of = getattr(regions, "size_of", None) or (lambda i: read_image(regions, i).shape[:2])
        batches: list[list[int]] = []
        before = None
        for i in range(len(regions)):
            size = tuple(size_of(i))
            if size != before or len(batches[-1]) == self.batch_size:
                batches.append([])
            batches[-1].append(i)
            before = size
        return [np.array(batch) for batch in batches]

    def load(self, regions: ImagesWithBoxes, batch: NDArray[np.int64]) -> LoadedBoxes:
        """Raises UsageError for an image that cannot be read."""
        pictures = np.stack([read_image(regions, i) for i in batch.tolist()])
        boxes = [np.insert(regions.boxes(i), 0, place, axis=1) for place, i in enumerate(batch.tolist())]
        labels = [regions.labels(i) for i in batch.tolist()]
        images = np.repeat(batch, [len(found) for found in labels])
        return LoadedBoxes(
            torch.from_numpy(pictures),
            torch.from_numpy(np.concatenate(boxes).astype(np.float32)),
            torch.from_numpy(np.concatenate(labels).astype(np.int64)),
            torch.from_numpy(images),
        )

    def normalised(self, pictures: Tensor) -> Tensor:
        """``[b, H, W, 3]`` uint8 as float32 ``[b, 3, H, W]``, channels_last as it lies."""
        mean, std = (torch.tensor(v, device=pictures.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return pictures.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)


def measure_batchnorm_on_boxes(
    encoder: Encoder,
    regions: ImagesWithBoxes,
    loader: BoxLoader,
    *,
    say: Say = silent,
    world: World = World(),  # noqa: B008
) -> None:
    """`measure_batchnorm` on the images of a set with boxes."""
    device = next(encoder.parameters()).device

    def load(batch: NDArray[np.int64]) -> Tensor:
        return loader.normalised(loader.load(regions, batch).pictures.to(device))

    measure_batchnorm(encoder, loader.batches(regions), load, workers=loader.workers, say=say, world=world)


# ---- classifier ----


def classify(train: BoxFeatures, test: BoxFeatures, *, say: Say = silent) -> tuple[RoILinearResult, Tensor]:
    """The result, and the class predicted for every test box ``[n]``, on the CPU."""
    rows, test_rows = standardised(train.features.flatten(1), test.features.flatten(1))
    labels, test_labels = train.labels.to(rows.device), test.labels.to(rows.device)
    classes = int(labels.max()) + 1
    validation = (train.images % VALIDATION_FOLD == 0).to(rows.device)
    chooses = bool(validation.any() and not validation.all())
    fits = len(PENALTIES) + 1 if chooses else 1
    penalty = PENALTIES[len(PENALTIES) // 2]
    steps = fits * softmax_regression.LBFGS_STEPS
    with Progress("classifier", steps, "iterations", say, at_most=True) as progress:
        if chooses:
            fitted = fit(rows[~validation], labels[~validation], classes, PENALTIES, progress)
            scores = [accuracy(weight, rows[validation], labels[validation]) for weight in fitted]
            penalty = PENALTIES[scores.index(max(scores))]
        (weight,) = fit(rows, labels, classes, [penalty], progress)
    result = RoILinearResult(accuracy(weight, test_rows, test_labels), len(test_labels), len(labels), classes, penalty)
    return result, predict(weight, test_rows).cpu()
