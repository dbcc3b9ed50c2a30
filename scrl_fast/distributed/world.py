"""Rank, world size and process group; collectives are no-ops for one process.

Between two logging points the processes exchange gradients and BatchNorm statistics on the device, and one small
message a step between the hosts, which also makes all of them stop at the same step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scrl_fast.distributed.sync_batch_norm import synchronize_batch_norm
from scrl_fast.errors import UsageError

T = TypeVar("T")
_ddp = inspect.signature(nn.parallel.DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _ddp else "broadcast_buffers"  # since torch 2.15


class PeerFailed(RuntimeError):
    """Another process stopped, so this one cannot go on."""


def _error_for_peers(error: Exception) -> Exception:
    """The error of process 0 as the others raise it: one that any process can unpickle."""
    if isinstance(error, UsageError):
        return UsageError(str(error))
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror or str(error), error.filename)
    return PeerFailed(f"process 0: {type(error).__name__}: {' '.join(str(error).split())}")


@dataclass(frozen=True)
class World:
    """Rank, world size and process group; collectives are no-ops for one process, which is the default.

    rank: rank 0 writes. size: number of processes. local_rank: place on this machine, which is the index of its GPU.
    group: of torch.distributed, None for all processes.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    group: Any = field(default=None, compare=False)

    @property
    def is_distributed(self) -> bool:
        return self.size > 1

    def all_reduce_ints(self, numbers: Sequence[int]) -> list[int]:
        """Each number summed over the processes; between the hosts, so that no device is waited for."""
        if not self.is_distributed:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def all_reduce_(self, values: Tensor) -> Tensor:
        """The tensor, in place, summed over the processes; on a GPU without waiting for it."""
        if self.is_distributed:
            dist.all_reduce(values, group=self.group)
        return values

    def average(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """The mean of each number over the processes."""
        total = self.all_reduce_(torch.tensor(list(numbers.values()), dtype=torch.float64))
        return dict(zip(numbers, (total / self.size).tolist(), strict=True))

    def all_gather_rows(self, rows: Tensor, limit: int) -> Tensor:
        """Rows ``[N, D]`` of all processes, by rank, in every process; N may differ, and be 0.

        limit: how many at most (rounded up to as many from each process).
        """
        if not self.is_distributed:
            return rows[:limit]
        rows = rows[: -(-limit // self.size)]
        counts = self.all_reduce_ints([len(rows) if rank == self.rank else 0 for rank in range(self.size)])
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def gather_objects(self, items: Sequence[T]) -> list[T]:
        """All processes' items in process 0, by rank; elsewhere this process's own."""
        if not self.is_distributed:
            return list(items)
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(list(items), found, group=self.group, group_dst=0)
        return list(items) if found is None else [item for each in found for item in each]

    def all_gather_objects(self, item: T) -> list[T]:
        """The item of every process, by rank, in every process."""
        if not self.is_distributed:
            return [item]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, item, group=self.group)
        return found

    def broadcast_from_rank0(self, decide: Callable[[], T]) -> T:
        """What ``decide`` returns in process 0, in every process; its error is raised in every process."""
        if not self.is_distributed:
            return decide()
        message: list[Any] = [None, None]
        failure: Exception | None = None
        if self.rank == 0:
            try:
                message = [decide(), None]
            except Exception as error:
                failure = error
                message = [None, _error_for_peers(error)]
        dist.broadcast_object_list(message, group=self.group, group_src=0)
        if failure is not None or message[1] is not None:
            raise failure or message[1]
        return message[0]

    def wrap_ddp(self, model: nn.Module, device: torch.device, *, static: bool = True) -> nn.Module:
        """The model as all processes train it: gradients averaged, BatchNorm over all; itself if there is one process.

        The module itself keeps its parameters and names; process 0's values go to all. static: the same parameters
        take part in every backward pass, each of which is followed by an update.
        """
        if not self.is_distributed:
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
