"""The tasks about regions of images: roi-linear, dense-consistency and pca."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scrl_fast.config.run_folder import folder_of
from scrl_fast.config.schema import ModelConfig, ViewsConfig
from scrl_fast.data import Source, make_source
from scrl_fast.errors import UsageError
from scrl_fast.evaluate.batches import Progress
from scrl_fast.evaluate.cached_boxes import cached_box_features
from scrl_fast.evaluate.config import DenseOptions, PcaOptions, RoiLinearOptions
from scrl_fast.evaluate.datasets import labelled_regions
from scrl_fast.evaluate.dense import retrieval_result, retrieval_sums
from scrl_fast.evaluate.encoder import EvaluatedEncoder, load_evaluated
from scrl_fast.evaluate.images import ImageLoader, frozen_copy, measure_batchnorm_on_images
from scrl_fast.evaluate.pca import Components, dense_features, principal_components
from scrl_fast.evaluate.plots import draw_class_accuracies, draw_components, draw_similarity
from scrl_fast.evaluate.regions import classify
from scrl_fast.evaluate.result import NO_RESULT, TaskContext, TaskResult, save_plot
from scrl_fast.run.plots import to_picture
from scrl_fast.weights import RANDOM

AREAS = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}
"""COCO's ranges of area, in square pixels."""


# ---- roi-linear ----


def roi_linear_task(options: RoiLinearOptions, evaluated: EvaluatedEncoder, context: TaskContext) -> TaskResult:
    """A linear classifier on RoIAligned features of ground-truth boxes."""
    train, test = labelled_regions(options.data, options.seed, context.say)
    features = cached_box_features(options, evaluated, (train, test), context)
    if context.only_helps:
        return NO_RESULT
    result, predicted = classify(*features, say=context.say)
    labels = features[1].labels
    names = getattr(test, "classes", [str(label) for label in range(result.classes)])
    result = replace(result, classes=len(names))  # the highest that occurred, until now
    right = (predicted == labels).double()
    per_class = _by_group({n: labels == label for label, n in enumerate(names)}, right)
    values: dict[str, Any] = {**asdict(result), "mean_class_accuracy": _mean(per_class), "per_class": per_class}
    if hasattr(test, "areas"):
        areas = torch.from_numpy(test.areas())
        values["by_area"] = _by_group({n: (areas >= low) & (areas < high) for n, (low, high) in AREAS.items()}, right)
    if options.plot:
        save_plot(options.plot, lambda path: draw_class_accuracies(path, per_class), context.say)
    by_area = {name: group["accuracy"] for name, group in values.get("by_area", {}).items()}
    sizes = "".join(f", {name} {value:.1%}" for name, value in by_area.items() if value is not None)
    return TaskResult(
        f"RoI linear on {result.boxes} boxes of {result.classes} classes: top-1 {result.accuracy:.2%}, mean over "
        f"classes {values['mean_class_accuracy']:.2%}{sizes}",
        values,
    )


def _by_group(groups: Mapping[str, Tensor], right: Tensor) -> dict[str, dict[str, Any]]:
    return {
        name: {"accuracy": right[mask].mean().item() if mask.any() else None, "boxes": int(mask.sum())}
        for name, mask in groups.items()
    }


def _mean(groups: Mapping[str, dict[str, Any]]) -> float:
    return float(np.mean([group["accuracy"] for group in groups.values() if group["boxes"]]))


# ---- dense-consistency ----


def dense_task(options: DenseOptions, evaluated: EvaluatedEncoder, context: TaskContext) -> TaskResult:
    """Retrieval of matched boxes across two views."""
    source = make_source(options.data, seed=options.seed)
    encoder = frozen_copy(evaluated.encoder)
    if options.views.size < encoder.stride:
        raise UsageError(f"--views.size={options.views.size}: must be at least {encoder.stride}, the encoder's stride")
    say, world = context.say, context.world
    if evaluated.measures_batchnorm(options):
        loader = ImageLoader(replace(options.views, recipe="none"), options.batch_size, options.workers)
        measure_batchnorm_on_images(encoder, source, loader, say=say, world=world)
    trained = evaluated.training.get("model", {})
    model = ModelConfig(sampling_ratio=trained.get("sampling_ratio", -1), aligned=trained.get("aligned", False))
    indices = range(min(options.images, len(source)))
    sums = retrieval_sums(
        encoder,
        source,
        (options.views, options.boxes, model),
        [indices[first : first + options.batch_size] for first in indices[:: options.batch_size]],
        seed=options.seed,
        workers=options.workers,
        say=say,
        world=world,
    )
    if context.only_helps:
        return NO_RESULT
    result = retrieval_result(sums, len(indices), options.boxes)
    if options.plot:
        images = [index for index in options.plot_images if index < len(source)]
        how: dict[str, Any] = {"images": images, "points": options.plot_points, "seed": options.seed}
        arguments = encoder, source, options.views, options.boxes
        save_plot(options.plot, lambda path: draw_similarity(path, *arguments, **how), say)
    return TaskResult(
        f"dense consistency on {result.pairs} box pairs of {result.images} images: retrieval {result.retrieval:.2%} "
        f"(blind {result.chance:.2%}), across images {result.retrieval_across:.2%}, cosine gap {result.cosine_gap:.3f}"
        f"; views of {options.views.size} pixels, up to {options.boxes.per_image} boxes of at least "
        f"{options.boxes.min_size} pixels",
        asdict(result),
    )


# ---- pca ----


def pca_task(options: PcaOptions, evaluated: EvaluatedEncoder, context: TaskContext) -> TaskResult:
    """Principal components of dense features as colours, a column an encoder."""
    if context.only_helps:
        return NO_RESULT
    source = make_source(options.data, seed=options.seed)
    images = [index for index in options.images if index < len(source)]
    if not images:
        raise UsageError(f"images={list(options.images)}: the data set has {len(source)} images, numbered from 0")
    encoders = [evaluated]
    for other in options.beside:
        backbone = options.backbone or (evaluated.encoder.name if other == RANDOM else "")
        encoders.append(load_evaluated(replace(options, checkpoint=other, backbone=backbone)))
    for each in encoders[1:]:
        context.say(each.report)
    found = [_components(options, each, source, images, context) for each in encoders]
    pictures = [to_picture(view, encoders[0].mean, encoders[0].std) for view in found[0][1]]
    columns = [(_short_name(each), colours) for each, (colours, _) in zip(encoders, found, strict=True)]
    save_plot(options.plot, lambda path: draw_components(path, pictures, columns), context.say)
    values = [
        {"checkpoint": each.name, "shares": list(parts.shares), "cells": parts.cells}
        for each, (parts, _) in zip(encoders, found, strict=True)
    ]
    said = [f"{name} {sum(parts.shares):.1%}" for name, parts in columns]
    return TaskResult(
        f"variance in the first three components, {len(images)} images: {', '.join(said)}",
        {"encoders": values, "images": images},
    )


def _components(
    options: PcaOptions, evaluated: EvaluatedEncoder, source: Source, images: list[int], context: TaskContext
) -> tuple[Components, Tensor]:
    """Components of one encoder, and the views that it saw."""
    encoder, size = frozen_copy(evaluated.encoder), evaluated.view_size(options.size)
    if size < encoder.stride:
        raise UsageError(f"--size={size}: must be at least {encoder.stride}, the stride of {encoder.name}")
    views = ViewsConfig(recipe="none", size=size, mean=evaluated.mean, std=evaluated.std)
    loader = ImageLoader(views, options.batch_size, options.workers, options.seed)
    if evaluated.measures_batchnorm(options):  # by this process: the others ended with the task's first line
        measure_batchnorm_on_images(encoder, source, loader, say=context.say)
    with Progress(f"dense features of {_short_name(evaluated)}", len(images), "images", context.say) as progress:
        seen = loader.load(source, np.asarray(images))
        maps = dense_features(encoder, seen, min(16, options.batch_size), progress)
    return principal_components(maps), seen


def _short_name(evaluated: EvaluatedEncoder) -> str:
    """A run's folder, or the file."""
    return (folder_of(evaluated.name) or Path(evaluated.name)).name


def training_settings(evaluated: EvaluatedEncoder) -> dict[str, Any]:
    """The views and boxes that our checkpoint was trained with: the defaults of dense-consistency."""
    training = evaluated.training
    parts = {name: training[name] for name in ("views", "boxes") if isinstance(training.get(name), dict)}
    data = training.get("data", {})
    if data.get("source") == "demo":
        parts["data"] = {name: data[name] for name in ("demo_images", "demo_size") if name in data}
    return parts
