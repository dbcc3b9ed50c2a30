"""What only a GPU can show of the trainer: no waiting, CUDA graphs, the same bits. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from tiny_trainer import Pictures, first_batch, make_config, make_trainer, state_of

from scrl_fast.trainer import SCRLTrainer

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: nothing to wait for, no graphs, other kernels"),
    pytest.mark.usefixtures("no_curves"),
]


@pytest.mark.parametrize("option", ["compile", "cuda_graphs"])
def test_compiled_encoders_and_their_graphs_give_what_eager_ones_give(tmp_path, option):
    states = []
    for on in (False, True):
        trainer = make_trainer(tmp_path / str(on), device="cuda", **{option: on})
        stream = trainer.batches()
        for _ in range(6):
            trainer.train_step(next(stream))
        stream.close()
        states.append(trainer.model.state_dict())
    for eager, compiled in zip(*(state.values() for state in states), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_on_a_gpu_waits_for_nothing(tmp_path, precision):
    trainer = make_trainer(tmp_path, Pictures(num_classes=3), precision=precision, device="cuda")
    batch = first_batch(trainer)
    for _ in range(3):
        trainer.train_step([batch])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.train_step([batch])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0 < trainer.meter.drain()[-1][0] < 8


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deterministic_runs_and_a_resumed_one_are_bit_equal(tmp_path, precision):
    states = []
    try:
        for name, stops in (("once", [6]), ("again", [6]), ("resumed", [2, 6])):
            for last in stops:
                config = make_config(
                    tmp_path / name, device="cuda", deterministic=True, precision=precision, max_steps=last
                )
                config.resume = "auto"
                trainer = SCRLTrainer(config, source=Pictures(num_classes=3))
                trainer.fit()
            states.append(state_of(trainer))
    finally:
        torch.use_deterministic_algorithms(False)
    for other in states[1:]:
        assert all(torch.equal(a, b) for a, b in zip(states[0], other, strict=True))
