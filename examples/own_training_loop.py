"""Our box pairs, RoIAlign, loss and LARS in a training loop of your own: a torchvision network, no trainer of ours.

python examples/own_training_loop.py --steps=100
"""

import argparse
import copy

import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import hflip, resized_crop

from scrl_fast import ops
from scrl_fast.data import DemoScenes
from scrl_fast.optim import LARS, lars_param_groups

SIZE, STRIDE, BATCH = 96, 32, 8


class Network(nn.Module):
    """Feature map and one projected vector a box."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*list(resnet18(weights=None).children())[:-2])
        self.project = nn.Sequential(nn.Linear(512, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64))

    def forward(self, views: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        pooled = ops.roi_align(self.body(views), boxes, 1, spatial_scale=1 / STRIDE)
        return self.project(pooled.flatten(1))


def random_view(image: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """A crop of torchvision's, and its place (y, x, height, width, flip)."""
    y, x, h, w = RandomResizedCrop.get_params(image, scale=(0.3, 1.0), ratio=(0.75, 1.33))
    flip = bool(torch.rand(()) < 0.5)
    view = resized_crop(image, y, x, h, w, [SIZE, SIZE], antialias=True)
    return (hflip(view) if flip else view), [y, x, h, w, int(flip)]


def main(steps: int) -> list[float]:
    torch.manual_seed(0)
    scenes = DemoScenes(256, SIZE)  # or any images of yours
    images = torch.tensor(scenes.images).permute(0, 3, 1, 2) / 255
    online, predict = Network(), nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    target = copy.deepcopy(online)
    trained = nn.ModuleList([online, predict])
    optimizer = LARS(lars_param_groups(trained.named_parameters(), weight_decay=1e-6), lr=1.0)
    optimizer.attach_ema(target.parameters(), online.parameters())  # moved in the same call as the update
    losses = []
    for step in range(steps):
        batch = images[torch.randint(len(images), (BATCH,))]
        drawn = [[random_view(image) for image in batch] for _ in range(2)]
        views = torch.stack([view for each in drawn for view, _ in each])
        crops = [torch.tensor([place for _, place in each]) for each in drawn]
        boxes = torch.cat(ops.sample_box_pairs(*crops, view_size=SIZE, boxes_per_image=4, seed=0, step=step))
        with torch.no_grad():
            wanted = target(views, boxes)
        loss = ops.two_view_loss(predict(online(views, boxes)), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(ema_momentum=0.97)
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step}  loss {losses[-1]:.3f}  {len(boxes) // 2} box pairs")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="SCRL in a plain PyTorch loop.")
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
