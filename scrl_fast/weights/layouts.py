"""Layouts: which library wrote the tensors of a file, to which network each belongs, and under which name.

Encoders use torchvision's names here (``conv1.weight``, ``layer1.0.bn1.bias``, ...); timm's models keep their own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scrl_fast.config.backbones import has_own_names
from scrl_fast.config.files import sections
from scrl_fast.config.schema import Config
from scrl_fast.weights.errors import WeightsError
from scrl_fast.weights.files import read_file
from scrl_fast.weights.metadata import plain, unflattened
from scrl_fast.weights.tensor_values import BATCH_COUNTER

State = dict[str, Tensor]

PUBLISHED_PARTS = {
    "online_network_state_dict": "online",
    "target_network_state_dict": "target",
    "predictor_state_dict": "predictor",
    "evaluator_state_dict": "probe",
}
_CONTAINERS = ("state_dict", "model", "backbone", "model_state_dict", "teacher", "student", "network", "encoder")
_BODY = "encoder.body."
_RESNET_NAME = "layer1.0.conv1.weight"
OWN_NAMES = "own names"
"""The layout of a file whose names are those of a network that is no ResNet: timm's, or the user's own."""


@dataclass
class Weights:
    """The tensors of one file, by network.

    ``online`` and ``target`` use the names of `scrl_fast.models.Branch` (``encoder.body.*``, ``projector.*``);
    ``predictor`` and ``probe`` use the names of their modules.
    """

    path: str
    layout: str
    """scrl_fast, scrl-reference, detectron2, mmdet, onnx, torchvision (its ResNets, whose names timm and most others
    share), or `OWN_NAMES`."""
    parts: dict[str, State]
    """State dicts of online, target, predictor and probe; networks that the file lacks are left out."""
    other: tuple[str, ...] = ()
    """Names of tensors that belong to none of our networks."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Backbone, method, epochs, normalisation, ..., where the file states them."""
    named: State = field(default_factory=dict)
    """Of a file with one network: its tensors under the names that they have in the file."""
    optimizer: dict[str, Any] | None = None
    """State dict of the optimizer, with the parameter order of the layout."""

    def encoder(self, branch: str = "online") -> State:
        """The encoder's tensors, without prefix. Raises WeightsError when the file lacks the branch."""
        if branch not in self.parts:
            raise WeightsError(f"{self.path} ({self.layout}) has no {branch} network, only {', '.join(self.parts)}")
        return {n.removeprefix(_BODY): t for n, t in self.parts[branch].items() if n.startswith(_BODY)}


def read(path: str | os.PathLike[str]) -> Weights:
    """Reads the weights of a file or folder (see `scrl_fast.weights.files.read_file`).

    Raises WeightsError naming the path when it holds no tensors.
    """
    found, document = read_file(path)
    name = str(found)
    metadata = _metadata(document.pop("__metadata__", {}))
    if isinstance(document.get("model"), dict) and "online" in document["model"]:
        return _scrl_fast_weights(name, document)
    if "online_network_state_dict" in document:
        return _published_weights(name, document)
    state, wrapped = _named_tensors(document)
    if not state:
        held = f"{', '.join(map(str, list(document)[:8]))}"
        raise WeightsError(f"{name} holds no tensors under names (it holds {held:.200})")
    if has_own_names(metadata.get("backbone")):  # exported by us: no layout to tell, and none to mistake them for
        own = {_BODY + key: tensor for key, tensor in state.items()}
        return Weights(name, OWN_NAMES, {"online": own}, metadata=metadata)
    if any(key.endswith("stem.conv1.weight") for key in state):
        return _backbone_weights(name, "detectron2", state, from_detectron2, "stem.conv1.weight", metadata)
    if any(re.search(r"(^|\.)encoder\.4\.0\.conv1\.weight$", key) for key in state):
        return _backbone_weights(name, "scrl-reference", state, from_published, "encoder.0.weight", metadata)
    layout = "torchvision" if any(key.endswith(_RESNET_NAME) for key in state) else OWN_NAMES
    if "meta" in wrapped and any(key.startswith("backbone.conv1") for key in state):
        layout = "mmdet"
    if isinstance(wrapped.get("meta"), dict) and "scrl_fast" in wrapped["meta"]:
        texts = {key: value for key, value in plain(wrapped["meta"]).items() if isinstance(value, str)}
        metadata = _metadata(unflattened(texts))
    if found.suffix == ".onnx":
        layout = "onnx"
    return _backbone_weights(name, layout, state, str, "conv1.weight", metadata)


def _metadata(value: Any) -> dict[str, Any]:
    """Metadata of ours; what another program wrote under that name is left out where it is of another kind."""
    found = plain(value)
    if not isinstance(found, dict):
        return {}
    if "config" in found:
        found["config"] = _options(found["config"])
    return {name: item for name, item in found.items() if name != "config" or isinstance(item, dict)}


def _options(config: Any) -> Any:
    """A run's options without the sections that are no dicts, as another program's may be."""
    if not isinstance(config, dict):
        return config
    names = sections(Config)
    return {name: item for name, item in config.items() if isinstance(item, dict) or name not in names}


def _scrl_fast_weights(path: str, document: Mapping[str, Any]) -> Weights:
    parts = {str(part): _state(path, part, state) for part, state in document["model"].items() if state is not None}
    config = _options(plain(document.get("config")))
    config = config if isinstance(config, dict) else {}
    metadata = {"config": config, **plain({k: document[k] for k in ("step", "epoch", "version") if k in document})}
    if "model" in config:
        metadata |= {name: str(config["model"].get(name, "")) for name in ("backbone", "method")}
    return Weights(path, "scrl_fast", parts, metadata=metadata, optimizer=_dict_or_none(document.get("optimizer")))


def _published_weights(path: str, document: Mapping[str, Any]) -> Weights:
    parts: dict[str, State] = {}
    for key, part in PUBLISHED_PARTS.items():
        state = document.get(key)
        if isinstance(state, dict) and state:  # modules that were not trained are saved as a string or left out
            tensors = {name.removeprefix("module."): tensor for name, tensor in _state(path, key, state).items()}
            parts[part] = {_published_name(part, name): tensor for name, tensor in tensors.items()}
    if "online" not in parts:
        raise WeightsError(f"{path}: online_network_state_dict is empty")
    metadata = plain({key: document[key] for key in ("epoch", "max_eval_score", "max_eval_epoch") if key in document})
    return Weights(
        path, "scrl-reference", parts, metadata=metadata, optimizer=_dict_or_none(document.get("optimizer_state_dict"))
    )


def _state(path: str, part: Any, state: Any) -> State:
    """Tensors by name. Raises WeightsError naming the part that holds something else."""
    if not isinstance(state, dict):
        raise WeightsError(f"{path}: {part!r:.80} is a {type(state).__name__}, must be tensors by name")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise WeightsError(f"{path}: {part!r:.80} holds a {type(tensor).__name__} under {name!r:.80}, not a tensor")
    return dict(state)


def _dict_or_none(value: Any) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


def _published_name(part: str, name: str) -> str:
    if part == "probe":
        return name.removeprefix("linear.")
    renamed = from_published(name)
    return name if renamed in (None, name) else f"{_BODY}{renamed}"


def _backbone_weights(
    path: str, layout: str, state: State, rename: Callable[[str], str | None], first: str, metadata: Mapping[str, Any]
) -> Weights:
    """A file with one network; the encoder's prefix is the one in front of its first tensor, ``first``."""
    prefix = _prefix_of(state, first)
    online: State = {}
    other: list[str] = []
    for key, tensor in state.items():
        name = rename(key[len(prefix) :]) if key.startswith(prefix) else None
        if name is None:
            other.append(key)
        elif name.startswith("projector.net."):
            online[name] = tensor
        else:
            online[_BODY + name] = tensor
    return Weights(path, layout, {"online": online}, tuple(other), dict(metadata), named=state)


def _prefix_of(state: State, first: str) -> str:
    """The prefix of the encoder's names: ``module.``, ``backbone.``, ``encoder_q.``, ``backbone.body.``, ..."""
    for key in state:
        if key == first or key.endswith("." + first):
            prefix = key[: -len(first)]
            if not re.search(r"\d\.$", prefix):  # layer1.0.conv1.weight is no stem
                return prefix
    return "module." if all(key.startswith("module.") for key in state) else ""


def _named_tensors(document: Mapping[str, Any]) -> tuple[State, Mapping[str, Any]]:
    """(tensors by name, the dict around them); the second is empty where the tensors are not wrapped."""
    for name in _CONTAINERS:
        inner = document.get(name)
        if isinstance(inner, dict) and any(isinstance(value, Tensor) for value in inner.values()):
            return {str(key): value for key, value in inner.items() if isinstance(value, Tensor)}, document
    return {str(key): value for key, value in document.items() if isinstance(value, Tensor)}, {}


# ---- names ----

_DETECTRON2_BLOCK = re.compile(r"res([2-5])\.(\d+)\.(conv\d|shortcut)\.(norm\.)?(\w+)")


def from_detectron2(name: str) -> str | None:
    """torchvision's name for a tensor of detectron2's ResNet; None where torchvision has none (``stem.fc.weight``)."""
    if match := re.fullmatch(r"stem\.conv1\.(norm\.)?(\w+)", name):
        return ("bn1." if match[1] else "conv1.") + match[2]
    if match := _DETECTRON2_BLOCK.fullmatch(name):
        stage, block, layer, norm, leaf = match.groups()
        if layer == "shortcut":
            return f"layer{int(stage) - 1}.{block}.downsample.{1 if norm else 0}.{leaf}"
        return f"layer{int(stage) - 1}.{block}.{layer.replace('conv', 'bn') if norm else layer}.{leaf}"
    return None


def to_detectron2(name: str) -> str | None:
    """detectron2's name for a tensor of torchvision's ResNet; None for batch counters, which detectron2 lacks."""
    if name.endswith(BATCH_COUNTER):
        return None
    name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    return name if name.startswith("res") else f"stem.{name}"


def from_published(name: str) -> str | None:
    """torchvision's name for the published implementation's encoder tensor; a projector's name is kept; else None."""
    if name.startswith("projector.net."):
        return name
    match = re.fullmatch(r"encoder\.(\d)\.(.+)", name)
    if match is None:
        return None
    index, rest = int(match[1]), match[2]
    stem = {0: "conv1", 1: "bn1"}.get(index, f"layer{index - 3}" if 4 <= index <= 7 else "")
    return f"{stem}.{rest}" if stem else None


def to_published(name: str) -> str:
    """The published implementation's name for a tensor of torchvision's ResNet."""
    head, _, rest = name.partition(".")
    index = {"conv1": 0, "bn1": 1}.get(head)
    return f"encoder.{int(head.removeprefix('layer')) + 3 if index is None else index}.{rest}"


def cast_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the dtype of ``like``, so that half-precision files fill float32 networks."""
    return tensor.to(like.dtype) if torch.is_floating_point(like) else tensor
