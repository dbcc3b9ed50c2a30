"""The optimizer's groups: which parameters of the models are adapted and decayed, and what is no group."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scrl_fast.models import SCRL
from scrl_fast.optim import LARS, lars_param_groups


def test_the_right_rule_leaves_out_what_has_one_axis() -> None:
    with torch.device("meta"):
        model = SCRL("resnet50", num_classes=10)
    adapted, plain = lars_param_groups(model.named_parameters(), 1e-6)
    assert adapted["adapt"] and adapted["weight_decay"] == 1e-6
    assert not plain["adapt"] and plain["weight_decay"] == 0 and plain.get("grad_scale", 1.0) == 1.0
    assert {p.ndim for p in plain["params"]} == {1} and {p.ndim for p in adapted["params"]} == {2, 4}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(adapted["params"]) + len(plain["params"]) == len(trained)


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_kakaobrain_adapts_seven_batch_norm_weights(prefix: str) -> None:
    with torch.device("meta"):
        model = SCRL("resnet50")
    names = {parameter: name for name, parameter in model.named_parameters()}
    named = [(prefix + name, parameter) for name, parameter in model.named_parameters()]
    adapted, plain = lars_param_groups(named, 1e-6, compat="kakaobrain")
    assert sorted(names[p] for p in adapted["params"] if p.ndim == 1) == [
        "online.encoder.body.bn1.weight",
        *(f"online.encoder.body.layer{k}.0.downsample.1.weight" for k in (1, 2, 3, 4)),
        "online.projector.net.1.weight",
        "predictor.net.1.weight",
    ]
    assert all(p.ndim == 1 for p in plain["params"]) and plain["grad_scale"] == "lr"


def test_a_frozen_network_and_an_empty_group_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.requires_grad_(False)
    model[1].weight.requires_grad_(True)
    groups = lars_param_groups(model.named_parameters(), 1e-6)
    assert [group["params"] for group in groups] == [[model[1].weight]]


def test_a_group_that_is_refused_does_not_stay() -> None:
    optimizer = LARS([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(TypeError, match="weight_decay"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "weight_decay": "1e-4"})
    assert len(optimizer.param_groups) == 1
