"""LARS as an optimizer: plain steps, groups, schedulers, checkpoints, the attached average, skipped steps."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scrl_fast.optim import LARS, lars_param_groups


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    return layers.to(dtype)


def backward(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    loss = model(torch.randn(4, 3, 8, 8, generator=generator, dtype=dtype)).square().mean()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, **options: Any) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step(**options)


def plain_lars(
    model: nn.Module, steps: int, lr: float, decay: float, target: nn.Module | None = None, ema: float = 1.0
) -> None:
    """LARS over SGD with momentum .9, parameter by parameter, then the average of the parameters."""
    buffers: dict[Tensor, Tensor] = {}
    for step in range(steps):
        model.zero_grad()
        backward(model, step)
        with torch.no_grad():
            for p in model.parameters():
                g = p.grad
                if p.ndim > 1:
                    p_norm, g_norm = p.norm(), g.norm()
                    g = 1e-3 * p_norm / (g_norm + decay * p_norm + 1e-8) * (g + decay * p)
                buffers[p] = 0.9 * buffers[p] + g if p in buffers else g.clone()
                p -= lr * buffers[p]
            for t, s in zip(target.parameters() if target else (), model.parameters(), strict=False):
                t.copy_(ema * t + (1 - ema) * s)


def assert_close(a: nn.Module, b: nn.Module, tolerance: float = 1e-12) -> None:
    for ours, theirs in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# ---- steps ----


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_ten_steps_with_average_equal_the_plain_loop(dtype: torch.dtype, tolerance: float, channels_last: bool) -> None:
    model, plain = network(dtype=dtype), network(dtype=dtype)
    target, plain_target = copy.deepcopy(model), copy.deepcopy(plain)
    if channels_last:
        model, target = (m.to(memory_format=torch.channels_last) for m in (model, target))
    optimizer = LARS(lars_param_groups(model.named_parameters(), 1e-2), lr=0.5)
    optimizer.attach_ema(list(target.parameters()), list(model.parameters()))
    train(model, optimizer, range(10), ema_momentum=0.9)
    plain_lars(plain, 10, 0.5, 1e-2, plain_target, 0.9)
    assert_close(model, plain, tolerance)
    assert_close(target, plain_target, tolerance)


def test_step_without_ema_momentum_leaves_the_average_alone() -> None:
    model, target = network(), network(1)
    before = copy.deepcopy(target)
    optimizer = LARS(model.parameters(), lr=0.1)
    optimizer.attach_ema(list(target.parameters()), list(model.parameters()))
    train(model, optimizer, range(2))
    assert_close(target, before, 0)


def test_parameters_without_gradient_stay_and_are_averaged() -> None:
    model, target = network(), network(1)
    elsewhere, its_target = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    bias, target_bias = model[0].bias, target[0].bias.clone()
    frozen = bias.detach().clone()
    optimizer = LARS(model.parameters(), lr=0.1)
    optimizer.attach_ema([*target.parameters(), its_target], [*model.parameters(), elsewhere])
    backward(model, 0)
    bias.grad = None
    optimizer.step(ema_momentum=0.75)
    assert torch.equal(bias, frozen) and bias not in optimizer.state
    torch.testing.assert_close(target[0].bias, 0.75 * target_bias + 0.25 * frozen)
    assert its_target.tolist() == [0.25] * 3


def test_no_gradients_at_all() -> None:
    model = network()
    before = copy.deepcopy(model)
    optimizer = LARS(model.parameters(), lr=0.1, skip_nonfinite=True)
    optimizer.step()
    assert_close(model, before, 0)


def test_closure_is_called_with_gradients_enabled_and_its_loss_returned() -> None:
    model, plain = network(), network()
    optimizer = LARS(lars_param_groups(model.named_parameters(), 1e-2), lr=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model, 0)

    with torch.no_grad():
        loss = optimizer.step(closure)
    plain_lars(plain, 1, 0.5, 1e-2)
    assert_close(model, plain)
    assert loss.requires_grad and loss.item() > 0


# ---- groups and schedulers ----


def test_each_group_has_its_own_numbers() -> None:
    model, alone = network(), network()
    first, *rest = model.parameters()
    numbers = {"lr": 0.25, "momentum": 0.5, "weight_decay": 0.1, "trust_coefficient": 0.01, "eps": 0.1, "adapt": True}
    optimizer = LARS([{"params": [first], **numbers}, {"params": rest}], lr=0.125, weight_decay=1e-3)
    train(model, optimizer, range(3))
    start = copy.deepcopy(alone)
    options = dict(numbers)
    del options["adapt"]
    reference = LARS([next(iter(alone.parameters()))], **options)
    others = LARS(list(alone.parameters())[1:], lr=0.125, weight_decay=1e-3)
    for step in range(3):
        alone.zero_grad()
        backward(alone, step)
        reference.step()
        others.step()
    assert_close(model, alone)
    assert not torch.equal(first, next(iter(start.parameters())))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_torch_schedulers_drive_it(as_tensor: bool) -> None:
    model, plain = network(), network()
    lr = torch.tensor(0.5, dtype=torch.float64) if as_tensor else 0.5
    optimizer = LARS([{"params": [p]} for p in model.parameters()], lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    by_hand = LARS(plain.parameters(), lr=0.5)
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        scheduler.step()
        by_hand.param_groups[0]["lr"] = 0.25 * (1 + math.cos(math.pi * step / 4))
        train(plain, by_hand, range(step, step + 1))
    assert_close(model, plain)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0, abs=1e-12)


def test_groups_may_differ_in_lr_tensor() -> None:
    model, plain = network(), network()
    rates = [0.125 * (i + 1) for i, _ in enumerate(model.parameters())]
    groups = [{"params": [p], "lr": torch.tensor(r)} for p, r in zip(model.parameters(), rates, strict=True)]
    train(model, LARS(groups, lr=0.1), range(2))
    groups = [{"params": [p], "lr": r} for p, r in zip(plain.parameters(), rates, strict=True)]
    train(plain, LARS(groups, lr=0.1), range(2))
    assert_close(model, plain)


def test_kakaobrain_multiplies_plain_gradients_by_lr_twice() -> None:
    model, before = network(), network()
    groups = lars_param_groups(model.named_parameters(), 1e-6, compat="kakaobrain")
    optimizer = LARS(groups, lr=0.25)
    backward(model, 0)
    optimizer.step()
    torch.testing.assert_close(model[0].bias, before[0].bias - 0.25**2 * model[0].bias.grad, rtol=1e-12, atol=0)


def test_a_group_may_be_without_parameters() -> None:
    model, plain = network(), network()
    optimizer = LARS([{"params": []}, {"params": model.parameters()}], lr=0.1)
    assert optimizer.skipped.device == model[0].weight.device
    train(model, optimizer, range(2))
    train(plain, LARS(plain.parameters(), lr=0.1), range(2))
    assert_close(model, plain, 0)


def test_a_tied_pair_may_be_attached_twice() -> None:
    model, target = network(), network(1)
    again, its_target = network(), network(1)
    for each, average, times in ((model, target, 1), (again, its_target, 2)):
        optimizer = LARS(each.parameters(), lr=0.1)
        optimizer.attach_ema(list(average.parameters()) * times, list(each.parameters()) * times)
        train(each, optimizer, range(2), ema_momentum=0.5)
    assert_close(its_target, target, 0)


# ---- checkpoints ----


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_saved_and_loaded_state_continues_to_the_bit(as_tensor: bool) -> None:
    def build(seed: int) -> tuple[nn.Module, LARS]:
        model = network(seed)
        lr = torch.tensor(0.5) if as_tensor else 0.5
        return model, LARS(lars_param_groups(model.named_parameters(), 1e-2, compat="kakaobrain"), lr=lr)

    model, optimizer = build(0)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other, resumed = build(1)
    other.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert_close(other, model, 0)
    assert resumed.param_groups[1]["grad_scale"] == "lr" and not resumed.param_groups[1]["adapt"]


def test_a_copy_goes_on_with_copies() -> None:
    model, target = network(), network(1)
    optimizer = LARS(model.parameters(), lr=0.1, skip_nonfinite=True)
    optimizer.attach_ema(list(target.parameters()), list(model.parameters()))
    train(model, optimizer, range(2), ema_momentum=0.5)
    assert "trust_coefficient: 0.001" in repr(copy.deepcopy(optimizer))
    before = copy.deepcopy(model)
    copied = copy.deepcopy((model, target, optimizer))
    pickled = pickle.loads(pickle.dumps((model, target, optimizer)))
    train(copied[0], copied[2], range(2, 4), ema_momentum=0.5)
    assert_close(model, before, 0)
    for other, its_target, its_optimizer in ((model, target, optimizer), pickled):
        if other is not copied[0]:
            train(other, its_optimizer, range(2, 4), ema_momentum=0.5)
        assert_close(other, copied[0], 0)
        assert_close(its_target, copied[1], 0)
        assert its_optimizer.skipped.item() == 0


# ---- what a step remembers of the one before ----


def other_memory(model: nn.Module, target: nn.Module, optimizer: LARS) -> None:
    for p in [*model.parameters(), *target.parameters()]:
        p.data = p.data.clone()


def other_layout(model: nn.Module, target: nn.Module, optimizer: LARS) -> None:
    model.to(memory_format=torch.channels_last)


def forgotten_momentum(model: nn.Module, target: nn.Module, optimizer: LARS) -> None:
    optimizer.state.clear()


def exchanged_momentum(model: nn.Module, target: nn.Module, optimizer: LARS) -> None:
    optimizer.state[model[1].bias], optimizer.state[model[1].weight] = (
        optimizer.state[model[1].weight],
        optimizer.state[model[1].bias],
    )


def frozen_layer(model: nn.Module, target: nn.Module, optimizer: LARS) -> None:
    model[0].requires_grad_(False)


def moved_group(model: nn.Module, target: nn.Module, optimizer: LARS) -> None:
    moved = optimizer.param_groups[0]["params"].pop()
    optimizer.add_param_group({"params": [moved], "lr": 0.25})


def fewer_averages(model: nn.Module, target: nn.Module, optimizer: LARS) -> None:
    optimizer.attach_ema([target[0].weight], [model[0].weight])


CHANGES = [
    other_memory,
    other_layout,
    forgotten_momentum,
    exchanged_momentum,
    frozen_layer,
    moved_group,
    fewer_averages,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_steps_is_seen(change: Callable[[nn.Module, nn.Module, LARS], None]) -> None:
    """An optimizer that went through a step before the change steps as one that is new after it."""
    model, target = network(), network(1)
    optimizer = LARS(lars_param_groups(model.named_parameters(), 1e-2), lr=0.5)
    optimizer.attach_ema(list(target.parameters()), list(model.parameters()))
    train(model, optimizer, range(2), ema_momentum=0.5)
    new_model, new_target, new = copy.deepcopy((model, target, optimizer))
    assert new._matched is None and optimizer._matched is not None
    for each in ((model, target, optimizer), (new_model, new_target, new)):
        change(*each)
        train(each[0], each[2], range(2, 4), ema_momentum=0.5)
    assert_close(model, new_model, 0)
    assert_close(target, new_target, 0)


# ---- steps that are skipped ----


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_nothing_and_is_counted(bad: float) -> None:
    model, target = network(), network(1)
    elsewhere, its_target = torch.ones(3), torch.zeros(3)
    optimizer = LARS(lars_param_groups(model.named_parameters(), 1e-2), lr=0.5, skip_nonfinite=True)
    optimizer.attach_ema([*target.parameters(), its_target], [*model.parameters(), elsewhere])
    train(model, optimizer, range(2), ema_momentum=0.5)
    assert optimizer.skipped.item() == 0
    before = [copy.deepcopy(x) for x in (model, target, dict(optimizer.state), its_target)]
    for count in (1, 2):
        backward(model, 2)
        model[1].bias.grad[3] = bad
        optimizer.step(ema_momentum=0.5)
        assert optimizer.skipped.item() == count
    assert_close(model, before[0], 0)
    assert_close(target, before[1], 0)
    assert torch.equal(its_target, before[3])
    for old, new in zip(before[2].values(), optimizer.state.values(), strict=True):
        assert torch.equal(old["momentum_buffer"], new["momentum_buffer"])
    train(model, optimizer, range(3, 4), ema_momentum=0.5)
    assert optimizer.skipped.item() == 2 and its_target.tolist() == [0.875] * 3


def test_without_skipping_the_counter_stays() -> None:
    model = network()
    optimizer = LARS(model.parameters(), lr=0.5)
    backward(model, 0)
    model[1].bias.grad[3] = float("nan")
    optimizer.step()
    assert optimizer.skipped.item() == 0 and model[1].bias.isnan().any()


# ---- wrong input ----

ONE = nn.Parameter(torch.ones(3))
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -1.0}, ValueError, "lr must be in [0, inf], got -1.0"),
    ({"lr": "fast"}, TypeError, "lr must be a number, got 'fast'"),
    ({"momentum": float("nan")}, ValueError, "momentum must be in [0, inf], got nan"),
    ({"weight_decay": -1e-6}, ValueError, "weight_decay must be in [0, inf], got -1e-06"),
    ({"trust_coefficient": None}, TypeError, "trust_coefficient must be a number, got None"),
    ({"eps": -1e-8}, ValueError, "eps must be in [0, inf], got -1e-08"),
    ({"weight_decay": torch.ones(())}, TypeError, "weight_decay must be a number, got Tensor"),
    ({"trust_coefficient": torch.ones(())}, TypeError, "trust_coefficient must be a number, got Tensor"),
    ({"eps": torch.ones(())}, TypeError, "eps must be a number, got Tensor"),
    (
        {"params": [{"params": [ONE], "grad_scale": torch.ones(())}]},
        TypeError,
        "grad_scale must be a number, got Tensor",
    ),
    ({"params": [{"params": [ONE], "adapt": 1}]}, TypeError, "adapt must be True or False, got 1"),
    ({"params": [{"params": [ONE], "grad_scale": "lr2"}]}, TypeError, "grad_scale must be a number, got 'lr2'"),
    ({"params": []}, ValueError, "optimizer got an empty parameter list"),
]


@pytest.mark.parametrize("wrong, error, message", WRONG, ids=[message for _, _, message in WRONG])
def test_wrong_numbers_are_named(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        LARS(**({"params": [ONE], "lr": 0.1} | wrong))


def test_wrong_averages_are_named() -> None:
    optimizer = LARS([ONE], lr=0.1)
    with pytest.raises(ValueError, match=re.escape("sources[2] is sources[0], with another target: a source has one")):
        optimizer.attach_ema([torch.ones(3), torch.ones(3), torch.ones(3)], [ONE, torch.ones(3), ONE])
    with pytest.raises(ValueError, match="attach_ema was not called"):
        optimizer.step(ema_momentum=0.5)
    with pytest.raises(ValueError, match=re.escape("sources[0] has shape [3], targets[0] has [2]")):
        optimizer.attach_ema([torch.ones(2)], [ONE])
    optimizer.attach_ema([torch.ones(3)], [ONE])
    with pytest.raises(ValueError, match=re.escape("ema_momentum must be in [0, 1], got 2")):
        optimizer.step(ema_momentum=2)
    with pytest.raises(ValueError, match="compat must be none or kakaobrain, got 'kakao'"):
        lars_param_groups([], 0.0, compat="kakao")  # type: ignore[arg-type]
