"""Where COCO's JSON files lie: in ``annotations/``, in the folder of their split, or beside the images."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from scrl_fast.data.image_files import DEFAULT_LIMITS, BadImage, ImageLimits, read_file
from scrl_fast.data.sources.annotated import AnnotatedImages
from scrl_fast.data.sources.coco import read_coco
from scrl_fast.data.sources.coco_document import PARTS, read_document
from scrl_fast.data.sources.layout import LabelledFolder, LabelledSplit, child, files_in, images_in, subfolders

_OTHER_KINDS = ("person_keypoints_", "captions_", "panoptic_", "image_info_", "stuff_")
_LARGEST_SIDE_FILE = 1 << 30  # bytes: a JSON file outside of annotations/ is looked into before it is taken as COCO's


def find_coco(root: str) -> LabelledFolder | None:
    """The splits of a data set in COCO's JSON, None where the folder is none."""
    official = child(root, "annotations")
    splits = []
    for name in files_in(official, ".json") if official else []:
        if not name.startswith(_OTHER_KINDS) and _is_coco(os.path.join(official, name)):
            splits.append(coco_split(os.path.join(official, name)))
    for folder in () if splits else (root, *(os.path.join(root, name) for name in subfolders(root))):
        files = [name for name in files_in(folder, ".json") if _is_coco(os.path.join(folder, name))]
        for name in files:
            stem = _stem(name)
            alone = len(files) == 1 and folder != root
            splits.append(coco_split(os.path.join(folder, name), name=os.path.basename(folder) if alone else stem))
    return LabelledFolder("COCO", root, tuple(splits)) if splits else None


def coco_split(file: str, images: str = "", *, name: str = "") -> LabelledSplit:
    """One JSON file and its images. images: their folder; '' for the likeliest beside the file."""
    folder = os.path.dirname(os.path.abspath(file))

    def read(_: Sequence[str], limits: ImageLimits) -> AnnotatedImages:
        there = images or _image_folder(file, _candidates(folder, _stem(file)))
        return read_coco(folder, annotation_file=file, image_folder=there, limits=limits)

    return LabelledSplit(name or _stem(file), file, read)


def _candidates(folder: str, split: str) -> list[str]:
    """Where the images of a file in this folder may lie, the likeliest first."""
    if os.path.basename(folder).lower() == "annotations":  # the official layout
        root = os.path.dirname(folder)
        images = child(root, "images")
        return [child(root, split), child(images, split) if images else "", images, root, folder]
    return [folder, child(folder, split), *(os.path.join(folder, name) for name in subfolders(folder))]


def _stem(file: str) -> str:
    """The name of a split in that of its file: ``instances_train2017.json``, ``_annotations.coco.json``."""
    stem = os.path.basename(file).removesuffix(".json").removesuffix(".coco")
    stem = stem.removeprefix("instances_").removeprefix("person_keypoints_")
    return re.sub(r"^_?annotations?[_.-]?", "", stem) or stem


def _image_folder(file: str, candidates: Sequence[str]) -> str:
    """The first folder that holds one of the file's images; else the first one with images, or the first of all."""
    present = [folder for folder in candidates if folder and os.path.isdir(folder)]
    names = [image.file_name.replace("\\", "/") for image in read_document(file, segmentations=False).images[:20]]
    for folder in present:
        if any(os.path.isfile(os.path.join(folder, name)) for name in names):
            return folder
    return next((folder for folder in present if images_in(folder)), present[0])


def _is_coco(file: str) -> bool:
    """Whether a JSON file has the three parts of COCO's, as far as a look at its text tells."""
    try:
        text = read_file(file, limit=max(_LARGEST_SIDE_FILE, DEFAULT_LIMITS.max_file_bytes), option="")
    except BadImage:
        return False
    return all(f'"{part}"'.encode() in text for part in PARTS)
