"""Files of weights from elsewhere are data: read right, or refused by name; never slow, never large, nothing runs."""

from __future__ import annotations

import argparse
import functools
import gzip
import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict, defaultdict, deque
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import weight_file_sweep as sweep

from scrl_fast import atomic_files, weights
from scrl_fast.weights.checkpoint_files import load
from scrl_fast.weights.file_kinds import check_regular
from scrl_fast.weights.files import read_file
from scrl_fast.weights.momentum import parameter_order


@pytest.fixture
def folder(tmp_path):
    """A model's folder with everything beside it that external data could be led to."""
    place = tmp_path / "model"
    (place / "folder").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (place / "data.bin").write_bytes(np.arange(2, dtype=np.float32).tobytes())
    for secret in (tmp_path / "secret.bin", tmp_path / "outside" / "secret.bin"):
        secret.write_bytes(b"12345678")
    (place / "link.bin").symlink_to("../secret.bin")
    (place / "out").symlink_to("../outside")
    os.link(tmp_path / "secret.bin", place / "hard.bin")
    os.mkfifo(place / "pipe")
    return place


def test_no_file_is_slow_large_or_a_raw_error(folder):
    """Some 160 files made by hand and 240 mutated ones, in a process whose memory is limited."""
    script = pathlib.Path(sweep.__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(folder), "40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["faults"]
    assert found["slowest"][0] < 30, found["slowest"]  # seconds of the processor; about one
    assert found["grown_mb"] < 500
    kinds = (".pkl", ".pt", ".safetensors", ".onnx")
    assert all(found["outcomes"][f"{kind} by hand"]["refused"] >= 20 for kind in kinds)
    assert any("read" in outcomes for kind, outcomes in found["outcomes"].items() if kind.endswith("mutated"))


# ---- right values ----


def document():
    grid = torch.arange(24.0).reshape(2, 3, 4)
    return {
        "dense": grid,
        "transposed": grid.permute(2, 0, 1),
        "part": grid[1, 1:],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        **{str(kind): torch.ones(3).to(kind) for kind in (torch.bfloat16, torch.float16, torch.int8, torch.bool)},
        "wide": torch.tensor([1, 2], dtype=torch.uint16),
        "complex": torch.tensor([1 + 2j]),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "module": torch.nn.BatchNorm1d(2).state_dict(),
        "plain": [None, True, 3, -(1 << 70), 1.5, "ä\ud800", b"\xff", (1, (2,)), {1, "a"}, 1 + 2j],
        "torch": [torch.Size([2, 3]), torch.float32, torch.device("cpu"), torch.device("cuda", 1)],
        "ordered": OrderedDict(b=1, a=2),
    }


def assert_same(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert (ours.dtype, ours.stride(), ours.requires_grad) == (theirs.dtype, theirs.stride(), theirs.requires_grad)
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for name in ours:
            assert_same(ours[name], theirs[name])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == theirs


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_torch_files_are_read_as_torch_reads_them(tmp_path, as_zip):
    path = tmp_path / "a.pt"
    written = document()
    if not as_zip:
        del written["wide"]  # torch cannot read its own uint16 back from the older format
    torch.save(written, path, _use_new_zipfile_serialization=as_zip)
    ours = load(path)
    assert_same(ours, torch.load(path, weights_only=True))
    assert ours["dense"].untyped_storage().data_ptr() == ours["part"].untyped_storage().data_ptr()
    ours["dense"].zero_()
    assert not ours["part"].any()


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_every_protocol(tmp_path, protocol):
    grid = np.arange(6, dtype=np.float32).reshape(2, 3)
    arrays = {"a": grid, "big": grid.astype(">f8"), "fortran": np.asfortranarray(grid), "half": grid.astype("f2")}
    arrays |= {"empty": np.zeros((0, 2), "i2"), "bool": grid > 2, "number": np.float64(0.5), "strided": grid[:, ::2]}
    content = {**arrays, "text": np.str_("ä"), "name": "x", "inner": {"b": grid}, "set": {1}, "bytes": b"\xff"}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    _, found = read_file(tmp_path / "a.pkl")
    for name, array in arrays.items():
        expected = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
        assert torch.equal(found[name], expected) and found[name].dtype == expected.dtype, name
        assert found[name].is_contiguous()
    assert found["text"] == "ä" and found["name"] == "x" and found["bytes"] == b"\xff"
    assert torch.equal(found["inner"]["b"], found["a"])


def test_text_of_python_2_is_read_as_bytes(tmp_path):
    data = np.array([1.5, -2.0], np.float32).tobytes()
    raw = b"U" + bytes([len(data)]) + data  # SHORT_BINSTRING, as protocol 2 of Python 2 writes bytes
    content = sweep.in_dict(sweep.array((2,), sweep.dtype("f4"), raw)).replace(b"C\x01b", b"U\x01b", 1)
    (tmp_path / "a.pkl").write_bytes(content)
    assert read_file(tmp_path / "a.pkl")[1]["model"]["stem.conv1.weight"].tolist() == [1.5, -2.0]


def test_options_beside_the_weights_are_left_out(tmp_path):
    beside = {"args": argparse.Namespace(lr=1), "best": np.float64(0.5), "where": pathlib.Path("x")}
    beside |= {"counts": defaultdict(list), "arrays": [np.arange(3)]}
    state = {"conv1.weight": torch.ones(2, 3)}
    torch.save({"state_dict": state, **beside}, tmp_path / "a.pth")
    assert torch.equal(weights.read(tmp_path / "a.pth").encoder()["conv1.weight"], torch.ones(2, 3))
    torch.save({"conv1.weight": np.ones((2, 3), np.float32)}, tmp_path / "b.pth")
    assert torch.equal(weights.read(tmp_path / "b.pth").encoder()["conv1.weight"], torch.ones(2, 3))
    torch.save({"teacher": {"module.backbone.conv1.weight": torch.ones(2, 3)}, "student": state}, tmp_path / "c.pth")
    assert weights.read(tmp_path / "c.pth").encoder()["conv1.weight"].sum() == 6


class Unknown:
    """A class of the file's own making, with state."""

    def __init__(self, *content):
        self.content = content

    def __reduce__(self):
        return Unknown, (functools.partial(print, 1),), {"content": self.content}, iter([1]), iter([(1, 2)])


def options_of_omegaconf():
    """A DictConfig as OmegaConf pickles it: metadata, and nodes that hold typing.Any, under its own classes."""

    def instance(module, name, state):
        return f"c{module}\n{name}\n)".encode("ascii") + b"\x81" + state + b"b"

    metadata = instance("omegaconf.base", "ContainerMetadata", b"}(" + sweep.body("k") + b"ctyping\nAny\nu")
    node = instance("omegaconf.nodes", "AnyNode", b"}(" + sweep.body("_val") + b"K\x01u")
    content = b"}(" + sweep.body("lr") + node + b"u"
    state = b"}(" + sweep.body("_metadata") + metadata + sweep.body("_content") + content + b"u"
    return instance("omegaconf.dictconfig", "DictConfig", state)


def test_what_a_skipped_object_holds_is_never_an_error(tmp_path):
    held = {"f": functools.partial(int, base=2), "x": Unknown(Fraction(1, 2)), "set": {Unknown, 1}, Unknown: 1}
    beside = {"args": argparse.Namespace(**{"all": held}), "losses": deque([1.0, Fraction(1, 2)], maxlen=5)}
    torch.save({"state_dict": {"conv1.weight": torch.ones(2, 3)}, **beside}, tmp_path / "a.pth")
    assert torch.equal(weights.read(tmp_path / "a.pth").encoder()["conv1.weight"], torch.ones(2, 3))
    pickled = b"\x80\x02}(" + sweep.body("cfg") + options_of_omegaconf() + sweep.body("n") + b"K\x03u."
    (tmp_path / "b.pth").write_bytes(sweep.torch_file(pickled))
    found = load(tmp_path / "b.pth")
    assert found["n"] == 3 and repr(found["cfg"]) == "<omegaconf.dictconfig.DictConfig, not read>"


@pytest.mark.parametrize("make", [Unknown, lambda: [{"a": (Unknown(),)}], lambda: Unknown, lambda: {"p": {Unknown()}}])
def test_a_foreign_object_is_an_error_where_it_can_be_reached(tmp_path, make):
    torch.save({"state_dict": {}, "x": make()}, tmp_path / "a.pth")
    if isinstance(make(), dict):  # a member of a set is left out as a key is
        assert load(tmp_path / "a.pth")["x"] == {"p": set()}
        return
    with pytest.raises(weights.WeightsError, match=r"a\.pth.*: test_weight_files\.Unknown\. "):
        load(tmp_path / "a.pth")


def test_keys_other_than_text(tmp_path):
    keys = {torch.float32: 1, ((1, "a"), (2, (3,))): 2, frozenset({1, (2, "b")}): 3, (1, torch.int8): 4}
    torch.save(keys | {Unknown: {"best": 1}, (1, Unknown): 5}, tmp_path / "a.pt")  # as old Lightning's callbacks
    assert load(tmp_path / "a.pt") == keys
    torch.save({tuple(range(100)): 1}, tmp_path / "b.pt")
    with pytest.raises(weights.WeightsError, match=r"b\.pt.*dict keys of more than 64 values"):
        load(tmp_path / "b.pt")


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_expanded_tensors_come_back_with_memory_of_their_own(tmp_path, as_zip):
    written = {"std": torch.tensor([0.5]).expand(3), "grid": torch.arange(4.0)[1:3, None].expand(2, 5)}
    torch.save(written, tmp_path / "a.pt", _use_new_zipfile_serialization=as_zip)
    found = load(tmp_path / "a.pt")
    for name, tensor in written.items():
        assert torch.equal(found[name], tensor) and found[name].is_contiguous()
    torch.save({"a": torch.tensor([0.5]).expand(1 << 22)}, tmp_path / "b.pt", _use_new_zipfile_serialization=as_zip)
    with pytest.raises(weights.WeightsError, match="many times larger than the file"):
        load(tmp_path / "b.pt")


def test_a_file_without_checksums_is_read_where_a_digest_matches(tmp_path):
    path, had = tmp_path / "a.pt", torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        torch.save({"a": torch.arange(3)}, path)
    finally:
        torch.serialization.set_crc32_options(had)
    with pytest.raises(
        weights.WeightsError, match=r"a\.pt.*no checksums.*set_crc32_options.*sha256sum a\.pt > a\.pt\.sha"
    ):
        load(path)
    atomic_files.sidecar_of(path).write_text(f"{atomic_files.digest_of(path)}  a.pt\n")
    assert load(path)["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("blocks, digest", [(0, False), (1, True)])
def test_a_whole_file_on_a_file_system_that_counts_few_blocks(tmp_path, monkeypatch, blocks, digest):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.arange(3)}, path)
    if digest:
        atomic_files.sidecar_of(path).write_text(f"{atomic_files.digest_of(path)}  a.pt\n")
    status = SimpleNamespace(st_mode=path.stat().st_mode, st_size=2 << 30, st_blocks=blocks)
    monkeypatch.setattr("scrl_fast.weights.file_kinds.os", SimpleNamespace(stat=lambda path: status))
    assert check_regular(path) is status
    atomic_files.sidecar_of(path).write_text("0" * 64)
    status.st_blocks = 1
    with pytest.raises(weights.WeightsError, match="a sparse file"):
        check_regular(path)


@pytest.mark.parametrize("config", [[1], "x", 3])
def test_metadata_of_another_kind_is_left_out(tmp_path, config):
    state = {"backbone.conv1.weight": torch.ones(2, 3)}
    torch.save({"meta": {"scrl_fast": "1", "config": json.dumps(config)}, "state_dict": state}, tmp_path / "a.pth")
    torch.save({"__metadata__": [config], "conv1.weight": torch.ones(2, 3)}, tmp_path / "b.pth")
    for name in ("a.pth", "b.pth"):
        found = weights.read(tmp_path / name)
        assert not isinstance(found.metadata.get("config", {}), (list, str, int)) and parameter_order(found)
    assert parameter_order(weights.Weights("a", "scrl_fast", {}, {"config": config})) == [[]]


def test_an_object_of_another_class_is_named_with_the_way_round(tmp_path):
    torch.save({"state_dict": {}, "ratio": Fraction(1, 2)}, tmp_path / "a.pth")
    with pytest.raises(weights.WeightsError, match=r"a\.pth.*: fractions\.Fraction\. .*python -c .*weights_only=False"):
        weights.read(tmp_path / "a.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "b.pth")
    with pytest.raises(weights.WeightsError, match=r"b\.pth.*: torch\.nn\.modules\.linear\.Linear\. .*state_dict"):
        weights.read(tmp_path / "b.pth")


def test_onnx_reads_every_type_and_data_beside_the_graph(folder):
    onnx = pytest.importorskip("onnx", reason="onnx is in the extra 'export'")
    kinds = ("float32", "float16", "float64", "int8", "uint8", "int16", "int32", "int64", "uint32", "uint64", "bool")
    expected, tensors = {}, []
    for kind in kinds:
        array = np.array([[0, 1, 5], [-3, 2, 1]]).astype(kind)
        number = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        tensors += [onnx.numpy_helper.from_array(array, kind)]
        tensors += [onnx.helper.make_tensor(f"{kind} unpacked", number, array.shape, array.flatten().tolist())]
        expected |= {kind: array, f"{kind} unpacked": array}
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], tensors))
    for name, beside in (("a.onnx", False), ("b.onnx", True)):
        onnx.save(model, str(folder / name), save_as_external_data=beside, size_threshold=0, location="w.bin")
        _, found = read_file(folder / name)
        assert all(np.array_equal(found[kind].numpy(), array) for kind, array in expected.items())
    (folder / "c.onnx").write_bytes(sweep.external("data.bin"))
    assert read_file(folder / "c.onnx")[1]["conv1.weight"].tolist() == [0, 1]


def test_safetensors_are_read_as_the_library_reads_them(tmp_path):
    library = pytest.importorskip("safetensors.torch", reason="safetensors is an extra")
    state = {"a": torch.randn(3, 4), "b": torch.zeros(0, 2), "c": torch.randn(4).bfloat16(), "d": torch.tensor(3)}
    library.save_file(state, tmp_path / "a.safetensors", metadata={"epoch": "3"})
    _, found = read_file(tmp_path / "a.safetensors")
    assert found.pop("__metadata__") == {"epoch": 3}
    assert_same(dict(sorted(found.items())), state)
    torch.save(state, tmp_path / "b.safetensors")  # a name that lies
    (tmp_path / "a.safetensors").rename(tmp_path / "c.pth")
    for name in ("b.safetensors", "c.pth"):
        assert torch.equal(read_file(tmp_path / name)[1]["a"], state["a"])


# ---- files in the place of weights ----


def tar_of(*names):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


def packed(*names):
    """A zip archive whose entries are compressed, as torch.jit.save does with code, np.savez_compressed with arrays."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, bytes(1000))
    return buffer.getvalue()


OTHER_KINDS = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"),
    "page": (b"\n<!DOCTYPE html><html>404</html>", "HTML page.*download the file itself"),
    "server's error": (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "XML.*AccessDenied"),
    "answer": (b'{"error": "Invalid username or password."}', "JSON text.*Invalid username"),
    "text": ("Datei nicht gefunden, später\n".encode(), "text file.*Datei nicht gefunden"),
    "gzip": (gzip.compress(b"a"), "compressed by gzip.*gunzip"),
    "xz": (b"\xfd7zXZ\0" + bytes(20), "compressed by xz"),
    "tar": (tar_of("weights.pth"), "tar archive: unpack"),
    "old torch": (tar_of("sys_info", "pickle"), "torch's tar format of before 0.1.10"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(20), "HDF5 file"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(20), "an image"),
    "zeros": (bytes(4096), "nothing but zeros"),
    "empty": (b"", "is damaged: it is empty"),
    "archive": (sweep.stored({"word/document.xml": b"x"}), "zip archive that torch did not write"),
    "arrays": (sweep.stored({"a.npy": b"x"}), "NumPy archive"),
    "script": (sweep.torch_file(b"\x80\x02}.", **{"a/constants.pkl": b"\x80\x02)."}), "TorchScript.*jit.load"),
    "exported": (sweep.stored({"a/archive_format": b"pt2", "a/models/model.json": b"{}"}), "program of torch.export"),
    "packed script": (packed("a/code/__torch__/a.py", "a/data.pkl", "a/constants.pkl"), "TorchScript.*jit.load"),
    "packed arrays": (packed("a.npy", "b.npy"), "NumPy archive"),
    "Keras": (packed("metadata.json", "config.json", "model.weights.h5"), "Keras archive"),
    "packed": (packed("a/data.pkl"), "its entry 'a/data.pkl' is compressed"),
    "half": (sweep.whole_files()[".pt"][:300], "cut off"),
    "lengthened": (sweep.whole_files()[".pt"] + bytes(100), "100 bytes stand behind the end of its archive"),
    "zeros at the end": (sweep.whole_files()[".pt"][:300] + bytes(999), "its last 999 bytes are zeros"),
    "far": (sweep.whole_files()[".pt"] + bytes(2 << 20), "its last 1048576 or more bytes are zeros"),
}


@pytest.mark.parametrize("name", OTHER_KINDS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_files_are_called_what_they_are(tmp_path, name, suffix):
    content, message = OTHER_KINDS[name]
    (tmp_path / f"a{suffix}").write_bytes(content)
    with pytest.raises(weights.WeightsError, match=rf"a{suffix}.*{message}"):
        weights.read(tmp_path / f"a{suffix}")


def test_programs_of_torch_are_named_as_torch_writes_them(tmp_path):
    class Scaled(torch.nn.Module):
        def forward(self, x):
            y = x * 2 + 1 + 2 * 3 * x + 4 * x + 5 * x - 6 * x - 7 * x + 8 * x + 9 * x  # torch packs longer code alone
            return y + 1 + 2 * 3 * y + 4 * y + 5 * y - 6 * y - 7 * y + 8 * y + 9 * y

    torch.jit.script(Scaled()).save(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert any(entry.compress_type == zipfile.ZIP_DEFLATED for entry in archive.infolist())
    with pytest.raises(weights.WeightsError, match=r"a\.pt.*TorchScript archive.*jit\.load"):
        weights.read(tmp_path / "a.pt")
    torch.export.save(torch.export.export(Scaled(), (torch.ones(2),)), tmp_path / "b.pt2")
    with pytest.raises(weights.WeightsError, match=r"b\.pt2.*program of torch\.export.*export\.load"):
        weights.read(tmp_path / "b.pt2")


def test_what_is_no_regular_file_is_not_opened(folder):
    with open(folder / "sparse.pkl", "wb") as file:
        file.write(pickle.dumps({"a": bytes(1 << 16)}))
        file.truncate(1 << 40)
    devices = [(path, "a device") for path in ("/dev/zero", "/dev/urandom") if os.path.exists(path)]
    for path, message in [(folder / "pipe", "a named pipe"), (folder / "sparse.pkl", "a sparse file"), *devices]:
        for reader in (weights.read, load):
            with pytest.raises(weights.WeightsError, match=rf"{path}.*{message}"):
                reader(path)
    with pytest.raises(weights.WeightsError, match=r"no checkpoint in .*folder"):
        weights.read(folder / "folder")
