"""Run by test_distributed.py: one import, then processes by fork that talk through gloo; results as files.

``python tests/gloo_cases.py FOLDER``. Fork before any computation, so that no thread is lost in the children; importing
torch once instead of five times is most of what these tests would cost.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.backends.debugging  # what torch.compile would import in each process
import torch.distributed as dist
from tiny_trainer import Pictures, make_config
from torch import nn

from scrl_fast import info
from scrl_fast.data import BadImage
from scrl_fast.distributed.sync_batch_norm import RowBatchNorm, SyncBatchNorm, synchronize_batch_norm
from scrl_fast.distributed.world import World
from scrl_fast.run import plots
from scrl_fast.run.checkpoint import CheckpointError
from scrl_fast.trainer import SCRLTrainer

SIZE = 4
ROWS = {"even": (3, 3, 3, 3), "uneven": (5, 1, 3, 2), "empty on one": (0, 4, 1, 3), "all on one": (0, 0, 6, 0)}
SHAPES = {"rows": (), "maps": (4, 3), "channels last": (4, 3)}


def batches(kind: str, shape: str) -> list[torch.Tensor]:
    """The parts of one batch that the processes hold."""
    torch.manual_seed(0)
    whole = 10 + 3 * torch.randn(sum(ROWS[kind]), 5, *SHAPES[shape], dtype=torch.float64)  # a mean far from zero
    if shape == "channels last":
        whole = whole.to(memory_format=torch.channels_last)
    return list(whole.split(ROWS[kind]))


def norm(shape: str) -> nn.Module:
    torch.manual_seed(1)
    layer = (nn.BatchNorm2d if SHAPES[shape] else RowBatchNorm)(5).double()
    nn.init.normal_(layer.weight)
    return nn.Sequential(layer, nn.Identity())


def pass_through(layer: nn.Module, part: torch.Tensor) -> dict[str, torch.Tensor]:
    part = part.clone().requires_grad_()
    output = layer(part)
    (output.sin() * output).sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": output.detach(), "gradient": part.grad, **gradients, **dict(layer.named_buffers())}


def batch_norm_case(rank: int) -> dict:
    results = {}
    for kind in ROWS:
        for shape in SHAPES:
            layer = synchronize_batch_norm(norm(shape))
            assert type(layer[0]) is SyncBatchNorm
            results[kind, shape] = pass_through(layer, batches(kind, shape)[rank])
    layer = synchronize_batch_norm(norm("rows"))
    results["nothing", "rows"] = pass_through(layer, torch.empty(0, 5, dtype=torch.float64))
    layer.eval()
    results["eval"] = layer(batches("uneven", "rows")[rank]) if rank < 2 else None  # nobody waits for the others
    return results


def compiled_norm_case(rank: int, group: Any) -> dict:
    """As train.compile has it: one graph, exchanges included, of which the compiler sees every operation."""
    layer = synchronize_batch_norm(norm("channels last"), group)
    layer.compile(backend="aot_eager", fullgraph=True)
    return pass_through(layer, batches("uneven", "channels last")[rank])


def compiled_case(folder: Path, world: World) -> dict:
    """train.compile inside DDP: six steps of the trainer, and the graphs that its encoders became.

    The compiler traces and cuts as ever, but the graphs run as they are: to generate code would take a minute, and what
    it makes of the exchanges in them is seen in `compiled_norm_case`.
    """
    plain, graphs = nn.Module.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    nn.Module.compile = lambda module, **options: plain(module, backend=backend, **options)
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1 << 18  # this encoder's gradients fill two buckets, too
    try:
        return train(folder / "compiled", world, 2, batch_size=4, compile=True) | {"graphs": len(graphs)}
    finally:
        nn.Module.compile = plain


class SomeBad(Pictures):
    """Every third cannot be read."""

    def read(self, index):
        if index % 3 == 0:
            raise BadImage(self.name_of(index), "no picture")
        return super().read(index)


def trainer_of(folder: Path, world: World, kind: type = Pictures, resume: str = "", **train) -> SCRLTrainer:
    """A trainer in float64, on whose batches the number of processes has no influence."""
    config = make_config(folder, **({"epochs": 2} | train))
    config.run.log_every, config.resume = 1, resume
    config.data.max_bad_fraction = 1.0
    source = kind(24, num_classes=3)
    source.label = lambda index: -1 if index % 5 == 0 else index % 3  # some have no label
    trainer = SCRLTrainer(config, source=source, world=world)
    trainer.model.double()
    plain = trainer.batches

    def stream():
        for group in plain():
            yield [dataclasses.replace(batch, views=batch.views.double()) for batch in group]

    trainer.batches = stream
    return trainer


def drop_boxes(trainer: SCRLTrainer) -> None:
    """In the second step, no boxes in the last process's images; in the fourth, none at all."""
    plain = trainer.batches

    def stream():
        for group in plain():
            for batch in group:
                last = (trainer.world.rank == trainer.world.size - 1) if trainer.world.is_distributed else None
                keep = [without(rows, trainer.step, last, len(batch.keys)) for rows in batch.boxes]
                batch.boxes = tuple(keep)
            yield group

    trainer.batches = stream


def without(rows: torch.Tensor, step: int, last: bool | None, images: int) -> torch.Tensor:
    if step == 3 or (step == 1 and last):
        return rows[:0]
    if step == 1 and last is None:  # one process: image i of the global batch is that of process i % processes
        return rows[(rows[:, 0].long() % images) % DROPPED_OF != DROPPED_OF - 1]
    return rows


DROPPED_OF = 2


def train(folder: Path, world: World, processes: int, **options) -> dict:
    """What training leaves: parameters and buffers, and what it wrote down."""
    global DROPPED_OF
    DROPPED_OF = processes
    trainer = trainer_of(folder, world, **options)
    drop_boxes(trainer)
    trainer.fit()
    return {"model": copy.deepcopy(trainer.model.state()), "row": trainer.loop.last_row}


def equal_case(folder: Path, world: World) -> dict:
    results = {"step": train(folder / f"of{world.size}", world, world.size, batch_size=8 // world.size)}
    if world.size == 2:
        options = {"batch_size": 2, "accumulate": 2}
        results["accumulated"] = train(folder / "accumulated", world, 2, **options)
    return results


def resume_case(folder: Path, world: World) -> None:
    """Two steps in two processes; the test goes on in one."""
    trainer = trainer_of(folder / "moved", world, batch_size=4, max_steps=2)
    trainer.fit()


def bad_case(folder: Path, world: World) -> dict:
    """What each process counted in the first step of three, what it goes on from, and how long it waits for data."""
    trainer = trainer_of(folder / "bad", world, SomeBad, batch_size=4, max_steps=1)
    trainer.fit()
    again = trainer_of(folder / "bad", world, SomeBad, batch_size=4, resume="auto")
    again.loop.restore()
    return {"bad": [trainer.loader.state_dict(), again.loader.state_dict()], "longest": trainer.loader.longest}


def before_third_data(trainer, act) -> None:
    """Process 1 calls act() where it would get the data of the third step."""
    plain = trainer.batches

    def stream():
        for number, group in enumerate(plain()):
            if number == 2 and trainer.world.rank == 1:
                act()
            yield group

    trainer.batches = stream


def failing_case(folder: Path, world: World) -> str:
    """The data of process 1 fail in the third step."""
    trainer = trainer_of(folder / "failing", world, batch_size=2)

    def fail():
        raise ValueError("the disk is gone")

    before_third_data(trainer, fail)
    try:
        trainer.fit()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def waiting_case(folder: Path, world: World) -> str:
    """A signal reaches process 1 while it waits for the data of the third step."""
    trainer = trainer_of(folder / "waiting", world, batch_size=2)

    def wait():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    before_third_data(trainer, wait)
    summary = trainer.fit()
    return f"{summary['interrupted']} after step {summary['step']}"


def message_case(world: World) -> dict:
    def refuse():
        raise CheckpointError("all of them are damaged")

    try:
        world.broadcast_from_rank0(refuse)
    except ValueError as error:
        refused = str(error)
    numbers = torch.arange(3 * SIZE).view(SIZE, 3).float()
    return {
        "sums": world.all_reduce_ints([world.rank, 1]),
        "first": world.broadcast_from_rank0(lambda: world.rank),
        "refused": refused,
        "rows": world.all_gather_rows(numbers[world.rank :], 100),  # 4, 3, 2, 1 of them
        "some rows": world.all_gather_rows(numbers[world.rank :], 5),  # two from each at most
        "no rows": world.all_gather_rows(numbers[:0], 5),
    }


def main(folder: Path, rank: int) -> None:
    store = dist.FileStore(str(folder / "store"), SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE, timeout=timedelta(seconds=60))
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    four = World(rank, SIZE, rank)
    two = World(rank % 2, 2, rank % 2, group=pairs[rank // 2])
    results = {"norm": batch_norm_case(rank), "messages": message_case(four), "4": equal_case(folder, four)}
    if rank < 2:
        results["2"] = equal_case(folder, two)
        results["compiled norm"] = compiled_norm_case(rank, two.group)
        results["2"]["compiled"] = compiled_case(folder, two)
    else:
        resume_case(folder, two)
        results |= bad_case(folder, two)
        results["failing"] = failing_case(folder, two)
        results["waiting"] = waiting_case(folder, two)
    torch.save(results, folder / f"results_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for module, name in ((plots, "draw_curves"), (plots, "draw_boxes"), (info, "write_environment")):
        setattr(module, name, lambda *_, **__: True)  # not what is tested here
    children = []
    for place in range(SIZE):
        if (child := os.fork()) == 0:
            code = 1
            try:
                main(Path(sys.argv[1]), place)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(map(abs, codes)))
