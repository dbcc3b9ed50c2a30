"""The two parts of a folder of labelled images, one to train on and one to measure on: found, read and told of.

Evaluation and transfer read such folders through here. The options are theirs, under ``data.``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from scrl_fast.config.validation import clean_path
from scrl_fast.data.image_files import DEFAULT_LIMITS, ImageLimits, printable
from scrl_fast.data.sources.annotated import AnnotatedImages, Objects, concatenate
from scrl_fast.data.sources.coco_layout import coco_split
from scrl_fast.data.sources.labelled_folder import find_labelled
from scrl_fast.data.sources.layout import LabelledFolder, LabelledSplit
from scrl_fast.data.sources.shared_images import shared_images
from scrl_fast.errors import UsageError, did_you_mean

Chosen = dict[str, list[LabelledSplit]]
MAX_LISTED_CLASSES = 20
"""Classes that a line of the log names."""


@dataclass(frozen=True)
class LabelledChoice:
    """What is taken of a folder. Errors name the field as an option: ``data.train``."""

    root: str
    train: str = ""
    """The part to train on: its name, several joined by +, or FILE.json:FOLDER; empty: found by its name."""
    val: str = ""
    """The part to measure on, likewise; empty: found by its name, or split off."""
    layout: str = "auto"
    """yolo, coco, voc, or auto."""
    classes: Sequence[str] = ()
    """Classes by label; objects of others are left out. Empty: all."""
    val_share: float = 0.2
    """Share of the training images that is split off where there is no part to measure on."""
    val_seed: int = 0
    """Which images that share has."""
    limits: ImageLimits = DEFAULT_LIMITS
    val_option: str = "val"
    """What the option of ``val`` is called."""
    trained: str = "the detector"
    """What the result is about, in a note on images that are in both parts."""


@dataclass(frozen=True)
class LabelledParts:
    """Images to train on and to measure on. found: lines that say what was found."""

    train: AnnotatedImages
    val: AnnotatedImages
    val_name: str
    found: list[str]


def read_parts(choice: LabelledChoice) -> LabelledParts:
    """Both parts of a folder of labelled images. Raises UsageError naming the folder, the file or the option."""
    folder, chosen = _named_files(choice) or _found(choice)
    classes = _class_names(folder, choice.classes)
    read = {role: _read(splits, classes, choice.limits) for role, splits in chosen.items()}
    read = {role: _select(source, choice.classes) for role, source in read.items()}
    names = {role: "+".join(split.name for split in splits) for role, splits in chosen.items()}
    notes = list(folder.notes)
    if "val" in read:
        train, val = read["train"], read["val"]
        notes += shared_images(train, val, content=True, trained=choice.trained)
        if not choice.val and all(split.role == "test" for split in chosen["val"]):
            notes.append(f"no part is called val: {names['val']} is measured on")
    else:
        train, val = split_off(read["train"], choice.val_share, choice.val_seed)
        names["val"] = f"a part split off {names['train']}"
        notes.append(
            f"no part to validate on: {len(val)} of {len(read['train'])} images are split off "
            f"(--data.val_share={choice.val_share:g} --data.val_seed={choice.val_seed}) and not trained on"
        )
    found = [
        f"{folder.origin}: {folder.kind}, {len(train.classes)} classes: {_listed(train.classes)}",
        f"to train on: {names['train']}: {summary(train)}",
        f"to measure on: {names['val']}: {summary(val)}",
    ]
    used = {split.name for splits in chosen.values() for split in splits}
    if unused := [split for split in folder.splits if split.name not in used]:
        held_out = next((split.name for split in unused if split.role in ("val", "test")), "")
        hint = f" (--data.{choice.val_option}={held_out} measures on it)" if held_out else ""
        notes.append(f"not used: {', '.join(split.name for split in unused)}{hint}")
    return LabelledParts(train, val, names["val"], found + [printable(note) for note in notes])


# ---- which parts ----


def _named_files(choice: LabelledChoice) -> tuple[LabelledFolder, Chosen] | None:
    """The files that data.train and data.val name, None where they name none."""
    if not any(".json" in name for name in (choice.train, choice.val)):
        return None
    if not choice.train:
        option = f"data.{choice.val_option}"
        raise UsageError(f"{option}={choice.val}: names a file, so data.train must name one, too: FILE.json:FOLDER")
    splits = {role: _file_split(choice, role) for role in ("train", "val")}
    chosen = {role: [split] for role, split in splits.items() if split is not None}
    files = [split for (split,) in chosen.values()]
    return LabelledFolder("COCO", ", ".join(split.where for split in files), tuple(files)), chosen


def _file_split(choice: LabelledChoice, role: str) -> LabelledSplit | None:
    """FILE.json or FILE.json:FOLDER, relative to where we are or to data.root."""
    option, value = _option(choice, role)
    if not value:
        return None
    file, colon, images = value.partition(".json:")
    paths = []
    for path in (f"{file}.json" if colon else value, images):
        path = clean_path(path)
        under_root = os.path.join(choice.root, path)
        paths.append(under_root if path and not os.path.exists(path) and os.path.exists(under_root) else path)
    file, images = paths
    if not file.endswith(".json"):
        raise UsageError(
            f"{option}={value}: expected FILE.json:FOLDER, as in the other of data.train and data.{choice.val_option}"
        )
    if not os.path.isfile(file):
        raise UsageError(f"{option}={value}: there is no file {file}")
    if images and not os.path.isdir(images):
        raise UsageError(f"{option}={value}: there is no folder {images}")
    return coco_split(file, images)


def _option(choice: LabelledChoice, role: str) -> tuple[str, str]:
    """Name and value of the option for the part to train on, or to measure on."""
    return ("data.train", choice.train) if role == "train" else (f"data.{choice.val_option}", choice.val)


def _found(choice: LabelledChoice) -> tuple[LabelledFolder, Chosen]:
    """What data.root holds, and of it the splits to train on, and those to measure on where there are any."""
    folder = find_labelled(choice.root, choice.layout)
    options = {role: _option(choice, role) for role in ("train", "val")}
    chosen = {role: _asked(folder, *option) for role, option in options.items() if option[1]}
    measured_option, measured = options["val"]
    if not measured:
        found = _by_role(folder, "val", measured_option) or _by_role(folder, "test", measured_option)
        if found and found not in chosen.get("train", []) and len(folder.splits) > 1:
            chosen["val"] = [found]
    if "train" not in chosen:
        found = _by_role(folder, "train", "data.train") or (folder.splits[0] if len(folder.splits) == 1 else None)
        if found is None:
            named = ", ".join(split.name for split in folder.splits)
            raise UsageError(f"{folder.origin}: none of its parts is called train: name one of {named} by --data.train")
        chosen["train"] = [found]
    if chosen.get("val") == chosen["train"]:
        raise UsageError(f"{measured_option}={measured}: is what is trained on; left empty, a part of it is split off")
    return folder, chosen


def _asked(folder: LabelledFolder, option: str, value: str) -> list[LabelledSplit]:
    by_name = {split.name: split for split in folder.splits}
    if value in by_name:
        return [by_name[value]]
    names = value.split("+")
    for name in names:
        if name not in by_name:
            known = did_you_mean(name, by_name) or f"; there are: {', '.join(by_name)}"
            raise UsageError(f"{option}={value}: {folder.origin} has no part {name!r}{known}")
    return [by_name[name] for name in names]


def _by_role(folder: LabelledFolder, role: str, option: str) -> LabelledSplit | None:
    """The split of this role; of VOC's train and trainval the second where nothing else would be validated on."""
    splits = [split for split in folder.splits if split.role == role]
    if len(splits) < 2:
        return splits[0] if splits else None
    by_name = {split.name: split for split in splits}
    validated = any(split.role == "val" for split in folder.splits)
    order = ("train", "trainval") if validated else ("trainval", "train")
    for name in (*order, "val", "valid", "test"):
        if name in by_name:
            return by_name[name]
    raise UsageError(f"{folder.origin}: several parts may be meant, name one by --{option}: {', '.join(by_name)}")


def split_off(source: AnnotatedImages, share: float, seed: int) -> tuple[AnnotatedImages, AnnotatedImages]:
    """Two parts of the images, drawn by seed; the second has the share, at least one image.

    Copies that Roboflow made of one picture (``NAME.rf.HASH.jpg``) stay in one part.
    Raises UsageError where there are not two pictures.
    """
    pictures = [objects.file_name.partition(".rf.")[0] for objects in source.objects]
    order = sorted(set(pictures))
    if len(order) < 2:
        raise UsageError(f"{source.annotation_file}: {len(order)} pictures cannot be split into two parts")
    drawn = np.random.default_rng([seed, len(order)]).permutation(len(order))
    count = min(max(1, round(share * len(order))), len(order) - 1)
    measured = {order[place] for place in drawn[:count]}
    parts: tuple[list[Objects], list[Objects]] = [], []
    for objects, picture in zip(source.objects, pictures, strict=True):
        parts[picture in measured].append(objects)
    return source.with_objects(parts[0]), source.with_objects(parts[1], notes=())  # those of all are said once


# ---- classes ----


def _class_names(folder: LabelledFolder, classes: Sequence[str]) -> Sequence[str]:
    """Names by label for the splits of a folder; data.classes names those that have no name."""
    if not folder.nameless or not classes:
        return folder.classes
    if len(classes) < len(folder.classes):
        raise UsageError(
            f"data.classes={list(classes)}: names {len(classes)} classes, {folder.origin} has {len(folder.classes)}"
        )
    return classes


def _read(splits: Sequence[LabelledSplit], classes: Sequence[str], limits: ImageLimits) -> AnnotatedImages:
    parts = [split.read(classes, limits) for split in splits]
    for part in parts[1:]:
        if (part.classes, part.category_ids) != (parts[0].classes, parts[0].category_ids):
            raise UsageError(f"the categories of {parts[0].annotation_file} and {part.annotation_file} differ")
    return parts[0] if len(parts) == 1 else concatenate(parts)


def _select(source: AnnotatedImages, classes: Sequence[str]) -> AnnotatedImages:
    """The same images with the objects of these classes alone, numbered in this order; () keeps all as they are."""
    if not classes or list(classes) == source.classes:
        return source
    for name in classes:
        if name not in source.classes:
            known = did_you_mean(name, source.classes) or f"; there are: {_listed(source.classes)}"
            raise UsageError(f"data.classes: {source.annotation_file} has no class {name!r}{known}")
        if source.classes.count(name) > 1:
            raise UsageError(f"data.classes: {source.annotation_file} has several classes {name!r}")
    places = [source.classes.index(name) for name in classes]
    new_label = np.full(len(source.classes), -1)
    new_label[places] = range(len(places))

    def relabelled(objects: Objects) -> Objects:
        kept = objects[new_label[objects.labels] >= 0]
        return replace(kept, labels=new_label[kept.labels])

    objects = [relabelled(each) for each in source.objects]
    lost = sum(map(len, source.objects)) - sum(map(len, objects))
    note = f"{source.annotation_file}: {lost} objects are of other classes than data.classes"
    ids = [source.category_ids[place] for place in places]
    return source.with_objects(objects, classes=classes, category_ids=ids, notes=[*source.notes, note])


# ---- what is said ----


def summary(source: AnnotatedImages) -> str:
    """Images, boxes and boxes of each class, in words."""
    counts = np.zeros(len(source.classes), np.int64)
    for objects in source.objects:
        np.add.at(counts, objects.labels, 1)
    bare = sum(not len(objects) for objects in source.objects)
    order = np.argsort(-counts, kind="stable") if len(counts) > MAX_LISTED_CLASSES else np.arange(len(counts))
    named = [f"{source.classes[label]} {counts[label]:,}" for label in order.tolist() if counts[label]]
    lacking = [source.classes[label] for label in np.flatnonzero(counts == 0).tolist()]
    none = f"; none of {_listed(lacking)}" if lacking else ""
    without = f"; {bare:,} images without boxes" if bare else ""
    return f"{len(source):,} images, {counts.sum():,} boxes ({_listed(named)}{none}){without}"


def _listed(names: Sequence[str]) -> str:
    more = f", ... {len(names) - MAX_LISTED_CLASSES} more" if len(names) > MAX_LISTED_CLASSES else ""
    return printable(", ".join(names[:MAX_LISTED_CLASSES])) + more
