"""From images to a frozen encoder: batches of views, pooled features, and BatchNorm statistics measured anew."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from scrl_fast.config.schema import ViewsConfig
from scrl_fast.data import BadImage, Source
from scrl_fast.data.views import draw_views
from scrl_fast.distributed.world import World
from scrl_fast.errors import UsageError
from scrl_fast.evaluate.batches import Progress, Say, map_batches, silent
from scrl_fast.models import Encoder
from scrl_fast.ops.augment_views import augment_views
from scrl_fast.ops.view_table import pack_images

STATISTICS_IMAGES = 512  # enough for BatchNorm: 512 x 12 x 12 values a channel at 96 pixels and stride 8
Indices = NDArray[np.int64]


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

    def batches(self, order: Sequence[int] | Indices) -> list[Indices]:
        """The indices of images, in this order, in batches; the last one may be short."""
        order = np.asarray(order)
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    def load(self, source: Source, batch: Indices, epoch: int = 0) -> Tensor:
        """Views of these images, float32 ``[b, 3, S, S]`` on the CPU. Random crops depend on (seed, epoch, index).

        Raises UsageError for an image that cannot be read.
        """
        images = [read_image(source, int(index)) for index in batch]
        sizes = [image.shape[:2] for image in images]
        table = draw_views(self.views, sizes, seed=self.seed, epoch=epoch, keys=batch)[0]
        return augment_views(pack_images(images), table, size=self.views.size, mean=self.views.mean, std=self.views.std)


def read_image(source: Any, index: int) -> NDArray[np.uint8]:
    """Image ``index``. Raises UsageError when it cannot be read: a measure must not depend on what was left out."""
    try:
        return source.read(index)
    except BadImage as bad:
        raise UsageError(unreadable(bad)) from bad


def unreadable(why: object) -> str:
    """The message about an image that is to be evaluated. why: its name and the reason."""
    return f"an image that is to be evaluated cannot be read: {why}"


def frozen_copy(encoder: Encoder) -> Encoder:
    """A copy in eval mode without gradients; the encoder itself is left as it is."""
    frozen = copy.deepcopy(encoder).requires_grad_(False).eval()
    if next(frozen.parameters()).device.type == "cpu":  # where images lie so; a sixth faster than reordering them
        frozen.to(memory_format=torch.channels_last)
    return frozen


def pooled_features(
    encoder: Encoder,
    source: Source,
    loader: ImageLoader,
    *,
    name: str = "features",
    say: Say = silent,
    world: World = World(),  # noqa: B008
) -> Tensor:
    """Average-pooled last feature map of every image, float32 ``[n, C]`` on the encoder's device.

    Shared over the processes of ``world``: ranks above 0 do their part and return no rows.
    name: of the stage, for the lines of progress that ``say`` takes.
    """
    device = next(encoder.parameters()).device
    rows = [torch.empty(0, encoder.out_channels, device=device)]
    found = map_batches(
        lambda batch: loader.load(source, batch),
        lambda images: (pool(encoder, images.to(device)),),
        loader.batches(range(len(source))),
        device=device,
        workers=loader.workers,
        world=world,
    )
    with Progress(name, len(source), "images", say) as progress:
        for (features,) in found:
            rows.append(features)
            progress.advance(len(features))
    return torch.cat([each.to(device) for each in rows])


def pool(encoder: Encoder, images: Tensor) -> Tensor:
    """The feature of whole images: the mean over the last feature map, float32 ``[b, C]``."""
    return encoder(images).mean((2, 3)).float()


# ---- BatchNorm ----


def measure_batchnorm(
    encoder: nn.Module,
    batches: Iterable[Any],
    load: Callable[[Any], Tensor] = lambda images: images,
    *,
    workers: int = 0,
    say: Say = silent,
    world: World = World(),  # noqa: B008
) -> None:
    """Replace the running statistics by plain averages of the statistics of batches.

    batches: image tensors, or what ``load`` makes such of; of them the first that hold `STATISTICS_IMAGES` images. The
    length of each is its number of images.
    """
    norms = [norm for norm in _norms(encoder) if norm.track_running_stats]
    if not norms:
        return
    encoder.eval()  # dropout and its like stay off
    first = _first_images(batches, STATISTICS_IMAGES)
    device = next(encoder.parameters()).device
    statistics = _BatchStatistics(encoder)
    averages: list[Tensor] = []
    found = map_batches(
        load, lambda images: statistics(images.to(device)), first, device=device, workers=workers, world=world
    )
    with Progress("BatchNorm statistics", sum(map(len, first)), "images", say) as progress:
        for number, (batch, values) in enumerate(zip(first, found, strict=not world.rank)):
            share = 1 / (number + 1)
            averages = [(1 - share) * old + share * new for old, new in zip(averages or values, values, strict=True)]
            progress.advance(len(batch))
    averages = world.broadcast_from_rank0(lambda: averages)
    for norm, mean, var in zip(norms, averages[::2], averages[1::2], strict=True):
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(len(first))


def measure_batchnorm_on_images(
    encoder: Encoder,
    source: Source,
    loader: ImageLoader,
    *,
    say: Say = silent,
    world: World = World(),  # noqa: B008
) -> None:
    """`measure_batchnorm` on the first images of a source."""
    batches = loader.batches(range(min(len(source), STATISTICS_IMAGES + loader.batch_size)))
    load = functools.partial(loader.load, source)
    measure_batchnorm(encoder, batches, load, workers=loader.workers, say=say, world=world)


def _first_images(batches: Iterable[Any], count: int) -> list[Any]:
    found: list[Any] = []
    for batch in batches:
        found.append(batch)
        count -= len(batch)
        if count <= 0:
            break
    return found


class _BatchStatistics:
    """Mean and unbiased variance of one batch in every BatchNorm; may be called by several threads at once.

    Each call takes a copy of the encoder, since the statistics lie in its buffers; copies are used again.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self._encoder = encoder
        self._idle: SimpleQueue[nn.Module] = SimpleQueue()

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        try:
            encoder = self._idle.get_nowait()
        except Empty:
            encoder = copy.deepcopy(self._encoder)
            for norm in _norms(encoder):
                if norm.track_running_stats:
                    norm.momentum = 1.0  # the last batch alone
                    norm.train()
        encoder(images)
        buffers = [b for norm in _norms(encoder) if norm.track_running_stats for b in _statistics_of(norm)]
        found = tuple(buffer.clone() for buffer in buffers)
        self._idle.put(encoder)
        return found


def _statistics_of(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None
    return norm.running_mean, norm.running_var


def normalization_buffers(encoder: nn.Module) -> dict[str, Tensor]:
    """The statistics that `measure_batchnorm` replaces, by name; the buffers themselves."""
    return {
        f"{number}.{name}": buffer
        for number, norm in enumerate(_norms(encoder))
        if norm.track_running_stats
        for name, buffer in norm.named_buffers(recurse=False)
    }


def _norms(module: nn.Module) -> list[_BatchNorm]:
    return [each for each in module.modules() if isinstance(each, _BatchNorm)]


def has_untrained_batch_norm(encoder: nn.Module) -> bool:
    """Whether BatchNorm statistics are those of an initialisation, which describe no data."""
    means = [norm.running_mean for norm in _norms(encoder) if norm.track_running_stats]
    return bool(means) and not any(mean.any() for mean in means if mean is not None)
