"""``compare``: the same rows whatever stopped in between, rows that fail or are wrong are named, rows can run alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from tiny_transfer import SMALL

from scrl_fast.errors import UsageError
from scrl_fast.models import build_encoder
from scrl_fast.run import precision
from scrl_fast.run.start_tables import labels_of
from scrl_fast.transfer.__main__ import main, parse_command
from scrl_fast.transfer.compare.comparison import Comparison
from scrl_fast.transfer.compare.config import CompareConfig
from scrl_fast.transfer.compare.rows import RowFiles, rows_of
from scrl_fast.transfer.compare.timed import Deadline, TimedTransfer
from scrl_fast.transfer.config import TASK_SUMMARIES
from scrl_fast.transfer.trainer import Transfer
from scrl_fast.weights import Weights, WeightsError

STEPS = 3


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """An encoder file: a start beside random."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "scrl.pth"
    torch.save({"state_dict": build_encoder("resnet10_tiny").body.state_dict()}, path)
    return path


def words(data_root, folder, weights, *more):
    options = (f"--train.steps={STEPS}", "--eval.images=3", "--shares=0.6", "--seeds=2", f"--inits=random,{weights}")
    return ["voc", f"--data.root={data_root}", f"--compare.dir={folder}", *SMALL, *options, *more]


def compare(argv):
    return main(["compare", *argv])


def options(*argv):
    return parse_command(list(argv), CompareConfig, "compare", TASK_SUMMARIES, "")


def outcome(folder):
    """Table and rows, without the folder's own name."""
    document = json.loads((folder / "compare.json").read_text().replace(str(folder), "FOLDER"))
    document.pop("config")
    return (folder / "table.md").read_text().replace(str(folder), "FOLDER"), document


@pytest.fixture(scope="module")
def whole(data_root, weights, tmp_path_factory):
    """A comparison that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert compare(words(data_root, folder, weights)) == 0
    return folder


def test_rows_table_and_picture(whole, weights):
    table, document = outcome(whole)
    rows = document["rows"]
    assert [(row["start"], row["share"], row["seed"]) for row in rows] == [
        *(("random", 0.6, 0), ("scrl.pth", 0.6, 0)),
        *(("random", 0.6, 1), ("scrl.pth", 0.6, 1)),
    ]
    assert rows[1]["init"] == str(weights) and {"AP", "AP50", "AP75", "AP50_area"} <= set(rows[0])
    assert not document["failed"] and not document["open"]
    assert [line["start"] for line in document["table"]] == ["random", "scrl.pth"]
    difference = document["table"][1]["difference"]
    assert difference["pairs"] == 2
    assert difference["mean"] == pytest.approx(
        sum(r["AP"] for r in rows[1::2]) / 2 - sum(r["AP"] for r in rows[::2]) / 2
    )
    assert "| 60 %" in table and "2 seeds are few" in table and "no run of scrl_fast" in table
    assert (whole / "compare.png").read_bytes().startswith(b"\x89PNG")
    said = (whole / "log.txt").read_text()
    assert "4 rows: 2 starts (random, scrl.pth) x 60 % of the labels x 2 seeds" in said
    assert "s a measured image: about" in said and "for all 4 that are open" in said
    order = [line.partition(": ")[2] for line in said.splitlines() if " row " in line]
    assert order[0] == "random, 60 % of the labels, seed 0" and order[-1] == "scrl.pth, 60 % of the labels, seed 1"


def test_all_starts_see_the_same_images_in_the_same_order(data_root, weights, tmp_path):
    run = Comparison(options(*words(data_root, tmp_path / "c", weights, "--shares=0.6,1")))
    seen = {}
    for row in run.rows:
        transfer = run.transfer(run.options[row.name])
        with torch.no_grad():
            batches = [[target["boxes"].tolist() for _, target in batch] for batch in transfer.batches()]
        seen.setdefault((row.share, row.seed), []).append((transfer.data.indices, batches, transfer.last_step))
    assert len(seen) == 4 and all(first == second for first, second in seen.values())
    drawn = [found[0][0] for (share, _), found in seen.items() if share == 0.6]
    assert drawn[0] != drawn[1]  # each seed draws its own


@pytest.mark.parametrize("how", ["signal", "minutes", "minutes in the measurement"])
def test_an_interrupted_comparison_ends_in_the_same_table(data_root, weights, tmp_path, whole, monkeypatch, how):
    plain_step, plain_evaluate, steps, measured = TimedTransfer.train_step, TimedTransfer.evaluate, [], []

    def step(self, batch, weight=None):
        steps.append(1)
        plain_step(self, batch, weight)
        if how == "signal" and len(steps) == STEPS + 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def evaluate(self):
        measured.append(1)
        return plain_evaluate(self)

    over = {"signal": lambda _: False, "minutes": lambda _: len(steps) > STEPS + 1}
    with monkeypatch.context() as patch:
        patch.setattr(TimedTransfer, "train_step", step)
        patch.setattr(TimedTransfer, "evaluate", evaluate)
        patch.setattr(Deadline, "is_over", over.get(how, lambda _: len(measured) > 1))
        assert compare(words(data_root, tmp_path / "c", weights, "--seeds=1", "--minutes=9")) == 0
    table, document = outcome(tmp_path / "c")
    assert len(document["rows"]) == 1 and len(document["open"]) == 1 and "Not finished: 1 of 2 rows" in table
    assert "no seed in common yet" in table
    said = (tmp_path / "c" / "runs" / "scrl.pth-0.6-seed0" / "log.txt").read_text()
    assert ("SIGTERM: stopped" if how == "signal" else "--minutes=9: stopped") in said
    assert "To continue" not in said  # the comparison's own last line says what goes on
    assert compare(words(data_root, tmp_path / "c", weights, "--seeds=1")) == 0
    shutil.copytree(whole, tmp_path / "whole")
    assert compare(words(data_root, tmp_path / "whole", weights, "--seeds=1")) == 0  # of its rows, as they are
    assert outcome(tmp_path / "c") == outcome(tmp_path / "whole")
    assert "resumed from" in (tmp_path / "c" / "runs" / "scrl.pth-0.6-seed0" / "log.txt").read_text()


def test_starts_that_were_normalised_otherwise_are_told_before_the_first_row(monkeypatch):
    def read(init, backbone):
        if init == "gone":
            raise WeightsError("there is no file gone")
        return Weights(init, "torchvision", {"online": {}}, metadata={"mean": [0.5] * 3, "std": [0.2] * 3})

    monkeypatch.setattr("scrl_fast.weights.read_initial", read)
    monkeypatch.setattr("scrl_fast.weights.check_fit", lambda *_: None)  # no tensors here
    said, inits = [], ["random", "a", "gone", "done"]
    comparison = SimpleNamespace(say=said.append)
    model = SimpleNamespace(backbone="resnet50", branch="online", mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2))
    comparison.config = SimpleNamespace(model=model, inits=inits)
    comparison.results = SimpleNamespace(labels=inits, open=[SimpleNamespace(init=init) for init in inits[:3]])
    Comparison.check_starts(comparison)
    assert said == [
        "a: it was trained on images normalised otherwise than here: --model.mean=0.5,0.5,0.5",
        "gone: its rows will fail: there is no file gone",
    ]


def test_a_start_of_another_network_is_refused_before_the_first_row(data_root, tmp_path, weights, monkeypatch, capsys):
    other = tmp_path / "other.pth"
    torch.save({"state_dict": build_encoder("resnet18").body.state_dict()}, other)
    monkeypatch.setattr(Transfer, "fit", lambda self: pytest.fail("no row may begin"))
    with pytest.raises(SystemExit, match="2"):
        compare(words(data_root, tmp_path / "c", weights, f"--inits=random,{weights},{other}"))
    said = capsys.readouterr().err
    assert "inits: weights that do not fill model.backbone=resnet10_tiny, model.branch=online: other.pth: " in said
    assert "scrl.pth: " not in said


def test_a_finished_comparison_trains_nothing_again_and_takes_more_seeds(whole, data_root, weights, monkeypatch):
    before = outcome(whole)
    with monkeypatch.context() as patch:
        patch.setattr(Transfer, "fit", lambda self: pytest.fail("it was finished"))
        assert compare(words(data_root, whole, weights)) == 0
        assert outcome(whole) == before
        more = Comparison(options(*words(data_root, whole, weights, "--seeds=3", "--inits=random")))
        assert [row.name for row in more.results.open] == ["random-0.6-seed2"]
        second = Comparison(options(*words(data_root, whole, weights, "--seeds=1", "--train.seed=1")))
        assert not second.results.open  # a row is the same wherever its seed is counted from


def test_a_row_alone_gives_the_same_numbers(whole, tmp_path):
    row = outcome(whole)[1]["rows"][3]
    command = row["command"].replace("FOLDER", str(whole)).split()
    assert command[:3] == ["python", "-m", "scrl_fast.transfer"]
    assert main([*command[3:], f"--run.dir={tmp_path / 'alone'}", f"--json={tmp_path / 'r.json'}"]) == 0
    result = json.loads((tmp_path / "r.json").read_text())["result"]
    assert {name: row[name] for name in result} == result


def test_a_row_that_fails_is_named_and_the_others_go_on(data_root, tmp_path, capsys):
    bad = tmp_path / "bad.pth"
    bad.write_text("no weights")
    folder = tmp_path / "c"
    assert compare(words(data_root, folder, bad, "--seeds=1", "--train.steps=1")) == 1
    table, document = outcome(folder)
    assert list(document["failed"]) == ["bad.pth-0.6-seed0"] and len(document["rows"]) == 1
    assert (
        "Failed: bad.pth, 60 % of the labels, seed 0: " in table and "rows that failed: 1;" in capsys.readouterr().err
    )
    assert "Traceback" in (folder / "log.txt").read_text()
    torch.save({"state_dict": build_encoder("resnet10_tiny").body.state_dict()}, bad)  # put right
    assert compare(words(data_root, folder, bad, "--seeds=1", "--train.steps=1")) == 0


def test_checkpoints_of_finished_rows_may_go(data_root, tmp_path):
    folder, more = tmp_path / "c", ("--train.steps=1", "--seeds=1", "--inits=random", "--compare.keep_detectors=false")
    assert compare(words(data_root, folder, "x", *more, "--compare.leaks=off")) == 0
    assert not list((folder / "runs" / "random-0.6-seed0" / "checkpoints").iterdir())
    assert "compare.leaks=off" in (folder / "table.md").read_text()
    assert compare(words(data_root, folder, "x", *more, "--compare.leaks=off")) == 0


@pytest.mark.parametrize(
    "more, said",
    [
        (["--inits=random,torchvison"], "no such checkpoint or run folder: 'torchvison'; did you mean 'torchvision'"),
        (["--inits=random,/nowhere/run"], "no such checkpoint or run folder: '/nowhere/run'"),
        (["--inits=random,random"], "must not hold a value twice"),
        (["--inits=random,"], "must not hold an empty name"),
        (["--shares=0,1"], "shares=[0.0, 1.0]: must be above 0 and at most 1"),
        (["--shares=0.1,1.5"], "must be above 0 and at most 1"),
        (["--shares=a"], "must be a list of numbers"),
        (["--shares=0.1"], "shares=0.1, seed 0: train.batch_size=3: the data set has 1 images to train on"),
        (["--seeds=0"], "seeds=0: must be at least 1"),
        (["--minutes=-1"], "minutes=-1.0: must be at least 0"),
        (["--share=1"], "unknown option '--share'; did you mean 'shares'"),
        (["--compare.dirs=x"], "did you mean 'compare.dir'"),
        (["--init=torchvision"], "init=torchvision: a comparison has several starts"),
        (["--resume=auto"], "resume=auto: a comparison goes on by itself"),
        (["--run.dir=x"], "run.dir=x: every row has a run folder of its own"),
        (["--data.subset=0.5"], "data.subset=0.5: a comparison has shares"),
        (["--compare.near_distance=99"], "must be from 0 to 64"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(data_root, tmp_path, capsys, more, said):
    with pytest.raises(SystemExit) as stopped:
        compare([*words(data_root, tmp_path / "c", "x", "--inits=random"), *more])
    assert stopped.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_other_options_or_another_start_do_not_mix_with_finished_rows(data_root, weights, whole, tmp_path):
    for more, said in (
        (["--optim.lr=0.5"], r"made with other options \(optim.lr 0.01 -> 0.5\)"),
        (["--eval.images=2"], r"other options \(eval.images 3 -> 2\)"),
    ):
        with pytest.raises(ValueError, match=said):
            Comparison(options(*words(data_root, whole, weights, *more)))
    before = weights.read_bytes()
    try:
        torch.save({"state_dict": build_encoder("resnet10_tiny").body.state_dict()}, weights)
        with pytest.raises(ValueError, match="as it was then, not as it is now"):
            Comparison(options(*words(data_root, whole, weights)))
    finally:
        weights.write_bytes(before)


def test_other_labels_do_not_mix_with_finished_rows(data_root, weights, whole, tmp_path):
    shutil.copytree(data_root, tmp_path / "data")
    copied = options(*words(tmp_path / "data", whole, weights))
    copied.data.root = str(data_root)
    assert not Comparison(copied).results.open
    path = next((tmp_path / "data" / "VOC2007" / "Annotations").glob("0005*.xml"))
    path.write_text(path.read_text().replace("cat", "dog"))
    files = Comparison(copied).files
    changed = Comparison(options(*words(tmp_path / "data", tmp_path / "other", weights))).files
    assert files.data["train"] != changed.data["train"] and files.data["val"] == changed.data["val"]
    files.data = changed.data
    row, again = rows_of(copied)[0], Comparison(copied)
    with pytest.raises(ValueError, match=r"other images or labels in data\.root"):
        files.read(row, again.options[row.name], again.precision)


@pytest.mark.parametrize("begun_by", ["this release", "an earlier one"])
def test_a_table_has_one_precision(begun_by, data_root, weights, tmp_path, monkeypatch):
    """Begun where bf16 is emulated, gone on with where it is not: the later seed is trained like the first one."""
    monkeypatch.setattr(precision, "cpu_bf16", lambda: precision.CpuBf16(False, "for the test"))
    argv = words(data_root, tmp_path, weights, "--inits=random", "--train.steps=1")
    assert compare([*argv, "--seeds=1"]) == 0
    (first,) = (tmp_path / "rows").glob("*.json")
    document = json.loads(first.read_text())
    assert document["config"]["train"]["precision"] == "fp32"
    if begun_by == "an earlier one":  # it kept the option as it was given
        document["config"]["train"]["precision"] = "auto"
        first.write_text(json.dumps(document))
    monkeypatch.setattr(precision, "cpu_bf16", lambda: precision.CpuBf16(True, "for the test"))
    going_on = Comparison(options(*argv, "--seeds=2"))
    assert [row.seed for row in going_on.results.open] == [1]
    assert {row.train.precision for row in going_on.options.values()} == {"fp32"}
    other = words(data_root, tmp_path / "other", weights)
    assert {row.train.precision for row in Comparison(options(*other)).options.values()} == {"bf16"}


def test_the_task_coco10_and_several_processes_are_refused(data_root, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"compare detection --shares=0\.1"):
        options("coco10", f"--data.root={data_root}", "--inits=random")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun"):
        Comparison(options("voc", f"--data.root={data_root}", "--inits=random"))


def test_rows_come_in_an_order_that_may_end_anywhere():
    config = CompareConfig(inits=("random", "torchvision"), shares=(1.0, 0.1), seeds=2)
    assert [row.name for row in rows_of(config)] == [
        *("random-0.1-seed0", "torchvision-0.1-seed0", "random-1-seed0", "torchvision-1-seed0"),
        *("random-0.1-seed1", "torchvision-0.1-seed1", "random-1-seed1", "torchvision-1-seed1"),
    ]


def test_starts_have_short_names_of_their_own(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "scrl" / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "scrl" / "config.yaml").touch()
    runs = [str(tmp_path / "a" / "scrl"), str(tmp_path / "b" / "scrl" / "checkpoints" / "last.pt")]
    assert labels_of(["random", *runs, "we ights.pth"]) == ["random", "scrl", "scrl-2", "we-ights.pth"]
    assert labels_of(["timm", "hf-hub:someone/encoder@main"]) == ["timm", "encoder-main"]


def test_the_command_of_a_row_repeats_what_no_file_may_ask_for(tmp_path):
    config = CompareConfig(inits=("random",))
    config.model.backbone = "mine.networks:small"
    row = rows_of(config)[0]
    words = RowFiles(tmp_path, config.inits, {}).command(row, config).split()
    assert words[3:] == [
        *("detection", f"--config={tmp_path}/rows/random-0.1-seed0.yaml", "--model.backbone=mine.networks:small"),
    ]


def test_lists_are_taken_with_commas_or_in_brackets(data_root):
    base = ["voc", f"--data.root={data_root}"]
    for words in (["--inits=random,timm", "--shares", "0.1,1"], ["--inits=[random, timm]", "--shares=[0.1,1]"]):
        found = options(*base, *words)
        assert (found.inits, found.shares) == (("random", "timm"), (0.1, 1.0))
    found = options(*base, "--inits=random", "--shares=1", "--model.mean=0.5,0.5,0.5", "--optim.lr_steps=[7,9]")
    assert (found.inits, found.shares, found.optim.lr_steps) == (("random",), (1.0,), (7, 9))
    assert found.model.mean == (0.5, 0.5, 0.5)
    for empty in ("--inits=random,", "--shares=0.1,,1", "--data.classes=fish,"):
        with pytest.raises(UsageError, match="must not hold an empty"):
            options(*base, empty)
    with pytest.raises(UsageError, match=r"data\.classes"):
        options(*base, "--data.classes", "--train.steps=5")
    for wrong, said in (
        ("--model.mean=0.5", "model.mean"),
        ("--model.mean=0.5,x,1", "model.mean"),
        ("--shares=,", "shares"),
    ):
        with pytest.raises(UsageError, match=said):
            options(*base, wrong)
