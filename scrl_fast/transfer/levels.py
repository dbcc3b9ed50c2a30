"""Feature maps of several strides out of any network: those that it gives, or outputs of layers inside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scrl_fast.errors import UsageError
from scrl_fast.models.custom import dry_run, maps_in_dry_run, maps_of

SIDE = 256
"""Of the square image, in pixels, by which the strides of maps are told."""


class ChosenMaps(nn.Module):
    """A network whose forward pass gives a list of maps: ``places`` of its outputs, or the outputs of ``layers``."""

    def __init__(self, body: nn.Module, places: Sequence[int] = (), layers: Sequence[str] = ()) -> None:
        super().__init__()
        self.net, self.places, self.layers = body, list(places), list(layers)

    def forward(self, images: Tensor) -> list[Tensor]:
        if not self.layers:
            maps = maps_of(self.net(images))
            return [maps[place] for place in self.places]
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            return lambda _module, _inputs, output: found.__setitem__(name, output)

        hooks = [self.net.get_submodule(name).register_forward_hook(keep(name)) for name in self.layers]
        try:
            self.net(images)
        finally:
            for hook in hooks:
                hook.remove()
        return [found[name] for name in self.layers]


def level_maps(body: nn.Module, name: str, strides: Sequence[int]) -> tuple[ChosenMaps, list[int]]:
    """The network with one map for each of the strides, in their order, and the channels of each.

    A network that gives maps of all the strides is used as it is. Of any other, the level of a stride is the output of
    the last layer that runs at it.
    Raises UsageError naming the strides that were found where one is missing.
    """
    given = [(SIDE // m.shape[2], m.shape[1]) for m in maps_in_dry_run(body, name, (SIDE, SIDE)) if m.shape[2]]
    if set(strides) <= {stride for stride, _ in given}:
        places = [[stride for stride, _ in given].index(stride) for stride in strides]
        return ChosenMaps(body, places=places), [given[place][1] for place in places]
    last = _last_layers(body)
    if missing := [stride for stride in strides if stride not in last]:
        raise UsageError(
            f"model.backbone={name}: neither its outputs nor its layers give maps of stride "
            f"{', '.join(map(str, missing))}, only of {', '.join(map(str, sorted(last))) or 'none'}; a feature pyramid "
            f"needs {', '.join(map(str, strides))}"
        )
    return ChosenMaps(body, layers=[last[stride][0] for stride in strides]), [last[stride][1] for stride in strides]


def _last_layers(body: nn.Module) -> dict[int, tuple[str, int]]:
    """By stride, the layer that runs last of those whose output is a map of it, and the map's channels."""
    found: dict[int, tuple[str, int]] = {}

    def look(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            is_map = isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] == output.shape[3] > 0
            if is_map and SIDE % output.shape[2] == 0:
                found[SIDE // output.shape[2]] = name, output.shape[1]

        return hook

    with dry_run(body) as (run, device):
        for name, module in run.named_modules():
            module.register_forward_hook(look(name))
        run(torch.zeros(1, 3, SIDE, SIDE, device=device))
    return found
