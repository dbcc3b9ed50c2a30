"""Validation images among those of pre-training: the same file, the same pixels, pictures that look alike."""

from __future__ import annotations

import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from scrl_fast.config.schema import Config
from scrl_fast.config.yaml_text import dump
from scrl_fast.data.sources.files import image_folder
from scrl_fast.transfer.__main__ import parse
from scrl_fast.transfer.compare import leaks
from scrl_fast.transfer.compare.config import LABELLED, CompareOptions
from scrl_fast.transfer.compare.leaks import LeakCheck, in_short, in_words, stages_of
from scrl_fast.transfer.compare.look_alikes import BITS, difference_hash, fingerprints, matches
from scrl_fast.transfer.compare.table import seen_line


def picture(seed, height=160, width=200):
    """Something like a photograph: large soft shapes."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (9, 12, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def photographs(tmp_path):
    """(folder of validation images, folder of images of pre-training): what they share is in the names."""
    val, seen = tmp_path / "val", tmp_path / "seen" / "deep"
    val.mkdir()
    seen.mkdir(parents=True)
    for number, name in enumerate(("file", "pixels", "small", "mirrored", "other", "flat")):
        image = Image.new("RGB", (200, 160), "white") if name == "flat" else picture(number)
        image.save(val / f"{name}.jpg", quality=90)
    shutil.copy(val / "file.jpg", seen / "a.jpg")
    Image.open(val / "pixels.jpg").save(seen / "b.png")
    Image.open(val / "small.jpg").resize((110, 88)).save(seen / "c.jpg", quality=60)
    Image.open(val / "mirrored.jpg").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(seen / "d.jpg", quality=80)
    Image.new("RGB", (100, 100), "black").save(seen / "e.jpg")
    picture(77).save(seen / "f.jpg")
    (seen / "g.jpg").write_bytes(b"junk")
    return val, tmp_path / "seen"


def run_folder(path, root, **options):
    """A pre-training run that was trained on the images of a folder."""
    (path / "checkpoints").mkdir(parents=True)
    config = Config().to_dict()
    config["data"] |= {"source": "folder", "root": str(root), **options}
    (path / "config.yaml").write_text(dump(config))
    return path


def look(val, options=None):
    source = image_folder(str(val))
    return LeakCheck(source, len(source), options or CompareOptions())


def kinds(sharing):
    return {pair["validation"].rpartition("/")[2]: pair["kind"] for pair in sharing.pairs}


def test_files_pixels_and_looks_are_told_apart(photographs, tmp_path):
    val, seen = photographs
    found = look(val).of_start(str(run_folder(tmp_path / "run", seen)))
    assert kinds(found) == {"file.jpg": "file", "pixels.jpg": "pixels", "small.jpg": "alike", "mirrored.jpg": "alike"}
    assert (found.exact, found.alike, found.images, found.unread, found.why) == (2, 2, 6, 1, "")
    named = {pair["validation"].rpartition("/")[2]: pair["image"].rpartition("/")[2] for pair in found.pairs}
    assert named == {"file.jpg": "a.jpg", "pixels.jpg": "b.png", "small.jpg": "c.jpg", "mirrored.jpg": "d.jpg"}
    said = in_words(found, 6, CompareOptions())
    assert said == (
        "4 of 6 validation images are among 6 images (1 more cannot be read): "
        "2 the same and 2 alike (at most 16 of 256 bits differ)"
    )
    assert in_short(found, 6) == "4 of 6" and seen_line("scrl", said).startswith("Pre-training of scrl: 4 of 6")
    assert seen_line(LABELLED, "none") == "Labelled images: none"


def test_exact_decodes_nothing(photographs, tmp_path, monkeypatch):
    val, seen = photographs
    monkeypatch.setattr("scrl_fast.data.decode.Encoded.decode", lambda *_, **__: pytest.fail("decoded"))
    options = CompareOptions(leaks="exact")
    found = look(val, options).of_start(str(run_folder(tmp_path / "run", seen)))
    assert kinds(found) == {"file.jpg": "file"} and "1 the same" in in_words(found, 6, options)


def test_the_distance_decides(photographs, tmp_path):
    val, seen = photographs
    source = image_folder(str(val))
    prints = fingerprints(source, range(len(source)), looks=True)
    assert prints.structured.tolist() == [name != "flat.jpg" for name in sorted(p.name for p in val.iterdir())]
    others = fingerprints(image_folder(str(seen)), range(7), looks=True)
    found = {m.index: m.bits for m in matches(prints, others, lambda *_: False, distance=64) if m.kind == "alike"}
    least = max(found.values())
    fewer = matches(prints, others, lambda *_: False, distance=least - 1)
    assert least > 0 and len([m for m in fewer if m.kind == "alike"]) < len(found)


def test_the_hash_knows_a_picture_again_and_no_other():
    plain, contrast = difference_hash(np.asarray(picture(1)))
    data = io.BytesIO()
    picture(1).resize((97, 140)).save(data, "jpeg", quality=50)
    again, _ = difference_hash(np.asarray(Image.open(data)))
    other, _ = difference_hash(np.asarray(picture(2)))
    assert plain.shape == (BITS,) and contrast > 4
    assert (plain != again).sum() <= 16 < 64 < (plain != other).sum()


def test_what_cannot_be_checked_is_said(photographs, tmp_path):
    val, seen = photographs
    check = look(val)
    said = lambda init: in_words(check.of_start(str(init)), 6, CompareOptions())  # noqa: E731
    gone = run_folder(tmp_path / "gone", tmp_path / "nowhere")
    assert "not checked: its images are not here" in said(gone) and "nowhere' does not exist" in said(gone)
    assert in_short(check.of_start(str(gone)), 6) == "not checked"
    assert said("random") == "nothing to check: it has seen no images"
    assert in_short(check.of_start("random"), 6) == "0 of 6"
    assert "its images, ImageNet's, are not here" in said("torchvision")
    assert said("hf-hub:someone/encoder") == said("timm") == "not checked: its images are not here"
    assert "drawn scenes" in said(run_folder(tmp_path / "demo", "", source="demo"))
    torch.save({"state_dict": {}}, tmp_path / "w.pth")
    assert "no run of scrl_fast" in said(tmp_path / "w.pth")
    run = run_folder(tmp_path / "moved", tmp_path / "nowhere")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(tmp_path / "nowhere"), str(seen)))
    assert said(run).startswith("4 of 6")  # the folder may be put right in config.yaml
    (run / "config.yaml").write_text("data: {surce: folder}")
    assert "unknown option 'data.surce'" in said(run)


@pytest.mark.filterwarnings("ignore:.*no .sha256 beside it:RuntimeWarning")
def test_the_run_that_a_start_began_from_counts_too(photographs, tmp_path):
    val, seen = photographs
    first = run_folder(tmp_path / "first", seen)
    (tmp_path / "empty").mkdir()
    picture(50).save(tmp_path / "empty" / "x.jpg")
    second = run_folder(tmp_path / "second", tmp_path / "empty")
    config = Config().to_dict() | {"init": str(first)}
    torch.save({"model": {}, "config": config}, second / "checkpoints" / "last.pt")
    assert [stage.name for stage in stages_of(str(second))] == [str(second), str(first)]
    found = look(val).of_start(str(second))
    assert (found.exact, found.alike, found.images) == (2, 2, 7)
    torch.save({"model": {}, "config": config | {"init": "/gone/w.pth"}}, second / "checkpoints" / "last.pt")
    found = look(val).of_start(str(second))
    assert "/gone/w.pth" in found.why and in_short(found, 6) == "0 of 6 or more"


def test_a_detector_s_run_was_trained_on_its_labelled_images(data_root, tmp_path):
    run = tmp_path / "detector"
    (run / "checkpoints").mkdir(parents=True)
    config = parse(["voc", f"--data.root={data_root}", "--data.train=2007_test"])
    (run / "config.yaml").write_text(dump(config.to_dict()))
    val = image_folder(str(data_root / "VOC2007" / "JPEGImages"))
    found = LeakCheck(val, len(val), CompareOptions()).of_start(str(run))
    assert found.images == 4 and found.exact >= 4


def test_labelled_images_are_compared_too(photographs):
    val, seen = photographs
    assert look(val).of_labelled(image_folder(str(seen))).exact == 2


def test_a_tick_may_end_the_check(photographs):
    val, seen = photographs

    def tick():
        raise TimeoutError

    check = LeakCheck(image_folder(str(val)), 6, CompareOptions(), tick=tick)
    with pytest.raises(TimeoutError):
        check.of_labelled(image_folder(str(seen)))


def test_what_was_found_is_kept_until_images_or_options_change(photographs, tmp_path, monkeypatch):
    val, seen = photographs
    source, run, file = image_folder(str(val)), run_folder(tmp_path / "run", seen), tmp_path / "seen.json"
    first = LeakCheck(source, 6, CompareOptions(), file=file).of_start(str(run))
    with monkeypatch.context() as patch:
        patch.setattr(leaks, "fingerprints", lambda *_, **__: pytest.fail("looked at again"))
        assert LeakCheck(source, 6, CompareOptions(), file=file).of_start(str(run)) == first
    assert LeakCheck(source, 6, CompareOptions(leaks="exact"), file=file).of_start(str(run)).exact == 1
    picture(99).save(seen / "new.jpg")
    assert LeakCheck(source, 6, CompareOptions(), file=file).of_start(str(run)).images == first.images + 1
    file.write_text("{junk")
    assert LeakCheck(source, 6, CompareOptions(), file=file).of_start(str(run)).exact == first.exact
