"""Linear evaluation: many linear classifiers, one a learning rate, trained together on one frozen encoder.

The published protocol: SGD with Nesterov momentum 0.9, no weight decay, linear warm-up and cosine per step, 80 epochs
of random crops and flips; top-1 and top-5 on centre crops, of the last epoch and of the best. The published
implementation scales the gradients of weight and bias by LARS first, which ``optim="lars"`` does too.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from scrl_fast.models.heads import classification
from scrl_fast.schedules import learning_rate

MOMENTUM = 0.9
TRUST_COEFFICIENT, LARS_EPS = 1e-3, 1e-8
TEST_ROWS = 4096

Batches = Generator[tuple[Tensor, Tensor], None, None]
Epoch = Callable[[int], Batches]
"""From the epoch's number to its batches: features ``[b, D]`` and labels ``[b]``. Close them: a thread may serve them.
"""


@dataclass(frozen=True)
class HeadResult:
    """One classifier. Shares of the test images, 0 to 1."""

    lr: float
    """For 256 images."""
    last_top1: float
    last_top5: float
    best_top1: float
    best_top5: float
    """Of the epoch with the best top-1."""
    best_epoch: int
    """From 1."""


class LinearHeads(nn.Module):
    """Several linear classifiers side by side: ``[b, D] -> [heads, b, classes]`` in one product.

    random_bias: draw the biases like the weights instead of starting at 0. LARS needs it: it moves a tensor by a
    share of the tensor's norm.
    """

    def __init__(self, heads: int, dimensions: int, classes: int, seed: int = 0, *, random_bias: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.empty(classes, dimensions).uniform_(-1, 1, generator=generator) / dimensions**0.5
        bias = torch.zeros(classes)
        if random_bias:
            bias.uniform_(-1, 1, generator=generator).div_(dimensions**0.5)
        # all start alike: they differ by their learning rate alone
        self.weights = nn.ParameterList([weight.clone() for _ in range(heads)])
        self.biases = nn.ParameterList([bias.clone() for _ in range(heads)])

    def forward(self, features: Tensor) -> Tensor:
        weight, bias = torch.cat(list(self.weights)), torch.cat(list(self.biases))
        logits = nn.functional.linear(features, weight, bias)
        return logits.view(len(features), len(self.weights), -1).transpose(0, 1)

    def groups(self, rates: Sequence[float]) -> list[dict]:
        """A parameter group a head, with its peak learning rate."""
        pairs = zip(self.weights, self.biases, rates, strict=True)
        return [{"params": [weight, bias], "peak_lr": rate} for weight, bias, rate in pairs]


def fit_heads(
    train: Epoch,
    test: tuple[Tensor, Tensor],
    *,
    steps_per_epoch: int,
    batch_size: int,
    classes: int,
    lrs: Sequence[float],
    epochs: int = 80,
    warmup_epochs: float = 5,
    optim: Literal["sgd", "lars"] = "sgd",
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> list[HeadResult]:
    """Train a head for every learning rate on the same batches; test them all after every epoch.

    test: features ``[M, D]`` and labels ``[M]``. lrs: for 256 images, scaled by the batch.
    optim: lars scales each gradient by `scale_by_lars` before the step of SGD.
    """
    features, labels = test
    heads = LinearHeads(len(lrs), features.shape[1], classes, seed, random_bias=optim == "lars").to(features.device)
    groups = heads.groups([lr * batch_size / 256 for lr in lrs])
    solver = torch.optim.SGD(groups, lr=1.0, momentum=MOMENTUM, nesterov=True)
    history: list[Tensor] = []
    step = 0
    for epoch in range(epochs):
        with closing(train(epoch)) as batches:
            for rows, truth in batches:
                for group in solver.param_groups:
                    group["lr"] = learning_rate(
                        step,
                        base=group["peak_lr"],
                        steps_per_epoch=steps_per_epoch,
                        epochs=epochs,
                        warmup_epochs=min(warmup_epochs, epochs / 2),
                    )
                solver.zero_grad(set_to_none=True)
                classification(heads(rows), truth)[0].sum().backward()  # of each head's loss only its own weights know
                if optim == "lars":
                    scale_by_lars(heads.parameters())
                solver.step()
                step += 1
        history.append(accuracies(heads, features, labels))
        progress(f"epoch {epoch + 1}/{epochs}: top-1 {', '.join(f'{v:.2%}' for v in history[-1][:, 0].tolist())}")
    return [_result(lr, torch.stack(history)[:, i]) for i, lr in enumerate(lrs)]


@torch.no_grad()
def scale_by_lars(parameters: Iterable[Tensor], weight_decay: float = 0.0) -> None:
    """Replace each gradient g of p by ``a (g + weight_decay p)``, a = ``0.001 |p| / (|g| + weight_decay |p| + 1e-8)``.

    a is 1 where a norm is 0. The momentum that follows is SGD's, which may be Nesterov's; `scrl_fast.optim.LARS` has
    none of that kind. Every tensor is scaled, as the published implementation does in evaluation.
    """
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            norm, gradient_norm = parameter.norm(), gradient.norm()
            ratio = TRUST_COEFFICIENT * norm / (gradient_norm + weight_decay * norm + LARS_EPS)
            ratio = torch.where((norm > 0) & (gradient_norm > 0), ratio, torch.ones_like(ratio))
            gradient.add_(parameter, alpha=weight_decay).mul_(ratio)


def _result(lr: float, history: Tensor) -> HeadResult:
    best = int(history[:, 0].argmax())
    (last1, last5), (best1, best5) = history[-1].tolist(), history[best].tolist()
    return HeadResult(lr, last1, last5, best1, best5, best + 1)


@torch.no_grad()
def accuracies(head: Callable[[Tensor], Tensor], features: Tensor, labels: Tensor) -> Tensor:
    """Top-1 and top-5 of every head, float64 ``[heads, 2]``. head: ``[b, D] -> [heads, b, classes]``."""
    hits = torch.zeros(())
    for first in range(0, len(features), TEST_ROWS):
        found = top_hits(head(features[first : first + TEST_ROWS]), labels[first : first + TEST_ROWS])
        hits = hits.to(found.device) + found
    return hits.double().cpu() / len(features)


def top_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """How many rows have their label first, and among the first five: ``[..., b, classes] -> [..., 2]``."""
    ranked = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels[:, None]
    return torch.stack([ranked[..., 0].sum(-1), ranked.any(-1).sum(-1)], dim=-1)


def feature_epochs(features: Tensor, labels: Tensor, batch_size: int, seed: int = 0) -> Epoch:
    """Epochs over features that were extracted once: a new order each, the last batch left out if it is short."""
    size = min(batch_size, len(features))

    def epoch(number: int) -> Batches:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for first in range(0, len(features) - size + 1, size):
            at = order[first : first + size]
            yield features[at], labels[at]

    return epoch
