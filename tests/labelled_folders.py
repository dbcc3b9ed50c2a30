"""Small folders of labelled images in the layouts that people have: one yellow square in each picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 40, 60
BOX = (12, 10, 36, 30)
"""x0, y0, x1, y1 of the square in every picture."""
LINE = "0 0.4 0.5 0.4 0.5\n"
"""The same in a YOLO file."""
NAMES = ["fish", "star fish"]


def picture(path: Path, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 90, (HEIGHT, WIDTH, 3), np.uint8)
    x0, y0, x1, y1 = BOX
    pixels[y0:y1, x0:x1] = (230, 220, 40)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def yolo_part(images: Path, labels: Path, count: int, text: str = LINE, first: int = 0) -> None:
    for n in range(first, first + count):
        picture(images / f"{n}.jpg", n)
        write(labels / f"{n}.txt", text)


def coco_file(path: Path, images: Path, count: int, first: int = 0, **box: object) -> Path:
    """A COCO file of so many pictures, which are drawn, too."""
    x0, y0, x1, y1 = BOX
    document: dict = {"images": [], "annotations": [], "categories": []}
    document["categories"] = [{"id": n, "name": name} for n, name in enumerate(NAMES, 3)]
    for n in range(first, first + count):
        picture(images / f"{n}.jpg", n)
        document["images"].append({"id": n, "file_name": f"{n}.jpg", "height": HEIGHT, "width": WIDTH})
        row = {"id": n + 1, "image_id": n, "category_id": 3, "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0}
        document["annotations"].append(row | box)
    return write(path, json.dumps(document))


def voc_part(images: Path, annotations: Path, names: list[str], box: tuple[int, ...] = BOX, size: bool = True) -> None:
    x0, y0, x1, y1 = box
    corners = f"<xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
    sides = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>" if size else ""
    for n, name in enumerate(names):
        picture(images / f"{name}.jpg", n)
        one = f"<object><name>{NAMES[n % 2]}</name><bndbox>{corners}</bndbox></object>"
        write(annotations / f"{name}.xml", f"<annotation>{sides}{one}</annotation>")
