"""AdamW as the trainer uses it: torch's own numbers, the attached average, skipped steps, checkpoints, clipping."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_trainer import Pictures, first_batch_group, make_config, make_trainer
from torch import Tensor, nn

from scrl_fast.config.schema import Config
from scrl_fast.errors import UsageError
from scrl_fast.optim import LARS, AdamW
from scrl_fast.trainer import SCRLTrainer
from scrl_fast.weights.training_state import check_training_state


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)]
    return nn.Sequential(*layers).to(dtype)


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    model.zero_grad()
    model(torch.randn(4, 3, 8, 8, generator=generator, dtype=dtype)).square().mean().backward()


def groups_of(model: nn.Module) -> list[dict]:
    *rest, weight, bias = model.parameters()
    probe = {"params": [weight, bias], "adapt": False, "weight_decay": 0.0, "lr": 0.1}
    return [{"params": rest, "weight_decay": 0.1}, probe]


def changed(model: nn.Module, target: nn.Module, optimizer: AdamW) -> list[Tensor]:
    states = [value for state in optimizer.state.values() for value in state.values()]
    return copy.deepcopy([*model.parameters(), *target.parameters(), *states])


@pytest.mark.parametrize("channels_last", [False, True])
def test_five_steps_equal_torchs_adamw_sgd_and_average(channels_last: bool) -> None:
    model, twin = network(), network()
    target, mean = copy.deepcopy(model), copy.deepcopy(model)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = AdamW(groups_of(model), lr=1e-2, betas=(0.8, 0.99), eps=1e-6)
    optimizer.attach_ema(target.parameters(), model.parameters())
    *rest, weight, bias = twin.parameters()
    theirs = torch.optim.AdamW(rest, lr=1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1, foreach=False)
    sgd = torch.optim.SGD([weight, bias], lr=0.1, momentum=0.9)
    for step in range(5):
        for net in (model, twin):
            backward(net, step)
        optimizer.step(ema_momentum=0.9)
        theirs.step()
        sgd.step()
        with torch.no_grad():
            for t, s in zip(mean.parameters(), twin.parameters(), strict=True):
                t.copy_(0.9 * t + 0.1 * s)
    for ours, other in ((model, twin), (target, mean)):
        for a, b in zip(ours.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, -1])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float, place: int) -> None:
    model = network(torch.float32)
    target = copy.deepcopy(model)
    optimizer = AdamW(groups_of(model), lr=1e-2)
    optimizer.attach_ema(target.parameters(), model.parameters())
    backward(model, 0)
    optimizer.step(ema_momentum=0.9)
    before = changed(model, target, optimizer)
    backward(model, 1)
    grad = list(model.parameters())[place].grad
    assert grad is not None
    grad.view(-1)[0] = value
    optimizer.step(ema_momentum=0.9)
    assert optimizer.skipped == 1
    assert all(map(torch.equal, before, changed(model, target, optimizer)))
    backward(model, 1)
    optimizer.step(ema_momentum=0.9)
    assert optimizer.skipped == 1 and not torch.equal(before[0], next(model.parameters()))


def test_a_gradient_that_lies_otherwise_in_memory_is_read_by_its_indices() -> None:
    weight = nn.Parameter(torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last))
    twin = nn.Parameter(weight.detach().clone())
    grad = torch.randn(4, 3, 3, 3)
    weight.grad, twin.grad = grad.clone(), grad.clone()
    AdamW([weight], lr=0.1).step()
    torch.optim.AdamW([twin], lr=0.1, foreach=False).step()
    torch.testing.assert_close(weight, twin)


def test_a_state_goes_on_and_another_optimizers_is_refused_by_name() -> None:
    model, target = network(torch.float32), network(torch.float32)
    optimizer = AdamW(groups_of(model), lr=1e-2)
    for step in range(2):
        backward(model, step)
        optimizer.step()
    copied = copy.deepcopy(model)
    second = AdamW(groups_of(copied), lr=1e-2)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, owner in ((model, optimizer), (copied, second)):
        backward(net, 2)
        owner.step()
    assert all(map(torch.equal, model.parameters(), copied.parameters()))
    lars = LARS(target.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="not a state of AdamW: param_groups\\[0\\] lacks betas"):
        second.load_state_dict(lars.state_dict())
    with pytest.raises(ValueError, match="not a state of LARS"):
        lars.load_state_dict(optimizer.state_dict())
    wrong = copy.deepcopy(optimizer.state_dict())
    wrong["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match="state\\[0\\]\\['exp_avg'\\] is \\[3\\], must be \\[8, 3, 3, 3\\]"):
        second.load_state_dict(wrong)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "lr must be"),
        ({"betas": (0.9, 1.0)}, "betas must be below 1"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"params": [nn.Parameter(torch.zeros(4, 8)[:, :4])]}, "with gaps"),
    ],
)
def test_wrong_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW(**{"params": [nn.Parameter(torch.zeros(2))], "lr": 0.1} | options)


# ---- in the trainer ----


def adamw_trainer(folder, *, num_classes=3, resume="", **optim):
    config = make_config(folder)
    config.optim.name, config.optim.lr, config.optim.weight_decay = "adamw", 1e-3, 0.05
    config.resume = resume
    for name, value in optim.items():
        setattr(config.optim, name, value)
    return SCRLTrainer(config, source=Pictures(num_classes=num_classes))


def test_a_resumed_run_ends_in_the_same_bits(tmp_path) -> None:
    whole = adamw_trainer(tmp_path / "whole", clip_norm=0.5)
    whole.fit()
    first = adamw_trainer(tmp_path / "halves", clip_norm=0.5)
    first.config.train.max_steps = first.last_step = 3
    first.fit()
    second = adamw_trainer(tmp_path / "halves", clip_norm=0.5, resume="auto")
    second.fit()
    assert second.step == whole.step == 6
    assert all(map(torch.equal, whole.model.state_dict().values(), second.model.state_dict().values()))
    for one, two in zip(whole.optimizer.state.values(), second.optimizer.state.values(), strict=True):
        assert one.keys() == two.keys() and all(map(torch.equal, one.values(), two.values()))
    assert "name: adamw" in (tmp_path / "whole" / "config.yaml").read_text()


def test_decay_spares_biases_and_norms_and_the_probe_is_sgds(tmp_path) -> None:
    trainer = adamw_trainer(tmp_path)
    decay = {id(p): g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    for name, parameter in trainer.model.online.named_parameters():
        assert decay[id(parameter)] == (0.05 if parameter.ndim > 1 else 0.0), name
    *networks, probe = trainer.optimizer.param_groups
    assert all(group["adapt"] for group in networks) and not probe["adapt"] and probe["weight_decay"] == 0
    trainer.train_step(first_batch_group(trainer))
    assert set(trainer.optimizer.state[trainer.model.probe.weight]) == {"momentum_buffer"}


def test_a_checkpoint_of_lars_is_not_gone_on_from_with_adamw(tmp_path) -> None:
    make_trainer(tmp_path, max_steps=2).fit()
    with pytest.raises(UsageError, match="not a state of AdamW"):
        adamw_trainer(tmp_path, num_classes=0, resume="auto").fit()


@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_clip_norm_bounds_the_gradient_of_networks_but_not_of_the_probe(tmp_path, name) -> None:
    norms = {}
    for clip in (0.0, 1e-3):
        trainer = adamw_trainer(tmp_path / f"{clip}", name=name, clip_norm=clip)
        seen = []
        step = trainer.optimizer.step

        def noted(step=step, seen=seen, trainer=trainer, **options):
            grads = lambda ps: torch.nn.utils.get_total_norm([p.grad for p in ps]).item()  # noqa: E731
            seen += [grads(trainer.model.trained_parameters()), grads(trainer.model.probe.parameters())]
            step(**options)

        trainer.optimizer.step = noted
        trainer.train_step(first_batch_group(trainer))
        norms[clip] = seen
    assert norms[0.0][0] > 2e-3 and norms[1e-3][0] == pytest.approx(1e-3, rel=1e-3)
    assert norms[0.0][1] == norms[1e-3][1] > 2e-3


def test_the_state_of_adamw_is_checked_before_it_is_used(tmp_path) -> None:
    trainer = adamw_trainer(tmp_path)
    trainer.train_step(first_batch_group(trainer))
    state = trainer.loop.state_dict()
    check_training_state("x.pt", state)
    state["optimizer"]["state"][0]["exp_avg"] = 3.0
    with pytest.raises(UsageError, match="'exp_avg' must be a tensor"):
        check_training_state("x.pt", state)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"optim": {"name": "adam"}}, "optim.name=adam: must be one of lars, adamw"),
        ({"optim": {"clip_norm": -1}}, "optim.clip_norm=-1.0: must be at least 0"),
        ({"optim": {"beta2": 1.0}}, "optim.beta2=1.0: must be from 0 to below 1"),
        ({"optim": {"name": "adamw"}, "compat": "kakaobrain"}, "optim.name=adamw: compat=kakaobrain"),
        ({"optim": {"name": "adamw"}, "init": "x.pt", "init_momentum": True}, "takes the momentum of lars"),
    ],
)
def test_options_that_do_not_go_together_are_named(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Config.from_dict(options)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda whole: pickle.loads(pickle.dumps(whole))])
def test_a_copy_goes_on_with_its_average_and_its_count(copied):
    model, target = network(), network()
    optimizer = AdamW(groups_of(model), lr=0.01)
    optimizer.attach_ema(target.parameters(), model.parameters())
    backward(model, 0)
    next(model.parameters()).grad.fill_(float("nan"))
    optimizer.step(ema_momentum=0.9)
    its_model, its_target, its_optimizer = copied((model, target, optimizer))
    for each, average in ((model, optimizer), (its_model, its_optimizer)):
        backward(each, 1)
        average.step(ema_momentum=0.9)
    assert its_optimizer.skipped == optimizer.skipped == 1
    assert all(map(torch.equal, its_model.parameters(), model.parameters()))
    assert all(map(torch.equal, its_target.parameters(), target.parameters()))
    assert not torch.equal(next(target.parameters()), next(model.parameters()))
