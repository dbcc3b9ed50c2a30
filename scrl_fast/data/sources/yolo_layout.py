"""Where a YOLO data set has its images: as its ``data.yaml`` says, else by the usual names of folders."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scrl_fast.config.yaml_text import read_yaml, shortened
from scrl_fast.data.image_files import ImageLimits
from scrl_fast.data.sources.annotated import AnnotatedImages
from scrl_fast.data.sources.annotation_files import MOST_CLASSES, check_class_names, foreign_content, read_annotations
from scrl_fast.data.sources.files import image_folder, image_list
from scrl_fast.data.sources.layout import LabelledFolder, LabelledSplit, child, files_in, images_in, role_of, subfolders
from scrl_fast.data.sources.yolo import count_classes, is_label_file, read_yolo
from scrl_fast.errors import UsageError

SPLIT_KEYS = ("train", "val", "valid", "validation", "test")
_NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels", "labels.txt")
_LARGEST_NAMES = 1 << 20  # bytes


def find_yolo(root: str) -> LabelledFolder | None:
    """The splits of a YOLO data set, None where the folder is none.

    Raises UsageError for a ``data.yaml`` that names folders which are not there, or no classes.
    """
    if found := _yaml_of(root):
        return _from_yaml(root, *found)
    folders = _usual_folders(root)
    if not folders:
        return None
    names = _names_beside([root, os.path.join(root, "labels"), *folders.values()])
    nameless = not names
    notes = check_class_names(root, names)
    if nameless:
        count = max(count_classes(root, images_of(root, [folder])) for folder in folders.values())
        names = [f"class {label}" for label in range(max(1, count))]
    splits = [_split(root, name, [folder], 0) for name, folder in folders.items()]
    if nameless:
        notes.append("no file names the classes (data.yaml or classes.txt): they are numbered")
    return LabelledFolder("YOLO", root, tuple(splits), tuple(names), tuple(notes), nameless)


def _split(root: str, name: str, places: Sequence[str], keypoint_fields: int) -> LabelledSplit:
    where = " + ".join(places)

    def read(classes: Sequence[str], limits: ImageLimits) -> AnnotatedImages:
        images = images_of(root, places)
        return read_yolo(root, images, classes, origin=where, keypoint_fields=keypoint_fields, limits=limits)

    return LabelledSplit(name, where, read)


def images_of(root: str, places: Sequence[str]) -> list[str]:
    """The images of folders and lists, sorted, as paths relative to root."""
    paths = []
    for place in places:
        source = image_folder(place) if os.path.isdir(place) else image_list(place)
        paths += [os.path.relpath(source.name_of(index), root) for index in range(len(source))]
    return sorted(set(paths))


# ---- data.yaml ----


def _yaml_of(root: str) -> tuple[str, dict[str, Any]] | None:
    """The file that names classes and splits, and its content."""
    names = sorted(
        files_in(root, ".yaml", ".yml"), key=lambda name: (name.lower() not in ("data.yaml", "data.yml"), name)
    )
    found = []
    for name in names:
        content = _read(os.path.join(root, name))
        if content and ("names" in content or "nc" in content) and set(SPLIT_KEYS) & set(content):
            found.append((os.path.join(root, name), content))
    if len(found) > 1 and os.path.basename(found[0][0]).lower() not in ("data.yaml", "data.yml"):
        raise UsageError(f"several files name YOLO's splits and classes: {', '.join(path for path, _ in found[:5])}")
    return found[0] if found else None


def _read(path: str) -> dict[str, Any] | None:
    """The content of a YAML file of another kind is not read as an error of this one, unless it is data.yaml."""
    try:
        content = read_yaml(Path(path))
    except (UsageError, OSError) as error:
        if os.path.basename(path).lower() not in ("data.yaml", "data.yml"):
            return None
        raise error if isinstance(error, UsageError) else UsageError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) and os.path.basename(path).lower() in ("data.yaml", "data.yml"):
        raise UsageError(f"{path} is no table of names and folders, but {shortened(content)}")
    return content if isinstance(content, dict) else None


def _from_yaml(root: str, file: str, content: dict[str, Any]) -> LabelledFolder:
    names = _class_names(file, content)
    bases = _bases(root, content)
    keypoints = _keypoint_fields(file, content)
    splits, notes = [], check_class_names(file, names)
    for key in SPLIT_KEYS:
        entries = content.get(key)
        if not entries:
            continue
        entries = [entries] if isinstance(entries, str) else entries
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise UsageError(f"{file}: {key} is {shortened(entries)}, expected a folder, a list of images, or several")
        places = [_place(bases, entry) for entry in entries]
        lost = [entry for entry, place in zip(entries, places, strict=True) if not place]
        if lost and key == "train":
            looked = ", ".join(os.path.join(base, lost[0]) for base in bases)
            raise UsageError(f"{file}: its {key} {lost[0]!r} is not there or holds no images; looked for {looked}")
        if lost:  # exports name the usual parts whether they have them or not
            notes.append(f"{file}: its {key} {lost[0]!r} is not there or holds no images")
            continue
        splits.append(_split(root, key, places, keypoints))
    named = " + ".join(split.where for split in splits)
    for name, folder in _split_folders(root).items():  # exports often leave test/ out of the file
        if role_of(name) == "test" and folder not in named:
            splits.append(_split(root, name, [folder], keypoints))
    if keypoints:
        notes.append(f"{file} describes poses (kpt_shape): boxes are read, keypoints are not")
    return LabelledFolder("YOLO", file, tuple(splits), tuple(names), tuple(notes))


def _class_names(file: str, content: Mapping[str, Any]) -> list[str]:
    names, count = content.get("names"), _quoted_number(content.get("nc"))
    if count is not None and (type(count) is not int or not 0 < count <= MOST_CLASSES):
        raise UsageError(f"{file}: nc is {shortened(count)}, expected the number of classes, at most {MOST_CLASSES}")
    if isinstance(names, dict):
        given, names = names, {_quoted_number(label): name for label, name in names.items()}
        if (
            not names
            or len(names) < len(given)
            or not all(type(label) is int and 0 <= label < MOST_CLASSES for label in names)
        ):
            raise UsageError(f"{file}: names holds {shortened(given)}, expected the number of each class and its name")
        if max(names) >= 2 * len(names):
            raise UsageError(f"{file}: names has {len(names)} names for the classes 0 to {max(names)}")
        names = [names.get(label, f"class {label}") for label in range(max(names) + 1)]
    if names is None and count is not None:
        names = [f"class {label}" for label in range(count)]
    if not isinstance(names, list) or not names or not all(type(name) in (str, int, float) for name in names):
        said = "; words such as no and null stand for other values there unless they are in quotes"
        raise UsageError(f"{file}: names is {shortened(names)}, expected a list of the classes' names{said}")
    if count is not None and count != len(names):
        raise UsageError(f"{file}: nc is {count}, but names holds {len(names)} classes")
    return [str(name) for name in names]


def _quoted_number(value: Any) -> Any:
    """A whole number that stands in quotes, as some programs write it, as a number; anything else as it is."""
    return int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 9 else value


def _keypoint_fields(file: str, content: Mapping[str, Any]) -> int:
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(type(side) is int and 0 < side < 1000 for side in shape)
    ):
        raise UsageError(f"{file}: kpt_shape is {shortened(shape)}, expected the number of points and of their fields")
    return shape[0] * shape[1]


def _bases(root: str, content: Mapping[str, Any]) -> list[str]:
    """The folders that entries may be relative to: ``path:`` first, then the file's own."""
    path = content.get("path")
    bases = [os.path.join(root, os.path.expanduser(path)), root] if isinstance(path, str) and path else [root]
    return [os.path.normpath(base) for base in dict.fromkeys(bases)]


def _place(bases: Sequence[str], entry: str) -> str:
    """The folder or list of images that an entry means; '' where none is there.

    Exports write ``../train/images`` for ``train/images`` beside the file, and a split's folder for its ``images``.
    """
    entry = entry.strip().replace("\\", "/")
    bare = entry
    while bare.startswith(("../", "./")):
        bare = bare.partition("/")[2]
    for base in bases:
        for spelled in dict.fromkeys((entry, bare)):
            place = os.path.normpath(os.path.join(base, os.path.expanduser(spelled)))
            if os.path.isfile(place):
                return place
            if os.path.isdir(place) and not images_in(place):
                place = child(place, "images") or place
            if _holds_images(place):
                return place
    return ""


# ---- without data.yaml ----


def _usual_folders(root: str) -> dict[str, str]:
    """The folder of images of each split: images/SPLIT beside labels/SPLIT, SPLIT/images beside SPLIT/labels, or both
    in one folder."""
    images, labels = child(root, "images"), child(root, "labels")
    if images and labels and _has_labels(labels):
        parts = {
            name: os.path.join(images, name) for name in subfolders(images) if _holds_images(os.path.join(images, name))
        }
        if parts and not images_in(images):
            return parts
        return {"images": images}
    parts = _split_folders(root)
    if not parts and _are_labelled(root, root):
        parts["images"] = root
    return parts


def _split_folders(root: str) -> dict[str, str]:
    """SPLIT/images beside SPLIT/labels, or images and label files in SPLIT itself."""
    parts = {}
    for name in subfolders(root):
        folder = os.path.join(root, name)
        inner = child(folder, "images")
        if inner and _has_labels(child(folder, "labels")):
            parts[name] = inner
        elif role_of(name) and (_are_labelled(folder, folder) or _are_labelled(folder, child(folder, "labels"))):
            parts[name] = folder
    return parts


def _holds_images(folder: str, depth: int = 3) -> bool:
    """Whether images lie in a folder or a few levels below; a link back up would never end."""
    if images_in(folder) or not depth:
        return bool(images_in(folder))
    return any(_holds_images(os.path.join(folder, inner), depth - 1) for inner in subfolders(folder))


def _has_labels(folder: str) -> bool:
    """Whether label files lie in a folder or in one of its sub-folders."""
    return bool(folder) and any(
        _label_files(place) for place in (folder, *(os.path.join(folder, name) for name in subfolders(folder)))
    )


def _are_labelled(images: str, labels: str) -> bool:
    """Whether an image in the first folder has a label file in the second."""
    stems = {os.path.splitext(name)[0] for name in images_in(images)}
    return any(os.path.splitext(name)[0] in stems for name in _label_files(labels))


def _label_files(folder: str) -> list[str]:
    return [name for name in files_in(folder, ".txt") if is_label_file(name)] if folder else []


def _names_beside(folders: Sequence[str]) -> list[str]:
    """Names of the classes from the first file that holds one a line."""
    for folder in dict.fromkeys(folders):
        for name in _NAME_FILES:
            path = os.path.join(folder, name)
            if os.path.isfile(path) or os.path.islink(path):
                content = read_annotations(path, _LARGEST_NAMES)
                if kind := foreign_content(content):
                    raise UsageError(f"{path} holds no names of classes: it is {kind}")
                lines = content.decode("utf-8-sig", "replace").splitlines()
                if names := [line.strip() for line in lines if line.strip()]:
                    return names
    return []
