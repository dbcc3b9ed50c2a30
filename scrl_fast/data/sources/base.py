"""What sources of images have in common: two small protocols, and a base for images in files."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from scrl_fast.data.decode import Encoded

UNLABELLED = -1


class Source(Protocol):
    """A fixed, ordered set of images. `read` is called from several threads at once."""

    num_classes: int
    """Classes of `label`; 0 where there are no labels."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> NDArray[np.uint8]:
        """Image `index` as RGB, uint8 `[H, W, 3]`, not to be written to. Raises BadImage if it cannot be read."""
        ...

    def label(self, index: int) -> int:
        """Class of image `index`, or -1."""
        ...

    def name_of(self, index: int) -> str:
        """What to call image `index` in a message: its path."""
        ...


class ImagesWithBoxes(Protocol):
    """Images with labelled boxes: generated scenes, or what the readers of COCO, VOC and Cityscapes return."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> NDArray[np.uint8]:
        """Image `index` as RGB, uint8 `[H, W, 3]`; sizes may differ."""
        ...

    def boxes(self, index: int) -> NDArray[np.float32]:
        """`[n, 4]` as x0, y0, x1, y1 in pixels."""
        ...

    def labels(self, index: int) -> NDArray[np.int64]:
        """`[n]`, the class of each box, 0 or more."""
        ...


class EncodedImages:
    """What the sources of image files share: they bring `data`, `name_of` and `max_pixels`."""

    max_pixels: int

    def data(self, index: int) -> bytes:
        """The file of image `index`. Raises BadImage if it cannot be read."""
        raise NotImplementedError

    def name_of(self, index: int) -> str:
        raise NotImplementedError

    def open(self, index: int) -> Encoded:
        """Image `index` before it is decoded. Raises BadImage."""
        return Encoded(self.data(index), max_pixels=self.max_pixels, name=self.name_of(index))

    def read(self, index: int) -> NDArray[np.uint8]:
        return self.open(index).decode()
