"""Reads what ``torch.save`` wrote, in its zip format and in the one before, without running any code of the file.

Pickles are interpreted by `scrl_fast.weights.pickles`; tensors are views of bytes from checked places of the file. On
files of tensors and plain values the result is that of ``torch.load(weights_only=True)``, on the CPU.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scrl_fast.weights.errors import CheckpointError
from scrl_fast.weights.pickled_tensors import storage_dtype, tensor_reader
from scrl_fast.weights.pickles import ForeignObjectError, PickleError
from scrl_fast.weights.zip_archive import ArchiveError, ZipArchive, other_archive

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PICKLES = 256 << 20
"""Bytes at the start of a file of the older format in which its pickles must end."""


def read_torch(path: Path, start: bytes) -> dict[str, Any]:
    """The dict of a file that ``torch.save`` wrote; all tensors on the CPU.

    start: the first bytes of the file.
    Raises CheckpointError naming the path for one that is damaged, compressed, or holds objects of other classes.
    """
    try:
        found = _read_zip(path) if start.startswith(b"PK") else _read_legacy(path)
    except ForeignObjectError as error:
        raise CheckpointError(f"cannot load {path}: {foreign_object(path, error.name)}") from error
    except ArchiveError as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint: {error}") from error
    except Exception as error:  # damaged bytes raise half a dozen types on the way
        reason = str(error).strip().partition("\n")[0][:160] or type(error).__name__
        raise CheckpointError(f"cannot load {path}: damaged or no checkpoint ({reason})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"cannot load {path}: it holds a {type(found).__name__}, not a dict of tensors by name")
    return found


def foreign_object(path: Path, name: str) -> str:
    """What to say of a pickle with an object of a class that is not read."""
    return (
        f"it holds objects other than tensors and plain values: {name}. Unpickling those can run code. If you trust "
        "the file, convert it once: python -c \"import torch; d = torch.load('"
        f"{path.name}', map_location='cpu', weights_only=False); d = d if isinstance(d, dict) else d.state_dict(); "
        "torch.save(d.get('state_dict', d.get('model', d)), 'weights.pth')\""
    )


def _read_zip(path: Path) -> Any:
    with ZipArchive(path) as archive:
        roots = [name.removesuffix("data.pkl") for name in archive.entries if name.endswith("/data.pkl")]
        roots = [root for root in roots if root.count("/") == 1]
        if len(roots) != 1 or f"{roots[0]}constants.pkl" in archive.entries:
            held = ", ".join(list(archive.entries)[:4]) or "nothing"
            other = f"it is a zip archive that torch did not write (it holds {held}): unpack it first"
            raise ArchiveError(other_archive(archive.entries) or other)
        root, storages = roots[0], {}
        if f"{root}byteorder" in archive.entries and bytes(archive.read(f"{root}byteorder").numpy()) != b"little":
            raise ArchiveError("its numbers are big-endian: save it on a little-endian machine")

        def storage(identity: Any) -> Tensor:
            dtype, key, count = _storage_of(identity, 5)
            if f"{root}data/{key}" not in archive.entries:
                raise PickleError(f"storage {key!r:.80} is missing")
            if key not in storages:
                storages[key] = archive.read(f"{root}data/{key}")
            if storages[key].numel() != count * dtype.itemsize:
                raise PickleError(f"storage {key} has {storages[key].numel()} bytes, not {count} of {dtype}")
            return storages[key].view(dtype)

        return tensor_reader(bytes(archive.read(f"{root}data.pkl").numpy()), archive.size, storage).load()


def _storage_of(identity: Any, length: int) -> tuple[torch.dtype, str, int]:
    """(dtype, key, number of elements) of the persistent id ``("storage", class, key, location, count, ...)``."""
    if type(identity) is not tuple or len(identity) < length or identity[0] != "storage":
        raise PickleError("a persistent id that is no storage")
    _, kind, key, _, count = identity[:5]
    if type(key) is not str or type(count) is not int or count < 0:
        raise PickleError("a storage without key or size")
    return storage_dtype(kind), key, count


class _LegacyStorages:
    """The storages of the older format: asked for while the pickle is read, filled from what follows it."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.flats: dict[str, tuple[torch.dtype, Tensor]] = {}

    def storage(self, identity: Any) -> Tensor:
        dtype, key, count = _storage_of(identity, 5)
        if key not in self.flats:
            self.room -= count * dtype.itemsize
            if self.room < 0:
                raise PickleError("its storages are larger than the file")
            self.flats[key] = dtype, torch.zeros(count * dtype.itemsize, dtype=torch.uint8)
        held, flat = self.flats[key]
        if held is not dtype or flat.numel() != count * dtype.itemsize:
            raise PickleError(f"storage {key} has two sizes")
        flat = flat.view(dtype)
        if len(identity) > 5 and identity[5] is not None:  # a storage that was a part of another one
            _, offset, size = identity[5]
            if type(offset) is not int or type(size) is not int or not 0 <= offset <= offset + size <= count:
                raise PickleError(f"a part of storage {key} that leaves it")
            return flat[offset : offset + size]
        return flat


def _read_legacy(path: Path) -> Any:
    """Five pickles (magic number, version, system, content, keys of storages), then each storage's size and bytes."""
    size = path.stat().st_size
    storages = _LegacyStorages(size)
    with open(path, "rb") as file:
        reader = tensor_reader(file.read(min(size, LEGACY_PICKLES)), size, storages.storage)
        magic, version, system, found, keys = (reader.load() for _ in range(5))
        if magic != LEGACY_MAGIC or version != 1001 or not isinstance(system, dict) or not system.get("little_endian"):
            raise PickleError("not in torch's format, or from a big-endian machine")
        if not isinstance(keys, list) or set(keys) != set(storages.flats) or len(keys) != len(storages.flats):
            raise PickleError("its storages are not those of its tensors")
        file.seek(reader.file.tell())
        for key in keys:
            dtype, flat = storages.flats[key]
            if struct.unpack("<q", file.read(8)) != (flat.numel() // dtype.itemsize,):
                raise PickleError(f"storage {key} has another size than its tensors expect")
            if file.readinto(flat.numpy().data) != flat.numel():
                raise PickleError("it is cut off")
    for own, view in reader.copies:
        own.copy_(view)
    return found
