"""From checked options to networks and optimizer; what only the machine or the data set can tell is checked here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from scrl_fast import weights
from scrl_fast.config.schema import Config, TrainConfig, ViewsConfig, check_enough
from scrl_fast.errors import UsageError
from scrl_fast.models import SCRL, Encoder, wrap_module
from scrl_fast.ops import backends
from scrl_fast.optim import LARS, AdamW, lars_param_groups
from scrl_fast.run.trackers import check_wandb

DEFAULT_VIEWS = ViewsConfig()


def check_run(config: Config, *, images: int, world_size: int = 1, device_type: str = "cpu") -> None:
    """Checks what options, data set and machine must agree on, before a network is allocated.

    images: size of the data set. device_type: of the training device.
    Raises UsageError naming the option, its value and what to do.
    """
    config.check_ready()
    if config.run.wandb:
        check_wandb(config.run.wandb)  # not only when the log is opened, after the networks are built
    check_enough(images, config, world_size)
    check_compiled(config.train, world_size, device_type)
    backends.check_forced(device_type)


def check_compiled(train: TrainConfig, world_size: int, device_type: str) -> None:
    """Raises UsageError where ``train.compile`` or ``train.cuda_graphs`` is asked for and cannot be had."""
    if train.checkpoint_activations and (train.compile or train.cuda_graphs):
        what = "train.compile" if train.compile else "train.cuda_graphs"
        raise UsageError(
            f"{what}=True does not go with train.checkpoint_activations, which the compiler cannot follow: leave one "
            "out, or take a smaller train.batch_size and more train.accumulate"
        )
    if not train.cuda_graphs:
        return
    if device_type != "cuda":
        raise UsageError(f"train.cuda_graphs=True replays the encoders on a GPU, but this run is on {device_type}")
    reasons = {
        f"{world_size} processes, whose exchanges of BatchNorm statistics end a graph": world_size > 1,
        f"train.accumulate={train.accumulate}, since graphs reuse the memory of the first batch's gradients": (
            train.accumulate > 1
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise UsageError(f"train.cuda_graphs=True does not go with {reason}: leave it out, or use train.compile")


def check_global_batch(config: Config, state: Mapping[str, Any], world_size: int) -> None:
    """Raises UsageError unless the checkpoint's images per step are those of now, in any number of processes."""
    was, now = state["config"]["train"], config.train
    before = int(was["batch_size"]), int(was["accumulate"]), int(state["loader"].get("world_size", 1))
    product = now.batch_size * now.accumulate * world_size
    if math.prod(before) != product:
        raise UsageError(
            f"train.batch_size={now.batch_size} x train.accumulate={now.accumulate} x {world_size} processes "
            f"makes {product} images a step, but the checkpoint was made with "
            f"{' x '.join(map(str, before))} = {math.prod(before)}: choose them so that the product stays, or "
            "start a new run from the weights with --init"
        )


def build(
    config: Config,
    *,
    num_classes: int,
    global_batch: int,
    device: torch.device,
    encoder: nn.Module | None = None,
) -> tuple[SCRL, LARS | AdamW]:
    """Model and optimizer of a run, on the device, as memory format, compiler and recomputation are asked for.

    num_classes: of the data set, 0 without labels. global_batch: images a step in all processes. encoder: a network
    to train in place of the one that ``model.backbone`` names.
    """
    model = build_model(config, num_classes, encoder).to(device)
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config, global_batch)
    model.online.encoder.checkpointing = config.train.checkpoint_activations
    compile_encoders(model, config.train)
    return model, optimizer


def build_model(config: Config, num_classes: int, encoder: nn.Module | None = None) -> SCRL:
    """The networks with their initial weights, which ``train.seed`` alone decides; a probe where there are classes.

    encoder: a network that becomes the online encoder as it is, weights included.
    """
    torch.manual_seed(config.train.seed)
    model = config.model
    networks = SCRL(
        model.backbone if encoder is None else as_encoder(encoder, size=config.views.size),
        view_size=config.views.size,
        method=model.method,
        hidden_dim=model.hidden_dim,
        projection_dim=model.projection_dim,
        pool_size=model.pool_size,
        pool_reduce=model.pool_reduce,
        sampling_ratio=model.sampling_ratio,
        aligned=model.aligned,
        target_init="random" if config.compat == "kakaobrain" else model.target_init,
        num_classes=num_classes,
    )
    stride = networks.online.encoder.stride
    if config.views.size < stride:  # of timm's encoders it is known only now
        raise UsageError(f"views.size={config.views.size}: must be at least {stride}, the stride of {model.backbone}")
    return networks


def with_encoder(config: Config, encoder: nn.Module) -> Config:
    """The config of a run whose encoder a program hands over: ``model.backbone`` says its class."""
    name = encoder.name if isinstance(encoder, Encoder) else f"<{type(encoder).__name__}>"
    return replace(config, model=replace(config.model, backbone=name))


def as_encoder(encoder: nn.Module, *, size: int) -> Encoder:
    """One of our encoders, or any network, as `scrl_fast.models.wrap_module` takes it."""
    return encoder if isinstance(encoder, Encoder) else wrap_module(encoder, size=size)


def compile_encoders(model: SCRL, train: TrainConfig) -> None:
    """torch.compile, and CUDA graphs, for the encoders as far as the options ask for it.

    Only the encoders, whose shapes never change; boxes and heads, whose shapes do, stay as they are.
    """
    if train.compile or train.cuda_graphs:
        for branch in (model.online, model.target):
            branch.encoder.compile(dynamic=False, **({"mode": "reduce-overhead"} if train.cuda_graphs else {}))


def build_optimizer(model: SCRL, config: Config, global_batch: int) -> LARS | AdamW:
    """LARS or AdamW over online network and predictor, with the target's EMA attached, and the probe by plain SGD.

    Every group carries ``peak_lr``, its learning rate at the top of the schedule, scaled by the global batch.
    With ``compat=kakaobrain`` the probe is one more head under LARS, as in the published implementation. Only the
    monitor reads it either way.
    """
    optim = config.optim
    scale = global_batch / optim.reference_batch
    probe_too = config.compat == "kakaobrain"
    named = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (probe_too or not name.startswith("probe."))
    ]
    groups = lars_param_groups(named, optim.weight_decay, compat=config.compat)
    for group in groups:
        group["peak_lr"] = optim.lr * scale
        if optim.name == "adamw":  # biases and norms go without decay, but are adapted like the rest
            group["adapt"] = True
    if model.probe is not None and not probe_too:
        plain = {"adapt": False, "momentum": optim.momentum, "weight_decay": 0.0}
        groups.append({"params": list(model.probe.parameters()), "peak_lr": optim.probe_lr * scale, **plain})
    optimizer: LARS | AdamW
    if optim.name == "adamw":
        optimizer = AdamW(groups, lr=optim.lr * scale, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    else:
        optimizer = LARS(
            groups,
            lr=optim.lr * scale,
            momentum=optim.momentum,
            trust_coefficient=optim.trust_coefficient,
            eps=optim.eps,
            skip_nonfinite=True,
        )
    optimizer.attach_ema(*model.ema_pairs())
    return optimizer


def initialise(
    model: SCRL, optimizer: LARS | AdamW, path: str, *, momentum: bool, views: ViewsConfig = DEFAULT_VIEWS
) -> list[str]:
    """Fills the networks (for ``momentum`` also the optimizer's buffers) from a file of any known layout, or a zoo.

    path: ``init``, empty for none. views: of the run. Returns what there is to say about it.
    """
    if path in ("", weights.RANDOM):
        return ["random weights"] if path else []
    source = weights.read_initial(path, model.online.encoder.name)
    notes = [f"init: {weights.load_into_scrl(model, source)}"]
    notes += weights.normalization_notes(source, {"mean": views.mean, "std": views.std}, "views")
    if momentum and isinstance(optimizer, LARS):
        filled = weights.load_momentum(model, optimizer, source)
        if not filled:
            raise UsageError(f"init_momentum=True: {path} ({source.layout}) holds no optimizer state that fits")
        notes.append(f"momentum of {filled} parameters taken from it")
    return notes
