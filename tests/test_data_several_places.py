"""Several places of images under one data.root, and the formats beside JPEG and PNG that a folder may hold."""

from __future__ import annotations

import logging
import os
import threading

import numpy as np
import pytest
from PIL import Image

from scrl_fast.config.command_line import parse
from scrl_fast.config.schema import Config, DataConfig
from scrl_fast.data import identity_of, make_source
from scrl_fast.data import pillow as pillow_module
from scrl_fast.data.decode import decode, read_image
from scrl_fast.data.image_files import BadImage
from scrl_fast.errors import UsageError


def picture(path, value=100, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


@pytest.fixture
def places(tmp_path):
    for place, names in {"a": "xy", "b": "x", "c, d": "z"}.items():
        for name in names:
            for number in range(2):
                picture(tmp_path / place / name / f"{number}.png", 10 * ord(name) % 256)
    return tmp_path


# ---- how they are named ----


def roots_of(*argv):
    return parse(list(argv), prog="x").config.data.root


def test_a_comma_a_yaml_list_and_a_tuple_name_several(places, tmp_path) -> None:
    a, b = f"{places}/a", f"{places}/b"
    assert roots_of(f"--data.root={a},{b}") == roots_of(f"--data.root=[{a}, {b}/]") == (a, b)
    assert DataConfig(root=(a, b)).root == DataConfig(root=f"{a} , '{b}'").root == (a, b)
    file = tmp_path / "my.yaml"
    file.write_text(f"data:\n  source: folder\n  root:\n  - {a}\n  - {b}\n")
    config = Config.from_yaml(file)
    assert config.data.root == (a, b)
    file.write_text(config.to_yaml())
    assert Config.from_yaml(file) == config


def test_one_stays_a_text_also_with_commas_in_its_name_or_in_braces(places) -> None:
    odd = f"{places}/c, d"
    assert roots_of(f"--data.root={odd}") == odd
    assert DataConfig(root=(odd,)).root == odd
    assert DataConfig(root="train-{a,b}.tar").root == "train-{a,b}.tar"
    assert DataConfig(root="train-{a,b}.tar,more.tar").roots == ("train-{a,b}.tar", "more.tar")
    assert DataConfig().roots == () and DataConfig(root="x,").root == "x"


@pytest.mark.parametrize("value", [3, ["a", 3], {"a": 1}])
def test_what_is_no_place_is_refused(value) -> None:
    with pytest.raises(UsageError, match=r"data\.root"):
        Config.from_dict({"data": {"root": value}})


# ---- what they give ----


def test_images_of_all_places_in_order_and_the_same_wherever_they_lie(places, tmp_path) -> None:
    source = make_source(DataConfig(source="folder", root=(f"{places}/b", f"{places}/a")))
    assert [os.path.relpath(source.name_of(i), places) for i in range(len(source))] == [
        *("b/x/0.png", "b/x/1.png"),
        *("a/x/0.png", "a/x/1.png", "a/y/0.png", "a/y/1.png"),
    ]
    assert source.read(4)[0, 0, 0] == 10 * ord("y") % 256 and source.num_classes == 0
    assert source.summary == "2 + 4 images from 2 places"
    os.rename(places / "a", places / "moved")
    moved = make_source(DataConfig(source="folder", root=(f"{places}/b", f"{places}/moved")))
    assert identity_of(moved) == identity_of(source)
    assert identity_of(make_source(DataConfig(source="folder", root=f"{places}/b"))) != identity_of(source)
    with pytest.raises(IndexError):
        source.read(6)


def test_classes_are_joined_by_name(places) -> None:
    source = make_source(DataConfig(source="imagefolder", root=(f"{places}/a", f"{places}/c, d", f"{places}/b")))
    assert source.classes == ["x", "y", "z"] and source.num_classes == 3
    assert [source.label(i) for i in range(len(source))] == [0, 0, 1, 1, 2, 2, 0, 0]


@pytest.mark.parametrize(
    "second, message", [("a", "is named twice"), ("a/x", "lies in"), ("nowhere", "does not exist")]
)
def test_a_place_in_another_or_missing_is_named(places, second, message) -> None:
    with pytest.raises(UsageError, match=message):
        make_source(DataConfig(source="folder", root=(f"{places}/a", f"{places}/{second}")))


# ---- formats ----

GREY_16 = np.linspace(0, 65535, 12 * 10).astype(np.uint16).reshape(10, 12)


@pytest.mark.parametrize("suffix", ["JPG", "JPEG", "Png", "tif", "TIFF", "ppm", "pgm", "pnm", "bmp", "webp"])
def test_a_folder_takes_these_names(tmp_path, suffix) -> None:
    image = Image.new("RGB", (12, 10), (30, 60, 90))
    if suffix == "pgm":
        image = image.convert("L")
    kinds = {"JPG": "JPEG", "tif": "TIFF", "pgm": "PPM", "pnm": "PPM"}
    image.save(
        tmp_path / f"a.{suffix}",
        format=kinds.get(suffix, suffix.upper()),
        **({"lossless": True} if suffix == "webp" else {}),
    )
    source = make_source(DataConfig(source="folder", root=str(tmp_path)))
    assert len(source) == 1
    assert np.abs(source.read(0).astype(int) - np.asarray(image.convert("RGB"))).max() <= 4


@pytest.mark.parametrize("suffix, compression", [("tif", None), ("tif", "tiff_lzw"), ("png", None), ("pgm", None)])
def test_sixteen_bits_become_their_upper_eight_and_that_is_said_once(
    tmp_path, caplog, monkeypatch, suffix, compression
) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 12 10 65535\n" + GREY_16.astype(">u2").tobytes())
    else:
        Image.fromarray(GREY_16).save(path, **({"compression": compression} if compression else {}))
    monkeypatch.setattr(pillow_module, "_SIXTEEN_BITS_UNTOLD", threading.Semaphore())
    with caplog.at_level(logging.WARNING, "scrl_fast"):
        read_image(str(path))
        pixels = read_image(str(path))
    assert np.array_equal(pixels, np.repeat((GREY_16 >> 8).astype(np.uint8)[..., None], 3, axis=2))
    assert len(caplog.messages) == 1 and "value // 256" in caplog.messages[0]


def test_floating_point_pixels_and_odd_tiffs_are_named(tmp_path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(np.random.default_rng(0).random((10, 12)).astype(np.float32)).save(path)
    with pytest.raises(BadImage, match="floating-point numbers of no known range"):
        read_image(str(path))
    with pytest.raises(BadImage, match="is a TIFF of bands or a compression"):
        decode(b"II*\0" + b"\x08\0\0\0" + bytes(2) + bytes(64), name="odd.tif")


@pytest.mark.parametrize(
    "data", [b"P6 12 10 255\n" + bytes(100), b"P6 99999999 99999999 255\n", b"P6 x", b"P3 2 2 255\n1 2"]
)
def test_a_cut_or_lying_ppm_is_a_bad_image(data) -> None:
    with pytest.raises(BadImage):
        decode(data, name="cut.ppm")


def test_the_first_page_of_a_tiff_is_read(tmp_path) -> None:
    pages = [Image.new("L", (12, 10), value) for value in (10, 200)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert read_image(str(tmp_path / "a.tif")).max() == 10
