"""Ten steps of the trainer equal ten steps of SCRL written plainly, from the paper, in this file.

Nothing of the package is used on the plain side but the batches: networks are torchvision's, laid out as in the
published implementation (whose parameter names decide what LARS leaves out there), RoIAlign is torchvision's.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

from scrl_fast.config import Config
from scrl_fast.trainer import SCRLTrainer

STEPS, CLASSES = 10, 3


class Pictures:
    """Smooth random images with labels; one in four has none."""

    num_classes = CLASSES

    def __init__(self, count=24, height=90, width=80):
        noise = np.random.default_rng(0).integers(0, 256, (count, 3, 9, 8)).astype(np.float32)
        large = F.interpolate(torch.from_numpy(noise), (height, width), mode="bicubic").clamp(0, 255)
        self.images = large.byte().permute(0, 2, 3, 1).contiguous().numpy()

    def __len__(self):
        return len(self.images)

    def read(self, index):
        return self.images[index]

    def label(self, index):
        return index % (CLASSES + 1) - 1

    def name_of(self, index):
        return f"picture {index}"


def head(inputs, hidden, outputs):
    body = [nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs, bias=False)]
    return nn.ModuleDict({"net": nn.Sequential(*body)})


def resnet18(width):
    r = torchvision.models.resnet18(weights=None)
    return nn.Sequential(r.conv1, r.bn1, r.relu, r.maxpool, r.layer1, r.layer2, r.layer3, r.layer4)


def resnet10_tiny(width):
    def stage(inputs, outputs):
        down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))
        return nn.Sequential(BasicBlock(inputs, outputs, 2, down))

    stem = [nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Identity()]
    stages = [nn.Sequential(BasicBlock(width, width)), stage(width, 2 * width), stage(2 * width, 4 * width)]
    return nn.Sequential(*stem, *stages)


ENCODERS = {"resnet18": (resnet18, 1 / 32), "resnet10_tiny": (resnet10_tiny, 1 / 8)}


class Plain:
    """SCRL or BYOL as a reader of the paper would write it."""

    def __init__(self, trainer):
        self.config = config = trainer.config
        self.batch = config.train.batch_size
        self.steps_per_epoch = len(trainer.source) // self.batch
        self.total = self.steps_per_epoch * config.train.epochs
        hidden, size = config.model.hidden_dim, config.model.projection_dim

        encoder, self.scale = ENCODERS[config.model.backbone]
        width = trainer.model.online.encoder.body.conv1.out_channels
        channels = encoder(width)[-1][-1].conv2.out_channels

        def branch():
            return nn.ModuleDict({"encoder": encoder(width), "projector": head(channels, hidden, size)})

        self.online, self.target = branch(), branch()
        self.predictor = head(size, hidden, size)
        self.probe = nn.ModuleDict({"linear": nn.Linear(channels, CLASSES)})
        ours = trainer.model
        pairs = [(self.online, ours.online), (self.target, ours.target)]
        for mine, theirs in [*pairs, (self.predictor, ours.predictor), (self.probe, ours.probe)]:
            mine.to(next(theirs.parameters()).dtype)
            # both list modules in the order in which data flows, so positions match where names do not
            values = list(theirs.state_dict().values())
            mine.load_state_dict(dict(zip(mine.state_dict(), values, strict=True)))
        self.buffers = {}

    def state(self):
        parts = {"online": self.online, "target": self.target, "predictor": self.predictor, "probe": self.probe}
        return {name: part.state_dict() for name, part in parts.items()}

    def forward(self, branch, views, boxes):
        features = branch["encoder"](views)
        pooled = features.mean((2, 3))
        rows = pooled
        if boxes is not None:
            rois = torch.cat(boxes).to(features.dtype)
            rows = torchvision.ops.roi_align(features, rois, 1, self.scale, -1, False).flatten(1)
        return branch["projector"]["net"](rows), pooled

    def loss(self, batch):
        z, pooled = self.forward(self.online, batch.views, batch.boxes)
        with torch.no_grad():
            target, _ = self.forward(self.target, batch.views, batch.boxes)
        p1, p2 = F.normalize(self.predictor["net"](z), dim=1).chunk(2)
        t1, t2 = F.normalize(target, dim=1).chunk(2)
        loss = ((2 - 2 * (p1 * t2).sum(1)) + (2 - 2 * (p2 * t1).sum(1))).mean()
        logits = self.probe["linear"](pooled.detach())
        return loss, F.cross_entropy(logits, torch.cat([batch.labels] * 2), ignore_index=-1)

    def rate(self, step, peak):
        epoch, warm, last = (step + 1) / self.steps_per_epoch, self.config.optim.warmup_epochs, self.config.train.epochs
        if epoch <= warm:
            return peak * epoch / warm
        return peak * (1 + math.cos(math.pi * (epoch - warm) / (last - warm))) / 2

    def step(self, step, batch):
        optim, quirks = self.config.optim, self.config.compat == "kakaobrain"
        loss, probe_loss = self.loss(batch)
        (loss + probe_loss).backward()
        scale = self.batch / 256
        lr = self.rate(step, optim.lr * scale)
        for part in (self.online, self.predictor, self.probe):
            for name, p in part.named_parameters():
                if part is self.probe and not quirks:
                    self.sgd(p, p.grad, self.rate(step, optim.probe_lr * scale))
                    continue
                excluded = ("bn" in name or "bias" in name) if quirks else p.ndim == 1
                if excluded:
                    g = p.grad * lr if quirks else p.grad
                else:
                    wd, norm, g_norm = optim.weight_decay, p.detach().norm(), p.grad.norm()
                    ratio = optim.trust_coefficient * norm / (g_norm + wd * norm + optim.eps)
                    g = (p.grad + wd * p.detach()) * (ratio if norm > 0 and g_norm > 0 else 1.0)
                self.sgd(p, g, lr)
        m = 1 - (1 - optim.ema_momentum) * (math.cos(math.pi * step / self.total) + 1) / 2
        with torch.no_grad():
            for q, k in zip(self.online.parameters(), self.target.parameters(), strict=True):
                k.copy_(m * k + (1 - m) * q)
        return loss.item(), probe_loss.item()

    def sgd(self, p, g, lr):
        with torch.no_grad():
            before = self.buffers.get(p)
            self.buffers[p] = g.clone() if before is None else self.config.optim.momentum * before + g
            p -= lr * self.buffers[p]
            p.grad = None


def make_config(folder, method, compat, dtype, backbone):
    # ReLU and BatchNorm of few samples amplify rounding: large steps would part float32 from itself
    lr, batch = (10.0, 4) if dtype == torch.float64 else (0.01, 8)
    config = Config(compat=compat)
    config.data.workers = 0
    config.views.size = 48
    config.boxes.min_size, config.boxes.per_image = 16, 4
    config.model.backbone, config.model.method = backbone, method
    config.model.hidden_dim, config.model.projection_dim = 32, 16
    config.optim.lr, config.optim.weight_decay, config.optim.warmup_epochs = lr, 1e-3, 2
    config.optim.trust_coefficient = 0.02  # large, so that ten steps move the weights
    config.optim.probe_lr, config.optim.ema_momentum = 10 * lr, 0.5
    config.train.batch_size, config.train.epochs, config.train.precision = batch, 5, "fp32"
    config.run.dir, config.run.tensorboard = str(folder), False
    return config


def parts(state):
    """Weights and BatchNorm statistics of each part, each as one vector."""
    for name, part in state.items():
        floats = {key: value.double().flatten() for key, value in part.items() if value.is_floating_point()}
        for kind, statistics in (("weights", False), ("statistics", True)):
            chosen = [value for key, value in floats.items() if ("running" in key) == statistics]
            if chosen:
                yield f"{kind} of {name}", torch.cat(chosen)


def relative(ours, exact):
    return ((ours - exact).norm() / exact.norm()).item()


TINY = itertools.product(["scrl", "byol"], ["none", "kakaobrain"], [torch.float64, torch.float32], ["resnet10_tiny"])


@pytest.mark.parametrize(
    ("method", "compat", "dtype", "backbone"),
    [("scrl", "kakaobrain", torch.float64, "resnet18"), *TINY],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_ten_steps_equal_plain_pytorch(tmp_path, method, compat, dtype, backbone):
    limit = 1e-10 if dtype == torch.float64 else 1e-5
    trainer = SCRLTrainer(make_config(tmp_path / "run", method, compat, dtype, backbone), source=Pictures())
    trainer.model.to(dtype)
    plain = Plain(trainer)
    start = {name: vector.clone() for name, vector in parts(trainer.model.state())}
    stream = trainer.batches()
    for step in range(STEPS):
        (batch,) = next(stream)
        batch.views = batch.views.to(dtype)
        expected = plain.step(step, batch)
        trainer.train_step([batch])
        loss, probe_loss, *_ = trainer.meter.drain()[0]
        assert loss == pytest.approx(expected[0], rel=limit), f"loss of step {step}"
        assert probe_loss == pytest.approx(expected[1], rel=limit), f"probe loss of step {step}"
    stream.close()
    for (name, ours), (_, exact) in zip(parts(trainer.model.state()), parts(plain.state()), strict=True):
        assert relative(ours, exact) <= limit, name
        assert relative(start[name], exact) > 3 * limit, f"{name} hardly moved: equality would say little"
