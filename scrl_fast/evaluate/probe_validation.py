"""The online probe of a run on validation images: top-1 on centre crops, as the published implementation measures."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from scrl_fast.config.schema import Config
from scrl_fast.data import ImageLimits
from scrl_fast.data.sources.files import class_folders
from scrl_fast.data.workers import worker_count
from scrl_fast.distributed.world import World
from scrl_fast.errors import UsageError
from scrl_fast.evaluate.finetune import top_accuracies
from scrl_fast.evaluate.images import ImageLoader, pool
from scrl_fast.models import SCRL, Encoder


class ProbeValidation:
    """Measures the probe on the images of ``eval.validation``.

    source: the training images, whose classes the folder must have.
    Raises UsageError for a folder that is missing or holds other classes, and for training images without labels.
    """

    def __init__(self, config: Config, source: Any, world: World) -> None:
        folder = config.eval.validation
        if not source.num_classes:
            raise UsageError(f"eval.validation={folder!r}: the training images have no labels, so there is no probe")
        if not os.path.isdir(folder):
            raise UsageError(f"eval.validation={folder!r} does not exist; expected in it: one folder a class")
        self.images = class_folders(folder, limits=ImageLimits(max_pixels=config.data.max_pixels))
        expected = getattr(source, "classes", None)
        if expected is not None and list(expected) != list(self.images.classes):
            odd = sorted(set(expected) ^ set(self.images.classes))
            raise UsageError(f"eval.validation={folder!r} has not the classes of the training images: {odd[0]!r}")
        if len(self.images.classes) != source.num_classes:
            found, wanted = len(self.images.classes), source.num_classes
            raise UsageError(f"eval.validation={folder!r} has {found} classes, the training images have {wanted}")
        views = config.views
        centre = type(views)(recipe="none", size=views.size, mean=views.mean, std=views.std)
        self.loader = ImageLoader(centre, config.train.batch_size, worker_count(config.data.workers))
        self.world = world

    def top1(self, model: SCRL) -> float:
        """Share of the validation images that the probe names, 0 to 1; all processes call it and get the same.

        The encoder is in eval mode meanwhile; no generator is drawn from and nothing of the model changes.
        """
        assert model.probe is not None
        encoder = model.online.encoder
        was = [(module, module.training) for module in encoder.modules()]
        try:
            return top_accuracies(_Probed(encoder, model.probe), self.loader, self.images, world=self.world)[0].item()
        finally:
            for module, training in was:
                module.training = training


class _Probed(nn.Module):
    def __init__(self, encoder: Encoder, probe: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.probe = encoder, probe

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.probe(pool(self.encoder, images))
