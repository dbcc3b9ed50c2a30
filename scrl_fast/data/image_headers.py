"""Headers on which Pillow would spend minutes or gigabytes, told from the bytes of a file before Pillow sees them."""

from __future__ import annotations

import struct
from collections.abc import Iterator

MOST_CHUNKS = (
    100_000  # of a PNG, or blocks of a GIF: Pillow takes each in Python. 8 kB each, as libpng writes, are 800 MB
)
LONGEST_PNM_HEADER = 1 << 16  # Pillow reads it byte by byte
MOST_PNM_TEXT, MOST_PNM_COMMENTS = 16 << 20, 1_000  # it takes 0.5 s a megabyte, and cuts each comment out of a copy
MOST_TAG_BYTES = 16 << 20
TOO_MANY_PARTS = "its header has more parts than any program writes"
TOO_MANY_TAGS = "its tags claim many times the bytes that it has"
_SIZES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}  # bytes of a value by its type; others 1


def header_fault(data: bytes) -> str:
    """Why a file that is no JPEG is not given to Pillow; "" where nothing speaks against it."""
    if _has_endless_blocks(data):
        return TOO_MANY_PARTS
    if data[:1] == b"P" and data[1:2] in b"0123456fy":
        return _pnm_fault(data)
    return TOO_MANY_TAGS if claims_too_much(data) else ""


def _has_endless_blocks(data: bytes) -> bool:
    """Of a PNG, or of a GIF before its first frame."""
    blocks = _png_chunks(data) if data.startswith(b"\x89PNG") else _gif_blocks(data) if data[:4] == b"GIF8" else ()
    return any(number >= MOST_CHUNKS for number, _ in enumerate(blocks))


def _png_chunks(data: bytes) -> Iterator[int]:
    at = 8
    while at < len(data):
        yield at
        at += 12 + int.from_bytes(data[at : at + 4], "big")


def _gif_blocks(data: bytes) -> Iterator[int]:
    """Places of extensions, of their parts, and of bytes that are neither, up to the first frame."""
    at, end = 13, len(data) - 1
    if len(data) > 10 and data[10] & 0x80:
        at += 3 << (data[10] & 7) + 1
    while at < end and data[at] not in b",;":
        yield at
        if data[at] != ord("!"):
            at += 1
            continue
        at += 2
        while at < end and data[at]:
            yield at
            at += 1 + data[at]
        at += 1


def _pnm_fault(data: bytes) -> str:
    at, numbers, end = 2, 0, min(len(data), LONGEST_PNM_HEADER)
    wanted = 2 if data[1:2] in b"14" else 3  # width, height, and the largest value
    while numbers < wanted:
        while at < end and data[at : at + 1].isspace():
            at += 1
        if at < end and data[at] == ord("#"):
            at = min((found for byte in (b"\n", b"\r") if (found := data.find(byte, at, end)) >= 0), default=end)
            continue
        if at >= end:  # a short file that ends in its header is damaged, as Pillow says
            return TOO_MANY_PARTS if len(data) > LONGEST_PNM_HEADER else ""
        while at < end and not data[at : at + 1].isspace() and data[at] != ord("#"):
            at += 1
        numbers += 1
    if data[1:2] not in b"123":
        return ""
    if len(data) > MOST_PNM_TEXT:
        return f"it is a PNM in text of more than {MOST_PNM_TEXT >> 20} MiB; convert it to PNG or to a binary PNM"
    return TOO_MANY_PARTS if data.count(b"#") > MOST_PNM_COMMENTS else ""


def claims_too_much(tiff: bytes) -> bool:
    """Whether the first table of tags of a TIFF, or of EXIF, claims far more bytes than there are: its tags overlap.

    Releases of Pillow before 12 hold what each tag claims. A few wild tags of a damaged file are no fault.
    """
    tiff = tiff.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or not {42, 43} & set(tiff[2:4]):
        return False
    big = tiff[2] == 43
    entry = struct.Struct(f"{order}HHQQ" if big else f"{order}HHLL")
    try:
        (start,) = struct.unpack_from(f"{order}Q" if big else f"{order}L", tiff, 8 if big else 4)
        (count,) = struct.unpack_from(f"{order}Q" if big else f"{order}H", tiff, start)
    except (struct.error, OverflowError):
        return False
    start += 8 if big else 2
    count = min(count, (len(tiff) - start) // entry.size)
    claimed, most = 0, MOST_TAG_BYTES + 2 * len(tiff)
    for _, kind, values, offset in entry.iter_unpack(tiff[start : start + max(0, count) * entry.size]):
        size = values * _SIZES.get(kind, 1)
        if size > (8 if big else 4):
            claimed += min(size, max(0, len(tiff) - offset))
        if claimed > most:
            return True
    return False
