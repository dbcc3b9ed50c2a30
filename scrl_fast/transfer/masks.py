"""Masks of annotated objects: COCO's polygons and run lengths, Cityscapes' instance images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scrl_fast.errors import UsageError


def masks_of(segmentations: Sequence[Any], height: int, width: int) -> NDArray[np.uint8]:
    """Masks ``[n, H, W]`` of COCO's polygons and run lengths, or of pairs of `scrl_fast.data.sources.cityscapes`."""
    masks = np.zeros((len(segmentations), height, width), np.uint8)
    images: dict[str, NDArray[np.int32]] = {}
    for row, segmentation in enumerate(segmentations):
        if isinstance(segmentation, tuple):
            from scrl_fast.data.sources.cityscapes import instance_image

            path, value = segmentation
            if path not in images:
                images[path] = instance_image(path)
            masks[row] = images[path] == value
        else:
            masks[row] = coco_mask(segmentation, height, width)
    return masks


def has_mask(segmentation: Any) -> bool:
    """Whether an annotation says what its object's pixels are: a polygon of three corners or more, or run lengths."""
    return any(_is_area(p) for p in segmentation) if isinstance(segmentation, list) else segmentation is not None


def _is_area(polygon: Sequence[float]) -> bool:
    return len(polygon) >= 6


def areas_of(segmentation: Any) -> Any:
    """The polygons of three corners or more, which enclose an area; run lengths as they are."""
    return list(filter(_is_area, segmentation)) if isinstance(segmentation, list) else segmentation


def coco_mask(segmentation: Any, height: int, width: int) -> NDArray[np.uint8]:
    """Mask ``[H, W]`` of polygons (a list of lists) or a run-length dict, compressed or not; see `has_mask`."""
    tools = mask_tools()
    if isinstance(segmentation, list):
        encoded = tools.merge(tools.frPyObjects(areas_of(segmentation), height, width))
    elif isinstance(segmentation["counts"], list):
        encoded = tools.frPyObjects(segmentation, height, width)
    else:
        encoded = segmentation
    return tools.decode(encoded)


def encode_masks(masks: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Masks ``[n, H, W]`` as COCO's compressed run lengths."""
    tools = mask_tools()
    return [tools.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]


def mask_tools() -> Any:
    """pycocotools' mask functions. Raises UsageError where it is not installed."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise UsageError("masks need pycocotools: pip install 'scrl-fast[eval]'") from error
    return mask
