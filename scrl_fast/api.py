"""`pretrain` and `embed`: the trainer and its encoders as functions, for notebooks and other programs."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scrl_fast.config.files import Settings, build, option_kinds, read_settings, recipe_names, renamed_options
from scrl_fast.config.run_folder import METRICS
from scrl_fast.config.schema import Config, ViewsConfig
from scrl_fast.data.image_files import BadImage
from scrl_fast.data.image_inputs import ImageInput, rgb_of
from scrl_fast.data.sources.files import image_folder
from scrl_fast.distributed.rendezvous import device_of
from scrl_fast.errors import UsageError, did_you_mean
from scrl_fast.evaluate.batches import Progress, map_batches
from scrl_fast.evaluate.config import RankOptions
from scrl_fast.evaluate.encoder import load_evaluated
from scrl_fast.evaluate.images import ImageLoader, frozen_copy, pool
from scrl_fast.models import Encoder
from scrl_fast.run.log import RowHook
from scrl_fast.run.metrics_file import read_metrics
from scrl_fast.trainer import SCRLTrainer

_log = logging.getLogger("scrl_fast")


@dataclass(frozen=True)
class PretrainResult:
    """What `pretrain` returns.

    encoder: images ``[B, 3, H, W]``, normalised by ``mean`` and ``std``, to feature maps; in eval mode.
        ``encoder.body`` is the plain network.
    metrics: the rows of metrics.jsonl. folder: the run folder, which `embed`, transfer and export take.
    summary: what `SCRLTrainer.fit` returned: ``step``, ``loss``, ``interrupted``, ``checkpoint``, ...
    views: how its images were made: size, mean and std.
    """

    encoder: Encoder
    metrics: list[dict[str, Any]]
    folder: Path
    summary: dict[str, Any]
    views: ViewsConfig


def pretrain(
    *,
    data: Any = None,
    model: str | nn.Module | None = None,
    out: str | os.PathLike[str] | None = None,
    init: str | os.PathLike[str] | None = None,
    epochs: int | None = None,
    recipe: str | None = None,
    on_row: RowHook | None = None,
    progress: bool = True,
    **options: Any,
) -> PretrainResult:
    """Pre-train an encoder: ``python -m scrl_fast.train`` as a function.

    data: a folder of images at any depth, ``"demo"``, or a `scrl_fast.data.Source` of your own. Without it, what the
        recipe and the options name.
    model: a backbone's name, or any network that gives a feature map, which is trained in place.
    out: the run folder, as ``run__dir``. init: weights to start from. epochs: as ``train__epochs``.
    recipe: a recipe's name or a YAML file, beneath all other options; without it the defaults of `Config`.
    on_row: called in the first process with every logged row, a dict of numbers; a true answer stops the run after
        that step, saved, with ``summary["interrupted"] == "on_row"``. Its errors end the run, with a checkpoint.
    progress: a bar on a terminal and in a notebook.
    options: every option of the command, with ``__`` for the dot: ``optim__lr=0.3``, ``train__batch_size=64``,
        ``resume="auto"``. Values have the option's type, or are text as on the command line.
    Messages go to the logger ``scrl_fast`` (level INFO) and to the run's log.txt, not to stderr.
    Raises UsageError naming the option, and what `SCRLTrainer.fit` raises.
    """
    named = {"run__dir": out, "init": init, "train__epochs": epochs}
    source, module = None, None
    if isinstance(model, nn.Module):
        module = model
    elif model is not None:
        named["model__backbone"] = model
    if isinstance(data, str) and data == "demo":
        named |= {"data__source": "demo"}
    elif isinstance(data, (str, os.PathLike)):
        named |= {"data__root": data, "data__source": options.pop("data__source", "folder")}
    elif data is not None:
        source, named["data__source"] = data, "folder"  # which reads nothing: the options must name something
        named["data__root"] = f"a {type(data).__name__} given in Python"
    for name, value in named.items():
        if value is not None and name in options:
            raise UsageError(f"{name} is given twice")
    given = {**{name: value for name, value in named.items() if value is not None}, **options}
    config = _config(given, recipe)
    own: dict[str, Any] = {} if module is None else {"encoder": module}
    trainer = SCRLTrainer(config, source=source, **own)
    trainer.loop.use_logging(on_row, progress=progress)
    summary = trainer.fit()
    encoder = trainer.model.online.encoder.eval()
    return PretrainResult(
        encoder, read_metrics(trainer.folder / METRICS), trainer.folder, summary, trainer.config.views
    )


def _config(given: Mapping[str, Any], recipe: str | None) -> Config:
    nested: dict[str, Any] = {}
    known = {*option_kinds(Config), *renamed_options(Config)}
    for keyword, value in given.items():
        name = keyword.replace("__", ".")
        if name not in known:
            near = did_you_mean(name, known).replace(".", "__")
            raise UsageError(
                f"unknown option {keyword!r}{near}; options are spelled section__option, as in optim__lr=0.3"
            )
        section, _, field = name.rpartition(".")
        group = nested.setdefault(section, {}) if section else nested
        group[field] = os.fspath(value) if isinstance(value, os.PathLike) else value
    base = [] if recipe is None else [read_settings(recipe, recipe_names())]
    return build(Config, *base, Settings(nested))


# ---- embeddings ----


def embed(
    images: ImageInput | Sequence[ImageInput],
    *,
    weights: str | os.PathLike[str] | PretrainResult | Encoder,
    dense: bool = False,
    size: int | None = None,
    batch_size: int = 32,
    workers: int = 2,
    device: str = "auto",
) -> Tensor:
    """Features of images by a trained encoder: float32 ``[n, C]``, or with ``dense`` maps ``[n, C, h, w]``, on the CPU.

    images: one image or several: paths, arrays ``[H, W, 3]`` of uint8, pictures of Pillow's, tensors ``[3, H, W]``; a
        folder stands for all images below it, in the order of their sorted paths. One image gives n = 1.
    weights: a run folder, a checkpoint or any file that ``--init`` takes; what `pretrain` returned; or an encoder.
    dense: the last feature map; else its mean over all places.
    size: images are resized to 8/7 of it and their centre is cut out, as in evaluation; by default the training's.
    Where it takes more than two seconds, the logger ``scrl_fast`` (level INFO) says how far it is.
    Raises UsageError for an image that cannot be read, naming it, and for weights that cannot be used.
    """
    encoder, views = _encoder(weights, device, size or 0)
    frozen = frozen_copy(encoder).to(device_of(device))
    source = _Images(images)
    side = size or views.size
    recipe = ViewsConfig(recipe="none", size=side, mean=views.mean, std=views.std)
    loader = ImageLoader(views=recipe, batch_size=batch_size, workers=workers)
    place = next(frozen.parameters()).device

    def compute(pixels: Tensor) -> tuple[Tensor]:
        pixels = pixels.to(place)
        return ((frozen(pixels).float() if dense else pool(frozen, pixels)),)

    batches = loader.batches(range(len(source)))
    found = map_batches(lambda batch: loader.load(source, batch), compute, batches, device=place, workers=workers)
    rows = []
    with Progress("features", len(source), "images", _log.info) as progress:
        for (features,) in found:
            rows.append(features.cpu().contiguous())
            progress.advance(len(features))
    return torch.cat(rows)


def _encoder(weights: Any, device: str, size: int) -> tuple[Encoder, ViewsConfig]:
    if isinstance(weights, PretrainResult):
        return weights.encoder, weights.views
    if isinstance(weights, Encoder):
        return weights, ViewsConfig()
    evaluated = load_evaluated(RankOptions(checkpoint=os.fspath(weights), device=device))
    return evaluated.encoder, ViewsConfig(size=evaluated.view_size(size), mean=evaluated.mean, std=evaluated.std)


class _Images:
    """Images of any form as a source."""

    num_classes = 0

    def __init__(self, images: Any) -> None:
        if isinstance(images, (str, os.PathLike)) and os.path.isdir(images):
            folder = image_folder(os.fspath(images))
            images = [folder.name_of(index) for index in range(len(folder))]
        several = isinstance(images, Sequence) and not isinstance(images, str)
        self.images: Sequence[Any] = images if several else [images]
        if not self.images:
            raise UsageError("images is empty")

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> NDArray[np.uint8]:
        try:
            return rgb_of(self.images[index])
        except (TypeError, ValueError) as error:
            raise BadImage(f"images[{index}]", str(error)) from error

    def name_of(self, index: int) -> str:
        image = self.images[index]
        return os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"images[{index}]"

    def label(self, index: int) -> int:
        return -1
