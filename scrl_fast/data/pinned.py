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
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ROUND = 2 << 20  # bytes
_PORTABLE = 1  # cudaHostRegisterPortable: locked for every GPU
_SPARE = 16  # a piece that is made has a sixteenth more than asked for: packed batches differ in size


def lock(address: int, size: int) -> bool:
    """Locks memory; False where the system allows no more."""
    return int(torch.cuda.cudart().cudaHostRegister(address, size, _PORTABLE)) == 0


def unlock(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


class _Piece:
    def __init__(self, size: int) -> None:
        self.memory = np.frombuffer(mmap.mmap(-1, size), np.uint8)  # begins a page
        self.taken = False
        self.copied: torch.cuda.Event | None = None

    @property
    def address(self) -> int:
        return int(self.memory.ctypes.data)

    def give_back(self) -> None:
        self.taken = False


class PinnedRing:
    """Pieces of page-locked memory. A piece is free when no tensor lies in it and the copy out of it is done."""

    def __init__(self) -> None:
        self.pieces: list[_Piece] = []
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
            piece = self._piece(size) if size else None
        if piece is None:
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=True, memory_format=memory_format)
        lease = piece.memory[:size]  # the tensor's storage holds it, and so do all views of the tensor
        weakref.finalize(lease, piece.give_back).atexit = False
        flat = torch.from_numpy(lease).view(dtype)
        if memory_format is torch.channels_last:
            images, channels, height, width = shape
            return flat.view(images, height, width, channels).permute(0, 3, 1, 2)
        return flat.view(*shape)

    def copied(self, tensor: Tensor) -> None:
        """To be called behind a copy to a GPU that waits for nothing, on its stream: the piece is kept until then."""
        for piece in tuple(self.pieces):
            if 0 <= tensor.data_ptr() - piece.address < piece.memory.nbytes:
                piece.copied = torch.cuda.Event()
                piece.copied.record()

    def release(self) -> None:
        """Unlocks the pieces in which no tensor lies, once they are copied."""
        with self._lock:
            for piece in [piece for piece in self.pieces if not piece.taken]:
                self._drop(piece)

    def _piece(self, size: int) -> _Piece | None:
        """A free piece of at least so many bytes: the smallest there is, or a new one in place of the largest."""
        free = sorted((piece for piece in self.pieces if self._is_free(piece)), key=lambda piece: piece.memory.nbytes)
        fitting = next((piece for piece in free if piece.memory.nbytes >= size), None)
        if fitting is None:
            if free:
                self._drop(free[-1])
            fitting = _Piece(-(-(size + size // _SPARE) // _ROUND) * _ROUND)
            if not lock(fitting.address, fitting.memory.nbytes):
                return None
            self.pieces.append(fitting)
        elif fitting.copied is None:  # handed out before, and copied by others, if at all
            torch.cuda.synchronize()
        fitting.taken, fitting.copied = True, None
        return fitting

    @staticmethod
    def _is_free(piece: _Piece) -> bool:
        return not piece.taken and (piece.copied is None or piece.copied.query())

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
