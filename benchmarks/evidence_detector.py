"""A small detector on a pre-trained encoder: torchvision's RetinaNet on one level, fine-tuned on demo scenes."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

from scrl_fast.data import DemoScenes
from scrl_fast.data.demo import NUM_DIGITS
from scrl_fast.models import Encoder

ANCHORS = (16, 20, 25, 32)  # digits of the scenes are squares of 16 to 32 pixels
WARMUP_STEPS = 20


class Backbone(nn.Module):
    """The encoder as torchvision's detectors want one: features of one level, and their channels."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder, self.out_channels = encoder, encoder.out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"0": self.encoder(images)}


def detector(encoder: Encoder, size: int, mean: Any, std: Any, seed: int) -> RetinaNet:
    """RetinaNet on a copy of the encoder; its head starts from the same numbers for every encoder of one seed."""
    torch.manual_seed(seed)
    return RetinaNet(
        Backbone(copy.deepcopy(encoder)).requires_grad_(True),
        NUM_DIGITS,
        min_size=size,
        max_size=size,
        image_mean=list(mean),
        image_std=list(std),
        anchor_generator=AnchorGenerator((ANCHORS,), ((1.0,),)),
        detections_per_img=20,
    )


def fine_tune(model: RetinaNet, scenes: DemoScenes, *, steps: int, batch: int, lr: float, seed: int) -> None:
    """All weights, AdamW, warm-up and cosine; the same scenes in the same order for every encoder of one seed."""
    device = next(model.parameters()).device
    model.train()
    solver = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    ramp = torch.optim.lr_scheduler.LinearLR(solver, 0.05, total_iters=WARMUP_STEPS)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(solver, max(1, steps - WARMUP_STEPS))
    schedule = torch.optim.lr_scheduler.SequentialLR(solver, [ramp, fall], [WARMUP_STEPS])
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(scenes), generator=generator).tolist()
        chosen, order = order[:batch], order[batch:]
        targets = [
            {
                "boxes": torch.from_numpy(scenes.boxes(i)).to(device),
                "labels": torch.from_numpy(scenes.labels(i)).to(device),
            }
            for i in chosen
        ]
        losses = model([image(scenes, i).to(device) for i in chosen], targets)
        solver.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        solver.step()
        schedule.step()


@torch.no_grad()
def average_precision(model: RetinaNet, scenes: DemoScenes, batch: int = 64) -> dict[str, float]:
    """COCO's AP (IoU .50 to .95) and AP50 on the scenes, by faster-coco-eval, or pycocotools where that is missing."""
    device = next(model.parameters()).device
    model.eval()
    found: list[dict[str, Any]] = []
    for first in range(0, len(scenes), batch):
        at = range(first, min(first + batch, len(scenes)))
        for i, result in zip(at, model([image(scenes, i).to(device) for i in at]), strict=True):
            boxes = result["boxes"].cpu()
            boxes[:, 2:] -= boxes[:, :2]
            rows = zip(boxes.tolist(), result["scores"].tolist(), result["labels"].tolist(), strict=True)
            found += [{"image_id": i + 1, "bbox": b, "score": s, "category_id": c + 1} for b, s, c in rows]
    return coco_ap(scenes, found)


def image(scenes: DemoScenes, index: int) -> Tensor:
    return torch.from_numpy(scenes.read(index).copy()).permute(2, 0, 1).float().div_(255)


def coco_ap(scenes: DemoScenes, found: list[dict[str, Any]]) -> dict[str, float]:
    """AP of detections (x, y, width, height; ids from 1) against the scenes' own boxes."""
    try:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    except ImportError:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    if not found:
        return {"ap": 0.0, "ap50": 0.0}
    truth: list[dict[str, Any]] = []
    for i in range(len(scenes)):
        for (x0, y0, x1, y1), label in zip(scenes.boxes(i).tolist(), scenes.labels(i).tolist(), strict=True):
            box = [x0, y0, x1 - x0, y1 - y0]
            row = {"id": len(truth) + 1, "image_id": i + 1, "category_id": label + 1, "bbox": box, "iscrowd": 0}
            truth.append(row | {"area": box[2] * box[3]})
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO()
        dataset.dataset = {
            "info": {},
            "images": [{"id": i + 1} for i in range(len(scenes))],
            "annotations": truth,
            "categories": [{"id": c + 1, "name": str(c)} for c in range(NUM_DIGITS)],
        }
        dataset.createIndex()
        judge = COCOeval(dataset, dataset.loadRes(found), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return {"ap": float(judge.stats[0]), "ap50": float(judge.stats[1])}
