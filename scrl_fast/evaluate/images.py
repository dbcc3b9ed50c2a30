"""Images to a frozen encoder: batches of prepared views, pooled features, and BatchNorm statistics measured anew."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scrl_fast.config.schema import ViewsConfig
from scrl_fast.data import BadImage, Source
from scrl_fast.data.prefetch import prefetched
from scrl_fast.data.views import draw_views
from scrl_fast.errors import UsageError
from scrl_fast.models import Encoder
from scrl_fast.ops.augment_views import augment_views
from scrl_fast.ops.view_table import pack_images

STATISTICS_IMAGES = 512  # enough for BatchNorm: 512 x 12 x 12 values a channel at 96 pixels and stride 8


@dataclass(frozen=True)
class ImageLoader:
    """Batches of views for an encoder.

    views: recipe ``none`` resizes to 8/7 of the size and crops the centre, ``simple`` makes random crops and flips.
    workers: threads that read and resize; 0: the caller's own.
    """

    views: ViewsConfig = field(default_factory=lambda: ViewsConfig(recipe="none"))
    batch_size: int = 128
    workers: int = 2
    seed: int = 0

    def batches(
        self, source: Source, indices: Sequence[int] | NDArray[np.int64] | None = None, epoch: int = 0
    ) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """(images ``[b, 3, S, S]`` on the CPU, their indices ``[b]``), in the order of ``indices``, the last one short.

        Random crops depend on (seed, epoch, index). Raises UsageError for an image that cannot be read: what is
        measured must not depend on which files were left out.
        """
        order = np.arange(len(source)) if indices is None else np.asarray(indices)
        chunks = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        made = prefetched(lambda chunk: self._made(source, chunk, epoch), chunks, self.workers)
        yield from zip(made, chunks, strict=True)

    def _made(self, source: Source, chunk: NDArray[np.int64], epoch: int) -> Tensor:
        images = [read_image(source, int(index)) for index in chunk]
        sizes = [image.shape[:2] for image in images]
        table = draw_views(self.views, sizes, seed=self.seed, epoch=epoch, keys=chunk)[0]
        return augment_views(pack_images(images), table, size=self.views.size, mean=self.views.mean, std=self.views.std)


def read_image(source: Any, index: int) -> NDArray[np.uint8]:
    """Image ``index``. Raises UsageError when it cannot be read: a measure must not depend on what was left out."""
    try:
        return source.read(index)
    except BadImage as bad:
        raise UsageError(f"an image that is to be evaluated cannot be read: {bad}") from bad


def frozen_copy(encoder: Encoder) -> Encoder:
    """A copy in eval mode without gradients; the encoder itself is left as it is."""
    return copy.deepcopy(encoder).requires_grad_(False).eval()


@torch.no_grad()
def pooled_features(encoder: Encoder, source: Source, loader: ImageLoader) -> Tensor:
    """Average-pooled last feature map of every image, float32 ``[n, C]`` on the encoder's device."""
    device = next(encoder.parameters()).device
    rows = [encoder(images.to(device)).mean((2, 3)).float() for images, _ in loader.batches(source)]
    return torch.cat(rows)


@torch.no_grad()
def measure_batchnorm(encoder: nn.Module, batches: Iterator[Tensor]) -> None:
    """Replace the running statistics by plain averages over the first `STATISTICS_IMAGES` images of the batches."""
    norms = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not any(norm.track_running_stats for norm in norms):
        return
    encoder.eval()  # dropout and its like stay off
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the cumulative average
        norm.train()
    seen = 0
    for images in batches:
        encoder(images)
        seen += len(images)
        if seen >= STATISTICS_IMAGES:
            break
    encoder.eval()


def has_untrained_batch_norm(encoder: nn.Module) -> bool:
    """Whether BatchNorm statistics are those of an initialisation, which describe no data."""
    norms = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    means = [norm.running_mean for norm in norms if norm.running_mean is not None]
    return bool(means) and not any(mean.any() for mean in means)
