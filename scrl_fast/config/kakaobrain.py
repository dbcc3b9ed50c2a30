"""The published implementation's options (kakaobrain/scrl), translated to ours.

Its YAML files are taken by ``--config`` as they are, and its ``--a/b=value`` flags beside our own; every translation
is told to the user. This translates options only: what its code does otherwise than the paper says is reproduced by
``--compat=kakaobrain``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from scrl_fast.config.defaults import BACKBONE_STRIDES, LOG_EVERY
from scrl_fast.errors import UsageError, did_you_mean

QUIRKS_NOTE = (
    "--compat=kakaobrain reproduces what its code does otherwise than the paper: a target network with random weights "
    "of its own, squared learning rate for biases and norms, LARS on some norm parameters"
)


@dataclass(frozen=True)
class Field:
    """What becomes of one published option.

    option: ours, or None where it has no effect here; then ``why`` says the reason.
    convert: from its value to ours; raises ValueError for one that makes no sense, or that cannot be had here.
    remark: said where the conversion changed the value, and always where there is no conversion.
    """

    option: str | None = None
    why: str = ""
    convert: Callable[[Any], Any] | None = None
    remark: str = ""


_WORDS = {
    **dict.fromkeys((True, 1, "yes", "true", "t", "y", "1"), True),
    **dict.fromkeys((False, 0, "no", "false", "f", "n", "0"), False),
}


def _switch(value: Any) -> bool:
    """True or false of the words that its command line takes; text in a YAML file is read the same way."""
    word = value.lower() if isinstance(value, str) else value
    if not isinstance(word, (bool, int, str)) or word not in _WORDS:
        raise ValueError("must be true or false")
    return _WORDS[word]


def _training(value: Any) -> bool:
    if not _switch(value):
        raise ValueError("nothing to train; to evaluate: python -m scrl_fast.evaluate linear --checkpoint=...")
    return True


def _log_every(steps: Any) -> Any:
    if steps == 0:  # ours follows the length of the run then
        raise ValueError("must be at least 1")
    return LOG_EVERY if type(steps) is int and 1 <= steps < LOG_EVERY else steps


def _started(flag: str) -> Callable[[Any], Any]:
    """A check of how many processes its own launcher would start: torchrun does that here."""

    def check(value: Any) -> Any:
        wanted = value > 1 if type(value) is int else False
        started = os.environ.get("LOCAL_WORLD_SIZE", "1")
        if wanted and int(os.environ.get("WORLD_SIZE", "1")) < 2:
            raise ValueError(f"processes are started by torchrun: torchrun {flag.format(value)} -m scrl_fast.train ...")
        if wanted and "nnodes" not in flag and started != str(value):
            raise ValueError(f"torchrun started {started} processes here; give it {flag.format(value)}")
        return value

    return check


def _machines(flag: str) -> Callable[[Any], Any]:
    return _started(f"{flag} --nproc-per-node=GPUS --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT")


def _address(value: Any) -> Any:
    """Refuses the address of another machine unless torchrun started this process."""
    place = str(value).rpartition("//")[2]
    own = place.rpartition(":")[0] in ("", "localhost", "127.0.0.1")
    if not own and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        line = f"torchrun --nnodes=MACHINES --nproc-per-node=GPUS --rdzv-backend=c10d --rdzv-endpoint={place}"
        raise ValueError(f"processes are started by torchrun: {line} -m scrl_fast.train ...")
    return value


_LAUNCH = "processes are started by torchrun"
_EVALUATE = "linear evaluation is a command of its own: python -m scrl_fast.evaluate"
_DISPLAY = "the progress line adapts to the terminal"

FIELDS: dict[str, Field] = {
    "load_dir": Field(
        "init",
        remark="the weights; --init_momentum=true takes the momentum as well, and schedules start anew. A run of "
        "scrl_fast goes on with --resume",
    ),
    "network.name": Field("model.backbone"),
    "network.proj_head.input_size": Field(why="taken from the backbone"),
    "network.proj_head.hidden_size": Field("model.hidden_dim"),
    "network.proj_head.output_size": Field("model.projection_dim"),
    "network.scrl.enabled": Field("model.method", convert=lambda on: "scrl" if _switch(on) else "byol"),
    "network.scrl.num_patches_per_image": Field("boxes.per_image"),
    "network.scrl.iou_threshold": Field("boxes.iou_threshold"),
    "network.scrl.box_jittering": Field("boxes.jitter", convert=_switch),  # these two make one of ours: `_jitter`
    "network.scrl.jittering_ratio": Field("boxes.jitter"),
    "network.scrl.grid_based_box_gen": Field("boxes.grid", convert=_switch),
    "network.scrl.min_size": Field("boxes.min_size"),
    "network.scrl.pool_size": Field("model.pool_size"),
    "network.scrl.spatial_scale": Field(why="one over the backbone's stride"),
    "network.scrl.sampling_ratio": Field("model.sampling_ratio"),
    "network.scrl.detectron_aligned": Field("model.aligned", convert=_switch),
    "dataset.name": Field("data.source"),
    "dataset.root": Field("data.root"),
    "augment.type": Field("views.recipe"),
    "augment.input_size": Field("views.size"),
    "augment.crop_scale": Field("views.scale"),
    "train.enabled": Field(why="this command trains", convert=_training),
    "train.online_eval": Field(why="the online probe learns whenever there are labels"),
    "train.batch_size_train": Field("train.batch_size"),
    "train.batch_size_eval": Field(why="no validation pass during pre-training"),
    "train.max_epochs": Field("train.epochs"),
    "train.warmup_epochs": Field("optim.warmup_epochs"),
    "train.valid_interval": Field(why="no validation pass during pre-training"),
    "train.snapshot_interval": Field(why="a checkpoint each epoch, or every run.checkpoint_every steps"),
    "train.tb_interval": Field(
        "run.log_every",
        convert=_log_every,
        remark="each logging point waits for the GPU; --run.log_every=N logs more often",
    ),
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
    "disable_autocast": Field("train.precision", convert=lambda on: "fp32" if _switch(on) else "auto"),
    "overwrite": Field(why="a run never overwrites another: choose a new run.dir, or --resume=auto"),
    "fake_checkpoint": Field(why="checkpoints are always real"),
    "detect_anomaly": Field(why="non-finite numbers always stop a run, with the step named"),
    **dict.fromkeys(("no_pbar", "no_color", "log_level"), Field(why=_DISPLAY)),
    "num_gpus": Field(why=_LAUNCH, convert=_started("--nproc-per-node={}")),
    "num_machines": Field(why=_LAUNCH, convert=_machines("--nnodes={}")),
    "machine_rank": Field(why=_LAUNCH),
    "dist_url": Field(why=_LAUNCH, convert=_address),
}
"""Every option of the published implementation, by its dotted name."""

SWITCHES = ("disable_autocast", "overwrite", "fake_checkpoint", "detect_anomaly", "no_pbar", "no_color")
"""Its flags that take no value."""


def is_published(document: dict[Any, Any]) -> bool:
    """Whether a YAML document is one of the published implementation: it has sections that ours never has."""
    return any(section in document for section in ("network", "dataset", "augment"))


def translate(document: dict[Any, Any], origin: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Our options by dotted name, and a line on what became of each field.

    Raises UsageError for a field that the published implementation does not have, naming the nearest one, for a
    section that holds no fields, and for a value that makes no sense.
    """
    options: dict[str, Any] = {}
    moved: list[str] = []
    idle: dict[str, list[str]] = {}
    given = leaves(document)
    for name, value in given.items():
        if inner := _fields_of(name):
            raise UsageError(f"{origin}: '{name}' must hold options ({', '.join(inner)}), not {_text(value)}")
        if name not in FIELDS:
            hint = did_you_mean(name, FIELDS)
            raise UsageError(f"{origin}: unknown option '{name}' in a file of the published implementation{hint}")
        if value is None:
            idle.setdefault("no value given", []).append(name)
            continue
        option, new, said = _ours(name, given, f"{origin}: ")
        if option is None:
            idle.setdefault(said, []).append(name)
        else:
            options[option] = new
            moved.append(f"  {name} = {_text(value)}  ->  {option} = {_text(new)}{said}")
    check_scale(given, f"{origin}: ")
    notes = [f"{origin}: options of the published implementation, translated:", *moved]
    notes += [f"  no effect ({why}): {', '.join(names)}" for why, names in idle.items()]
    return options, (*notes, f"  {QUIRKS_NOTE}")


def translate_flag(name: str, value: str, given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The same for one flag of its command line, with its value as typed.

    given: values of published options by dotted name, from files and from flags before this one, which is added.
    """
    try:
        given[name] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(f"--{name}={value}: not a value") from error
    option, new, said = _ours(name, given, "--")
    if option is None:
        return {}, [f"--{name} has no effect: {said}"]
    return {option: new}, [f"--{name}={value}  ->  --{option}={_text(new)}{said}"]


def check_scale(given: dict[str, Any], where: str = "--") -> None:
    """Raise UsageError for a ``spatial_scale`` that is not one over the backbone's stride, which is always taken here.

    given: values of published options by dotted name. where: in front of the option in the error.
    """
    name, scale = given.get("network.name", "resnet50"), given.get("network.scrl.spatial_scale")
    stride = BACKBONE_STRIDES.get(name) if isinstance(name, str) else None
    if scale is None or stride is None:
        return
    if type(scale) not in (int, float) or abs(scale * stride - 1) > 1e-6:
        option = f"{where}network.scrl.spatial_scale={_text(scale)}"
        raise UsageError(f"{option}: must be {1 / stride}, one over the stride {stride} of {name}")


def leaves(document: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a published file by dotted name."""
    values: dict[str, Any] = {}
    for key, value in document.items():
        values |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


def _ours(name: str, given: dict[str, Any], where: str) -> tuple[str | None, Any, str]:
    """Our option, its value and a remark for one of the given ones; or None, None and why it has no effect."""
    field, value = FIELDS[name], given[name]
    new = _converted(name, value, where)
    if field.option == "boxes.jitter":
        new = _jitter(given, where)
        if new is None and name.endswith("jittering_ratio"):
            return None, None, "box_jittering is off"
        new = 0.0 if new is None else new
    if field.option is None:
        return None, None, field.why
    remark = f" ({field.remark})" if field.remark and (new != value or field.convert is None) else ""
    return field.option, new, remark


def _jitter(given: dict[str, Any], where: str) -> Any:
    """The ratio when box_jittering is on, else None."""
    on, ratio = given.get("network.scrl.box_jittering"), given.get("network.scrl.jittering_ratio")
    if on is None or not _converted("network.scrl.box_jittering", on, where):
        return None
    return 0.1 if ratio is None else ratio


def _converted(name: str, value: Any, where: str) -> Any:
    convert = FIELDS[name].convert
    if convert is None:
        return value
    try:
        return convert(value)
    except ValueError as error:
        raise UsageError(f"{where}{name}={_text(value)}: {error}") from None


def _fields_of(section: str) -> list[str]:
    """What a section of its files holds; empty for a name that is no section."""
    inside = (name.removeprefix(f"{section}.") for name in FIELDS if name.startswith(f"{section}."))
    return list(dict.fromkeys(name.partition(".")[0] for name in inside))


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
