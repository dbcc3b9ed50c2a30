"""Page-locked memory for batches on their way to a GPU: pieces that are used again and again.

PyTorch's own allocator rounds every piece up to a power of two, so that a batch of 140 MB locks 256 MB, as often as
batches are in flight. These pieces are as large as the batches. Locking takes longer than a batch, so they are kept.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ROUND = 2 << 20  # bytes
_PORTABLE = 1  # cudaHostRegisterPortable: locked for every GPU
_SPARE = 16  # a piece that is made has a sixteenth more than asked for: packed batches differ in size
_MOST_UNTOLD = (
    2  # pieces that were let go without a word of their copy; then PyTorch's allocator, which sees all copies
)


def lock(address: int, size: int) -> bool:
    """Locks memory; False where the system allows no more."""
    if int(torch.cuda.cudart().cudaHostRegister(address, size, _PORTABLE)) == 0:
        return True
    with suppress(RuntimeError):  # CUDA keeps the error, and the next kernel's launch would be blamed for it
        torch.ones(1, device="cuda")
    return False


def unlock(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


class _Piece:
    def __init__(self, size: int) -> None:
        self.memory = np.frombuffer(mmap.mmap(-1, size), np.uint8)  # begins a page
        self.taken = False
        self.copied: torch.cuda.Event | None = None
        """Behind the copy out of it; None: nobody has told of one."""

    @property
    def address(self) -> int:
        return int(self.memory.ctypes.data)

    def give_back(self) -> None:
        self.taken = False


class PinnedRing:
    """Pieces of page-locked memory. A piece is free when no tensor lies in it and the copy out of it is done."""

    def __init__(self) -> None:
        self.pieces: list[_Piece] = []
        self.device: int | None = None
        """The GPU whose process this is: a loader's threads begin with the first one as theirs."""
        self._refused = False
        self._lock = threading.Lock()

    def empty(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.uint8,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        """As ``torch.empty(..., pin_memory=True)``; the piece is taken as long as any tensor lies in it."""
        size = math.prod(shape) * dtype.itemsize
        with self._lock:
            piece = self._piece(size) if size and not self._refused else None
        if piece is None:
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=True, memory_format=memory_format)
        lease = piece.memory[:size]  # the tensor's storage holds it, and so do all views of the tensor
        weakref.finalize(lease, piece.give_back).atexit = False
        flat = torch.from_numpy(lease).view(dtype)
        if memory_format is torch.channels_last:
            images, channels, height, width = shape
            return flat.view(images, height, width, channels).permute(0, 3, 1, 2)
        return flat.view(*shape)

    def copied(self, tensor: Tensor, device: torch.device) -> None:
        """To be called behind a copy to a GPU that waits for nothing, on its stream: the piece is kept until then."""
        for piece in tuple(self.pieces):
            if 0 <= tensor.data_ptr() - piece.address < piece.memory.nbytes:
                copied = torch.cuda.Event()
                copied.record(torch.cuda.current_stream(device))
                piece.copied = copied

    def release(self) -> None:
        """Unlocks the pieces in which no tensor lies, once they are copied."""
        with self._lock, torch.cuda.device(self.device):
            for piece in [piece for piece in self.pieces if not piece.taken]:
                self._drop(piece)

    def _piece(self, size: int) -> _Piece | None:
        """A free piece of at least so many bytes: the smallest there is, or a new one in place of the largest.

        A piece that nobody told of a copy from is not used again: it may still be read, and to wait for all of the GPU
        from a loader's thread would break the capture of a graph.
        """
        if sum(not piece.taken and piece.copied is None for piece in self.pieces) >= _MOST_UNTOLD:
            return None
        free = sorted((piece for piece in self.pieces if self._is_free(piece)), key=lambda piece: piece.memory.nbytes)
        fitting = next((piece for piece in free if piece.memory.nbytes >= size), None)
        if fitting is None:
            if free:
                self._drop(free[-1])
            fitting = _Piece(-(-(size + size // _SPARE) // _ROUND) * _ROUND)
            with torch.cuda.device(self.device):
                self._refused = not lock(fitting.address, fitting.memory.nbytes)
            if self._refused:
                return None
            self.pieces.append(fitting)
        fitting.taken, fitting.copied = True, None
        return fitting

    @staticmethod
    def _is_free(piece: _Piece) -> bool:
        return not piece.taken and piece.copied is not None and piece.copied.query()

    def _drop(self, piece: _Piece) -> None:
        if piece.copied is None:
            torch.cuda.synchronize()
        else:
            piece.copied.synchronize()
        unlock(piece.address)
        self.pieces.remove(piece)


RING = PinnedRing()
"""The ring of this process."""


def empty(shape: Sequence[int], *, pin_memory: bool, **options: Any) -> Tensor:
    """As ``torch.empty``, out of the ring where memory is to be page-locked."""
    return RING.empty(shape, **options) if pin_memory else torch.empty(tuple(shape), **options)
