"""Detections of a network, and average precision from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing

import torch
from torch import nn

from scrl_fast.data import ImagesWithBoxes
from scrl_fast.data.prefetch import Prefetcher
from scrl_fast.transfer.coco_metric import coco_average_precision, ground_truth
from scrl_fast.transfer.dataset import Examples
from scrl_fast.transfer.detections import Detections, to_arrays
from scrl_fast.transfer.masks import encode_masks


@torch.no_grad()
def detect(
    network: nn.Module,
    source: ImagesWithBoxes,
    indices: Sequence[int] | None = None,
    *,
    batch_size: int = 1,
    workers: int = 2,
    timeout: float = math.inf,
    autocast: torch.dtype | None = None,
) -> Iterator[Detections]:
    """Detections in each image, in order. The network is in eval mode meanwhile and gets its mode back.

    timeout: raise LoaderStalled when no image was read for so many seconds.
    """
    device = next(network.parameters()).device
    examples = Examples(source)
    chosen = list(range(len(source)) if indices is None else indices)
    groups = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
    training = network.training
    network.eval()
    try:
        name_of = getattr(source, "name_of", str)
        with closing(Prefetcher(max(1, workers), 2, timeout=timeout, name_of=name_of)) as prefetcher:
            for group, images in zip(groups, prefetcher.map(examples.image, groups), strict=True):
                inputs = [image.to(device).float().div_(255) for image in images]
                with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                    found = network(inputs)
                for index, each in zip(group, found, strict=True):
                    arrays = to_arrays(network, each)
                    if arrays["masks"] is not None:
                        arrays["masks"] = encode_masks(arrays["masks"])
                    yield Detections(index, **arrays)
    finally:
        network.train(training)


def average_precision(
    network: nn.Module,
    source: ImagesWithBoxes,
    *,
    batch_size: int = 1,
    workers: int = 2,
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """COCO's box AP over IoU 0.5 to 0.95, AP50, AP75 and by size (APs, APm, APl), 0 to 1; -1 where there is nothing.

    source: as for `fine_tune`; crowds of annotated images are ignored as COCO does.
    """
    found = list(detect(network, source, batch_size=batch_size, workers=workers, autocast=autocast))
    truth = ground_truth(source)
    return coco_average_precision(truth, found, source)
