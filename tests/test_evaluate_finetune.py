"""Training with labels: linear classifiers under LARS and at a fixed rate, fine-tuning, the probe's validation."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torchvision
from test_evaluate import TINY, evaluate, refused
from test_evaluate_batches import numbers, run
from tiny_data import write_imagenet
from torch import nn
from torch.nn import functional as F

from scrl_fast.config.schema import load_recipe
from scrl_fast.distributed.world import World
from scrl_fast.errors import UsageError
from scrl_fast.evaluate.config import FinetuneOptions
from scrl_fast.evaluate.datasets import labels_of
from scrl_fast.evaluate.finetune import Classifier, finetune
from scrl_fast.evaluate.images import ImageLoader
from scrl_fast.evaluate.linear import LinearHeads, feature_epochs, fit_heads, scale_by_lars
from scrl_fast.evaluate.probe_validation import ProbeValidation
from scrl_fast.models import build_encoder
from scrl_fast.schedules import learning_rate
from scrl_fast.trainer import SCRLTrainer
from scrl_fast.weights import checkpoint_files


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    return write_imagenet(tmp_path_factory.mktemp("imagenet"), train=16, val=8)


# ---- linear under LARS ----


def test_lars_scales_every_gradient_by_the_norms():
    torch.manual_seed(0)
    values = [torch.randn(4, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64), torch.zeros(2).double()]
    parameters = [nn.Parameter(value) for value in values]
    gradients = [torch.randn_like(value) for value in values]
    for decay in (0.0, 0.1):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        scale_by_lars(parameters, decay)
        for parameter, gradient in zip(parameters[:2], gradients, strict=False):
            norm, slope = parameter.detach().norm(), gradient.norm()
            ratio = 1e-3 * norm / (slope + decay * norm + 1e-8)
            torch.testing.assert_close(parameter.grad, ratio * (gradient + decay * parameter.detach()))
        torch.testing.assert_close(parameters[2].grad, gradients[2])  # a norm of 0: as it is


def test_heads_under_lars_train_as_published():
    """A plain layer: every gradient times its ratio, weight and bias alike, then SGD with Nesterov momentum."""
    torch.manual_seed(0)
    features, labels = torch.randn(40, 6), torch.randint(0, 3, (40,))
    test = torch.randn(9, 6), torch.randint(0, 3, (9,))
    epoch = feature_epochs(features, labels, 8, seed=3)
    plan = {"steps_per_epoch": 5, "epochs": 3, "warmup_epochs": 1}
    (found,) = fit_heads(epoch, test, batch_size=8, classes=3, lrs=[500.0], seed=7, optim="lars", **plan)
    start = LinearHeads(1, 6, 3, seed=7, random_bias=True)
    weight, bias = start.weights[0].detach().clone(), start.biases[0].detach().clone()
    assert bias.abs().min() > 0
    state = [(tensor.requires_grad_(), torch.zeros_like(tensor)) for tensor in (weight, bias)]
    step = 0
    for number in range(3):
        for rows, truth in epoch(number):
            lr = learning_rate(step, base=500.0 * 8 / 256, **plan)
            slopes = torch.autograd.grad(F.cross_entropy(rows @ weight.T + bias, truth), [weight, bias])
            with torch.no_grad():
                for (tensor, momentum), slope in zip(state, slopes, strict=True):
                    scaled = slope * (1e-3 * tensor.norm() / (slope.norm() + 1e-8))
                    momentum.mul_(0.9).add_(scaled)
                    tensor.sub_(lr * (scaled + 0.9 * momentum))
            step += 1
    right = (test[0] @ weight.T + bias).argmax(1) == test[1]
    assert found.last_top1 == pytest.approx(right.double().mean().item())


def test_the_fixed_rate_is_reported_without_a_choice(capsys, tmp_path, imagenet):
    data = ["--data.source=imagenet", f"--data.root={imagenet}", "--size=48", "--batch_size=16", "--augment=none"]
    options = ["--lrs=[4,0.01]", "--fixed_lr=0.3", "--epochs=3"]
    line, document, _ = evaluate(capsys, tmp_path, "linear", *TINY, *data, *options)
    result = document["result"]
    assert [head["lr"] for head in result["heads"]] == [4, 0.01] and result["fixed"]["lr"] == 0.3
    assert line.endswith(f"the best of 2; top-1 {result['fixed']['last_top1']:.2%} at the fixed lr 0.3")
    among = evaluate(capsys, tmp_path, "linear", *TINY, *data, *options, "--fixed_lr=0.01")[1]["result"]
    assert among["fixed"] == among["heads"][1]
    lars = evaluate(capsys, tmp_path, "linear", *TINY, *data, *options, "--optim=lars")
    assert lars[0].startswith("linear under LARS, 3 classes") and lars[1]["result"]["heads"] != result["heads"]
    assert "must be one of sgd, lars" in refused(capsys, "linear", *TINY, "--optim=adam")


# ---- fine-tuning ----


def test_fine_tuning_moves_the_encoder_and_learns(capsys, tmp_path, imagenet):
    data = ["--data.source=imagenet", f"--data.root={imagenet}", "--size=40", "--batch_size=16", "--crop_scale=[0.5,1]"]
    file = tmp_path / "deep" / "tuned.pth"
    command = ["finetune", "--checkpoint=random", "--backbone=resnet18", *data, "--epochs=4", "--lr=0.2"]
    line, document, said = evaluate(capsys, tmp_path, *command, f"--save={file}")
    result = document["result"]
    assert result["last_top1"] > 0.7 and result["classes"] == 3 and result["last_loss"] < 1.1
    assert line.startswith("fine-tuned, 3 classes, 4 epochs at lr 0.2: top-1") and said.count(", top-1 ") == 4
    body = torchvision.models.resnet18(num_classes=3)
    body.load_state_dict(torch.load(file, weights_only=True))
    torch.manual_seed(0)
    assert not torch.equal(body.conv1.weight, build_encoder("resnet18").body.conv1.weight)
    assert "there are 48 training images" in refused(capsys, *command, "--batch_size=64")
    with pytest.raises(SystemExit) as stop:
        evaluate(capsys, tmp_path, *command, "--lr=1e9", "--epochs=2")
    assert stop.value.code == 1 and "lower --lr=1e+09" in capsys.readouterr().err


def test_fine_tuning_is_sgd_on_the_whole_network(imagenet):
    """One epoch equals a plain loop over the same batches."""
    from scrl_fast.data.sources.files import class_folders

    train = class_folders(str(imagenet / "train"))
    options = FinetuneOptions(batch_size=16, epochs=1, lr=0.1, warmup_epochs=0, workers=0, weight_decay=1e-3)
    torch.manual_seed(0)
    ours = Classifier(build_encoder("resnet10_tiny"), 3)
    plain = copy.deepcopy(ours).train()
    loader = ImageLoader(batch_size=16, workers=0)
    loader.views.size = 32
    finetune(ours, loader, train, train, options)
    crops = ImageLoader(copy.deepcopy(loader.views), 16, 0)
    crops.views.recipe, crops.views.scale = "simple", options.crop_scale
    solver = torch.optim.SGD(plain.parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=1e-3)
    import numpy as np

    order = np.random.default_rng([0, 0]).permutation(48)
    for step, batch in enumerate(crops.batches(order)):
        plan = {"steps_per_epoch": 3, "epochs": 1, "warmup_epochs": 0}
        solver.param_groups[0]["lr"] = learning_rate(step, base=0.1 * 16 / 256, **plan)
        labels = torch.from_numpy(labels_of(train)[batch])
        loss = F.cross_entropy(plain(crops.load(train, batch, 0)), labels)
        solver.zero_grad()
        loss.backward()
        solver.step()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_two_processes_fine_tune_as_one(tmp_path):
    write_imagenet(tmp_path, train=8, val=4)
    command = ["finetune", "--checkpoint=random", "--backbone=resnet10_tiny", "--data.source=imagenet"]
    command += [f"--data.root={tmp_path}", "--size=40", "--batch_size=8", "--epochs=2", "--lr=0.02"]
    one, _ = run(command, tmp_path / "one.json", 1)
    two, said = run([*command, f"--save={tmp_path / 'two.pth'}"], tmp_path / "two.json", 2)
    assert numbers(two["result"]) == pytest.approx(numbers(one["result"]), abs=0.1)  # one image of twelve
    assert two["result"]["last_loss"] == pytest.approx(one["result"]["last_loss"], rel=1e-2)
    assert said.count("\n") == 1 and "fc.weight" in torch.load(tmp_path / "two.pth", weights_only=True)


# ---- validation of the online probe ----


def small_run(imagenet, folder, **eval_options):
    config = load_recipe("demo")
    config.data.source, config.data.root, config.data.workers = "imagenet", str(imagenet), 0
    config.views.size, config.boxes.min_size = 40, 12
    config.model.hidden_dim, config.model.projection_dim = 16, 8
    config.train.batch_size, config.train.epochs, config.optim.warmup_epochs = 16, 3, 0
    config.run.dir, config.run.tensorboard, config.run.log_every = str(folder), False, 2
    config.eval.roi_linear = False
    for name, value in eval_options.items():
        setattr(config.eval, name, value)
    return config


def test_the_probe_is_validated_at_every_epoch_and_decides_which_checkpoint_is_best(imagenet, tmp_path, monkeypatch):
    plain = SCRLTrainer(small_run(imagenet, tmp_path / "plain"))
    plain.fit()
    scores = iter([0.25, 0.75, 0.5])
    measured = []
    real = ProbeValidation.top1

    def top1(self, model):
        measured.append(real(self, model))
        return next(scores)

    monkeypatch.setattr(ProbeValidation, "top1", top1)
    trainer = SCRLTrainer(small_run(imagenet, tmp_path / "validated", validation=str(imagenet / "val")))
    trainer.fit()
    assert len(measured) == 3 and all(0 <= score <= 1 for score in measured)
    rows = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row["validation_accuracy"] for row in rows if "validation_accuracy" in row}
    assert found == {3: 0.25, 6: 0.75, 9: 0.5}
    folder = trainer.folder / "checkpoints"
    assert checkpoint_files.load(folder / "best.pt")["step"] == 6
    for (name, ours), theirs in zip(trainer.model.state_dict().items(), plain.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), f"{name}: measuring has changed the training"


def test_the_probe_is_measured_as_by_the_evaluation(capsys, imagenet, tmp_path):
    trainer = SCRLTrainer(small_run(imagenet, tmp_path / "run", validation=str(imagenet / "val")))
    trainer.fit()
    rows = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    data = ["--data.source=imagenet", f"--data.root={imagenet}", "--cache=", "--head=probe"]
    _, document, _ = evaluate(capsys, tmp_path, "linear", f"--checkpoint={trainer.folder}", *data)
    assert rows[-1]["validation_accuracy"] == pytest.approx(document["result"]["top1"], abs=1 / 24 + 1e-9)


def test_validation_images_must_fit(imagenet, tmp_path):
    def refusal(validation, **data):
        config = small_run(imagenet, tmp_path / "run", validation=str(validation))
        for name, value in data.items():
            setattr(config.data, name, value)
        with pytest.raises(UsageError) as error:
            SCRLTrainer(config, world=World())
        return str(error.value)

    assert "no/such' does not exist" in refusal("no/such")
    write_imagenet(tmp_path / "four", train=1, val=1, classes=4)
    assert "'n00000004'" in refusal(tmp_path / "four" / "val")
    assert "have no labels" in refusal(imagenet / "val", source="demo", root="")
