"""Several processes that train one network: who they are, and the few things that they tell each other.

One process a GPU (nccl), or a few on the CPU (gloo), started by ``torchrun``. What is exchanged between two logging
points: gradients and BatchNorm statistics on the device, and one small message a step between the hosts, which also
makes all of them stop at the same step.
"""

from __future__ import annotations

import inspect
import os
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scrl_fast.distributed.sync_batch_norm import synchronize_batch_norm
from scrl_fast.errors import UsageError

T = TypeVar("T")
STORE_TIMEOUT = timedelta(minutes=5)
NOTE_TIMEOUT = timedelta(seconds=3)
COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # longer than a checkpoint takes, which all wait for
_ddp = inspect.signature(nn.parallel.DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _ddp else "broadcast_buffers"  # since torch 2.15
_store: dist.Store | None = None  # of this attempt
_ME = uuid.uuid4().hex  # no other process is called so, this one's predecessors before a restart included


class PeerFailed(RuntimeError):
    """Another process stopped, so this one cannot go on."""


@dataclass(frozen=True)
class World:
    """This process among its fellows; by default the only one, for which nothing here costs anything.

    rank: 0 writes. size: processes in all. local_rank: place on this machine, which is the index of its GPU.
    group: of torch.distributed, None for all processes.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    group: Any = field(default=None, compare=False)

    @property
    def several(self) -> bool:
        return self.size > 1

    def sums(self, numbers: Sequence[int]) -> list[int]:
        """Each number summed over the processes; between the hosts, so that no device is waited for."""
        if not self.several:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def sum_(self, values: Tensor) -> Tensor:
        """The tensor, in place, summed over the processes; on a GPU without waiting for it."""
        if self.several:
            dist.all_reduce(values, group=self.group)
        return values

    def rows(self, rows: Tensor, limit: int) -> Tensor:
        """Rows ``[N, D]`` of all processes, by rank, in every process; N may differ, and be 0.

        limit: how many at most (rounded up to as many from each process).
        """
        if not self.several:
            return rows[:limit]
        rows = rows[: -(-limit // self.size)]
        counts = self.sums([len(rows) if rank == self.rank else 0 for rank in range(self.size)])
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def gathered(self, items: Sequence[T]) -> list[T]:
        """All processes' items in process 0, by rank; elsewhere this process's own."""
        if not self.several:
            return list(items)
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(list(items), found, group=self.group, group_dst=0)
        return list(items) if found is None else [item for each in found for item in each]

    def from_first(self, decide: Callable[[], T]) -> T:
        """What ``decide`` returns in process 0, in every process; its error is raised in every process."""
        if not self.several:
            return decide()
        message: list[Any] = [None, None]
        if self.rank == 0:
            try:
                message = [decide(), None]
            except (ValueError, OSError) as error:
                message = [None, error]
        dist.broadcast_object_list(message, group=self.group, group_src=0)
        if isinstance(message[1], ValueError):
            raise UsageError(str(message[1]))
        if message[1] is not None:
            raise message[1]
        return message[0]

    def parallel(self, model: nn.Module, device: torch.device, *, static: bool = True) -> nn.Module:
        """The model as all processes train it: gradients averaged, BatchNorm over all; itself if there is one process.

        The module itself keeps its parameters and names; process 0's values go to all. static: the same parameters
        take part in every backward pass, each of which is followed by an update.
        """
        if not self.several:
            return model
        synchronize_batch_norm(model, self.group)
        sync_buffers: dict[str, Any] = {_SYNC_BUFFERS: False}
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            process_group=self.group,
            **sync_buffers,  # BatchNorm's are equal as it is
            gradient_as_bucket_view=True,
            static_graph=static,
        )


def exchange_timeout(data_seconds: float = 0.0) -> timedelta:
    """How long a process waits for the others, of which each may wait for its data `data_seconds`."""
    return max(COLLECTIVE_TIMEOUT, timedelta(seconds=data_seconds) + COLLECTIVE_TIMEOUT / 2)


def join(device: torch.device, *, timeout: timedelta = COLLECTIVE_TIMEOUT) -> World:
    """This process's world: torch.distributed's if it runs, else the one that torchrun announces, else a single one.

    device: this process's, from `device_of`. timeout: from `exchange_timeout`. Under ``torchrun --max-restarts`` each
    attempt has its own keys in the agent's store (see `_attempt`); without that it may connect to the dead processes of
    the attempt before, and hang. A GPU with a number becomes the process's current one.
    Raises ValueError for an announcement that lacks something, and for a group that cannot carry what the hosts say.
    """
    global _store
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # else pinned memory, and all that asks no tensor, would sit on the first one
    if dist.is_available() and dist.is_initialized():
        _check_group(device)
        return World(dist.get_rank(), dist.get_world_size(), local_rank)
    size = announced_size()
    if size == 1:
        return World()
    lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if lacking:
        raise ValueError(
            f"WORLD_SIZE={size}, but {' and '.join(lacking)} not set: start with torchrun --nproc-per-node=N -m "
            "scrl_fast.train, or unset WORLD_SIZE to train alone"
        )
    rank = int(os.environ["RANK"])
    store = _open_store(rank, size)
    _store = dist.PrefixStore(f"scrl_fast/attempt_{_attempt(store, rank, size) if _agents_store() else 1}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=timeout)
    return World(rank, size, local_rank)


def _check_group(device: torch.device) -> None:
    carried, needed = dist.get_backend_config(), "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    lacking = [kind for kind in dict.fromkeys(("cpu", device.type)) if f"{kind}:" not in carried]
    if lacking:
        raise ValueError(
            f"torch.distributed runs with {carried}, which carries nothing for {' and '.join(lacking)}: "
            f"begin with init_process_group({needed!r})"
        )


def leave() -> None:
    """Ends what `join` began, if anything."""
    global _store
    _store = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def announced_size() -> int:
    """How many processes torchrun says there are; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device_of(name: str) -> torch.device:
    """The device of this process that ``train.device`` means. Raises ValueError for a GPU that is not there."""
    several, found = announced_size() > 1, torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type != "cuda":
        return device
    local_rank, local_size = (int(os.environ.get(key, "0")) for key in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if several and device.index is not None and local_size > 1:
        raise ValueError(
            f"train.device is {name!r}, one GPU for {local_size} processes: --train.device=cuda takes one each"
        )
    if several and device.index is None:
        device = torch.device("cuda", local_rank)
    if not (device.index or 0) < found:
        who = f" for process {local_rank} of this machine: --nproc-per-node={found}" if several and found else ""
        raise ValueError(f"train.device is {name!r}, but PyTorch finds {found} CUDA devices{who}")
    return device


def launcher() -> str:
    """How these processes were started, for the command that starts them again."""
    size = announced_size()
    if size == 1:
        return "python"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    nodes = f" --nnodes={size // local}" if local < size else ""
    return f"torchrun{nodes} --nproc-per-node={local}"


def remembered(key: str, decide: Callable[[], str]) -> tuple[str, bool]:
    """What ``decide`` gave in the first attempt, also after torchrun's restarts, and whether this is one; process 0.

    Only torchrun's own store outlives an attempt; without one it is decided anew.
    """
    if not _agents_store():
        return decide(), False
    store = dist.PrefixStore("scrl_fast", _open_store(rank=0, size=announced_size()))
    if store.check([key]):
        author, _, value = store.get(key).decode().partition(" ")
        if author != _ME:
            return value, True
    value = decide()
    store.set(key, f"{_ME} {value}")
    return value, False


def explain(error: Exception) -> Exception:
    """The error to end this process with: its own, or, where another process failed first, one that names that.

    A process that fails leaves a note for the others, whose exchanges with it then break off.
    """
    if _store is None:
        return error
    if not _of_others(error):
        me = f"process {os.environ.get('RANK')} on {socket.gethostname()}"
        with suppress(RuntimeError, OSError):  # the store's host may be gone
            _store.compare_set("failed", "", f"{me}: {type(error).__name__}: {' '.join(str(error).split())}")
        return error
    try:
        _store.wait(["failed"], NOTE_TIMEOUT)
        return PeerFailed(f"stopped because another process did: {_store.get('failed').decode()}")
    except (RuntimeError, OSError):
        first = " ".join(str(error).split())[:160]
        if "timed out" in first.lower():
            return PeerFailed(
                f"another process has not answered for so long that it or its machine must hang ({first})"
            )
        return PeerFailed(
            f"another process is gone without a word, probably killed; torchrun's report names it ({first})"
        )


def _of_others(error: Exception) -> bool:
    """Whether the error only says that an exchange with another process broke off."""
    broken = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
    return isinstance(error, (PeerFailed, dist.DistError)) or any(words in str(error) for words in broken)


def _attempt(store: dist.Store, rank: int, size: int) -> str:
    """A name for this attempt that all its processes know, and no earlier one.

    TORCHELASTIC_RESTART_COUNT is none: each machine counts its own, and not those that a failure elsewhere caused. What
    processes of earlier attempts left in the store cannot mislead, since all of them are dead when the first one of
    this attempt starts, and process 0 answers to names that no process had before.
    """
    if rank > 0:
        me = uuid.uuid4().hex
        store.set(f"scrl_fast/process_{rank}", me)
        try:
            store.wait([f"scrl_fast/attempt_of_{me}"], STORE_TIMEOUT)
        except dist.DistStoreError:
            raise dist.DistStoreError(f"timed out: process 0 of {size} did not start") from None
        name = store.get(f"scrl_fast/attempt_of_{me}").decode()
        store.set(f"scrl_fast/attempt_{name}/joined_{rank}", "")
        return name
    name = str(store.add("scrl_fast/attempts", 1))
    lacking, end = list(range(1, size)), time.monotonic() + STORE_TIMEOUT.total_seconds()
    while lacking := [other for other in lacking if not store.check([f"scrl_fast/attempt_{name}/joined_{other}"])]:
        for other in lacking:
            if store.check([f"scrl_fast/process_{other}"]):  # perhaps still of the one that died
                store.set(f"scrl_fast/attempt_of_{store.get(f'scrl_fast/process_{other}').decode()}", name)
        if time.monotonic() > end:
            raise dist.DistStoreError(f"timed out: process {', '.join(map(str, lacking))} of {size} did not start")
        time.sleep(0.01)
    return name


def _agents_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _open_store(rank: int, size: int) -> dist.Store:
    address, port, agents = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), _agents_store()
    return dist.TCPStore(
        address, port, None if agents else size, is_master=rank == 0 and not agents, timeout=STORE_TIMEOUT
    )
