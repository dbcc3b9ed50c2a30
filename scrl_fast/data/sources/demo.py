"""Scenes of handwritten digits: several real digits at random places, sizes and colours over generated textures.

Small enough for a laptop, yet the question is the real one: does a feature know what is *where*? Training and held-out
scenes share neither a digit nor a background. The digits (digits.npz, 1,797 of 8 x 8 pixels) are the test part of
"Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak (1998), UCI Machine Learning Repository,
doi.org/10.24432/C50P49, licence CC BY 4.0, stored as they are.
"""

from __future__ import annotations

import functools
import hashlib
from importlib import resources
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scrl_fast.data.sources.base import UNLABELLED
from scrl_fast.errors import UsageError
from scrl_fast.ops.philox import uniforms

NUM_DIGITS = 10
_SPLITS = {"train": (0, 1200), "test": (1200, 1797)}  # contiguous: roughly by writer
_PLACE_TRIES = 24
_NOISE_GRIDS = (3, 6, 12, 24, 48)
_BATCH = 128  # scenes made at once: 128 of 96 x 96 in float32 are 14 MB
_CONTRAST_CHOICES = 4
# Light ink on darker ground, as chalk on a board. With ink and ground of any colour and strong textures (0.6), a
# network of the demo's size learns the textures in its few minutes, and nothing about digits.
_DARKEST, _LIGHTEST = 0.1, 0.4
_LEAST_INK = 0.5


class DemoScenes:
    """`count` scenes of `size` x `size` pixels, made when constructed and kept in memory as uint8.

    Scene i depends on (seed, split, i) and the parameters, not on count.
    split: "train" or "test"; they share no digit and no background.
    digits: least and most digits in a scene; one that finds no free place is left out.
    digit_size: least and most side of a digit in pixels; None: 1/6 to 1/3 of the scene.
    texture: strength of the background's texture, 0 plain to 1 full range.
    Images carry no label (`label` is -1); the digits do: `boxes`, `labels`.
    Raises ValueError naming a parameter out of range.
    """

    num_classes = 0

    def __init__(
        self,
        count: int,
        size: int = 96,
        seed: int = 0,
        split: Literal["train", "test"] = "train",
        *,
        digits: tuple[int, int] = (2, 5),
        digit_size: tuple[int, int] | None = None,
        texture: float = 0.15,
    ) -> None:
        digit_size = digit_size or (max(8, size // 6), max(8, size // 3))
        if not count > 0:
            raise UsageError(f"data.demo_images must be positive, got {count}")
        if not size >= 16:
            raise UsageError(f"data.demo_size must be at least 16 pixels, got {size}")
        if split not in _SPLITS:
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        if not 1 <= digits[0] <= digits[1]:
            raise ValueError(f"digits must be (least, most) with 1 <= least <= most, got {digits}")
        if not 8 <= digit_size[0] <= digit_size[1] <= size:
            raise ValueError(f"digit_size must be (least, most) with 8 <= least <= most <= {size}, got {digit_size}")
        if not 0 <= texture <= 1:
            raise ValueError(f"texture must lie in 0..1, got {texture}")
        self.size, self.split = size, split
        self._seed, self._digits, self._digit_size, self._texture = seed, digits, digit_size, texture
        self.images = np.empty((count, size, size, 3), np.uint8)
        self._boxes: list[NDArray[np.float32]] = []
        self._labels: list[NDArray[np.int64]] = []
        for start in range(0, count, _BATCH):
            ids = np.arange(start, min(start + _BATCH, count))
            self._make(ids, self.images[ids[0] : ids[-1] + 1])
        self.images.flags.writeable = False

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> NDArray[np.uint8]:
        return self.images[index]

    def label(self, index: int) -> int:
        return UNLABELLED

    def name_of(self, index: int) -> str:
        return f"demo scene {index} ({self.split})"

    def boxes(self, index: int) -> NDArray[np.float32]:
        """Boxes of the scene's digits, `[n, 4]` as x0, y0, x1, y1 in pixels."""
        return self._boxes[index]

    def labels(self, index: int) -> NDArray[np.int64]:
        """Classes of the scene's digits, `[n]`, 0 to 9."""
        return self._labels[index]

    def identity(self) -> dict[str, Any]:
        """See `identity_of`: the scenes' parameters stand for their names."""
        made_of = (self.size, self.split, self._seed, self._digits, self._digit_size, self._texture)
        return {"images": len(self), "names": hashlib.sha256(repr(made_of).encode()).hexdigest()}

    def _make(self, ids: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        most = self._digits[1]
        # stream 0: the background; 1: how many and which digits, how large, which colours; 2: places
        pictures = _backgrounds(self._uniforms(ids, _BACKGROUND_COUNT, 0), self.size, self._texture)
        u = self._uniforms(ids, 1 + most * (2 + 3 * _CONTRAST_CHOICES), 1)
        number = _integers(u[:, 0], *self._digits)
        each = u[:, 1:].reshape(len(ids), most, -1)
        which = _integers(each[:, :, 0], _SPLITS[self.split][0], _SPLITS[self.split][1] - 1)
        sides = _integers(each[:, :, 1], *self._digit_size)
        tries = self._uniforms(ids, most * _PLACE_TRIES * 2, 2).reshape(len(ids), most, _PLACE_TRIES, 2)
        corners, placed = _place(tries, sides, self.size)
        placed &= np.arange(most) < number[:, None]
        _, classes = _load_digits()
        for scene in range(len(ids)):
            for slot in np.flatnonzero(placed[scene]):
                (x, y), side = corners[scene, slot], sides[scene, slot]
                patch = pictures[scene, y : y + side, x : x + side]
                colour = _contrasting(each[scene, slot, 2:].reshape(-1, 3), patch)
                cover = _drawn(int(which[scene, slot]), int(side))
                patch += cover[:, :, None] * (colour - patch)
            kept = placed[scene]
            low = corners[scene, kept].astype(np.float32)
            self._boxes.append(np.concatenate([low, low + sides[scene, kept, None]], axis=1, dtype=np.float32))
            self._labels.append(classes[which[scene, kept]].astype(np.int64))
        out[:] = np.rint(pictures * 255)

    def _uniforms(self, ids: NDArray[np.int64], count: int, stream: int) -> NDArray[np.float64]:
        purpose = 0x64656D6F + list(_SPLITS).index(self.split)
        return uniforms(self._seed, 0, ids, count, stream=stream, purpose=purpose)


def _integers(u: NDArray[np.float64], low: int, high: int) -> NDArray[np.int64]:
    return low + (u * (high - low + 1)).astype(np.int64)


def _place(
    tries: NDArray[np.float64], sides: NDArray[np.int64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The first of the tried corners (x, y) where a digit overlaps none placed before it, for all scenes at once."""
    scenes, most = sides.shape
    corners, placed = np.zeros((scenes, most, 2), np.int64), np.zeros((scenes, most), bool)
    for slot in range(most):
        free = size - sides[:, slot, None, None] + 1
        wanted = (tries[:, slot] * free).astype(np.int64)  # [scenes, tries, 2]
        # two squares overlap when they do so along both axes
        after = wanted[:, :, None] < corners[:, None, :slot] + sides[:, None, :slot, None]
        before = corners[:, None, :slot] < wanted[:, :, None] + sides[:, slot, None, None, None]
        hit = np.any(np.all(after & before, axis=3) & placed[:, None, :slot], axis=2)
        placed[:, slot] = ~np.all(hit, axis=1)
        corners[:, slot] = wanted[np.arange(scenes), np.argmin(hit, axis=1)]
    return corners, placed


def _contrasting(colours: NDArray[np.float64], patch: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of a few random light colours the one farthest from what lies beneath, so that digits can be seen."""
    colours = _LEAST_INK + (1 - _LEAST_INK) * colours
    mean = patch.mean(axis=(0, 1))
    return colours[np.abs(colours - mean).sum(axis=1).argmax()].astype(np.float32)


@functools.cache
def _load_digits() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images `[1797, 8, 8]` with ink 0 to 16, and their classes `[1797]`."""
    with resources.files("scrl_fast.data").joinpath("digits.npz").open("rb") as file, np.load(file) as digits:
        return digits["images"], digits["labels"]


@functools.lru_cache(maxsize=65536)
def _drawn(digit: int, side: int) -> NDArray[np.float32]:
    """How much of each pixel a digit covers at `side` x `side`, 0 to 1; strokes with crisp edges."""
    rows = _interpolation(8, side)
    ink = rows @ (_load_digits()[0][digit] / np.float32(16)) @ rows.T
    return np.clip(ink * 2 - 0.5, 0, 1).astype(np.float32)


@functools.cache
def _interpolation(few: int, many: int) -> NDArray[np.float32]:
    """Smooth interpolation from `few` to `many` points as a matrix `[many, few]`; ends are held."""
    at = np.clip((np.arange(many) + 0.5) * few / many - 0.5, 0, few - 1)
    low = np.minimum(at.astype(np.int64), few - 2)
    part = at - low
    part = part * part * (3 - 2 * part)
    weights = np.zeros((many, few), np.float32)
    weights[np.arange(many), low] = 1 - part
    weights[np.arange(many), low + 1] = part
    return weights


_STRIPES = 2
_BACKGROUND_COUNT = 3 + 2 * 3 + len(_NOISE_GRIDS) + _STRIPES * (3 + 3) + sum(3 * grid * grid for grid in _NOISE_GRIDS)


def _backgrounds(u: NDArray[np.float64], size: int, texture: float) -> NDArray[np.float32]:
    """Textures `[n, size, size, 3]` in 0..1: a colour, a gradient, noise at five scales, stripes; amounts differ.

    Colour, gradient and stripes are sums of products of a function of y and one of x (sin(a + b) unfolds), so each is a
    thin matrix product like the noise: 0.25 ms a scene of 96 x 96 on one core.
    """
    parts = np.split(u.astype(np.float32), np.cumsum([3, 6, len(_NOISE_GRIDS), 3 * _STRIPES, 3 * _STRIPES]), axis=1)
    base, slope, amounts, waves, colours, noise = parts
    count = len(u)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    one = np.ones((count, size), np.float32)
    slope = (slope.reshape(count, 2, 3) - 0.5) * texture
    rows, columns = [one, one * ramp, one], [one, one, one * ramp]
    weights = [_DARKEST + (_LIGHTEST - _DARKEST) * base, slope[:, 0], slope[:, 1]]
    for wave, colour in zip(np.split(waves, _STRIPES, axis=1), np.split(colours, _STRIPES, axis=1), strict=True):
        angle, frequency, phase = wave[:, 0, None] * np.pi, 4 + 36 * wave[:, 1, None], 2 * np.pi * wave[:, 2, None]
        down, right = frequency * np.sin(angle) * ramp + phase, frequency * np.cos(angle) * ramp
        rows += [np.sin(down), np.cos(down)]
        columns += [np.cos(right), np.sin(right)]
        weights += [(colour - 0.5) * texture * 0.6] * 2
    weighted = np.stack(rows, axis=2)[:, None] * np.stack(weights, axis=2)[:, :, None]  # [n, 3, size, terms]
    picture = weighted.astype(np.float32) @ np.stack(columns, axis=1).astype(np.float32)[:, None]
    picture += _noise(noise, amounts**2 * texture, size)
    np.clip(picture, 0, 1, out=picture)
    return np.ascontiguousarray(picture.transpose(0, 2, 3, 1))


def _noise(u: NDArray[np.float32], amounts: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Noise `[n, 3, size, size]` at the scales of _NOISE_GRIDS, coarse ones spread to the next finer and added up."""
    start = 0
    total: NDArray[Any] = np.zeros((len(u), 3, 1, 1), np.float32)
    spread: NDArray[Any] = np.ones((_NOISE_GRIDS[0], 1), np.float32)
    for index, grid in enumerate(_NOISE_GRIDS):
        here = u[:, start : start + 3 * grid * grid].reshape(-1, 3, grid, grid) - np.float32(0.5)
        total = spread @ total @ spread.T + here * amounts[:, index, None, None, None]
        spread = _interpolation(grid, _NOISE_GRIDS[index + 1] if index + 1 < len(_NOISE_GRIDS) else size)
        start += 3 * grid * grid
    return spread @ total @ spread.T
