"""A folder of images with labels, as it lies on disk: its parts (training, validation, test), found but not read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scrl_fast.data.decode import EXTENSIONS
from scrl_fast.data.image_files import ImageLimits, printable
from scrl_fast.data.sources.annotated import AnnotatedImages
from scrl_fast.errors import UsageError


@dataclass(frozen=True)
class LabelledSplit:
    """One part of a folder. read: its images, with labels by the place of their class in the names given."""

    name: str
    where: str
    """The folder or file that holds its labels or names its images."""
    read: Callable[[Sequence[str], ImageLimits], AnnotatedImages]

    @property
    def role(self) -> str:
        """train, val or test, as its name says; '' where it says nothing."""
        return role_of(self.name)


@dataclass(frozen=True)
class LabelledFolder:
    """What was found in a folder. classes: empty where the splits name their own (COCO)."""

    kind: str
    origin: str
    splits: tuple[LabelledSplit, ...]
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    nameless: bool = False
    """No file names the classes."""


def role_of(name: str) -> str:
    """train, val or test where a word of the name begins so (``train2017``, ``valid``), else ''."""
    for word in re.split(r"[^a-z]+", name.lower()):
        if word == "tr" or word.startswith("train"):
            return "train"
        if word == "dev" or word.startswith(("val", "eval")):
            return "val"
        if word.startswith("test"):
            return "test"
    return ""


def child(folder: str, *names: str) -> str:
    """The first sub-folder with one of these names, whatever its case; '' where there is none."""
    present = {name.lower(): name for name in reversed(subfolders(folder))}
    found = next((present[name.lower()] for name in names if name.lower() in present), "")
    return os.path.join(folder, found) if found else ""


def subfolders(folder: str) -> list[str]:
    """Names of the visible folders in a folder, sorted; none where it is missing."""
    return [name for name in visible(folder) if os.path.isdir(os.path.join(folder, name))]


def files_in(folder: str, *extensions: str) -> list[str]:
    """Names of the visible files in a folder that end so, sorted."""
    return [
        name
        for name in visible(folder)
        if name.lower().endswith(extensions) and not os.path.isdir(os.path.join(folder, name))
    ]


def images_in(folder: str) -> list[str]:
    """Names of the images that lie in a folder itself, sorted."""
    return files_in(folder, *EXTENSIONS)


def visible(folder: str) -> list[str]:
    """Names of what is in a folder and not hidden, sorted; none where it is missing."""
    if not os.path.isdir(folder):
        return []
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise UsageError(f"{printable(folder)} cannot be listed: {error.strerror or error}") from error
    return sorted(name for name in names if not name.startswith("."))
