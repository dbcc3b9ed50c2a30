"""Hostile and damaged files of weights, and a process of limited memory that reads them all.

Run by test_weight_files.py; ``python tests/weight_file_sweep.py FOLDER COUNT`` reads COUNT mutated files of each
format, as many as one likes, and prints one JSON object. This file is long because of its
lists of faults.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import resource
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

MEMORY = 1 << 30
"""Bytes of address space that reading may add; a gigabyte, since allocators reserve more than they use."""


def body(value: object) -> bytes:
    """The opcodes of a value without memo entries, to be put together by hand."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, 2)
    pickler.fast = True
    pickler.dump(value)
    return buffer.getvalue()[2:-1]


def array(shape: object, dtype: bytes, data: bytes, version: object = 1, fortran: object = False) -> bytes:
    """An ndarray as NumPy 1 pickles it, with whatever dtype and content."""
    start = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + body((0,)) + b"C\x01btR("
    return start + body(version) + body(shape) + dtype + body(fortran) + data + b"tb"


def dtype(name: str, order: str = "<", flags: object = 0, fields: object = None) -> bytes:
    return (
        b"cnumpy\ndtype\n"
        + body((name, False, True))
        + b"R"
        + body((3, order, None, fields, None, -1, -1, flags))
        + b"b"
    )


def content(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


def in_dict(value: bytes) -> bytes:
    return b"\x80\x04}" + body("model") + b"}" + body("stem.conv1.weight") + value + b"ss."


def doubled(link: bytes) -> bytes:
    """Sixty values in the memo, each of which holds the one before it twice. link: such a value, %c being the last."""
    return b"".join(link.replace(b"%c", bytes([i - 1])) + b"q" + bytes([i]) for i in range(1, 60))


def packed(*numbers: int) -> bytes:
    return b"".join(b"J" + struct.pack("<i", number) for number in numbers)


EMPTY_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + body((0,)) + b"C\x01btR"
TWO = b"\x80\x04(K\x01K\x02tq\x00" + doubled(b"h%ch%c\x86")
DEEP = b"".join(b"j" + struct.pack("<I", i - 1) + b"\x85r" + struct.pack("<I", i) for i in range(1, 20_000))
COLLIDING = b"".join(b"\x8a\x0c" + (i * ((1 << 61) - 1)).to_bytes(12, "little") + b"N" for i in range(1, 30_000))

PICKLES: dict[str, bytes] = {
    "forged object dtype": in_dict(array((1,), dtype("O8", "|", 1), content(struct.pack("<Q", 0x1337C0DE1230)))),
    "object dtype by flags": in_dict(array((1,), dtype("f8", "|", 63), content(bytes(8)))),
    "fields in a dtype": in_dict(array((1,), dtype("f8", "<", 0, {"a": 1}), content(bytes(8)))),
    "void dtype": in_dict(array((1,), dtype("V8"), content(bytes(8)))),
    "text array": in_dict(array((1,), dtype("U2"), content(bytes(8)))),
    "negative shape": in_dict(array((-1,), dtype("f8"), content(bytes(8)))),
    "shape that overflows": in_dict(array((1 << 62, 4), dtype("f4"), content(b""))),
    "shape without end": in_dict(array((0, 1 << 62), dtype("f4"), content(b""))),
    "short content": in_dict(array((3,), dtype("f4"), content(bytes(8)))),
    "array without content": in_dict(EMPTY_ARRAY),
    "list as content": in_dict(array((1,), dtype("f8"), body([1.0]))),
    "class as array": in_dict(EMPTY_ARRAY.replace(b"cnumpy\nndarray", b"cos\nsystem")),
    "os.system": in_dict(b"cposix\nsystem\n" + body(("true",)) + b"R"),
    "eval": in_dict(b"cbuiltins\neval\n" + body(("1",)) + b"R"),
    "getattr": in_dict(b"cbuiltins\ngetattr\n" + body(("a", "b")) + b"R"),
    "bytes by number": in_dict(b"cbuiltins\nbytearray\n" + body((1 << 40,)) + b"R"),
    "numpy function": in_dict(b"cnumpy\nzeros\n" + body((1 << 40,)) + b"R"),
    "extension": in_dict(b"\x82\x01"),
    "old instance": in_dict(b"(i__main__\nX\n"),
    "persistent id": in_dict(b"Pa\n"),
    "shared dicts": b"\x80\x04}q\x00" + doubled(b"}(" + body("a") + b"h%c" + body("b") + b"h%cu") + b".",
    "shared tuples": TWO + b".",
    "tuples as key": TWO + b"0}h\x3bK\x01s.",
    "deep key": b"\x80\x04}K\x01" + b"\x85" * 200_000 + b"K\x01s.",
    "deep lists": b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "deep by sharing": b"\x80\x04(K\x01\x85q\x00" + DEEP + b"t.",
    "list in itself": b"\x80\x04}" + body("a") + b"]\x94h\x00as.",
    "memo beyond": b"\x80\x04K\x01r" + struct.pack("<I", 0x0FFFFFFF) + b"0}.",
    "memo twice": b"\x80\x04K\x01q\x00K\x02q\x000}.",
    "memo empty": b"\x80\x04}h\x07.",
    "long of megabytes": b"\x80\x04}" + body("a") + b"\x8b\0\0@\0" + b"\x7f" * (1 << 22) + b"s.",
    "negative long": b"\x80\x04\x8b" + struct.pack("<i", -5) + b".",
    "digits": b"\x80\x04}" + body("a") + b"L" + b"9" * 1_000_000 + b"L\ns.",
    "text of 2^62": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"a",
    "bytes of 2^40": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"a",
    "line without end": b"\x80\x04V" + b"a" * 3_000_000,
    "text flood": b"\x80\x04](" + (b"X" + struct.pack("<I", 4) + "\U0001f600".encode()) * 200_000 + b"e.",
    "same bytes again": b"\x80\x04](X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"\x94"
    + (b"c_codecs\nencode\nh\x00" + body("latin1") + b"\x86R") * 20_000 + b"e.",
    "same set again": b"\x80\x04](](" + packed(*range(50_000)) + b"e\x94"
    + b"cbuiltins\nset\nh\x00\x85R" * 20_000 + b"e.",
    "keys that collide": b"\x80\x04}(" + COLLIDING + b"u.",
    "opcodes": b"\x80\x04](" + b"N" * 1_600_000 + b"e.",
    "stack of marks": b"\x80\x04" + b"(" * 300_000 + b".",
    "nothing to pop": b"\x80\x040000.",
    "no end": b"\x80\x04}",
}  # fmt: skip


def stored(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def torch_file(pickled: bytes, storage: bytes = bytes(16), **more: bytes) -> bytes:
    return stored({"a/data.pkl": pickled, "a/byteorder": b"little", "a/data/0": storage, "a/version": b"3\n"} | more)


def storage(count: object = 4, kind: bytes = b"ctorch\nFloatStorage\n", key: object = "0") -> bytes:
    return b"(" + body("storage") + kind + body(key) + body("cpu") + body(count) + b"tQ"


def tensor(offset: object, shape: object, strides: object, held: bytes | None = None) -> bytes:
    start = b"ctorch._utils\n_rebuild_tensor_v2\n(" + (storage() if held is None else held)
    return start + body(offset) + body(shape) + body(strides) + b"\x89ccollections\nOrderedDict\n)RtR"


def torch_files() -> dict[str, bytes]:
    """Archives that torch did not write, or whose pickle asks for more than they hold."""
    whole = torch_file(in_dict(tensor(0, (4,), (1,))))
    tensors = {
        "outside its storage": tensor(1, (4,), (1,)),
        "strides outside": tensor(0, (2, 2), (3, 1)),
        "negative stride": tensor(3, (4,), (-1,)),
        "negative offset": tensor(-1, (1,), (1,)),
        "offset of a float": tensor(0.0, (1,), (1,)),
        "offset that overflows": tensor(1 << 62, (1,), (1,)),
        "expanded": tensor(0, (1 << 40,), (0,)),
        "shape that overflows": tensor(0, (1 << 62, 8), (1, 1)),
        "too few strides": tensor(0, (2, 2), (1,)),
        "storage of 2^40": tensor(0, (1,), (1,), storage(1 << 40)),
        "negative storage": tensor(0, (0,), (1,), storage(-1)),
        "storage elsewhere": tensor(0, (1,), (1,), storage(key="../data.pkl")),
        "storage class": tensor(0, (1,), (1,), storage(kind=b"cos\nFloatStorage\n")),
        "no storage": tensor(0, (1,), (1,), b"N"),
        "sparse": b"ctorch._utils\n_rebuild_sparse_tensor\n" + body((1, 2)) + b"R",
        "module": b"ctorchvision.models.resnet\nResNet\n)\x81}b",
        "storage by number": b"ctorch\nFloatStorage\n" + body((1 << 40,)) + b"R",
        "bytes again": b"ctorch.storage\n_load_from_bytes\n" + body((b"",)) + b"R",
    }
    files = {name: torch_file(in_dict(pickled)) for name, pickled in tensors.items()}
    many = b"\x80\x02](" + storage(1 << 18) + b"q\x00" + tensor(0, (1 << 18,), (1,), b"h\x00") * 20_000 + b"e."
    end = whole.rindex(b"PK\5\6")
    overlapping = bytearray(whole)
    first, second = (whole.index(b"PK\1\2"), whole.index(b"PK\1\2", whole.index(b"PK\1\2") + 4))
    overlapping[second + 42 : second + 46] = overlapping[first + 42 : first + 46]
    return files | {
        "one storage, many tensors": torch_file(many, bytes(1 << 20)),
        "compressed": stored({"a/data.pkl": bytes(50_000_000), "a/version": b"3"}, zipfile.ZIP_DEFLATED),
        "other archive": stored({"word/document.xml": b"<x/>"}),
        "npz": stored({"a.npy": b"\x93NUMPY"}),
        "TorchScript": torch_file(b"\x80\x02}.", **{"a/constants.pkl": b"\x80\x02)."}),
        "big-endian": stored({"a/data.pkl": b"\x80\x02}.", "a/byteorder": b"big"}),
        "two pickles": stored({"a/data.pkl": b"\x80\x02}.", "b/data.pkl": b"\x80\x02}."}),
        "comment": whole[:-2] + b"\x04\x00abcd",
        "bytes in front": b"PK\3\4" + bytes(60) + whole,
        "overlapping entries": bytes(overlapping),
        "many entries": whole[: end + 8] + struct.pack("<HH", 65535, 65535) + whole[end + 12 :],
        "directory elsewhere": whole[: end + 16] + struct.pack("<I", 0xFFFFFFF0) + whole[end + 20 :],
        "empty archive": whole[end : end + 8] + bytes(14),
        **{f"pickle, {name}": torch_file(pickled) for name, pickled in PICKLES.items() if len(pickled) < 1 << 18},
    }


def safetensors(header: object, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def safetensors_files() -> dict[str, bytes]:
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return {
        "header of 2^63": struct.pack("<Q", 1 << 63) + b"{}",
        "header past the end": struct.pack("<Q", 100) + b"{}",
        "no JSON": safetensors(b"{" * 100),
        "a list": safetensors([1]),
        "deep": safetensors(b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}"),
        "deep metadata": safetensors({"__metadata__": {"config": "[" * 500_000}, "a": one}),
        "names twice": safetensors(b'{"a":%s,"a":%s}' % ((json.dumps(one).encode(),) * 2)),
        "digits": safetensors(b'{"a":' + b"9" * 1_000_000 + b"}"),
        "unknown dtype": safetensors({"a": one | {"dtype": "F128"}}),
        "dtype of a list": safetensors({"a": one | {"dtype": []}}),
        "negative shape": safetensors({"a": one | {"shape": [-2]}}),
        "shape that overflows": safetensors({"a": one | {"shape": [1 << 62, 8]}}),
        "shape without end": safetensors({"a": {"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [0, 0]}}, b""),
        "shape of floats": safetensors({"a": one | {"shape": [2.0]}}),
        "overlap": safetensors({"a": one, "b": one}),
        "gap": safetensors({"a": one | {"shape": [1], "data_offsets": [4, 8]}}),
        "backwards": safetensors({"a": one | {"data_offsets": [8, 0]}}),
        "behind the end": safetensors({"a": one | {"data_offsets": [8, 16]}}),
        "no offsets": safetensors({"a": {"dtype": "F32", "shape": [2]}}),
        "metadata of numbers": safetensors({"__metadata__": {"a": 1}, "b": one}),
        "constants": safetensors(b'{"a": NaN}'),
        "backbone of another": safetensors({"__metadata__": {"backbone": "wide_resnet101_2"}, "conv1.weight": one}),
    }  # fmt: skip


def field(number: int, value: bytes | int) -> bytes:
    """A protobuf field: a number, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    data = b""
    while value > 127:
        data, value = data + bytes([value & 127 | 128]), value >> 7
    return data + bytes([value])


def initializer(dims: list[int], *more: bytes, kind: int = 1, name: bytes = b"conv1.weight") -> bytes:
    return b"".join([field(1, n % (1 << 64)) for n in dims]) + field(2, kind) + field(8, name) + b"".join(more)


def external(place: str, length: int = 8, offset: int = 0) -> bytes:
    entries = {"location": place, "offset": str(offset), "length": str(length)}
    listed = b"".join(field(13, field(1, k.encode()) + field(2, v.encode())) for k, v in entries.items())
    return field(7, field(5, initializer([2], listed, field(14, 1))))


def onnx_files() -> dict[str, bytes]:
    graphs = {
        "shape of 2^40": initializer([1 << 40], field(9, bytes(8))),
        "negative shape": initializer([-1], field(9, bytes(8))),
        "shape that overflows": initializer([1 << 62, 8], field(9, b"")),
        "unknown type": initializer([2], field(9, bytes(8)), kind=99),
        "short content": initializer([3], field(9, bytes(8))),
        "no content": initializer([3]),
        "many dimensions": initializer([1] * 1000, field(9, bytes(4))),
        "name of bytes": initializer([2], field(9, bytes(8)), name=b"\xff\xfe"),
        "number as name": initializer([2], field(9, bytes(8))) + field(8, 3),
    }
    files = {name: field(7, field(5, tensor)) for name, tensor in graphs.items()}
    outside = [
        "/etc/passwd",
        "../secret.bin",
        "a/../../secret.bin",
        "link.bin",
        "hard.bin",
        "out/secret.bin",
        "pipe",
        "",
        "a\0b",
    ]
    files |= {f"external {place!r}": external(place) for place in [*outside, "folder", "missing.bin", "C:\\x"]}
    return files | {
        "external, behind the end": external("data.bin", offset=1 << 40),
        "external, negative": external("data.bin", offset=-8),
        "external, again and again": b"".join(
            external("data.bin").replace(b"conv1.weight", b"%012d" % i) for i in range(999)
        ),
        "empty nodes": field(7, field(1, b"") * 1_500_000),
        "number without end": b"\xff" * 100,
        "twice": field(7, field(5, initializer([2], field(9, bytes(8)))) * 2),
        "number as graph": field(7, 3),
        "cut off": field(7, bytes(100))[:50],
        "deep": b"".join(field(7, bytes(8)) for _ in range(100)),
    }


def whole_files() -> dict[str, bytes]:
    """A good file of every format, to be mutated."""
    state = {"conv1.weight": torch.ones(4, 3), "bn1.bias": torch.zeros(4, dtype=torch.float64), "n": torch.tensor(3)}
    document = {
        "model": {"online": state, "probe": None},
        "config": {"model": {"backbone": "resnet10_tiny"}},
        "step": 3,
    }
    files = {}
    for suffix, legacy in ((".pt", False), (".legacy.pth", True)):
        buffer = io.BytesIO()
        torch.save(document, buffer, _use_new_zipfile_serialization=not legacy)
        files[suffix] = buffer.getvalue()
    arrays = {"stem.conv1.weight": np.ones((4, 3), np.float32), "res2.0.conv1.norm.bias": np.zeros(4, np.float16)}
    for protocol in (2, 5):
        files[f".{protocol}.pkl"] = pickle.dumps({"model": arrays, "__author__": "x", "n": np.int64(3)}, protocol)
    shapes = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"config": '{"a": [1]}'}}
    files[".safetensors"] = safetensors(shapes)
    files[".onnx"] = field(7, field(5, initializer([2], field(9, bytes(8)))) * 1) + field(
        14, field(1, b"a") + field(2, b"1")
    )
    return files


def mutated(data: bytes, dice: random.Random) -> bytes:
    """The file with a few bytes changed, cut, repeated, or numbers put in that sizes and offsets must not be."""
    result = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 4))):
        place = dice.randrange(len(result) + 1)
        kind = dice.randrange(6)
        if kind == 0 and place < len(result):
            result[place] ^= 1 << dice.randrange(8)
        elif kind == 1:
            result[place : place + dice.choice((1, 4, 8))] = dice.randbytes(dice.choice((1, 4, 8)))
        elif kind == 2:
            result[place : place + 4] = struct.pack("<I", dice.choice((0, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 20)))
        elif kind == 3:
            del result[place : place + dice.randrange(1, 20)]
        elif kind == 4:
            start = dice.randrange(len(result) + 1)
            result[place:place] = result[start : start + dice.randrange(1, 40)]
        elif dice.random() < 0.3:
            del result[place:]
    return bytes(result)


def remade(data: bytes, dice: random.Random) -> bytes:
    """A torch archive with a mutated pickle under a right checksum, so that the pickle itself is reached."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    return stored({n: mutated(d, dice) if n.endswith("data.pkl") else d for n, d in entries.items()})


def inputs(count: int) -> Iterator[tuple[str, str, bytes]]:
    """(kind, file name, content) of every input; ``count`` mutated ones of each format."""
    made: dict[str, Callable[[], dict[str, bytes]]] = {
        ".pkl": lambda: PICKLES, ".pt": torch_files, ".safetensors": safetensors_files, ".onnx": onnx_files,
    }  # fmt: skip
    for suffix, files in made.items():
        for name, data in files().items():
            yield f"{suffix} by hand: {name}", f"a{suffix}", data
    for suffix, data in whole_files().items():
        dice = random.Random(suffix)
        for _ in range(count):
            again = remade(data, dice) if suffix == ".pt" and dice.random() < 0.7 else mutated(data, dice)
            yield f"{suffix} mutated", f"a{suffix}", again


reasons: list[str] = []
"""Messages of the files that were refused."""


def read_everything(path: Path) -> str:
    """What becomes of a file: read, refused, or the error that should not have come out."""
    from scrl_fast import weights
    from scrl_fast.errors import UsageError
    from scrl_fast.models import build_encoder
    from scrl_fast.weights.checkpoint_files import CHECKPOINT_KEYS, load
    from scrl_fast.weights.momentum import momentum_by_name

    outcome = "refused"
    uses: list[Callable[[], object]] = [lambda: load(path, expect=CHECKPOINT_KEYS)] if path.suffix == ".pt" else []
    try:
        found = weights.read(path)
        outcome = "read"
        uses += [lambda: json.dumps(found.metadata), lambda: momentum_by_name(found), lambda: weights.encoder_of(found)]
        uses += [lambda: weights.load_into(build_encoder("resnet10_tiny"), found)]
    except UsageError as error:
        if path.name not in str(error):
            return f"no path in: {error}"
        reasons.append(str(error))
    for use in uses:
        try:
            use()
        except UsageError as error:
            if path.name not in str(error):
                return f"no path in: {error}"
    return outcome


def main(folder: Path, count: int) -> dict[str, object]:
    """Reads every input; returns outcomes by kind, the slowest, and the growth of the process in megabytes."""
    read_everything(folder / "nothing.pt")  # imports
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.RLIM_INFINITY))
    outcomes: dict[str, dict[str, int]] = {}
    faults, slowest = [], (0.0, "")
    for kind, name, data in inputs(count):
        path = folder / name
        path.write_bytes(data)
        started = time.process_time()
        try:
            outcome = read_everything(path)
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"[:200]
        slowest = max(slowest, (time.process_time() - started, kind))
        if outcome not in ("read", "refused"):
            faults.append(f"{kind}: {outcome}")
        by_outcome = outcomes.setdefault(kind.partition(":")[0], {})
        by_outcome[outcome[:7]] = by_outcome.get(outcome[:7], 0) + 1
        if kind.endswith(": forged object dtype") and outcome != "refused":
            faults.append(kind)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10) - before
    return {"outcomes": outcomes, "faults": faults, "slowest": slowest, "grown_mb": grown}


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
