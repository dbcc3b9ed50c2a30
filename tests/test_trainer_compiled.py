"""The trainer with compiled encoders: compiled once, refused where it cannot be, graphs begun anew every step."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_trainer import first_batch, make_config, make_trainer, with_boxes

from scrl_fast import build


def test_compiled_encoders_are_compiled_once_whatever_the_boxes(tmp_path, monkeypatch):
    plain, compiled = torch.nn.Module.compile, []

    def without_code_generation(module, **options):
        compiled.append(module)
        plain(module, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", without_code_generation)
    trainer = make_trainer(tmp_path / "compiled", compile=True)
    assert compiled == [trainer.model.online.encoder, trainer.model.target.encoder]
    eager = make_trainer(tmp_path / "eager")
    batch = first_batch(trainer)
    for count in (12, 12):
        trainer.train_step([with_boxes(batch, count)])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (3, 0, 1, 11):
            trainer.train_step([with_boxes(batch, count)])
    for count in (12, 12, 3, 0, 1, 11):
        eager.train_step([with_boxes(batch, count)])
    assert list(trainer.model.state_dict()) == list(eager.model.state_dict())
    for ours, expected in zip(trainer.model.state_dict().values(), eager.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "processes", "device", "reason"),
    [
        ({}, 1, "cpu", "replays the encoders on a GPU, but this run is on cpu"),
        ({}, 2, "cuda", "does not go with 2 processes"),
        ({"accumulate": 2}, 1, "cuda", "does not go with train.accumulate=2"),
        ({"checkpoint_activations": True}, 1, "cuda", "does not go with train.checkpoint_activations"),
        ({"checkpoint_activations": True, "compile": True}, 1, "cpu", "does not go with train.checkpoint_activations"),
    ],
)
def test_compiling_is_refused_where_it_cannot_be(tmp_path, options, processes, device, reason):
    config = make_config(tmp_path, **({"cuda_graphs": True} if "compile" not in options else {}), **options)
    with pytest.raises(ValueError, match=rf"^train\.(cuda_graphs|compile)=True {re.escape(reason)}"):
        build.check_run(config, images=12, world_size=processes, device_type=device)


def test_cuda_graphs_are_asked_of_the_compiler_for_encoders_alone_and_begin_anew_every_step(tmp_path, monkeypatch):
    compiled, begun = [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append((module, options)))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(True))
    monkeypatch.setattr(build, "check_compiled", lambda *_: None)
    trainer = make_trainer(tmp_path, cuda_graphs=True)
    options = {"dynamic": False, "mode": "reduce-overhead"}
    assert compiled == [(trainer.model.online.encoder, options), (trainer.model.target.encoder, options)]
    batch = first_batch(trainer)
    for _ in range(2):
        trainer.train_step([batch])
    assert len(begun) == 2
