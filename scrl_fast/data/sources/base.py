"""What sources of images have in common: two small protocols, and a base for images in files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from scrl_fast.data.decode import Encoded
from scrl_fast.data.image_files import DEFAULT_LIMITS, ImageLimits, memory_budget, read_file

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
    """What sources of image files share: they bring `name_of`, `__len__`, and `data` where a name is no path."""

    limits: ImageLimits = DEFAULT_LIMITS

    def __len__(self) -> int:
        raise NotImplementedError

    def data(self, index: int) -> bytes:
        """The file of image `index`. Raises BadImage if it cannot be read."""
        return read_file(self.name_of(index), limit=self.limits.max_file_bytes)

    def name_of(self, index: int) -> str:
        raise NotImplementedError

    def open(self, index: int) -> Encoded:
        """Image `index` before it is decoded. Raises BadImage."""
        return Encoded(self.data(index), limits=self.limits, name=self.name_of(index))

    def read(self, index: int) -> NDArray[np.uint8]:
        image = self.open(index)
        with memory_budget(self.limits.decode_memory).reserved(image.decoding_bytes):
            return image.decode()

    def identity(self) -> dict[str, Any]:
        """See `identity_of`."""
        return identity_of_names(list(map(self.name_of, range(len(self)))))


def identity_of(source: Any) -> dict[str, Any]:
    """``{"images": how many, "names": a hash of their names}``, by which a resumed run knows its images again.

    A source may have a method `identity` of its own. The hash is the same wherever the folder of the images lies.
    """
    if hasattr(source, "identity"):
        return source.identity()
    name_of = getattr(source, "name_of", str)
    return identity_of_names([name_of(index) for index in range(len(source))])


def identity_of_names(names: Sequence[str]) -> dict[str, Any]:
    """The identity of images with these names in this order; the folder that holds them all does not count."""
    low, high = min(names, default=""), max(names, default="")
    same = next((at for at, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    folder = low[:same].rpartition("/")[0]
    text = "\0".join(name.removeprefix(folder) for name in names)
    return {"images": len(names), "names": hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()}
