"""Several places of images as one source: the images of the first, then those of the second, and so on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from scrl_fast.data.decode import Encoded
from scrl_fast.data.sources.base import UNLABELLED, EncodedImages, identity_of
from scrl_fast.errors import UsageError


class JoinedImages(EncodedImages):
    """The images of several sources, in the order of the sources.

    Classes are joined by name: `classes` are all names, sorted, numbers by their value. Images of a source without
    labels have none.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)
        self._ends = np.cumsum([len(part) for part in self.parts])
        named = [list(getattr(part, "classes", [])) for part in self.parts]
        self.classes = named[0] if all(names == named[0] for names in named) else _sorted(set().union(*named))
        self.num_classes = len(self.classes)
        self._labels = [[self.classes.index(name) for name in names] for names in named]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def data(self, index: int) -> bytes:
        part, own = self._place(index)
        return self.parts[part].data(own)

    def open(self, index: int) -> Encoded:
        part, own = self._place(index)
        return self.parts[part].open(own)

    def read(self, index: int) -> Any:
        part, own = self._place(index)
        return self.parts[part].read(own)

    def label(self, index: int) -> int:
        part, own = self._place(index)
        label = self.parts[part].label(own)
        return UNLABELLED if label < 0 else self._labels[part][label]

    def name_of(self, index: int) -> str:
        part, own = self._place(index)
        return self.parts[part].name_of(own)

    def identity(self) -> dict[str, Any]:
        """See `identity_of`: the same wherever each of the places lies."""
        names = "\0".join(identity_of(part)["names"] for part in self.parts)
        return {"images": len(self), "names": hashlib.sha256(names.encode()).hexdigest()}

    @property
    def summary(self) -> str:
        """How many images each place has, for the head of the log."""
        counts = " + ".join(str(len(part)) for part in self.parts)
        classes = f", {self.num_classes} classes in all" if self.num_classes else ""
        return f"{counts} images from {len(self.parts)} places{classes}"

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must lie in 0..{len(self) - 1}, got {index}")
        part = int(np.searchsorted(self._ends, index, side="right"))
        return part, index - (int(self._ends[part - 1]) if part else 0)


def _sorted(names: set[str]) -> list[str]:
    numbers = all(name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name) if numbers else 0, name))


def check_apart(roots: Sequence[str]) -> None:
    """Raises UsageError where one place is another one, or lies in it: its images would count twice."""
    real = [os.path.realpath(root) for root in roots]
    for i, inner in enumerate(real):
        for k, outer in enumerate(real):
            if i != k and (inner == outer or inner.startswith(outer.rstrip("/") + "/")):
                how = "is named twice" if inner == outer else f"lies in {roots[k]!r}"
                raise UsageError(f"data.root: {roots[i]!r} {how}, so its images would come twice; leave one out")
