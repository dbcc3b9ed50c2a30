"""What is wrong with the options, the data or the weights of a transfer is named before it begins."""

from __future__ import annotations

import shutil

import pytest
import torch
from tiny_transfer import SMALL, arguments, edited, transfer, without_masks

from scrl_fast.errors import UsageError
from scrl_fast.transfer.__main__ import main, parse
from scrl_fast.transfer.config import TransferConfig
from scrl_fast.transfer.trainer import Transfer

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools, NumPy 2


def break_categories(data_root, tmp_path):
    with edited(data_root, tmp_path, "instances_val2017.json") as document:
        document["categories"][0]["name"] = "pony"
    return ["detection", f"--data.root={tmp_path / 'data'}"]


def empty_annotations(data_root, tmp_path):
    with edited(data_root, tmp_path, "instances_train2017.json") as document:
        document["annotations"] = [a for a in document["annotations"] if a["iscrowd"]]
    return ["detection", f"--data.root={tmp_path / 'data'}"]


def few_keypoints(data_root, tmp_path):
    with edited(data_root, tmp_path, "person_keypoints_train2017.json") as document:
        for annotation in document["annotations"]:
            annotation["keypoints"] = annotation["keypoints"][:15]
    return ["keypoints", f"--data.root={tmp_path / 'data'}"]


def lost_image(data_root, tmp_path):
    shutil.copytree(data_root, tmp_path / "data")
    next((tmp_path / "data" / "train2017").iterdir()).unlink()
    return ["detection", f"--data.root={tmp_path / 'data'}"]


def lost_instances(data_root, tmp_path):
    shutil.copytree(data_root, tmp_path / "data")
    next((tmp_path / "data" / "gtFine" / "train").glob("*/*.png")).unlink()
    return ["cityscapes", f"--data.root={tmp_path / 'data'}"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda r, t: ["detection", f"--data.root={t}/none"], r"COCO's folder '.*none' does not exist"),
        (lambda r, t: ["voc", f"--data.root={r}", "--data.train=2009_trainval"], r"no VOC annotations .*VOC2009"),
        (lambda r, t: ["voc", f"--data.root={r}", "--data.train=trainval"], r"YEAR_SPLIT, as in 2007_trainval"),
        (lambda r, t: ["cityscapes", f"--data.root={t}"], r"no folder .*leftImg8bit.*val.*gtFine"),
        (lambda r, t: ["detection", f"--data.root={r}", "--data.train=train2018"], r"instances_train2018\.json"),
        (break_categories, r"categories of .*train2017\.json and .*val2017\.json differ: .*\['disc'\].*\['pony'\]"),
        (empty_annotations, r"instances_train2017\.json: none of 12 images has boxes .*keep_empty"),
        (without_masks, r"instances_train2017\.json: none of 12 images has masks to train on"),
        (lambda r, t: ["voc", f"--data.root={r}", "--model.detector=mask_rcnn"], r"none of 9 images has masks"),
        (few_keypoints, r"person_keypoints_train2017\.json: objects have 5 keypoints, and .* 17"),
        (lambda r, t: ["detection", f"--data.root={r}", "--model.detector=keypoint_rcnn"], r"no object has keypoints"),
        (lost_image, r"names 12 images, of which 1 are not in .*train2017; the first is .*\.jpg"),
        (lost_instances, r"no instance image at .*instanceIds\.png"),
        (
            lambda r, t: ["detection", f"--data.root={r}", "--init=/no/w.pth"],
            r"init=/no/w\.pth: there is no such checkpoint",
        ),
        (lambda r, t: ["detection", "--config=scrl_200ep"], r"--config=scrl_200ep: there is no such file"),
        (lambda r, t: ["detection", "--config=smal"], r"--config=smal is neither a recipe \(small\) .* 'small'"),
        (lambda r, t: ["instance", f"--data.root={r}", "--model.detector=fcos"], r"instance needs mask_rcnn"),
        (lambda r, t: ["detection", f"--data.root={r}", "--train.batch_size=99"], r"batch_size=99: .* 11 images"),
        (lambda r, t: ["detection", f"--data.root={r}", "--eval.only=true"], r"eval\.only=True .*--resume"),
    ],
)
def test_what_is_wrong_is_named(data_root, tmp_path, make, message):
    task, *rest = make(data_root, tmp_path)
    with pytest.raises(ValueError, match=message):
        Transfer(parse([task, *SMALL, f"--run.dir={tmp_path / 'run'}", *rest]))


def test_wrong_weights_are_named_on_the_command_line(data_root, tmp_path, capsys):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(SystemExit) as stopped:
        main(arguments("detection", data_root, tmp_path / "run", f"--init={tmp_path}/w.pth"))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "does not fill the encoder resnet10_tiny" in said and "bn1.weight" in said


def test_a_checkpoint_of_another_detector_is_named(data_root, tmp_path):
    transfer("detection", data_root, tmp_path / "a", "--train.steps=1", "--eval.images=1").fit()
    other = transfer("instance", data_root, tmp_path / "b", f"--resume={tmp_path}/a/checkpoints/last.pt")
    with pytest.raises(ValueError, match=r"of faster_rcnn with resnet10_tiny: \d+ tensors .*mask_head.*config\.yaml"):
        other.loop.restore()


@pytest.mark.parametrize("argv", [[], ["--data.root=x"], ["detectoin"]])
def test_the_task_comes_first(argv):
    with pytest.raises(UsageError, match=r"unknown task .detectoin.|the task comes first"):
        parse(argv)


def test_config_is_checked():
    with pytest.raises(ValueError, match=r"model\.roi_aligned=True.*roi_aligned=false"):
        TransferConfig(model=TransferConfig().model.__class__(roi_aligned=True, roi_align="torchvision"))
