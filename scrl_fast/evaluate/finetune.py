"""Fine-tuning: encoder and linear classifier trained together, tested on centre crops after every epoch.

It is the published implementation's ``eval.finetune``: random crops and flips, SGD with Nesterov momentum 0.9, linear
warm-up and cosine per step, BatchNorm in training mode.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scrl_fast.data.prefetch import prefetched
from scrl_fast.distributed.world import World
from scrl_fast.evaluate.batches import Progress, Say, map_batches, silent
from scrl_fast.evaluate.config import FinetuneOptions
from scrl_fast.evaluate.datasets import labels_of
from scrl_fast.evaluate.images import ImageLoader, pool
from scrl_fast.evaluate.linear import MOMENTUM, scale_by_lars, top_hits
from scrl_fast.models import Encoder
from scrl_fast.models.heads import classification
from scrl_fast.schedules import learning_rate


@dataclass(frozen=True)
class FinetuneResult:
    """Shares of the test images, 0 to 1."""

    last_top1: float
    last_top5: float
    best_top1: float
    best_top5: float
    """Of the epoch with the best top-1."""
    best_epoch: int
    """From 1."""
    last_loss: float
    """Cross entropy, mean over the last epoch."""


class Classifier(nn.Module):
    """An encoder, and a linear layer on its pooled feature: ``[b, 3, S, S] -> [b, classes]``."""

    def __init__(self, encoder: Encoder, classes: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = encoder
        self.head = nn.Linear(encoder.out_channels, classes).to(next(encoder.parameters()).device)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(pool(self.encoder, images))

    def torchvision_state(self) -> dict[str, Tensor]:
        """Tensors under torchvision's names; the classifier is ``fc``."""
        head = {f"fc.{name}": tensor for name, tensor in self.head.state_dict().items()}
        return self.encoder.body.state_dict() | head


def finetune(
    classifier: Classifier,
    loader: ImageLoader,
    train: Any,
    test: Any,
    options: FinetuneOptions,
    *,
    say: Say = silent,
    world: World = World(),  # noqa: B008 (frozen)
) -> FinetuneResult:
    """Train the classifier in place.

    loader: of centre crops. Each process of ``world`` takes an equal share of every batch; BatchNorm and gradients are
    those of the whole batch. Rank 0 returns the result, other ranks zeros.
    Raises RuntimeError when the loss is no number.
    """
    device = next(classifier.parameters()).device
    network = world.wrap_ddp(classifier, device)
    decay = options.weight_decay if options.optim == "sgd" else 0.0  # LARS adds its own
    solver = torch.optim.SGD(classifier.parameters(), lr=1.0, momentum=MOMENTUM, nesterov=True, weight_decay=decay)
    crops = replace(loader, views=replace(loader.views, recipe="simple", scale=options.crop_scale))
    steps = len(train) // options.batch_size
    warmup = min(options.warmup_epochs, options.epochs / 2)
    plan: dict[str, Any] = {"steps_per_epoch": steps, "epochs": options.epochs, "warmup_epochs": warmup}
    history, loss = torch.zeros(options.epochs, 2, dtype=torch.float64), math.nan
    for epoch in range(options.epochs):
        network.train()
        losses: list[Tensor] = []
        with Progress(f"epoch {epoch + 1}", steps * options.batch_size, "images", say) as progress:
            for images, labels in _batches(crops, train, epoch, device, world):
                base = options.lr * options.batch_size / 256
                solver.param_groups[0]["lr"] = learning_rate(epoch * steps + len(losses), base=base, **plan)
                losses.append(_update(network, solver, images, labels, options))
                progress.advance(options.batch_size)
        loss = world.all_reduce_(torch.stack(losses).mean().double()).item() / world.size
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss is {loss} in epoch {epoch + 1}: lower --lr={options.lr:g}")
        history[epoch] = top_accuracies(classifier, loader, test, say=say, world=world)
        say(f"epoch {epoch + 1}/{options.epochs}: loss {loss:.4f}, top-1 {history[epoch, 0]:.2%}")
    best = int(history[:, 0].argmax())
    (last1, last5), (best1, best5) = history[-1].tolist(), history[best].tolist()
    return FinetuneResult(last1, last5, best1, best5, best + 1, loss)


def _update(
    network: nn.Module, solver: torch.optim.Optimizer, images: Tensor, labels: Tensor, options: FinetuneOptions
) -> Tensor:
    """One step of SGD, its gradients scaled by LARS where the options want it; the loss of this process's images."""
    solver.zero_grad(set_to_none=True)
    loss = classification(network(images), labels)[0]
    loss.backward()
    if options.optim == "lars":
        scale_by_lars(network.parameters(), options.weight_decay)
    solver.step()
    return loss.detach()


def _batches(
    crops: ImageLoader, train: Any, epoch: int, device: torch.device, world: World
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of every batch of one epoch: images and labels. A last batch that is short is left out."""
    labels = torch.from_numpy(labels_of(train))
    order = np.random.default_rng([crops.seed, epoch]).permutation(len(train))
    order = order[: len(order) // crops.batch_size * crops.batch_size]
    own = [batch[world.rank :: world.size] for batch in crops.batches(order)]
    for batch, images in zip(own, prefetched(lambda b: crops.load(train, b, epoch), own, crops.workers), strict=True):
        yield images.to(device), labels[torch.from_numpy(batch)].to(device)


def top_accuracies(
    classifier: nn.Module,
    loader: ImageLoader,
    test: Any,
    *,
    say: Say = silent,
    world: World = World(),  # noqa: B008
) -> Tensor:
    """Top-1 and top-5 on all images of ``test``, float64 ``[2]``; the same in every rank.

    classifier: left in eval mode.
    """
    classifier.eval()
    device = next(classifier.parameters()).device
    labels = torch.from_numpy(labels_of(test))

    def load(batch: np.ndarray) -> tuple[Tensor, Tensor]:
        return loader.load(test, batch), labels[torch.from_numpy(batch)]

    def compute(loaded: tuple[Tensor, Tensor]) -> tuple[Tensor]:
        return (top_hits(classifier(loaded[0].to(device)), loaded[1].to(device)).cpu(),)

    hits = torch.zeros(2, dtype=torch.int64)
    batches = loader.batches(range(len(test)))
    found = map_batches(load, compute, batches, device=device, workers=loader.workers, world=world)
    with Progress("test images", len(test), "images", say) as progress:
        for batch, (each,) in zip(batches, found, strict=not world.rank):
            hits += each
            progress.advance(len(batch))
    return world.broadcast_from_rank0(lambda: hits.double() / len(test))
