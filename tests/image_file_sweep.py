"""Generated image files of every kind that is read, valid and not: headers that lie, odd depths, samplings, markers and
compressions, cut and damaged ends. Each has a name and is the same in every run (for test_data_sweep_kinds.py)."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, features

Named = Iterator[tuple[str, bytes]]
Rng = np.random.Generator


def picture(rng: Rng, height: int = 0, width: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth content, so that decoders that round otherwise stay near each other."""
    height, width = height or int(rng.integers(1, 70)), width or int(rng.integers(1, 70))
    small = Image.fromarray(rng.integers(0, 255, (4, 5, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pick(rng: Rng, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def with_end(rng: Rng, data: bytes) -> tuple[str, bytes]:
    """The file as it is, cut, or with something behind it."""
    kind = pick(rng, ["whole"] * 6 + ["cut", "cut", "more", "zeros"])
    if kind == "cut":
        return kind, data[: int(rng.integers(1, len(data) + 1))]
    if kind == "zeros":
        start = int(rng.integers(len(data)))
        return kind, data[:start] + bytes(len(data) - start)
    return kind, data + (b"trailing" * 9 if kind == "more" else b"")


# ---- PNM ----


def pnm_files(count: int, seed: int = 1) -> Named:
    rng = np.random.default_rng(seed)
    for number in range(count):
        magic = pick(rng, [b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"P5", b"P6", b"P7", b"Pf", b"PF"])
        usual = bool(rng.integers(3))
        sizes = [1, 7, 16] if usual else [0, 1, 9, 65535, 1 << 20, (1 << 31) - 1, 1 << 40, -1, "x", "", "9" * 300]
        width, height = pick(rng, sizes), pick(rng, sizes)
        most = pick(rng, [1, 15, 255, 4095, 65535] if usual else [0, 255, 256, 65535, 65536, -1, "", "1e9", "9" * 300])
        gap = pick(rng, [b"\n", b" ", b"\t", b"\r\n", b"\n# a comment\n", b"\n#" + b"c" * 5000 + b"\n", b"\n" * 3000])
        words = [str(width).encode(), str(height).encode()] + ([] if magic in (b"P1", b"P4") else [str(most).encode()])
        wide = isinstance(most, int) and most > 255
        pixels = width * height if isinstance(width, int) and isinstance(height, int) else 40
        length = max(0, min(pixels, 4000)) * (3 if magic in (b"P3", b"P6") else 1)
        if magic in (b"P1", b"P2", b"P3"):
            largest = 1 if magic == b"P1" else 300 if not usual else most
            body = b" ".join(str(int(v)).encode() for v in rng.integers(0, largest + 1, length))
        else:
            body = rng.bytes(length * (2 if wide else 1))
        end, data = with_end(rng, magic + gap + gap.join(words) + b"\n" + body)
        yield f"pnm {number}: {magic.decode()} {str(width)[:9]} x {str(height)[:9]}, {str(most)[:9]}, {end}", data


# ---- PNG ----

PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def png_chunk(kind: bytes, body: bytes, wrong_sum: bool = False) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ wrong_sum)


def png_files(count: int, seed: int = 2) -> Named:
    rng = np.random.default_rng(seed)
    for number in range(count):
        usual = bool(rng.integers(3))
        colour = pick(rng, list(PNG_DEPTHS)) if usual else pick(rng, [0, 1, 2, 3, 4, 5, 6, 7, 255])
        depth = pick(rng, PNG_DEPTHS.get(colour, (8,))) if usual else pick(rng, [0, 1, 2, 3, 4, 8, 16, 32, 255])
        width, height = (int(rng.integers(1, 40)), int(rng.integers(1, 40))) if usual else (
            pick(rng, [0, 1, 33, 1 << 16, (1 << 31) - 1, 0xFFFFFFFF]),
            pick(rng, [0, 1, 33, 1 << 16, (1 << 31) - 1, 0xFFFFFFFF]),
        )  # fmt: skip
        interlaced = int(pick(rng, [0, 0, 0, 1, 2]) if not usual else 0)
        bits = PNG_CHANNELS.get(colour, 3) * depth * min(width, 1 << 12)
        lines = min(height, 1 << 10)
        raw = b"".join(bytes([pick(rng, [0, 1, 2, 3, 4] if usual else [0, 4, 5, 255])]) + rng.bytes((bits + 7) // 8)
                       for _ in range(min(lines, 100)))  # fmt: skip
        packed = zlib.compress(raw, 1)
        chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))]
        if colour == 3 and (usual or rng.integers(2)):
            chunks.append((b"PLTE", rng.bytes(3 * (1 << min(depth, 8)) if usual else int(rng.integers(0, 800)))))
        extra = {
            b"tRNS": rng.bytes(int(pick(rng, [1, 2, 6, 256]))),
            b"gAMA": struct.pack(">I", int(pick(rng, [0, 45455, 0xFFFFFFFF]))),
            b"tEXt": b"a\0" + b"b" * 100,
            b"iCCP": b"a\0\0" + zlib.compress(b"c" * 1000),
            b"acTL": struct.pack(">II", int(pick(rng, [0, 1, 1 << 31])), 0),
            b"eXIf": b"II*\0\x08\0\0\0" + rng.bytes(20),
            b"pHYs": rng.bytes(int(pick(rng, [9, 3]))),
        }
        chunks += [(kind, extra[kind]) for kind in extra if not rng.integers(4)]
        middle = len(packed) // 2
        chunks += [(b"IDAT", packed[:middle]), (b"IDAT", packed[middle:])] if rng.integers(2) else [(b"IDAT", packed)]
        if not usual and rng.integers(2):
            place = int(rng.integers(len(chunks)))
            chunks = chunks[:place] + chunks[place + 1 :] + chunks[place : place + 1]
        wrong = -1 if usual else int(rng.integers(-1, len(chunks)))
        data = b"\x89PNG\r\n\x1a\n" + b"".join(
            png_chunk(kind, body, place == wrong) for place, (kind, body) in enumerate((*chunks, (b"IEND", b"")))
        )
        end, data = with_end(rng, data)
        yield f"png {number}: colour {colour}, {depth} bits, {width} x {height}, interlaced {interlaced}, {end}", data


# ---- TIFF ----

TIFF_COMPRESSIONS = (1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 34712, 34925, 50000, 50001, 65535)


def tiff(entries: dict[int, tuple[int, list[int]]], body: bytes, order: str = "<", big: bool = False) -> bytes:
    """A TIFF of one page. entries: type and values by tag; body: what lies at `TIFF_BODY`."""
    codes = {1: "B", 3: "H", 4: "I", 16: "Q"}
    mark = b"II" if order == "<" else b"MM"
    head = mark + (struct.pack(order + "HHHQ", 43, 8, 0, 16) if big else struct.pack(order + "HI", 42, 8))
    count, inline, place = ("Q", 8, "Q") if big else ("H", 4, "I")
    table, tail = struct.pack(order + count, len(entries)), b""
    tail_at = len(head) + len(table) + len(entries) * (20 if big else 12) + (8 if big else 4)
    for tag, (kind, values) in sorted(entries.items()):
        size = struct.calcsize("<" + codes.get(kind, "I"))
        packed = b"".join(struct.pack(order + codes.get(kind, "I"), v % (1 << (8 * size))) for v in values)
        field = packed.ljust(inline, b"\0")
        if len(packed) > inline:
            field = struct.pack(order + place, tail_at + len(tail))
            tail += packed
        table += struct.pack(order + "HH" + place, tag, kind, len(values)) + field
    table += bytes(8 if big else 4) + tail
    return (head + table).ljust(TIFF_BODY, b"\0") + body


TIFF_BODY = 1024


def tiff_files(count: int, seed: int = 3) -> Named:
    """Half of them by hand, with tags that may lie; half as Pillow writes them, then perhaps damaged."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        said, data = tiff_by_pillow(rng) if number % 2 else tiff_by_hand(rng)
        yield f"tiff {number}: {said}", data


def tiff_by_pillow(rng: Rng) -> tuple[str, bytes]:
    known = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4")
    known = known if features.check("libtiff") else known[:1]
    mode = pick(rng, ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F", "LA"])
    compression = pick(rng, known)
    plain = mode in ("L", "RGB", "CMYK", "YCbCr")
    if (compression == "jpeg" and not plain) or (compression == "group4" and mode != "1"):
        compression = "raw"
    image = picture(rng)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 1 << 16, image.size[::-1], np.uint16))
    elif mode == "LAB":
        image = Image.frombytes("LAB", image.size, rng.bytes(image.width * image.height * 3))
    else:
        image = image.convert(mode)
    options: dict[str, Any] = {"compression": compression} if compression != "raw" else {}
    options |= {"tiffinfo": {0x112: int(rng.integers(1, 9))}} if rng.integers(2) else {}
    if not rng.integers(4):
        options |= {"save_all": True, "append_images": [image] * 3}
    data = bytearray(saved(image, "TIFF", **options))
    damaged = int(pick(rng, [0, 0, 1, 3]))
    for place in rng.integers(0, len(data), damaged):
        data[place] = int(rng.integers(256))
    end, whole = with_end(rng, bytes(data))
    return f"{mode}, {compression}, {damaged} bytes changed, {end}", whole


def tiff_by_hand(rng: Rng) -> tuple[str, bytes]:
    usual = bool(rng.integers(3))
    width, height = int(rng.integers(1, 33)), int(rng.integers(1, 33))
    bits = pick(rng, [1, 4, 8, 16] if usual else [0, 1, 2, 3, 8, 12, 16, 24, 32, 64, 65535])
    samples = pick(rng, [1, 3, 4] if usual else [0, 1, 2, 3, 4, 5, 255, 65535])
    row = (width * samples * min(bits, 64) + 7) // 8 if samples < 6 else 64
    entries = {
        256: (3, [width]), 257: (3, [height]), 258: (3, [bits] * min(samples, 5)), 259: (3, [1]),
        262: (3, [1 if samples == 1 else 2]), 273: (4, [TIFF_BODY]), 277: (3, [samples]), 278: (3, [height]),
        279: (4, [row * height]), 274: (3, [int(rng.integers(0, 10))]),
    }  # fmt: skip
    odd: dict[int, tuple[int, list[int]]] = {
        256: (4, [pick(rng, [0, 1, 65535, (1 << 31) - 1, (1 << 32) - 1])]),
        257: (4, [pick(rng, [0, 1, 65535, (1 << 31) - 1, (1 << 32) - 1])]),
        259: (3, [pick(rng, TIFF_COMPRESSIONS)]),
        262: (3, [pick(rng, [0, 1, 2, 3, 4, 5, 6, 8, 9, 32803, 65535])]),
        273: (4, [pick(rng, [0, 8, (1 << 32) - 1])] * int(pick(rng, [1, 2, 500]))),
        278: (4, [pick(rng, [0, 1, (1 << 32) - 1])]),
        279: (4, [pick(rng, [0, 1, (1 << 32) - 1])] * int(pick(rng, [1, 2, 500]))),
        284: (3, [pick(rng, [1, 2, 3])]),
        317: (3, [pick(rng, [1, 2, 3, 9])]),
        322: (3, [pick(rng, [0, 16, 65535])]), 323: (3, [16]), 324: (4, [TIFF_BODY]), 325: (4, [256]),
        320: (3, [7] * int(pick(rng, [3, 768, 700]))),
        338: (3, [pick(rng, [0, 1, 2, 9])]),
        339: (3, [pick(rng, [0, 1, 2, 3, 4, 9])] * min(samples, 5)),
        330: (4, [8] * 100), 34665: (4, [8]), 34675: (1, [1] * 200), 700: (1, [60] * 200),
    }  # fmt: skip
    if not usual:
        entries |= {tag: odd[tag] for tag in odd if not rng.integers(4)}
    order, big = pick(rng, ["<", ">"]), bool(rng.integers(5) == 0)
    body = rng.bytes(min(row * height, 1 << 16))
    body = zlib.compress(body) if entries[259][1][0] == 8 else body
    end, data = with_end(rng, tiff(entries, body, order, big))
    said = f"{bits} bits, {samples} samples, compression {entries[259][1][0]}, {'usual' if usual else 'odd'}"
    return f"{said}, {end}", data


# ---- JPEG ----


def jpeg_files(count: int, seed: int = 4) -> Named:
    """Colours, samplings, scans, Adobe's and JFIF's markers, EXIF's turns, depths; cut and damaged in their data."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        mode = pick(rng, ["RGB", "RGB", "RGB", "L", "CMYK"])
        options: dict[str, Any] = {"quality": int(pick(rng, [1, 30, 75, 95, 100]))}
        options["progressive"] = bool(rng.integers(2))
        options["optimize"] = bool(rng.integers(2))
        if mode == "RGB":
            options["subsampling"] = pick(rng, ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
            options["keep_rgb"] = options["subsampling"] == "4:4:4" and bool(rng.integers(2))
        if rng.integers(4) == 0:
            options["restart_marker_blocks"] = int(rng.integers(1, 5))
        turned = 0
        if rng.integers(3) == 0:
            exif = Image.Exif()
            exif[0x0112] = turned = int(rng.integers(0, 10))
            options["exif"] = exif
        data = bytearray(saved(picture(rng, mode=mode), "JPEG", **options))
        change = pick(rng, ["none"] * 5 + list(JPEG_CHANGES))
        if change != "none":
            data = bytearray(JPEG_CHANGES[change](rng, data))
        end, whole = with_end(rng, bytes(data))
        said = {name: value for name, value in options.items() if name != "exif"}
        yield f"jpeg {number}: {mode} {said}, turned {turned}, {change}, {end}", whole


def _frame(data: bytearray) -> int:
    """Where the frame header's marker stands."""
    return max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))


def _with_adobe(rng: Rng, data: bytearray) -> bytes:
    transform = int(pick(rng, [0, 1, 2, 3, 255]))
    segment = b"\xff\xee" + struct.pack(">H", 14) + b"Adobe" + struct.pack(">HHHB", 100, 0, 0, transform)
    return bytes(data[:2]) + segment + bytes(data[2:])


def _edited(offset: int, *values: int) -> Any:
    def edit(rng: Rng, data: bytearray) -> bytes:
        data[_frame(data) + offset] = int(pick(rng, values))
        return bytes(data)

    return edit


def _sampling(rng: Rng, data: bytearray) -> bytes:
    frame = _frame(data)
    for component in range(data[frame + 9]):
        data[frame + 11 + 3 * component] = int(pick(rng, [0x11, 0x12, 0x21, 0x22, 0x41, 0x14, 0x31, 0x00, 0x5F]))
    return bytes(data)


def _component_ids(rng: Rng, data: bytearray) -> bytes:
    """R, G, B as identifiers mean RGB to some decoders, without any marker."""
    frame = _frame(data)
    scan = data.index(b"\xff\xda")
    ids = pick(rng, [b"RGB", b"\0\1\2", b"\1\1\1", b"CYM"])
    for component in range(min(3, data[frame + 9])):
        data[frame + 10 + 3 * component] = ids[component]
        if component < data[scan + 4]:
            data[scan + 5 + 2 * component] = ids[component]
    return bytes(data)


def _without(marker: bytes) -> Any:
    def remove(rng: Rng, data: bytearray) -> bytes:
        at = data.find(marker)
        length = 2 + (data[at + 2] << 8 | data[at + 3])
        return bytes(data[:at] + data[at + length :]) if at > 0 else bytes(data)

    return remove


def _noise_in_scan(rng: Rng, data: bytearray) -> bytes:
    start = data.index(b"\xff\xda") + 12
    for place in rng.integers(min(start, len(data) - 1), len(data), int(rng.integers(1, 4))):
        data[place] = int(rng.integers(256))
    return bytes(data)


def _two_pictures(rng: Rng, data: bytearray) -> bytes:
    return bytes(data) + saved(picture(rng), "JPEG")


def _twice(marker: bytes) -> Any:
    def repeat(rng: Rng, data: bytearray) -> bytes:
        at = data.find(marker)
        if at < 0:
            return bytes(data)
        length = 2 + (data[at + 2] << 8 | data[at + 3])
        return bytes(data[:at] + data[at : at + length] + data[at:])

    return repeat


JPEG_CHANGES: dict[str, Any] = {
    "adobe": _with_adobe,
    "adobe again": _with_adobe,
    "bits": _edited(4, 12, 16, 7, 0),
    "kind of frame": _edited(1, 0xC1, 0xC3, 0xC5, 0xC6, 0xC9, 0xCA, 0xCB, 0xCF),
    "height": _edited(6, 0, 1, 90),
    "width": _edited(8, 0, 1, 90),
    "channels": _edited(9, 0, 1, 2, 4, 5),
    "sampling": _sampling,
    "identifiers": _component_ids,
    "no JFIF": _without(b"\xff\xe0"),
    "no tables": _without(b"\xff\xdb"),
    "no codes": _without(b"\xff\xc4"),
    "noise": _noise_in_scan,
    "two pictures": _two_pictures,
    "frame twice": _twice(b"\xff\xc0"),
    "tables twice": _twice(b"\xff\xdb"),
}
KINDS = {"pnm": pnm_files, "png": png_files, "tiff": tiff_files, "jpeg": jpeg_files}
"""A generator for each kind, called with how many files it is to make."""
