"""The published implementation's options (kakaobrain/scrl), translated to ours.

Its YAML files are taken by ``--config`` as they are, and its ``--a/b=value`` flags beside our own; every translation
is told to the user. This translates options only: what its code does otherwise than the paper says is reproduced by
``--compat=kakaobrain``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from scrl_fast.errors import UsageError, did_you_mean

QUIRKS_NOTE = (
    "--compat=kakaobrain reproduces what its code does otherwise than the paper: a target network with random weights "
    "of its own, squared learning rate for biases and norms, LARS on some norm parameters"
)


@dataclass(frozen=True)
class Field:
    """What becomes of one published option.

    option: ours, or None where it has no effect here; then ``why`` says the reason.
    convert: from its value to ours.
    """

    option: str | None = None
    why: str = ""
    convert: Callable[[Any], Any] = lambda value: value


def _only(accepted: Any, instead: str) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if value != accepted:
            raise UsageError(instead.format(value=value))
        return value

    return convert


_LAUNCH = "processes are started by torchrun"
_EVALUATE = "linear evaluation is a command of its own: python -m scrl_fast.evaluate"
_DISPLAY = "the progress line adapts to the terminal"

FIELDS: dict[str, Field] = {
    "load_dir": Field("resume"),
    "network.name": Field("model.backbone"),
    "network.proj_head.input_size": Field(why="taken from the backbone"),
    "network.proj_head.hidden_size": Field("model.hidden_dim"),
    "network.proj_head.output_size": Field("model.projection_dim"),
    "network.scrl.enabled": Field("model.method", convert=lambda on: "scrl" if on else "byol"),
    "network.scrl.num_patches_per_image": Field("boxes.per_image"),
    "network.scrl.iou_threshold": Field("boxes.iou_threshold"),
    "network.scrl.box_jittering": Field("boxes.jitter"),  # with the ratio below, or 0 when it is off
    "network.scrl.jittering_ratio": Field(why="part of box_jittering"),
    "network.scrl.grid_based_box_gen": Field("boxes.grid"),
    "network.scrl.min_size": Field("boxes.min_size"),
    "network.scrl.pool_size": Field("model.pool_size"),
    "network.scrl.spatial_scale": Field(why="one over the backbone's stride"),
    "network.scrl.sampling_ratio": Field("model.sampling_ratio"),
    "network.scrl.detectron_aligned": Field("model.aligned"),
    "dataset.name": Field("data.source"),
    "dataset.root": Field("data.root"),
    "augment.type": Field("views.recipe"),
    "augment.input_size": Field("views.size"),
    "augment.crop_scale": Field("views.scale"),
    "train.enabled": Field(
        why="this command trains",
        convert=_only(True, "train.enabled={value}: nothing to train; to evaluate use python -m scrl_fast.evaluate"),
    ),
    "train.online_eval": Field(why="the online probe learns whenever there are labels"),
    "train.batch_size_train": Field("train.batch_size"),
    "train.batch_size_eval": Field(why="no validation pass during pre-training"),
    "train.max_epochs": Field("train.epochs"),
    "train.warmup_epochs": Field("optim.warmup_epochs"),
    "train.valid_interval": Field(why="no validation pass during pre-training"),
    "train.snapshot_interval": Field(why="a checkpoint each epoch, or every run.checkpoint_every steps"),
    "train.tb_interval": Field("run.log_every"),
    "train.num_workers": Field("data.workers"),
    "train.m": Field("optim.ema_momentum"),
    "train.optim.lr": Field("optim.lr"),
    "train.optim.momentum": Field("optim.momentum"),
    "train.optim.weight_decay": Field("optim.weight_decay"),
    **dict.fromkeys(
        (
            *("eval.enabled", "eval.mode", "eval.dataset", "eval.finetune", "eval.max_epochs", "eval.warmup_epochs"),
            *("eval.valid_interval", "eval.batch_size", "eval.batch_size_train", "eval.batch_size_eval"),
            *("eval.num_workers", "eval.optim.lr", "eval.optim.momentum", "eval.optim.weight_decay"),
            "eval.optim.nesterov",
        ),
        Field(why=_EVALUATE),
    ),
    # flags of its command line that its YAML files do not hold
    "save_dir": Field("run.dir"),
    "top_dir": Field(why="give the whole folder as run.dir"),
    "disable_autocast": Field("train.precision", convert=lambda on: "fp32" if on else "auto"),
    "overwrite": Field(why="a run never overwrites another: choose a new run.dir, or --resume=auto"),
    "fake_checkpoint": Field(why="checkpoints are always real"),
    "detect_anomaly": Field(why="non-finite numbers always stop a run, with the step named"),
    **dict.fromkeys(("no_pbar", "no_color", "log_level"), Field(why=_DISPLAY)),
    **dict.fromkeys(("dist_url", "num_machines", "machine_rank", "num_gpus"), Field(why=_LAUNCH)),
}
"""Every option of the published implementation, by its dotted name."""

SWITCHES = ("disable_autocast", "overwrite", "fake_checkpoint", "detect_anomaly", "no_pbar", "no_color")
"""Its flags that take no value."""


def is_published(document: dict[Any, Any]) -> bool:
    """Whether a YAML document is one of the published implementation: it has sections that ours never has."""
    return any(section in document for section in ("network", "dataset", "augment"))


def translate(document: dict[Any, Any], origin: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Our options by dotted name, and a line on what became of each field.

    Raises UsageError for a field that the published implementation does not have, naming the nearest one.
    """
    options: dict[str, Any] = {}
    moved: list[str] = []
    idle: dict[str, list[str]] = {}
    given = dict(_leaves(document))
    for name, value in given.items():
        if name not in FIELDS:
            hint = did_you_mean(name, FIELDS)
            raise UsageError(f"{origin}: unknown option '{name}' in a file of the published implementation{hint}")
        field = FIELDS[name]
        if value is None:
            idle.setdefault("no value given", []).append(name)
            continue
        new = field.convert(value)
        if name == "network.scrl.box_jittering":
            ratio = given.get("network.scrl.jittering_ratio")
            new = 0.0 if not value else 0.1 if ratio is None else ratio
        if field.option is None:
            idle.setdefault(field.why, []).append(name)
        else:
            options[field.option] = new
            moved.append(f"  {name} = {_text(value)}  ->  {field.option} = {_text(new)}")
    notes = [f"{origin}: options of the published implementation, translated:", *moved]
    notes += [f"  no effect ({why}): {', '.join(names)}" for why, names in idle.items()]
    return options, (*notes, f"  {QUIRKS_NOTE}")


def translate_flag(name: str, value: str) -> tuple[dict[str, Any], list[str]]:
    """The same for one flag of its command line, with its value as typed."""
    field = FIELDS[name]
    try:
        typed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(f"--{name}={value}: not a value") from error
    new = field.convert(typed)
    if field.option is None:
        return {}, [f"--{name} has no effect: {field.why}"]
    return {field.option: new}, [f"--{name}={value}  ->  --{field.option}={_text(new)}"]


def _leaves(document: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in document.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
