"""The training step as a reader of the paper would write it, in plain PyTorch and torchvision."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lars_step_bench import adapt_one_by_one, average_one_by_one
from sample_box_pairs_bench import python_sampler
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from scrl_fast.models import SCRL


class PlainStep:
    """Box sampling in Python, torchvision's RoIAlign, LARS and moving average tensor by tensor, ``.item()`` to log.

    NCHW; on a GPU under fp16 autocast with a GradScaler. model: whose weights it starts with. views: ``[2B, 3, S, S]``,
    ready: making them is not in its time.
    """

    def __init__(self, model: SCRL, views: Tensor, crops: np.ndarray, *, lr: float = 0.1) -> None:
        def encoder(branch: Any) -> nn.Sequential:
            return nn.Sequential(*list(branch.encoder.body.children())[:-2])

        model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        self.encoder, self.target_encoder = encoder(model.online), encoder(model.target)
        self.projector, self.target_projector = model.online.projector.net, model.target.projector.net
        self.predictor, self.stride = model.predictor.net, model.online.encoder.stride
        self.views, self.crops, self.cuda = views.contiguous(), crops, views.is_cuda
        params = [p for p in model.parameters() if p.requires_grad]
        targets, sources = model.ema_pairs()
        self.state = SimpleNamespace(
            params=params, adapt=[p.ndim > 1 for p in params], targets=targets, sources=sources
        )
        self.sgd = torch.optim.SGD(params, lr, momentum=0.9, foreach=False)
        self.scaler = torch.amp.GradScaler(enabled=self.cuda)

    def loss(self, boxes: tuple[Tensor, Tensor]) -> Tensor:
        def pooled(features: Tensor) -> Tensor:
            return roi_align(features, torch.cat(boxes), 1, 1 / self.stride).flatten(1)

        online = self.predictor(self.projector(pooled(self.encoder(self.views))))
        with torch.no_grad():
            target = self.target_projector(pooled(self.target_encoder(self.views)))
        p1, p2 = F.normalize(online, dim=1).chunk(2)
        z1, z2 = F.normalize(target, dim=1).chunk(2)
        return ((p1 - z2).square().sum(1) + (p2 - z1).square().sum(1)).mean()

    def __call__(self) -> float:
        rows1, rows2 = (torch.from_numpy(rows).to(self.views.device) for rows in python_sampler(*self.crops))
        with torch.autocast(self.views.device.type, torch.float16, enabled=self.cuda):
            loss = self.loss((rows1, rows2))
        self.sgd.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.sgd)
        adapt_one_by_one(self.state)
        self.scaler.step(self.sgd)
        self.scaler.update()
        average_one_by_one(self.state)
        return loss.item()
