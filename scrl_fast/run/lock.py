"""One run, one folder: a lock that the operating system takes back when its process ends, however it ends.

It reaches across machines where the file system's locks do, as NFS version 4 and most cluster file systems.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from pathlib import Path

from scrl_fast.atomic_files import naming
from scrl_fast.errors import UsageError, irregular_kind

try:
    import fcntl
except ImportError:  # no locks of this kind on this system
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_locks: dict[tuple[int, int], FolderLock] = {}  # of this process, by what `inode_of` says of the folder


class RunFolderLost(OSError):
    """The run folder is no longer where it was when the run began."""


class FolderLock:
    """The hold of this process on one run folder; made by `hold_folder`.

    exclusive: False where the file system has no locks, so that another process may use the folder as well.
    """

    def __init__(self, folder: Path, handle: int, exclusive: bool = True) -> None:
        self.folder, self.handle, self.inode = folder, handle, inode_of(folder)
        self.exclusive = exclusive

    def present(self) -> bool:
        """Whether the folder is still where it was."""
        return inode_of(self.folder) == self.inode

    def moved_to(self) -> Path | None:
        """Where the folder was moved, as Linux tells of an open file; None where it was removed or that is not told."""
        try:
            found = Path(os.readlink(f"/proc/self/fd/{self.handle}")).parent
        except OSError:
            return None
        return found if inode_of(found) == self.inode else None


def hold_folder(folder: Path, patience: float = 0.0, *, option: str = "run.dir") -> FolderLock:
    """Takes the folder for this process, which may take it again.

    patience: seconds to wait for another process. option: the one that names the folder, for errors.
    Raises UsageError naming the process that holds it, and for a ``.lock`` that no run has made.
    """
    folder = folder.absolute()
    inode = inode_of(folder)
    if inode is not None and (held := _locks.get(inode)) is not None:
        if held.present():
            return held
        release_folder(held)  # of a folder that was moved here, or of one that is gone and whose inode this one has
    handle = _open(folder, option)
    end = time.monotonic() + patience
    while (locked := _lock(handle)) is False:
        if time.monotonic() >= end:
            holder = os.read(handle, 200).decode("utf-8", "replace").strip() or "another process"
            os.close(handle)
            raise UsageError(
                f"{option} {str(folder)!r} is in use by {holder}: wait until that run has ended, or choose another "
                f"folder with --{option}=NEW"
            )
        time.sleep(0.2)
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    lock = FolderLock(folder, handle, exclusive=locked is True)
    if lock.inode is not None:
        _locks[lock.inode] = lock
    return lock


def release_folder(lock: FolderLock) -> None:
    """Gives the folder up."""
    if lock.inode is not None and _locks.pop(lock.inode, None) is not None:
        os.close(lock.handle)


def inode_of(folder: Path) -> tuple[int, int] | None:
    """(device, inode) of a folder; None where there is none."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _open(folder: Path, option: str) -> int:
    """The lock's file, open. A folder from elsewhere may hold a link to another file there, which would be cut."""
    path = folder / NAME
    refused = UsageError(f"{option} {str(folder)!r}: {NAME} there is a link or no regular file: remove it")
    if path.is_symlink():
        raise refused
    with naming(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o666)
    status = os.fstat(handle)
    if irregular_kind(status.st_mode) or status.st_nlink > 1:
        os.close(handle)
        raise refused
    return handle


def _lock(handle: int) -> bool | None:
    """False where another process holds it; None where the file system knows no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _HELD else None
    return True
