"""How others turn a JPEG into two views: same bytes, and where the library takes parameters, same crops and colours.

Each pipeline is a class: made from (jpegs, table of views `[2, B]`, ViewsConfig), called without arguments; a call
makes all views, float32, normalised, ready for a collate. ``available()`` lists those that can be imported here.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scrl_fast.config.schema import ViewsConfig
from scrl_fast.ops.augment_views import picture_reference
from scrl_fast.ops.view_table import RESIZE_BLUR, blurred_side

_ADJUST = ("brightness", "contrast", "saturation", "hue")


class Pipeline:
    """One library's way. Subclasses say how an image is decoded and how one view of it is made."""

    needs: tuple[str, ...] = ()

    def __init__(self, jpegs: list[bytes], table: np.ndarray, config: ViewsConfig) -> None:
        self.jpegs, self.table, self.config = jpegs, table, config

    def __call__(self) -> Tensor:
        views: list[list[Tensor]] = [[], []]
        for index, jpeg in enumerate(self.jpegs):
            image = self.decode(jpeg)  # once for both views, as every two-view data set does
            for view in (0, 1):
                views[view].append(self.view(image, self.table[view, index]))
        return torch.stack(views[0] + views[1])

    def decode(self, jpeg: bytes) -> Any:
        raise NotImplementedError

    def view(self, image: Any, row: np.void) -> Tensor:
        raise NotImplementedError


class Pillow(Pipeline):
    """The published pipeline: torchvision's transforms on Pillow images, then to_tensor and normalize."""

    def decode(self, jpeg: bytes) -> Image.Image:
        return Image.open(io.BytesIO(jpeg)).convert("RGB")

    def view(self, image: Image.Image, row: np.void) -> Tensor:
        from torchvision.transforms import functional as F

        crop = image.crop((row["x"], row["y"], row["x"] + row["w"], row["y"] + row["h"]))
        made = picture_reference(crop, row, self.config.size, self.config.solarize_threshold)
        return F.normalize(F.to_tensor(made), self.config.mean, self.config.std)


class TorchvisionV2(Pipeline):
    """torchvision.io and transforms.v2 on uint8 tensors."""

    def decode(self, jpeg: bytes) -> Tensor:
        import torchvision.io  # noqa: F401  (brings the operator)

        return torch.ops.image.decode_jpeg.default(torch.frombuffer(bytearray(jpeg), dtype=torch.uint8), 3, False)

    def view(self, image: Tensor, row: np.void) -> Tensor:
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional as F

        cubic, size = InterpolationMode.BICUBIC, self.config.size
        y, x, h, w = (int(row[name]) for name in "yxhw")
        picture = F.resized_crop(image, y, x, h, w, [size, size], cubic, antialias=True)
        if row["flip"]:
            picture = F.horizontal_flip(picture)
        if row["jitter"]:
            for name in (_ADJUST[step] for step in row["order"]):
                picture = getattr(F, f"adjust_{name}")(picture, float(row[name]))
        if row["grayscale"]:
            picture = F.rgb_to_grayscale(picture, num_output_channels=3)
        if row["blur"] == RESIZE_BLUR:
            small = blurred_side(size, float(row["blur_amount"]))
            for side in (small, size):
                picture = F.resize(picture, [side, side], cubic, antialias=True)
        if row["solarize"]:
            picture = F.solarize(picture, self.config.solarize_threshold)
        return F.normalize(
            F.to_dtype(picture, torch.float32, scale=True), list(self.config.mean), list(self.config.std)
        )


class Albumentations(Pipeline):
    """OpenCV and albumentations' functions, without what its Compose costs on top. Its resize does not filter before it
    shrinks: cheaper, and aliased."""

    needs = ("albumentations", "cv2")

    def __init__(self, *args: Any) -> None:
        import albucore
        import cv2
        from albumentations.augmentations.crops import functional as crops
        from albumentations.augmentations.geometric import functional as geometry
        from albumentations.augmentations.pixel import functional as pixel

        super().__init__(*args)
        cv2.setNumThreads(0)
        self._cv2, self._crops, self._geometry, self._pixel, self._core = cv2, crops, geometry, pixel, albucore
        self._mean = np.float32(self.config.mean) * 255
        self._inverse = 1 / (np.float32(self.config.std) * 255)

    def decode(self, jpeg: bytes) -> np.ndarray:
        return self._cv2.imdecode(np.frombuffer(jpeg, np.uint8), self._cv2.IMREAD_COLOR_RGB)

    def view(self, image: np.ndarray, row: np.void) -> Tensor:
        size, cubic = self.config.size, self._cv2.INTER_CUBIC
        y, x, h, w = (int(row[name]) for name in "yxhw")
        picture = self._geometry.resize(self._crops.crop(image, x, y, x + w, y + h), (size, size), cubic)
        if row["flip"]:
            picture = self._geometry.hflip(picture)
        if row["jitter"]:
            for name in (_ADJUST[step] for step in row["order"]):
                picture = getattr(self._pixel, f"adjust_{name}_torchvision")(picture, float(row[name]))
        if row["grayscale"]:
            picture = self._pixel.to_gray(picture, 3, "weighted_average")
        if row["blur"] == RESIZE_BLUR:
            picture = self._pixel.downscale(picture, 1 / float(row["blur_amount"]), cubic, cubic)
        if row["solarize"]:
            picture = self._pixel.solarize(picture, self.config.solarize_threshold / 255)
        picture = self._core.normalize(np.ascontiguousarray(picture), self._mean, self._inverse)
        return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))


class Kornia(Pipeline):
    """kornia's modules on a batch of float tensors; draws its own crops and colours, and blurs by a Gaussian."""

    needs = ("kornia",)

    def __init__(self, *args: Any) -> None:
        import kornia.augmentation as K

        super().__init__(*args)
        c = self.config
        threshold = c.solarize_threshold / 255
        self._make = [
            K.AugmentationSequential(
                K.RandomResizedCrop((c.size, c.size), c.scale, c.ratio, resample="bicubic"),
                K.RandomHorizontalFlip(p=c.flip),
                K.ColorJitter(c.brightness, c.contrast, c.saturation, c.hue, p=c.jitter),
                K.RandomGrayscale(p=c.grayscale),
                K.RandomGaussianBlur((23, 23), c.blur_sigma, p=c.blur_probability[view]),
                K.RandomSolarize((threshold, threshold), (0.0, 0.0), p=c.solarize_probability[view]),
                K.Normalize(torch.tensor(c.mean), torch.tensor(c.std)),
            )
            for view in (0, 1)
        ]

    def decode(self, jpeg: bytes) -> Tensor:
        return TorchvisionV2.decode(self, jpeg)[None].float() / 255  # type: ignore[arg-type]

    def __call__(self) -> Tensor:
        images = torch.cat([self.decode(jpeg) for jpeg in self.jpegs])  # of one size here
        return torch.cat([make(images) for make in self._make])


class Dali(Pipeline):
    """DALI's CPU operators on one thread: its own decoder, antialiased cubic resize, and its colour twist, which has
    one fixed order and no mean grey; blur by resizing, as the recipe has it."""

    needs = ("nvidia.dali",)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        from nvidia.dali import pipeline_def

        build = pipeline_def(self._graph)
        self._pipeline = build(
            batch_size=len(self.jpegs),
            num_threads=1,
            device_id=None,
            prefetch_queue_depth=1,
            exec_async=False,
            exec_pipelined=False,
        )
        self._pipeline.build()

    def _graph(self) -> Any:
        from nvidia.dali import fn, types

        images = fn.decoders.image(self._encoded(), device="cpu", output_type=types.RGB)
        return tuple(self._views(images, rows) for rows in self.table)

    def _encoded(self) -> Any:
        from nvidia.dali import fn

        return fn.external_source(lambda: [np.frombuffer(jpeg, np.uint8) for jpeg in self.jpegs], batch=True)

    def _feed(self, values: np.ndarray, kind: type = np.float32) -> Any:
        from nvidia.dali import fn

        return fn.external_source(lambda: list(values.astype(kind)), batch=True)

    def _views(self, images: Any, rows: np.ndarray) -> Any:
        from nvidia.dali import fn, types

        c, cubic, feed = self.config, {"interp_type": types.INTERP_CUBIC, "antialias": True}, self._feed

        jittered = rows["jitter"] != 0
        blurred = np.where(rows["blur"] == RESIZE_BLUR, np.round(c.size / rows["blur_amount"]), c.size)
        grey = np.where(rows["grayscale"] != 0, 0.0, np.where(jittered, rows["saturation"], 1))
        crop = fn.slice(
            images,
            feed(np.stack([rows["y"], rows["x"]], 1), np.int32),
            feed(np.stack([rows["h"], rows["w"]], 1), np.int32),
            axes=(0, 1),
        )
        picture = fn.resize(crop, size=(c.size, c.size), **cubic)
        picture = fn.color_twist(
            picture,
            brightness=feed(np.where(jittered, rows["brightness"], 1)),
            contrast=feed(np.where(jittered, rows["contrast"], 1)),
            saturation=feed(grey),
            hue=feed(np.where(jittered, rows["hue"] * 360, 0)),
        )
        if rows["blur"].any():
            picture = fn.resize(picture, size=feed(np.stack([blurred, blurred], 1)), **cubic)
            picture = fn.resize(picture, size=(c.size, c.size), **cubic)
        if rows["solarize"].any():
            above = (picture >= c.solarize_threshold) * feed(rows["solarize"], np.int32)
            picture = fn.cast(picture + above * (255 - 2 * fn.cast(picture, dtype=types.INT32)), dtype=types.UINT8)
        return fn.crop_mirror_normalize(
            picture,
            mirror=feed(rows["flip"], np.int32),
            mean=[255 * value for value in c.mean],
            std=[255 * value for value in c.std],
        )

    def __call__(self) -> Tensor:
        return torch.cat([torch.from_dlpack(views.as_tensor()) for views in self._pipeline.run()])


def covered(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First row and column, and height and width, int32 `[B, 2]` each, of what the crops `[2, B]` cover together."""
    start = np.stack([rows["y"].min(0), rows["x"].min(0)], 1)
    end = np.stack([(rows["y"] + rows["h"]).max(0), (rows["x"] + rows["w"]).max(0)], 1)
    return start, end - start


class DaliDecode(Dali):
    """DALI's decoder alone. region: it is asked only for what both crops of an image cover together."""

    def __init__(self, *args: Any, region: bool = False) -> None:
        self._region = region
        super().__init__(*args)

    def _graph(self) -> Any:
        from nvidia.dali import fn, types

        if not self._region:
            return fn.decoders.image(self._encoded(), device="cpu", output_type=types.RGB)
        start, shape = (self._feed(values, np.int32) for values in covered(self.table))
        return fn.decoders.image_slice(
            self._encoded(), start=start, shape=shape, axes=(0, 1), device="cpu", output_type=types.RGB
        )

    def __call__(self) -> list[np.ndarray]:  # type: ignore[override]
        (images,) = self._pipeline.run()
        return [np.asarray(images.at(index)) for index in range(len(self.jpegs))]


_RIVALS: dict[str, Callable[..., Pipeline]] = {
    "pillow/published": Pillow,
    "torchvision/v2": TorchvisionV2,
    "albumentations": Albumentations,
    "kornia (its own draws)": Kornia,
    "dali/cpu": Dali,
}


def available(quiet: bool = False) -> dict[str, Callable[..., Pipeline]]:
    """The pipelines whose packages can be imported; says which are left out."""
    found = {}
    for name, rival in _RIVALS.items():
        try:
            for package in getattr(rival, "needs", ()):
                importlib.import_module(package)
            found[name] = rival
        except ImportError as error:
            if not quiet:
                print(f"{name} left out: {error}")
    return found


class ViewsDataset(torch.utils.data.Dataset[Tensor]):
    """Files through a pipeline, which each worker process of a DataLoader makes once."""

    def __init__(
        self, files: list[str], table: np.ndarray, config: ViewsConfig, pipeline: type[Pipeline] = Pillow
    ) -> None:
        self.files, self.table, self.config, self.pipeline = files, table, config, pipeline
        self._made: Pipeline | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        if self._made is None:
            self._made = self.pipeline([], self.table, self.config)
        with open(self.files[index], "rb") as file:
            self._made.jpegs = [file.read()]
        self._made.table = self.table[:, index : index + 1]
        return self._made()
