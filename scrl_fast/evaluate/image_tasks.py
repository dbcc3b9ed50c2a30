"""The tasks about whole images: linear, finetune, knn and rank. Each takes options and returns a `TaskResult`."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scrl_fast import atomic_files
from scrl_fast.config.schema import ViewsConfig
from scrl_fast.data import make_source
from scrl_fast.errors import UsageError
from scrl_fast.evaluate.batches import Progress, map_batches
from scrl_fast.evaluate.cache import FeatureCache, content_key
from scrl_fast.evaluate.config import FinetuneOptions, KnnOptions, LinearOptions, RankOptions
from scrl_fast.evaluate.datasets import labelled_images, labels_of
from scrl_fast.evaluate.encoder import EvaluatedEncoder, probe_of
from scrl_fast.evaluate.finetune import Classifier, finetune
from scrl_fast.evaluate.images import ImageLoader, frozen_copy, measure_batchnorm_on_images, pool, pooled_features
from scrl_fast.evaluate.knn import knn
from scrl_fast.evaluate.linear import Batches, Epoch, HeadResult, accuracies, feature_epochs, fit_heads
from scrl_fast.evaluate.plots import draw_spectrum
from scrl_fast.evaluate.rank import rank
from scrl_fast.evaluate.result import NO_RESULT, TaskContext, TaskResult, save_plot
from scrl_fast.models import Encoder

# ---- linear ----


def linear_task(options: LinearOptions, evaluated: EvaluatedEncoder, context: TaskContext) -> TaskResult:
    """Linear classifiers on the pooled feature, or the checkpoint's own probe."""
    train, test = labelled_images(options.data, options.seed)
    if options.head == "train" and len(train) < options.batch_size:
        raise UsageError(f"--batch_size={options.batch_size}: there are {len(train)} training images; choose fewer")
    place = getattr(test, "root", "the demo")
    layer = probe_of(evaluated, test.num_classes, place) if options.head == "probe" else None
    encoder, loader = _prepared(options, evaluated, train, context)
    device = next(encoder.parameters()).device
    cache = FeatureCache(options.cache, context)
    features = _cached_features(cache, encoder, test, loader, "the test images", context).to(device)
    labels = torch.from_numpy(labels_of(test)).to(device)
    if layer is not None:
        return NO_RESULT if context.only_helps else _probe_result(layer, features, labels, test.num_classes)
    epoch = _epochs(options, encoder, train, loader, cache, context)
    if context.only_helps:
        for number in range(options.epochs if options.augment == "crop" else 0):
            with closing(epoch(number)) as batches:
                for _ in batches:
                    pass
        return NO_RESULT
    lrs = list(dict.fromkeys([*options.lrs, options.fixed_lr]))
    heads = fit_heads(
        epoch,
        (features, labels),
        steps_per_epoch=len(train) // options.batch_size,
        batch_size=options.batch_size,
        classes=test.num_classes,
        lrs=lrs,
        epochs=options.epochs,
        warmup_epochs=options.warmup_epochs,
        optim=options.optim,
        seed=options.seed,
        progress=context.say,
    )
    chosen = [heads[lrs.index(lr)] for lr in options.lrs]
    sizes = {"classes": test.num_classes, "train_images": len(train), "test_images": len(test)}
    return _linear_result(chosen, heads[lrs.index(options.fixed_lr)], options, sizes)


def _probe_result(layer: torch.nn.Linear, features: Tensor, labels: Tensor, classes: int) -> TaskResult:
    top1, top5 = accuracies(lambda rows: layer(rows)[None], features, labels)[0].tolist()
    return TaskResult(
        f"online probe on {len(labels)} images of {classes} classes: top-1 {top1:.2%}, top-5 {top5:.2%}",
        {"top1": top1, "top5": top5, "classes": classes, "test_images": len(labels)},
    )


def _linear_result(
    heads: list[HeadResult], fixed: HeadResult, options: LinearOptions, sizes: dict[str, int]
) -> TaskResult:
    """heads: of ``--lrs``, of which the best on the test images is printed. fixed: of ``--fixed_lr``."""
    best = max(heads, key=lambda head: head.last_top1)
    optim = "" if options.optim == "sgd" else f" under {options.optim.upper()}"
    return TaskResult(
        f"linear{optim}, {sizes['classes']} classes, {options.epochs} epochs: top-1 {best.last_top1:.2%} (best epoch "
        f"{best.best_top1:.2%}), top-5 {best.last_top5:.2%} ({best.best_top5:.2%}) at lr {best.lr:g}, the best of "
        f"{len(heads)}; top-1 {fixed.last_top1:.2%} at the fixed lr {fixed.lr:g}",
        {**asdict(best), "fixed": asdict(fixed), "heads": [asdict(head) for head in heads], **sizes},
    )


def _epochs(
    options: LinearOptions,
    encoder: Encoder,
    train: Any,
    loader: ImageLoader,
    cache: FeatureCache,
    context: TaskContext,
) -> Epoch:
    """The epochs of training that ``options.augment`` asks for."""
    device = next(encoder.parameters()).device
    labels = torch.from_numpy(labels_of(train)).to(device)
    if options.augment == "none":
        features = _cached_features(cache, encoder, train, loader, "the training images", context).to(device)
        return feature_epochs(features, labels, options.batch_size, options.seed)
    crops = replace(loader, views=replace(loader.views, recipe="simple", scale=options.crop_scale))
    return _augmented_epochs(encoder, train, labels, crops, context)


def _augmented_epochs(encoder: Encoder, train: Any, labels: Tensor, crops: ImageLoader, context: TaskContext) -> Epoch:
    """Epochs over new random crops of all images in a new order; a last batch that is short is left out."""
    device = next(encoder.parameters()).device

    def epoch(number: int) -> Batches:
        order = np.random.default_rng([crops.seed, number]).permutation(len(train))
        batches = crops.batches(order[: len(order) // crops.batch_size * crops.batch_size])
        found = map_batches(
            lambda batch: crops.load(train, batch, number),
            lambda images: (pool(encoder, images.to(device)),),
            batches,
            device=device,
            workers=crops.workers,
            world=context.world,
        )
        with Progress(f"epoch {number + 1}", len(order), "images", context.say) as progress:
            for batch, (rows,) in zip(batches, found, strict=not context.only_helps):
                yield rows.to(device), labels[torch.from_numpy(batch).to(device)]
                progress.advance(len(batch))

    return epoch


# ---- finetune ----


def finetune_task(options: FinetuneOptions, evaluated: EvaluatedEncoder, context: TaskContext) -> TaskResult:
    """Encoder and classifier trained together."""
    train, test = labelled_images(options.data, options.seed)
    batch, processes = options.batch_size, context.world.size
    if len(train) < batch:
        raise UsageError(f"--batch_size={batch}: there are {len(train)} training images; choose fewer")
    if batch % processes:
        raise UsageError(f"--batch_size={batch} cannot be shared evenly by {processes} processes")
    loader = _loader(options, evaluated, evaluated.encoder)
    classifier = Classifier(evaluated.encoder, test.num_classes, options.seed)
    found = finetune(classifier, loader, train, test, options, say=context.say, world=context.world)
    if options.save and context.world.rank == 0:
        file = Path(options.save)
        file.parent.mkdir(parents=True, exist_ok=True)
        state = classifier.torchvision_state()
        atomic_files.write_file(file, lambda writer: torch.save(state, writer))  # type: ignore[arg-type]
        context.say(f"written: {options.save}")
    sizes = {"classes": test.num_classes, "train_images": len(train), "test_images": len(test)}
    return TaskResult(
        f"fine-tuned, {test.num_classes} classes, {options.epochs} epochs at lr {options.lr:g}: top-1 "
        f"{found.last_top1:.2%} (best epoch {found.best_top1:.2%}), top-5 {found.last_top5:.2%} "
        f"({found.best_top5:.2%})",
        {**asdict(found), "lr": options.lr, **sizes},
    )


# ---- knn ----


def knn_task(options: KnnOptions, evaluated: EvaluatedEncoder, context: TaskContext) -> TaskResult:
    """Weighted nearest neighbours of the pooled feature."""
    train, test = labelled_images(options.data, options.seed)
    if max(options.k) > len(train):
        raise UsageError(f"--k={list(options.k)}: there are {len(train)} training images; choose fewer neighbours")
    encoder, loader = _prepared(options, evaluated, train, context)
    device, cache = next(encoder.parameters()).device, FeatureCache(options.cache, context)
    sets = ("the training images", train), ("the test images", test)
    bank, rows = (_cached_features(cache, encoder, images, loader, name, context) for name, images in sets)
    if context.only_helps:
        return NO_RESULT
    bank_labels, labels = (torch.from_numpy(labels_of(images)) for images in (train, test))
    found = knn(bank, bank_labels, rows.to(device), labels, k=options.k, temperature=options.temperature)
    parts = [f"k={r.k}: top-1 {r.top1:.2%}, top-5 {r.top5:.2%}" for r in found]
    best = max(found, key=lambda r: r.top1)
    return TaskResult(
        f"k-NN on {len(test)} images of {test.num_classes} classes: {'; '.join(parts)}",
        {**asdict(best), "results": [asdict(r) for r in found]},
    )


# ---- rank ----


def rank_task(options: RankOptions, evaluated: EvaluatedEncoder, context: TaskContext) -> TaskResult:
    """RankMe and deviation of the pooled feature."""
    source = FirstImages(make_source(options.data, seed=options.seed), options.images)
    encoder, loader = _prepared(options, evaluated, source, context)
    features = pooled_features(encoder, source, loader, say=context.say, world=context.world)
    if context.only_helps:
        return NO_RESULT
    result = rank(features)
    if options.plot:
        save_plot(options.plot, lambda path: draw_spectrum(path, features, Path(evaluated.name).name), context.say)
    return TaskResult(
        f"RankMe {result.rankme:.1f} of {min(result.dimensions, result.images)}, feature deviation "
        f"{result.feature_std:.4f} (evenly spread: {result.healthy_std:.4f}), {result.dead} dead channels, "
        f"{result.images} images",
        asdict(result),
    )


class FirstImages:
    """The first ``count`` images of a source."""

    num_classes = 0

    def __init__(self, source: Any, count: int) -> None:
        self.source, self.count = source, min(count, len(source))
        self.read, self.name_of, self.label = source.read, source.name_of, source.label

    def __len__(self) -> int:
        return self.count


# ---- common ----


def _prepared(
    options: LinearOptions | KnnOptions | RankOptions, evaluated: EvaluatedEncoder, train: Any, context: TaskContext
) -> tuple[Encoder, ImageLoader]:
    """The frozen encoder, with the BatchNorm statistics that the options want, and a loader of centre crops."""
    encoder = frozen_copy(evaluated.encoder)
    loader = _loader(options, evaluated, encoder)
    if evaluated.measures_batchnorm(options):
        measure_batchnorm_on_images(encoder, train, loader, say=context.say, world=context.world)
    return encoder, loader


def _loader(
    options: LinearOptions | FinetuneOptions | KnnOptions | RankOptions, evaluated: EvaluatedEncoder, encoder: Encoder
) -> ImageLoader:
    """A loader of centre crops. Raises UsageError for crops smaller than the encoder's stride."""
    size = evaluated.view_size(options.size)
    if size < encoder.stride:
        raise UsageError(f"--size={size}: must be at least {encoder.stride}, the stride of {encoder.name}")
    views = ViewsConfig(recipe="none", size=size, mean=evaluated.mean, std=evaluated.std)
    return ImageLoader(views, options.batch_size, options.workers, options.seed)


def _cached_features(
    cache: FeatureCache, encoder: Encoder, source: Any, loader: ImageLoader, name: str, context: TaskContext
) -> Tensor:
    """Pooled features ``[n, C]`` of all images, from the cache where it has them; no rows in ranks above 0."""

    def key() -> list[Any]:
        return ["pooled", encoder, encoder.name, repr(loader.views), content_key(source)]

    def make() -> dict[str, Tensor]:
        stage = f"features of {name}"
        rows = pooled_features(encoder, source, loader, name=stage, say=context.say, world=context.world)
        return {"features": rows}

    return cache.get(key, make).get("features", torch.empty(0, encoder.out_channels))
