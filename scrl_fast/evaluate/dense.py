"""Dense consistency: does a region of one view find itself in the other, among other regions? No labels needed.

It is the property that SCRL trains, measured on the frozen encoder's own feature map, without projector. Two random
views of an image and matched boxes in their overlap are drawn as in training; RoIAlign gives one feature a box. A box
of one view is retrieved when, of all candidate boxes of the other view, the one that shows the same region has the
highest cosine similarity. Both directions count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scrl_fast.config.schema import BoxesConfig, ModelConfig, ViewsConfig
from scrl_fast.data import Source
from scrl_fast.data.views import crops_of, draw_views
from scrl_fast.distributed.world import World
from scrl_fast.errors import UsageError
from scrl_fast.evaluate.batches import Progress, Say, map_batches, silent
from scrl_fast.evaluate.images import read_image
from scrl_fast.models import Encoder
from scrl_fast.ops import roi_align, sample_box_pairs
from scrl_fast.ops.augment_views import augment_views
from scrl_fast.ops.view_table import NO_BLUR, pack_images


@dataclass(frozen=True)
class DenseResult:
    """What `dense_consistency` measured."""

    retrieval: float
    """Share of boxes whose match is the most similar one of their image's boxes, 0 to 1."""
    chance: float
    """What a blind choice would give for it."""
    retrieval_across: float
    """The same among the boxes of all images of a batch."""
    cosine_match: float
    """Mean cosine similarity of matched boxes."""
    cosine_other: float
    """Mean cosine similarity of boxes of the same image that are no match."""
    cosine_gap: float
    """The difference of the two."""
    pairs: int
    images: int
    """Images with at least two box pairs: with fewer there is nothing to confuse."""


@dataclass(frozen=True)
class ViewPairs:
    """Both views of some images with matched boxes, made as the trainer makes them."""

    views: Tensor  # [2B, 3, S, S], view 1 of all images, then view 2
    boxes: tuple[Tensor, Tensor]  # two [N, 5], the image index of the second counts on from B


def view_pairs(
    source: Source, views: ViewsConfig, boxes: BoxesConfig, indices: range, *, seed: int = 0, photometric: bool = True
) -> ViewPairs:
    """The pair of views of each image; they depend on (seed, index) only, so every encoder sees the same.

    photometric: False leaves colours as they are: only crop and flip differ. Raises UsageError for a bad image.
    """
    images = [read_image(source, index) for index in indices]
    keys = np.asarray(indices)
    table = draw_views(views, [image.shape[:2] for image in images], seed=seed, epoch=0, keys=keys)
    if not photometric:
        table["blur"] = NO_BLUR
        for name in ("jitter", "grayscale", "solarize"):
            table[name] = False
    crops = crops_of(table)
    matched = sample_box_pairs(
        torch.from_numpy(crops[0]),
        torch.from_numpy(crops[1]),
        view_size=views.size,
        boxes_per_image=boxes.per_image,
        min_size=boxes.min_size,
        iou_threshold=boxes.iou_threshold,
        grid=boxes.grid,
        seed=seed,
        step=0,
        keys=torch.from_numpy(keys),
    )
    pixels = augment_views(
        pack_images(images),
        table,
        size=views.size,
        mean=views.mean,
        std=views.std,
        solarize_threshold=views.solarize_threshold,
        threads=torch.get_num_threads(),
    )
    return ViewPairs(pixels, (matched[0], matched[1]))


def dense_consistency(
    encoder: Encoder,
    source: Source,
    views: ViewsConfig,
    boxes: BoxesConfig,
    model: ModelConfig | None = None,
    *,
    images: int = 1024,
    batch_size: int = 64,
    seed: int = 0,
) -> DenseResult:
    """Retrieval accuracy of matched boxes over the first ``images`` images of a source.

    encoder: frozen, in eval mode. model: its RoIAlign options. batch_size: images a batch, which is also the pool of
    ``retrieval_across``. Raises UsageError when no image gives two box pairs.
    """
    indices = range(min(images, len(source)))
    batches = [indices[first : first + batch_size] for first in indices[::batch_size]]
    sums = retrieval_sums(encoder, source, (views, boxes, model or ModelConfig()), batches, seed=seed)
    return retrieval_result(sums, len(indices), boxes)


def retrieval_sums(
    encoder: Encoder,
    source: Source,
    recipe: tuple[ViewsConfig, BoxesConfig, ModelConfig],
    batches: Sequence[range],
    *,
    seed: int,
    workers: int = 0,
    say: Say = silent,
    world: World = World(),  # noqa: B008 (frozen)
) -> Tensor:
    """The sums of `_scores` over all batches of images, float64 ``[7]``; in ranks above 0 zeros."""
    views, boxes, model = recipe
    device = next(encoder.parameters()).device

    def compute(pairs: ViewPairs) -> tuple[Tensor]:
        features = encoder(pairs.views.to(device))
        rows = torch.cat(pairs.boxes).to(device)
        rois = roi_align(features, rows, 1, 1 / encoder.stride, model.sampling_ratio, model.aligned)
        left, right = F.normalize(rois.flatten(1).float(), dim=1).chunk(2)
        return (_scores(left, right, pairs.boxes[0][:, 0].to(device)).cpu(),)

    totals = torch.zeros(7, dtype=torch.float64)
    found = map_batches(
        lambda batch: view_pairs(source, views, boxes, batch, seed=seed),
        compute,
        batches,
        device=device,
        workers=workers,
        world=world,
    )
    with Progress("box pairs", sum(map(len, batches)), "images", say) as progress:
        for batch, (sums,) in zip(batches, found, strict=not world.rank):
            totals += sums
            progress.advance(len(batch))
    return totals


def retrieval_result(sums: Tensor, images: int, boxes: BoxesConfig) -> DenseResult:
    """Means of the sums. images: how many were looked at. Raises UsageError when none gave two box pairs."""
    hits, blind, across, match, other, number, found = sums.tolist()
    if not number:
        raise UsageError(f"no two box pairs in any of {images} images: lower --boxes.min_size={boxes.min_size}")
    gap = (match - other) / number
    return DenseResult(
        hits / number, blind / number, across / number, match / number, other / number, gap, int(number), int(found)
    )


def _scores(left: Tensor, right: Tensor, image: Tensor) -> Tensor:
    """Sums over the pairs of images with two pairs or more: hits, chance, hits across images, cosines, counts.

    left, right: ``[N, C]`` of unit length, row i of both the same region. image: ``[N]``.
    """
    same = image[:, None] == image[None]
    rivals = same.sum(1)
    counted = rivals > 1
    cosine = left @ right.T
    match = cosine.diagonal()
    diagonal = torch.eye(len(cosine), dtype=torch.bool, device=cosine.device)
    others = (cosine * same).sum(1).double() - match.double()
    values = [
        _retrieved(cosine, match, ~same | diagonal),
        1 / rivals.clamp(min=1).double(),
        _retrieved(cosine, match, diagonal),
        match.double(),
        others / (rivals - 1).clamp(min=1),
        torch.ones_like(others),
    ]
    sums = [value[counted].sum() for value in values]
    return torch.stack([*sums, image[counted].unique().numel() * torch.ones_like(sums[0])])


def _retrieved(cosine: Tensor, match: Tensor, left_out: Tensor) -> Tensor:
    """For each pair the share of both directions in which the match beats every rival.

    A tie is no retrieval: a constant feature map must not score.
    """
    rivals = cosine.masked_fill(left_out, -2.0)
    rivals = torch.cat([rivals, rivals.new_full((1, len(rivals)), -2.0)])  # N = 0 has a maximum, too
    rivals = torch.cat([rivals, rivals.new_full((len(rivals), 1), -2.0)], dim=1)
    forth, back = rivals[:-1].amax(1), rivals[:, :-1].amax(0)
    return ((match > forth).double() + (match > back).double()) / 2


@torch.no_grad()
def similarity_maps(encoder: Encoder, views: Tensor, points: Tensor) -> Tensor:
    """Cosine similarity of each point's feature in view 1 to every cell of view 2: ``[P, h, w]``.

    views: ``[2, 3, S, S]``. points: ``[P, 2]`` as x, y in pixels of view 1.
    """
    first, second = F.normalize(encoder(views).float(), dim=1)
    cells = ((points / encoder.stride).long()).clamp(min=0)
    picked = first[:, cells[:, 1].clamp(max=first.shape[1] - 1), cells[:, 0].clamp(max=first.shape[2] - 1)]
    return torch.einsum("cp,chw->phw", picked, second)
