"""The tasks of ``python -m scrl_fast.evaluate``: options in, a line and a dict of results out."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scrl_fast.config.schema import ModelConfig, ViewsConfig
from scrl_fast.data import make_source
from scrl_fast.errors import UsageError
from scrl_fast.evaluate import config as o
from scrl_fast.evaluate.cache import FeatureCache, identity_of
from scrl_fast.evaluate.datasets import labelled_images, labelled_regions, labels_of
from scrl_fast.evaluate.dense import dense_consistency, draw_similarity
from scrl_fast.evaluate.encoder import Subject, probe_of
from scrl_fast.evaluate.images import Preparation, frozen, measure_batchnorm, pooled_features
from scrl_fast.evaluate.knn import knn
from scrl_fast.evaluate.linear import accuracies, feature_epochs, fit_heads
from scrl_fast.evaluate.rank import draw_spectrum, rank
from scrl_fast.evaluate.regions import BoxSamples, RegionReader, _measure_batchnorm, classify, region_features
from scrl_fast.models import Encoder

Say = Callable[[str], None]
AREAS = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}
"""COCO's ranges of area, in square pixels."""


@dataclass(frozen=True)
class Outcome:
    """What a task found: one line for people, and the numbers."""

    line: str
    result: dict[str, Any]


# ---- images ----


def linear(options: o.LinearOptions, subject: Subject, say: Say) -> Outcome:
    """Linear classifiers on the pooled feature, or the checkpoint's own probe."""
    train, test = labelled_images(options.data, options.seed)
    if options.head == "train" and len(train) < options.batch_size:
        raise UsageError(f"--batch_size={options.batch_size}: there are {len(train)} training images; choose fewer")
    layer = probe_of(subject, test.num_classes, _place(test)) if options.head == "probe" else None
    encoder, centre = _prepared(options, subject, train, options.size)
    device = next(encoder.parameters()).device
    cache = FeatureCache(options.cache, say)
    features = _cached(cache, encoder, test, centre).to(device)
    labels = torch.from_numpy(labels_of(test)).to(device)
    if layer is not None:
        top1, top5 = accuracies(lambda rows: layer(rows)[None], features, labels)[0].tolist()
        return Outcome(
            f"online probe on {len(test)} images of {test.num_classes} classes: top-1 {top1:.2%}, top-5 {top5:.2%}",
            {"top1": top1, "top5": top5, "classes": test.num_classes, "test_images": len(test)},
        )
    truth = torch.from_numpy(labels_of(train)).to(device)
    if options.augment == "none":
        epoch = feature_epochs(
            _cached(cache, encoder, train, centre).to(device), truth, options.batch_size, options.seed
        )
    else:
        crops = replace(centre.views, recipe="simple", scale=options.crop_scale)
        epoch = _augmented_epochs(encoder, train, truth, replace(centre, views=crops))
    heads = fit_heads(
        epoch,
        (features, labels),
        steps_per_epoch=len(train) // options.batch_size,
        batch_size=options.batch_size,
        classes=test.num_classes,
        lrs=options.lrs,
        epochs=options.epochs,
        warmup_epochs=options.warmup_epochs,
        seed=options.seed,
        progress=say,
    )
    best = max(heads, key=lambda head: head.last_top1)
    sizes = {"classes": test.num_classes, "train_images": len(train), "test_images": len(test)}
    return Outcome(
        f"linear, {test.num_classes} classes, {options.epochs} epochs: top-1 {best.last_top1:.2%} (best epoch "
        f"{best.best_top1:.2%}), top-5 {best.last_top5:.2%} ({best.best_top5:.2%}) at lr {best.lr:g}, the best of "
        f"{len(heads)}",
        {**asdict(best), "heads": [asdict(head) for head in heads], **sizes},
    )


def knn_task(options: o.KnnOptions, subject: Subject, say: Say) -> Outcome:
    """Weighted nearest neighbours of the pooled feature."""
    train, test = labelled_images(options.data, options.seed)
    if max(options.k) > len(train):
        raise UsageError(f"--k={list(options.k)}: there are {len(train)} training images; choose fewer neighbours")
    encoder, centre = _prepared(options, subject, train, options.size)
    device, cache = next(encoder.parameters()).device, FeatureCache(options.cache, say)
    sets = [(_cached(cache, encoder, s, centre), torch.from_numpy(labels_of(s))) for s in (train, test)]
    (bank, bank_labels), (rows, labels) = sets
    found = knn(bank, bank_labels, rows.to(device), labels, k=options.k, temperature=options.temperature)
    parts = [f"k={r.k}: top-1 {r.top1:.2%}, top-5 {r.top5:.2%}" for r in found]
    best = max(found, key=lambda r: r.top1)
    return Outcome(
        f"k-NN on {len(test)} images of {test.num_classes} classes: {'; '.join(parts)}",
        {**asdict(best), "results": [asdict(r) for r in found]},
    )


def rank_task(options: o.RankOptions, subject: Subject, say: Say) -> Outcome:
    """RankMe and deviation of the pooled feature."""
    source = _first(make_source(options.data, seed=options.seed), options.images)
    encoder, centre = _prepared(options, subject, source, options.size)
    features = pooled_features(encoder, source, centre)
    result = rank(features)
    if options.plot:
        _drawn(options.plot, lambda path: draw_spectrum(path, features, Path(subject.name).name), say)
    return Outcome(
        f"RankMe {result.rankme:.1f} of {min(result.dimensions, result.images)}, feature deviation "
        f"{result.feature_std:.4f} (evenly spread: {result.healthy_std:.4f}), {result.dead} dead channels, "
        f"{result.images} images",
        asdict(result),
    )


def _prepared(options: Any, subject: Subject, train: Any, size: int) -> tuple[Encoder, Preparation]:
    """The frozen encoder, with the BatchNorm statistics that the options want, and how centre crops are made."""
    encoder = frozen(subject.encoder)
    size = size or subject.size
    if size < encoder.stride:
        raise UsageError(f"--size={size}: must be at least {encoder.stride}, the stride of {encoder.name}")
    views = ViewsConfig(recipe="none", size=size, mean=subject.mean, std=subject.std)
    centre = Preparation(views, options.batch_size, options.workers, options.seed)
    if options.batchnorm == "measured" or (options.batchnorm == "auto" and subject.untrained):
        device = next(encoder.parameters()).device
        measure_batchnorm(encoder, (images.to(device) for images, _ in centre.batches(train)))
    return encoder, centre


def _cached(cache: FeatureCache, encoder: Encoder, source: Any, centre: Preparation) -> Tensor:
    key = ["pooled", encoder, encoder.name, repr(centre.views), identity_of(source)] if cache.folder else []
    return cache.get(key, lambda: {"features": pooled_features(encoder, source, centre)})["features"]


def _augmented_epochs(encoder: Encoder, train: Any, labels: Tensor, crops: Preparation) -> Any:
    """Epochs in which the encoder sees new random crops of all images, in a new order; the last short batch is left."""
    device = next(encoder.parameters()).device

    def epoch(number: int) -> Any:
        order = np.random.default_rng([crops.seed, number]).permutation(len(train))
        order = order[: len(order) // crops.batch_size * crops.batch_size]
        for images, at in crops.batches(train, order, number):
            with torch.no_grad():
                rows = encoder(images.to(device)).mean((2, 3)).float()
            yield rows, labels[torch.from_numpy(at).to(device)]

    return epoch


class _First:
    """The first images of a source."""

    def __init__(self, source: Any, count: int) -> None:
        self.source, self.count = source, min(count, len(source))
        self.read, self.name_of = source.read, source.name_of

    def __len__(self) -> int:
        return self.count


def _first(source: Any, count: int) -> Any:
    return _First(source, count)


def _place(source: Any) -> str:
    return getattr(source, "root", "the demo")


# ---- boxes ----


def roi_linear_task(options: o.RoiLinearOptions, subject: Subject, say: Say) -> Outcome:
    """A linear classifier on RoIAligned features of ground-truth boxes."""
    train, test = labelled_regions(options.data, options.seed)
    model = subject.training.get("model", {})
    pooling = options.pool_size, int(model.get("sampling_ratio", -1)), bool(model.get("aligned", False))
    encoder = frozen(subject.encoder)
    device = next(encoder.parameters()).device
    reader = RegionReader(subject.mean, subject.std, device, options.batch_size, options.workers)
    if options.batchnorm != "stored":
        _measure_batchnorm(encoder, train, reader)
    cache = FeatureCache(options.cache, say)
    samples = []
    for name, regions in (("the training split", train), ("the test split", test)):
        key = _regions_key(encoder, regions, pooling, subject, options) if cache.folder else []
        make = functools.partial(region_features, encoder, regions, reader, pooling, name)
        found = cache.get(key, lambda make=make: vars(make()))  # type: ignore[misc]
        samples.append(BoxSamples(found["features"].to(device), found["labels"], found["images"]))
    result, predicted = classify(*samples)
    names = getattr(test, "classes", [str(label) for label in range(result.classes)])
    result = replace(result, classes=len(names))  # the highest that occurred, until now
    right = (predicted == samples[1].labels).double()
    per_class = _by_group({n: samples[1].labels == label for label, n in enumerate(names)}, right)
    values: dict[str, Any] = {**asdict(result), "mean_class_accuracy": _mean(per_class), "per_class": per_class}
    areas = torch.from_numpy(test.areas()) if hasattr(test, "areas") else None
    if areas is not None:
        values["by_area"] = _by_group({n: (areas >= low) & (areas < high) for n, (low, high) in AREAS.items()}, right)
    if options.plot:
        _drawn(options.plot, lambda path: _draw_classes(path, per_class), say)
    sizes = "".join(
        f", {n} {v['accuracy']:.1%}" for n, v in values.get("by_area", {}).items() if v["accuracy"] is not None
    )
    return Outcome(
        f"RoI linear on {result.boxes} boxes of {result.classes} classes: top-1 {result.accuracy:.2%}, mean over "
        f"classes {values['mean_class_accuracy']:.2%}{sizes}",
        values,
    )


def _regions_key(encoder: Encoder, regions: Any, pooling: Any, subject: Subject, options: Any) -> list[Any]:
    """All that the features of a split depend on; short_side decides what `read` and `boxes` give."""
    boxes = [regions.boxes(i) for i in range(len(regions))]
    labels = [regions.labels(i) for i in range(len(regions))]
    data = [identity_of(regions), boxes, labels, options.data.short_side]
    return ["regions", encoder, encoder.name, pooling, subject.mean, subject.std, data]


def _by_group(groups: Mapping[str, Tensor], right: Tensor) -> dict[str, dict[str, Any]]:
    return {
        name: {"accuracy": right[mask].mean().item() if mask.any() else None, "boxes": int(mask.sum())}
        for name, mask in groups.items()
    }


def _mean(groups: Mapping[str, dict[str, Any]]) -> float:
    return float(np.mean([group["accuracy"] for group in groups.values() if group["boxes"]]))


def _draw_classes(path: str, per_class: Mapping[str, dict[str, Any]]) -> bool:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    found = sorted((v["accuracy"], n) for n, v in per_class.items() if v["boxes"])
    figure = Figure(figsize=(6, 1 + 0.2 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.barh([name for _, name in found], [100 * value for value, _ in found])
    axes.set(xlabel="accuracy, %")
    axes.tick_params(labelsize=7)
    axes.margins(y=0.01)
    figure.savefig(path, dpi=110)
    return True


# ---- views ----


def dense_task(options: o.DenseOptions, subject: Subject, say: Say) -> Outcome:
    """Retrieval of matched boxes across two views."""
    source = make_source(options.data, seed=options.seed)
    encoder = frozen(subject.encoder)
    if options.views.size < encoder.stride:
        raise UsageError(f"--views.size={options.views.size}: must be at least {encoder.stride}, the encoder's stride")
    device = next(encoder.parameters()).device
    if options.batchnorm == "measured" or (options.batchnorm == "auto" and subject.untrained):
        centre = Preparation(replace(options.views, recipe="none"), options.batch_size, options.workers)
        measure_batchnorm(encoder, (images.to(device) for images, _ in centre.batches(source)))
    trained = subject.training.get("model", {})
    model = ModelConfig(sampling_ratio=trained.get("sampling_ratio", -1), aligned=trained.get("aligned", False))
    arguments = encoder, source, options.views, options.boxes
    result = dense_consistency(
        *arguments, model, images=options.images, batch_size=options.batch_size, seed=options.seed
    )
    if options.plot:
        chosen = [index for index in options.plot_images if index < len(source)]
        _drawn(
            options.plot,
            lambda path: draw_similarity(
                path, *arguments, images=chosen, points=options.plot_points, seed=options.seed
            ),
            say,
        )
    return Outcome(
        f"dense consistency on {result.pairs} box pairs of {result.images} images: retrieval {result.retrieval:.2%} "
        f"(blind {result.chance:.2%}), across images {result.retrieval_across:.2%}, cosine gap {result.cosine_gap:.3f}",
        asdict(result),
    )


def training_settings(subject: Subject) -> dict[str, Any]:
    """The views and boxes that our checkpoint was trained with: what dense-consistency starts from."""
    parts = {
        name: subject.training[name] for name in ("views", "boxes") if isinstance(subject.training.get(name), dict)
    }
    data = subject.training.get("data", {})
    if data.get("source") == "demo":
        parts["data"] = {name: data[name] for name in ("demo_images", "demo_size") if name in data}
    return parts


def _drawn(path: str, draw: Callable[[str], bool], say: Say) -> None:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    if draw(path):
        say(f"drawn: {path}")
    else:
        say("matplotlib is not installed: no picture (pip install matplotlib brings it)")


TASKS: dict[str, Callable[[Any, Subject, Say], Outcome]] = {
    "linear": linear,
    "knn": knn_task,
    "roi-linear": roi_linear_task,
    "dense-consistency": dense_task,
    "rank": rank_task,
}
