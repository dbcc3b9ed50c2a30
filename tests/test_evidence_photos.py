"""benchmarks/evidence.py --data=voc: the order of its stages, equal conditions, nothing done twice, an honest table."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import evidence
import evidence_photos
import evidence_photos_plan as plan
from evidence_photos import Work
from evidence_photos_plan import BUDGETS, CONTINUED, METHODS, SCRATCH
from evidence_photos_report import COLUMNS, differences, markdown, report, row_of, table
from labelled_folders import voc_part, write, yolo_part

from scrl_fast import weights
from scrl_fast.evaluate import softmax_regression
from scrl_fast.models import build_encoder
from scrl_fast.transfer.compare import comparison

TINY = replace(BUDGETS["smoke"], grid=((16.0, 0.97),), shares=(0.25, 1.0))


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Folders as the command expects them, of drawn pictures."""
    monkeypatch.setitem(BUDGETS, "smoke", TINY)
    monkeypatch.setattr(softmax_regression, "LBFGS_STEPS", 2)  # accuracies are not the question here
    monkeypatch.setattr(comparison, "draw_comparison", lambda *_: None)
    voc = tmp_path / "photos/voc2007/VOCdevkit/VOC2007"
    names = [f"{number:06}" for number in range(13)]
    voc_part(voc / "JPEGImages", voc / "Annotations", names)
    for file in (voc / "Annotations").glob("*.xml"):
        file.write_text(file.read_text().replace("star fish", "dog").replace("fish", "cat"))
    write(voc / "ImageSets/Main/trainval.txt", "\n".join(names[:9]))
    write(voc / "ImageSets/Main/test.txt", "\n".join(names[9:]))
    for split, count in (("train", 8), ("valid", 2), ("test", 2)):
        folder = tmp_path / "photos/aquarium" / split
        yolo_part(folder / "images", folder / "labels", count)
    data = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 1\nnames: [fish]\n"
    write(tmp_path / "photos/aquarium/data.yaml", data)
    return tmp_path / "photos"


def options(photos, *more):
    work, file = photos.parent / "work", photos.parent / "voc.json"
    return ["--data=voc", f"--photos={photos}", f"--work={work}", "--budget=smoke", f"--json={file}", *more]


def stages(results=()):
    done = {name: {"result": {"accuracy": 0.5}} for name in results}
    return plan.planned(TINY, done)


def test_stages_are_done_once_and_the_table_says_what_is_missing(photos, capsys):
    asked = ["scratch/random-0/roi", "short/scrl-*", "scratch/scrl-0/pretrain", "detectors/scratch-voc/s*-0.25-*"]
    asked += ["scratch/scrl-0/few-voc-*"]
    asked = ["--only", *asked]
    assert evidence.main(options(photos, *asked)) == 0
    said = capsys.readouterr().out
    document = json.loads((photos.parent / "voc.json").read_text())
    done = [stage["name"] for stage in document["stages"]]
    short = [f"short/scrl-lr16-ema0.97/{each}" for each in ("pretrain", "held", "roi", "dense")]
    rest = ["scratch/scrl-0/pretrain", "detectors/scratch-voc/scrl-0.25-0"]
    rest += ["scratch/scrl-0/few-voc-0.25"]
    assert set(done) == {"scratch/random-0/roi", *short, *rest}
    values = [(row["group"], row["start"], row["measure"]) for row in document["rows"]]
    detector = document["stages"][done.index("detectors/scratch-voc/scrl-0.25-0")]
    assert detector["result"]["seen"]["scrl-0"]["images"] == 9, "images of pre-training were looked at"
    assert values[:3] == [("scratch", "random", "roi"), ("short", "scrl", "rankme"), ("short", "scrl", "held")]
    assert ("scratch", "scrl", "ap") in values
    assert f"{len(done)} of {len(done) + len(document['open'])} stages are finished; - is not measured yet" in said
    assert all(stage["commit"] and stage["seconds"] >= 0 for stage in document["stages"])
    assert str(photos.parent) not in json.dumps(document), "folders of a machine"
    tried = (photos.parent / "work/scratch/scrl-0/config.yaml").read_text()
    assert "lr: 16" in tried and "ema_momentum: 0.97" in tried

    assert evidence.main(options(photos, *asked)) == 0  # all of it is there
    assert "done in" not in capsys.readouterr().out
    assert json.loads((photos.parent / "voc.json").read_text()) == document
    assert evidence.main(options(photos, "--list")) == 0
    listed = dict(reversed(line.split()) for line in capsys.readouterr().out.splitlines())
    assert listed["scratch/random-0/roi"] == "finished" and listed["supervised"] == "open"
    assert listed["continued/scrl-0/pretrain"] == listed["scratch/byol-0/pretrain"] == "waits"

    file = photos.parent / "work/results/scratch.scrl-0.pretrain.json"
    kept = file.read_text()
    file.write_text(kept.replace('"step"', '"steps"'))
    with pytest.raises(SystemExit, match="was made from another result of scratch/scrl-0/pretrain: remove it"):
        evidence.main(options(photos, *asked))
    file.write_text(kept)

    file = photos.parent / "work/results/scratch.random-0.roi.json"
    file.write_text(file.read_text().replace("--workers=1", "--workers=2"))
    with pytest.raises(SystemExit, match="was made with other options"):
        evidence.main(options(photos, *asked))


def test_a_stopped_pre_training_goes_on_and_is_no_result(photos, monkeypatch, capsys):
    from scrl_fast.run.signals import SignalHandler

    work = Work(photos.parent / "work", photos)
    work.prepare()
    stage = next(stage for stage in stages() if stage.name == "short/byol-lr16-ema0.97/pretrain")
    with monkeypatch.context() as context:
        context.setattr(SignalHandler, "__enter__", lambda stop: stop.request_stop("SIGTERM") or stop)
        assert not work.run(stage) and work.result(stage) is None
    assert work.run(stage) and work.result(stage)["result"]["step"] == 2
    capsys.readouterr()


def test_photographs_of_the_test_split_are_never_trained_on(photos):
    work = Work(photos.parent / "work", photos)
    work.prepare()
    read = {name: (work.folder / f"{name}.txt").read_text().split() for name in ("trainval", "test", "tune", "held")}
    assert not set(read["trainval"]) & set(read["test"]) and len(read["test"]) == 4
    assert sorted(read["tune"] + read["held"]) == sorted(read["trainval"]) and not set(read["tune"]) & set(read["held"])
    every = stages(stage.name for stage in stages())
    trained = [stage for stage in every if stage.words[0] == "scrl_fast.train"]
    assert {word for stage in trained for word in stage.words if "data.root" in word} == {
        "--data.root=WORK/trainval.txt"
    }
    chosen_by = [stage.words for stage in every if stage.name.endswith("/held")]
    assert all({"--data.root=WORK/voc", "--data.train=tune", "--data.test=held"} <= set(words) for words in chosen_by)
    detectors = [stage.words for stage in every if stage.words[0] == "scrl_fast.transfer"]
    assert detectors and not any("data.train" in word for words in detectors for word in words), "their own split"


def test_both_methods_get_the_same_settings_and_grid():
    budget = BUDGETS["standard"]
    done = {stage.name: {"result": {"accuracy": 0.5}} for stage in plan.planned(budget, {})}
    every = {stage.name: stage for stage in plan.planned(budget, done)}
    assert all(stage.words for stage in every.values())
    for one in [name for name in every if "byol" in name]:
        other = every[one.replace("byol", "scrl")]
        assert [word.replace("byol", "scrl") for word in every[one].words] == list(other.words)
    assert len([name for name in every if name.startswith("short/")]) == 2 * 4 * len(budget.grid)


def test_the_best_setting_of_the_held_photographs_is_taken_once_all_are_measured():
    budget = replace(TINY, grid=((8.0, 0.99), (16.0, 0.97)))
    results = {"short/byol-lr8-ema0.99/held": {"result": {"accuracy": 0.3}}}
    assert plan.chosen("byol", budget, results) is None
    results["short/byol-lr16-ema0.97/held"] = {"result": {"accuracy": 0.4}}
    assert plan.chosen("byol", budget, results) == (16.0, 0.97) and plan.chosen("scrl", budget, results) is None


def test_stages_wait_for_what_they_read():
    every = {stage.name: stage.words for stage in stages()}
    assert not every["scratch/scrl-0/roi"] and every["scratch/random-0/roi"]
    assert not every["detectors/continued-voc/supervised-0.25-0"] and not every["cells/scrl-0/pretrain"]
    done = {stage.name: stage.words for stage in stages(["supervised", "scratch/scrl-0/pretrain"])}
    assert done["scratch/scrl-0/roi"] and done["detectors/scratch-aquarium/scrl-1-0"]
    assert done["continued/byol-0/pretrain"] and not done["detectors/scratch-voc/byol-1-0"]


def test_a_seed_of_fine_tuning_has_a_pre_training_of_its_own_where_there_are_as_many():
    budget = replace(BUDGETS["standard"], pretraining_seeds=3, continued_seeds=1, detector_seeds=3)
    done = {stage.name: {"result": {"accuracy": 0.5}} for stage in plan.planned(budget, {})}
    every = {stage.name: stage for stage in plan.planned(budget, done)}
    for seed in range(3):
        words = every[f"detectors/scratch-voc/scrl-0.1-{seed}"].words
        assert {f"--inits=WORK/scratch/scrl-{seed}", f"--train.seed={seed}", "--shares=0.1"} <= set(words)
        assert "--inits=WORK/continued/scrl-0" in every[f"detectors/continued-voc/scrl-0.1-{seed}"].words
        assert ("--compare.leaks=off" in words) == (seed > 0), "images seen before are looked for once"
    folders = [w for stage in every.values() for w in stage.words if w.startswith("--compare.dir")]
    assert len(set(folders)) == len(folders), "stages may run side by side"


def test_fewer_pixels_to_a_cell_change_the_encoder_alone():
    budget = BUDGETS["standard"]
    done = {stage.name: {"result": {"accuracy": 0.5}} for stage in plan.planned(budget, {})}
    every = {stage.name: stage for stage in plan.planned(budget, done)}
    for measure in ("pretrain", "roi", "dense"):
        fine, usual = every[f"cells/scrl-0/{measure}"].words, every[f"scratch/scrl-0/{measure}"].words
        assert [word.replace("_stride16", "").replace("cells", "scratch") for word in fine] == list(usual)
    usual, fine = (build_encoder(f"evidence_encoder:resnet10_quarter{name}") for name in ("", "_stride16"))
    assert (usual.stride, fine.stride) == (32, 16)
    assert [tuple(p.shape) for p in usual.parameters()] == [tuple(p.shape) for p in fine.parameters()]


def test_supervised_weights_get_timms_names_and_their_own_normalisation(photos):
    torch.manual_seed(1)
    network = pytest.importorskip("timm").create_model("tf_efficientnet_lite0")
    file = photos.parent / "package.pth"
    network = network.to(memory_format=torch.channels_last)  # the package's tensors are not contiguous either
    torch.save({f"other.{number}": tensor for number, tensor in enumerate(network.state_dict().values())}, file)
    work = Work(photos.parent / "work", photos, file)
    work.prepare()
    assert work.run(next(stage for stage in stages() if stage.name == "supervised"))
    encoder, found = build_encoder(CONTINUED.backbone), weights.read(work.folder / "supervised.safetensors")
    weights.load_into(encoder, found)
    assert torch.equal(encoder.body.conv_stem.weight, network.conv_stem.weight)
    assert found.metadata["config"]["views"] == {"mean": [0.5] * 3, "std": [0.5] * 3}
    torch.save({"other": torch.zeros(3)}, file)
    with pytest.raises(SystemExit, match="no EfficientNet-Lite0"):
        work.run(next(stage for stage in stages() if stage.name == "supervised"))


def test_absent_photographs_and_weights_are_refused(photos, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        evidence.main(options(photos.parent / "nowhere"))
    assert "there is no voc2007/VOCdevkit/VOC2007 in it" in capsys.readouterr().err
    pytest.importorskip("timm")
    monkeypatch.setattr(evidence_photos, "PACKAGE", "no_such_package")
    with pytest.raises(SystemExit, match="pip install no-such-package"):
        evidence.main(options(photos, "--only", "supervised"))


def test_the_table_has_each_methods_best_setting():
    rows = [
        {
            "group": "short",
            "start": "byol",
            "lr": lr,
            "ema": 0.99,
            "measure": measure,
            "value": value,
            "mean_class": 7.0,
        }
        for lr, held, roi in ((8.0, 30.0, 50.0), (16.0, 40.0, 45.0))
        for measure, value in (("held", held), ("roi", roi), ("rankme", 9.0))
    ]
    document = {"rows": rows, "budget": "smoke", "stages": [], "open": []}
    line = next(line for line in table(document) if "from scratch, BYOL, 1 epochs" in line)
    assert line.split()[5:] == ["45.0", "7.0", *["-"] * 5]
    assert [line.split()[1:] for line in table(document) if line.startswith("BYOL, ")] == [
        ["16,", "0.99", "40.0", "45.0", "-", "9.0"],
        ["8,", "0.99", "30.0", "50.0", "-", "9.0"],
    ]


def test_the_table_of_a_part():
    found = {stage.name: None for stage in stages()}
    for name, value in (("scratch/random-0/roi", 0.25), ("scratch/random-1/roi", 0.35)):
        found[name] = {
            "name": name,
            "commit": "abc",
            "result": {"accuracy": value, "mean_class_accuracy": value / 5},
        }
    every = plan.planned(replace(TINY, pretraining_seeds=2), {})
    found |= {stage.name: None for stage in every if stage.name not in found}
    document = report("smoke", every, found, {"device_name": "a processor", "torch": "2"})
    document["command"] = shlex.join(["python", "evidence.py"])
    line = next(line for line in table(document) if line.startswith("from scratch, random"))
    assert line.split()[3:7] == ["30.0", "±", "7.1", "(2)"]
    assert line.split()[7:] == ["6.0", "±", "1.4", "(2)", *["-"] * 5]
    text = markdown(document)
    assert "| from scratch | random | 30.0 ± 7.1 (2) | 6.0 ± 1.4 (2) | - | - | - | - | - |" in text
    assert "| difference |" not in text, "nothing to compare"
    assert f"2 of {len(every)} stages are finished; - is not measured yet" in text and "commits abc" in text
    starts = [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| from scratch |")]
    assert starts == ["random", "BYOL, 2 epochs", "SCRL, 2 epochs", "BYOL, 1 epochs", "SCRL, 1 epochs"] and set(
        SCRATCH.starts
    ) == {"random", *METHODS}


def test_differences_are_paired_over_seeds():
    values = {"random": (10.0, 30.0, 20.0), "byol": (12.0, 33.0), "scrl": (14.0, 35.0, 23.0)}
    rows = [
        {"group": "scratch", "start": start, "seed": seed, "measure": "dense", "value": value}
        for start, each in values.items()
        for seed, value in enumerate(each)
    ]
    found = {(each["start"], each["minus"]): each for each in differences(rows, COLUMNS)}
    assert set(found) == {("byol", "random"), ("scrl", "random"), ("scrl", "byol")}
    assert found["scrl", "byol"]["mean"] == 2.0 and found["scrl", "byol"]["pairs"] == 2
    mean, low, high = (found["scrl", "random"]["mean"], *found["scrl", "random"]["interval"])
    assert (mean, round(low, 3), round(high, 3)) == (4.0, 1.516, 6.484)  # 4.3027 x 1 / sqrt(3)
    document = {"rows": rows, "budget": "smoke", "stages": [], "open": []}
    document |= {"command": "c", "environment": {"device_name": "d", "torch": "2"}}
    line = "| from scratch: SCRL - random | - | - | +4.0 (+1.5 to +6.5) | - | - | - | - |"
    assert line in markdown(document)
    shown = [line for line in table(document) if "from scratch: " in line or line.startswith("difference")]
    assert len(shown) == 4 and len({len(line) for line in shown}) == 1, "columns end at equal places"
    assert "+4.0 (+1.5 to +6.5)" in shown[2]


def test_few_labels_are_a_table_of_their_own():
    result = {"table": [{"share": 0.1, "accuracy": {"mean": 0.5}, "mean_class_accuracy": {"mean": 0.25}}]}
    every = stages(["scratch/scrl-0/pretrain"])
    assert [stage.name for stage in every if stage.name.startswith("scratch/scrl-0/few")] == [
        f"scratch/scrl-0/few-{each}" for each in ("voc-0.25", "aquarium-0.25", "aquarium-1")
    ]
    stage = next(stage for stage in every if stage.name == "scratch/scrl-0/few-aquarium-1")
    assert {"--shares=1", "--seeds=2", "--seed=0", "--data.root=DATA/aquarium"} <= set(stage.words)
    more = plan.few_labels(SCRATCH, "byol", 2, TINY)[0]
    assert "--seed=4" in more.words, "no draw of another pre-training"
    rows = [row_of(stage, {"result": result})]
    document = {"rows": rows, "budget": "smoke", "stages": [], "open": []}
    document |= {"command": "c", "environment": {"device_name": "d", "torch": "2"}}
    text = markdown(document)
    assert "| Aquarium 100 %, top-1 | Aquarium 100 %, mean over classes |\n" in text
    assert "| from scratch | SCRL, 2 epochs | - | - | - | - | 50.0 | 25.0 |" in text
