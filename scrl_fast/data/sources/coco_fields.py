"""The fields of a row in COCO's files: odd but clear values are taken, others raise a ValueError that names them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from scrl_fast.data.sources.annotation_files import shown

FARTHEST = 100_000.0  # pixels, beyond any image; pycocotools needs memory for every pixel along a polygon's edge


def number(value: Any, name: str) -> float:
    """A number, also one written as text."""
    if type(value) in (int, float, str):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    raise ValueError(f"has {name} {shown(value)}, which is no number")


def id_of(item: dict[str, Any], name: str) -> int | str:
    """An id: a whole number or text."""
    if name not in item:
        raise ValueError(f"has no {name}")
    value = item[name]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"has {name} {shown(value)}, which is neither a whole number nor text")
    return value


def text_of(item: dict[str, Any], name: str) -> str:
    """A name: text that is not empty; a whole number stands for its digits."""
    value = item.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"has {name} {shown(value)}, expected text" if value else f"has no {name}")
    return value


def bbox_of(item: dict[str, Any]) -> tuple[float, float, float, float]:
    """x, y, width and height; those of the polygons where the row has no bbox."""
    value = item.get("bbox")
    if value is None or value == []:
        polygons = segmentation_of(item.get("segmentation"))
        points = [v for p in polygons if len(p) >= 6 for v in p] if isinstance(polygons, list) else []
        if not points:
            raise ValueError("has no bbox")
        left, top = min(points[::2]), min(points[1::2])
        return left, top, max(points[::2]) - left, max(points[1::2]) - top
    if not isinstance(value, list) or len(value) != 4:
        raise ValueError(f"has bbox {shown(value)}, expected [x, y, width, height]")
    x, y, width, height = (number(v, "bbox with") for v in value)
    return x, y, width, height


def area_of(value: Any, bbox: tuple[float, float, float, float]) -> float:
    """Square pixels; those of the box where tools wrote nothing, 0 or no number."""
    if value is not None and value != "":
        area = number(value, "area")
        if 0 < area <= FARTHEST**2:
            return area
    return min(bbox[2] * bbox[3], FARTHEST**2)


def crowd_of(value: Any) -> bool:
    """iscrowd: 0 or 1, also as text or boolean; a missing one is 0."""
    if value is None:
        return False
    text = str(value) if isinstance(value, (bool, int, float, str)) else ""
    known = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}
    if text.lower() not in known:
        raise ValueError(f"has iscrowd {shown(value)}, expected 0 or 1")
    return known[text.lower()]


def keypoints_of(value: Any) -> list[float] | None:
    """3 K finite numbers; None where there are none."""
    if value is None or value == []:
        return None
    if not isinstance(value, list) or len(value) % 3:
        raise ValueError(f"has keypoints {shown(value)}, expected x, y, visibility for each point")
    points = [number(v, "keypoints with") for v in value]
    if not _in_reach(points):
        raise ValueError(f"has keypoints that are not finite or beyond {FARTHEST:.0f} pixels")
    return points


def _in_reach(values: list[float]) -> bool:
    return max(values) <= FARTHEST and min(values) >= -FARTHEST and math.isfinite(sum(values))  # NaN is not


# ---- masks ----


def segmentation_of(value: Any) -> Any:
    """Polygons (lists of x, y, x, y, ...) or checked run lengths; None where there is no mask."""
    if value is None or value == [] or value == {} or value == "":
        return None
    if isinstance(value, list):
        if not all(isinstance(polygon, list) for polygon in value):
            flat = all(isinstance(v, (int, float)) for v in value)
            what = "a flat list of numbers" if flat else shown(value)
            raise ValueError(f"has as segmentation {what}, expected a list of polygons [[x, y, ...], ...]")
        return [_polygon(polygon) for polygon in value]
    if isinstance(value, dict):
        return value if _has_pixels(value) else None
    raise ValueError(f"has as segmentation {shown(value)}, expected polygons or run lengths")


def _polygon(values: list[Any]) -> list[float]:
    if len(values) % 2:
        raise ValueError(f"has a polygon of {len(values)} numbers, expected x, y, x, y, ...")
    if not all(type(v) is float or type(v) is int for v in values):
        values = [number(v, "a polygon with") for v in values]
    if values and not _in_reach(values):
        raise ValueError(f"has a polygon that is not finite or reaches beyond {FARTHEST:.0f} pixels: {shown(values)}")
    return values


def inside_mask(segmentation: Any, height: int, width: int) -> Any:
    """The mask, or None where no polygon of it reaches into the image."""
    if not isinstance(segmentation, list):
        return segmentation
    reach = any(
        len(p) >= 6 and min(p[::2]) < width and min(p[1::2]) < height and max(p[::2]) > 0 and max(p[1::2]) > 0
        for p in segmentation
    )
    return segmentation if reach else None


def _has_pixels(value: dict[str, Any]) -> bool:
    """Whether run lengths hold any pixel of an object.

    Raises ValueError unless the runs cover the image exactly: pycocotools would show uninitialised memory.
    """
    size, counts = value.get("size"), value.get("counts")
    sides = size if isinstance(size, list) and len(size) == 2 else [0]
    if not all(type(side) is int and 0 < side <= FARTHEST for side in sides):
        raise ValueError(f"has run lengths of size {shown(size)}, expected [height, width]")
    if isinstance(counts, str):
        runs = _decoded(counts)
    elif isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts):
        runs = counts
    else:
        raise ValueError(f"has run lengths with counts {shown(counts)}")
    if sum(runs) != sides[0] * sides[1]:
        raise ValueError(f"has run lengths of {sum(runs)} pixels in all, but a size of {sides[0]} x {sides[1]}")
    return any(runs[1::2])


def _decoded(text: str) -> list[int]:
    """The runs of COCO's compressed form: five bits a character, the lowest first; from the fourth on differences."""
    try:
        codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        codes = np.full(1, -1)
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError(f"has damaged run lengths {shown(text)}")
    last = np.flatnonzero(codes & 32 == 0)
    first = np.append(0, last[:-1] + 1)
    if (last - first).max() > 6:
        raise ValueError(f"has damaged run lengths {shown(text)}")
    place = np.arange(len(codes)) - np.repeat(first, last - first + 1)
    runs = np.add.reduceat((codes & 31) << (5 * place), first)
    runs -= np.where(codes[last] & 16, np.int64(1) << (5 * (last - first + 1)), 0)
    for start in (1, 2):
        runs[start::2] = runs[start::2].cumsum()
    if runs.min() < 0:
        raise ValueError(f"has run lengths below 0: {shown(text)}")
    return runs.tolist()
