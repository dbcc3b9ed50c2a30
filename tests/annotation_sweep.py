"""Mutated annotations under limits of time and memory: each is read or refused by name.

``python annotation_sweep.py FOLDER COUNT [SEED]`` prints how many were read and refused. An error of any other kind
ends it with a traceback, and so does an input that takes longer than `SECONDS` or more memory than `MEMORY`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import resource
import signal
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import numpy as np
from tiny_data import write_coco, write_voc
from tiny_transfer import write_keypoints

from scrl_fast.data.image_files import BadImage
from scrl_fast.data.sources.coco import read_coco
from scrl_fast.data.sources.voc import read_voc
from scrl_fast.errors import UsageError
from scrl_fast.transfer.coco_metric import coco_average_precision
from scrl_fast.transfer.dataset import Examples, usable
from scrl_fast.transfer.detections import Detections

SECONDS, MEMORY = 20, 1 << 30
ODD = [
    *(None, True, False, 0, 1, -1, 2, 3.5, -0.5, 1e9, 1e308, -1e308, float("nan"), float("inf"), 10**400, 2**31, 2**63),
    *(
        "",
        "0",
        "1",
        "-3",
        "12.5",
        "nan",
        "x",
        " 7 ",
        "a" * 5000,
        "../../0.jpg",
        "0.jpg\0",
        "\ud800",
        "val2017/1.jpg",
        ".",
    ),
    *([], [[]], [None], [0, 0, 0, 0], [1, 2, 3], [1e308] * 4, ["1", "2", "9", "9"], [[1, 2, 3, 4, 5]], [[1, 1] * 4]),
    *([[-9e8, 0, 9e8, 0, 9e8, 9e8]], [5, 6, 25, 6, 25, 21], [[{"x": 1, "y": 2}]], [0] * 51, [1, 2, 2] * 5),
    *({}, {"size": [48, 64], "counts": [0, 3072]}, {"size": [64, 48], "counts": [3072]}, {"size": [48, 64]}),
    *({"size": [48, 64], "counts": [300, 10]}, {"size": [48, 64], "counts": "hc01_1000000000000000000Kf\\S1"}),
    *({"size": [10**9, 10**9], "counts": [10**18]}, {"size": [48, 64], "counts": "\u00e9"}, {"counts": None}),
    *({"size": [48, 64], "counts": [-5, 3077]}, {"size": [48, 64], "counts": "P`2" + "o" * 99}),
]


class TooSlow(Exception):
    pass


def too_slow(*_):
    raise TooSlow(f"more than {SECONDS} s")


def limit_memory():
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)


# ---- mutations ----


def places(tree, path=()):
    """Every place of a JSON document as a tuple of keys."""
    found = []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found.append((*path, key))
        found += places(value, (*path, key))
    return found


def mutated(document, rng):
    document = copy.deepcopy(document)
    for _ in range(rng.integers(1, 3)):
        found = places(document)
        if rng.random() < 0.7:  # numbers of polygons and keypoints are most of a file
            found = [place for place in found if isinstance(place[-1], str)]
        *path, last = found[rng.integers(len(found))]
        parent = document
        for key in path:
            parent = parent[key]
        kind = rng.integers(6)
        if kind == 0:
            del parent[last]
        elif kind == 1 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[last]))
        elif kind == 2 and isinstance(parent, list):
            parent.insert(0, copy.deepcopy(ODD[rng.integers(len(ODD))]))
        else:
            parent[last] = copy.deepcopy(ODD[rng.integers(len(ODD))])
    return document


def mutated_bytes(data, rng):
    """One of the ways in which files break: cut, flipped, repeated, other encodings."""
    kind, place = rng.integers(7), int(rng.integers(len(data)))
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + bytes([rng.integers(256)]) + data[place + 1 :]
    if kind == 2:
        return data[:place] + data[place // 2 : place] + data[place:]
    if kind == 3:
        return b"\xef\xbb\xbf" + data
    if kind == 4:
        return data.decode().encode("utf-16")
    if kind == 5:
        return b"\n \n" + data + b"\0\0"
    return data[:place] + data[place + int(rng.integers(1, 40)) :]


def mutated_xml(data, rng):
    root = ElementTree.fromstring(data)
    scalars = [str(value) for value in ODD if not isinstance(value, (list, dict)) and str(value).isascii()]
    for _ in range(rng.integers(1, 3)):
        parents = [node for node in root.iter() if len(node)]
        parent = parents[rng.integers(len(parents))]
        child = parent[int(rng.integers(len(parent)))]
        kind = rng.integers(5)
        if kind == 0:
            parent.remove(child)
        elif kind == 1:
            parent.append(copy.deepcopy(child))
        elif kind == 2:
            child.tag = ("name", "bndbox", "size", "object", "robndbox")[rng.integers(5)]
        else:
            child.text = "".join(filter(str.isprintable, scalars[rng.integers(len(scalars))]))
    return ElementTree.tostring(root)


BOMBS_JSON = [
    *(
        b"[" * 200_000,
        b'{"images":' * 50_000,
        b'{"images": [' + b"1," * 300_000 + b"1]}",
        b"1" * 10_000,
        b"",
        b" ",
        b"null",
    ),
    *(
        b"\x1f\x8b\x08",
        b"PK\3\4",
        b"<!DOCTYPE html><html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    ),
]
LAUGHS = b"<!DOCTYPE a [<!ENTITY e0 'x'>" + b"".join(
    b"<!ENTITY e%d '%s'>" % (n, b"&e%d;" % (n - 1) * 10) for n in range(1, 12)
)
BOMBS_XML = [
    *(LAUGHS + b"]><annotation>&e11;</annotation>", LAUGHS.decode().encode("utf-16"), b"<annotation>" * 200_000),
    *(
        b"<annotation>" + b"<object>" * 100_000,
        b"<annotation " + b"a='1' " * 50_000,
        b"<a/>",
        b"<annotation/>",
        b"\0" * 99,
    ),
    *(b"<!DOCTYPE a SYSTEM 'file:///etc/passwd'><annotation/>", b"<?xml version='1.0' encoding='cp037'?><annotation/>"),
    *(b"<?xml version='1.0' encoding='no-such'?><annotation/>", b"<html><body>404</body></html>", *BOMBS_JSON[-4:]),
]


# ---- what is done with each ----


def use_coco(root, kind):
    source = read_coco(str(root), "val2017", kind=kind)
    check(source)
    for index in range(len(source)):
        if usable(source, index, masks=True).any():
            masks = Examples(source, masks=True)(index, 0)[1]["masks"]
            assert masks.max() <= 1, "uninitialised memory"
    found = [
        Detections(index, o.boxes, np.ones(len(o), np.float32), o.labels) for index, o in enumerate(source.objects)
    ]
    result = coco_average_precision(source.annotation_file, found, source, backend="pycocotools")
    assert result["AP"] == -1 or 0 <= result["AP"] <= 1 + 1e-9


def use_voc(root):
    source = read_voc(str(root))
    check(source)
    for index in range(len(source)):
        source.read(index)


def check(source):
    for objects in source.objects:
        boxes, sides = objects.boxes, [objects.width, objects.height] * 2
        assert (boxes >= 0).all() and (boxes <= sides).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert np.isfinite(objects.areas).all() and (objects.labels < len(source.classes)).all()
        assert objects.keypoints is None or np.isfinite(objects.keypoints).all()


def sweep(folder, count, seed=0):
    rng = np.random.default_rng(seed)
    coco, points, voc = folder / "coco", folder / "points", folder / "voc"
    files = {"instances": write_coco(coco), "person_keypoints": write_keypoints(points, "val2017")}
    xml = write_voc(voc) / "Annotations" / "000000.xml"
    documents = {kind: json.loads(path.read_text()) for kind, path in files.items()}
    plain = xml.read_bytes()
    inputs = [("instances", data) for data in BOMBS_JSON] + [("voc", data) for data in BOMBS_XML]
    for n in range(count):
        kind = ("instances", "person_keypoints", "voc")[n % 3]
        data = mutated_xml(plain, rng) if kind == "voc" else json.dumps(mutated(documents[kind], rng)).encode()
        inputs.append((kind, mutated_bytes(data, rng) if rng.random() < 0.2 else data))
    outcome: Counter[str] = Counter()
    for kind, data in inputs:
        (xml if kind == "voc" else files[kind]).write_bytes(data)
        signal.alarm(SECONDS)
        try:
            use_voc(voc) if kind == "voc" else use_coco(coco if kind == "instances" else points, kind)
            outcome["read"] += 1
        except (UsageError, BadImage) as error:
            outcome["refused"] += 1
            assert str(folder) in str(error), f"names no file: {error}"
        except BaseException:
            (folder / "failed").write_bytes(data)
            raise
        finally:
            signal.alarm(0)
    return outcome


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, too_slow)
    limit_memory()
    with contextlib.suppress(AttributeError):
        sys.set_int_max_str_digits(4300)
    print(dict(sweep(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
