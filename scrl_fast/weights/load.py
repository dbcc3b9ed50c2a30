"""From the weights of a file into networks, with a report, and a refusal when less than the encoder matches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from scrl_fast.models import SCRL, Encoder, build_encoder, encoder_names
from scrl_fast.optim import lars_param_groups
from scrl_fast.weights.files import WeightsError
from scrl_fast.weights.layouts import State, Weights, cast_like, read

if TYPE_CHECKING:
    from scrl_fast.optim import LARS

Source = str | os.PathLike[str] | Weights
Branch = Literal["online", "target"]
RANDOM = "random"
_COUNTER = "num_batches_tracked"


@dataclass
class Report:
    """Which names went where. ``str(report)`` is the line for the user."""

    source: str
    layout: str
    matched: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.layout == RANDOM:
            return "random weights"
        text = f"{self.source} ({self.layout}): {len(self.matched)} tensors of the encoder matched"
        if self.missing:  # anything else that is missing is refused
            text += f", {len(self.missing)} missing ({_some(self.missing, 1)}: counters that nothing reads)"
        if self.unexpected:
            text += f", {len(self.unexpected)} not used ({_some(self.unexpected)})"
        return "; ".join([text, *self.notes])


def load_into(encoder: nn.Module, source: Source, *, branch: Branch = "online") -> Report:
    """Fills an encoder with the weights of ``source``.

    encoder: an `scrl_fast.models.Encoder`, or a plain network with the same names (a torchvision ResNet, the ``body``
        of a torchvision detection backbone, a timm model); parameters and buffers are overwritten in place.
    source: a path for `read`, what `read` gave, or ``"random"``, which leaves the encoder as it is.
    branch: which network of a checkpoint that holds two.
    Raises WeightsError naming the first tensor that is missing or of another shape, before anything is written;
    batch counters, which no forward pass reads, may be missing.
    """
    if source == RANDOM:
        return Report(RANDOM, RANDOM)
    weights = source if isinstance(source, Weights) else read(source)
    body = encoder.body if isinstance(encoder, Encoder) else encoder
    name = encoder.name if isinstance(encoder, Encoder) else type(encoder).__name__
    state, own = weights.encoder(branch), body.state_dict()
    state = _best_names(state, own)
    _refuse_misfits(state, own, weights, name)
    body.load_state_dict({key: cast_like(state.get(key, tensor), tensor) for key, tensor in own.items()})
    used = [key for key in own if key in state]
    missing = tuple(key for key in own if key not in state)
    unexpected = tuple(key for key in state if key not in own) + weights.other
    return Report(weights.path, weights.layout, tuple(used), missing, unexpected)


def _best_names(state: State, own: Mapping[str, Tensor]) -> State:
    """The spelling of the file's names that fits most: without a prefix, or as timm's feature extractors have them,
    who spell ``stages.0`` as ``stages_0`` or put ``model.`` in front.
    """
    spellings = [
        state,
        {key.replace(".", "_", 1): tensor for key, tensor in state.items()},
        {f"model.{key}": tensor for key, tensor in state.items()},
    ]
    first = next(iter(own))
    prefixes = {key.removesuffix(first) for key in state if key.endswith("." + first)}
    prefixes = {prefix for prefix in prefixes if not prefix[-2:-1].isdigit()}  # layer1.0.conv1.weight is no stem
    spellings += [{key.removeprefix(prefix): tensor for key, tensor in state.items()} for prefix in sorted(prefixes)]
    return max(spellings, key=lambda names: sum(key in own for key in names))


def _refuse_misfits(state: State, own: Mapping[str, Tensor], weights: Weights, name: str) -> None:
    source, hint = f"{weights.path} ({weights.layout})", "Is it the right backbone?"
    if weights.metadata.get("backbone") not in (None, "", name):
        hint = f"By its own word it is of {weights.metadata['backbone']}: choose that backbone"
    elif weights.layout == "onnx":
        hint = "Were its norms folded into its convolutions?"
    wanted = [key for key in own if not key.endswith(_COUNTER)]
    missing = [key for key in wanted if key not in state]
    if missing:
        left = [key for key in state if key not in own]
        raise WeightsError(
            f"{source} does not fill the encoder {name}: {len(missing)} of {len(wanted)} tensors are missing "
            f"({_some(missing)}); names in the file that fit nothing: {_some(left) or 'none'}. "
            f"{hint}"
        )
    for key in wanted:
        if state[key].shape != own[key].shape:
            raise WeightsError(
                f"{source} does not fit the encoder {name}: {key} is {list(state[key].shape)}, must be "
                f"{list(own[key].shape)}. {hint}"
            )


def load_into_scrl(model: SCRL, source: Source) -> Report:
    """Fills the networks of a run: the encoder must match, heads, target and probe are taken where they fit.

    A target network that the file lacks becomes a copy of the online one, unless the file has neither projector: then
    both projectors stay as they were. The report's notes say which parts were taken and which start anew.
    """
    if source == RANDOM:
        return Report(RANDOM, RANDOM)
    weights = source if isinstance(source, Weights) else read(source)
    report = load_into(model.online.encoder, weights)
    own_target = "target" in weights.parts
    load_into(model.target.encoder, weights, branch="target" if own_target else "online")
    taken: list[str] = []
    fresh: list[str] = []
    target = "target" if own_target else "online"
    heads: list[tuple[str, nn.Module | None, State]] = [
        ("projector", model.online.projector, _under(weights.parts["online"], "projector.")),
        ("target projector", model.target.projector, _under(weights.parts[target], "projector.")),
        ("predictor", model.predictor, weights.parts.get("predictor", {})),
        ("probe", model.probe, weights.parts.get("probe", {})),
    ]
    for name, module, state in heads:
        if module is not None:
            (taken if _load_if_fits(module, state) else fresh).append(name)
    report.notes.append("encoder" + "".join(f", {name}" for name in taken) + " loaded")
    if not own_target:
        report.notes.append("the target encoder is a copy of the online one")
    if fresh:
        report.notes.append(f"{', '.join(fresh)} missing or of another size, so starting anew")
    return report


def _under(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _load_if_fits(module: nn.Module, state: State) -> bool:
    own = module.state_dict()
    fits = all(key in state and state[key].shape == own[key].shape for key in own if not key.endswith(_COUNTER))
    if fits:
        module.load_state_dict({key: cast_like(state.get(key, tensor), tensor) for key, tensor in own.items()})
    return fits


# ---- the optimizer's momentum ----


def load_momentum(model: SCRL, optimizer: LARS, weights: Weights) -> int:
    """Fills the optimizer's momentum buffers from a checkpoint of ours or of the published implementation.

    Returns how many buffers were filled: those whose parameter has the same name and shape on both sides.
    """
    found = momentum_by_name(weights)
    mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    filled = 0
    for name, parameter in model.named_parameters():
        buffer = found.get(name)
        if buffer is not None and id(parameter) in mine and buffer.shape == parameter.shape:
            kept = torch.empty_like(parameter, requires_grad=False, memory_format=torch.preserve_format)
            optimizer.state[parameter]["momentum_buffer"] = kept.copy_(buffer)
            filled += 1
    return filled


def momentum_by_name(weights: Weights) -> dict[str, Tensor]:
    """Momentum buffers by the parameter's name in `SCRL`; empty when the file holds none."""
    state = (weights.optimizer or {}).get("state", {})
    order = [name for group in parameter_order(weights) for name in group]
    return {name: state[i]["momentum_buffer"] for i, name in enumerate(order) if "momentum_buffer" in state.get(i, {})}


def parameter_order(weights: Weights) -> list[list[str]]:
    """Names of the parameters, a list for each group, in the order in which the file's optimizer numbers them.

    Both implementations put what LARS adapts before what it leaves out, each in the order of the modules; the published
    one divides by name, and takes the probe in as well.
    """
    published = weights.layout == "scrl-reference" or weights.metadata.get("config", {}).get("compat") == "kakaobrain"
    named = [
        (f"{part}.{name}", tensor.detach().requires_grad_())
        for part in ("online", "predictor", "probe")
        for name, tensor in weights.parts.get(part, {}).items()
        if not name.endswith(("running_mean", "running_var", _COUNTER)) and tensor.is_floating_point()
    ]
    last = [] if published else [name for name, _ in named if name.startswith("probe.")]
    names = {id(tensor): name for name, tensor in named}
    under_lars = [(name, tensor) for name, tensor in named if name not in last]
    groups = lars_param_groups(under_lars, 0.0, compat="kakaobrain" if published else "none")
    return [*([names[id(tensor)] for tensor in group["params"]] for group in groups), last]


# ---- encoders from files ----


def encoder_of(source: Source, *, backbone: str = "", branch: Branch = "online") -> Encoder:
    """An encoder with the weights of ``source``: of the named backbone, or of the one that the file is found to be.

    Raises WeightsError when no backbone that is known has these tensors.
    """
    weights = source if isinstance(source, Weights) else read(source)
    encoder = build_encoder(backbone or guess_backbone(weights))
    load_into(encoder, weights, branch=branch)
    return encoder


def load_encoder(source: Source, *, backbone: str = "", branch: Branch = "online") -> nn.Module:
    """`encoder_of` as the plain torchvision (``fc`` is Identity) or timm module that it is made of, in eval mode."""
    return encoder_of(source, backbone=backbone, branch=branch).body.eval()


def guess_backbone(weights: Weights) -> str:
    """The backbone's name: from what the file says of itself, else the one whose tensors have the same shapes."""
    said = weights.metadata.get("backbone")
    if said:
        return str(said)
    state = weights.encoder()
    for name in encoder_names():
        with torch.device("meta"):
            own: dict[str, Any] = build_encoder(name).body.state_dict()
        shapes = {key: tensor.shape for key, tensor in own.items() if not key.endswith(_COUNTER)}
        if all(key in state and state[key].shape == shape for key, shape in shapes.items()) and not any(
            key.startswith("layer") and key not in own for key in state
        ):
            return name
    raise WeightsError(f"{weights.path} ({weights.layout}): no backbone known here has its tensors; name it")


def _some(names: Iterable[str], count: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
