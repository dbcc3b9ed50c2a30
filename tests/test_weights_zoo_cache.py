"""Files in the caches of --init=torchvision, timm and hf-hub: what is cut, foreign or of another network is refused by
name with the way round, and what is whole is read. No network is asked."""

from __future__ import annotations

import io
import json
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from scrl_fast import weights
from scrl_fast.atomic_files import digest_of
from scrl_fast.models import build_encoder
from scrl_fast.weights import zoo
from scrl_fast.weights.errors import WeightsError

State = dict[str, Tensor]
TIMM = "timm:test_resnet"
REPOSITORY = {"timm": "timm/test_resnet.r160_in1k", "hub": "me/net"}


def torch_file(content: object, *, new: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


def foreign() -> Iterator[tuple[str, bytes]]:
    """What people and servers leave in the place of a file of weights."""
    yield "empty", b""
    yield "zeros", bytes(5000)
    yield "LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 46830571\n"
    for name, page in {
        "page": b"<!DOCTYPE html><html><body>Sign in</body></html>",
        "page with a BOM": b"\xef\xbb\xbf\r\n<html><head></head></html>",
        "error of a store": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "error of a server": b'{"error": "Invalid credentials in Authorization header"}',
        "text": b"Access denied by proxy. Ask your administrator.\n",
    }.items():
        yield name, page
        yield f"{name}, long", page + b" " * 100_000
    for name, start in {
        "gzip": b"\x1f\x8b\x08\0",
        "xz": b"\xfd7zXZ\0",
        "zstd": b"\x28\xb5\x2f\xfd",
        "image": b"\x89PNG\r\n\x1a\n",
        "pdf": b"%PDF-1.7\n",
        "hdf5": b"\x89HDF\r\n\x1a\n",
        "gguf": b"GGUF\3\0\0\0",
        "program": b"\x7fELF\2\1\1",
        "noise": bytes(range(255, 0, -1)),
    }.items():
        yield name, start + bytes(range(256)) * 40
    yield "header of 2^62 bytes", struct.pack("<Q", 1 << 62) + b"{" + b" " * 100
    yield "header that is no JSON", struct.pack("<Q", 64) + b"{" * 64 + bytes(100)
    yield "list", torch_file([torch.zeros(3)])
    yield "code", b"\x80\x02cposix\nsystem\nU\x04true\x85R."
    yield "no tensors", torch_file({"epoch": 3})


def cut(data: bytes) -> Iterator[tuple[str, bytes]]:
    for size in sorted({1, 7, 8, 9, 100, 4096, len(data) // 3, len(data) // 2, len(data) - 4096, len(data) - 1}):
        yield f"cut at {size} of {len(data)}", data[:size]


def of_other_networks(state: State) -> Iterator[tuple[str, State]]:
    first = next(name for name, tensor in state.items() if tensor.ndim == 4)
    yield "shape", state | {first: torch.zeros(2, 2, 3, 3)}
    yield "rank", state | {first: torch.zeros(8)}
    yield "missing", {name: tensor for name, tensor in state.items() if name != first}
    yield "names", {f"block.{name}": tensor for name, tensor in state.items() if "conv1" not in name}
    yield "nan", state | {first: state[first] * float("nan")}
    yield "integers", state | {first: state[first].to(torch.int8)}
    yield "one tensor", {"x": torch.zeros(3)}
    yield "half", dict(list(state.items())[: len(state) // 2])


class Cache:
    """One place where a zoo looks: writes a file there and reads it as --init does."""

    def __init__(self, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if kind == "timm":
            pytest.importorskip("timm")
        if kind in REPOSITORY:
            pytest.importorskip("huggingface_hub.constants")
        self.kind, self.folder = kind, folder
        self.backbone = TIMM if kind == "timm" else "resnet10_tiny"
        self.init = {"torchvision": "torchvision", "timm": "timm"}.get(kind, "hf-hub:me/net")
        torch.manual_seed(0)
        self.encoder = build_encoder(self.backbone)
        self.state: State = {name: t.clone() for name, t in self.encoder.body.state_dict().items()}
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder))
        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("downloaded"))
        if kind == "torchvision":
            self.file, self.suffixes = folder / "checkpoints" / "net.pth", (".pth",)
            self._stub_torchvision(monkeypatch)
        else:
            self._make_hub(monkeypatch)
            self.suffixes = (".safetensors", ".bin")

    def _stub_torchvision(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torchvision

        cache = self

        class Chosen:
            @property
            def url(self) -> str:
                return f"https://download.example/models/{cache.file.name}"

            def get_state_dict(self, **_: object) -> None:
                pytest.fail("downloaded")

        monkeypatch.setattr(zoo, "TORCHVISION_NAMES", (self.backbone,))
        monkeypatch.setattr(torchvision.models, "get_model_weights", lambda _: {"IMAGENET1K_V1": Chosen()})

    def _make_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(self.folder))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        if self.kind == "timm":
            monkeypatch.setattr("timm.models._hub.HF_HUB_OFFLINE", True, raising=False)
        repository = self.folder / f"models--{REPOSITORY[self.kind].replace('/', '--')}"
        self.snapshot, self.blobs = repository / "snapshots" / ("a" * 40), repository / "blobs"
        for made in (self.snapshot, self.blobs, repository / "refs"):
            made.mkdir(parents=True)
        (repository / "refs" / "main").write_text("a" * 40)

    def write(self, data: bytes, suffix: str) -> Path:
        """The file that is to be removed so that it comes anew."""
        if self.kind == "torchvision":
            self.file.parent.mkdir(exist_ok=True)
            for old in self.file.parent.iterdir():
                old.unlink()
            self.file.write_bytes(data)
            named = self.file.with_name(f"net-{digest_of(self.file)[:8]}.pth")
            self.file = self.file.rename(named)
            return self.file
        for old in self.snapshot.iterdir():
            old.unlink()
        name = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
        (self.blobs / suffix).write_bytes(data)
        (self.snapshot / name).symlink_to(os.path.join("..", "..", "blobs", suffix))
        return self.blobs / suffix

    def whole_state(self) -> State:
        """As the zoo's file holds it."""
        if self.kind != "timm":
            return self.state
        import timm

        torch.manual_seed(1)
        return {name: tensor.clone() for name, tensor in timm.create_model("test_resnet").state_dict().items()}

    def content(self, state: State, suffix: str) -> bytes:
        return save({n: t.contiguous() for n, t in state.items()}) if suffix == ".safetensors" else torch_file(state)

    def load(self) -> None:
        source = zoo.read_initial(self.init, self.backbone)
        weights.load_into(self.encoder, source)


@pytest.fixture(params=["torchvision", "timm", "hub"])
def cache(request, tmp_path, monkeypatch):
    return Cache(request.param, tmp_path, monkeypatch)


def refused(cache: Cache, name: str, file: Path, way_round: bool) -> None:
    before = {key: tensor.clone() for key, tensor in cache.encoder.body.state_dict().items()}
    start = time.process_time()
    with pytest.raises(WeightsError) as error:
        cache.load()
    said = str(error.value)
    assert time.process_time() - start < 20, name
    if way_round:
        assert f"init={cache.init}: " in said and str(file) in said and "downloaded again" in said, (name, said)
        assert "cannot be downloaded" not in said, (name, said)
    else:
        assert any(word in said for word in (cache.backbone, "resnet", "tensor", "floats", "finite")), (name, said)
    assert "\n" not in said and len(said) < 1500, (name, said)
    after = cache.encoder.body.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before), f"{name}: written before it was refused"


def test_a_file_in_a_cache_is_read_or_refused_by_name(cache) -> None:
    tried = 0
    for suffix in cache.suffixes:
        whole = cache.content(cache.whole_state(), suffix)
        cache.write(whole, suffix)
        cache.load()
        for name, data in (*foreign(), *cut(whole)):
            file = cache.write(data, suffix)
            refused(cache, f"{suffix}: {name}", file, way_round=True)
            tried += 1
        for name, state in of_other_networks(cache.whole_state()):
            cache.write(cache.content(state, suffix), suffix)
            refused(cache, f"{suffix}: {name}", Path(), way_round=False)
            tried += 1
        cache.write(whole, suffix)
        cache.load()
    assert tried >= 40


def test_old_torch_files_are_read(cache) -> None:
    suffix = cache.suffixes[-1]
    data = torch_file(cache.whole_state(), new=False)
    cache.write(data, suffix)
    cache.load()
    for name, part in cut(data):
        refused(cache, name, cache.write(part, suffix), way_round=True)


def test_a_file_of_torchvision_must_be_what_its_name_says(tmp_path, monkeypatch) -> None:
    cache = Cache("torchvision", tmp_path, monkeypatch)
    cache.write(torch_file(cache.state), ".pth")
    cache.load()
    cache.file = cache.file.rename(cache.file.with_name("net-00000000.pth"))
    refused(cache, "digest", cache.file, way_round=True)


@pytest.mark.parametrize("kind", ["fifo", "folder", "broken link"])
def test_what_is_no_file_in_a_cache_is_named(cache, kind) -> None:
    suffix = cache.suffixes[0]
    file = cache.write(b"x", suffix)
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif cache.kind == "torchvision":
        file.symlink_to("nowhere")
    with pytest.raises(WeightsError):
        cache.load()


def test_a_config_of_a_repository_that_is_an_error_page_is_named(tmp_path, monkeypatch) -> None:
    cache = Cache("hub", tmp_path, monkeypatch)
    cache.write(cache.content(cache.state, ".safetensors"), ".safetensors")
    for content in (b"<html></html>", b"\xff\xfe", b'{"backbone": ', b"[" * 100_000):
        (cache.snapshot / "config.json").write_bytes(content)
        with pytest.raises(WeightsError, match=r"config.json is not JSON"):
            cache.load()
    (cache.snapshot / "config.json").write_text(json.dumps({"mean": "x", "std": [[]], "config": 3}))
    cache.load()
