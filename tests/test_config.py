"""The tree of options: types, ranges, recipes, and YAML that comes back as it went."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from typing import ClassVar

import numpy as np
import pytest
import yaml

from scrl_fast.config import command_line
from scrl_fast.config.files import option_kinds, recipe_names, renamed_options, under_present_names
from scrl_fast.config.schema import (
    BACKBONE_STRIDES,
    BoxesConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    ViewsConfig,
    load_recipe,
)
from scrl_fast.config.validation import type_description, validated
from scrl_fast.errors import UsageError
from scrl_fast.evaluate.config import TASK_OPTIONS
from scrl_fast.transfer.config import TransferConfig

SECTIONS = {
    "data": DataConfig,
    "views": ViewsConfig,
    "boxes": BoxesConfig,
    "model": ModelConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "run": RunConfig,
    "eval": EvalConfig,
}


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("data.workers", -1, "auto or at least 0"),
        ("data.prefetch", 0, "at least 1"),
        ("data.timeout", 0.0, "above 0"),
        ("data.timeout", 1e15, "at most 604800"),
        ("data.max_bad_fraction", 1.5, "from 0 to 1"),
        ("data.source", "s3", "one of demo, folder"),
        ("views.size", 0, "at least 1"),
        ("views.scale", (1.0, 0.2), "the smaller number first"),
        ("views.scale", (0.0, 1.0), "range above 0"),
        ("views.scale", (0.2, 1.1), "from 0 to 1"),
        ("views.ratio", (-0.75, 1.3), "above 0"),
        ("views.flip", -0.1, "from 0 to 1"),
        ("views.blur_probability", (1.0, 1.1), "from 0 to 1"),
        ("views.hue", 0.6, "from 0 to 0.5"),
        ("views.std", (0.2, 0.0, 0.2), "above 0"),
        ("views.solarize_threshold", 300, "from 0 to 256"),
        ("boxes.per_image", -1, "at least 0"),
        ("boxes.min_size", 0, "at least 1"),
        ("boxes.iou_threshold", 0.0, "above 0 and at most 1"),
        ("boxes.iou_threshold", 1.01, "above 0 and at most 1"),
        ("boxes.jitter", 1.0, "from 0 to below 1"),
        ("model.method", "moco", "one of scrl, byol"),
        ("model.backbone", "resnet51", "did you mean 'resnet50'"),
        ("model.hidden_dim", 0, "at least 1"),
        ("model.pool_size", 0, "at least 1"),
        ("model.sampling_ratio", 0, "from 1 to 4096, or -1"),
        ("model.sampling_ratio", 4097, "from 1 to 4096, or -1"),
        ("optim.lr", 0.0, "above 0"),
        ("optim.lr", math.inf, "finite"),
        ("optim.lr", math.nan, "finite"),
        ("optim.momentum", 1.0, "from 0 to below 1"),
        ("optim.weight_decay", -1e-6, "at least 0"),
        ("optim.ema_momentum", 1.2, "from 0 to 1"),
        ("optim.ema_momentum", -0.1, "from 0 to 1"),
        ("optim.warmup_epochs", -1.0, "at least 0"),
        ("train.batch_size", -256, "at least 1"),
        ("train.accumulate", 0, "at least 1"),
        ("train.epochs", 0, "at least 1"),
        ("train.max_steps", -5, "at least 0"),
        ("train.seed", -1, "from 0"),
        ("train.device", "gpu", "cuda or cuda:N"),
        ("train.device", "cuda:x", "cuda or cuda:N"),
        ("train.device", "cpu:0", "cuda or cuda:N"),
        ("run.log_every", -1, "at least 0"),
        ("run.checkpoint_every", -1, "at least 0"),
        ("run.keep", 1, "at least 2"),
        ("eval.scenes", 0, "at least 1"),
    ],
)
def test_values_out_of_range(option, value, allowed):
    section, _, field = option.partition(".")
    with pytest.raises(ValueError, match=allowed) as caught:
        SECTIONS[section](**{field: value})
    assert str(caught.value).startswith(f"{option}={list(value) if isinstance(value, tuple) else value}: ")


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("train.epochs", 1.5, "a whole number"),
        ("train.epochs", True, "a whole number"),
        ("train.epochs", None, "a whole number"),
        ("train.batch_size", np.int64(3), "a whole number"),
        ("data.workers", "many", "a whole number or auto"),
        ("data.workers", True, "a whole number or auto"),
        ("train.compile", 1, "true or false"),
        ("optim.lr", "0.1", "a number"),
        ("run.dir", 3, "text"),
        ("views.scale", 0.2, "a list of 2 numbers"),
        ("views.scale", (0.1, 0.2, 0.3), "a list of 2 numbers"),
        ("views.scale", (0.1, "x"), "a number"),
    ],
)
def test_wrong_types(option, value, allowed):
    section, _, field = option.partition(".")
    with pytest.raises(TypeError, match=rf"{option}=.*: must be {allowed}"):
        SECTIONS[section](**{field: value})


def test_every_number_of_a_list_must_be_finite():
    with pytest.raises(ValueError, match=r"views\.mean=nan: must be finite"):
        ViewsConfig(mean=(0.2, math.nan, 0.2))


def test_whole_numbers_and_lists_are_converted():
    config = Config(optim=OptimConfig(lr=1), views=ViewsConfig(scale=[1, 1]))
    assert config.optim.lr == 1.0 and type(config.optim.lr) is float
    assert config.views.scale == (1.0, 1.0)
    with pytest.raises(TypeError, match="train=None: must be a TrainConfig"):
        Config(train=None)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"boxes": BoxesConfig(per_image=0)},
            "boxes.per_image=0: model.method=scrl needs at least 1 box; --model.method=byol trains without boxes",
        ),
        ({"views": ViewsConfig(size=32)}, "boxes.min_size=32: views of views.size=32 pixels have no room"),
        (
            {"views": ViewsConfig(size=31), "model": ModelConfig(method="byol")},
            "views.size=31: must be at least 32, the stride of resnet50",
        ),
        ({"views": ViewsConfig(size=16)}, "views.size=16: must be at least 32, the stride of resnet50"),
        ({"resume": "y.pt", "init": "x.pt"}, "give one"),
        ({"compat": "some"}, "compat=some: must be one of none, kakaobrain"),
    ],
)
def test_options_that_do_not_fit_together(sections, message):
    with pytest.raises(ValueError, match=message):
        Config(**sections)


def test_byol_needs_no_boxes():
    Config(model=ModelConfig(method="byol"), boxes=BoxesConfig(per_image=0), views=ViewsConfig(size=32))


@pytest.mark.parametrize("source", ["folder", "imagefolder", "imagenet", "list", "tar", "packed", "hf"])
def test_ready_means_that_the_images_are_named(source):
    Config().check_ready()
    Config(data=DataConfig(source=source, root="x")).check_ready()
    with pytest.raises(ValueError, match=f"data.source={source} needs --data.root"):
        Config(data=DataConfig(source=source)).check_ready()


def test_strides_are_those_of_the_encoders():
    from scrl_fast import models

    assert set(BACKBONE_STRIDES) == set(models.encoder_names())
    for name, stride in BACKBONE_STRIDES.items():
        if name.startswith(("resnet1", "resnet50")):
            assert models.build_encoder(name).stride == stride


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "scrl_200ep": ("scrl", 200, 0.45, 1e-6, 0.97),
        "scrl_1000ep": ("scrl", 1000, 0.2, 1.5e-6, 0.996),
        "byol_200ep": ("byol", 200, 0.45, 1e-6, 0.97),
        "byol_1000ep": ("byol", 1000, 0.2, 1.5e-6, 0.996),
    }.items(),
)
def test_published_recipes(name, expected):
    config = load_recipe(name)
    optim = config.optim
    assert (config.model.method, config.train.epochs, optim.lr, optim.weight_decay, optim.ema_momentum) == expected
    assert (config.model.backbone, config.train.batch_size, optim.reference_batch) == ("resnet50", 256, 256)
    assert (optim.warmup_epochs, config.boxes.per_image, config.views.scale) == (10.0, 10, (0.2, 1.0))
    assert (config.data.source, config.compat) == ("imagenet", "none")


def test_the_recipes_are_these():
    assert recipe_names() == (
        *("byol_1000ep", "byol_200ep", "continue", "convnext", "demo", "scrl_1000ep", "scrl_200ep"),
    )
    demo = load_recipe("demo")
    demo.check_ready()
    assert demo.data.source == "demo" and demo.eval.roi_linear


def test_unknown_recipe():
    with pytest.raises(UsageError, match="did you mean 'scrl_200ep'"):
        load_recipe("scrl-200ep")


@pytest.mark.parametrize("name", recipe_names())
def test_yaml_round_trip(tmp_path, name):
    config = dataclasses.replace(load_recipe(name), resume="auto")
    config.run.dir = "runs/1e3: [odd] \u00fc 'name'"
    config.optim.weight_decay = 1.5e-7
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert Config.from_yaml(path) == config
    assert command_line.parse(["--config", str(path)], prog="x").config == config
    plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert plain == config.to_dict(), "any YAML reader sees numbers as numbers"
    assert list(plain) == [field.name for field in dataclasses.fields(Config)]


def test_from_dict_takes_any_part():
    config = Config.from_dict({"train": {"epochs": 3}, "views.scale": [0.5, 1]})
    assert (config.train.epochs, config.views.scale) == (3, (0.5, 1.0))
    assert config.optim == OptimConfig()
    assert Config.from_dict({}) == Config()
    with pytest.raises(UsageError, match=r"unknown option 'train\.epoch'; did you mean 'train\.epochs'"):
        Config.from_dict({"train": {"epoch": 3}})


# ---- a config is checked once more where it is used ----


@pytest.mark.parametrize(
    ("make", "option", "value", "message"),
    [
        (Config, "train.batch_size", -5, "train.batch_size=-5: must be at least 1"),
        (Config, "optim.lr", -1.0, "optim.lr=-1.0: must be above 0"),
        (Config, "optim.lr", "fast", "optim.lr='fast': must be a number"),
        (Config, "views.scale", (1.0, 0.2), "views.scale=[1.0, 0.2]: must be a range above 0"),
        (Config, "boxes.min_size", 224, "boxes.min_size=224: views of views.size=224 pixels have no room"),
        (Config, "compat", "other", "compat=other: must be one of none, kakaobrain"),
        (Config, "train", None, "train=None: must be a TrainConfig"),
        (Config, "train", OptimConfig(), "must be a TrainConfig"),
        (TransferConfig, "train.batch_size", -5, "train.batch_size=-5: must be at least 1"),
        (TransferConfig, "optim.lr", -1.0, "optim.lr=-1.0: must be above 0"),
        (TransferConfig, "model.roi_sampling_ratio", 5000, "roi_sampling_ratio=5000: must be from 1 to 4096, or -1"),
        (TransferConfig, "task", "instance", "model.detector=faster_rcnn: the task instance needs mask_rcnn"),
    ],
)
def test_options_changed_after_construction_are_checked(make, option, value, message):
    config = make()
    section, _, field = option.rpartition(".")
    setattr(getattr(config, section) if section else config, field, value)
    with pytest.raises(UsageError, match=re.escape(message)):
        validated(config)


@pytest.mark.parametrize("config", [Config(), load_recipe("demo"), TransferConfig()])
def test_a_validated_config_is_an_equal_copy(config):
    config.run.keep = 5
    copy = validated(config)
    assert copy == config and copy is not config and copy.run is not config.run
    copy.run.keep = 7
    assert config.run.keep == 5
    for nothing in (None, {}, Config):
        with pytest.raises(TypeError, match=r"config=.*: must be an object such as scrl_fast\.Config"):
            validated(nothing)


def test_the_trainers_check_what_they_are_given():
    from scrl_fast.trainer import SCRLTrainer
    from scrl_fast.transfer.trainer import Transfer

    for trainer, config in ((SCRLTrainer, Config()), (Transfer, TransferConfig())):
        config.train.batch_size = -5
        with pytest.raises(UsageError, match=r"train\.batch_size=-5: must be at least 1"):
            trainer(config)


# ---- options that have another name today ----


@dataclasses.dataclass
class Part:
    new: int = 1
    """A number."""


@dataclasses.dataclass
class Renamed:
    part: Part = dataclasses.field(default_factory=Part)
    """A section."""
    after: str = ""
    """A text."""

    renamed: ClassVar[dict[str, str]] = {"part.old": "part.new", "before": "after"}


def parse_renamed(*argv):
    return command_line.parse_as(Renamed, argv, prog="x", description="")


def test_options_are_read_under_their_old_names(tmp_path):
    request = parse_renamed("--part.old=3", "--before", "x")
    assert (request.config.part.new, request.config.after) == (3, "x")
    assert request.notes == ["--part.old is now called --part.new", "--before is now called --after"]
    path = tmp_path / "old.yaml"
    path.write_text("part: {old: 4}\nbefore: y\n")
    request = parse_renamed(f"--config={path}")
    assert (request.config.part.new, request.config.after) == (4, "y")
    assert request.notes == [f"{path}: part.old is now called part.new", f"{path}: before is now called after"]
    assert parse_renamed(f"--config={path}", "--part.new=5").config.part.new == 5


def test_a_checkpoint_of_before_is_compared_under_the_present_names():
    before = {"part": {"old": 4}, "before": "y", "other": 1}
    assert under_present_names(Renamed, before) == {"part": {"new": 4}, "after": "y", "other": 1}
    assert before == {"part": {"old": 4}, "before": "y", "other": 1}


def test_an_option_of_before_moves_into_the_section_of_its_present_name():
    moved = type("Moved", (), {"renamed": {"part.old": "new.name", "part.up": "up", "down": "part.down"}})
    before = {"part": {"old": 4, "up": 5}, "down": 6}
    assert under_present_names(moved, before) == {"part": {"down": 6}, "new": {"name": 4}, "up": 5}
    assert under_present_names(moved, {"part": {"old": 4}, "new": {"other": 1}})["new"] == {"other": 1, "name": 4}


@pytest.mark.parametrize("cls", [Config, TransferConfig, *TASK_OPTIONS.values()])
def test_an_old_name_is_no_option_of_today_and_leads_to_one(cls):
    kinds = option_kinds(cls)
    for old, new in renamed_options(cls).items():
        assert old not in kinds and new in kinds


@pytest.mark.parametrize("text", ["part: {old: 4, new: 5}", "part: {new: 4}\npart.new: 5", "after: x\nbefore: y"])
def test_an_option_stands_once_in_a_file(tmp_path, text):
    path = tmp_path / "both.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"both\.yaml: '(part\.new|after)' stands twice"):
        parse_renamed(f"--config={path}")


def test_every_option_is_explained_in_the_help(capsys):
    with pytest.raises(SystemExit) as done:
        command_line.parse(["--help"], prog="python -m scrl_fast.train")
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "SUPPRESS" not in text
    for option in option_kinds(Config):
        _, found, rest = text.partition(f"--{option} ")
        assert found, option
        assert "default" in rest.partition("\n  --")[0], f"{option} has no docstring"


@pytest.mark.parametrize("cls", [Config, TransferConfig, *TASK_OPTIONS.values()])
def test_every_answer_to_an_ill_typed_value_fits_the_type(cls):
    """Each option says its own type; the example of a list is one that the option takes."""
    for option, kind in option_kinds(cls).items():
        if kind is str or str in typing.get_args(kind):
            continue
        with pytest.raises(UsageError) as caught:
            parse_command(cls, f"--{option}=nonsense")
        assert str(caught.value) == f"--{option}=nonsense: must be {type_description(kind)}"
        if example := re.search(r"such as (\[.*\])", str(caught.value)):
            config = parse_command(cls, f"--{option}={example[1]}")
            section, _, field = option.rpartition(".")
            value = getattr(getattr(config, section) if section else config, field)
            wanted = typing.get_args(kind)[0]
            assert isinstance(value, tuple) and {type(item) for item in value} == {wanted}


def parse_command(cls, *argv):
    if cls is Config:
        return command_line.parse(argv, prog="x").config
    return command_line.parse_as(cls, argv, prog="x", description="").config
