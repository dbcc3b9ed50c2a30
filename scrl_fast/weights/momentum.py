"""The optimizer's momentum buffers of a checkpoint, matched to parameters by name."""

from __future__ import annotations

import torch
from torch import Tensor

from scrl_fast.models import SCRL
from scrl_fast.optim import LARS, lars_param_groups
from scrl_fast.weights.layouts import Weights
from scrl_fast.weights.tensor_values import BATCH_COUNTER, check_values


def load_momentum(model: SCRL, optimizer: LARS, weights: Weights) -> int:
    """Fill the optimizer's momentum buffers from a checkpoint of ours or of the published implementation.

    Returns the number of buffers filled: one for each parameter with the same name and shape on both sides.
    Raises WeightsError naming a buffer that holds no finite floats; nothing is changed then.
    """
    found = momentum_by_name(weights)
    mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    fits = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name in found and id(parameter) in mine and found[name].shape == parameter.shape
    }
    check_values(f"{weights.path} ({weights.layout}): momentum", found, fits)
    for name, parameter in fits.items():
        kept = torch.empty_like(parameter, requires_grad=False, memory_format=torch.preserve_format)
        optimizer.state[parameter]["momentum_buffer"] = kept.copy_(found[name])
    return len(fits)


def momentum_by_name(weights: Weights) -> dict[str, Tensor]:
    """Momentum buffers by the parameter's name in `SCRL`; empty without momentum in the file, as of AdamW."""
    optimizer = weights.optimizer or {}
    state, groups = optimizer.get("state"), optimizer.get("param_groups")
    if not isinstance(state, dict) or (isinstance(groups, list) and any("betas" in group for group in groups)):
        return {}
    order = [name for group in parameter_order(weights) for name in group]
    entries = {name: state.get(i) for i, name in enumerate(order)}
    found = {name: entry.get("momentum_buffer") for name, entry in entries.items() if isinstance(entry, dict)}
    return {name: buffer for name, buffer in found.items() if isinstance(buffer, Tensor)}


def parameter_order(weights: Weights) -> list[list[str]]:
    """Names of the parameters, one list for each group, in the order by which the file's optimizer numbers them.

    Both implementations put parameters under LARS before those outside it, each in the order of the modules. The
    published one divides them by name and includes the probe, for which its optimizer keeps two places in any case.
    """
    config = weights.metadata.get("config")
    compat = config.get("compat") if isinstance(config, dict) else None
    published = weights.layout == "scrl-reference" or compat == "kakaobrain"
    named = [
        (f"{part}.{name}", tensor.detach().requires_grad_())
        for part in ("online", "predictor", "probe")
        for name, tensor in weights.parts.get(part, {}).items()
        if not name.endswith(("running_mean", "running_var", BATCH_COUNTER)) and tensor.is_floating_point()
    ]
    last = [] if published else [name for name, _ in named if name.startswith("probe.")]
    names = {id(tensor): name for name, tensor in named}
    under_lars = [(name, tensor) for name, tensor in named if name not in last]
    groups = lars_param_groups(under_lars, 0.0, compat="kakaobrain" if published else "none")
    order = [[names[id(tensor)] for tensor in group["params"]] for group in groups]
    if weights.layout == "scrl-reference" and "probe" not in weights.parts and _counted(weights) != len(named):
        order = [[*order[0], "probe.weight"], [*order[1], "probe.bias"]]
    return [*order, last]


def _counted(weights: Weights) -> int:
    """The number of parameters that the file's optimizer has; -1 where it does not say."""
    groups = (weights.optimizer or {}).get("param_groups")
    lists = [group.get("params") for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
    return sum(len(numbers) for numbers in lists if isinstance(numbers, list)) if lists else -1
