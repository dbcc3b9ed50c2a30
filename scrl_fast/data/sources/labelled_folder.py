"""Finds how the labels in a folder are written: YOLO, COCO's JSON or VOC's XML."""

from __future__ import annotations

import os
from collections.abc import Callable

from scrl_fast.data.sources.coco_layout import find_coco
from scrl_fast.data.sources.layout import LabelledFolder, files_in, images_in, subfolders, visible
from scrl_fast.data.sources.voc_layout import find_voc
from scrl_fast.data.sources.yolo_layout import find_yolo
from scrl_fast.errors import UsageError

FINDERS: dict[str, Callable[[str], LabelledFolder | None]] = {"yolo": find_yolo, "coco": find_coco, "voc": find_voc}
"""In the order in which they are tried: a data.yaml says most."""
EXPECTED = (
    "expected YOLO (data.yaml, or images/ beside labels/, or SPLIT/images beside SPLIT/labels), COCO "
    "(annotations/instances_SPLIT.json and SPLIT/, or SPLIT/_annotations.coco.json beside the images) or VOC "
    "(Annotations/*.xml and JPEGImages/, or XML files beside the images)"
)


def find_labelled(root: str, layout: str = "auto") -> LabelledFolder:
    """The splits of a folder of labelled images.

    layout: yolo, coco or voc; auto: the first of them that the folder, or the only folder in it, turns out to be.
    Raises UsageError naming what the folder holds where it is none, or what is wrong with it.
    """
    if not os.path.isdir(root):
        raise UsageError(f"data.root={root!r} " + ("is no folder" if os.path.exists(root) else "does not exist"))
    finders = FINDERS if layout == "auto" else {layout: FINDERS[layout]}
    for folder in (root, *_only_folder(root)):
        for find in finders.values():
            if found := find(folder):
                return found
    wanted = EXPECTED if layout == "auto" else f"no data.layout={layout} data set; {EXPECTED}"
    raise UsageError(f"no labelled images in {root!r}, which holds {_content(root)}; {wanted}")


def _only_folder(root: str) -> list[str]:
    """An archive often unpacks to a folder in the folder."""
    inner = subfolders(root)
    return [os.path.join(root, inner[0])] if len(inner) == 1 and not images_in(root) else []


def _content(root: str) -> str:
    """The folder's content in a few words."""
    folders, images = subfolders(root), images_in(root)
    counts = {extension: len(files_in(root, extension)) for extension in (".txt", ".xml", ".json")}
    parts = [f"{len(images)} images"] if images else []
    parts += [f"{count} {extension} files" for extension, count in counts.items() if count]
    if folders:
        parts.append("the folders " + ", ".join(folders[:8]) + (", ..." if len(folders) > 8 else ""))
    return ", ".join(parts) or (f"{len(visible(root))} other files" if visible(root) else "nothing")
