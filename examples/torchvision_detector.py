"""torchvision's own detector with our RoIAlign in it: the network's code stays as it is, and undo restores.

python examples/torchvision_detector.py --steps=20
"""

import argparse

import torch
import torchvision
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

from scrl_fast.data import DemoScenes
from scrl_fast.ops import patch_roi_align

BATCH = 2


def main(steps: int) -> list[float]:
    torch.manual_seed(0)
    scenes = DemoScenes(64, 96)  # or any pictures with boxes
    sizes = {"min_size": 128, "max_size": 128}  # small ones, for a CPU
    detector = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=11, **sizes)
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.01, momentum=0.9)
    losses = []
    with patch_roi_align() as patch:
        print("now ours:", ", ".join(patch.changed))
        for step in range(steps):
            chosen = [(step * BATCH + place) % len(scenes) for place in range(BATCH)]
            images = [torch.tensor(scenes.read(index)).permute(2, 0, 1) / 255 for index in chosen]
            targets = [
                {"boxes": torch.tensor(scenes.boxes(index)), "labels": torch.tensor(scenes.labels(index)) + 1}
                for index in chosen
            ]
            loss = sum(detector(images, targets).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            print(f"step {step}  loss {losses[-1]:.3f}")
    print("torchvision's again:", torchvision.ops.roi_align.__module__)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Faster R-CNN of torchvision on our RoIAlign.")
    parser.add_argument("--steps", type=int, default=20)
    main(parser.parse_args().steps)
