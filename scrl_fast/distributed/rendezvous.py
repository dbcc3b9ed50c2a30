"""How processes find each other, start again after a failure, and learn which of them failed first.

One process a GPU (nccl), or a few on the CPU (gloo), started by ``torchrun``.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from scrl_fast.distributed.world import PeerFailed, World
from scrl_fast.errors import UsageError

STORE_TIMEOUT = timedelta(minutes=5)
NOTE_TIMEOUT = timedelta(seconds=3)
COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # longer than a checkpoint takes, which all wait for
_store: dist.Store | None = None  # of this attempt
_ME = uuid.uuid4().hex  # no other process is called so, this one's predecessors before a restart included


def exchange_timeout(data_seconds: float = 0.0) -> timedelta:
    """How long a process waits for the others, of which each may wait for its data `data_seconds`."""
    return max(COLLECTIVE_TIMEOUT, timedelta(seconds=data_seconds) + COLLECTIVE_TIMEOUT / 2)


def join(device: torch.device, *, timeout: timedelta = COLLECTIVE_TIMEOUT) -> World:
    """This process's world: torch.distributed's if it runs, else the one that torchrun announces, else a single one.

    device: this process's, from `device_of`. timeout: from `exchange_timeout`. Under ``torchrun --max-restarts`` each
    attempt has its own keys in the agent's store (see `_attempt`); without that it may connect to the dead processes of
    the attempt before, and hang. A GPU with a number becomes the process's current one.
    Raises UsageError for an announcement that lacks something, and for a group that cannot carry what the hosts say.
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
        raise UsageError(
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
        raise UsageError(
            f"torch.distributed runs with {carried}, which carries nothing for {' and '.join(lacking)}: "
            f"begin with init_process_group({needed!r})"
        )


@contextmanager
def distributed_command() -> Iterator[None]:
    """For the work of a command that may be one process of several: leaves what `join` began when it has ended.

    An error ends the process as what `to_peer_error` makes of it.
    """
    try:
        yield
    except Exception as error:
        told = to_peer_error(error)
        if told is error:
            raise
        raise told from error
    leave()


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
    """The device of this process that ``train.device`` means. Raises UsageError for a GPU that is not there."""
    several, found = announced_size() > 1, torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type != "cuda":
        return device
    local_rank, local_size = (int(os.environ.get(key, "0")) for key in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if several and device.index is not None and local_size > 1:
        raise UsageError(
            f"train.device is {name!r}, one GPU for {local_size} processes: --train.device=cuda takes one each"
        )
    if device.index is None:  # numbered: in a thread of the loader "cuda" alone would be GPU 0
        alone = not several and found > 0
        device = torch.device("cuda", torch.cuda.current_device() if alone else local_rank)
    if not (device.index or 0) < found:
        who = f" for process {local_rank} of this machine: --nproc-per-node={found}" if several and found else ""
        raise UsageError(f"train.device is {name!r}, but PyTorch finds {found} CUDA devices{who}")
    return device


def launcher() -> str:
    """How these processes were started, for the command that starts them again."""
    size = announced_size()
    if size == 1:
        return "python"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    nodes = f" --nnodes={size // local}" if local < size else ""
    return f"torchrun{nodes} --nproc-per-node={local}"


def get_or_set_in_store(key: str, decide: Callable[[], str]) -> tuple[str, bool]:
    """What ``decide`` gave in the first attempt, also after torchrun's restarts, and whether this is one; process 0.

    Only torchrun's own store outlives an attempt; without one it is decided anew.
    """
    if not _agents_store():
        return decide(), False
    store = dist.PrefixStore("scrl_fast", _open_store(rank=0, size=announced_size()))
    if store.check([key]):
        author, value = json.loads(store.get(key))
        if author != _ME:
            return value, True
    value = decide()
    store.set(key, json.dumps([_ME, value]))  # as JSON, since a path may be no UTF-8
    return value, False


def to_peer_error(error: Exception) -> Exception:
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
