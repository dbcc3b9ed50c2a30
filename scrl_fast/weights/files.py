"""Reads files of weights, in any known format, as nested dicts of tensors. No code of a file is run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from scrl_fast.config.run_folder import CHECKPOINTS
from scrl_fast.weights import checkpoint_files
from scrl_fast.weights.errors import WeightsError
from scrl_fast.weights.file_kinds import check_regular, other_kind, start_of
from scrl_fast.weights.onnx_files import read_onnx
from scrl_fast.weights.pickled_arrays import ARRAYS
from scrl_fast.weights.pickles import PickleReader
from scrl_fast.weights.safetensors_files import read_safetensors
from scrl_fast.weights.torch_files import LEGACY_MAGIC
from scrl_fast.weights.zip_archive import is_zip

HUB_WEIGHTS, HUB_CONFIG = "model.safetensors", "config.json"
MAX_CONFIG = 4 << 20
PUBLISHED_LAST = "checkpoint_last.pth"
"""The file that the published implementation's ``load_dir`` holds."""


def read_file(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """The file that ``path`` means and what it holds; safetensors metadata stands under ``__metadata__``.

    path: a file of any kind above or below; a folder in Hugging Face's style (model.safetensors, config.json); or a
        run folder.
    Raises WeightsError or CheckpointError naming the path for one that is missing, damaged or holds more than
    tensors and plain values.
    """
    path = Path(path)
    if path.is_dir() and (path / HUB_WEIGHTS).is_file():
        document = read_safetensors(path / HUB_WEIGHTS)
        document["__metadata__"] |= _hub_config(path / HUB_CONFIG)
        return path / HUB_WEIGHTS, document
    path = _file_in(path) if path.is_dir() else path
    check_regular(path)
    start = start_of(path)
    if kind := other_kind(start):
        raise WeightsError(f"cannot load {path}: {kind}")
    if is_zip(start):  # also under the suffix of another format
        return path, checkpoint_files.load(path)
    if path.suffix == ".onnx":
        return path, read_onnx(path)
    if path.suffix == ".safetensors" or (start[8:9] == b"{" and start[3:8] == bytes(5)):
        return path, read_safetensors(path)
    if path.suffix == ".pkl" or _is_plain_pickle(start):
        return path, read_pickle(path)
    return path, checkpoint_files.load(path)


def _file_in(folder: Path) -> Path:
    """The published implementation's last checkpoint, or the newest good one of a run folder."""
    last = folder / PUBLISHED_LAST
    return last if last.is_file() and not (folder / CHECKPOINTS).is_dir() else checkpoint_files.find(folder)


def _hub_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        if check_regular(path, "config").st_size > MAX_CONFIG:
            raise ValueError(f"it is larger than {MAX_CONFIG} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def read_pickle(path: Path) -> dict[str, Any]:
    """A ``.pkl`` as detectron2 and Caffe2 write it: NumPy arrays in dicts. Arrays come back as tensors."""
    try:
        document = PickleReader(path.read_bytes(), ARRAYS).load()
    except Exception as error:  # damaged opcodes raise half a dozen types on the way
        reason = str(error).strip().partition("\n")[0][:160] or type(error).__name__
        raise WeightsError(f"cannot load {path}: {reason}") from error
    if not isinstance(document, dict):
        raise WeightsError(f"cannot load {path}: it holds a {type(document).__name__}, not a dict")
    return {str(name): value for name, value in document.items()}


def _is_plain_pickle(start: bytes) -> bool:
    """A pickle that torch did not write: protocol 2 or later, without torch's magic number."""
    return start[:1] == b"\x80" and len(start) > 1 and LEGACY_MAGIC.to_bytes(10, "little") not in start[:64]
