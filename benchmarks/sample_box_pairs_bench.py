"""Box sampling on the host: 256 images x 10 boxes between the loader and the forward pass, every step.

Rivals: the step-by-step sampler as the method describes it, one `np.random` call per number, and our own NumPy
reference. `replay` draws the published stream number by number, bit for bit: the rival is the same sampler.
"""

from __future__ import annotations

import sys

import harness
import numpy as np

from scrl_fast.ops import sample_box_pairs, sample_box_pairs_replay


def python_sampler(crops1, crops2, size=224, boxes=10, least=32, threshold=0.5, random=np.random, clip_first=True):
    """What a user would write from the paper: plain loops, Python numbers, NumPy's random integers.

    clip_first: a box is compared with others after it was clipped to the view; the published code compares before.
    """
    rows1, rows2 = [], []
    for image, (crop1, crop2) in enumerate(zip(crops1.tolist(), crops2.tolist(), strict=True)):
        left, right = max(crop1[1], crop2[1]), min(crop1[1] + crop1[3], crop2[1] + crop2[3])
        top, bottom = max(crop1[0], crop2[0]), min(crop1[0] + crop1[2], crop2[0] + crop2[2])
        if left >= right or top >= bottom:
            continue
        scales = [(size / crop[3], size / crop[2]) for crop in (crop1, crop2)]
        scale_x, scale_y = min(s[0] for s in scales), min(s[1] for s in scales)
        width, height = round((right - left) * scale_x), round((bottom - top) * scale_y)
        if width <= least or height <= least:
            continue
        accepted = []
        for _ in range(boxes):
            for _ in range(50):
                columns, rows = random.randint(1, width // least + 1), random.randint(1, height // least + 1)
                cell_w, cell_h = width / columns, height / rows
                column, row = random.randint(0, columns), random.randint(0, rows)
                w, h = random.randint(least, int(cell_w) + 1), random.randint(least, int(cell_h) + 1)
                x = random.randint(0, int(cell_w - w) + 1) + int(column * cell_w)
                y = random.randint(0, int(cell_h - h) + 1) + int(row * cell_h)
                pair = []
                for crop, (sx, sy) in zip((crop1, crop2), scales, strict=True):
                    x0 = x * (1 / scale_x) * sx + (left - crop[1]) * sx
                    y0 = y * (1 / scale_y) * sy + (top - crop[0]) * sy
                    x1, y1 = x0 + w * (1 / scale_x) * sx, y0 + h * (1 / scale_y) * sy
                    if crop[4]:
                        x0, x1 = size - x1, size - x0
                    pair.append(clipped([x0, y0, x1, y1], size) if clip_first else [x0, y0, x1, y1])
                if all(overlap(pair[0], other) < threshold for other in accepted):
                    break
            pair = [clipped(box, size) for box in pair]
            accepted.append(pair[0])
            rows1.append([image, *pair[0]])
            rows2.append([image + len(crops1), *pair[1]])
    return np.array(rows1, np.float32).reshape(-1, 5), np.array(rows2, np.float32).reshape(-1, 5)


def clipped(box, size):
    return [max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(size)), min(box[3], float(size))]


def overlap(a, b):
    shared = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def random_crops(images: int, seed: int = 0) -> np.ndarray:
    """Two crops of 0.2-1 of the area of a 500x375 image, int64 `[2, images, 5]`."""
    rng = np.random.default_rng(seed)
    crops = []
    while len(crops) < 2 * images:
        area, ratio = 375 * 500 * rng.uniform(0.2, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if w <= 500 and h <= 375:
            crops.append((rng.integers(376 - h), rng.integers(501 - w), h, w, rng.integers(2)))
    return np.array(crops, np.int64).reshape(2, images, 5)


def agree(crops, boxes: int) -> None:
    arguments = {"view_size": 224, "boxes_per_image": boxes, "seed": 3, "step": 5}
    for ours, reference in zip(
        sample_box_pairs(*crops, **arguments),
        sample_box_pairs(*crops, **arguments, backend="reference"),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, reference)


def replays(crops, boxes: int) -> None:
    """The boxes of the step-by-step sampler from the same state, bit for bit."""
    ours = sample_box_pairs_replay(*crops, view_size=224, boxes_per_image=boxes, random_state=np.random.RandomState(7))
    theirs = python_sampler(*crops, boxes=boxes, random=np.random.RandomState(7), clip_first=False)
    for mine, its in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, its)


def main() -> int:
    parser = harness.parser("sample_box_pairs", __doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1, 64, 1024], help="images")
    parser.add_argument("--boxes", type=int, nargs="+", default=[10, 30], help="boxes per image")
    args = parser.parse_args()
    bench = harness.Bench("sample_box_pairs", args)
    sizes = [(images, args.boxes[0]) for images in args.batches] + [(256, boxes) for boxes in args.boxes[1:]]
    for images, boxes in sizes:
        crops = random_crops(images)
        arguments = {"view_size": 224, "boxes_per_image": boxes, "seed": 3, "step": 5}
        bench.case(
            harness.case_name("draw", images=images, boxes=boxes),
            {
                "scrl_fast/native": lambda c=crops, a=arguments: sample_box_pairs(*c, **a),
                "scrl_fast/reference": lambda c=crops, a=arguments: sample_box_pairs(*c, **a, backend="reference"),
                "numpy/step-by-step": lambda c=crops, k=boxes: python_sampler(*c, boxes=k),
            },
            bytes=images * (2 * 40 + boxes * 2 * 20),
            items=images * boxes,
            check=lambda c=crops, k=boxes: agree(c, k),
        )
        state, same = np.random.RandomState(7), np.random.RandomState(7)
        bench.case(
            harness.case_name("replay", images=images, boxes=boxes),
            {
                "scrl_fast/native": lambda c=crops, k=boxes, s=state: sample_box_pairs_replay(
                    *c, view_size=224, boxes_per_image=k, random_state=s
                ),
                "numpy/step-by-step": lambda c=crops, k=boxes, s=same: python_sampler(
                    *c, boxes=k, random=s, clip_first=False
                ),
            },
            bytes=images * (2 * 40 + boxes * 2 * 20),
            items=images * boxes,
            check=lambda c=crops, k=boxes: replays(c, k),
        )
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
