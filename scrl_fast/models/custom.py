"""Any network as an encoder: its map's channels and stride, found by running a copy of it once."""

from __future__ import annotations

import contextlib
import copy
import importlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from scrl_fast.config.defaults import VIEW_SIZE
from scrl_fast.errors import UsageError, did_you_mean
from scrl_fast.models.encoder import WholeEncoder

STRIP_WIDTHS = (448, 896)
"""Widths of the strips whose maps tell the stride: they differ by a multiple of 2, 4, ..., 64, 7, 14 and 28."""


class ModuleEncoder(WholeEncoder):
    """A network of the user's as an encoder. Of several maps (list, tuple, dict) the last one counts."""

    def forward(self, images: Tensor) -> Tensor:
        features = maps_of(self.body(images))[-1]
        if features.ndim != 4 or features.shape[1] != self.out_channels:  # in training it may do what it did not before
            got = description(features)
            raise ValueError(f"encoder {self.name} gave {got}, not a map [B, {self.out_channels}, H, W]")
        return features


def wrap_module(module: nn.Module, name: str = "", *, size: int = VIEW_SIZE) -> ModuleEncoder:
    """A network as an encoder; its weights are trained where they are.

    module: images ``[B, 3, H, W]`` to a map ``[B, C, ceil(H / stride), ceil(W / stride)]``, or to several, the coarsest
        last. Its attributes ``out_channels`` and ``stride`` are used where they are whole numbers. All is checked by
        running a copy in eval mode; the module and torch's, NumPy's and Python's generators stay as they are.
    name: what the encoder is called; ``<ClassName>`` by default. size: side of the images that it will see, in pixels.
    Raises UsageError with what it gave where that is no such map.
    """
    name = name or f"<{type(module).__name__}>"
    if not isinstance(module, nn.Module):
        raise UsageError(f"encoder {name}: must be a torch.nn.Module, is a {type(module).__name__}")
    if any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
        raise UsageError(f"encoder {name}: it has lazy parameters without a shape; run it on one batch first")
    features = maps_in_dry_run(module, name, (size, size))[-1]
    channels, rows, columns = features.shape[1:]
    stated = _whole_number(module, "out_channels")
    if stated and stated != channels:
        raise UsageError(f"encoder {name}: its out_channels is {stated}, but its map has {channels}")
    stride = _whole_number(module, "stride") or _found_stride(module, name, size, rows)
    wanted = -(-size // stride)
    shape = f"its map is {rows} x {columns} cells for an image of {size} x {size} pixels"
    if min(rows, columns) < wanted:
        raise UsageError(
            f"encoder {name}: {shape}, smaller than its stride of {stride} says ({wanted} x {wanted}): pad its "
            "convolutions, since cell i must lie over the pixels from i * stride on"
        )
    if max(rows, columns) > wanted + 1:
        raise UsageError(f"encoder {name}: {shape}, larger than its stride of {stride} says ({wanted} x {wanted})")
    return ModuleEncoder(name, module, channels, stride)


def import_module_encoder(name: str, *, size: int = VIEW_SIZE) -> ModuleEncoder:
    """The encoder that ``package.module:function()`` makes. It runs that code: never call it with a name from a file.

    Raises UsageError where it cannot be imported, fails, or gives no network.
    """
    module_name, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(f"backbone {name}: cannot import {module_name} ({error})") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UsageError(f"backbone {name}: {module_name} has no {attribute}{did_you_mean(part, dir(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"backbone {name}: must be a function without arguments, is a {type(found).__name__}")
    try:
        made = found()
    except Exception as error:
        raise UsageError(f"backbone {name}: the function failed with {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"backbone {name}: must make a torch.nn.Module, made {description(made)}")
    return wrap_module(made, name, size=size)


def maps_of(output: Any) -> list[Tensor]:
    """The tensors of what a network gave: one, or several in a list, tuple or dict, in their order."""
    if isinstance(output, Mapping):
        output = list(output.values())
    return list(output) if isinstance(output, (list, tuple)) else [output]


def maps_in_dry_run(module: nn.Module, name: str, size: tuple[int, int]) -> list[Tensor]:
    """The maps that a copy of the network gives for one image of (height, width). Raises UsageError without a map."""
    try:
        with dry_run(module) as (run, device):
            output = run(torch.zeros(1, 3, *size, device=device))
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        what = f"an image of {size[0]} x {size[1]} pixels fails with {type(error).__name__}: {first}"
        raise UsageError(f"encoder {name}: {what}") from error
    maps = maps_of(output)
    if not maps or not all(isinstance(each, Tensor) and each.ndim == 4 and len(each) == 1 for each in maps):
        raise UsageError(
            f"encoder {name}: must give a feature map [B, C, H, W], or several, for an image "
            f"[1, 3, {size[0]}, {size[1]}]; it gave {description(output)}"
        )
    return maps


@contextlib.contextmanager
def dry_run(module: nn.Module) -> Iterator[tuple[nn.Module, torch.device]]:
    """A copy of the network in eval mode, and its device; what runs in here draws from no generator that counts."""
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            yield copy.deepcopy(module).eval(), device
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def description(value: Any) -> str:
    """A network's output in words, for errors."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, (list, tuple, Mapping)):
        return f"a {type(value).__name__} of {', '.join(map(description, maps_of(value)[:4])) or 'nothing'}"
    return f"a {type(value).__name__}"


def _whole_number(module: nn.Module, attribute: str) -> int:
    value = getattr(module, attribute, 0)
    return value if type(value) is int and value > 0 else 0


def _found_stride(module: nn.Module, name: str, size: int, rows: int) -> int:
    """By how many pixels a strip must be wider for one cell more; of networks for one size, the size by its cells."""
    height = -(-size // 64) * 64
    try:
        widths = [maps_in_dry_run(module, name, (height, width))[-1].shape[3] for width in STRIP_WIDTHS]
    except UsageError:
        widths = []
    more, cells = (STRIP_WIDTHS[1] - STRIP_WIDTHS[0], widths[1] - widths[0]) if widths else (size, rows)
    if cells < 1 or more % cells:
        raise UsageError(
            f"encoder {name}: its stride cannot be told from {rows} rows of cells for {size} pixels: state it as an "
            "attribute of the module, such as stride = 16"
        )
    return more // cells
