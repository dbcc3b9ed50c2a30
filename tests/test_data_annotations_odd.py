"""Annotations as tools write them: what is clear is taken, what is not is refused by name, what is left out is said.

This file is long because of its lists of faults.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_data import HEIGHT, WIDTH, write_coco, write_voc
from tiny_transfer import write_cityscapes

from scrl_fast.data.image_files import BadImage, ImageLimits
from scrl_fast.data.sources import coco_document
from scrl_fast.data.sources.annotated import SizeMismatch
from scrl_fast.data.sources.cityscapes import read_cityscapes
from scrl_fast.data.sources.coco import read_coco
from scrl_fast.data.sources.voc import read_voc
from scrl_fast.errors import UsageError
from scrl_fast.transfer.masks import has_mask, masks_of

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools, NumPy 2

EXIF_TURNED = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
SHORT_RUNS, TURNED_RUNS = {"size": [48, 64], "counts": [300, 10]}, {"size": [64, 48], "counts": [300, 10, 2762]}


def coco(root, edit=None, encode=lambda text: text.encode(), crowd=False):
    """The tiny COCO data set with an edited file, and without its crowd unless that is wanted."""
    path = write_coco(root)
    document = json.loads(path.read_text())
    for row in document["annotations"] if not crowd else ():
        x, y, w, h = row["bbox"]
        row.update(iscrowd=0, segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]])
    if edit is not None:
        edit(document)
    path.write_bytes(encode(json.dumps(document)))
    return path


def first(**fields):
    return lambda document: document["annotations"][0].update(fields)


def every(part, **fields):
    return lambda document: [row.update(fields) for row in document[part]]


def without(part, *names):
    return lambda document: [row.pop(name) for row in document[part] for name in names]


def same_objects(one, other):
    return all(
        np.array_equal(a.boxes, b.boxes)
        and a.labels.tolist() == b.labels.tolist()
        and a.crowd.tolist() == b.crowd.tolist()
        for a, b in zip(one.objects, other.objects, strict=True)
    )


# ---- COCO: taken ----


@pytest.mark.parametrize(
    "edit",
    [
        without("annotations", "id", "area", "iscrowd", "segmentation"),
        every("annotations", id=1),
        every("annotations", id=None, area=None, iscrowd=None, segmentation=None),
        every("annotations", area=0, iscrowd="0", segmentation=[]),
        every("annotations", area="", iscrowd=False, segmentation=""),
        every("annotations", area=float("nan"), iscrowd=0.0, segmentation={}),
        without("images", "width", "height"),
        every("images", width=0, height=0),
        every("images", width=None, height=None),
        every("images", width=-1, height=-1),
        every("images", width="64", height="48"),
        every("images", width=64.0, height=48.0),
        lambda d: [a.update(bbox=[str(v) for v in a["bbox"]]) for a in d["annotations"]],
        lambda d: [i.update(file_name=".\\" + i["file_name"]) for i in d["images"]],
        lambda d: [i.update(file_name="val2017/" + i["file_name"]) for i in d["images"]],
        lambda d: [i.update(file_name=i["file_name"].upper()) for i in d["images"]],
    ],
)
def test_coco_odd_but_clear_fields_are_taken(tmp_path, edit):
    coco(tmp_path)
    plain = read_coco(str(tmp_path))
    coco(tmp_path, edit)
    found = read_coco(str(tmp_path))
    assert same_objects(found, plain)
    assert all((objects.areas > 0).all() for objects in found.objects)
    assert all(found.read(index).shape == (HEIGHT, WIDTH, 3) for index in range(len(found)))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_coco_with_a_byte_order_mark(tmp_path, encoding):
    coco(tmp_path)
    plain = read_coco(str(tmp_path))
    coco(tmp_path, encode=lambda text: text.encode(encoding))
    assert same_objects(read_coco(str(tmp_path)), plain)


def test_coco_box_of_the_polygon(tmp_path):
    coco(tmp_path, without("annotations", "bbox"))
    found = read_coco(str(tmp_path), keep_segmentations=False)
    coco(tmp_path)
    assert same_objects(found, read_coco(str(tmp_path)))
    coco(tmp_path, without("annotations", "bbox"), crowd=True)
    with pytest.raises(UsageError, match=r"annotation 4 has no bbox"):  # the crowd has run lengths only
        read_coco(str(tmp_path))


def test_what_is_left_out_or_clipped_is_said(tmp_path):
    boxes = [
        [5, 5, 0, 9],
        [5, 20, 10, -15],
        [float("nan"), 1, 9, 9],
        [1, 1, float("inf"), 5],
        [70, 5, 9, 9],
        [-5, 6, 20, 15],
    ]

    def edit(document):
        for annotation, box in zip(document["annotations"], boxes, strict=False):
            annotation["bbox"] = box

    coco(tmp_path)
    plain = sum(map(len, read_coco(str(tmp_path)).objects))
    assert read_coco(str(tmp_path)).notes == []
    coco(tmp_path, edit)
    found = read_coco(str(tmp_path))
    assert sum(map(len, found.objects)) == plain - 5
    assert [0, 6, 15, 21] in [box for objects in found.objects for box in objects.boxes.tolist()]
    left_out, clipped = found.notes
    assert f"5 of {plain} boxes have no area" in left_out and f"1 of {plain} boxes reach" in clipped
    assert found.only(lambda objects: ~objects.crowd).notes == found.notes
    coco(tmp_path, without("images", "width"))
    assert "does not know the size of 6 images" in read_coco(str(tmp_path)).notes[0]


def test_masks_without_a_pixel_are_none(tmp_path):
    outside, background = [[-50, -50, -20, -50, -20, -20]], {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
    for segmentation in (outside, background, [[]], [[1, 1, 9, 9]]):
        coco(tmp_path, first(segmentation=segmentation))
        objects = read_coco(str(tmp_path)).objects[0]
        assert not has_mask(objects.segmentations[0])
    coco(tmp_path, first(segmentation=[["5", "6", "25", "6", "25", "21", "5", "21"], []]))
    objects = read_coco(str(tmp_path)).objects[0]
    assert masks_of(objects.segmentations[:1], HEIGHT, WIDTH).sum() == 20 * 15


def test_compressed_run_lengths(tmp_path):
    from pycocotools import mask as mask_tools

    rng = np.random.default_rng(0)
    for share in (0.02, 0.5, 0.9):
        mask = (rng.random((HEIGHT, WIDTH)) < share).astype(np.uint8)
        counts = mask_tools.encode(np.asfortranarray(mask))["counts"].decode()
        coco(tmp_path, first(segmentation={"size": [HEIGHT, WIDTH], "counts": counts}))
        objects = read_coco(str(tmp_path)).objects[0]
        assert np.array_equal(masks_of(objects.segmentations[:1], HEIGHT, WIDTH)[0], mask)
        coco(tmp_path, first(segmentation={"size": [HEIGHT, WIDTH], "counts": counts[:-1]}))
        with pytest.raises(UsageError, match=r"annotation 1 has (damaged )?run lengths"):
            read_coco(str(tmp_path))


# ---- COCO: refused ----


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda d: d["images"][1].update(id=1000), r"two images have the id 1000: '0+1000.jpg' and '0+1001.jpg'"),
        (lambda d: d["images"].append(dict(d["images"][0])), r"two images have the id 1000"),
        (lambda d: d["images"][1].update(file_name=d["images"][0]["file_name"]), r"names the image '0+1000.jpg' twice"),
        (lambda d: d["images"][1].update(file_name="./" + d["images"][0]["file_name"]), r"'0+1000.jpg' twice"),
        (
            lambda d: d["categories"].append({"id": 7, "name": "again"}),
            r"two categories have the id 7: 'disc' and 'again'",
        ),
        (lambda d: d["categories"][0].update(id="7"), r"ids of categories are numbers and text"),
        (lambda d: d["categories"][0].pop("name"), r"category 7 has no name"),
        (lambda d: d["categories"][0].pop("id"), r"category at position 0 has no id"),
        (lambda d: d["categories"].clear(), r"names no categories"),
        (lambda d: d.update(annotations=None), r"lacks a list of annotations"),
        (lambda d: d["annotations"].insert(0, 3), r"annotations\[0\] is 3, not an object"),
        (lambda d: d["images"][0].pop("id"), r"image at position 0 has no id"),
        (lambda d: d["images"][0].pop("file_name"), r"image 1000 has no file_name"),
        (lambda d: d["images"][0].update(width=64.5), r"image 1000 has width 64.5, which is no number of pixels"),
        (lambda d: d["images"][0].update(width="wide"), r"image 1000 has width 'wide'"),
        (lambda d: d["images"][0].update(width=10**9, height=10**9), r"is said to have 10+ x 10+ pixels, more than"),
        (first(image_id="1000"), r"annotation 1 has the unknown image_id '1000'"),
        (first(image_id=[1]), r"annotation 1 has image_id \[1\]"),
        (first(category_id=None), r"annotation 1 has category_id None"),
        (first(bbox=[1, 2, 3, 4, 0.5]), r"annotation 1 has bbox \[1, 2, 3, 4, 0.5\], expected \[x, y, width, height\]"),
        (first(bbox=[1, 2, "x", 4]), r"annotation 1 has bbox with 'x', which is no number"),
        (first(bbox=[10**400, 2, 3, 4]), r"annotation 1 has bbox with 10+\.\.\."),
        (lambda d: [a.update(bbox=[0.1, 0.2, 0.3, 0.4]) for a in d["annotations"]], r"boxes lie between 0 and 1"),
        (first(iscrowd="yes"), r"annotation 1 has iscrowd 'yes', expected 0 or 1"),
        (first(area="large"), r"annotation 1 has area 'large', which is no number"),
        (first(keypoints=[1, 2]), r"annotation 1 has keypoints \[1, 2\]"),
        (first(keypoints=[1, 2, float("nan")]), r"annotation 1 has keypoints that are not finite"),
        (
            lambda d: [a.update(keypoints=[1, 2, 2] * (5 if i == 2 else 4)) for i, a in enumerate(d["annotations"])],
            r"annotation 3 has 5 keypoints, where others have 4",
        ),
        (first(segmentation=[5, 6, 25, 6, 25, 21]), r"annotation 1 has as segmentation a flat list of numbers"),
        (first(segmentation=[[5, 6, 25, 6, 25]]), r"annotation 1 has a polygon of 5 numbers"),
        (first(segmentation=[[{"x": 1, "y": 2}] * 4]), r"annotation 1 has a polygon with \{"),
        (first(segmentation=[[5, 6, float("nan"), 6, 25, 21]]), r"annotation 1 has a polygon that is not finite"),
        (first(segmentation=[[0, 0, 9e8, 0, 9e8, 9e8]]), r"annotation 1 has a polygon .* beyond 100000 pixels"),
        (first(segmentation="mask.png"), r"annotation 1 has as segmentation 'mask.png'"),
        (first(segmentation=SHORT_RUNS), r"annotation 1 has run lengths of 310 pixels in all, but a size of 48 x 64"),
        (first(segmentation=TURNED_RUNS), r"annotation 1 has run lengths of 64 x 48 pixels, but its image 0+1000.jpg"),
        (first(segmentation={"size": [48, 64], "counts": [-1, 3073]}), r"annotation 1 has run lengths with counts"),
        (first(segmentation={"size": [48, 64], "counts": "\u00e9"}), r"annotation 1 has damaged run lengths"),
    ],
)
def test_coco_fields_that_are_not_clear_are_refused_by_name(tmp_path, edit, says):
    path = coco(tmp_path, edit)
    with pytest.raises(UsageError, match=says) as refused:
        read_coco(str(tmp_path))
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "an HTML page"),
        (b"\x1f\x8b\x08\0", "a gzip archive"),
        (b"PK\3\4", "a zip archive"),
        (b"", "is empty"),
        (b"[" * 100_000, "is not JSON"),
        (b"1" * 10_000, "is not JSON"),
        (b"\xff\xff", "is not JSON"),
        (b"[]", "holds a list, not an object"),
    ],
)
def test_files_that_are_no_annotations(tmp_path, data, says):
    coco(tmp_path).write_bytes(data)
    with pytest.raises(UsageError, match=says):
        read_coco(str(tmp_path))


# ---- sizes ----


@pytest.mark.parametrize("size", [(WIDTH, HEIGHT), (HEIGHT // 2, WIDTH // 2)])  # swapped, half
def test_an_image_of_another_size_than_its_annotations(tmp_path, size):
    coco(tmp_path, every("images", height=size[0], width=size[1]))
    found = read_coco(str(tmp_path))
    said = (
        rf"0+1000\.jpg: has 48 x 64 pixels, but its boxes in .*val2017\.json are of an image of {size[0]} x {size[1]}"
    )
    for use in (found.read, found.open):
        with pytest.raises(SizeMismatch, match=said) as refused:
            use(0)
        assert ("EXIF" in str(refused.value)) == (size == (WIDTH, HEIGHT))


def test_photographs_that_exif_turns(tmp_path):
    """Annotated on the pixels as stored, a box lies elsewhere: refused. Annotated upright, it lies where it should."""
    write_coco(tmp_path)
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[6:26, 5:45] = 255
    Image.fromarray(pixels).save(tmp_path / "val2017" / "a.jpg", exif=EXIF_TURNED, quality=95)
    row = {"id": 1, "file_name": "a.jpg"}
    for size, box in (((HEIGHT, WIDTH), [5, 6, 40, 20]), ((WIDTH, HEIGHT), [22, 5, 20, 40])):
        document = {"images": [row | {"height": size[0], "width": size[1]}], "categories": [{"id": 1, "name": "a"}]}
        document["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": box}]
        (tmp_path / "annotations/instances_val2017.json").write_text(json.dumps(document))
        found = read_coco(str(tmp_path))
        if size == (HEIGHT, WIDTH):
            with pytest.raises(BadImage, match=r"has 64 x 48 pixels, .* of an image of 48 x 64.*EXIF orientation"):
                found.read(0)
        else:
            x0, y0, x1, y1 = found.boxes(0)[0].astype(int)
            assert (found.read(0)[y0:y1, x0:x1] > 128).all()


def test_a_size_that_nobody_knows(tmp_path):
    coco(tmp_path, every("images", height=0, width=0))
    (tmp_path / "val2017/000000001002.jpg").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"does not know the size of an image that cannot be read: .*1002\.jpg"):
        read_coco(str(tmp_path))


# ---- VOC ----


def voc(root, edit=lambda text: text, listing=None):
    folder = write_voc(root, images=1)
    path = folder / "Annotations" / "000000.xml"
    text = edit(path.read_text())
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if listing is not None:
        (folder / "ImageSets/Main/test.txt").write_bytes(listing)
    return folder


def replaced(old, new):
    return lambda text: text.replace(old, new, 1)


SIZE = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"


@pytest.mark.parametrize(
    ("edit", "listing"),
    [
        (replaced(SIZE, ""), None),
        (replaced(SIZE, "<size><width>0</width><height>0</height></size>"), None),
        (replaced(SIZE, "<size><width></width><height/></size>"), None),
        (replaced(SIZE, "<size><width>64.0</width><height>48.0</height></size>"), None),
        (replaced("<difficult>0</difficult>", ""), None),
        (replaced("<difficult>0</difficult>", "<difficult>Unspecified</difficult>"), None),
        (replaced("<difficult>1</difficult>", "<difficult> true </difficult>"), None),
        (replaced("<xmin>9</xmin>", "<xmin>9.0</xmin>"), None),
        (replaced("000000.jpg", "IMG_1234.jpg"), None),
        (replaced("000000.jpg", "000001.jpg"), None),  # of another image: a copy that nobody corrected
        (replaced("000000.jpg", "C:\\\\photos\\\\000000.jpg"), None),
        (replaced("<filename>000000.jpg</filename>", ""), None),
        (lambda text: b"\xef\xbb\xbf" + text.encode(), b"\xef\xbb\xbf000000\r\n"),
        (lambda text: ('<?xml version="1.0" encoding="utf-16"?>' + text).encode("utf-16"), b"000000  1\n"),
        (lambda text: "\n<?xml version='1.0'?>" + text, b"000000.jpg\n"),
        (replaced("<object>", "<object><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"), b"000000 -1\n"),
    ],
)
def test_voc_odd_but_clear_files_are_taken(tmp_path, edit, listing):
    voc(tmp_path)
    (plain,) = read_voc(str(tmp_path)).objects
    folder = voc(tmp_path, edit, listing)
    Image.new("RGB", (10, 10)).save(folder / "JPEGImages/000001.jpg")
    found = read_voc(str(tmp_path))
    (objects,) = found.objects
    assert np.array_equal(objects.boxes, plain.boxes) and objects.labels.tolist() == plain.labels.tolist()
    assert objects.difficult.tolist() == plain.difficult.tolist() and objects.file_name == "000000.jpg"
    assert found.read(0).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("name", ["000000.JPG", "000000.png", "000000.jpeg"])
def test_voc_images_are_found_by_name_whatever_their_extension(tmp_path, name):
    folder = voc(tmp_path)
    Image.open(folder / "JPEGImages/000000.jpg").save(folder / "JPEGImages" / name.lower().replace(".jpg", ".jpeg"))
    (folder / "JPEGImages/000000.jpg").unlink()
    if name.endswith("JPG"):
        (folder / "JPEGImages/000000.jpeg").rename(folder / "JPEGImages" / name)
    found = read_voc(str(tmp_path))
    assert found.objects[0].file_name == name and found.read(0).shape == (HEIGHT, WIDTH, 3)


def test_voc_names_with_spaces(tmp_path):
    folder = voc(tmp_path, listing=b"my picture\n")
    (folder / "Annotations/000000.xml").rename(folder / "Annotations/my picture.xml")
    (folder / "JPEGImages/000000.jpg").rename(folder / "JPEGImages/my picture.jpg")
    assert read_voc(str(tmp_path)).objects[0].file_name == "my picture.jpg"


def test_voc_boxes_that_are_left_out_are_said(tmp_path):
    voc(tmp_path, lambda text: text.replace("<xmin>9</xmin>", "<xmin>40</xmin>").replace("<xmax>52<", "<xmax>nan<"))
    found = read_voc(str(tmp_path))
    assert len(found.objects[0]) == 0 and "test.txt: 2 of 2 boxes have no area" in found.notes[0]


LAUGHS = "".join(f"<!ENTITY e{n} '{f'&e{n - 1};' * 10}'>" for n in range(1, 12))
BILLION_LAUGHS = f"<!DOCTYPE a [<!ENTITY e0 'x'>{LAUGHS}]><annotation>&e11;</annotation>"


@pytest.mark.parametrize(
    ("edit", "listing", "says"),
    [
        (lambda _: BILLION_LAUGHS, None, r"000000\.xml .* declares XML entities"),
        (lambda _: BILLION_LAUGHS.encode("utf-16"), None, r"000000\.xml .* declares XML entities"),
        (lambda _: "", None, r"000000\.xml is empty"),
        (lambda _: "<html><body/></html>", None, r"000000\.xml is an HTML page"),
        (lambda _: "version https://git-lfs.github.com/spec/v1\n", None, r"000000\.xml is a Git LFS pointer"),
        (lambda _: "<annotations/>", None, r"its root is <annotations>, not <annotation>"),
        (replaced("<annotation>", '<annotation xmlns="http://x">'), None, r"its root is <\{http://x\}annotation>"),
        (replaced("<xmin>9</xmin>", "<xmin>9,5</xmin>"), None, r"<bndbox><xmin> is '9,5', which is no number"),
        (replaced("<difficult>0<", "<difficult>maybe<"), None, r"<difficult> is 'maybe', expected 0 or 1"),
        (replaced("<name>cat</name>", ""), None, r"<object> has no <name>"),
        (replaced(SIZE, SIZE.replace("64", "sixty")), None, r"has width 'sixty', which is no number of pixels"),
        (replaced(SIZE, SIZE.replace("64", "99999999")), None, r"is said to have 48 x 99999999 pixels, more than"),
        (lambda text: text, b"000000\n000000\n", r"test\.txt names '000000' 2 times"),
        (lambda text: text, b"\xff\xfe0\n", r"test\.txt is no list of names"),
        (lambda text: text, b"000009\n", r"no annotation at .*000009\.xml"),
    ],
)
def test_voc_files_that_are_not_clear_are_refused_by_name(tmp_path, edit, listing, says):
    voc(tmp_path, edit, listing)
    with pytest.raises(UsageError, match=says):
        read_voc(str(tmp_path))


def test_voc_sizes_are_compared(tmp_path):
    voc(tmp_path, replaced(SIZE, f"<size><width>{HEIGHT}</width><height>{WIDTH}</height></size>"))
    with pytest.raises(SizeMismatch, match=r"000000\.jpg: has 48 x 64 .*test\.txt are of an image of 64 x 48"):
        read_voc(str(tmp_path)).read(0)


# ---- Cityscapes ----


def huge(png):
    """The file with a header that says 20,000 x 20,000 pixels."""
    header = png[12:16] + struct.pack(">II", 20_000, 20_000) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def label_of(root):
    return min((root / "gtFine/val").glob("*/*_gtFine_instanceIds.png"))


def test_cityscapes_sizes_are_compared(tmp_path):
    path = label_of(write_cityscapes(tmp_path, "val"))
    Image.open(path).resize((WIDTH // 2, HEIGHT // 2), Image.Resampling.NEAREST).save(path)
    with pytest.raises(SizeMismatch, match=r"has 48 x 64 .*gtFine/val are of an image of 24 x 32"):
        read_cityscapes(str(tmp_path), "val").read(0)


def test_cityscapes_labels_without_a_picture_are_said(tmp_path):
    path = label_of(write_cityscapes(tmp_path, "val"))
    path.with_name("lost_gtFine_instanceIds.png").write_bytes(path.read_bytes())
    assert "1 instance images have no picture, such as aachen/lost_" in read_cityscapes(str(tmp_path), "val").notes[0]


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: Image.new("RGB", (WIDTH, HEIGHT)).save(path), "expected one channel"),
        (lambda path: Image.fromarray(np.full((48, 64), 60000, np.uint16)).save(path), "cannot be read|it holds"),
        (lambda path: Image.fromarray(np.full((48, 64), -5, np.int32)).save(path, "TIFF"), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(huge(path.read_bytes())), "cannot be read: .*pixels"),
    ],
)
def test_cityscapes_labels_that_are_no_instance_images(tmp_path, write, says):
    path = label_of(write_cityscapes(tmp_path, "val"))
    write(path)
    if "it holds" in says:  # any 16-bit value below 256 classes is one
        assert len(read_cityscapes(str(tmp_path), "val").objects[0]) == 0
        return
    with pytest.raises(UsageError, match=says) as refused:
        read_cityscapes(str(tmp_path), "val")
    assert str(path) in str(refused.value)


# ---- anything ----


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by what /proc says")
def test_mutated_files_are_read_or_refused_by_name(tmp_path):
    """A few hundred: ``SCRL_FAST_SWEEP=20000`` for more, as ``SCRL_FAST_SWEEP_SEED=7`` for others."""
    here = Path(__file__).parent
    count, seed = os.environ.get("SCRL_FAST_SWEEP", "240"), os.environ.get("SCRL_FAST_SWEEP_SEED", "0")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(here / "annotation_sweep.py"), str(tmp_path), count, seed]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    outcome = json.loads(ran.stdout.replace("'", '"'))
    assert outcome["read"] >= int(count) / 10 and outcome["refused"] >= int(count) / 4


# ---- files that are no files, or too large ----


def test_a_pipe_among_annotations_is_named(tmp_path):
    write_voc(tmp_path / "voc")
    annotation = next((tmp_path / "voc").rglob("*.xml"))
    annotation.unlink()
    os.mkfifo(annotation)
    with pytest.raises(UsageError, match=r"\.xml: is a named pipe, not a regular file"):
        read_voc(tmp_path / "voc")
    listing = next((tmp_path / "voc").rglob("test.txt"))
    listing.unlink()
    os.mkfifo(listing)
    with pytest.raises(UsageError, match=r"test\.txt: is a named pipe"):
        read_voc(tmp_path / "voc")


def test_annotations_have_a_largest_size(tmp_path, monkeypatch):
    coco(tmp_path)
    monkeypatch.setattr(coco_document, "_LARGEST_FILE", 100)
    with pytest.raises(UsageError, match=r"\.json: \d+ bytes are more than 100$"):
        read_coco(tmp_path, "val2017")


def test_boxes_of_one_pixel_are_no_shares(tmp_path):
    coco(tmp_path, lambda d: [a.update(bbox=[0, 0, 1, 1]) for a in d["annotations"]])
    assert read_coco(tmp_path, "val2017").objects[0].boxes[0].tolist() == [0, 0, 1, 1]


def test_annotated_images_keep_all_limits(tmp_path):
    coco(tmp_path)
    limits = ImageLimits(max_file_bytes=100)
    found = read_coco(tmp_path, "val2017", limits=limits, max_pixels=10**6).subset([0])
    assert found.limits == ImageLimits(max_file_bytes=100, max_pixels=10**6)
    with pytest.raises(BadImage, match="max_file_bytes=100"):
        found.read(0)
