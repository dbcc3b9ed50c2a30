"""Reads files of weights, in any known format, as nested dicts of tensors. No code of a file is run."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scrl_fast.errors import UsageError
from scrl_fast.weights import checkpoint_files

HUB_WEIGHTS, HUB_CONFIG = "model.safetensors", "config.json"
_ZIP, _TORCH_LEGACY = b"PK\x03\x04", 0x1950A86A20F9469CFC6C


class WeightsError(UsageError):
    """Weights that cannot be read, or that do not fit the network they were meant for."""


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
    path = checkpoint_files.find(path)
    if not path.is_file():
        raise WeightsError(f"no weights at {path}")
    if path.suffix == ".safetensors":
        return path, read_safetensors(path)
    if path.suffix == ".onnx":
        return path, read_onnx(path)
    if path.suffix == ".pkl" or _is_plain_pickle(path):
        return path, read_pickle(path)
    return path, checkpoint_files.load(path)


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


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays in plain containers, and refuses to import anything else."""

    ALLOWED = frozenset(
        [
            ("collections", "OrderedDict"),
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("_codecs", "encode"),  # how protocol 2 spells bytes
            *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
            *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
        ]
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only NumPy arrays are read")
        return super().find_class(module, name)


def read_pickle(path: Path) -> dict[str, Any]:
    """A ``.pkl`` as detectron2 and Caffe2 write it: NumPy arrays in dicts. Arrays come back as tensors."""
    try:
        # latin1: what Python 2 wrote; bytes of arrays survive it unchanged
        document = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises whatever its opcodes stumble over
        raise WeightsError(f"cannot load {path}: {error or type(error).__name__}") from error
    if not isinstance(document, dict):
        raise WeightsError(f"cannot load {path}: it holds a {type(document).__name__}, not a dict")
    return _tensors(document)


def _tensors(tree: dict[Any, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            value = _tensors(value)
        elif isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fiub":
            value = torch.from_numpy(np.array(value))  # a copy that owns its memory and may be written to
        result[str(name)] = value
    return result


def _is_plain_pickle(path: Path) -> bool:
    """A pickle that torch did not write: protocol 2 or later, no zip, without torch's magic number."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(_ZIP) or len(start) < 2 or start[0] != 0x80:
        return False
    return _TORCH_LEGACY.to_bytes(10, "little") not in start
