"""From JPEG files to two normalised views per image: images a second, for every pipeline at hand.

Four groups of cases: whole pipelines on one core; their stages, each alone on decoded images; decoders; loaders over
workers.
Images are real photographs out of scikit-image, 500 x 375, JPEG quality 90.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from input_rivals import (
    Albumentations,
    Dali,
    DaliDecode,
    Kornia,
    Pillow,
    Pipeline,
    TorchvisionV2,
    ViewsDataset,
    available,
    covered,
)
from PIL import Image
from torch import Tensor

from scrl_fast.config.schema import BoxesConfig, Config, DataConfig, ModelConfig, TrainConfig, ViewsConfig
from scrl_fast.data import Loader, make_source
from scrl_fast.data.decode import Encoded, PixelBuffer, decode
from scrl_fast.data.gpu import cut_to_views, pack_regions
from scrl_fast.data.jpeg import decoders, jpeg_decoder
from scrl_fast.data.views import draw_views
from scrl_fast.ops.augment_views import augment_views
from scrl_fast.ops.view_table import pack_images
from scrl_fast.run.numerics import keep_memory

HEIGHT, WIDTH = 375, 500
_COLOUR = ("jitter", "grayscale", "blur", "solarize")
_PHOTOS = ("astronaut", "coffee", "cat", "rocket", "retina", "hubble_deep_field")


def photographs(count: int) -> list[bytes]:
    """JPEG files: `count` different regions of real photographs."""
    import skimage.data

    rng, files = np.random.default_rng(0), []
    for index in range(count):
        photo = Image.fromarray(getattr(skimage.data, _PHOTOS[index % len(_PHOTOS)])())
        side = rng.uniform(0.7, 1)
        w = min(photo.width, photo.height * 4 / 3) * side
        x, y = rng.uniform(0, photo.width - w), rng.uniform(0, photo.height - 0.75 * w)
        region = photo.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS, (x, y, x + w, y + 0.75 * w))
        buffer = io.BytesIO()
        region.save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def views_of(config: ViewsConfig, count: int) -> np.ndarray:
    return draw_views(config, [(HEIGHT, WIDTH)] * count, seed=0, epoch=0, keys=np.arange(count))


class Ours(Pipeline):
    """What a thread of the loader does with its part of a batch: open all, then decode each and make its views, in the
    memory of the batch."""

    def __init__(self, *args: Any, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        super().__init__(*args)
        self._dtype, self._buffer = dtype, PixelBuffer(1 << 24)
        self._options = {"size": self.config.size, "mean": self.config.mean, "std": self.config.std, **options}

    def __call__(self) -> Tensor:
        shape, layout = (self.table.size, 3, self.config.size, self.config.size), torch.channels_last
        out, table = torch.empty(shape, dtype=self._dtype, memory_format=layout), self.table.T.copy()
        table["image"] = 0
        opened = [Encoded(jpeg, max_pixels=1 << 24) for jpeg in self.jpegs]
        for place, (image, rows) in enumerate(zip(opened, table, strict=True)):
            packed = pack_images([image.decode(buffer=self._buffer)])
            augment_views(packed, rows, out=out[place :: len(opened)], checked=True, **self._options)
        return out

    def decode(self, jpeg: bytes) -> np.ndarray:
        return decode(jpeg, max_pixels=1 << 24)


class OursOnGpu(Ours):
    """What the loader and a GPU do together: decode, pack into pinned memory, copy, make all views there."""

    def __call__(self) -> Tensor:
        table = self.table.copy()
        regions = [cut_to_views(self.decode(jpeg), rows) for jpeg, rows in zip(self.jpegs, table.T, strict=True)]
        packed = pack_regions(regions, pin_memory=True).to("cuda")
        return augment_views(packed, table, dtype=torch.bfloat16, **self._options)


def whole_pipelines(bench: harness.Bench, config: ViewsConfig, images: int) -> None:
    jpegs, table = photographs(images), views_of(config, images)
    arguments = (jpegs, table, config)
    ours = Ours(*arguments)
    bfloat16, uint8 = (Ours(*arguments, dtype=dtype) for dtype in (torch.bfloat16, torch.uint8))
    providers: dict[str, Callable[[], Any]] = {
        "scrl_fast/float32": ours,
        "scrl_fast/bfloat16": bfloat16,
        "scrl_fast/uint8": uint8,
        f"scrl_fast/decode only ({jpeg_decoder()})": lambda: [ours.decode(jpeg) for jpeg in jpegs],
    }
    if bench.device.type == "cuda":
        providers["scrl_fast/GPU pixels"] = OursOnGpu(*arguments)
    providers |= {name: rival(*arguments) for name, rival in available().items()}

    def agree() -> None:  # levels, so that the tolerance is the promised one
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
        made = ours()
        off = (made - Ours(*arguments, backend="reference")()).abs() * 255 * std
        assert off.mean() <= 1 and (off > 4.5).float().mean() <= 0.001, f"mean {off.mean():.3f} levels off"
        assert torch.equal(bfloat16(), made.bfloat16()), "bfloat16 is not float32, rounded"
        assert torch.equal(uint8(), ((made * std + mean) * 255).round().byte()), "uint8 is not float32's levels"
        uncoloured = table.copy()
        for field in _COLOUR:
            uncoloured[field] = 0
        # Another decoder, another cubic filter, DALI's one order of the colours: measured 0.02 to 0.75 of 255 levels
        # after the crop alone, 0.5 to 7.6 after everything.
        for rows, most in ((uncoloured, 2), (table, 12)):
            plain = Pillow(jpegs, rows, config)()
            for name, rival in available(quiet=True).items():
                if rival is not Kornia:
                    theirs = (rival(jpegs, rows, config)() - plain).abs().mean() * 255 * min(config.std)
                    assert theirs < most, f"the pictures of {name} differ from Pillow's by {theirs:.1f} levels"

    name = harness.case_name("jpeg to two views", size=config.size, blur=config.blur)
    bench.case(name, providers, items=images, check=agree)


def pixels_on_gpu(bench: harness.Bench, config: ViewsConfig, images: int = 256) -> None:
    """Decoded images to views in bfloat16, on the GPU; rivals start from images that lie there already."""
    table = views_of(config, images)
    decoded = [decode(jpeg, max_pixels=1 << 24) for jpeg in photographs(16)] * (images // 16)
    pinned = pack_regions(decoded, pin_memory=True)
    there, tensors = pinned.to("cuda"), [torch.from_numpy(image).permute(2, 0, 1).cuda() for image in decoded]
    options = {"size": config.size, "mean": config.mean, "std": config.std, "dtype": torch.bfloat16}
    v2 = TorchvisionV2([], table, config)

    def agree() -> None:
        ours = augment_views(there, table[:, :16].copy(), **options | {"dtype": torch.uint8}).cpu().int()
        theirs = augment_views(pinned.numpy(), table[:, :16].copy(), **options | {"dtype": torch.uint8}).int()
        off = (ours - theirs).abs()
        assert off.float().mean() <= 1 and (off > 4).float().mean() <= 0.001

    bench.case(
        harness.case_name("decoded to two views on the GPU", images=images, size=config.size),
        {
            "scrl_fast/triton": lambda: augment_views(there, table, **options),
            "scrl_fast/triton with the copy": lambda: augment_views(pinned.to("cuda"), table, **options),
            "torchvision/v2": lambda: views(v2, tensors, table),
        },
        items=images,
        dtype="bfloat16",
        check=agree,
    )


def stages(bench: harness.Bench, config: ViewsConfig, images: int) -> None:
    """Decoding, then what each stage adds to the crop, on decoded images; two float32 views an image, normalised."""
    jpegs, table = photographs(images), views_of(config, images)
    providers = {"scrl_fast": Ours, "pillow": Pillow, "torchvision": TorchvisionV2}
    calls = {name: each(jpegs, table, config) for name, each in providers.items()}
    bench.case(
        harness.case_name("stage decode", size=config.size),
        {name: lambda p=p: [p.decode(jpeg) for jpeg in jpegs] for name, p in calls.items()},
        items=images,
        dtype="uint8",
    )
    for name, fields in (
        ("crop", ()),
        ("crop + jitter", ("jitter",)),
        ("crop + blur", ("blur",)),
        ("all", _COLOUR),
    ):
        rows = table.copy()
        for field in set(_COLOUR) - set(fields):
            rows[field] = 0
        stage(bench, harness.case_name(f"stage {name}", size=config.size), (jpegs, rows, config))


def stage(bench: harness.Bench, case: str, arguments: tuple[Any, ...]) -> None:
    jpegs, rows, config = arguments
    decoded = [decode(jpeg, max_pixels=1 << 24) for jpeg in jpegs]
    pictures = [Image.fromarray(image) for image in decoded]
    rivals: dict[str, Callable[[], Any]] = {}
    if "albumentations" in (known := available(quiet=True)):
        albumentations = known["albumentations"](*arguments)
        rivals["albumentations"] = lambda: views(albumentations, decoded, rows)
    tensors = [torch.from_numpy(image).permute(2, 0, 1) for image in decoded]
    packed, pillow, v2 = pack_images(decoded), Pillow(*arguments), TorchvisionV2(*arguments)
    options = {"size": config.size, "mean": config.mean, "std": config.std, "channels_last": True}
    bench.case(
        case,
        {
            "scrl_fast": lambda: augment_views(packed, rows, **options),
            "pillow": lambda: views(pillow, pictures, rows),
            "torchvision": lambda: views(v2, tensors, rows),
            **rivals,
        },
        items=len(jpegs),
    )


def views(pipeline: Pipeline, images: list[Any], table: np.ndarray) -> list[Tensor]:
    return [pipeline.view(image, row) for rows in table for image, row in zip(images, rows, strict=True)]


def jpeg_decoders(bench: harness.Bench, config: ViewsConfig, images: int) -> None:
    """Every decoder through our interface, and what decoding no more than both crops cover would gain where a decoder
    can: DALI's against itself."""
    jpegs, table = photographs(images), views_of(config, images)

    def decode_by(name: str) -> list[np.ndarray]:
        before = os.environ.get("SCRL_FAST_JPEG")
        os.environ["SCRL_FAST_JPEG"] = name
        try:
            return [decode(jpeg, max_pixels=1 << 24) for jpeg in jpegs]
        finally:
            os.environ.pop("SCRL_FAST_JPEG") if before is None else os.environ.update(SCRL_FAST_JPEG=before)

    names = [name for name, state in decoders().items() if state in ("in use", "works")]
    providers: dict[str, Callable[[], Any]] = {f"scrl_fast/{name}": lambda n=name: decode_by(n) for name in names}
    if Dali in available(quiet=True).values():
        providers["dali/whole"] = DaliDecode(jpegs, table, config)
        providers["dali/region"] = DaliDecode(jpegs, table, config, region=True)

    def agree() -> None:
        plain = decode_by("pillow")
        for name in names:
            assert all(map(np.array_equal, decode_by(name), plain)), f"the pixels of {name} are not Pillow's"
        if "dali/region" in providers:
            regions = [
                image[y : y + h, x : x + w] for image, (y, x), (h, w) in zip(plain, *covered(table), strict=True)
            ]
            for name, wanted in (("dali/whole", plain), ("dali/region", regions)):
                for theirs, image in zip(providers[name](), wanted, strict=True):
                    assert theirs.shape == image.shape, f"{name} gives {theirs.shape} for {image.shape}"
                    assert np.abs(theirs.astype(int) - image).mean() < 1, f"the pixels of {name} are not Pillow's"

    bench.case("jpeg decoders", providers, items=images, dtype="uint8", check=agree)


class BatchesDataset(torch.utils.data.Dataset[Tensor]):
    """Whole batches of ours, for the worker processes of a DataLoader: what threads are compared with."""

    def __init__(self, files: list[str], config: ViewsConfig, dtype: torch.dtype, size: int = 16) -> None:
        self.files, self.config, self.dtype, self.size = files, config, dtype, size

    def __len__(self) -> int:
        return len(self.files) // self.size

    def __getitem__(self, index: int) -> Tensor:
        files = self.files[index * self.size : (index + 1) * self.size]
        jpegs = [Path(file).read_bytes() for file in files]
        return Ours(jpegs, views_of(self.config, len(files)), self.config, dtype=self.dtype)()


def loaders(bench: harness.Bench, config: ViewsConfig, images: int, workers: list[int]) -> None:
    """An epoch of files, batches of 16, over threads (ours, with boxes) and over processes, transport included."""
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder, f"{index:04d}.jpg")) for index in range(images)]
        for file, jpeg in zip(files, photographs(images), strict=True):
            Path(file).write_bytes(jpeg)
        table = views_of(config, images)
        items: dict[str, tuple[Any, int | None]] = {
            "scrl_fast/processes, float32": (BatchesDataset(files, config, torch.float32), None),
            "scrl_fast/processes, uint8": (BatchesDataset(files, config, torch.uint8), None),
            "torch/DataLoader of the published pipeline": (ViewsDataset(files, table, config), 16),
            "torch/DataLoader of torchvision v2": (ViewsDataset(files, table, config, TorchvisionV2), 16),
        }
        if Albumentations in available(quiet=True).values():
            items["torch/DataLoader of albumentations"] = (ViewsDataset(files, table, config, Albumentations), 16)
        for count in workers:
            settings = Config(
                data=DataConfig(source="folder", root=folder, workers=count),
                views=config,
                boxes=BoxesConfig(),
                model=ModelConfig(),
                train=TrainConfig(batch_size=16, epochs=1),
            )
            ours = {
                "scrl_fast": Loader(make_source(settings), settings),
                "scrl_fast/threads, uint8": Loader(make_source(settings), settings, dtype=torch.uint8),
            }
            theirs = {
                name: torch.utils.data.DataLoader(
                    dataset,
                    batch_size=size,
                    num_workers=count,
                    persistent_workers=count > 0,
                    multiprocessing_context="spawn" if count else None,  # a fork beside running threads may crash
                )
                for name, (dataset, size) in items.items()
            }
            bench.case(
                harness.case_name("loader", workers=count, size=config.size),
                {
                    **{name: lambda it=it: sum(len(batch.views) for batch in it.epoch(0)) for name, it in ours.items()},
                    **{name: lambda it=it: sum(len(batch) for batch in it) for name, it in theirs.items()},
                },
                items=images,
            )
            for loader in ours.values():
                loader.close()


def main() -> int:
    parser = harness.parser("input", __doc__)
    parser.add_argument("--images", type=int, default=16, help="images of a call (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="side of a view (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="loader workers to try")
    parser.set_defaults(threads=1, repeats=20, seconds=8.0)
    args = parser.parse_args()
    bench = harness.Bench("input", args)
    config = ViewsConfig(size=args.size)
    keep_memory()  # as in a run of ours: for rivals, too, fresh tensors then cost no page faults
    whole_pipelines(bench, config, args.images)
    if bench.device.type == "cuda":
        pixels_on_gpu(bench, config)
    stages(bench, config, args.images)
    jpeg_decoders(bench, config, args.images)
    loaders(bench, config, max(64, 4 * args.images) // 16 * 16, args.workers)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
