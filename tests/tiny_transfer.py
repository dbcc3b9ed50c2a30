"""What the tests of transfer share: tiny data sets in the official layouts, and the options for a small, short run."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from tiny_data import HEIGHT, WIDTH, draw, write_coco, write_voc

from scrl_fast.transfer.__main__ import parse
from scrl_fast.transfer.trainer import Transfer

KEYPOINTS = 17
CAR, PERSON, ROAD = 26, 24, 7
SMALL = [
    *("--model.backbone=resnet10_tiny", "--model.short_side=[48,64]", "--model.short_side_step=16"),
    *("--model.test_short_side=48", "--model.fpn_channels=16", "--model.head_channels=32", "--model.mask_channels=8"),
    *("--model.keypoint_channels=8", "--model.proposals=[40,40]", "--model.rois_per_image=16", "--data.workers=2"),
    *("--train.batch_size=3", "--train.steps=8", "--train.device=cpu", "--optim.reference_batch=3", "--optim.lr=0.01"),
    *("--optim.lr_steps=[8,8]", "--optim.warmup_steps=2", "--run.log_every=1", "--run.tensorboard=false"),
]


def write_keypoints(root: Path, split: str, images: int = 8, seed: int = 0) -> Path:
    """``annotations/person_keypoints_SPLIT.json``, images: 1 has a crowd, 2 nobody, 3 a body without points."""
    rng = np.random.default_rng(seed)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    names = [f"point{i}" for i in range(KEYPOINTS)]
    category = {"id": 1, "name": "person", "supercategory": "person", "keypoints": names, "skeleton": [[1, 2]]}
    document: dict = {"info": {}, "licenses": [], "images": [], "annotations": [], "categories": [category]}
    for n in range(images):
        name = f"{n:012d}.jpg"
        boxes = [] if n == 2 else [(4 + 3 * (n % 4), 6, 24 + 3 * (n % 4), 42)]
        document["images"].append({"id": n, "file_name": name, "height": HEIGHT, "width": WIDTH})
        draw(rng, [("square", box) for box in boxes]).save(root / split / name, quality=95)
        for x0, y0, x1, y1 in boxes:
            places = np.linspace(0.1, 0.9, KEYPOINTS)
            points = np.stack([x0 + places * (x1 - x0), y0 + places[::-1] * (y1 - y0), np.full(KEYPOINTS, 2)], 1)
            points[KEYPOINTS - 1] = 0
            if n == 3:
                points[:] = 0
            annotation = {"id": len(document["annotations"]) + 1, "image_id": n, "category_id": 1, "iscrowd": 0}
            annotation |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0) * 0.6}
            annotation |= {"segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]]}
            annotation |= {"keypoints": points.round(1).reshape(-1).tolist()}
            annotation |= {"num_keypoints": int((points[:, 2] > 0).sum())}
            document["annotations"].append(annotation)
        if n == 1:
            crowd = {"id": 99, "image_id": 1, "category_id": 1, "iscrowd": 1, "area": 100, "bbox": [40, 0, 20, 40]}
            crowd |= {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [40 * HEIGHT, 800, HEIGHT * 24 - 800]}}
            document["annotations"].append(crowd | {"keypoints": [0] * 51, "num_keypoints": 0})
    path = root / "annotations" / f"person_keypoints_{split}.json"
    path.write_text(json.dumps(document))
    return path


def write_cityscapes(root: Path, split: str, images: int = 6, seed: int = 0) -> Path:
    """``{leftImg8bit,gtFine}/SPLIT/CITY/*``: cars, a person, in image 1 a group of cars, image 2 without objects."""
    rng = np.random.default_rng(seed)
    for n in range(images):
        city = ("aachen", "bonn")[n % 2]
        stem = f"{city}_{n:06d}_000019"
        values = np.full((HEIGHT, WIDTH), ROAD, np.int32)
        shapes = []
        if n != 2:
            x, y = 4 + 2 * (n % 3), 8
            values[y : y + 20, x : x + 24] = CAR * 1000
            values[10:40, 44:56] = PERSON * 1000 + 1
            shapes = [("square", (x, y, x + 24, y + 20)), ("disc", (44, 10, 56, 40))]
        if n == 1:
            values[40:, :20] = CAR
        for folder, suffix in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_instanceIds")):
            (root / folder / split / city).mkdir(parents=True, exist_ok=True)
            path = root / folder / split / city / f"{stem}_{suffix}.png"
            if folder == "gtFine":
                Image.fromarray(values.astype(np.uint16)).save(path)
            else:
                draw(rng, shapes).save(path)
    return root


def write_all(folder: Path) -> Path:
    """All data sets in one folder: their names do not meet."""
    write_coco(folder, "train2017", images=12)
    write_coco(folder, "val2017", images=5, seed=1)
    write_keypoints(folder, "train2017")
    write_keypoints(folder, "val2017", images=4, seed=1)
    write_voc(folder, "trainval", images=5)
    write_voc(folder, "trainval", images=4, year="2012", seed=2)
    write_voc(folder, "test", images=4, seed=1)
    for split in ("train", "val"):
        write_cityscapes(folder, split)
    return folder


def arguments(task, root, run, *more):
    return [task, f"--data.root={root}", f"--run.dir={run}", *SMALL, *more]


def transfer(task, root, run, *more):
    return Transfer(parse(arguments(task, root, run, *more)))


@contextmanager
def edited(root, tmp_path, name):
    """The annotations of that file, of a copy of the data in tmp_path / "data", written back when changed."""
    shutil.copytree(root, tmp_path / "data")
    path = tmp_path / "data" / "annotations" / name
    document = json.loads(path.read_text())
    yield document
    path.write_text(json.dumps(document))


def without_masks(root, tmp_path, every=1):
    """As files made for boxes alone have it: no polygon at all, or one that has no inside."""
    with edited(root, tmp_path, "instances_train2017.json") as document:
        single = [annotation for annotation in document["annotations"] if not annotation["iscrowd"]]
        for n, annotation in enumerate(single[::every]):
            annotation["segmentation"] = ([], [[1, 1, 5, 5]])[n % 2]
    return ["instance", f"--data.root={tmp_path / 'data'}"]
