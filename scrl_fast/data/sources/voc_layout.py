"""Where VOC's XML files lie: in a devkit with lists, in a folder ``Annotations``, or beside the images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from scrl_fast.data.image_files import ImageLimits
from scrl_fast.data.sources.annotated import AnnotatedImages, concatenate
from scrl_fast.data.sources.annotation_files import check_class_names, read_annotations
from scrl_fast.data.sources.layout import LabelledFolder, LabelledSplit, child, files_in, images_in, subfolders
from scrl_fast.data.sources.voc import LARGEST_LIST, class_names, listed_names, read_voc_folder
from scrl_fast.errors import UsageError


class _Part(NamedTuple):
    """Some of the XML files of a folder. listing: the file that names them; None for all."""

    annotations: Path
    images: Path
    listing: Path | None

    def names(self) -> list[str]:
        """Of the XML files, without their extension."""
        if self.listing is not None:
            return listed_names(self.annotations, self.listing)
        return [os.path.splitext(name)[0] for name in files_in(str(self.annotations), ".xml")]

    def unlabelled(self) -> str:
        """Why nothing can be made of it, such as VOC's test images without annotations; '' where something can."""
        if self.listing is None:
            return ""
        if not read_annotations(self.listing, LARGEST_LIST).strip():
            return f"{self.listing} names no images"
        if any((self.annotations / f"{name}.xml").is_file() for name in self.names()):
            return ""
        return f"{self.listing}: none of its images has an XML file"

    @property
    def origin(self) -> str:
        """The list, or the folder of the XML files."""
        return str(self.listing or self.annotations)


def find_voc(root: str) -> LabelledFolder | None:
    """The splits of a data set in VOC's XML, None where the folder is none.

    The classes are those of all objects in its splits, sorted by name. Raises UsageError for a broken list or XML file.
    """
    parts = _all_parts(root)
    notes = [reason for group in parts.values() for part in group if (reason := part.unlabelled())]
    labelled = {name: [part for part in group if not part.unlabelled()] for name, group in parts.items()}
    labelled = {name: group for name, group in labelled.items() if group}
    if not labelled:
        if notes:
            raise UsageError(f"{root}: " + "; ".join(notes))
        return None
    every = [part for group in labelled.values() for part in group]
    found: set[str] = set()
    for place in {part.annotations for part in every}:
        names = {name for part in every if part.annotations == place for name in part.names()}
        found |= class_names(place, sorted(names))
    classes = sorted(found)
    notes += check_class_names(root, classes)
    splits = [_split(name, group) for name, group in labelled.items()]
    return LabelledFolder("VOC", root, tuple(splits), tuple(classes), tuple(notes))


def _all_parts(root: str) -> dict[str, list[_Part]]:
    """The parts of a folder itself, else of the folders in it, by the name of their split; several years have one."""
    if own := _parts_of(root):
        return {name or "all": [part] for name, part in own}
    devkit = child(root, "VOCdevkit") or root
    parts: dict[str, list[_Part]] = {}
    for inner in subfolders(devkit):
        for name, part in _parts_of(os.path.join(devkit, inner)):
            parts.setdefault(name or inner, []).append(part)
    return parts


def _parts_of(folder: str) -> list[tuple[str, _Part]]:
    """The parts of one folder by name, '' for the whole."""
    inner = child(folder, "Annotations")
    annotations = inner if inner and files_in(inner, ".xml") else folder
    if not files_in(annotations, ".xml"):
        return []
    images = child(folder, "JPEGImages", "images", "imgs") or (folder if images_in(folder) else "")
    if not images:
        return []
    lists = Path(folder, "ImageSets", "Main")
    stems = [Path(name).stem for name in files_in(str(lists), ".txt") if "_" not in name]
    if not stems:
        return [("", _Part(Path(annotations), Path(images), None))]
    return [(stem, _Part(Path(annotations), Path(images), lists / f"{stem}.txt")) for stem in stems]


def _split(name: str, parts: Sequence[_Part]) -> LabelledSplit:
    def read(classes: Sequence[str], limits: ImageLimits) -> AnnotatedImages:
        read_parts = [_read(part, classes, limits) for part in parts]
        return read_parts[0] if len(read_parts) == 1 else _numbered(concatenate(read_parts))

    return LabelledSplit(name, " + ".join(part.origin for part in parts), read)


def _read(part: _Part, classes: Sequence[str], limits: ImageLimits) -> AnnotatedImages:
    names = part.names()
    source = read_voc_folder(part.annotations, part.images, names, classes=classes, origin=part.origin, limits=limits)
    if part.listing is not None:
        return source
    annotated = {os.path.splitext(objects.file_name)[0] for objects in source.objects}
    bare = [name for name in images_in(str(part.images)) if os.path.splitext(name)[0] not in annotated]
    if not bare:
        return source
    note = f"{part.images}: {len(bare)} images have no XML file and are left out, such as {bare[0]}"
    return source.with_objects(source.objects, notes=[*source.notes, note])


def _numbered(source: AnnotatedImages) -> AnnotatedImages:
    """Two years may have images of one name."""
    ids = [objects.image_id for objects in source.objects]
    if len(set(ids)) == len(ids):
        return source
    return source.with_objects([replace(objects, image_id=objects.file_name) for objects in source.objects])
