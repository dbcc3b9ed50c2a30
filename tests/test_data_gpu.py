"""Batches for a GPU to make the views of, and JPEGs for it to decode, with the CPU standing in for the GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photos import write_bad, write_formats, write_photos

from scrl_fast.config.schema import Config, DataConfig
from scrl_fast.data import (
    Batch,
    DemoScenes,
    Loader,
    PackedBatch,
    batch_builder,
    gpu,
    make_source,
    on_device,
    views_on_gpu,
)
from scrl_fast.ops.view_table import VIEW_DTYPE

CPU = torch.device("cpu")


def config_of(root: Path | None = None, **data: Any) -> Config:
    config = Config()
    config.train.batch_size, config.train.epochs = 4, 1
    config.views.size, config.boxes.min_size = 32, 8
    config.data = DataConfig(**{"workers": 2, "max_bad_fraction": 0.5, **data})
    if root is not None:
        config.data.source, config.data.root = "folder", str(root)
    return config


def batches(source: Any, config: Config, **options: Any) -> list[Any]:
    made = Loader(source, config, **options)
    try:
        return list(made.epoch(0))
    finally:
        made.close()


def assert_same(made: Batch, plain: Batch) -> None:
    assert torch.equal(made.views, plain.views) and made.views.stride() == plain.views.stride()
    assert torch.equal(made.crops, plain.crops) and torch.equal(made.keys, plain.keys)
    assert torch.equal(made.labels, plain.labels)
    assert made.boxes is not None and plain.boxes is not None and torch.equal(made.boxes[1], plain.boxes[1])


# ---- views made where the images arrive ----


@pytest.mark.parametrize("workers", [0, 3])
def test_packed_images_give_the_views_of_the_loader(workers: int, tmp_path: Path) -> None:
    write_photos(tmp_path, 9, 150, 210)  # photographs whose crops leave something out
    config = config_of(tmp_path, workers=workers)
    source = make_source(config)
    packed, plain = batches(source, config, packed=True), batches(source, config)
    assert len(packed) == len(plain) == 2
    for ours, theirs in zip(packed, plain, strict=True):
        assert isinstance(ours, PackedBatch)
        assert_same(ours.make("cpu", config.views), theirs)
        assert ours.images.buffer.nbytes < 4 * 150 * 210 * 3  # no more than both crops cover
        (half,) = on_device((b for b in [ours]), "cpu", config.views, dtype=torch.bfloat16)
        assert torch.equal(half.views, theirs.views.bfloat16())


def test_batches_too_large_come_with_their_views(monkeypatch: pytest.MonkeyPatch) -> None:
    source, config = DemoScenes(8, 48), config_of()
    plain = batches(source, config, dtype=torch.uint8)
    monkeypatch.setattr(batch_builder, "_MOST_PACKED", 4 * 48 * 48 * 3 // 2)
    for ours, theirs in zip(batches(source, config, packed=True, dtype=torch.uint8), plain, strict=True):
        assert isinstance(ours, Batch)
        assert_same(ours, theirs)


def test_images_held_are_freed_as_soon_as_the_batch_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    pack = batch_builder.pack_regions

    def spy(images: Any, **options: Any) -> Any:
        made.append(sum(one is not None for one in held.pop()._images) if held else -1)
        return pack(images, **options)

    held: list[Any] = []
    keep = batch_builder.BatchBuilder._keep

    def watch(self: Any, *rest: Any) -> None:
        held.append(self)
        keep(self, *rest)

    monkeypatch.setattr(batch_builder, "pack_regions", spy)
    monkeypatch.setattr(batch_builder.BatchBuilder, "_keep", watch)
    monkeypatch.setattr(batch_builder, "_MOST_PACKED", 0)
    monkeypatch.setattr(batch_builder, "_MOST_HELD", 1)  # image by image
    batches(DemoScenes(4, 48), config_of(workers=1), packed=True, dtype=torch.uint8)
    assert made == [0, 0, 0, 0]  # none but the one whose views are being made


def test_a_small_region_does_not_keep_its_image() -> None:
    rows = np.zeros(2, VIEW_DTYPE)
    rows["y"], rows["x"], rows["h"], rows["w"] = 10, [20, 30], 30, 40
    image = np.arange(100 * 100 * 3, dtype=np.uint8).reshape(100, 100, 3)
    region = gpu.cut_to_views(image, rows)
    assert np.array_equal(region, image[10:40, 20:70]) and not np.shares_memory(region, image)
    assert rows["x"].tolist() == [0, 10] and rows["y"].tolist() == [0, 0]
    rows["y"], rows["x"], rows["h"], rows["w"] = 0, [0, 2], 98, 98
    assert np.shares_memory(gpu.cut_to_views(image, rows), image)  # a copy would save next to nothing


# ---- JPEGs decoded there ----


def test_decoded_elsewhere_the_pictures_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every format; EXIF rotation, PNG, CMYK and progressive files take the CPU's way, plain JPEGs the other."""
    write_formats(tmp_path / "formats")
    write_photos(tmp_path / "photos", 5)
    config = config_of(tmp_path, scaled_decode=False)  # that is the CPU's alone
    source = make_source(config)
    decoded = gpu.decode_on_gpu([source.open(key) for key in range(len(source))], CPU)
    names = {Path(source.name_of(key)).name for key in decoded}
    assert {"photo.jpg", "0000.jpg"} <= names and not names & {"turned.jpg", "cmyk.jpg", "rgb.png", "wrong-name.jpg"}
    read: list[int] = []
    data = source.data
    monkeypatch.setattr(source, "data", lambda index: read.append(index) or data(index))
    ours = batches(source, config, packed=True, gpu=CPU)
    assert len(read) == len(set(read)) == 4 * len(ours)  # also those that the CPU decodes
    for made, plain in zip(ours, batches(source, config), strict=True):
        assert_same(made.make("cpu", config.views), plain)


def test_decoded_images_of_a_large_batch_are_copied_on_the_stream_that_decoded_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(tmp_path, 4, 150, 210)
    config = config_of(tmp_path, scaled_decode=False)
    source = make_source(config)
    plain = batches(source, config, dtype=torch.uint8)
    streams: list[Any] = []
    beside = gpu._beside_training
    monkeypatch.setattr(gpu, "_beside_training", lambda device: streams.append(device) or beside(device))
    monkeypatch.setattr(batch_builder, "_MOST_PACKED", 0)
    for ours, theirs in zip(batches(source, config, packed=True, gpu=CPU, dtype=torch.uint8), plain, strict=True):
        assert_same(ours, theirs)
    assert len(streams) >= 5 and set(streams) == {CPU}


def test_why_the_gpu_decodes_nothing_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(files: Any, device: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    write_photos(tmp_path, 8)
    config = config_of(tmp_path)
    source = make_source(config)
    monkeypatch.setattr(gpu, "_decode", fails)
    monkeypatch.setattr(gpu, "_told", set())
    with caplog.at_level("WARNING", "scrl_fast"):
        assert len(batches(source, config, packed=True, gpu=CPU)) == 2
    (told,) = [record.getMessage() for record in caplog.records]
    assert "data.decode=gpu" in told and told.endswith("OutOfMemoryError: CUDA out of memory.")


def test_damaged_files_are_named_and_replaced_as_ever(tmp_path: Path) -> None:
    write_photos(tmp_path, 8)
    bad = write_bad(tmp_path)
    config = config_of(tmp_path)
    source = make_source(config)
    made = Loader(source, config, packed=True, gpu=CPU)
    keys = [int(key) for batch in made.epoch(0) for key in batch.keys]
    made.close()
    assert len(keys) == 12 and set(made.bad_files) == {str(path) for path in bad}
    assert not {source.name_of(key) for key in keys} & set(made.bad_files)


# ---- what cannot be had ----


@pytest.mark.parametrize(
    "options, device, message",
    [
        ({"pixels": "gpu"}, "cpu", r"data\.pixels=gpu .* training runs on the CPU; use --data\.pixels=cpu"),
        ({"decode": "gpu"}, "cpu", r"data\.decode=gpu .* training runs on the CPU; use --data\.decode=cpu"),
        ({"decode": "gpu", "pixels": "cpu"}, "cuda", r"data\.decode=gpu .* data\.pixels=cpu"),
        ({"decode": "gpu"}, "cuda", r"data\.decode=gpu .* no nvJPEG here; use --data\.decode=cpu"),
    ],
)
def test_refused(options: dict[str, Any], device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "triton_failure", lambda device: "")
    monkeypatch.setattr(gpu, "gpu_decoder_failure", lambda device: "no nvJPEG here")
    with pytest.raises(ValueError, match=message):
        views_on_gpu(DataConfig(**options), torch.device(device))


def test_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "triton_failure", lambda device: "")
    assert views_on_gpu(DataConfig(), torch.device("cuda")) and not views_on_gpu(DataConfig(), CPU)
    assert not views_on_gpu(DataConfig(pixels="cpu"), torch.device("cuda"))
    monkeypatch.setattr(gpu, "triton_failure", lambda device: "triton is not installed")
    assert not views_on_gpu(DataConfig(), torch.device("cuda"))
    with pytest.raises(ValueError, match="triton is not installed"):
        views_on_gpu(DataConfig(pixels="gpu"), torch.device("cuda"))


def test_why_a_decoder_cannot_be_had() -> None:
    assert gpu.gpu_decoder_failure(CPU) == ""
    if not torch.cuda.is_available():
        assert gpu.gpu_decoder_failure(torch.device("cuda")).startswith("torchvision.io.decode_jpeg on cuda: ")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("decode", ["cpu", "gpu"])
def test_on_a_gpu(decode: str, tmp_path: Path) -> None:
    device = torch.device("cuda")
    if decode == "gpu" and (failure := gpu.gpu_decoder_failure(device)):
        pytest.skip(failure)
    write_photos(tmp_path, 12, 150, 210)
    config = config_of(tmp_path)
    source = make_source(config)
    plain = batches(source, config)
    made = Loader(source, config, packed=True, pin_memory=True, gpu=device if decode == "gpu" else None)
    for ours, theirs in zip(on_device(made.epoch(0), device, config.views), plain, strict=True):
        off = (ours.views.cpu() - theirs.views).abs() * 255 * torch.tensor(config.views.std).view(3, 1, 1)
        assert off.mean() <= (1 if decode == "gpu" else 0.1) and np.array_equal(ours.keys, theirs.keys)
        del ours
        torch.empty(1 << 22, device=device).fill_(float("nan"))  # what was freed too soon is overwritten
    made.close()
