"""Images in files: a tree of any depth, class folders, or a list of paths.

The order is that of the sorted paths, so that a number means the same image on every machine with the same files.
"""

from __future__ import annotations

import codecs
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from scrl_fast.config.yaml_text import shortened
from scrl_fast.data.decode import EXTENSIONS
from scrl_fast.data.image_files import DEFAULT_LIMITS, BadImage, ImageLimits, printable, read_file
from scrl_fast.data.sources.base import UNLABELLED, EncodedImages, identity_of_names
from scrl_fast.errors import UsageError

_LARGEST_LIST = 1 << 30  # bytes: ten million paths
_MAX_LISTED = 5
_log = logging.getLogger("scrl_fast")


class ImageFiles(EncodedImages):
    """Images by path. paths: relative to root (or absolute). labels: one class per path, or None.

    `classes` are the names of the classes, empty where there are no labels. `summary` says what was found.
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
        self.summary = self._summary()

    def __len__(self) -> int:
        return len(self.paths)

    def label(self, index: int) -> int:
        return UNLABELLED if self.labels is None else int(self.labels[index])

    def name_of(self, index: int) -> str:
        return os.path.join(self.root, self.paths[index])

    def identity(self) -> dict[str, Any]:
        return identity_of_names(self.paths)

    def _summary(self) -> str:
        if self.labels is None:
            return ""
        counts = np.bincount(self.labels, minlength=len(self.classes))
        named = [f"{printable(name)} ({count})" for name, count in zip(self.classes, counts, strict=True)]
        shown = ", ".join(named if len(named) <= 12 else [*named[:6], "...", *named[-3:]])
        return f"{len(self.paths)} images in {len(self.classes)} classes: {shown}"


def image_folder(root: str, *, limits: ImageLimits = DEFAULT_LIMITS) -> ImageFiles:
    """Every image below root, at any depth, unlabelled. Raises UsageError if there is none."""
    _check_folder(root)
    tree = _Tree()
    paths = sorted(tree.images_below(root))
    tree.tell()
    if not paths:
        raise UsageError(tree.nothing_found(root))
    return ImageFiles(root, paths, limits=limits)


def class_folders(root: str, *, limits: ImageLimits = DEFAULT_LIMITS, train_split: bool = False) -> ImageFiles:
    """Images in one folder per class; a class is numbered by its place among the sorted folder names.

    train_split: use root/train if there is one (the layout of ImageNet).
    A warning names images that lie outside of the class folders, classes without images, folders that cannot be listed.
    Raises UsageError if there are no class folders or no images in them.
    """
    _check_folder(root)
    if train_split and os.path.isdir(os.path.join(root, "train")):
        root = os.path.join(root, "train")
    tree = _Tree()
    classes, loose = _classes_of(root)
    if not classes:
        inside = len(loose) or sum(1 for _ in tree.images_below(root))
        if inside:
            raise UsageError(
                f"{root!r} holds {inside} images but no class folders; "
                "--data.source=folder takes images without classes"
            )
        raise UsageError(f"no class folders in {root!r}; " + tree.nothing_found(root))
    found = [
        (os.path.join(name, path), label)
        for label, name in enumerate(classes)
        for path in sorted(tree.images_below(os.path.join(root, name)))
    ]
    tree.tell()
    if not found:
        raise UsageError(tree.nothing_found(root))
    paths, labels = zip(*found, strict=True)
    if loose:
        _log.warning("%d images lie outside of the class folders of %s and are left out: %s", *_named(loose, root))
    filled = set(labels)
    if empty := [name for label, name in enumerate(classes) if label not in filled]:
        _log.warning("%d of the class folders of %s hold no images: %s", *_named(empty, root))
    return ImageFiles(root, paths, limits=limits, labels=labels, classes=classes)


def _classes_of(root: str) -> tuple[list[str], list[str]]:
    """Names of the class folders, and of the images beside them."""
    with os.scandir(root) as entries:
        visible = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    folders = sorted(name for name, is_folder in visible if is_folder)
    return folders, sorted(name for name, is_folder in visible if not is_folder and _is_image(name))


def image_list(root: str, *, limits: ImageLimits = DEFAULT_LIMITS) -> ImageFiles:
    """The images named in the text file root: one path a line, relative to the file's folder; # starts a comment line.

    A path may be written as in a shell: `~`, `./`, `$HOME`, in quotes, with blanks behind it or the line ends of DOS.
    Raises UsageError for an empty list and one that names missing files.
    """
    if not root:
        raise UsageError("data.source=list needs the list: --data.root=FILE with one path a line")
    if os.path.isdir(root):
        raise UsageError(
            f"data.root={root!r} is a folder; data.source=list needs a text file (or use data.source=folder)"
        )
    if not os.path.exists(root):
        raise UsageError(f"data.root={root!r} does not exist")
    folder = os.path.dirname(os.path.abspath(root))
    lines = [line for line in _lines_of(root) if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise UsageError(f"the list {root!r} names no images")
    paths = [_path_of(line, folder) for line in lines]
    missing = [line.strip() for line, path in zip(lines, paths, strict=True) if path is None]
    if missing:
        before, _, _ = missing[0].rpartition(" ")
        labelled = bool(before) and os.path.exists(os.path.join(folder, before))
        hint = "; a label behind the path is not read, data.source=imagefolder takes labels" if labelled else ""
        first = shortened(repr(missing[0]), 300)
        raise UsageError(
            f"the list {root!r} names {len(missing)} files that do not exist, the first being {first} "
            f"(paths are taken relative to {folder!r}){hint}"
        )
    return ImageFiles(folder, [path for path in paths if path is not None], limits=limits)


def _lines_of(root: str) -> list[str]:
    """The lines of a list, whichever way they end; bytes that are no UTF-8 are kept, as in the names of files."""
    try:
        data = read_file(root, limit=_LARGEST_LIST)
    except BadImage as bad:
        raise UsageError(f"data.root={root!r} cannot be read: {bad.cause}") from None
    try:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # as Windows' shell writes a list
            text = data.decode("utf-16")
        else:
            text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UsageError(f"data.root={root!r} is not a text file of paths")
    return text.replace("\r\n", "\n").split("\n" if "\n" in text else "\r")


def _path_of(line: str, folder: str) -> str | None:
    """The path in a line, as it stands or as a shell would have read it; None when no such file exists."""
    bare = line.strip()
    plain = bare[1:-1] if len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "\"'" else bare
    for path in (bare, line, plain, os.path.expanduser(plain), os.path.expandvars(plain), plain.replace("\\", "/")):
        if os.path.exists(
            os.path.join(folder, path)
        ):  # a pipe or a folder, too: the loader says that it is a bad image
            return path.removeprefix("./") or path
    return None


def _check_folder(root: str) -> None:
    if not root:
        raise UsageError("data.root is empty: name the folder of your images, --data.root=DIR")
    if os.path.isfile(root):
        raise UsageError(f"data.root={root!r} is a file, not a folder (a text file of paths: --data.source=list)")
    if not os.path.isdir(root):
        raise UsageError(f"data.root={root!r} does not exist")
    if not os.access(root, os.R_OK | os.X_OK):
        raise UsageError(f"data.root={root!r} may not be read")


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _named(names: Sequence[str], root: str) -> tuple[int, str, str]:
    more = ", ..." if len(names) > _MAX_LISTED else ""
    return len(names), printable(root), printable(", ".join(names[:_MAX_LISTED])) + more


class _Tree:
    """Walks through folders. `others` counts every other file by its extension; `unread` says which folders failed."""

    def __init__(self) -> None:
        self.others: Counter[str] = Counter()
        self.unread: list[str] = []

    def images_below(self, top: str) -> Iterator[str]:
        """Paths of the images below top, relative to it; hidden files and folders are left out, links followed once."""
        visited = set()
        for folder, subfolders, names in os.walk(top, followlinks=True, onerror=self._failed):
            real = os.path.realpath(folder)
            if real in visited:  # a link back up would never end
                subfolders.clear()
                continue
            visited.add(real)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            inner = os.path.relpath(folder, top)
            for name in names:
                if name.startswith("."):
                    continue
                if _is_image(name):
                    yield name if inner == "." else os.path.join(inner, name)
                else:
                    self.others[os.path.splitext(name)[1].lower() or "no extension"] += 1

    def tell(self) -> None:
        """Warn of folders that could not be listed: their images are missing from the data."""
        if self.unread:
            more = ", ..." if len(self.unread) > _MAX_LISTED else ""
            named = printable(", ".join(self.unread[:_MAX_LISTED]))
            _log.warning("%d folders cannot be listed, their images are left out: %s%s", len(self.unread), named, more)

    def nothing_found(self, root: str) -> str:
        looked = f"no images below {root!r}: looked for {', '.join(EXTENSIONS)} at any depth"
        if self.unread:
            return f"{looked}; {len(self.unread)} folders cannot be listed, the first: {printable(self.unread[0])}"
        if not self.others:
            return f"{looked} and found no files at all"
        kinds = ", ".join(f"{count} x {printable(extension)}" for extension, count in self.others.most_common(5))
        return f"{looked} and found {sum(self.others.values())} other files ({kinds})"

    def _failed(self, error: OSError) -> None:
        self.unread.append(f"{error.filename} ({error.strerror})")
