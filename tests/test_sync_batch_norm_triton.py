"""The kernel that merges the statistics of several processes: its numbers under the interpreter, its compilation."""

from __future__ import annotations

import pytest
import torch
from aot import GPUS, Kernel, compile_for_gpus, needs_compiler
from conftest import triton_devices
from torch import nn

from scrl_fast.distributed import sync_batch_norm
from scrl_fast.distributed.sync_batch_norm import SyncBatchNorm

on_triton = pytest.mark.parametrize("device", triton_devices())
EPS = 1e-5


class PlayedGpu:
    """What the form for a GPU asks of PyTorch, on any device, for a process among others that are played."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, others: list[torch.Tensor]) -> None:
        self.others, self.collectives = others, 0
        monkeypatch.setattr(sync_batch_norm, "_has_kernels", lambda input: True)
        monkeypatch.setattr(sync_batch_norm, "_gathered", self.gathered)
        monkeypatch.setattr(torch, "batch_norm_stats", self.stats)
        monkeypatch.setattr(torch, "batch_norm_elemt", self.apply)

    @staticmethod
    def stats(input: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        var, mean = torch.var_mean(input, (0, 2, 3), correction=0)
        return mean, (var + eps).rsqrt()

    def row(self, input: torch.Tensor) -> torch.Tensor:
        if not input.numel():
            return input.new_zeros(2 * input.shape[1] + 1)
        return torch.cat([*self.stats(input, EPS), input.new_tensor([input.numel() / input.shape[1]])])

    def gathered(self, own: torch.Tensor, group: object) -> torch.Tensor:
        self.collectives += 1
        rows = [self.row(other) for other in self.others]
        return torch.stack([*rows[:1], own, *rows[1:]])

    @staticmethod
    def apply(input: torch.Tensor, weight, bias, mean, invstd, eps: float) -> torch.Tensor:
        shape = (1, -1, 1, 1)
        return (input - mean.view(shape)) * (invstd * weight).view(shape) + bias.view(shape)


@on_triton
@pytest.mark.parametrize("counts", [(4, 3, 2), (0, 3, 2), (2, 0, 0), (0, 0, 0)], ids=str)
def test_as_batch_norm_over_all_processes(
    device: str, counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channels beyond one program; a mean far from 0; processes without rows, in any place; none with rows."""
    channels = 150
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, channels, 2, 3, generator=generator, dtype=torch.float64) + 100 for n in counts]
    parts = [part.to(device) for part in parts]
    gpu = PlayedGpu(monkeypatch, [parts[0], parts[2]])
    norm = SyncBatchNorm(channels, eps=EPS).double().to(device)
    plain = nn.BatchNorm2d(channels, eps=EPS).double().to(device)
    for each in (norm, plain):
        nn.init.uniform_(each.weight, 1, 2)
        each.bias.data.fill_(0.5)
    plain.weight.data.copy_(norm.weight.data)
    output = norm(parts[1])
    assert gpu.collectives == 1
    every = torch.cat(parts)
    if every.numel():
        expected = plain(every)[counts[0] : counts[0] + counts[1]]
        torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(dict(norm.named_buffers())[name], buffer, rtol=1e-9, atol=1e-9)


@on_triton
def test_float32_statistics_are_accurate(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [torch.randn(n, 8, 4, 4, generator=torch.Generator().manual_seed(n)) * 3 + 50 for n in (5, 2, 7)]
    parts = [part.to(device) for part in parts]
    PlayedGpu(monkeypatch, [parts[0], parts[2]])
    norm = SyncBatchNorm(8, eps=EPS).to(device)
    norm(parts[1])
    var, mean = torch.var_mean(torch.cat(parts).double(), (0, 2, 3))
    torch.testing.assert_close(norm.running_mean.double(), 0.1 * mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.running_var.double(), 0.9 + 0.1 * var, rtol=1e-5, atol=0)


@on_triton
@pytest.mark.parametrize("channel", [0, 1])
def test_infinity_stays_in_its_channel(device: str, channel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    parts[0][0, channel] = float("inf")
    parts = [part.to(device) for part in parts]
    PlayedGpu(monkeypatch, [parts[0], parts[2]])
    norm = SyncBatchNorm(3, eps=EPS).to(device)
    norm(parts[1])
    assert norm.running_mean.isfinite().tolist() == [n != channel for n in range(3)]
    assert norm.num_batches_tracked.item() == 1


@needs_compiler
def test_compiles_for_gpus_that_are_not_here() -> None:
    pointers = {"rows_ptr": "*fp32", "mean_ptr": "*fp32", "invstd_ptr": "*fp32", "counts_ptr": "*i32"}
    pointers |= {"running_mean_ptr": "*fp32", "running_var_ptr": "*fp32", "batches_ptr": "*i64"}
    numbers = {"processes": "i32", "channels": "i32", "eps": "fp32", "momentum": "fp32"}
    kernel = Kernel(
        "scrl_fast.kernels.sync_batch_norm:merge",
        pointers | numbers,
        {"TRACK": True, "CHANNELS": 128},
        divisible_by_16=tuple(pointers),
    )
    for _, gpu, made in compile_for_gpus([kernel]):
        assert made.stack_bytes == 0 and made.registers <= 64, (GPUS[gpu], made)
