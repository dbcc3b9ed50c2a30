"""LARS under torch.compile."""

from __future__ import annotations

import copy

import torch
from torch import nn

from scrl_fast.optim import LARS


def test_the_first_step_may_be_a_compiled_one() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    target, optimizer = copy.deepcopy(model), LARS(model.parameters(), lr=0.1, weight_decay=0.1)
    optimizer.attach_ema(list(target.parameters()), list(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    eager_model, eager_target, eager = copy.deepcopy((model, target, optimizer))
    for parameter, other in zip(model.parameters(), eager_model.parameters(), strict=True):
        other.grad = parameter.grad
    torch._dynamo.reset()
    step = torch.compile(lambda: optimizer.step(ema_momentum=0.5), backend="aot_eager")
    for _ in range(2):
        step()
        eager.step(ema_momentum=0.5)
    for ours, theirs in ((model, eager_model), (target, eager_target)):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
