"""The published implementation's options load unchanged, and every one of them is accounted for."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import yaml

from scrl_fast.config import command_line, kakaobrain
from scrl_fast.config.files import Settings, build, option_kinds
from scrl_fast.config.kakaobrain import FIELDS, SWITCHES
from scrl_fast.config.schema import Config, load_recipe
from scrl_fast.errors import UsageError

SCRL_ONLY = {
    "num_patches_per_image": 10,
    "iou_threshold": 0.5,
    "box_jittering": False,
    "jittering_ratio": 0.1,
    "grid_based_box_gen": True,
    "min_size": 32,
    "pool_size": 1,
    "spatial_scale": 1 / 32,
    "sampling_ratio": -1,
    "detectron_aligned": False,
}


def published(method: str, epochs: int) -> dict:
    """The fields of its four files, with their values (SPEC sections 2 to 6; the intervals are the files' own)."""
    short = epochs == 200
    validation = 5 if short else {"scrl": 100, "byol": 10}[method]
    intervals = {"valid_interval": validation, "snapshot_interval": 20 if short else 100}
    return {
        "eval": {
            **{"enabled": True, "finetune": False, "max_epochs": 80, "warmup_epochs": 5, "valid_interval": 5},
            **{"batch_size_train": 128, "batch_size_eval": 2048, "num_workers": 12},
            "optim": {"lr": 0.2 if method == "scrl" else 0.05, "momentum": 0.9, "weight_decay": 0.0, "nesterov": True},
        },
        "train": {
            "optim": {"weight_decay": 1e-6 if short else 1.5e-6, "momentum": 0.9, "lr": 0.45 if short else 0.2},
            **{"m": 0.97 if short else 0.996, "num_workers": 12, "tb_interval": 1 if short else 5, **intervals},
            **{"warmup_epochs": 10, "max_epochs": epochs, "batch_size_eval": 2048, "batch_size_train": 256},
            **{"online_eval": True, "enabled": True},
        },
        "augment": {"crop_scale": [0.2, 1.0], "input_size": 224, "type": "simclr"},
        "dataset": {"root": None, "name": "imagenet"},
        "network": {
            "scrl": {"enabled": True, **SCRL_ONLY} if method == "scrl" else {"enabled": False},
            "proj_head": {"output_size": 256, "hidden_size": 4096, "input_size": 2048},
            "name": "resnet50",
        },
        "load_dir": None,
    }


@pytest.fixture
def write(tmp_path):
    def write(document: dict) -> str:
        path = tmp_path / "published.yaml"
        path.write_text(yaml.safe_dump(document))
        return str(path)

    return write


def parse(*argv: str) -> command_line.Request:
    return command_line.parse(argv, prog="x")


@pytest.mark.parametrize("method", ["scrl", "byol"])
@pytest.mark.parametrize("epochs", [200, 1000])
def test_the_four_files_are_our_four_recipes(write, method, epochs):
    document = published(method, epochs)
    leaves = kakaobrain.leaves(document)
    assert len(leaves) == {"scrl": 47, "byol": 37}[method]
    path = write(document)
    request = parse("--config", path)
    ours = load_recipe(f"{method}_{epochs}ep")
    run = replace(ours.run, log_every=10)  # ours: 0, which is 10 in a run of so many steps
    assert request.config == replace(ours, data=replace(ours.data, workers=12), run=run)  # ours: auto
    text = "\n".join(request.notes)
    for name in leaves:
        assert name in text, f"{name} is not accounted for"
    assert path in request.notes[0] and "--compat=kakaobrain" in request.notes[-1]
    assert request.config.compat == "none"
    assert parse("--config", path, "--compat=kakaobrain").config.compat == "kakaobrain"


def test_each_value_arrives():
    options, notes = kakaobrain.translate(
        {
            "load_dir": "runs/old",
            "network": {
                "name": "resnet101",
                "proj_head": {"input_size": 2048, "hidden_size": 1024, "output_size": 64},
                "scrl": {
                    **{"enabled": True, "num_patches_per_image": 7, "iou_threshold": 0.75, "grid_based_box_gen": False},
                    **{"jittering_ratio": 0.2, "box_jittering": True, "min_size": 16, "pool_size": 3},
                    **{"spatial_scale": 0.03125, "sampling_ratio": 2, "detectron_aligned": True},
                },
            },
            "dataset": {"name": "imagenet", "root": "/images"},
            "augment": {"type": "simple", "input_size": 160, "crop_scale": [0.1, 0.9]},
            "train": {"max_epochs": 3, "warmup_epochs": 1, "batch_size_train": 8, "num_workers": 4, "tb_interval": 25},
        },
        "x.yaml",
    )
    config = build(Config, Settings(options))
    assert (
        config.to_dict()
        == build(
            Config,
            Settings(
                {
                    "init": "runs/old",
                    "model": {
                        **{"backbone": "resnet101", "hidden_dim": 1024, "projection_dim": 64, "method": "scrl"},
                        **{"pool_size": 3, "sampling_ratio": 2, "aligned": True},
                    },
                    "boxes": {"per_image": 7, "iou_threshold": 0.75, "grid": False, "jitter": 0.2, "min_size": 16},
                    "data": {"source": "imagenet", "root": "/images", "workers": 4},
                    "views": {"recipe": "simple", "size": 160, "scale": [0.1, 0.9]},
                    "train": {"epochs": 3, "batch_size": 8},
                    "optim": {"warmup_epochs": 1},
                    "run": {"log_every": 25},
                }
            ),
        ).to_dict()
    )
    assert "  network.scrl.box_jittering = true  ->  boxes.jitter = 0.2" in notes
    assert "  network.scrl.jittering_ratio = 0.2  ->  boxes.jitter = 0.2" in notes
    assert "  no effect (taken from the backbone): network.proj_head.input_size" in notes


JITTER = [
    ({"box_jittering": True}, 0.1),
    ({"box_jittering": True, "jittering_ratio": 0.3}, 0.3),
    ({"jittering_ratio": 0.3, "box_jittering": True}, 0.3),
    ({"box_jittering": False, "jittering_ratio": 0.3}, 0.0),
    ({"jittering_ratio": 0.3}, 0.0),
    ({"box_jittering": "False", "jittering_ratio": 0.3}, 0.0),
    ({"box_jittering": True, "jittering_ratio": 0.0}, 0.0),
]


@pytest.mark.parametrize(("fields", "jitter"), JITTER)
def test_jitter_is_two_fields(fields, jitter):
    options, notes = kakaobrain.translate({"network": {"scrl": fields}}, "x")
    assert options.get("boxes.jitter", 0.0) == jitter
    off = fields.get("box_jittering") is not True and "jittering_ratio" in fields
    assert ("  no effect (box_jittering is off): network.scrl.jittering_ratio" in notes) == off


@pytest.mark.parametrize(("fields", "jitter"), JITTER)
def test_jitter_is_two_flags(fields, jitter):
    request = parse(*(f"--network/scrl/{name}={value}" for name, value in fields.items()))
    assert request.config.boxes.jitter == jitter
    off = fields.get("box_jittering") is not True and "jittering_ratio" in fields
    assert ("--network.scrl.jittering_ratio has no effect: box_jittering is off" in request.notes) == (
        off or [*fields] == ["jittering_ratio", "box_jittering"]  # off when it came
    )


def test_jitter_flags_go_with_the_fields_of_a_file(write):
    """The published files hold box_jittering off and its ratio; a flag changes one of the two."""
    document = published("scrl", 200)
    document["network"]["scrl"]["jittering_ratio"] = 0.25
    path = write(document)
    assert parse("--config", path, "--network/scrl/box_jittering=yes").config.boxes.jitter == 0.25
    assert parse("--config", path, "--network/scrl/jittering_ratio=0.3").config.boxes.jitter == 0
    document["network"]["scrl"]["box_jittering"] = True
    path = write(document)
    assert parse("--config", path, "--network/scrl/jittering_ratio=0.3").config.boxes.jitter == 0.3
    assert parse("--config", path, "--network/scrl/box_jittering=0").config.boxes.jitter == 0


@pytest.mark.parametrize("word", ["False", "no", "F", "0", 0, False])
def test_words_are_switches_as_on_its_command_line(word):
    fields = dict.fromkeys(("enabled", "grid_based_box_gen", "detectron_aligned"), word)
    options, _ = kakaobrain.translate({"network": {"scrl": fields}}, "x")
    assert options == {"model.method": "byol", "boxes.grid": False, "model.aligned": False}
    config = parse(f"--network/scrl/enabled={word}", f"--network/scrl/grid_based_box_gen={word}").config
    assert (config.model.method, config.boxes.grid) == ("byol", False)


@pytest.mark.parametrize(("interval", "log_every"), [(1, 10), (9, 10), (10, 10), (11, 11), (500, 500)])
def test_logging_points_stay_rare(interval, log_every):
    """Each reads the device and decomposes a matrix, so the published one in each step would cost much."""
    options, notes = kakaobrain.translate({"train": {"tb_interval": interval}}, "x")
    assert options == {"run.log_every": log_every}
    request = parse(f"--train/tb_interval={interval}")
    assert request.config.run.log_every == log_every
    for text in (notes[1], request.notes[0]):
        assert ("--run.log_every=N logs more often" in text) == (interval < 10)
    assert parse("--train/tb_interval=1", "--run.log_every=1").config.run.log_every == 1


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"network": {"scrl": {"num_patch_per_image": 3}}}, r"did you mean 'network\.scrl\.num_patches_per_image'"),
        ({"network": {}, "train": {"epochs": 3}}, "unknown option 'train.epochs'.*did you mean 'train.max_epochs'"),
        ({"dataset": {"name": "cifar"}}, "data.source=cifar: must be one of"),
        ({"network": {"name": "resnet34x"}}, "model.backbone=resnet34x"),
        ({"augment": {"type": "simclr"}, "train": {"enabled": False}}, "python -m scrl_fast.evaluate"),
        ({"augment": {}, "train": {"max_epochs": "many"}}, "train.epochs=many: must be a whole number"),
        ({"augment": {}, "train": {"tb_interval": 0}}, r"train\.tb_interval=0: must be at least 1"),
        ({"augment": {}, "train": {"enabled": "no"}}, r"published\.yaml: train\.enabled=no: nothing to train"),
        ({"augment": {}, "train": None}, r"yaml: 'train' must hold options \(enabled, .*, m, optim\), not null"),
        ({"augment": {}, "train": {"optim": 3}}, r"'train\.optim' must hold options \(lr, momentum, .*\), not 3"),
        ({"network": None}, r"'network' must hold options \(name, proj_head, scrl\), not null"),
        (
            {"network": {"scrl": {"jittering_ratio": 0.1, "box_jittering": 0.2}}},
            r"published\.yaml: network\.scrl\.box_jittering=0\.2: must be true or false",
        ),
        ({"network": {"scrl": {"enabled": "maybe"}}}, r"network\.scrl\.enabled=maybe: must be true or false"),
    ],
)
def test_mistakes_are_errors_here_too(write, document, message):
    with pytest.raises((UsageError, ValueError), match=message):
        parse("--config", write(document))


def test_its_flags_keep_their_spelling(write):
    path = write(published("scrl", 200))
    request = parse(
        *("--config", path, "--train/max_epochs=3", "--train/batch_size_train", "8", "--train/optim/lr=1e-1"),
        *("--save_dir=runs/x", "--no_pbar", "--num_gpus", "1", "--dataset/root=/images", "--disable_autocast"),
    )
    config = request.config
    assert (config.train.epochs, config.train.batch_size, config.optim.lr) == (3, 8, 0.1)
    assert (config.run.dir, config.data.root, config.train.precision) == ("runs/x", "/images", "fp32")
    assert "--no_pbar has no effect: the progress line adapts to the terminal" in request.notes
    assert "--num_gpus has no effect: processes are started by torchrun" in request.notes
    with pytest.raises(UsageError, match="did you mean 'train/max_epochs'"):
        parse("--train/max_epoch=3")
    with pytest.raises(UsageError, match="--train/max_epochs needs a value"):
        parse("--train/max_epochs")


def test_load_dir_is_where_the_weights_come_from(write, tmp_path):
    path = write({**published("scrl", 200), "load_dir": str(tmp_path)})
    request = parse("--config", path)
    assert (request.config.init, request.config.resume) == (str(tmp_path), "")
    assert any("load_dir" in line and "--init_momentum=true" in line for line in request.notes)
    request = parse(f"--load_dir={tmp_path}/", "--resume=auto", "--run.dir=x")
    assert (request.config.init, request.config.resume) == (str(tmp_path), "auto")
    assert request.notes[0].startswith(f"--load_dir={tmp_path}/  ->  --init={tmp_path}/ (the weights;")


def test_debug_is_two_epochs_of_two_batches_for_its_user_only(write):
    path = write(published("scrl", 200))
    request = parse("--config", path, "--debug")
    assert request.config.train.max_steps == 4 and "two epochs of two batches" in request.notes[-1]
    assert parse("--config", path, "--debug", "--train.max_steps=9").config.train.max_steps == 9
    assert parse("--debug", "--train/max_epochs=3").config.train.max_steps == 4
    request = parse("--debug", "--config=scrl_200ep")
    assert request.config.train.max_steps == 0 and not request.notes


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--num_gpus=8", "torchrun --nproc-per-node=8 -m scrl_fast.train"),
        (
            "--num_machines=4",
            "torchrun --nnodes=4 --nproc-per-node=GPUS --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT -m",
        ),
        ("--dist_url=tcp://10.0.0.7:5555", "--rdzv-endpoint=10.0.0.7:5555 -m scrl_fast.train"),
    ],
)
def test_several_processes_are_started_by_torchrun(monkeypatch, flag, line):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UsageError, match=re.escape(f"{flag}: processes are started by torchrun: torchrun ")) as caught:
        parse(flag)
    assert line in str(caught.value)
    monkeypatch.setenv("WORLD_SIZE", "32")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert "has no effect: processes are started by torchrun" in parse(flag).notes[0]
    with pytest.raises(UsageError, match="torchrun started 8 processes here; give it --nproc-per-node=4"):
        parse("--num_gpus=4")


@pytest.mark.parametrize(
    "flag", ["--num_gpus=1", "--num_gpus=-1", "--num_machines=1", "--machine_rank=0", "--dist_url=auto"]
)
@pytest.mark.parametrize("address", ["--dist_url=tcp://127.0.0.1:1", "--dist_url=tcp://localhost:1"])
def test_one_process_needs_no_launcher(monkeypatch, flag, address):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    notes = parse(flag, address).notes
    assert len(notes) == 2 and all("has no effect: processes are started by torchrun" in note for note in notes)


def test_the_scale_of_boxes_is_that_of_the_backbone(write):
    document = published("scrl", 200)
    document["network"]["scrl"]["spatial_scale"] = 0.0625
    path = write(document)
    message = r"network\.scrl\.spatial_scale=0\.0625: must be 0\.03125, one over the stride 32 of resnet50"
    with pytest.raises(UsageError, match=rf"published\.yaml: {message}"):
        parse("--config", path)
    with pytest.raises(UsageError, match=f"--{message}"):
        parse("--network/scrl/spatial_scale=0.0625")
    with pytest.raises(UsageError, match="one over the stride 32 of resnet101"):
        parse("--network/scrl/spatial_scale=wide", "--network/name=resnet101")
    document["network"]["scrl"]["spatial_scale"] = 0.125
    document["network"]["name"] = "resnet10_tiny"
    assert parse("--config", write(document)).config.model.backbone == "resnet10_tiny"


def test_the_table_names_only_options_that_exist():
    ours = option_kinds(Config)
    for name, field in FIELDS.items():
        assert (field.option in ours) != bool(field.why), name
        assert name not in ours or field.option == name, f"{name} means two things"
    assert set(SWITCHES) <= set(FIELDS)
