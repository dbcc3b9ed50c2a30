"""Extracted features, kept under a key of all they depend on: weights, images, boxes and options."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scrl_fast import atomic_files
from scrl_fast.config.backbones import is_code
from scrl_fast.data.image_files import printable
from scrl_fast.errors import UsageError
from scrl_fast.evaluate.images import unreadable
from scrl_fast.evaluate.result import TaskContext
from scrl_fast.weights import checkpoint_files

VERSION = 2  # of what is computed: raise it when features change for the same key
AUTO_BYTES = 2_000_000_000


class FeatureCache:
    """Dicts of tensors in files of a folder. folder: a path, ``auto`` (~/.cache/scrl_fast), or empty for no cache."""

    def __init__(self, folder: str, context: TaskContext = TaskContext()) -> None:  # noqa: B008 (frozen)
        self.folder = atomic_files.cache_folder() if folder == "auto" else Path(folder) if folder else None
        self.limit = AUTO_BYTES if folder == "auto" else None
        self.say, self.world = context.say, context.world

    def get(
        self, parts: Callable[[], list[Any]], make: Callable[[], dict[str, Tensor]], *, kind: str = "features"
    ) -> dict[str, Tensor]:
        """What ``make`` returns, or what it returned before for the same parts. A damaged file is made anew.

        parts: returns all that the features depend on. Rank 0 alone reads and writes files; where it finds one, the
        other ranks return nothing. kind: what it is, in the name of the file and in what is said.
        """
        if self.folder is None:
            return make()
        folder, path, found = self.folder, None, None

        def is_kept() -> bool:
            nonlocal path, found
            path = folder / f"{kind}-{key_of([VERSION, torch.__version__, *parts()])[:32]}.pt"
            found = self._read(path, kind)
            return found is not None

        if self.world.broadcast_from_rank0(is_kept):  # an error of ``parts`` ends every rank: none waits for rank 0
            return found or {}
        made = make()
        if path is not None:
            made = {name: value.cpu() for name, value in made.items()}
            self._keep(path, made, kind)
        return made

    def _read(self, path: Path, kind: str) -> dict[str, Tensor] | None:
        if not path.exists():
            return None
        try:
            found = checkpoint_files.load(path).get("features")
            if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
                raise checkpoint_files.CheckpointError(f"{path}: 'features' is no dict of tensors")
        except checkpoint_files.CheckpointError as error:
            self.say(f"cached {kind}: of no use ({error}); extracting them again")
            return None
        self.say(f"{kind} taken from {path}")
        return found

    def _keep(self, path: Path, made: dict[str, Tensor], kind: str) -> None:
        size = sum(value.numel() * value.element_size() for value in made.values())
        if self.limit is not None and size > self.limit:
            self.say(f"{size / 1e9:.1f} GB of {kind} are not kept: name a folder for them with --cache=DIR")
            return
        temporary = atomic_files.temporary_name(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            digest = atomic_files.write_synced(temporary, lambda file: torch.save({"features": made}, file))  # type: ignore[arg-type]
            atomic_files.publish(temporary, path, digest)
        except OSError as error:  # a full disk costs the cache, not the evaluation
            self.say(f"{kind}: not kept: {error}")
        finally:
            with suppress(OSError):  # as above: a file in the folder's place, a folder that may not be searched
                temporary.unlink(missing_ok=True)


def key_of(parts: list[Any]) -> str:
    """SHA-256 over values, arrays, tensors and modules (their whole state), each with its type and shape."""
    digest = hashlib.sha256()
    for part in parts:
        _add(digest, part)
    return digest.hexdigest()


def _add(digest: Any, part: Any) -> None:
    if isinstance(part, nn.Module):
        for name, value in part.state_dict().items():
            digest.update(name.encode())
            _add(digest, value)
        digest.update(code_of(getattr(part, "name", "")))
    elif isinstance(part, Tensor):
        flat = part.detach().cpu().reshape(-1)  # in order of the axes, however they lie in memory
        _add(digest, flat.view(torch.uint8).numpy())
        digest.update(f"{part.dtype}{list(part.shape)}".encode())
    elif isinstance(part, np.ndarray):
        digest.update(f"{part.dtype}{part.shape}".encode())
        digest.update(np.ascontiguousarray(part).tobytes())
    elif isinstance(part, (list, tuple)):
        digest.update(f"[{len(part)}".encode())
        for item in part:
            _add(digest, item)
    else:
        digest.update(f"{type(part).__name__}={part!r};".encode())


def code_of(name: object) -> bytes:
    """The source of the module that makes a network, ``package.module:function``: the same weights may do otherwise."""
    module = sys.modules.get(str(name).partition(":")[0]) if is_code(name) else None
    with suppress(OSError):
        return Path(str(getattr(module, "__file__", ""))).read_bytes()
    return b""


def content_key(source: Any) -> list[Any]:
    """What tells one set of images from another: of files names, sizes and times of change; of scenes the pixels.

    Raises UsageError for a file that is not there any more, or cannot be looked at.
    """
    if isinstance(images := getattr(source, "images", None), np.ndarray):
        return [images]
    names = [source.name_of(index) for index in range(len(source))]
    return [names, [_size_and_time(name) for name in names]]


def _size_and_time(name: str) -> tuple[int, int]:
    try:
        status = os.stat(name)
    except OSError as error:
        raise UsageError(unreadable(f"{printable(name)}: {error.strerror}")) from error
    return status.st_size, status.st_mtime_ns
