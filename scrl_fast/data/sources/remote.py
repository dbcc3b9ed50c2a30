"""Files of an object store or web server, read by byte ranges through the package fsspec.

A store that fails for a moment is asked again, as a slow disk is waited for: no image is replaced because of it.
What it answers is data from elsewhere: an answer of another length than was asked for is not used.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from scrl_fast.data.image_files import printable
from scrl_fast.errors import UsageError

Answer = TypeVar("Answer")
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds between two tries; doubled from try to try
_START_PATIENCE = 30.0  # seconds of such waits in all
_BLOCK = 1 << 22  # bytes read at a time while a shard is indexed
_VERSION_FIELDS = (  # of different stores
    *("ETag", "etag", "md5Hash", "generation", "Content-MD5", "Digest"),
    *("mtime", "LastModified", "Last-Modified", "last_modified", "updated", "created"),
)
_FINAL = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(NotImplementedError, ImportError, AttributeError, TypeError, ValueError),
)
_PASSING = (408, 425, 429)  # of the answers of a web server that blame the question: too slow, too early, too often
_log = logging.getLogger("scrl_fast")


def is_url(place: str) -> bool:
    """Whether a place is one of a store, as `s3://bucket/a.tar`, and no path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)", place) is not None


def store_of(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Raises UsageError when there is none to be had."""
    if "::" in url:
        raise UsageError(f"data.root={url!r}: chains of file systems (::) are not read")
    if re.match(r"[^/]*//[^/@]*:(?!\d+/)[^@]*@|https?://[^?]*\?", url):  # would stand in the log and in config.yaml
        raise UsageError(
            "data.root holds a password, or a query (?...), which may hold a key; keys belong in the settings of the "
            "store's package"
        )
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise UsageError(f"data.root={url!r} needs the package fsspec: pip install 'scrl-fast[remote]'") from None
    try:
        return url_to_fs(url)
    except ImportError as error:
        raise UsageError(f"data.root={url!r} needs one more package beside scrl-fast[remote]: {error}") from None
    except (ValueError, OSError) as error:
        raise UsageError(f"data.root={url!r} cannot be opened: {printable(str(error))}") from None


class StoreDown(OSError):
    """A store that failed for as long as it was asked again."""


def ask(what: str, question: Callable[[], Answer], patience: float) -> Answer:
    """The answer of a store; asked again with growing waits while it fails, and each failure is logged.

    patience: seconds of waits in all. Raises StoreDown after them, other OSErrors where asking again is of no use.
    """
    wait, left, number = _FIRST_WAIT, patience, 1
    while True:
        try:
            return question()
        except Exception as error:  # each store has errors of its own
            why = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
            if _is_final(error):
                raise error if isinstance(error, OSError) else OSError(why) from error
            if left <= 0:
                raise StoreDown(f"the store failed {number} times, the last time with {why}") from error
        wait = min(wait, left)
        limit = f"; such waits end after {patience:g} s in all" if number == 1 else ""
        _log.warning("%s: %s; try %d follows in %g s%s", printable(what), printable(why), number + 1, wait, limit)
        time.sleep(wait)
        wait, left, number = min(2 * wait, _LONGEST_WAIT), left - wait, number + 1


def _is_final(error: Exception) -> bool:
    """Whether a store would answer the same again."""
    status = getattr(error, "status", None)  # of a web server
    refused = isinstance(status, int) and 400 <= status < 500 and status not in _PASSING
    return refused or isinstance(error, _FINAL)


class RemoteFile:
    """One file of a store. size: bytes. version: a number that changes when the store says that the file did, None
    where it never says so.

    Raises FileNotFoundError, or OSError when the store does not answer or does not tell the file's size.
    """

    def __init__(self, url: str, patience: float = _START_PATIENCE) -> None:
        self.url, self._patience = url, patience
        self._store, self._path = store_of(url)
        about = ask(url, lambda: self._store.info(self._path), patience)
        if about.get("type") == "directory":
            raise IsADirectoryError("is a folder")
        size = about.get("size")
        if not isinstance(size, int) or not 0 <= size < 1 << 62:
            raise OSError("the store does not tell its size, so it cannot be read by ranges")
        if about.get("partial") is False:
            raise OSError("the store does not send ranges of it")
        self.size = size
        told = "\0".join(f"{name}={about[name]}" for name in _VERSION_FIELDS if name in about)
        self.version = int.from_bytes(hashlib.sha256(told.encode()).digest()[:8], "big", signed=True) if told else None

    def read(self, size: int, offset: int) -> bytes:
        """`size` bytes from `offset`, fewer only where the file ends. Raises OSError."""
        size = max(0, min(size, self.size - offset))
        return read_range(self._store, self._path, self.url, size, offset, self._patience) if size else b""


class BlockReader:
    """`read` of a file, in large blocks of which the last is kept: an index asks for many headers in a row."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._start, self._data = file, 0, b""

    def read(self, size: int, offset: int) -> bytes:
        """`size` bytes from `offset`, fewer only where the file ends. Raises OSError."""
        size, at = max(0, min(size, self._file.size - offset)), offset - self._start
        if not 0 <= at <= at + size <= len(self._data):
            self._start, self._data = offset, self._file.read(max(size, _BLOCK), offset)
            at = 0
        return self._data[at : at + size]


class RemoteHandles:
    """Files of a store, for reading by place from many threads. patience: seconds for which a read is tried again."""

    def __init__(self, urls: Sequence[str], patience: float) -> None:
        self._urls, self._patience = list(urls), patience
        self._places = [store_of(url) for url in self._urls]

    def read(self, file: int, size: int, offset: int) -> bytes:
        """`size` bytes of file number `file`, fewer where it ends. Raises OSError; LoaderStalled for a store that is
        down: an image of it is not bad, and must not be replaced by others."""
        store, path = self._places[file]
        try:
            return read_range(store, path, self._urls[file], size, offset, self._patience)
        except StoreDown as error:
            from scrl_fast.data.workers import LoaderStalled  # torch, without which a command answers --help

            raise LoaderStalled(
                f"{printable(self._urls[file])}: {printable(str(error))}; it was tried again for {self._patience:g} s "
                f"(data.timeout). Is the store answering? If it is only slow, use --data.timeout={2 * self._patience:g}"
            ) from error


def read_range(store: Any, path: str, url: str, size: int, offset: int, patience: float) -> bytes:
    """A range of a file of a store, shorter where the file has become so.

    An answer that is cut is one to ask again. Raises OSError, also when the store sends more than was asked for.
    """

    def answer() -> bytes:
        data: bytes = store.cat_file(path, start=offset, end=offset + size)
        if len(data) < size:
            store.invalidate_cache(path)
            if store.info(path).get("size", 0) >= offset + size:
                raise ConnectionError(f"{len(data)} of {size} bytes came")
        return data

    data = ask(url, answer, patience)
    if len(data) > size:
        raise OSError("the store sends whole files instead of the ranges that it is asked for")
    return data


def remote_shards(pattern: str) -> list[str]:
    """URLs of the .tar files that a URL names: a folder, a file, or a glob, sorted. Raises UsageError or OSError."""
    store, path = store_of(pattern)
    if any(mark in path for mark in "*?["):
        found = ask(pattern, lambda: store.glob(path), _START_PATIENCE)
    elif not path.endswith(".tar") and ask(pattern, lambda: store.isdir(path), _START_PATIENCE):
        found = ask(pattern, lambda: store.glob(f"{path.rstrip('/')}/*.tar"), _START_PATIENCE)
    else:
        return [pattern]
    return [store.unstrip_protocol(name) for name in sorted(found)]
