"""One training step on a tiny network: odd batches, accumulation, schedules, the probe, broken numbers, memory."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import traceback

import pytest
import torch
from tiny_trainer import Pictures, first_batch, first_batch_group, make_config, make_trainer, state_of, with_boxes
from torch.utils._python_dispatch import TorchDispatchMode

from scrl_fast import trainer as trainer_module
from scrl_fast.data import Loader
from scrl_fast.schedules import ema_momentum, learning_rate
from scrl_fast.trainer import NonFiniteError, SCRLTrainer

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.mark.parametrize("count", [0, 1])
def test_a_batch_with_no_box_or_one_trains_on(tmp_path, count):
    trainer = make_trainer(tmp_path)
    batch = first_batch(trainer)
    for boxes in (with_boxes(batch, count), batch):
        trainer.train_step([boxes])
    (few, *_), (loss, *_) = trainer.meter.drain()
    assert few == 0 if count == 0 else 0 <= few <= 8
    assert 0 < loss < 8
    assert all(torch.isfinite(value).all() for value in state_of(trainer))


@pytest.mark.parametrize("method", ["scrl", "byol"])
def test_a_batch_of_one_image_trains(tmp_path, method):
    config = make_config(tmp_path, batch_size=1)
    config.model.method = method
    trainer = SCRLTrainer(config, source=Pictures())
    trainer.train_step([first_batch(trainer)])
    assert math.isfinite(trainer.meter.drain()[0][0])


@pytest.mark.parametrize("bf16, packed", [(False, False), (True, False), (False, True)])
def test_what_the_loader_hands_to_a_gpu_becomes_views_on_the_way_to_the_step(tmp_path, monkeypatch, bf16, packed):
    plain = make_trainer(tmp_path / "a")
    as_for_a_gpu = {"dtype": torch.uint8, "packed": packed}
    monkeypatch.setattr(trainer_module, "Loader", lambda *args, **given: Loader(*args, **given | as_for_a_gpu))
    levels = make_trainer(tmp_path / "b", precision="bf16" if bf16 else "fp32")
    expected, found = first_batch(plain).views, first_batch(levels).views
    dtype = torch.bfloat16 if bf16 else torch.float32
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected.to(dtype), rtol=2**-8 if bf16 else 0, atol=1e-6)


@pytest.mark.parametrize("counts", [(5, 2), (4, 0)])
def test_accumulation_is_the_mean_over_the_pairs_of_all_batches(tmp_path, counts):
    trainer = make_trainer(tmp_path, accumulate=2)
    trainer.model.double()
    stream = trainer.batches()
    batches = [with_boxes(batch, count) for batch, count in zip(next(stream), counts, strict=True)]
    stream.close()
    for batch in batches:
        batch.views = batch.views.double()
    model = copy.deepcopy(trainer.model)
    sums = [model(batch.views, batch.boxes).loss * count for batch, count in zip(batches, counts, strict=True)]
    (sum(sums) / sum(counts)).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    seen = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.extend(p.grad.clone() for p in trainer.model.parameters() if p.requires_grad)
    )
    trainer.train_step(batches)
    assert trainer.meter.drain()[0][0] == pytest.approx(sum(sums).item() / sum(counts), rel=1e-12)
    largest = max(gradient.abs().max().item() for gradient in gradients)  # some are 0 but for rounding
    for ours, exact in zip(seen, gradients, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12 * largest)


def test_schedules_follow_the_step_and_the_global_batch(tmp_path):
    trainer = make_trainer(tmp_path, epochs=3, accumulate=2, batch_size=3)  # 12 images: 2 steps an epoch
    trainer.config.optim.ema_momentum = 0.9
    batch = first_batch_group(trainer)
    plan = {"steps_per_epoch": 2, "epochs": 3, "warmup_epochs": 1}
    for step in range(6):
        trainer.train_step(batch)
        assert trainer.optimizer.param_groups[0]["lr"] == learning_rate(step, base=0.45 * 6 / 256, **plan)
        assert trainer.momentum == ema_momentum(step, base=0.9, total_steps=6)


def test_the_probe_learns_from_labels_and_moves_nothing_else(tmp_path):
    weights = []
    for classes, folder in ((3, "labelled"), (0, "unlabelled")):
        trainer = make_trainer(tmp_path / folder, Pictures(num_classes=classes))
        if classes:
            before = trainer.model.probe.weight.clone()
        for _ in range(2):
            trainer.train_step([first_batch(trainer)])
        weights.append(trainer.model.online.state_dict())
        if classes:
            assert not torch.equal(trainer.model.probe.weight, before)
            assert {row[3] for row in trainer.meter.drain()} == {8.0}  # both views of four images are counted
    for labelled, unlabelled in zip(*(part.values() for part in weights), strict=True):
        assert torch.equal(labelled, unlabelled)


def test_compat_takes_a_random_target_and_the_probe_under_lars(tmp_path):
    config = make_config(tmp_path)
    config.compat = "kakaobrain"
    trainer = SCRLTrainer(config, source=Pictures(num_classes=3))
    assert not torch.equal(trainer.model.target.projector.net[0].weight, trainer.model.online.projector.net[0].weight)
    adapted = [p for group in trainer.optimizer.param_groups if group["adapt"] for p in group["params"]]
    assert any(p is trainer.model.probe.weight for p in adapted)
    assert len(trainer.optimizer.param_groups) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_batch_changes_no_parameter(tmp_path, value):
    trainer = make_trainer(tmp_path, Pictures(num_classes=3))
    batch = first_batch(trainer)
    trainer.train_step([batch])
    parameters = copy.deepcopy(list(trainer.model.parameters()))
    buffers = copy.deepcopy([state["momentum_buffer"] for state in trainer.optimizer.state.values()])
    broken = dataclasses.replace(batch, views=batch.views.clone())
    broken.views[0, 0, 0, 0] = value
    trainer.train_step([broken])
    for ours, before in zip(trainer.model.parameters(), parameters, strict=True):
        assert torch.equal(ours, before)
    for state, before in zip(trainer.optimizer.state.values(), buffers, strict=True):
        assert torch.equal(state["momentum_buffer"], before)
    with pytest.raises(NonFiniteError, match=r"step 2: .*no checkpoint was written yet"):
        trainer.read_meter()


class Reads(TorchDispatchMode):
    """Collects which functions of the package ask for a tensor's value, which on a GPU would stop the CPU."""

    def __init__(self):
        super().__init__()
        self.readers = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if str(operation).startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal")):
            frames = [f for f in traceback.extract_stack() if f"{os.sep}scrl_fast{os.sep}" in f.filename]
            self.readers |= {f"{os.path.basename(frame.filename)} {frame.name}" for frame in frames[-1:]}
        return operation(*args, **kwargs or {})

    def counting(self, method):
        def read(tensor):
            self.readers.add(method.__name__)
            return method(tensor)

        return read


def test_a_step_reads_nothing_back_from_the_device(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, Pictures(num_classes=3), accumulate=2)
    batches = first_batch_group(trainer)
    trainer.train_step(batches)
    with Reads() as reads:
        monkeypatch.setattr(torch.Tensor, "tolist", reads.counting(torch.Tensor.tolist))
        trainer.train_step(batches)
    # the loss looks at the incoming gradient on a CPU, where that costs nothing, and only there
    assert reads.readers <= {"normalized_mse_loss.py _scaled"}
    with reads:
        trainer.read_meter()
    assert "tolist" in reads.readers  # the net does catch


def test_bf16_runs_and_keeps_float32_weights(tmp_path):
    trainer = make_trainer(tmp_path, Pictures(num_classes=3), precision="bf16")
    before = trainer.model.online.encoder.body.conv1.weight.clone()
    features = []
    trainer.model.online.encoder.register_forward_hook(lambda module, args, found: features.append(found.dtype))
    for _ in range(2):
        trainer.train_step([first_batch(trainer)])
    assert features == [torch.bfloat16] * 2 and trainer.projections.dtype == torch.float32  # heads on a CPU
    assert not torch.equal(trainer.model.online.encoder.body.conv1.weight, before)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert 0 < trainer.meter.drain()[1][0] < 8


def id_(tensor):
    return tensor


def test_checkpointed_activations_keep_less_and_change_nothing(tmp_path):
    states, kept = [], []
    for on in (False, True):
        trainer = make_trainer(tmp_path / str(on), checkpoint_activations=on)
        batch, saved = first_batch(trainer), {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.update({t.data_ptr(): t.nbytes}) or t, id_):
            trainer.model.online.encoder(batch.views)
        trainer = make_trainer(tmp_path / f"{on} again", checkpoint_activations=on)
        for _ in range(3):
            trainer.train_step([batch])
        states.append(state_of(trainer))
        kept.append(sum(saved.values()))
    assert kept[1] < 0.6 * kept[0]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_all_that_a_step_waits_for_counts_towards_one_limit(tmp_path, monkeypatch, ahead, accumulate):
    """Also where the next batch is taken before this one is handed over, as on a GPU."""

    def taken_ahead(batches, *_, **__):
        held = []
        for batch in batches:
            held.append(batch)
            if len(held) > ahead:
                yield held.pop(0)
        yield from held

    waits = []  # of each step, how many batches the loader was waited for

    class Watched(Loader):
        def begin_step(self):
            waits.append(0)
            super().begin_step()

        def epoch(self, epoch, start_batch=0):
            for batch in super().epoch(epoch, start_batch):
                waits[-1] += 1
                yield batch

    monkeypatch.setattr(trainer_module, "Loader", Watched)
    monkeypatch.setattr(trainer_module, "on_device", taken_ahead)
    trainer = make_trainer(tmp_path, accumulate=accumulate, batch_size=2)
    stream = trainer.batches()
    for _ in range(trainer.last_step):
        next(stream)
        trainer.loop.advance(trainer.global_batch)
    assert waits == [accumulate + ahead, *[accumulate] * (trainer.last_step - 2), accumulate - ahead]
