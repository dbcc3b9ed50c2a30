"""Loss, moving average and LARS captured in a CUDA graph: replayed, they do what they do when called."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import implementations
from torch import Tensor

from scrl_fast.kernels import tensor_lists
from scrl_fast.ops import ema_update_, lars_step_, two_view_loss

SHAPES = [(3,), (17, 5), (40013,)]
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: graphs are captured by CUDA")


def on_gpu(operation: str) -> pytest.MarkDecorator:
    """Over the backends that run on a GPU here; one placeholder, always skipped, where there is none."""
    found = [p for p in implementations(operation) if p.values[0] == "cuda"]
    return pytest.mark.parametrize("device, backend", found or [pytest.param("cuda", "native", id="no-gpu")])


def draw(device: str, seed: int) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=device) for shape in SHAPES]


def captured(call: Callable[[], object], before: Callable[[], object] = lambda: None) -> torch.cuda.CUDAGraph:
    """before: run outside, once, so that kernels are compiled; not on the tensors of the capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        before()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@no_gpu
@on_gpu("ema_update_")
@pytest.mark.parametrize("where", ["number", "cpu", "cuda"])
def test_moving_average(device: str, backend: str, where: str) -> None:
    momentum = 0.9 if where == "number" else torch.tensor(0.9, device=where)
    targets, sources = draw(device, 0), draw(device, 1)
    called, others = [t.clone() for t in targets], draw(device, 2)
    graph = captured(
        lambda: ema_update_(targets, sources, momentum, backend=backend),
        lambda: ema_update_(others, sources, momentum, backend=backend),
    )
    ema_update_(called, sources, momentum, backend=backend)  # between capture and replay: tables are not shared
    graph.replay()
    assert all(map(torch.equal, targets, called))
    graph.replay()
    ema_update_(called, sources, momentum, backend=backend)
    assert all(map(torch.equal, targets, called))


@no_gpu
@on_gpu("lars_step_")
def test_lars(device: str, backend: str) -> None:
    lr = torch.tensor(0.3, device=device)

    def lists(seed: int) -> list[list[Tensor]]:
        return [draw(device, seed + i) for i in range(4)]

    def step(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], targets: list[Tensor]) -> None:
        options = {"lr": lr, "weight_decay": 1e-2, "ema_targets": targets, "ema_momentum": 0.9}
        lars_step_(params, grads, buffers, skip_counter=counter, backend=backend, **options)

    counter = torch.zeros((), dtype=torch.int64, device=device)
    replayed, called, warm = lists(0), lists(0), lists(7)
    graph = captured(lambda: step(*replayed), lambda: step(*warm))
    for rate in (0.3, 0.1):
        lr.fill_(rate)
        graph.replay()
        step(*called)
    for ours, theirs in zip(replayed, called, strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert counter.item() == 0


@no_gpu
@on_gpu("two_view_loss")
def test_loss_and_gradient(device: str, backend: str) -> None:
    generator = torch.Generator(device).manual_seed(0)
    online, target = (torch.randn(40, 256, generator=generator, device=device) for _ in range(2))
    online.requires_grad_()

    def call() -> tuple[Tensor, Tensor]:
        loss = two_view_loss(online, target, backend=backend)
        return loss.detach(), *torch.autograd.grad(loss, online)

    made: list[tuple[Tensor, Tensor]] = []
    graph = captured(lambda: made.append(call()), call)
    with torch.no_grad():
        online.mul_(-2)
    graph.replay()
    assert all(map(torch.equal, made[0], call()))


def test_tables_made_while_capturing_are_not_kept_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is in such a table before the graph runs. The GPU is played by the CPU here."""
    sent: list[np.ndarray] = []
    monkeypatch.setattr(
        tensor_lists, "_to_device", lambda table, device, capturing: sent.append(table) or torch.from_numpy(table)
    )
    monkeypatch.setattr(tensor_lists, "_TABLES", type(tensor_lists._TABLES)())
    kept: list[Tensor] = []
    monkeypatch.setattr(tensor_lists, "_KEPT", kept)
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    def table() -> Tensor:
        return tensor_lists.chunk_table(((64, 128, 5),), 4, 4, torch.device("cuda"))

    capturing = True
    first = table()
    capturing = False
    second = table()
    assert second is not first and table() is second and len(sent) == 2 and kept == [first]
    capturing = True
    assert table() is second and kept[-1] is second, "what is there already is read by the graph, and stays for it"


@pytest.mark.parametrize("numbers", [torch.tensor(0.5), torch.tensor([0.25, 1e-3], dtype=torch.float64)], ids=str)
def test_numbers_of_the_host_are_filled_in(numbers: Tensor) -> None:
    assert tensor_lists.on_device(numbers, torch.device("cpu")) is numbers
    assert tensor_lists.on_device(None, torch.device("cpu")) is None
    filled = tensor_lists.on_device(numbers, torch.device("meta"))
    assert filled is not None and filled.device.type == "meta"
    assert (filled.shape, filled.dtype) == (numbers.shape, numbers.dtype)
