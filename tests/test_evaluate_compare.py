"""``compare`` of frozen encoders: rows, the table that tells which differ, what is kept, and what is refused."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from labelled_folders import write
from PIL import Image
from test_compare_leaks import run_folder
from test_evaluate import evaluate, refused

from scrl_fast.data.sources import shared_images
from scrl_fast.data.sources.files import image_folder
from scrl_fast.evaluate import compare as module
from scrl_fast.evaluate import pretraining
from scrl_fast.evaluate.compare import StartTimes, training_part
from scrl_fast.evaluate.config import CompareOptions
from scrl_fast.evaluate.pretraining import seen_before
from scrl_fast.evaluate.regions import BoxFeatures

SIDE, BOX = 96, 24


def write_noise(root, part, count, seed):
    """Pictures of noise with six boxes each; the class of a box is a channel that is brighter by a little."""
    rng = np.random.default_rng(seed)
    (root / part / "images").mkdir(parents=True)
    for n in range(count):
        pixels = rng.integers(20, 230, (SIDE, SIDE, 3))
        lines = []
        for place in range(6):
            x, y, label = 4 + 30 * (place % 3), 10 + 40 * (place // 3), int(rng.integers(3))
            pixels[y : y + BOX, x : x + BOX, label] += 12
            lines.append(f"{label} {(x + BOX / 2) / SIDE} {(y + BOX / 2) / SIDE} {BOX / SIDE} {BOX / SIDE}")
        Image.fromarray(pixels.astype(np.uint8)).save(root / part / "images" / f"{n}.png")
        write(root / part / "labels" / f"{n}.txt", "\n".join(lines))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("noise")
    write_noise(root, "train", 40, 0)
    write_noise(root, "valid", 20, 1)
    write(root / "data.yaml", "train: train/images\nval: valid/images\nnames: [red, green, blue]\n")
    return root


def save(path, weight):
    torch.save({"state_dict": {"conv.weight": weight}}, path)
    return path


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """Weights of `own_encoders.colours`: one averages each channel, the other sees edges alone."""
    folder = tmp_path_factory.mktemp("starts")
    means = torch.eye(3).view(3, 3, 1, 1).expand(3, 3, 4, 4) / 16
    edges = torch.tensor([1.0, -1, 1, -1]).expand(3, 3, 4, 4) / 16
    for name, weight in (("means.pth", means), ("edges.pth", edges), ("again.pth", means)):
        save(folder / name, weight.clone())
    return folder


def command(root, starts, *more):
    names = [str(starts / name) for name in ("edges.pth", "means.pth", "again.pth")]
    own = ["--backbone=own_encoders:colours", "--batchnorm=stored", "--workers=0", "--cache="]
    return ["compare", f"--data.root={root}", f"--checkpoints={','.join(names)}", *own, *more]


@pytest.fixture(scope="module")
def whole(root, starts, tmp_path_factory):
    """The document of a comparison, its options, and its cache."""
    from scrl_fast.evaluate.__main__ import main

    folder = tmp_path_factory.mktemp("whole")
    options = command(root, starts, "--shares=0.5,0.2,1", "--seeds=3", f"--cache={folder / 'cache'}")
    assert main([*options, f"--json={folder / 'a.json'}", f"--plot={folder / 'new' / 'a.png'}"]) == 0
    return json.loads((folder / "a.json").read_text()), options, folder


def test_rows_of_every_start_share_and_seed(whole):
    document, _, folder = whole
    result = document["result"]
    expected = [(s, share, seed) for s in ("edges.pth", "means.pth", "again.pth")
                for share, seeds in ((0.2, 3), (0.5, 3), (1.0, 1)) for seed in range(seeds)]  # fmt: skip
    assert [(row["start"], row["share"], row["seed"]) for row in result["rows"]] == expected
    assert {"checkpoint", "accuracy", "mean_class_accuracy", "boxes", "train_boxes"} <= set(result["rows"][0])
    assert {(row["share"], row["train_boxes"]) for row in result["rows"]} == {(0.2, 48), (0.5, 120), (1.0, 240)}
    assert (result["train_images"], result["test_images"], result["rows"][0]["boxes"]) == (40, 20, 120)
    assert (folder / "new/a.png").stat().st_size > 10_000
    assert result["seen"]["edges.pth"] == "not checked: it does not say what it was trained on: no run of scrl_fast"
    assert {"cpu", "threads", "torch", "commit"} <= set(document["environment"])


def test_a_start_that_holds_the_class_is_beyond_chance_and_its_copy_differs_by_nothing(whole):
    lines = {(line["start"], line["share"]): line for line in whole[0]["result"]["table"]}
    for share in (0.2, 0.5, 1.0):
        difference = lines["means.pth", share]["difference"]["accuracy"]
        assert difference["beyond_chance"] and difference["mean"] > 0.2
        assert lines["means.pth", share]["verdict"]["accuracy"] == "yes: above edges.pth"
        assert lines["again.pth", share]["difference"] == lines["means.pth", share]["difference"]
        assert "difference" not in lines["edges.pth", share]
    assert lines["means.pth", 1.0]["accuracy"]["deviation"] is None
    assert lines["means.pth", 0.2]["accuracy"]["count"] == 3


def test_equal_starts_never_differ(capsys, tmp_path, root, starts):
    options = command(root, starts, "--seeds=3", f"--checkpoints={starts / 'means.pth'},{starts / 'again.pth'}")
    line, document, _ = evaluate(capsys, tmp_path, *options)
    for each in document["result"]["table"][1::2]:
        for found in each["difference"].values():
            assert (found["mean"], found["interval"], found["beyond_chance"]) == (0, [0, 0], False)
    assert len(re.findall(r"\+0.00 \(\+0.00 to \+0.00\) +\| no: within chance", line)) == 4
    assert "3 seeds are few" in line and "95% interval of the difference, 2,000 draws" in line


def test_all_images_give_the_row_of_roi_linear(capsys, tmp_path, whole, root, starts):
    same = [word for word in command(root, starts)[1:] if not word.startswith("--checkpoints")]
    alone = ["roi-linear", f"--checkpoint={starts / 'means.pth'}", "--data.source=labelled", "--batch_size=16"]
    _, document, _ = evaluate(capsys, tmp_path, *alone, *same)
    (row,) = [r for r in whole[0]["result"]["rows"] if (r["start"], r["share"]) == ("means.pth", 1.0)]
    assert {name: document["result"][name] for name in ("accuracy", "boxes", "train_boxes")} == {
        name: row[name] for name in ("accuracy", "boxes", "train_boxes")
    }
    assert row["mean_class_accuracy"] == pytest.approx(document["result"]["mean_class_accuracy"])


def test_the_same_command_gives_the_same_bits_from_the_cache(capsys, tmp_path, whole, monkeypatch):
    document, options, folder = whole
    from scrl_fast.evaluate import cached_boxes

    def refuse(*_, **__):
        raise AssertionError("features are extracted again")

    kept = len(list((folder / "cache").glob("*.pt")))
    monkeypatch.setattr(cached_boxes, "box_features", refuse)
    _, again, said = evaluate(capsys, tmp_path, *options)
    assert again["result"] == document["result"] and said.count("features taken from") == 6
    assert kept == 4 == len(list((folder / "cache").glob("*.pt")))  # equal weights share theirs


def test_batchnorm_statistics_are_kept_too(capsys, tmp_path, root, monkeypatch):
    from scrl_fast.evaluate import cached_boxes

    options = ["compare", f"--data.root={root}", "--checkpoints=random", "--backbone=resnet10_tiny", "--shares=1"]
    options += [f"--cache={tmp_path / 'cache'}", "--workers=0"]
    first = evaluate(capsys, tmp_path, *options)[1]["result"]
    monkeypatch.setattr(cached_boxes, "measure_batchnorm_on_boxes", None)
    _, document, said = evaluate(capsys, tmp_path, *options)
    assert document["result"] == first and "random: batchnorm taken from" in said and "done in" in said


def test_a_share_holds_the_smaller_ones_of_its_seed():
    images = torch.arange(50).repeat_interleave(2)
    whole = BoxFeatures(images.float().view(-1, 1, 1, 1), images % 7, images)
    parts = {share: training_part(whole, 50, share, 3) for share in (0.001, 0.1, 0.5, 1.0)}
    seen = {share: set(part.features.flatten().tolist()) for share, part in parts.items()}
    assert [len(seen[share]) for share in sorted(seen)] == [1, 5, 25, 50]
    assert seen[0.001] < seen[0.1] < seen[0.5] < seen[1.0]
    half = parts[0.5]
    assert half.images.tolist() == torch.arange(25).repeat_interleave(2).tolist()  # numbered anew, in order
    assert torch.equal(half.labels, half.features.flatten().long() % 7) and parts[1.0] is whole
    other = training_part(whole, 50, 0.5, 4)
    assert set(other.features.flatten().tolist()) != seen[0.5]


def test_random_and_zoo_names_have_the_backbone_of_the_first_file(capsys, tmp_path, root, starts):
    from scrl_fast.models import build_encoder

    torch.manual_seed(3)
    torch.save({"state_dict": build_encoder("resnet10_tiny").body.state_dict()}, tmp_path / "tiny.pth")
    options = ["compare", f"--data.root={root}", "--cache=", "--shares=1", "--workers=0", "--data.max_images=10"]
    _, document, said = evaluate(capsys, tmp_path, *options, f"--checkpoints=random,{tmp_path / 'tiny.pth'}")
    assert document["result"]["starts"] == {
        "random": {"checkpoint": "random", "backbone": "resnet10_tiny"},
        "tiny.pth": {"checkpoint": str(tmp_path / "tiny.pth"), "backbone": "resnet10_tiny"},
    }
    assert "random: done in" in said and ", the other 1 about " in said


def test_contents_that_are_too_many_to_read_are_told(tmp_path, root, monkeypatch):
    copies = tmp_path / "copies"
    shutil.copytree(root / "valid/images", copies)
    monkeypatch.setattr(shared_images, "MOST_READ", 3)
    said = seen_before(str(run_folder(tmp_path / "run", copies)), image_folder(str(root / "valid/images")))
    assert said.startswith("none of 20 test images is among 20 images, compared by path and link; too many agree")


def test_no_run_makes_a_data_set_be_loaded(tmp_path, root, monkeypatch):
    run = run_folder(tmp_path / "run", root)
    (run / "config.yaml").write_text("data: {source: hf, root: some/dataset}\n")
    monkeypatch.setattr(pretraining, "make_source", None)
    assert seen_before(str(run), image_folder(str(root / "valid/images"))) == "not checked: its images are no files"


def test_few_test_images_and_classes_without_a_training_box_are_told(capsys, tmp_path, root, starts):
    small = tmp_path / "small"
    shutil.copytree(root, small)
    kept = sorted((small / "valid/images").iterdir())[0]
    for image in (small / "valid/images").iterdir():
        if image != kept:
            image.unlink()
    labels = small / "valid/labels" / f"{kept.stem}.txt"
    for part in (small / "train/labels").iterdir():  # no training box of class 0
        part.write_text("".join(line for line in part.read_text().splitlines(True) if not line.startswith("0 ")))
    labels.write_text("0 0.5 0.5 0.5 0.5\n1 0.3 0.3 0.3 0.3\n")
    line, document, _ = evaluate(capsys, tmp_path, *command(small, starts))
    assert "1 test boxes, of 1 classes without a training box, count as named wrongly." in line
    assert "1 test images are few" in line and "not known: too few images" in line
    found = [row["difference"]["accuracy"] for row in document["result"]["table"] if "difference" in row]
    assert found and all(each["interval"] is None and not each["beyond_chance"] for each in found)


def test_test_images_among_those_of_pre_training_are_told(tmp_path, root):
    places = {"train": root / "train/images", "all": root}
    runs = {name: str(run_folder(tmp_path / name, place)) for name, place in places.items()}
    test = image_folder(str(root / "valid/images"))
    assert seen_before("random", test) == "nothing to check: it has seen no images"
    assert seen_before(runs["train"], test) == "none of 20 test images is among 40 images, compared as files"
    assert seen_before(runs["all"], test).startswith(
        "20 of 20 test images are among 60 images, compared as files, such as "
    )
    own = tmp_path / "train/config.yaml"
    own.write_text(own.read_text().replace("backbone: resnet50", "backbone: own_encoders:colours"))
    assert "own_encoders" in own.read_text() and "20 test images is among 40" in seen_before(runs["train"], test)
    copies = tmp_path / "copies"
    shutil.copytree(root / "valid/images", copies)
    assert "20 of 20 test" in seen_before(str(run_folder(tmp_path / "copied", copies)), test)
    assert "not checked: its images are not here" in seen_before(str(run_folder(tmp_path / "gone", "/nowhere")), test)
    detector = run_folder(tmp_path / "detector", copies)
    (detector / "config.yaml").write_text("task: custom\ndata: {root: x}\n")
    assert seen_before(str(detector), test) == "not checked: it is a detector's run"


@pytest.mark.parametrize(
    "more, message",
    [
        (["--checkpoints=random,/nowhere"], "checkpoints: there is no such checkpoint or run folder: '/nowhere'"),
        (["--checkpoints=random,tim"], "did you mean 'timm'"),
        (["--checkpoints=[]"], "--checkpoints is missing"),
        (["--checkpoints=random,random"], "must not hold a value twice"),
        (["--checkpoint=random"], "checkpoint=random: compare takes several: --checkpoints=random,RUN"),
        (["--shares=0"], "shares=[0.0]: must be above 0 and at most 1"),
        (["--shares=0.1,0.1"], "shares=[0.1, 0.1]: must not hold a value twice"),
        (["--seeds=0"], "seeds=0: must be from 1 to 1000"),
        (["--std=[0,1,1]"], "std=[0.0, 1.0, 1.0]: must be above 0"),
        (["--data.test=vall"], "data.test=vall: "),
        (["--data.root="], "data.source=labelled needs --data.root"),
        (["--chekpoints=a"], "did you mean 'checkpoints'"),
    ],
)
def test_refusals_name_the_option(capsys, root, starts, more, message):
    assert message in refused(capsys, *command(root, starts), *more)


@pytest.mark.parametrize("what", ["damaged", "another network", "no zoo weights"])
def test_a_start_that_cannot_be_used_is_refused_before_any_features(capsys, tmp_path, root, starts, what, monkeypatch):
    monkeypatch.setattr(module, "cached_box_features", None)
    if what == "damaged":
        bad, said = tmp_path / "bad.pth", "checkpoints: {}: "
        bad.write_bytes(b"no weights")
    elif what == "another network":
        bad, said = save(tmp_path / "bad.pth", torch.zeros(5, 3, 4, 4)), "checkpoints: {}: "
    else:
        bad, said = "torchvision", "checkpoints: {}: torchvision has no ImageNet weights of own_encoders:colours"
    last = refused(capsys, *command(root, starts), f"--checkpoints=random,{starts / 'means.pth'},{bad}")
    assert said.format(bad) in last


def test_the_time_left_is_that_of_all_starts(monkeypatch):
    now, said = [100.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    times = StartTimes(3, 50, said.append)
    times.begin(1, "random")
    times("features taken from x")
    now[0] += 20
    times.advance(25, "images")
    times.advance(400, "classifiers")
    times("half")
    now[0] += 22
    times.finish()
    times.begin(3, "timm")
    now[0] += 6
    times.advance(50, "images")
    times("all read, classifiers to come")
    times.finish()
    assert said == [
        "random: features taken from x",
        "random: half; all 3 starts: about 1m40s left",
        "random: done in 42s, the other 2 about 1m24s",
        "timm: all read, classifiers to come; all 3 starts: about 36s left",
        "timm: done in 6s",
    ]


def test_normalization_is_that_of_the_weights_where_they_say_it():
    from types import SimpleNamespace

    from scrl_fast.evaluate.encoder import normalization

    options = CompareOptions(mean=(0.5,) * 3, std=(0.25,) * 3)
    own = SimpleNamespace(normalized=True, mean=(0.1,) * 3, std=(0.2,) * 3)
    assert normalization(own, options) == ((0.1,) * 3, (0.2,) * 3)
    own.normalized = False
    assert normalization(own, options) == ((0.5,) * 3, (0.25,) * 3)
