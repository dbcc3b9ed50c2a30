"""Images as people hold them (path, array, Pillow's, tensor) as the RGB pixels that sources give."""

from __future__ import annotations

import os
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from scrl_fast.data.decode import read_image, upright
from scrl_fast.data.image_files import DEFAULT_LIMITS, ImageLimits
from scrl_fast.data.pillow import orientation_and_size, to_rgb

ImageInput: TypeAlias = "str | os.PathLike[str] | NDArray[np.uint8] | Image.Image | Tensor"


def rgb_of(image: ImageInput, *, limits: ImageLimits = DEFAULT_LIMITS) -> NDArray[np.uint8]:
    """One image as RGB, uint8 ``[H, W, 3]``, as training reads it from a file.

    image: a path; an array ``[H, W, 3]`` of uint8; a picture of Pillow's, turned upright by its EXIF orientation as a
        file is; a tensor ``[3, H, W]`` of uint8, or of floats from 0 to 1, which are rounded to 8 bits.
    limits: of files.
    Raises BadImage for a file that cannot be read, TypeError or ValueError naming the argument for everything else.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(os.fspath(image), limits=limits)
    if isinstance(image, Image.Image):
        image.load()  # a TIFF is turned by Pillow meanwhile
        orientation, _, _ = orientation_and_size(image)
        return upright(to_rgb(image), orientation)
    if isinstance(image, Tensor):
        return _rgb_of_tensor(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"image must be an array [H, W, 3] of uint8, got {list(image.shape)} of {image.dtype}")
        _check_size(image.shape)
        return np.ascontiguousarray(image)
    raise TypeError(f"image must be a path, an array, a picture of Pillow's or a tensor, got {type(image).__name__}")


def _rgb_of_tensor(image: Tensor) -> NDArray[np.uint8]:
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image must be a tensor [3, H, W], got {list(image.shape)}")
    _check_size(image.shape)
    image = image.detach().cpu()
    if image.is_floating_point():
        low, high = (float(end) for end in torch.aminmax(image.float()))
        if not (low >= 0 and high <= 1):
            raise ValueError(f"image must hold floats from 0 to 1, got {low:g} to {high:g}")
        image = (image.float() * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise ValueError(f"image must be a tensor of uint8 or floats, got {image.dtype}")
    return image.permute(1, 2, 0).contiguous().numpy()


def _check_size(shape: Any) -> None:
    if 0 in shape:
        raise ValueError(f"image must have pixels, got {list(shape)}")
