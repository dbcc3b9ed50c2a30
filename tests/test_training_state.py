"""A checkpoint whose sections are of another kind than a run can go on from is refused by name, before it is used."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch

from scrl_fast.run.checkpoint import load_optimizer_state
from scrl_fast.weights.errors import CheckpointError
from scrl_fast.weights.training_state import check_training_state


def pretraining():
    return {
        "model": {"online": {"w": torch.zeros(2)}, "target": {"w": torch.zeros(2)}, "predictor": {}, "probe": None},
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.zeros(2)}},
            "param_groups": [{"lr": 0.1, "params": [0]}, {"lr": 0.1, "params": []}],
        },
        "step": 3,
        "epoch": 0,
        "config": {"train": {"seed": 1, "precision": "bf16"}, "views": {"mean": (0.5, 0.5)}, "init": ""},
        "rng": {"torch": torch.get_rng_state()},
        "loader": {"epoch": 0, "batch": 3, "world_size": 1, "processes": [{"bad": {0: ["a.jpg"]}}]},
        "version": "0.1.0",
        "data": {"images": 5, "names": "0" * 64},
        "log": {"pending": [[0.5, 1.0]], "scores": [0.25], "best": -math.inf},
    }


def transfer():
    state = pretraining() | {"model": {"body.w": torch.zeros(2)}, "log": {"pending": [{"loss": 0.5}]}}
    state |= {"categories": {"names": ["fish", "stingray"], "ids": [0, "7"]}}
    return state | {"rng": {"scaler": {"scale": 65536.0, "_growth_tracker": 0}}}


@pytest.mark.parametrize("make", [pretraining, transfer])
def test_what_runs_write_passes(make):
    check_training_state("a.pt", make())
    check_training_state("a.pt", {**make(), "data": {}, "config": {"train": {"threads": 4096}}})
    check_training_state("a.pt", {**make(), "loader": {"world_size": 2, "bad": {3: []}}})  # from before `processes`


@pytest.mark.parametrize(
    "place, value, message",
    [
        *(("step", value, r"step cannot be used: must be a whole number") for value in (-1, 1.0, math.nan, True, "3")),
        ("step", 1 << 53, "is 9007199254740992"),
        ("step", torch.tensor(3), "is a Tensor"),
        ("epoch", None, "epoch cannot be used"),
        ("version", 3, "must be text"),
        ("config", "train:", r"config cannot be used: must be a dict, is 'train:'"),
        ("config.train.seed", torch.zeros(1), "'train' 'seed' must be a plain value, is a Tensor"),
        ("config.train", {1: 2}, "'train' has the key 1"),
        *(
            ("config.train.threads", value, f"train.threads must be a whole number from 0 to 4096, is {value!r}")
            for value in ("x", -3, 2.5, 10**6, True, None)
        ),
        ("data", 5, "data cannot be used: must be a dict, is 5"),
        ("data.images", "5", "images must be a whole number from 0"),
        ("data.names", ["a"], "names must be text, is a list"),
        ("model", [], "model cannot be used: must be a dict"),
        ("model.online.w", 3.0, "'online' 'w' must be a tensor, is 3.0"),
        ("model.online", {0: torch.zeros(1)}, "'online' has the key 0"),
        ("model.target", "x", "'target' must be a dict"),
        ("optimizer", {"state": {}}, "a dict of 'state' and 'param_groups'"),
        ("optimizer.param_groups", {}, "'param_groups' must be a list"),
        ("optimizer.param_groups", [{"params": [-1]}], "'params' of a group"),
        ("optimizer.state", {"0": {}}, "has the key '0'"),
        ("optimizer.state", {0: {"momentum_buffer": [1]}}, "'momentum_buffer' is a list"),
        *(
            ("optimizer.state", {0: {"momentum_buffer": value}}, f"'momentum_buffer' must be a tensor, is {value!r}")
            for value in ("x", None, 3, 0.5)
        ),
        ("rng", 7, "rng cannot be used"),
        ("rng.torch", torch.zeros(16, dtype=torch.uint8), "state of torch's generator"),
        ("rng.torch", torch.zeros(5056), "state of torch's generator"),
        ("rng.torch", "seed", "is 'seed'"),
        ("rng.scaler", {"scale": math.inf}, "'scaler' 'scale' must be a finite number"),
        ("loader", [], "loader cannot be used"),
        ("loader.batch", -2, "batch must be a whole number from 0"),
        ("loader.world_size", 0, "world_size must be a whole number from 1"),
        ("loader.processes", "ab", "'processes' must be a list"),
        ("loader.processes", [{"bad": {0: [1]}}], "'bad' 0 must be names"),
        ("loader.processes", [{"bad": {"0": []}}], "'bad' has the key '0'"),
        ("categories", ["fish"], "must be a dict of 'names' and 'ids'"),
        ("categories", {"names": ["fish"], "ids": [1, 2]}, "'ids' must be a list of as many"),
        ("categories", {"names": [1], "ids": [1]}, "'names' must be a list of text"),
        ("log", 3, "log cannot be used"),
        ("log.pending", [3], "'pending' must be a list of rows"),
        ("log.pending", [["a"]], "must hold numbers"),
        ("log.best", "high", "must hold numbers"),
    ],
)
def test_other_kinds_are_named(place, value, message):
    state = copy.deepcopy(pretraining())
    *parents, name = place.split(".")
    inner = state
    for parent in parents:
        inner = inner[parent]
    inner[name] = value
    with pytest.raises(
        CheckpointError, match=rf"^a\.pt: the checkpoint's {place.split('.')[0]} cannot be used: .*"
    ) as refused:
        check_training_state("a.pt", state)
    assert re.search(message, str(refused.value))


@pytest.mark.parametrize(
    "buffer, found",
    [(torch.tensor(1.0), r"\[\]"), (torch.ones(3), r"\[3\]"), ("x", "str"), (None, "NoneType"), (1, "int")],
)
def test_momentum_of_another_shape_is_named(buffer, found):
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    state = {**optimizer.state_dict(), "state": {0: {"momentum_buffer": buffer}}}
    with pytest.raises(
        CheckpointError, match=rf"optimizer cannot be used \(momentum_buffer is {found} for a parameter"
    ):
        load_optimizer_state(optimizer, state, step=1)
