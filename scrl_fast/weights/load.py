"""Loads the weights of a file into networks, reports what matched, and refuses less than the whole encoder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scrl_fast.config.backbones import RANDOM, TIMM_PREFIX, has_own_names, is_code
from scrl_fast.config.defaults import VIEW_SIZE
from scrl_fast.models import SCRL, Encoder, build_encoder, encoder_names
from scrl_fast.weights.errors import WeightsError
from scrl_fast.weights.layouts import BATCH_COUNTER, OWN_NAMES, State, Weights, cast_like, read
from scrl_fast.weights.tensor_values import check_values

Source = str | os.PathLike[str] | Weights
Branch = Literal["online", "target"]
LARGEST_VIEW = 1024
"""Side of views, in pixels, that is taken from a file."""


@dataclass
class LoadReport:
    """Which tensors were loaded and which were not. ``str(report)`` is the line for the user."""

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
            text += f", {len(self.missing)} missing ({_shortened(self.missing, 1)}: counters that nothing reads)"
        if self.unexpected:
            text += f", {len(self.unexpected)} more in the file not used ({_shortened(self.unexpected)})"
        return "; ".join([text, *self.notes])


def load_into(encoder: nn.Module, source: Source, *, branch: Branch = "online") -> LoadReport:
    """Fill an encoder with the weights of ``source``.

    encoder: an `scrl_fast.models.Encoder`, or a plain network with the same names (a torchvision ResNet, the ``body``
        of a torchvision detection backbone, a timm model); parameters and buffers are overwritten in place.
    source: a path for `read`, the `Weights` that it returned, or ``"random"``, which leaves the encoder as it is.
    branch: the network to take from a checkpoint with two.
    Raises WeightsError, before anything is written, naming the first tensor that is missing, of another shape, no
    floats, or not finite. Batch counters may be missing, since no forward pass reads them.
    """
    if source == RANDOM:
        return LoadReport(RANDOM, RANDOM)
    weights = source if isinstance(source, Weights) else read(source)
    body = encoder.body if isinstance(encoder, Encoder) else encoder
    name = encoder.name if isinstance(encoder, Encoder) else type(encoder).__name__
    own = body.state_dict()
    state = _fitting(weights, own, name, branch)
    check_values(f"{weights.path} ({weights.layout})", state, own)
    body.load_state_dict({key: cast_like(state.get(key, tensor), tensor) for key, tensor in own.items()})
    used = [key for key in own if key in state]
    missing = tuple(key for key in own if key not in state)
    unexpected = tuple(key for key in state if key not in own) + weights.other
    layout = "timm" if weights.layout == OWN_NAMES and name.startswith(TIMM_PREFIX) else weights.layout
    return LoadReport(weights.path, layout, tuple(used), missing, unexpected)


def _fitting(weights: Weights, own: Mapping[str, Tensor], name: str, branch: Branch) -> State:
    """The tensors for a network's own, under its names. Raises WeightsError where one is missing or misshapen."""
    state = _best_names(weights.encoder(branch), own)
    if weights.named and any(key not in state for key in own):  # a network of the user's own: no layout fits its names
        state = max(state, _best_names(weights.named, own), key=lambda names: sum(key in own for key in names))
    _refuse_misfits(state, own, weights, name)
    return state


def _best_names(state: State, own: Mapping[str, Tensor]) -> State:
    """The tensors under the spelling of their names that matches most of the network's.

    timm's feature extractors spell ``stages.0`` as ``stages_0`` or put ``model.`` in front; other files add a prefix.
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
        hint = f"The file says that it is of {weights.metadata['backbone']}: choose that backbone"
    elif weights.layout == "onnx":
        hint = "Were its norms folded into its convolutions?"
    wanted = [key for key in own if not key.endswith(BATCH_COUNTER)]
    missing = [key for key in wanted if key not in state]
    if missing:
        left = [key for key in state if key not in own]
        raise WeightsError(
            f"{source} does not fill the encoder {name}: {len(missing)} of {len(wanted)} tensors are missing "
            f"({_shortened(missing)}); names in the file that fit nothing: {_shortened(left) or 'none'}. "
            f"{hint}"
        )
    for key in wanted:
        if state[key].shape != own[key].shape:
            raise WeightsError(
                f"{source} does not fit the encoder {name}: {key} is {list(state[key].shape)}, must be "
                f"{list(own[key].shape)}. {hint}"
            )
    if beyond := _blocks_beyond(state, own):
        raise WeightsError(
            f"{source} is of a deeper network than the encoder {name}, which has no {_shortened(beyond, 1)}. {hint}"
        )


def _blocks_beyond(state: State, own: Mapping[str, Tensor]) -> list[str]:
    """Tensors of residual blocks that a ResNet's own stages lack: ResNet-34's file fills a ResNet-18, and more.

    A network may stop before the last stage; further tensors in a stage that it has are another network's.
    """
    stages = {key.partition(".")[0] for key in own}
    further = [key for key in state if key not in own and not key.endswith(BATCH_COUNTER)]
    return [key for key in further if key.startswith("layer") and key.partition(".")[0] in stages]


def load_into_scrl(model: SCRL, source: Source) -> LoadReport:
    """Fill the networks of a run: the encoder must match; heads, target and probe are loaded where their sizes do.

    Without a target network in the file, the target becomes a copy of the online network; where the file has no
    projector either, both projectors stay as they were. The report's notes name the parts that were loaded and those
    that start from random weights.
    """
    if source == RANDOM:
        return LoadReport(RANDOM, RANDOM)
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
            (taken if _load_if_fits(module, state, f"{weights.path} ({weights.layout}): {name}") else fresh).append(
                name
            )
    report.notes.append("encoder" + "".join(f", {name}" for name in taken) + " loaded")
    if not own_target:
        report.notes.append("the target encoder is a copy of the online one")
    if fresh and not any(state for _, _, state in heads):
        report.notes.append(f"from random weights: {', '.join(fresh)} (the file is of an encoder, and has none)")
    elif fresh:
        report.notes.append(f"from random weights: {', '.join(fresh)} (missing in the file, or of another size)")
    return report


def _under(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _load_if_fits(module: nn.Module, state: State, source: str) -> bool:
    own = module.state_dict()
    fits = all(key in state and state[key].shape == own[key].shape for key in own if not key.endswith(BATCH_COUNTER))
    if fits:
        check_values(source, state, own)
        module.load_state_dict({key: cast_like(state.get(key, tensor), tensor) for key, tensor in own.items()})
    return fits


# ---- encoders from files ----


def encoder_of(source: Source, *, backbone: str = "", branch: Branch = "online") -> Encoder:
    """Build an encoder with the weights of ``source``; without ``backbone``, its name is guessed from the file.

    Raises WeightsError when no known backbone has these tensors.
    """
    weights = source if isinstance(source, Weights) else read(source)
    if not backbone and weights.metadata.get("backbone"):
        _check_stated_backbone(weights, branch)
    encoder = build_encoder(backbone or guess_backbone(weights), size=view_size(weights))
    load_into(encoder, weights, branch=branch)
    return encoder


def _check_stated_backbone(weights: Weights, branch: Branch) -> None:
    """Raises WeightsError where the backbone that a file states is unknown or not its own, before memory is taken."""
    stated = _stated_backbone(weights)
    try:
        check_fit(weights, stated, branch)
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"{weights.path} ({weights.layout}) states that it is of {stated!r:.80}: {error}") from error


def check_fit(weights: Weights, backbone: str, branch: Branch = "online") -> None:
    """Raises WeightsError where the weights do not fill an encoder of that name, as `load_into` does.

    Takes no memory for tensors, but for an encoder that is code, which is built as it is.
    Raises UsageError as `scrl_fast.models.build_encoder` does.
    """
    with torch.device("cpu" if has_own_names(backbone) else "meta"):
        own = build_encoder(backbone).body.state_dict()
    _fitting(weights, own, backbone, branch)


def load_encoder(source: Source, *, backbone: str = "", branch: Branch = "online") -> nn.Module:
    """The plain torchvision (``fc`` is Identity) or timm module of `encoder_of`, in eval mode."""
    return encoder_of(source, backbone=backbone, branch=branch).body.eval()


def guess_backbone(weights: Weights) -> str:
    """The backbone's name: the one that the file states, else the one whose tensors have the same shapes.

    Raises WeightsError when no known backbone has these tensors; the message names the nearest.
    """
    if weights.metadata.get("backbone"):
        return _stated_backbone(weights)
    state = weights.encoder()
    misfits: list[tuple[int, str]] = []
    for name in encoder_names():
        with torch.device("meta"):
            own: dict[str, Any] = build_encoder(name).body.state_dict()
        shapes = {key: tensor.shape for key, tensor in own.items() if not key.endswith(BATCH_COUNTER)}
        if not shapes.keys() <= state.keys() or _blocks_beyond(state, own):
            continue
        wrong = [key for key, shape in shapes.items() if state[key].shape != shape]
        if not wrong:
            return name
        is_now, must_be = list(state[wrong[0]].shape), list(shapes[wrong[0]])
        misfits.append((len(wrong), f"{name} is nearest, but {wrong[0]} is {is_now}, must be {must_be}"))
    nearest = f"; {min(misfits)[1]}" if misfits else ""
    raise WeightsError(
        f"{weights.path} ({weights.layout}): no known backbone has these tensors{nearest}. "
        "Name it: --backbone=resnet50, timm:NAME, ..."
    )


def _stated_backbone(weights: Weights) -> str:
    """The backbone that a file states. Raises WeightsError where that is code: no file may ask for its import."""
    stated = str(weights.metadata["backbone"])
    if is_code(stated):
        raise WeightsError(
            f"{weights.path} ({weights.layout}) states that its encoder is made by code, {stated}, which is not "
            f"imported because a file says so: if you trust it, name it as the backbone, --backbone={stated} "
            f"(train and transfer: --model.backbone={stated})"
        )
    return stated


def view_size(weights: Weights) -> int:
    """The side of a trial image for the encoder: that of training where the file says it and it is no larger than
    `LARGEST_VIEW`, else `VIEW_SIZE`."""
    config = weights.metadata.get("config")
    views = config.get("views") if isinstance(config, dict) else None
    size = views.get("size") if isinstance(views, dict) else None
    return size if type(size) is int and 0 < size <= LARGEST_VIEW else VIEW_SIZE


def _shortened(names: Iterable[str], count: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
