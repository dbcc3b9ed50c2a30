"""A trained detector in use: `load_detector`, `predict` for every form of an image, and the command for folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_transfer import transfer

from scrl_fast.data.image_files import BadImage
from scrl_fast.run.checkpoint import CheckpointManager
from scrl_fast.transfer import load_detector
from scrl_fast.transfer.__main__ import main
from scrl_fast.transfer.categories import stored_categories
from scrl_fast.transfer.masks import mask_tools
from scrl_fast.transfer.predict import detect
from scrl_fast.weights.errors import CheckpointError

TASKS = {
    "detection": [],
    "instance": [],
    "keypoints": [],
    "voc": ["--model.detector=retinanet"],
    "coco10": ["--model.detector=fcos", "--model.fpn_channels=32", "--data.subset=1"],
}
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools, NumPy 2
SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def runs(data_root, tmp_path_factory):
    """A run folder with a checkpoint of random weights for each detector, and its trainer."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for task, options in TASKS.items():
        run = transfer(task, data_root, folder / task, "--model.score_threshold=0.01", *options)
        run.loop.save()
        made[task] = run
    return made


@pytest.fixture(scope="module")
def images(data_root):
    return sorted((data_root / "val2017").glob("0*.jpg"))[:3]


# ---- the detector of a run ----


@pytest.mark.parametrize("task", TASKS)
def test_the_detector_finds_what_the_measurement_finds(task, runs, images):
    run = runs[task]
    (expected,) = detect(run.model, run.data.val, [0])
    detector = load_detector(run.folder, device="cpu")
    found = detector.predict(run.data.val.read(0), score=0.01)
    assert len(found) == len(expected.boxes) > 0
    torch.testing.assert_close(found.boxes, expected.boxes)
    torch.testing.assert_close(found.scores, expected.scores)
    assert np.array_equal(found.labels, expected.labels)
    assert found.names == [run.data.val.classes[label] for label in found.labels]
    assert (found.masks is not None, found.keypoints is not None) == (task == "instance", task == "keypoints")
    if task == "instance":
        assert [mask_tools().encode(np.asfortranarray(mask)) for mask in found.masks] == expected.masks
        assert found.masks.shape == (len(found), *run.data.val.read(0).shape[:2]) and found.masks.dtype == bool
    if task == "keypoints":
        torch.testing.assert_close(found.keypoints, expected.keypoints)


@pytest.mark.parametrize("task", TASKS)
def test_a_score_leaves_out_the_weaker_ones_alone(task, runs):
    detector, pixels = load_detector(runs[task].folder, device="cpu"), runs[task].data.val.read(1)
    everything = detector.predict(pixels, score=0.01)
    ordered = np.sort(everything.scores)
    gap = int(np.argmax(np.diff(ordered)))
    limit = float(ordered[gap] + ordered[gap + 1]) / 2
    some, strong = detector.predict(pixels, score=limit), everything.scores > limit
    assert 0 < len(some) < len(everything)
    torch.testing.assert_close(some.boxes, everything.boxes[strong])
    torch.testing.assert_close(some.scores, everything.scores[strong])
    assert np.array_equal(some.labels, everything.labels[strong])


def test_loading_leaves_the_generator_of_random_numbers_alone(runs):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load_detector(runs["detection"].folder, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_gives_the_best_checkpoint_that_it_measured(runs, tmp_path):
    run = runs["detection"]
    manager, state = CheckpointManager(tmp_path / "checkpoints"), run.loop.state_dict()
    manager.save(state | {"step": 1}, 1, best=True)  # best because it was the last one then: nothing was measured
    manager.save(state | {"step": 2}, 2)
    assert load_detector(tmp_path, device="cpu").path.name == "step_00000002.pt"
    best = {"step": 3, "bbox_AP": 5.0}
    manager.save(state | {"step": 3, "best": best}, 3, best=True)
    manager.save(state | {"step": 4, "best": best}, 4)
    assert load_detector(tmp_path, device="cpu").path == tmp_path / "checkpoints" / "best.pt"
    assert load_detector(tmp_path / "checkpoints", device="cpu").path == tmp_path / "checkpoints" / "best.pt"
    (tmp_path / "checkpoints" / "best.pt").write_bytes(b"damaged")
    with pytest.warns(RuntimeWarning, match="best.pt is damaged.*taking the newest checkpoint"):
        assert load_detector(tmp_path, device="cpu").path.name == "step_00000004.pt"


def test_names_of_classes_come_from_the_run_or_its_task(runs):
    state = torch.load(runs["voc"].folder / "checkpoints" / "last.pt", weights_only=True)
    assert state["categories"]["names"][14] == "person" and len(state["categories"]["ids"]) == 20
    earlier = {"config": state["config"]}  # releases that stored no names
    assert stored_categories(earlier, 20).names[14] == "person"
    coco = stored_categories({"config": {"task": "instance"}}, 80)
    assert (coco.names[0], coco.names[79], coco.ids[79]) == ("person", "toothbrush", 90)
    assert stored_categories({"config": {"task": "keypoints"}}, 1).names == ("person",)
    assert stored_categories({"config": {"task": "cityscapes"}}, 8).ids[:2] == (24, 25)
    assert stored_categories({"config": {"task": "detection"}}, 2).names == ("class 0", "class 1")
    with pytest.raises(ValueError, match="names 20 classes, its detector has 3"):
        stored_categories(state, 3)


def test_what_is_no_detector_is_refused(runs, tmp_path):
    path = runs["detection"].folder / "checkpoints" / "last.pt"
    state = torch.load(path, weights_only=True)
    with pytest.raises(CheckpointError, match="holds no detector but a pre-trained encoder"):
        load_detector(_saved(tmp_path, {**state, "config": {"model": {"backbone": "resnet18"}}}))
    with pytest.raises(CheckpointError, match="it lacks config"):
        load_detector(_saved(tmp_path, {"model": state["model"]}))
    wide = {**state["config"], "model": {**state["config"]["model"], "head_channels": 1 << 16}}  # 17 GB
    with pytest.raises(CheckpointError, match=r"options are those of faster_rcnn with resnet10_tiny, but \d+ of its"):
        load_detector(_saved(tmp_path, {**state, "config": wide}))
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_detector(tmp_path / "nothing.pt")


def _saved(folder, state):
    torch.save(state, folder / "detector.pt")
    return folder / "detector.pt"


# ---- forms of an image ----


def test_every_form_of_an_image_gives_the_same_boxes(runs, tmp_path):
    detector, pixels = load_detector(runs["detection"].folder, device="cpu"), runs["detection"].data.val.read(0)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    expected = detector.predict(pixels, score=0.01)
    chw = torch.tensor(pixels).permute(2, 0, 1)
    frozen = pixels.copy()
    frozen.flags.writeable = False
    path = tmp_path / "image.png"
    for image in (
        path,
        str(path),
        Image.open(path),
        Image.fromarray(pixels),
        chw,
        chw / 255,
        chw.double() / 255,
        frozen,
    ):
        found = detector.predict(image, score=0.01)
        assert np.array_equal(found.boxes, expected.boxes) and np.array_equal(found.scores, expected.scores)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_files_are(orientation, runs, tmp_path):
    detector, pixels = load_detector(runs["detection"].folder, device="cpu"), runs["detection"].data.val.read(0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("turned.png", "turned.tiff"):
        Image.fromarray(pixels).save(tmp_path / name, exif=exif)
        with Image.open(tmp_path / name) as picture:
            as_picture = detector.predict(picture, score=0.01)
        turned = np.asarray(_transposed(tmp_path / name))
        assert np.array_equal(as_picture.boxes, detector.predict(turned, score=0.01).boxes)
        if name.endswith("png"):
            assert np.array_equal(as_picture.boxes, detector.predict(tmp_path / name, score=0.01).boxes)


def _transposed(path):
    from PIL import ImageOps

    return ImageOps.exif_transpose(Image.open(path)).convert("RGB")


@pytest.mark.parametrize(
    "image, error, message",
    [
        (np.zeros((4, 4), np.uint8), ValueError, r"an array \[H, W, 3\] of uint8, got \[4, 4\] of uint8"),
        (np.zeros((4, 4, 3), np.float32), ValueError, r"got \[4, 4, 3\] of float32"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"must have pixels, got \[0, 4, 3\]"),
        (torch.zeros(4, 4, 3), ValueError, r"a tensor \[3, H, W\], got \[4, 4, 3\]"),
        (torch.full((3, 4, 4), 255.0), ValueError, "floats from 0 to 1, got 255 to 255"),
        (torch.full((3, 4, 4), torch.nan), ValueError, "floats from 0 to 1, got nan"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), ValueError, "uint8 or floats, got torch.int64"),
        ([1, 2], TypeError, "must be a path, an array, a picture of Pillow's or a tensor, got list"),
        ("missing.jpg", BadImage, "missing.jpg: No such file"),
    ],
)
def test_other_images_are_named(image, error, message, runs):
    with pytest.raises(error, match=message):
        load_detector(runs["detection"].folder, device="cpu").predict(image)


def test_a_score_out_of_range_is_named(runs):
    with pytest.raises(ValueError, match=r"score must be in \[0, 1\], got 50"):
        load_detector(runs["detection"].folder, device="cpu").predict(np.zeros((9, 9, 3), np.uint8), score=50)


# ---- a folder of images ----


@pytest.fixture
def photos(images, tmp_path):
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    for place, image in enumerate(images):
        (folder / ("" if place else "inner") / f"photo {place}.jpg").write_bytes(image.read_bytes())
    (folder / "photo 9.jpg").write_bytes(images[0].read_bytes()[:300])
    return folder


def command(run, images, out, *more):
    return ["predict", f"--detector={run}", f"--images={images}", f"--out={out}", "--device=cpu", *more]


@pytest.mark.parametrize("task", ["detection", "instance", "keypoints"])
def test_a_folder_becomes_pictures_and_coco_results(task, runs, photos, tmp_path, capsys):
    before = {path: path.read_bytes() for path in photos.rglob("*.jpg")}
    assert main(command(runs[task].folder, photos, tmp_path / "out", "--score=0.01")) == 0
    said = capsys.readouterr()
    assert "left out:" in said.err and "photo 9.jpg" in said.err
    assert "objects in 3 images, 1 images could not be read" in said.out
    out = tmp_path / "out"
    pictures = sorted(str(path.relative_to(out / "pictures")) for path in (out / "pictures").rglob("*.*"))
    assert pictures == ["inner/photo 0.jpg", "photo 1.jpg", "photo 2.jpg"]
    for name in pictures:
        with Image.open(out / "pictures" / name) as drawn, Image.open(photos / name) as photo:
            assert drawn.size == photo.size and drawn.format == "JPEG"
    document = json.loads((out / "images.json").read_text())
    assert [image["file_name"] for image in document["images"]] == pictures
    assert document["categories"][0]["name"] == runs[task].data.val.classes[0]
    assert {path: path.read_bytes() for path in photos.rglob("*.jpg")} == before
    _check_results(out, document, load_detector(runs[task].folder, device="cpu"), photos)


def _check_results(out, document, detector, photos):
    """pycocotools takes the results, and they are what `predict` finds."""
    from pycocotools.coco import COCO

    truth = COCO()
    truth.dataset = {"info": {}, "annotations": [], **document}
    truth.createIndex()
    results = truth.loadRes(str(out / "results.json"))
    for image in document["images"]:
        rows = results.imgToAnns[image["id"]]
        found = detector.predict(photos / image["file_name"], score=0.01)
        assert len(rows) == len(found) > 0 and {row["file_name"] for row in rows} == {image["file_name"]}
        assert [row["category_id"] for row in rows] == [detector.category_ids[label] for label in found.labels]
        corners = np.array([row["bbox"] for row in rows]) @ np.array(
            [[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]]
        )
        np.testing.assert_allclose(corners, found.boxes, atol=2e-3)
        np.testing.assert_allclose([row["score"] for row in rows], found.scores, atol=1e-6)
        if found.masks is not None:
            masks = [mask_tools().decode(row["segmentation"]) for row in rows]
            assert np.array_equal(np.array(masks, bool), found.masks)
        if found.keypoints is not None:
            points = np.array([row["keypoints"] for row in rows])
            np.testing.assert_allclose(points, found.keypoints.reshape(len(rows), -1), atol=1e-3)


def test_no_object_above_the_score_is_said(runs, photos, tmp_path, capsys):
    assert main(command(runs["detection"].folder, photos, tmp_path / "out", "--score=1")) == 0
    assert "0 objects in 3 images, 1 images could not be read, none scores above --score=1" in capsys.readouterr().out


def test_ids_are_the_numbers_in_names(runs, images, tmp_path):
    """So COCO's results go to COCO's own annotations as they are."""
    for name in ("000000000139.jpg", "000000000285.jpg"):
        (tmp_path / name).write_bytes(images[0].read_bytes())
    assert main(command(runs["detection"].folder, tmp_path, tmp_path / "out", "--score=1")) == 0
    assert [each["id"] for each in json.loads((tmp_path / "out/images.json").read_text())["images"]] == [139, 285]
    assert json.loads((tmp_path / "out/results.json").read_text()) == []
    again = command(runs["detection"].folder, tmp_path, tmp_path / "out", "--score=1", "--overwrite")
    assert main(again) == 0  # pictures of the first time are no images of the second
    assert len(json.loads((tmp_path / "out/images.json").read_text())["images"]) == 2


@pytest.mark.parametrize(
    "folder, out, message",
    [
        ("photos", "photos", "is where the images lie"),
        ("photos/pictures", "photos", "is where the images lie"),
        ("photos", "full", "holds something already"),
        ("photos", "full/file", "is a file"),
        ("nowhere", "out", "does not exist"),
        ("empty", "out", "no images below"),
        ("broken", "out", "none of 1 images can be read"),
    ],
)
def test_folders_that_do_not_fit_are_refused(folder, out, message, runs, photos, tmp_path, capsys):
    for name in ("full", "empty", "broken", "photos/pictures"):
        (tmp_path / name).mkdir()
    for name in ("full/file", "broken/a.jpg", "photos/pictures/a.jpg"):
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(SystemExit) as ended:
        main(command(runs["detection"].folder, tmp_path / folder, tmp_path / out))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said
    assert ("detector: " in said) == (folder in ("empty", "broken")), "the detector is read after the folders are right"


def test_links_lead_neither_out_of_the_folder_nor_over_an_image(runs, photos, tmp_path, capsys):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    (out / "pictures").mkdir(parents=True)
    elsewhere.mkdir()
    (out / "pictures/inner").symlink_to(elsewhere)
    with pytest.raises(SystemExit):
        main(command(runs["detection"].folder, photos, out, "--overwrite"))
    assert "lies behind a link out of the folder" in capsys.readouterr().err and not list(elsewhere.iterdir())
    (out / "pictures/inner").unlink()
    (out / "pictures/photo 1.jpg").symlink_to(photos / "photo 1.jpg")
    before = (photos / "photo 1.jpg").read_bytes()
    with pytest.raises(SystemExit):
        main(command(runs["detection"].folder, photos, out, "--overwrite"))
    assert "would overwrite one of the images" in capsys.readouterr().err
    (out / "pictures/photo 1.jpg").unlink()
    os.link(photos / "photo 1.jpg", out / "pictures/photo 1.jpg")  # the same file under two names
    assert main(command(runs["detection"].folder, photos, out, "--overwrite")) == 0
    assert (photos / "photo 1.jpg").read_bytes() == before


def test_other_formats_keep_their_name(runs, images, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.webp", "c.bmp", "d.JPG"):
        Image.open(images[0]).save(tmp_path / "in" / name)
    (tmp_path / "in/e.png").write_bytes(images[0].read_bytes())  # a JPEG that is called otherwise
    assert main(command(runs["detection"].folder, tmp_path / "in", tmp_path / "out")) == 0
    formats = {}
    for path in (tmp_path / "out/pictures").iterdir():
        with Image.open(path) as picture:
            formats[path.name] = picture.format
    assert formats == {"a.png": "PNG", "b.webp": "WEBP", "c.bmp": "BMP", "d.JPG": "JPEG", "e.png": "PNG"}


def test_one_image_and_names_of_any_bytes(runs, images, tmp_path):
    name = os.fsdecode(b"caf\xe9 \n.jpg")
    try:
        (tmp_path / name).write_bytes(images[0].read_bytes())
    except OSError:
        pytest.skip("this file system takes no such names")
    assert main(command(runs["detection"].folder, tmp_path / name, tmp_path / "out", "--score=0.01")) == 0
    assert (tmp_path / "out/pictures" / name).is_file()
    assert json.loads((tmp_path / "out/images.json").read_text())["images"][0]["file_name"] == "caf\\udce9 \n.jpg"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--score=2"], "--score=2.0: must be from 0 to 1"),
        (["--workers=-1"], "--workers=-1: must be from 0 to 1024"),
        (["--device=gpu"], "device"),
        (["--scor=1"], "did you mean '--score'?"),
        (["--score=x"], "invalid float value"),
    ],
)
def test_wrong_options_are_answered_without_torch(options, message, tmp_path):
    code = "import sys; from scrl_fast.transfer.__main__ import main\ntry: main(sys.argv[1:])\n"
    code += "finally: assert 'torch' not in sys.modules"
    arguments = [sys.executable, "-c", code, *command(tmp_path, tmp_path, tmp_path / "out"), *options]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_the_commands_stand_in_the_help_and_are_no_tasks(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0 and "predict" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["predikt", "--images=a"])
    assert ended.value.code == 2 and "did you mean 'predict'?" in capsys.readouterr().err


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the photographs in {SHARED}")
def test_photographs_of_all_sizes(runs, tmp_path):
    photographs = SHARED / "coco_sample" / "val2017"
    assert main(command(runs["instance"].folder, photographs, tmp_path / "out", "--score=0.02")) == 0
    document = json.loads((tmp_path / "out/images.json").read_text())
    assert (
        len(document["images"]) == len(list(photographs.iterdir())) == len(list((tmp_path / "out/pictures").iterdir()))
    )
    assert {image["id"] for image in document["images"]} == {int(path.stem) for path in photographs.iterdir()}
