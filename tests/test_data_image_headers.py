"""Headers on which a decoder would spend minutes or gigabytes are refused at once; whole files are read."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from scrl_fast.data import BadImage
from scrl_fast.data.decode import decode
from scrl_fast.data.image_headers import claims_too_much, header_fault
from scrl_fast.data.jpeg import jpeg_header_fault

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
MIB = 1 << 20


def saved(kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def tags(count: int, size: int, order: str = "<", first: bytes = b"") -> bytes:
    """A TIFF whose tags all claim the same bytes."""
    table = b"".join(struct.pack(f"{order}HHLL", 1000 + k, 1, size, 8) for k in range(count))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}L", 8)
    return head + struct.pack(f"{order}H", count + len(first) // 12) + first + table + bytes(4 + size)


def big_tags(count: int, size: int) -> bytes:
    table = b"".join(struct.pack("<HHQQ", 1000 + k, 1, size, 16) for k in range(count))
    return b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, count) + table + bytes(8 + size)


def segment(data: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data


GIF, PNG = saved("GIF"), saved("PNG")
FRAME = GIF.index(b",", 13 + (6 << (GIF[10] & 7)))  # behind the palette
MANY_TAGS = tags(3000, MIB)
IN_JPEG = saved("JPEG")[:2] + b"".join(
    segment(b"Exif\0\0" + MANY_TAGS[at : at + 60_000]) for at in range(0, len(MANY_TAGS), 60_000)
)
WILD = tags(20, 100).replace(struct.pack("<LL", 100, 8), struct.pack("<LL", 1 << 31, 8))  # as in damaged files
LONG = {
    "comment of a PNM": b"P5 #" + b"x" * MIB + b"\n2 2 255\n" + bytes(4),
    "comments of a PNM": b"P6 " + b"#\n" * MIB + b"2 2 255\n" + bytes(12),
    "blanks of a PNM": b"P4 2" + b" " * MIB + b"2\n" + bytes(2),
    "comments among numbers": b"P2 2 2 255\n1 1 1 " + b"#\n" * MIB + b"1",
    "numbers as text": b"P3 2 2 255\n" + b"1 " * (17 * MIB // 2),
    "bytes before a frame": GIF[:FRAME] + bytes(MIB) + GIF[FRAME:],
    "extensions of a GIF": GIF[:FRAME] + b"!\xf9\4\0\0\0\0\0" * 150_000 + GIF[FRAME:],
    "parts of an extension": GIF[:FRAME] + b"!\xfe" + b"\1x" * 150_000 + b"\0" + GIF[FRAME:],
    "chunks of a PNG": PNG[:33] + chunk(b"abCd", b"") * 110_000 + PNG[33:],
    "tags of a TIFF": MANY_TAGS,
    "tags, the other order": tags(3000, MIB, ">"),
    "tags of a BigTIFF": big_tags(3000, MIB),
    "EXIF in many segments": IN_JPEG + saved("JPEG")[2:],
}


@pytest.mark.parametrize("name", LONG)
def test_a_header_without_end_is_refused_before_it_is_read(name, monkeypatch):
    def never(*_):
        raise AssertionError("Pillow has the file")

    monkeypatch.setattr("scrl_fast.data.decode.open_picture", never)
    with pytest.raises(BadImage, match=r"more parts than any|PNM in text of more|tags claim many"):
        decode(LONG[name])


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exif_that_claims_too_much_turns_nothing(kind, monkeypatch):
    turn = struct.pack("<HHLHH", 0x0112, 3, 1, 6, 0)
    taken = saved(kind, exif=b"Exif\0\0" + tags(3, 100, first=turn), **({"lossless": True} if kind == "WEBP" else {}))
    assert decode(taken).shape == (64, 48, 3)
    exif = tags(3000, MIB, first=turn)
    read = []
    monkeypatch.setattr(Image.Exif, "load", lambda self, data: read.append(len(data)))
    data = PNG[:33] + chunk(b"eXIf", exif) + PNG[33:] if kind == "PNG" else saved(kind, exif=exif, lossless=True)
    assert np.array_equal(decode(data), PIXELS) and not read


@pytest.mark.parametrize(
    "data",
    [
        b"P5 # made by hand\n# twice\n2 2\n255\n" + bytes(4),
        b"P1 # text\n2 2\n1 0 # row\n0 1",
        b"P3\n2 2 255\n" + b"1 " * 12,
        GIF[:FRAME] + b"!\xfe" + (b"\xff" + b"x" * 255) * 50_000 + b"\0" + GIF[FRAME:],
        saved("TIFF"),
        saved("TIFF", big_tiff=True),
        saved("TIFF", tiffinfo={270: "a description " * 1000}),
        saved("JPEG", exif=b"Exif\0\0" + tags(20, 100, ">")),
        saved("JPEG", exif=b"Exif\0\0" + WILD),
    ],
)  # fmt: skip
def test_headers_that_programs_write_are_read(data):
    assert header_fault(data) == jpeg_header_fault(data) == ""
    assert decode(data).dtype == np.uint8


def test_tables_of_tags_that_end_anywhere():
    whole = tags(40, 100)
    assert not any(claims_too_much(whole[:end]) for end in range(len(whole)))
    assert not any(claims_too_much(big_tags(40, 100)[:end]) for end in range(1000))
    assert not claims_too_much(tags(15, MIB)) and claims_too_much(tags(40, MIB))
    for start in (1 << 31, (1 << 64) - 1):
        assert not claims_too_much(b"II+\0\x08\0\0\0" + struct.pack("<Q", start) + bytes(40))
