"""Tiny data sets in the official layouts of COCO, VOC and ImageNet, drawn: squares, discs and bars on noise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = {7: "disc", 2: "square", 90: "bar"}  # COCO's ids have gaps and no order
HEIGHT, WIDTH = 48, 64


def draw(rng: np.random.Generator, shapes: list[tuple[str, tuple[int, int, int, int]]]) -> Image.Image:
    """One picture with shapes at boxes (x0, y0, x1, y1), each shape of its own colour."""
    picture = Image.fromarray(rng.integers(60, 120, (HEIGHT, WIDTH, 3), np.uint8))
    pen = ImageDraw.Draw(picture)
    colours = {"square": (230, 40, 40), "disc": (40, 230, 40), "bar": (40, 40, 230)}
    for shape, (x0, y0, x1, y1) in shapes:
        (pen.ellipse if shape == "disc" else pen.rectangle)((x0, y0, x1 - 1, y1 - 1), fill=colours[shape])
    return picture


def write_coco(root: Path, split: str = "val2017", images: int = 6, seed: int = 0) -> Path:
    """``annotations/instances_SPLIT.json`` and ``SPLIT/*.jpg``; image 3 is empty, image 1 holds a crowd. The JSON."""
    rng = np.random.default_rng(seed)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    document: dict = {"info": {}, "licenses": [], "images": [], "annotations": []}
    document["categories"] = [{"id": i, "name": name, "supercategory": "shape"} for i, name in SHAPES.items()]
    for n in range(images):
        shapes = []
        for slot in range(0 if n == 3 else 3):
            side = int(rng.integers(10, 18))
            x, y = 21 * slot + int(rng.integers(0, 3)), int(rng.integers(0, HEIGHT - side))
            category = int(rng.choice(list(SHAPES)))
            shapes.append((category, (x, y, x + side, y + side)))
            crowd = int(n == 1 and slot == 0)
            polygon = [[x, y, x + side, y, x + side, y + side, x, y + side]]
            mask = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]} if crowd else polygon
            document["annotations"].append(
                {
                    "id": len(document["annotations"]) + 1,
                    "image_id": 1000 + n,
                    "category_id": category,
                    "bbox": [x, y, side, side],
                    "area": side * side * 0.75,
                    "iscrowd": crowd,
                    "segmentation": mask,
                }
            )
        name = f"{1000 + n:012d}.jpg"
        document["images"].append({"id": 1000 + n, "file_name": name, "height": HEIGHT, "width": WIDTH})
        draw(rng, [(SHAPES[c], box) for c, box in shapes]).save(root / split / name, quality=95)
    path = root / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(document))
    return path


def write_voc(root: Path, split: str = "test", images: int = 4, seed: int = 0, year: str = "2007") -> Path:
    """``VOC2007/{Annotations,ImageSets/Main,JPEGImages}``; image 2 is empty, some objects are difficult. VOC2007."""
    rng = np.random.default_rng(seed)
    folder = root / f"VOC{year}"
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    first = 0 if split == "test" else 500
    names = [f"{first + n:06d}" for n in range(images)]
    (folder / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    for n, name in enumerate(names):
        shift = int(rng.integers(0, 9)) if n else 0
        objects = [] if n == 2 else [("cat", "square", 8 + shift, 11), ("dog", "disc", 40, 11 + shift)]
        shapes = [(shape, (x, y, x + 12, y + 20)) for _, shape, x, y in objects]
        draw(rng, shapes).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
        text = "".join(
            _voc_object(category, (x + 1, y + 1, x + 12, y + 20), difficult=category == "dog" and n == 0)
            for category, _, x, y in objects
        )
        (folder / "Annotations" / f"{name}.xml").write_text(_voc_file(name, text))
    return folder


def write_voc_object(path: Path, category: str, box: tuple[int, int, int, int]) -> None:
    """Replace an annotation file by one with a single object; box as VOC counts."""
    path.write_text(_voc_file(path.stem, _voc_object(category, box)))


def _voc_file(name: str, objects: str) -> str:
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    return f"<annotation><folder>VOC2007</folder><filename>{name}.jpg</filename>{size}{objects}</annotation>"


def _voc_object(category: str, box: tuple[int, int, int, int], difficult: bool = False) -> str:
    corners = "".join(f"<{s}>{v}</{s}>" for s, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{category}</name><difficult>{int(difficult)}</difficult><bndbox>{corners}</bndbox></object>"


def write_imagenet(root: Path, train: int = 8, val: int = 4, classes: int = 3, seed: int = 0) -> Path:
    """``train/nXXXXXXXX/*.JPEG`` and ``val/nXXXXXXXX/*.JPEG``: a class is a shape of one colour on noise."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"n{label + 1:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            for n in range(count):
                x, y = rng.integers(0, 30), rng.integers(0, 14)
                shape = list(SHAPES.values())[label % 3]
                draw(rng, [(shape, (x, y, x + 32, y + 32))]).save(folder / f"{split}_{label}_{n}.JPEG", quality=95)
    return root
