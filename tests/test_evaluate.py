"""``python -m scrl_fast.evaluate`` on data in official layouts and weights of every origin, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import torchvision
from tiny_data import write_coco, write_imagenet, write_voc, write_voc_object

from scrl_fast.config.schema import load_recipe
from scrl_fast.distributed.world import World
from scrl_fast.errors import UsageError
from scrl_fast.evaluate.__main__ import main
from scrl_fast.evaluate.cache import FeatureCache, content_key
from scrl_fast.evaluate.config import TASK_OPTIONS
from scrl_fast.evaluate.result import TaskContext
from scrl_fast.trainer import SCRLTrainer

TINY = ["--checkpoint=random", "--backbone=resnet10_tiny", "--cache="]


def evaluate(capsys, tmp_path, *argv):
    """(line of result, JSON document, messages) of one command."""
    file = tmp_path / "result.json"
    assert main([*argv, f"--json={file}"]) == 0
    said = capsys.readouterr()
    return said.out.strip(), json.loads(file.read_text()), said.err


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("scrl_fast.evaluate:") == 1 and "Traceback" not in said, said
    return said.splitlines()[-1]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    return write_imagenet(tmp_path_factory.mktemp("imagenet"), train=16, val=8)


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    write_coco(root, "train2017", images=30, seed=1)
    write_coco(root, "val2017", images=12, seed=2)
    return root


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, imagenet):
    """A run of our trainer, three steps, with an online probe of three classes."""
    config = load_recipe("demo")
    config.data.source, config.data.root, config.data.workers = "imagenet", str(imagenet), 0
    config.views.size, config.boxes.min_size = 40, 12
    config.model.hidden_dim, config.model.projection_dim = 16, 8
    config.train.batch_size, config.train.epochs, config.optim.warmup_epochs = 16, 1, 0
    config.run.dir, config.run.tensorboard = str(tmp_path_factory.mktemp("run") / "run"), False
    config.eval.roi_linear = False
    SCRLTrainer(config).fit()
    return config.run.dir


# ---- tasks ----


def test_knn(capsys, tmp_path, imagenet):
    data = ["--data.source=imagenet", f"--data.root={imagenet}", "--size=48", "--k=[3,48]", "--workers=0"]
    line, document, _ = evaluate(capsys, tmp_path, "knn", *TINY, *data)
    assert set(document) >= {"task", "result", "config", "checkpoint", "seconds"} and document["task"] == "knn"
    three, all_of_them = document["result"]["results"]
    assert (three["k"], three["train_images"], three["test_images"], three["classes"]) == (3, 48, 24, 3)
    assert three["top1"] > 0.7 and three["top5"] == 1.0  # shapes differ by colour: random features know it
    assert f"top-1 {all_of_them['top1']:.2%}" in line and line.count("\n") == 0


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_linear(capsys, tmp_path, imagenet, augment):
    data = ["--data.source=imagenet", f"--data.root={imagenet}", "--size=48", "--batch_size=16"]
    options = [f"--augment={augment}", "--crop_scale=[0.5,1]", "--lrs=[0.000001,4]", "--epochs=6"]
    line, document, said = evaluate(capsys, tmp_path, "linear", *TINY, *data, *options)
    slow, fast = document["result"]["heads"]
    assert fast["last_top1"] > 0.7 and fast["best_top1"] >= fast["last_top1"] and 1 <= fast["best_epoch"] <= 6
    assert slow["last_top1"] < fast["last_top1"] and document["result"]["lr"] == 4
    assert line.startswith("linear, 3 classes, 6 epochs") and said.count(": top-1 ") == 6


def test_roi_linear_on_coco(capsys, tmp_path, coco):
    data = ["--data.source=coco", f"--data.root={coco}", f"--plot={tmp_path / 'classes.png'}"]
    line, document, _ = evaluate(capsys, tmp_path, "roi-linear", *TINY, *data)
    result = document["result"]
    boxes = (30 - 1) * 3 - 1, (12 - 1) * 3 - 1  # every split has an empty image and a crowd
    assert (result["train_boxes"], result["boxes"], result["classes"]) == (*boxes, 3)
    assert result["accuracy"] > 0.7 and list(result["per_class"]) == ["square", "disc", "bar"]
    assert sum(group["boxes"] for group in result["per_class"].values()) == boxes[1]
    assert result["by_area"]["small"]["boxes"] == boxes[1] and result["by_area"]["large"]["accuracy"] is None
    right = sum(g["accuracy"] * g["boxes"] for g in result["per_class"].values())
    assert right / boxes[1] == pytest.approx(result["accuracy"]) and f"{result['accuracy']:.2%}" in line
    assert (tmp_path / "classes.png").stat().st_size > 1000
    larger = evaluate(capsys, tmp_path, "roi-linear", *TINY, *data[:2], "--data.short_side=96")[1]["result"]
    assert larger["boxes"] == boxes[1] and larger["penalty"] > 0  # areas are those annotated, not the enlarged ones:
    assert larger["by_area"]["small"]["boxes"] == boxes[1]


def test_roi_linear_on_voc(capsys, tmp_path):
    write_voc(tmp_path, "trainval", images=20, seed=1)
    write_voc(tmp_path, "test", images=10, seed=2)
    data = ["--data.source=voc", f"--data.root={tmp_path}", "--pool_size=2"]
    line, document, _ = evaluate(capsys, tmp_path, "roi-linear", *TINY, *data)
    result = document["result"]
    assert result["classes"] == 20 and "18 boxes of 20 classes" in line
    assert result["accuracy"] == 1.0 and result["boxes"] == 18 and len(result["per_class"]) == 20
    assert result["mean_class_accuracy"] == 1.0  # over the two classes that occur


def test_dense_consistency_and_rank(capsys, tmp_path):
    picture, spectrum = tmp_path / "deep" / "pairs.png", tmp_path / "spectrum.png"
    data = ["--data.demo_images=48", "--data.demo_size=64"]
    views = ["--views.size=48", "--boxes.min_size=16", "--views.recipe=simple"]
    dense = ["dense-consistency", *TINY[:2], *data, *views, f"--plot={picture}", "--plot_images=[0,20,60]"]
    line, document, _ = evaluate(capsys, tmp_path, *dense)
    result = document["result"]
    assert result["chance"] < result["retrieval"] <= 1 and result["images"] <= 48
    assert result["cosine_gap"] == pytest.approx(result["cosine_match"] - result["cosine_other"])
    assert "views of 48 pixels, up to 10 boxes of at least 16 pixels" in line
    assert f"{result['retrieval']:.2%}" in line and picture.stat().st_size > 10_000
    rank = ["rank", *TINY[:2], *data, "--size=48", "--images=40", f"--plot={spectrum}"]
    result = evaluate(capsys, tmp_path, *rank)[1]["result"]
    assert 1 < result["rankme"] <= 40 and result["images"] == 40 and spectrum.stat().st_size > 1000


def test_pca_draws_several_encoders_beside_the_images(capsys, tmp_path, run_folder, imagenet):
    picture = tmp_path / "new" / "pca.png"
    options = [f"--checkpoint={run_folder}", f"--data.root={imagenet}", "--size=64", f"--plot={picture}"]
    command = ["pca", *options, "--images=[0,3,999]", "--beside=[random]"]
    line, document, said = evaluate(capsys, tmp_path, *command)
    trained, random = document["result"]["encoders"]
    assert document["result"]["images"] == [0, 3] and random["checkpoint"] == "random"  # of the run's own backbone
    assert trained["cells"] == random["cells"] == 2 * 8 * 8 and "random resnet10_tiny" in said
    assert all(1 > a >= b >= c > 0 for a, b, c in (trained["shares"], random["shares"]))
    assert "2 images: " in line and f"random {sum(random['shares']):.1%}" in line
    assert picture.stat().st_size > 10_000
    assert "has 72 images, numbered from 0" in refused(capsys, "pca", *options, "--images=[500]")
    assert "--size=4: must be at least 8" in refused(capsys, "pca", *options, "--size=4")
    assert "/nowhere" in refused(capsys, "pca", *options, "--beside=[/nowhere]")
    assert "--plot is missing" in refused(capsys, "pca", *options, "--plot=")
    assert "needs --data.root" in refused(capsys, "pca", options[0])


# ---- weights ----


def test_our_checkpoint_brings_its_views_and_its_probe(capsys, tmp_path, run_folder, imagenet):
    data = ["--data.source=imagenet", f"--data.root={imagenet}", "--cache="]
    line, document, _ = evaluate(capsys, tmp_path, "linear", f"--checkpoint={run_folder}", *data, "--head=probe")
    assert document["result"]["classes"] == 3 and line.startswith("online probe on 24 images")
    dense = ["dense-consistency", f"--checkpoint={run_folder}", "--plot=", "--images=8"]
    config = evaluate(capsys, tmp_path, *dense, "--data.source=folder", f"--data.root={imagenet}")[1]["config"]
    assert (config["views"]["size"], config["boxes"]["min_size"], config["views"]["hue"]) == (40, 12, 0.5)
    config = evaluate(capsys, tmp_path, *dense, "--views.size=56", "--boxes.min_size=20")[1]["config"]
    assert (config["views"]["size"], config["boxes"]["min_size"]) == (56, 20)


def published(state):
    names = {"conv1": "0", "bn1": "1", **{f"layer{i}": str(i + 3) for i in range(1, 5)}}
    renamed = {f"encoder.{names[k.split('.')[0]]}.{k.partition('.')[2]}": v for k, v in state.items() if k[:2] != "fc"}
    probe = {"linear.weight": torch.zeros(3, 512), "linear.bias": torch.zeros(3)}
    return {"online_network_state_dict": renamed, "evaluator_state_dict": probe, "epoch": 1}


def test_the_same_weights_in_any_layout_give_the_same_result(capsys, tmp_path, imagenet):
    torch.manual_seed(0)
    body = torchvision.models.resnet18(weights=None)
    for norm in body.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.uniform_(-0.1, 0.1)
    files = {"torchvision.pth": body.state_dict(), "published.pth": published(body.state_dict())}
    results = {}
    for name, state in files.items():
        torch.save(state, tmp_path / name)
        data = ["--data.source=imagenet", f"--data.root={imagenet}", "--size=48", "--k=[5]", "--cache="]
        _, document, said = evaluate(capsys, tmp_path, "knn", f"--checkpoint={tmp_path / name}", *data)
        results[name] = document["result"]
        assert document["backbone"] == "resnet18" and "tensors of the encoder matched" in said
    assert results["torchvision.pth"] == results["published.pth"]
    pytest.importorskip("timm", reason="timm is an extra")
    timm = ["--backbone=timm:resnet18", f"--checkpoint={tmp_path / 'torchvision.pth'}"]
    assert evaluate(capsys, tmp_path, "knn", *timm, *data)[1]["result"] == results["torchvision.pth"]


def test_features_are_extracted_once(capsys, tmp_path, coco):
    arguments = ["roi-linear", *TINY[:2], "--data.source=coco", f"--data.root={coco}", f"--cache={tmp_path / 'kept'}"]
    _, first, said = evaluate(capsys, tmp_path, *arguments)
    assert "features taken from" not in said and len(list((tmp_path / "kept").glob("features-*.pt"))) == 2
    _, second, said = evaluate(capsys, tmp_path, *arguments)
    assert said.count("features taken from") == 2 and second["result"] == first["result"]
    assert "features taken from" not in evaluate(capsys, tmp_path, *arguments, "--seed=1")[2]  # other weights
    assert "features taken from" not in evaluate(capsys, tmp_path, *arguments, "--pool_size=2")[2]
    for file in (tmp_path / "kept").glob("*.pt"):
        file.write_bytes(file.read_bytes()[:-99])
    _, third, said = evaluate(capsys, tmp_path, *arguments)
    assert "extracting them again" in said and third["result"] == first["result"]


# ---- refusals ----


def test_misspelt_tasks_and_options_name_the_right_one(capsys):
    assert "did you mean 'roi-linear'" in refused(capsys, "roi_linear", "--checkpoint=x")
    assert "there are linear, finetune, knn" in refused(capsys, "segmentation")
    assert "the task comes first" in refused(capsys)
    assert "did you mean 'checkpoint'" in refused(capsys, "knn", "--checkpoin=x")
    assert "did you mean 'data.root'" in refused(capsys, "knn", "--data.rot=x")
    assert "--checkpoint is missing" in refused(capsys, "rank")
    assert "k=[0]: must be at least 1" in refused(capsys, "knn", "--k=[0]")
    assert "must be one of demo, coco, voc" in refused(capsys, "roi-linear", "--data.source=lvis")


@pytest.mark.parametrize("task", TASK_OPTIONS)
def test_help_of_every_task(capsys, task):
    with pytest.raises(SystemExit) as stop:
        main([task, "--help"])
    assert stop.value.code == 0 and "--checkpoint" in capsys.readouterr().out


def test_a_wrong_option_is_answered_at_once():
    command = [sys.executable, "-X", "importtime", "-m", "scrl_fast.evaluate", "knn", "--kk=3"]
    done = subprocess.run(command, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and said == ["scrl_fast.evaluate: unknown option '--kk'; did you mean 'k'?"]
    assert " torch\n" not in done.stderr


def test_wrong_layouts_name_the_path(capsys, tmp_path, imagenet, run_folder):
    knn = ["knn", *TINY, "--size=48", "--data.source=imagenet"]
    assert "needs --data.root" in refused(capsys, *knn)
    assert f"{tmp_path / 'train'}: expected one folder a class" in refused(capsys, *knn, f"--data.root={tmp_path}")
    wrong = write_imagenet(tmp_path / "wrong", train=2, val=2)
    (wrong / "val" / "n00000002").rename(tmp_path / "gone")
    said = refused(capsys, *knn, f"--data.root={wrong}")
    assert f"{wrong / 'train' / 'n00000002'} has no counterpart in {wrong / 'val'}" in said
    assert "there are 48 training images" in refused(capsys, *knn, f"--data.root={imagenet}", "--k=[49]")
    four = write_imagenet(tmp_path / "four", train=1, val=1, classes=4)
    probe = ["linear", f"--checkpoint={run_folder}", "--cache=", "--data.source=imagenet", "--head=probe"]
    said = refused(capsys, *probe, f"--data.root={four}")
    assert "knows 3 classes, but" in said and "has 4" in said
    none = refused(capsys, "linear", *TINY, "--head=probe")  # before an image is looked at: the demo's take a minute
    assert "random holds no online probe" in none
    (four / "val/n00000001/val_0_0.JPEG").write_bytes(b"no image")
    said = refused(capsys, *knn, f"--data.root={four}", "--k=[1]", "--workers=0")
    assert "val_0_0.JPEG: not an image" in said


def test_wrong_annotations_name_the_path(capsys, tmp_path, coco):
    task = ["roi-linear", *TINY, "--data.source=coco"]
    assert "annotations/instances_val2014.json; did you mean" in refused(
        capsys, *task, f"--data.root={coco}", "--data.test=val2014"
    )
    other = tmp_path / "coco"
    for split in ("train2017", "val2017"):
        write_coco(other, split)
    file = other / "annotations/instances_val2017.json"
    document = json.loads(file.read_text())
    document["categories"].append({"id": 99, "name": "ring"})
    file.write_text(json.dumps(document))
    assert "3 classes and" in refused(capsys, *task, f"--data.root={other}")
    document["categories"].pop()
    document["images"][0]["width"] += 1
    file.write_text(json.dumps(document))
    assert "has 48 x 64 pixels, but its boxes" in refused(capsys, *task, f"--data.root={other}")
    voc = write_voc(tmp_path, "trainval")
    write_voc(tmp_path, "test")
    write_voc_object(voc / "Annotations/000500.xml", "unicorn", (1, 1, 9, 9))
    said = refused(capsys, "roi-linear", *TINY, "--data.source=voc", f"--data.root={tmp_path}")
    assert "000500.xml: 'unicorn' is none of the 20 classes" in said


def test_an_image_that_vanished_ends_every_process(tmp_path, monkeypatch):
    """Rank 0 alone looks at the files, while the others wait for what it found in the cache."""

    class Listed:
        def __len__(self):
            return 2

        def name_of(self, index):
            return str(tmp_path / f"{index}.png")

    told = []

    def broadcast(self, decide):
        try:
            return decide()
        except UsageError as error:
            told.append(error)
            raise

    (tmp_path / "0.png").touch()
    monkeypatch.setattr(World, "broadcast_from_rank0", broadcast)
    cache = FeatureCache(str(tmp_path / "kept"), TaskContext(world=World(0, 2)))
    with pytest.raises(UsageError, match=r"cannot be read: .*/1\.png: No such file or directory"):
        cache.get(lambda: content_key(Listed()), dict)
    assert len(told) == 1
