"""Files that are either there and whole or not there at all, and checksums beside them.

A rename is atomic but not durable: data is safe after the file's fsync, its name after the folder's.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK, errno.EACCES)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.ENOSYS)  # SMB, FUSE


class HashingWriter:
    """A binary file open for writing that hashes what passes.

    It keeps the operating system's error as well, since ``torch.save`` replaces it by one of its own that says
    nothing ("unexpected pos").
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.sha256.update(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


@contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Gives an OSError inside the block the path: those of writing and fsync have none.

    temporary: a name that stands for the path until it is complete; an error that names it names the path instead.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None or (temporary is not None and str(error.filename).startswith(str(temporary))):
            error.filename = str(path)
        raise


def write_synced(path: Path, write: Callable[[HashingWriter], object]) -> str:
    """Let ``write`` fill the new file, fsync it, and return the SHA-256 of what was written.

    Raises the operating system's own OSError, which names the path, when the disk refuses.
    """
    with naming(path), open(path, "wb") as file:
        writer = HashingWriter(file)
        try:
            write(writer)
        except RuntimeError as error:
            raise (writer.error or error) from None
        file.flush()
        os.fsync(file.fileno())
    return writer.sha256.hexdigest()


def write_file(path: Path, write: Callable[[HashingWriter], object]) -> None:
    """Replace the file, by what ``write`` fills, at once and durably: readers see the old content or the new."""
    with replacing(path) as temporary:
        write_synced(temporary, write)
        os.replace(temporary, path)
        sync_folder(path.parent)


@contextmanager
def replacing(path: Path, *, suffix: str = "") -> Iterator[Path]:
    """A temporary name to write to and to rename inside the block; what is left there is removed after it.

    suffix: as for `temporary_name`. An OSError names the path, also where its folder is gone.
    """
    temporary = temporary_name(path, suffix=suffix)
    try:
        with naming(path, temporary):
            yield temporary
    finally:
        with suppress(OSError):  # the folder is gone, or became a file: no reason to hide the error from above
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_file` for text."""
    write_file(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))


def write_json(path: str, document: dict[str, Any]) -> None:
    """Write a JSON file as `write_text` does, in a folder that is made where it is missing."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(document, indent=1) + "\n")


def publish(temporary: Path, path: Path, digest: str) -> None:
    """Give the whole file ``temporary`` its final name, with its SHA-256 beside it.

    A crash in between leaves a file without a checksum, never one beside the checksum of another, which would read
    as damage.
    """
    sidecar = sidecar_of(path)
    if sidecar.exists():
        sidecar.unlink()
        sync_folder(path.parent)
    os.replace(temporary, path)
    sync_folder(path.parent)
    write_text(sidecar, f"{digest}  {path.name}\n")


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for the file, or a synced copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with open(source, "rb") as file:
            write_synced(target, lambda copy: shutil.copyfileobj(file, copy, 1 << 20))


def temporary_name(path: Path, *, suffix: str = "") -> Path:
    """A hidden name in the same folder, since a rename is atomic only within one file system.

    suffix: the name's end, where readers tell the format by it.
    """
    return path.with_name(f".{path.name}.{os.getpid()}.tmp{suffix}")


def sidecar_of(path: Path) -> Path:
    """Where the checksum of the file stands, in the format of ``sha256sum``."""
    return path.with_name(path.name + ".sha256")


def expected_digest(path: Path) -> str | None:
    """The checksum beside the file; None when there is none that can be read."""
    try:
        if not sidecar_of(path).is_file():  # a pipe of that name would be waited for
            return None
        with open(sidecar_of(path), "rb") as file:
            words = file.read(1 << 12).decode(errors="replace").split()
    except OSError:
        return None
    return words[0] if words and re.fullmatch(r"[0-9a-f]{64}", words[0]) else None


def digest_of(path: Path) -> str:
    """SHA-256 of the file's content."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in the folder durable: without this a rename may be lost in a power cut, the data being safe."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # some systems cannot open a folder; nothing can be done there
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


def cache_folder() -> Path:
    """Where files are kept that can be made anew: `$XDG_CACHE_HOME/scrl_fast`, by default `~/.cache/scrl_fast`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "scrl_fast")
