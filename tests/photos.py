"""Real photographs without a download: those that come inside scikit-image and scikit-learn, in any file format."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NAMES = ("astronaut", "coffee", "cat", "rocket", "china", "flower")


@functools.cache
def photo(name: str) -> NDArray[np.uint8]:
    """One of NAMES as uint8 `[H, W, 3]`."""
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        return load_sample_image(f"{name}.jpg")
    import skimage.data

    return getattr(skimage.data, name)()


def crop(name: str, height: int, width: int) -> Image.Image:
    return Image.fromarray(photo(name)[40 : 40 + height, 60 : 60 + width])


def within_one_level(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> bool:
    """What may be asked of two libraries, or of one on two processors; bit for bit we hold our own code alone."""
    return ours.shape == theirs.shape and np.abs(ours.astype(int) - theirs).max() <= 1


def write_formats(folder: Path) -> dict[str, str]:
    """One photo in every format that users have, in folders of several depths: file -> how far it may be off.

    "exact": the pixels are those of `crop(NAMES[0], 90, 120)`; "close": within compression; "grey": close to its grey.
    """
    deep = folder / "a" / "deep er"
    deep.mkdir(parents=True)
    picture = crop(NAMES[0], 90, 120)
    grey = picture.convert("L")
    picture.save(folder / "rgb.png")
    picture.save(folder / "UPPER.BMP")
    picture.save(deep / "lossless.webp", lossless=True)
    picture.save(deep / "lossy.webp", quality=95)
    picture.save(folder / "photo.jpg", quality=95)
    picture.save(deep / "progressive.jpeg", quality=95, progressive=True)
    picture.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    grey.save(deep / "grey.jpg", quality=95)
    grey.save(folder / "grey.png")
    alpha = picture.copy()
    alpha.putalpha(128)
    alpha.save(folder / "rgba.png")
    alpha.convert("LA").save(folder / "grey-alpha.png")
    picture.quantize(256).save(folder / "palette.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) << 8 | 0x5A).save(folder / "sixteen.png")
    picture.save(folder / "a" / "wrong-name.jpg", format="PNG")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    picture.transpose(Image.Transpose.ROTATE_90).save(folder / "a" / "turned.jpg", quality=95, exif=exif)
    exact = ("rgb.png", "UPPER.BMP", "lossless.webp", "rgba.png", "wrong-name.jpg")
    found = {str(path.relative_to(folder)): path.name for path in folder.rglob("*.*")}
    return {
        path: "exact" if name in exact else "grey" if name.startswith(("grey", "sixteen")) else "close"
        for path, name in found.items()
    }


def write_bad(folder: Path) -> list[Path]:
    """Two photographs cut short, a text file and an empty file named as pictures."""
    picture = crop(NAMES[1], 90, 120)
    for name in ("cut.jpg", "cut.png"):
        picture.save(folder / name)
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    (folder / "text.jpg").write_text("this is no picture\n")
    (folder / "empty.png").touch()
    return [folder / name for name in ("cut.jpg", "cut.png", "text.jpg", "empty.png")]


def write_photos(folder: Path, count: int, height: int = 120, width: int = 160) -> None:
    """`count` different JPEG crops of real photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        image = photo(NAMES[index % len(NAMES)])
        y, x = (int(rng.integers(0, free)) for free in (image.shape[0] - height, image.shape[1] - width))
        Image.fromarray(image[y : y + height, x : x + width]).save(folder / f"{index:04d}.jpg", quality=90)
