"""Generated images of every kind (`image_file_sweep`): each is read or refused by name, soon, in little memory. JPEG
decoders agree on what they refuse and nearly on the pixels."""

from __future__ import annotations

import collections
import io
import os
from pathlib import Path

import image_file_sweep
import numpy as np
import pytest
import test_data_sweep
from PIL import Image

from scrl_fast.data import BadImage
from scrl_fast.data.decode import Encoded, decode
from scrl_fast.data.jpeg import SHRINKS

EACH = int(os.environ.get("SCRL_FAST_SWEEP", "120"))
LEVELS = 3
"""Largest difference of decoders on one file: releases of libjpeg-turbo round, and merge chroma, otherwise."""


def sweep(kind: str, each: int) -> None:
    """As `test_data_sweep.sweep`, which this calls, in a process of its own."""
    test_data_sweep.read_all(image_file_sweep.KINDS[kind](each))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of the process is read from Linux's /proc")
def test_every_generated_file_is_read_or_refused_by_name_in_a_gigabyte() -> None:
    """A longer sweep: SCRL_FAST_SWEEP=2000 pytest tests/test_data_sweep_kinds.py (files of each kind)."""
    program = f"import test_data_sweep_kinds as t\nfor kind in t.image_file_sweep.KINDS: t.sweep(kind, {EACH})"
    told = test_data_sweep.in_a_process(program)
    counts = [list(map(int, line.replace(" read,", "").replace(" refused,", "").split()[:2])) for line in
              told.splitlines()]  # fmt: skip
    assert len(counts) == len(image_file_sweep.KINDS)
    assert all(read > EACH // 6 and refused > EACH // 10 for read, refused in counts), told


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(len(test_data_sweep.JPEG_DECODERS) < 2, reason="one decoder only")
def test_jpeg_decoders_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = collections.Counter[bool]()
    for name, data in image_file_sweep.jpeg_files(EACH, seed=5):
        found = {}
        for decoder in test_data_sweep.JPEG_DECODERS:
            monkeypatch.setenv("SCRL_FAST_JPEG", decoder)
            found[decoder] = outcomes(data)
        reference = found["pillow"]
        taken[isinstance(reference[1], np.ndarray)] += 1
        for decoder, outcome in found.items():
            for shrink, expected in reference.items():
                assert agree(outcome[shrink], expected), f"{name}, shrink {shrink}: {decoder} and Pillow differ"
    assert taken[True] > EACH // 4 and taken[False] > EACH // 8


def outcomes(data: bytes) -> dict[int, np.ndarray | str | None]:
    """For every shrink the pixels, why they are refused, or None where the file does not allow it."""
    found: dict[int, np.ndarray | str | None] = {}
    for shrink in (1, *SHRINKS):
        try:
            image = Encoded(data)
            found[shrink] = image.decode(shrink) if image.can_shrink(shrink) else None
        except BadImage as bad:
            found[shrink] = bad.cause
    return found


def agree(found: np.ndarray | str | None, expected: np.ndarray | str | None) -> bool:
    if isinstance(found, np.ndarray) and isinstance(expected, np.ndarray):
        near = np.abs(found.astype(np.int16) - expected) <= LEVELS
        return found.shape == expected.shape and bool(near.all())
    return type(found) is type(expected) and (found is None or found == expected)


# ---- right values of a few kinds ----


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "PPM"])
def test_sixteen_bits_become_their_upper_eight(kind: str) -> None:
    values = np.array([[0, 255, 256, 4095], [32768, 65279, 65280, 65535]], np.uint16)
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind)
    assert np.array_equal(decode(file.getvalue()), np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, 2))


@pytest.mark.parametrize("size", [(1, 30), (30, 1), (7, 40), (2, 2), (1, 1), (8, 8), (9, 17)])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_narrow_jpeg_is_read_at_every_scale_that_it_allows(
    size: tuple[int, int], progressive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow shrinks no side below a pixel: a file of one row was refused where no other decoder was installed."""
    file = io.BytesIO()
    Image.new("RGB", size, (200, 100, 50)).save(file, "JPEG", progressive=progressive, quality=95)
    for decoder in test_data_sweep.JPEG_DECODERS:
        monkeypatch.setenv("SCRL_FAST_JPEG", decoder)
        image = Encoded(file.getvalue())
        for shrink in (1, *SHRINKS):
            assert image.can_shrink(shrink) == (shrink <= min(size))
            if image.can_shrink(shrink):
                assert image.decode(shrink).shape == (-(-size[1] // shrink), -(-size[0] // shrink), 3)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_grey_of_few_bits_is_spread_over_all_levels(bits: int) -> None:
    data = test_data_sweep.png_with(size=(4, 1))
    ihdr = image_file_sweep.png_chunk(b"IHDR", bytes([0, 0, 0, 4, 0, 0, 0, 1, bits, 0, 0, 0, 0]))
    import zlib

    row = {1: b"\xa0", 4: b"\x0f\x5a", 8: b"\0\xff\x55\xaa"}[bits]
    pixels = image_file_sweep.png_chunk(b"IDAT", zlib.compress(b"\0" + row))
    data = data[:8] + ihdr + pixels + image_file_sweep.png_chunk(b"IEND", b"")
    expected = {1: [255, 0, 255, 0], 4: [0, 255, 85, 170], 8: [0, 255, 85, 170]}[bits]
    assert decode(data)[0, :, 0].tolist() == expected
