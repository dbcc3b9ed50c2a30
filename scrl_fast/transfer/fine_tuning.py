"""The training step of a detector, and `fine_tune`, which needs no run folder."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from scrl_fast.data import ImagesWithBoxes
from scrl_fast.data.prefetch import Prefetcher
from scrl_fast.run.numerics import step_seed
from scrl_fast.transfer.config import TransferDataConfig, TransferOptimConfig
from scrl_fast.transfer.dataset import Example, Examples, aspect_ratio_batches, is_landscape, trainable
from scrl_fast.transfer.detections import first_label

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, FrozenBatchNorm2d)


class DetectionLossError(RuntimeError):
    """A loss is NaN or infinite; the parameters are those of the step before."""


def build_sgd(network: nn.Module, optim: TransferOptimConfig) -> torch.optim.SGD:
    """SGD over the trained parameters; normalisation layers have their own weight decay."""
    norms = {id(p) for m in network.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    trained = [p for p in network.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if id(p) not in norms], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if id(p) in norms], "weight_decay": optim.norm_weight_decay},
    ]
    return torch.optim.SGD([g for g in groups if g["params"]], lr=optim.lr, momentum=optim.momentum)


def to_device(examples: Sequence[Example], device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images as float32 in 0..1 and targets, on the device."""
    images = [image.to(device, non_blocking=True).float().div_(255) for image, _ in examples]
    return images, [{k: v.to(device, non_blocking=True) for k, v in target.items()} for _, target in examples]


def train_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
    *,
    lr: float,
    seed: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    clip_norm: float = 0.0,
) -> dict[str, float]:
    """One update; returns the losses by name and their sum as ``loss``.

    seed: of torchvision's draws (sides, anchors, proposals). Raises DetectionLossError before a bad update.
    """
    torch.manual_seed(seed)
    for group in optimizer.param_groups:
        group["lr"] = lr
    images, targets = to_device(examples, device)
    with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        losses = network(images, targets)
        loss = torch.stack([value.float() for value in losses.values()]).sum()
    numbers = torch.stack([loss.detach(), *(value.detach().float() for value in losses.values())])
    row = dict(zip(["loss", *losses], numbers.tolist(), strict=True))
    if not math.isfinite(row["loss"]):  # torchvision's matching waits for the device anyway, so this costs nothing
        bad = [name for name, value in row.items() if not math.isfinite(value) and name != "loss"]
        raise DetectionLossError(f"{', '.join(bad) or 'loss'} is not finite; the update was not made")
    optimizer.zero_grad(set_to_none=True)
    scaled = scaler.scale(loss) if scaler is not None else loss
    scaled.backward()
    if clip_norm:
        if scaler is not None:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([p for p in network.parameters() if p.requires_grad], clip_norm)
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    return row


def training_batches(
    examples: Examples,
    indices: Sequence[int],
    batch_size: int,
    *,
    seed: int,
    start: int,
    stop: int,
    prefetcher: Prefetcher,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[list[Example]]:
    """This process's part of the batches of steps start to stop - 1; the same for any start and thread count."""
    wide = [is_landscape(examples.source, index) for index in indices]
    per_epoch = len(indices) // batch_size

    def groups() -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, []
        for step in range(start, stop):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = aspect_ratio_batches(wide, batch_size, seed=seed, epoch=epoch)
            places = order[step % per_epoch][rank::world_size]
            yield [(indices[place], epoch) for place in places]

    yield from prefetcher.map(lambda wanted: examples(*wanted), groups())


def fine_tune(
    network: nn.Module,
    train: ImagesWithBoxes,
    *,
    steps: int,
    batch_size: int = 16,
    lr: float = 0.02,
    seed: int = 0,
    warmup_steps: int = 0,
    lr_steps: tuple[int, int] | None = None,
    flip: float = 0.5,
    workers: int = 2,
    clip_norm: float = 0.0,
    autocast: torch.dtype | None = None,
    report: Callable[[int, dict[str, float]], None] | None = None,
    decay_at: tuple[int, int] | None = None,
) -> list[float]:
    """Train a detector of `build_detector` in place, on its own device; returns the loss of every step.

    train: images with boxes and labels; crowds and images without boxes are left out.
    lr: for this batch size, not scaled; a tenth of it from each step of ``lr_steps`` on (by default at 2/3 and 8/9).
    decay_at: the earlier name of ``lr_steps``, with a warning.
    flip: probability of a mirror image; 0 where left and right differ in meaning (digits).
    report: called with every step's number and losses.
    The same seed gives the same result for any number of workers.
    """
    if batch_size > len(train):
        raise ValueError(f"batch_size must be at most the {len(train)} images, got {batch_size}")
    indices = trainable(train, TransferDataConfig())
    batch_size = min(batch_size, len(indices))
    if decay_at is not None:
        warnings.warn("fine_tune(decay_at=...) is now called lr_steps", FutureWarning, stacklevel=2)
    lr_steps = lr_steps or decay_at or (steps * 2 // 3, steps * 8 // 9)
    optim = TransferOptimConfig(lr=lr, reference_batch=batch_size, warmup_steps=warmup_steps, lr_steps=lr_steps)
    optimizer = build_sgd(network, optim)
    examples = Examples(train, first_label=first_label(network), flip=flip, seed=seed)
    device = next(network.parameters()).device
    losses = []
    network.train()
    with closing(Prefetcher(max(1, workers), 2)) as prefetcher:
        source = training_batches(examples, indices, batch_size, seed=seed, start=0, stop=steps, prefetcher=prefetcher)
        for step, batch in enumerate(source):
            rate, drawn = optim.rate(step, batch_size), step_seed(seed, step, 0)
            row = train_step(
                network,
                optimizer,
                batch,
                lr=rate,
                seed=drawn,
                device=device,
                autocast=autocast,
                clip_norm=clip_norm,
            )
            losses.append(row["loss"])
            if report is not None:
                report(step + 1, row)
    return losses
