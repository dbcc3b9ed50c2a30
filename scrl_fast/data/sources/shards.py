"""Images in tar shards (the layout of WebDataset), read by place: any order, any start, nothing extracted.

A shard is indexed once, from its headers; the index is kept beside it where the folder can be written to.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from scrl_fast.config.defaults import DATA_TIMEOUT
from scrl_fast.data.decode import EXTENSIONS
from scrl_fast.data.image_files import DEFAULT_LIMITS, BadImage, ImageLimits, check_size, printable, read_file
from scrl_fast.data.sources.base import UNLABELLED, EncodedImages
from scrl_fast.data.sources.remote import RemoteHandles, is_url, remote_shards
from scrl_fast.data.sources.shard_index import ShardIndex, shard_index
from scrl_fast.data.sources.tar import Handles
from scrl_fast.errors import UsageError

MANIFEST = "packed.json"
_MAX_LISTED = 5
_LARGEST_MANIFEST = 1 << 27  # bytes: the names of millions of shards
_AT_ONCE = 16  # shards of a store that are asked for at once: each answer takes some time, and none takes a core
_log = logging.getLogger("scrl_fast")


class TarImages(EncodedImages):
    """The images of shards, one shard after the other. classes: their names; else labels are numbered by `.cls`.

    patience: seconds for which a store that fails is asked again. `problems` says what is wrong with which shard: cut
    or damaged ones, members left out, labels that are no numbers.
    """

    def __init__(
        self,
        shards: Sequence[str],
        *,
        limits: ImageLimits = DEFAULT_LIMITS,
        classes: Sequence[str] = (),
        patience: float = DATA_TIMEOUT,
    ) -> None:
        self.shards, self.limits = list(shards), limits
        remote = bool(self.shards) and is_url(self.shards[0])
        self._index = _indexes(self.shards, _AT_ONCE if remote else 1)
        self.problems = [
            f"{path} {problem}"
            for path, index in zip(self.shards, self._index, strict=True)
            for problem in index.problems
        ]
        self._ends = np.cumsum([len(index.offsets) for index in self._index])
        most = max((int(index.labels.max(initial=UNLABELLED)) for index in self._index), default=UNLABELLED)
        self.num_classes = max(len(classes), most + 1)
        self.classes = list(classes) or [str(label) for label in range(self.num_classes)]
        self._handles = RemoteHandles(self.shards, patience) if remote else Handles(self.shards)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def data(self, index: int) -> bytes:
        shard, row = self._place(index)
        entry = self._index[shard]
        size = int(entry.sizes[row])
        check_size(size, self.limits.max_file_bytes, self.name_of(index))
        try:
            data = self._handles.read(shard, size, int(entry.offsets[row]))
        except OSError as error:
            raise BadImage(self.name_of(index), error.strerror or str(error)) from error
        if len(data) < size:
            raise BadImage(self.name_of(index), "the shard has become shorter since it was indexed")
        return data

    def label(self, index: int) -> int:
        shard, row = self._place(index)
        return int(self._index[shard].labels[row])

    def name_of(self, index: int) -> str:
        shard, row = self._place(index)
        return f"{self.shards[shard]}:{self._index[shard].name(row)}"

    def identity(self) -> dict[str, Any]:
        """See `identity_of`: the members' names and sizes, shard by shard."""
        found = hashlib.sha256()
        for path, index in zip(self.shards, self._index, strict=True):
            found.update(os.path.basename(path).encode("utf-8", "surrogateescape") + b"\0" + index.names)
            found.update(index.sizes.astype("<i8").tobytes())
        return {"images": len(self), "names": found.hexdigest()}

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must lie in 0..{len(self) - 1}, got {index}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)


def tar_shards(root: str, *, limits: ImageLimits = DEFAULT_LIMITS, patience: float = DATA_TIMEOUT) -> TarImages:
    """The shards that root names: a folder of .tar files, one file, or a pattern (`train-{000..146}.tar`, `a/*.tar`).

    Each may be a URL that the package fsspec knows (`s3://bucket/train-{000..146}.tar`); patience is for these.

    Raises UsageError if there are none, or no images in them.
    """
    found = TarImages(_shards_of(root), limits=limits, patience=patience)
    _tell(found.problems)
    if not len(found):
        what = f"; {found.problems[0]}" if found.problems else f": looked for members ending in {', '.join(EXTENSIONS)}"
        raise UsageError(f"no images in the {len(found.shards)} shards of data.root={root!r}{what}")
    return found


def packed_shards(root: str, *, limits: ImageLimits = DEFAULT_LIMITS) -> TarImages:
    """What `python -m scrl_fast.data.pack` wrote into the folder root.

    Raises UsageError if that is not there, not finished or damaged.
    """
    if not root:
        raise UsageError("data.source=packed needs the folder that scrl_fast.data.pack wrote: --data.root=DIR")
    manifest = read_manifest(root)
    if manifest is None:
        raise UsageError(
            f"data.root={root!r} holds no {MANIFEST}; python -m scrl_fast.data.pack writes such a folder "
            "(--data.source=tar reads any other shards)"
        )
    if not manifest.get("complete"):
        raise UsageError(
            f"packing into {root!r} was not finished; run scrl_fast.data.pack again, it goes on from there"
        )
    shards = [os.path.join(root, os.path.basename(name)) for name in manifest["shards"]]
    if missing := [path for path in shards if not os.path.isfile(path)]:
        raise UsageError(f"{len(missing)} of {len(shards)} shards of {root!r} are gone, the first being {missing[0]!r}")
    found = TarImages(shards, limits=limits, classes=manifest["classes"])
    if len(found) != manifest["images"]:
        problem = f": {found.problems[0]}" if found.problems else ""
        raise UsageError(f"{root!r} should hold {manifest['images']} images and holds {len(found)}{problem}")
    return found


def read_manifest(root: str | os.PathLike[str]) -> dict | None:
    """What packed.json in the folder says, or None if there is none. Raises UsageError if it cannot be understood."""
    path = Path(root, MANIFEST)
    if not path.exists():
        return None
    try:
        manifest = json.loads(read_file(str(path), limit=_LARGEST_MANIFEST))
    except BadImage as error:
        raise UsageError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: {error}") from None
    kinds = {"images": int, "classes": list, "shards": list}
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(name), kind) for name, kind in kinds.items()):
        raise UsageError(f"{path} was not written by scrl_fast.data.pack")
    if not all(isinstance(name, str) for name in manifest["classes"] + manifest["shards"]):
        raise UsageError(f"{path} was not written by scrl_fast.data.pack: names that are no text")
    return manifest


def _indexes(shards: Sequence[str], at_once: int) -> list[ShardIndex]:
    if at_once == 1:
        return list(map(shard_index, shards))
    with ThreadPoolExecutor(at_once, thread_name_prefix="scrl_fast-index") as pool:
        return list(pool.map(shard_index, shards))


# ---- which shards ----


def _shards_of(root: str) -> list[str]:
    if not root:
        raise UsageError(
            "data.source=tar needs the shards: --data.root=DIR, FILE.tar or a pattern like 'DIR/{00..99}.tar'"
        )
    if is_url(root):
        return _shards_of_store(root)
    if os.path.isdir(root):
        shards = sorted(path for path in glob.glob(os.path.join(glob.escape(root), "*.tar")) if os.path.isfile(path))
        if not shards:
            below = sorted({path.parent.name for path in Path(root).glob("*/*.tar")})
            hint = f", but its folders {', '.join(below[:5])} do; name one of them" if below else ""
            raise UsageError(f"data.root={root!r} holds no .tar files{hint}")
        return shards
    if os.path.isfile(root):
        return [root]
    names = list(expand_braces(root))
    shards = [path for name in names for path in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
    if not shards:
        raise UsageError(f"data.root={root!r} matches no file")
    missing = [path for path in shards if not os.path.isfile(path)]
    if missing and len(shards) == 1:
        raise UsageError(f"data.root={root!r} does not exist")
    if missing:
        raise UsageError(
            f"data.root={root!r} names {len(shards)} shards, of which {len(missing)} do not exist, "
            f"the first being {missing[0]!r}"
        )
    return shards


def _shards_of_store(root: str) -> list[str]:
    try:
        shards = [url for pattern in expand_braces(root) for url in remote_shards(pattern)]
    except OSError as error:
        raise UsageError(f"data.root={root!r} cannot be read: {printable(str(error))}") from None
    if not shards:
        raise UsageError(f"data.root={root!r} holds no .tar files")
    return shards


def expand_braces(pattern: str) -> Iterator[str]:
    """The names that a pattern with `{000..146}` or `{a,b}` stands for, as in a shell; zeros in front are kept."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not match:
        yield pattern
        return
    first, last, choices = match.groups()
    if choices is None:
        if abs(int(last) - int(first)) > 1_000_000:
            raise UsageError(f"the pattern {pattern!r} stands for more than a million shards")
        step = 1 if int(last) >= int(first) else -1
        digits = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        parts = [f"{number:0{digits}d}" for number in range(int(first), int(last) + step, step)]
    else:
        parts = choices.split(",")
    for part in parts:
        yield from expand_braces(pattern[: match.start()] + part + pattern[match.end() :])


def _tell(problems: list[str]) -> None:
    for problem in problems[:_MAX_LISTED]:
        _log.warning("shard %s", printable(problem))
    if len(problems) > _MAX_LISTED:
        _log.warning("and %d more problems with shards", len(problems) - _MAX_LISTED)
