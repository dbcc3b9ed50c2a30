"""Reads files of weights, in any known format, as nested dicts of tensors. No code of a file is run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from scrl_fast.weights import checkpoint_files
from scrl_fast.weights.errors import WeightsError
from scrl_fast.weights.file_kinds import check_regular, other_kind, start_of
from scrl_fast.weights.pickled_arrays import ARRAYS
from scrl_fast.weights.pickles import PickleReader
from scrl_fast.weights.torch_files import LEGACY_MAGIC
from scrl_fast.weights.zip_archive import is_zip

HUB_WEIGHTS, HUB_CONFIG = "model.safetensors", "config.json"
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
    if path.suffix == ".safetensors":
        return path, read_safetensors(path)
    if path.suffix == ".onnx":
        return path, read_onnx(path)
    if not is_zip(start) and (path.suffix == ".pkl" or _is_plain_pickle(start)):
        return path, read_pickle(path)
    return path, checkpoint_files.load(path)


def _file_in(folder: Path) -> Path:
    """The published implementation's last checkpoint, or the newest good one of a run folder."""
    last = folder / PUBLISHED_LAST
    return last if last.is_file() and not (folder / "checkpoints").is_dir() else checkpoint_files.find(folder)


def read_safetensors(path: Path) -> dict[str, Any]:
    """Tensors by name, and the file's metadata under ``__metadata__``."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise WeightsError(f"{path}: safetensors is not installed (pip install safetensors)") from error
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return {**tensors, "__metadata__": unflattened(file.metadata() or {})}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"cannot load {path}: {error}") from error


def read_onnx(path: Path) -> dict[str, Any]:
    """The parameters of an ONNX graph by name, and its metadata under ``__metadata__``.

    `scrl_fast.export` keeps every parameter under its name; other exporters fold norms into convolutions, and such a
    graph then lacks them.
    """
    try:
        import onnx
    except ImportError as error:
        raise WeightsError(f"{path}: onnx is not installed (pip install 'scrl-fast[export]')") from error
    try:
        model = onnx.load(str(path))
        tensors = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in model.graph.initializer}
    except Exception as error:  # protobuf's own, and what its fields stumble over
        raise WeightsError(f"cannot load {path}: {error or type(error).__name__}") from error
    return {**tensors, "__metadata__": unflattened({entry.key: entry.value for entry in model.metadata_props})}


def flattened(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Text by name, which is all that some formats hold: all but text as JSON, and text that would be read as such."""
    plain = {name for name, value in metadata.items() if isinstance(value, str) and _from_text(value) == value}
    return {name: value if name in plain else json.dumps(value) for name, value in metadata.items()}


def unflattened(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What `flattened` was given: JSON numbers, lists, dicts and quoted text are read, any other text stays text."""
    return {name: _from_text(value) for name, value in metadata.items()}


def _from_text(value: str) -> Any:
    try:
        found = json.loads(value)
    except ValueError:
        return value
    return found if isinstance(found, (int, float, list, dict, str)) and not isinstance(found, bool) else value


def _hub_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
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
