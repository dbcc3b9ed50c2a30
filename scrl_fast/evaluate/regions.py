"""RoI linear accuracy: can a linear classifier name what lies in a box, from the frozen feature map alone?

SCRL (arXiv 2103.06122) reports it on COCO's ground-truth boxes. The same protocol for every encoder, whatever its
weights:

1. The encoder is frozen. Its BatchNorm statistics are measured anew on the training images: those of a random
   initialisation (mean 0, variance 1) describe no data, and those of a trained one describe augmented views.
2. RoIAlign on the ground-truth boxes gives one feature a box, extracted once, standardised by the training boxes.
3. Multinomial logistic regression with an L2 penalty, solved to convergence (L-BFGS, float64, no randomness). The
   penalty is the best of five on every fifth training image, then the classifier is fitted to all of them.

The result is deterministic for a given number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from scrl_fast.config.defaults import IMAGENET_MEAN, IMAGENET_STD
from scrl_fast.config.schema import Config
from scrl_fast.data import ImagesWithBoxes
from scrl_fast.data.prefetch import prefetched
from scrl_fast.errors import UsageError
from scrl_fast.evaluate.images import frozen_copy, measure_batchnorm, read_image
from scrl_fast.models import Encoder
from scrl_fast.ops import roi_align

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
VALIDATION_FOLD = 5  # every fifth training image chooses the penalty
LBFGS_STEPS = 100
DOUBLE_NUMBERS = 2**28


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
    mean, std: what the encoder's input is normalised by, for values in 0..1.
    pool_size, sampling_ratio, aligned: of RoIAlign; bins are laid side by side.
    measure_batchnorm: step 1 of the protocol; False evaluates the stored statistics.
    Raises ValueError when train or test holds no boxes.
    """
    encoder = frozen_copy(encoder)
    loader = BoxLoader(mean, std, next(encoder.parameters()).device, batch_size)
    if measure_batchnorm:
        measure_batchnorm_on_boxes(encoder, train, loader)
    pooling = pool_size, sampling_ratio, aligned
    return classify(*(box_features(encoder, r, loader, pooling, n) for n, r in (("train", train), ("test", test))))[0]


@torch.no_grad()
def box_features(
    encoder: Encoder, regions: ImagesWithBoxes, loader: BoxLoader, pooling: tuple[int, int, bool], name: str
) -> BoxFeatures:
    """RoIAligned features of every box. pooling: output size, sampling ratio, aligned.

    Raises ValueError, in which ``name`` stands for the set, when there are no boxes.
    """
    size, ratio, aligned = pooling
    pooled = [
        (roi_align(encoder(images), boxes, size, 1 / encoder.stride, ratio, aligned), *rest)
        for images, boxes, *rest in loader.batches(regions)
    ]
    if not sum(len(rows) for rows, *_ in pooled):
        raise UsageError(f"{name} holds no boxes in its {len(regions)} images")
    return BoxFeatures(*(torch.cat(parts) for parts in zip(*pooled, strict=True)))


def demo_roi_linear(
    encoders: Mapping[str, Encoder], config: Config, *, train: ImagesWithBoxes | None = None
) -> dict[str, RoILinearResult]:
    """`roi_linear` of each encoder on the demo's own scenes: fitted to the training ones, tested on held-out ones.

    train: the scenes that the configuration describes, where they exist already; else they are made anew.
    """
    from scrl_fast.data import DemoScenes

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

    features: Tensor  # [n, C]
    labels: Tensor  # [n] int64
    images: Tensor  # [n] int64, index of the image that the box lies in

    def flat(self) -> BoxFeatures:
        """Rows to solve with, all on one device: float64, or float32 where that would take more than 2 GB."""
        rows = self.features.flatten(1)
        rows = rows.double() if rows.numel() <= DOUBLE_NUMBERS else rows.float()
        return BoxFeatures(rows, self.labels.to(rows.device), self.images.to(rows.device))

    def __getitem__(self, mask: Tensor) -> BoxFeatures:
        return BoxFeatures(self.features[mask], self.labels[mask], self.images[mask])


@dataclass(frozen=True)
class BoxLoader:
    """Normalised images and their boxes, in batches of one size, in order."""

    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device
    batch_size: int
    workers: int = 0

    def batches(self, regions: ImagesWithBoxes) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """(images ``[b, 3, H, W]``, boxes ``[n, 5]``, labels ``[n]``, image of each box ``[n]``)."""
        for first, pictures in self._same_size(regions):
            at = range(first, first + len(pictures))
            boxes = [np.insert(regions.boxes(i), 0, i - first, axis=1) for i in at]
            labels = [regions.labels(i) for i in at]
            images = np.repeat(np.asarray(at), [len(found) for found in labels])
            yield (
                self._normalised(pictures),
                torch.from_numpy(np.concatenate(boxes).astype(np.float32)).to(self.device),
                torch.from_numpy(np.concatenate(labels).astype(np.int64)),
                torch.from_numpy(images),
            )

    def _same_size(self, regions: ImagesWithBoxes) -> Iterator[tuple[int, list[NDArray[np.uint8]]]]:
        group: list[NDArray[np.uint8]] = []
        for i, picture in enumerate(prefetched(lambda i: read_image(regions, i), range(len(regions)), self.workers)):
            if group and (len(group) == self.batch_size or picture.shape != group[0].shape):
                yield i - len(group), group
                group = []
            group.append(picture)
        if group:
            yield len(regions) - len(group), group

    def _normalised(self, pictures: list[NDArray[np.uint8]]) -> Tensor:
        images = torch.from_numpy(np.stack(pictures)).to(self.device).permute(0, 3, 1, 2)  # channels_last as it lies
        mean, std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return images.float().div_(255).sub_(mean).div_(std)


def measure_batchnorm_on_boxes(encoder: nn.Module, regions: ImagesWithBoxes, loader: BoxLoader) -> None:
    measure_batchnorm(encoder, (images for images, *_ in loader.batches(regions)))


# ---- classifier ----


def classify(train: BoxFeatures, test: BoxFeatures) -> tuple[RoILinearResult, Tensor]:
    """The result, and the class predicted for every test box ``[n]``, on the CPU."""
    train, test = train.flat(), test.flat()
    classes = int(train.labels.max()) + 1
    centre, scale = train.features.mean(0), train.features.std(0, correction=0)
    scale = torch.where(scale > 1e-6 * scale.max(), scale, 1.0)  # a dead channel stays at zero
    train, test = (BoxFeatures((s.features - centre) / scale, s.labels, s.images) for s in (train, test))
    validation = train.images % VALIDATION_FOLD == 0
    penalty = PENALTIES[len(PENALTIES) // 2]
    if validation.any() and not validation.all():
        fitted = _fit(train[~validation], classes, PENALTIES)
        scores = [_accuracy(weight, train[validation]) for weight in fitted]
        penalty = PENALTIES[scores.index(max(scores))]
    (weight,) = _fit(train, classes, [penalty])
    result = RoILinearResult(_accuracy(weight, test), len(test.labels), len(train.labels), classes, penalty)
    return result, _predicted(weight, test).cpu()


@torch.enable_grad()
def _fit(samples: BoxFeatures, classes: int, penalties: Sequence[float]) -> list[Tensor]:
    """Weights ``[C + 1, classes]`` (the last row is the bias) for each penalty, each started from the one before."""
    rows = F.pad(samples.features, (0, 1), value=1.0)
    weight = torch.zeros(rows.shape[1], classes, dtype=rows.dtype, device=rows.device, requires_grad=True)
    fitted = []
    for penalty in penalties:
        solver = torch.optim.LBFGS([weight], max_iter=LBFGS_STEPS, history_size=20, line_search_fn="strong_wolfe")

        def objective(solver: torch.optim.LBFGS = solver, penalty: float = penalty) -> Tensor:
            solver.zero_grad()
            loss = F.cross_entropy(rows @ weight, samples.labels) + penalty * weight[:-1].square().sum()
            loss.backward()
            return loss

        solver.step(objective)  # type: ignore[arg-type]
        fitted.append(weight.detach().clone())
    return fitted


def _predicted(weight: Tensor, samples: BoxFeatures) -> Tensor:
    return (samples.features @ weight[:-1] + weight[-1]).argmax(1)


def _accuracy(weight: Tensor, samples: BoxFeatures) -> float:
    return (_predicted(weight, samples) == samples.labels).double().mean().item()
