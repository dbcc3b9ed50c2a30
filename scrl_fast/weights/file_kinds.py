"""Tells a file of weights from the files that people have in its place, and says what to do about those."""

from __future__ import annotations

import os
from pathlib import Path

from scrl_fast import atomic_files
from scrl_fast.errors import irregular_kind
from scrl_fast.weights.errors import WeightsError

START_BYTES = 512
"""Bytes by which a file is told; a tar archive shows itself at byte 257."""
_SPARSE_FROM = 1 << 30

_PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4"),
    b"7z\xbc\xaf\x27\x1c": ("7-Zip", "7z x"),
    b"Rar!": ("RAR", "unrar x"),
}
_FOREIGN = {
    b"\x89HDF": "an HDF5 file, as Keras and TensorFlow write it: load it there and save its arrays with safetensors",
    b"\x93NUMPY": "a single NumPy array (.npy), and weights are tensors under names",
    b"GGUF": "a GGUF file, which holds quantized language models",
    b"\x7fELF": "a program, not weights",
    b"\x89PNG": "an image, not weights",
    b"\xff\xd8\xff": "an image, not weights",
    b"GIF8": "an image, not weights",
    b"%PDF": "a PDF document, not weights",
}


def check_regular(path: Path, noun: str = "weights", error: type[WeightsError] = WeightsError) -> os.stat_result:
    """The status of a file with content.

    noun, error: what the message says is missing, and its class.
    Raises WeightsError for a path that is missing, a folder, a pipe, a device or a socket, empty, or so sparse that it
    claims far more bytes than it holds. A pipe is not opened and does not hang.

    A file system that counts no blocks says nothing about holes. Some count few for a file that is whole (compression,
    archives on tape); a ``.sha256`` that matches the content shows that it is.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as cause:
        reason = "" if isinstance(cause, FileNotFoundError) else f" ({getattr(cause, 'strerror', None) or cause})"
        raise error(f"no {noun} at {path}{reason}") from cause
    if kind := irregular_kind(status.st_mode):
        raise error(f"no {noun} at {path}: it is {kind}")
    if status.st_size == 0:
        raise error(f"{path} is damaged: it is empty; copy or download it again")
    held = getattr(status, "st_blocks", 0) * 512
    if status.st_size > _SPARSE_FROM and 0 < held < status.st_size // 16 and not _matches_digest(path):
        raise error(f"{path} is damaged: it claims {status.st_size} bytes and holds {held} (a sparse file)")
    return status


def _matches_digest(path: Path) -> bool:
    expected = atomic_files.expected_digest(path)
    return expected is not None and atomic_files.digest_of(path) == expected


def start_of(path: Path) -> bytes:
    """The first bytes of a file. Raises WeightsError naming the path where it may not be read."""
    try:
        with open(path, "rb") as file:
            return file.read(START_BYTES)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error


def other_kind(start: bytes) -> str:
    """What a file that starts so is, and the way round, where it is no weights; "" where it may be some."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, which stands in place of the file: fetch the file with 'git lfs pull'"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "it is an HTML page, such as a login or error page: download the file itself (look at it in a browser)"
    if text.startswith(b"<"):
        return f"it is an XML or HTML document, such as a server's error message: download it again ({_quoted(start)})"
    for magic, (name, command) in _PACKED.items():
        if start.startswith(magic):
            return f"it is compressed by {name}: unpack it first ({command})"
    for magic, kind in _FOREIGN.items():
        if start.startswith(magic):
            return f"it is {kind}"
    if start[257:262] == b"ustar":
        return _tar(start)
    if not start.strip(b"\0"):
        return "it starts with nothing but zeros: its copy or download failed"
    if text[:1] in (b"{", b"[") and _is_text(start):
        return f"it is JSON text, such as a server's error message or the index of a model in parts ({_quoted(start)})"
    if _is_text(start):
        return f"it is a text file ({_quoted(start)})"
    return ""


def _tar(start: bytes) -> str:
    first = start[:100].rstrip(b"\0").rpartition(b"/")[2]
    if first in (b"sys_info", b"pickle", b"storages", b"tensors"):
        return "it is in torch's tar format of before 0.1.10: load it with an old torch and save it again"
    return "it is a tar archive: unpack it first (tar xf)"


def _is_text(start: bytes) -> bool:
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(start) - 3:  # more than a character that was cut off
            return False
        text = start[: error.start].decode("utf-8")
    return len(text) > 3 and all(character.isprintable() or character in "\t\r\n\f" for character in text)


def _quoted(start: bytes) -> str:
    return repr(" ".join(start[:80].decode("utf-8", "replace").split())[:60])
