"""Images in files: a tree of any depth, class folders, or a list of paths.

The order is that of the sorted paths, so that a number means the same image on every machine with the same files.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from scrl_fast.data.decode import EXTENSIONS
from scrl_fast.data.image_files import DEFAULT_LIMITS, ImageLimits, read_file
from scrl_fast.data.sources.base import UNLABELLED, EncodedImages
from scrl_fast.errors import UsageError


class ImageFiles(EncodedImages):
    """Images by path. paths: relative to root (or absolute). labels: one class per path, or None.

    `classes` are the names of the classes, empty where there are no labels.
    """

    def __init__(
        self,
        root: str,
        paths: Sequence[str],
        *,
        limits: ImageLimits = DEFAULT_LIMITS,
        labels: Sequence[int] | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        self.root, self.paths, self.classes = root, list(paths), list(classes)
        self.labels = None if labels is None else np.asarray(labels, np.int32)
        self.num_classes = len(self.classes)
        self.limits = limits

    def __len__(self) -> int:
        return len(self.paths)

    def data(self, index: int) -> bytes:
        return read_file(self.name_of(index), limit=self.limits.max_file_bytes)

    def label(self, index: int) -> int:
        return UNLABELLED if self.labels is None else int(self.labels[index])

    def name_of(self, index: int) -> str:
        return os.path.join(self.root, self.paths[index])


def image_folder(root: str, *, limits: ImageLimits = DEFAULT_LIMITS) -> ImageFiles:
    """Every image below root, at any depth, unlabelled. Raises UsageError if there is none."""
    _check_folder(root)
    seen: Counter[str] = Counter()
    paths = sorted(_images_below(root, seen))
    if not paths:
        raise UsageError(_nothing_found(root, seen))
    return ImageFiles(root, paths, limits=limits)


def class_folders(root: str, *, limits: ImageLimits = DEFAULT_LIMITS, train_split: bool = False) -> ImageFiles:
    """Images in one folder per class; a class is numbered by its place among the sorted folder names.

    train_split: use root/train if there is one (the layout of ImageNet).
    Raises UsageError if there are no class folders or no images in them.
    """
    _check_folder(root)
    if train_split and os.path.isdir(os.path.join(root, "train")):
        root = os.path.join(root, "train")
    seen: Counter[str] = Counter()
    with os.scandir(root) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        loose = sum(1 for _ in _images_below(root, seen))
        if loose:
            raise UsageError(
                f"{root!r} holds {loose} images but no class folders; --data.source=folder takes images without classes"
            )
        raise UsageError(f"no class folders in {root!r}; " + _nothing_found(root, seen))
    found = [
        (os.path.join(name, path), label)
        for label, name in enumerate(classes)
        for path in sorted(_images_below(os.path.join(root, name), seen))
    ]
    if not found:
        raise UsageError(_nothing_found(root, seen))
    paths, labels = zip(*found, strict=True)
    return ImageFiles(root, paths, limits=limits, labels=labels, classes=classes)


def image_list(root: str, *, limits: ImageLimits = DEFAULT_LIMITS) -> ImageFiles:
    """The images named in the text file root: one path a line, relative to the file's folder; # starts a comment line.

    Raises UsageError for an empty list and one that names missing files.
    """
    if not root:
        raise UsageError("data.source=list needs the list: --data.root=FILE with one path a line")
    if os.path.isdir(root):
        raise UsageError(
            f"data.root={root!r} is a folder; data.source=list needs a text file (or use data.source=folder)"
        )
    if not os.path.isfile(root):
        raise UsageError(f"data.root={root!r} does not exist")
    try:
        lines = [line.strip() for line in Path(root).read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise UsageError(f"data.root={root!r} is not a text file (UTF-8) of paths") from None
    folder = os.path.dirname(os.path.abspath(root))
    paths = [line for line in lines if line and not line.startswith("#")]
    if not paths:
        raise UsageError(f"the list {root!r} names no images")
    missing = [path for path in paths if not os.path.isfile(os.path.join(folder, path))]
    if missing:
        raise UsageError(
            f"the list {root!r} names {len(missing)} files that do not exist, the first being {missing[0]!r} "
            f"(paths are taken relative to {folder!r})"
        )
    return ImageFiles(folder, paths, limits=limits)


def _check_folder(root: str) -> None:
    if not root:
        raise UsageError("data.root is empty: name the folder of your images, --data.root=DIR")
    if os.path.isfile(root):
        raise UsageError(f"data.root={root!r} is a file, not a folder (a text file of paths: --data.source=list)")
    if not os.path.isdir(root):
        raise UsageError(f"data.root={root!r} does not exist")
    if not os.access(root, os.R_OK | os.X_OK):
        raise UsageError(f"data.root={root!r} may not be read")


def _images_below(top: str, seen: Counter[str]) -> Iterator[str]:
    """Paths of the images below top, relative to it. Hidden files and folders are left out; links are followed once.

    seen: counts every other file by its extension.
    """
    visited = set()
    for folder, subfolders, names in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link back up would never end
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        inner = os.path.relpath(folder, top)
        for name in names:
            extension = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if extension in EXTENSIONS:
                yield name if inner == "." else os.path.join(inner, name)
            else:
                seen[extension or "no extension"] += 1


def _nothing_found(root: str, seen: Counter[str]) -> str:
    looked = f"no images below {root!r}: looked for {', '.join(EXTENSIONS)} at any depth"
    if not seen:
        return f"{looked} and found no files at all"
    kinds = ", ".join(f"{count} x {extension}" for extension, count in seen.most_common(5))
    return f"{looked} and found {sum(seen.values())} other files ({kinds})"
