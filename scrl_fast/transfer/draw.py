"""Detections drawn into their image."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from scrl_fast.transfer.trained import Prediction

_GOLDEN = 0.618034  # hues of neighbouring labels lie far apart
_MASK_SHARE = 0.45


def draw_prediction(pixels: NDArray[np.uint8], prediction: Prediction) -> Image.Image:
    """The image uint8 ``[H, W, 3]`` with masks, boxes, names with scores and keypoints, the best score on top."""
    pixels = pixels.copy()
    if prediction.masks is not None:
        for mask, label in zip(prediction.masks[::-1], prediction.labels[::-1], strict=True):
            pixels[mask] = ((1 - _MASK_SHARE) * pixels[mask] + _MASK_SHARE * np.array(color_of(label))).astype(np.uint8)
    picture = Image.fromarray(pixels)
    draw, side = ImageDraw.Draw(picture), min(picture.size)
    width, font = max(1, round(side / 250)), _font(max(10, round(side / 35)))
    for row in reversed(range(len(prediction))):
        color = color_of(int(prediction.labels[row]))
        draw.rectangle(prediction.boxes[row].tolist(), outline=color, width=width)
        if prediction.keypoints is not None:
            for x, y, _ in prediction.keypoints[row].tolist():
                draw.ellipse((x - 2 * width, y - 2 * width, x + 2 * width, y + 2 * width), fill=color, outline="white")
    for row in reversed(range(len(prediction))):  # names lie above all boxes
        text = f"{prediction.names[row]} {prediction.scores[row]:.2f}"
        _write_label(draw, text, prediction.boxes[row], color_of(int(prediction.labels[row])), font)
    return picture


def color_of(label: int) -> tuple[int, int, int]:
    """Red, green, blue of a class."""
    red, green, blue = colorsys.hsv_to_rgb(label * _GOLDEN % 1, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def _write_label(draw: Any, text: str, box: NDArray[np.float32], color: tuple[int, int, int], font: Any) -> None:
    """A line of text on a ground of the class's colour, above the box or, at the image's edge, inside it."""
    try:
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    except UnicodeEncodeError:  # Pillow without FreeType knows Latin letters only
        text = text.encode("ascii", "replace").decode()
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    height, x = bottom - top + 4, float(box[0])
    y = float(box[1]) - height if box[1] >= height else float(box[1])
    draw.rectangle((x, y, x + right - left + 4, y + height), fill=color)
    dark = 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2] < 128
    draw.text((x + 2 - left, y + 2 - top), text, fill="white" if dark else "black", font=font)


def _font(size: int) -> Any:
    try:
        return ImageFont.load_default(size)
    except ImportError:  # Pillow without FreeType
        return ImageFont.load_default()
