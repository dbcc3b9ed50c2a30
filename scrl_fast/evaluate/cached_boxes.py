"""Features of the boxes of a training and a test set, and BatchNorm statistics, kept from call to call."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from scrl_fast.data import ImagesWithBoxes
from scrl_fast.evaluate.cache import FeatureCache, content_key
from scrl_fast.evaluate.config import RegionOptions
from scrl_fast.evaluate.encoder import EvaluatedEncoder, normalization
from scrl_fast.evaluate.images import frozen_copy, normalization_buffers
from scrl_fast.evaluate.regions import BoxFeatures, BoxLoader, box_features, measure_batchnorm_on_boxes
from scrl_fast.evaluate.result import TaskContext
from scrl_fast.models import Encoder


def cached_box_features(
    options: RegionOptions, evaluated: EvaluatedEncoder, splits: tuple[Any, Any], context: TaskContext
) -> list[BoxFeatures]:
    """Features of the boxes of both splits, taken from the cache where it holds them; none in ranks above 0."""
    model = evaluated.training.get("model", {})
    pooling = options.pool_size, int(model.get("sampling_ratio", -1)), bool(model.get("aligned", False))
    encoder = frozen_copy(evaluated.encoder)
    device = next(encoder.parameters()).device
    mean, std = normalization(evaluated, options)
    loader = BoxLoader(mean, std, options.batch_size, options.workers)
    cache = FeatureCache(options.cache, context)
    if options.batchnorm != "stored":
        _measure_batchnorm(encoder, splits[0], loader, options, cache, context)
    features = []
    for name, split in zip(("the training split", "the test split"), splits, strict=True):
        key = functools.partial(_feature_key, encoder, split, pooling, loader, options)
        extract = functools.partial(
            box_features, encoder, split, loader, pooling, name=name, say=context.say, world=context.world
        )
        found = cache.get(key, lambda extract=extract: vars(extract()))  # type: ignore[misc]
        if not context.only_helps:
            features.append(BoxFeatures(found["features"].to(device), found["labels"], found["images"]))
    return features


def _measure_batchnorm(
    encoder: Encoder,
    train: ImagesWithBoxes,
    loader: BoxLoader,
    options: RegionOptions,
    cache: FeatureCache,
    context: TaskContext,
) -> None:
    """`measure_batchnorm_on_boxes`, or what it measured before on the same images."""
    buffers = normalization_buffers(encoder)
    if not buffers:
        return

    def key() -> list[Any]:
        return ["batchnorm", *_encoder_key(encoder, loader), _image_key(train, options), options.batch_size]

    def measure() -> dict[str, Tensor]:
        measure_batchnorm_on_boxes(encoder, train, loader, say=context.say, world=context.world)
        return {name: buffer.cpu() for name, buffer in buffers.items()}  # for ranks on other devices

    found = cache.get(key, measure, kind="batchnorm")
    found = context.world.broadcast_from_rank0(lambda: found)
    for name, buffer in buffers.items():
        buffer.copy_(found[name])


def _encoder_key(encoder: nn.Module, loader: BoxLoader) -> list[Any]:
    return [encoder, getattr(encoder, "name", ""), loader.mean, loader.std]


def _image_key(split: ImagesWithBoxes, options: RegionOptions) -> list[Any]:
    """What `read` and `boxes` of a split give; short_side decides on both."""
    boxes = [split.boxes(i) for i in range(len(split))]
    labels = [split.labels(i) for i in range(len(split))]
    return [content_key(split), boxes, labels, options.data.short_side]


def _feature_key(
    encoder: Encoder,
    split: ImagesWithBoxes,
    pooling: tuple[int, int, bool],
    loader: BoxLoader,
    options: RegionOptions,
) -> list[Any]:
    """All that the features of a split depend on."""
    return ["regions", encoder, encoder.name, pooling, loader.mean, loader.std, _image_key(split, options)]
