"""Ten steps of the trainer equal ten steps of SCRL written plainly, from the paper, in this file.

Nothing of the package is used on the plain side but the batches: networks are torchvision's, laid out as in the
published implementation (whose parameter names decide what LARS leaves out there), RoIAlign is torchvision's. The
batches themselves are held to the paper in the last tests: pixels made anew by Pillow and torchvision from the drawn
numbers, boxes measured against every rule of the sampler.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock
from torchvision.transforms.v2 import functional as transforms

from scrl_fast.config.schema import Config
from scrl_fast.data.views import draw_views
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
    ("method", "compat", "dtype", "backbone", "steps"),
    [("scrl", "kakaobrain", torch.float64, "resnet18", 3), *((*case, STEPS) for case in TINY)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_ten_steps_equal_plain_pytorch(tmp_path, method, compat, dtype, backbone, steps):
    limit = 1e-10 if dtype == torch.float64 else 1e-5
    trainer = SCRLTrainer(make_config(tmp_path / "run", method, compat, dtype, backbone), source=Pictures())
    trainer.model.to(dtype)
    plain = Plain(trainer)
    start = {name: vector.clone() for name, vector in parts(trainer.model.state())}
    stream = trainer.batches()
    for step in range(steps):
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


# ---- what the steps are fed ----


def batches_of(folder, count, **views):
    config = make_config(folder, "scrl", "kakaobrain", torch.float32, "resnet10_tiny")
    for name, value in views.items():
        setattr(config.views, name, value)
    trainer = SCRLTrainer(config, source=Pictures())
    stream = trainer.batches()
    for step in range(count):
        yield config, step // trainer.steps_per_epoch, next(stream)[0]
        trainer.loop.advance(trainer.global_batch)
    stream.close()


def plain_view(image, row, size):
    """One view as a reader of the paper would make it with Pillow and torchvision; uint8 `[S, S, 3]`."""
    y, x, h, w = (int(row[name]) for name in "yxhw")
    picture = Image.fromarray(image).crop((x, y, x + w, y + h)).resize((size, size), Image.Resampling.BICUBIC)
    if row["flip"]:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    adjust = [transforms.adjust_brightness, transforms.adjust_contrast, transforms.adjust_saturation]
    amounts = [float(row[name]) for name in ("brightness", "contrast", "saturation")]
    for which in row["order"] if row["jitter"] else ():
        if which == 3:
            continue  # hue rounds differently by way of HSV, and what follows enlarges it: test_augment_views.py has it
        picture = adjust[which](picture, amounts[which])
    if row["grayscale"]:
        picture = picture.convert("L").convert("RGB")
    if row["blur"]:
        small = int(size / float(row["blur_amount"]))
        picture = picture.resize((small, small), Image.Resampling.BICUBIC).resize(
            (size, size), Image.Resampling.BICUBIC
        )
    if row["solarize"]:
        picture = ImageOps.solarize(picture, 128)
    return np.asarray(picture)


def test_views_are_those_of_pillow_and_torchvision(tmp_path):
    seen = dict.fromkeys(("flip", "jitter", "grayscale", "blur", "solarize"), 0)
    for config, epoch, batch in batches_of(tmp_path / "run", 6, hue=0.0):
        views, source = config.views, Pictures()
        sizes = [source.read(key).shape[:2] for key in batch.keys]
        table = draw_views(views, sizes, seed=config.train.seed, epoch=epoch, keys=batch.keys.numpy())
        levels = batch.views * torch.tensor(views.std).view(3, 1, 1) + torch.tensor(views.mean).view(3, 1, 1)
        levels = (levels * 255).permute(0, 2, 3, 1).numpy()
        for view in range(2):
            for i, key in enumerate(batch.keys.tolist()):
                row = table[view, i]
                assert [int(row[n]) for n in ("y", "x", "h", "w", "flip")] == batch.crops[view, i].tolist()
                off = np.abs(levels[view * len(sizes) + i] - plain_view(source.read(key), row, views.size))
                assert off.max() < 12 and off.mean() < 0.7, f"view {view + 1} of image {key}: {row}"
                for name in seen:
                    seen[name] += bool(row[name])
    assert all(seen.values()), f"too few views to say something of every transform: {seen}"


def overlap(crops):
    """left, top, right, bottom of two crops' intersection in pixels of the image."""
    (y1, x1, h1, w1, _), (y2, x2, h2, w2, _) = crops
    return max(x1, x2), max(y1, y2), min(x1 + w1, x2 + w2), min(y1 + h1, y2 + h2)


def in_image(box, crop, size):
    """A view's box in pixels of the image."""
    y, x, h, w, flip = crop
    x0, y0, x1, y1 = box
    if flip:
        x0, x1 = size - x1, size - x0
    return np.array([x + x0 * w / size, y + y0 * h / size, x + x1 * w / size, y + y1 * h / size])


def iou(a, b):
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    inter = max(width, 0) * max(height, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def test_boxes_keep_every_rule_of_the_sampler(tmp_path):
    """Both boxes of a pair show one region inside the overlap, on the sampler's integer grid, apart from the others."""
    pairs = without = crowded = whole = 0
    for config, _, batch in batches_of(tmp_path / "run", 12, scale=(0.04, 0.6), size=96):
        size, least, wanted = config.views.size, config.boxes.min_size, config.boxes.per_image
        first, second = (boxes.double().numpy() for boxes in batch.boxes)
        assert np.array_equal(first[:, 0] + len(batch.keys), second[:, 0])
        for i, crops in enumerate(batch.crops.transpose(0, 1).tolist()):
            left, top, right, bottom = overlap(crops)
            scale_x, scale_y = (min(size / crop[3] for crop in crops), min(size / crop[2] for crop in crops))
            width, height = round((right - left) * scale_x), round((bottom - top) * scale_y)  # half to even, as NumPy
            chosen = first[:, 0] == i
            fits = right > left and bottom > top and width > least and height > least
            assert chosen.sum() == (wanted if fits else 0)
            without += not fits
            for k in np.flatnonzero(chosen):
                region, same = in_image(first[k, 1:], crops[0], size), in_image(second[k, 1:], crops[1], size)
                place = (region - [left, top, left, top]) * [scale_x, scale_y, scale_x, scale_y]
                corners = np.concatenate([first[k, 1:], second[k, 1:]])
                if corners.min() > 0 and corners.max() < size:  # else clipped by up to the rounding of the overlap
                    assert region == pytest.approx(same, abs=1e-3)
                    assert place == pytest.approx(np.rint(place), abs=1e-2)
                    whole += 1
                assert place.min() > -0.01 and place[2] < width + 0.51 and place[3] < height + 0.51
                assert place[2] - place[0] > least - 0.51 and place[3] - place[1] > least - 0.51
                earlier = [j for j in np.flatnonzero(chosen) if j < k]
                crowded += any(iou(first[k, 1:], first[j, 1:]) >= config.boxes.iou_threshold for j in earlier)
                pairs += 1
    assert pairs > 50 and whole > 50 and without > 0
    assert crowded <= 0.05 * pairs  # only a 50th try may keep what overlaps
