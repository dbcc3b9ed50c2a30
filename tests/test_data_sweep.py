"""Image files from elsewhere: bombs, mutations and kinds that are not read. Each is read or refused by name, soon, in
little memory, and alike by every decoder."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photos import NAMES, crop, within_one_level
from PIL import Image

from scrl_fast.config.schema import DataConfig
from scrl_fast.data import BadImage, ImageLimits, decoders
from scrl_fast.data.decode import Encoded, decode
from scrl_fast.data.image_files import MemoryBudget

JPEG_DECODERS = [name for name, said in decoders().items() if said in ("in use", "works")]


def encoded(kind: str, picture: Image.Image | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    (picture or crop(NAMES[0], 40, 64)).save(file, kind, **options)
    return file.getvalue()


def many_scans(scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again: 3,000 of them take half a minute in a large picture."""
    data = encoded("JPEG", progressive=True, quality=90)
    start = data.rindex(b"\xff\xda")
    present = data.count(b"\xff\xda")
    return data[:start] + data[start:-2] * (scans - present + 1) + data[-2:]


def gif_canvas(side: int) -> bytes:
    data = bytearray(encoded("GIF", Image.new("P", (64, 64))))
    data[6:10] = struct.pack("<HH", side, side)
    return bytes(data)


def png_with(*chunks: tuple[bytes, bytes], size: tuple[int, int] = (64, 40)) -> bytes:
    parts = [b"\x89PNG\r\n\x1a\n"]
    head = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    pixels = zlib.compress((b"\0" + bytes(3 * 64)) * 40)
    for kind, body in ((b"IHDR", head), *chunks, (b"IDAT", pixels), (b"IEND", b"")):
        parts.append(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)))
    return b"".join(parts)


def tiff_with(width: int, height: int, **tags: int) -> bytes:
    """A TIFF of one strip, with sizes and tags that may lie."""
    entries = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: height, 279: 64}
    entries |= {int(name[1:]): value for name, value in tags.items()}
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value & 0xFFFFFFFF) for tag, value in sorted(entries.items()))
    return (b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)).ljust(264, b"\0")


def bombs() -> Iterator[tuple[str, bytes]]:
    yield "scans", many_scans(3000)
    yield "gif canvas", gif_canvas(13300)
    yield "gif canvas, largest", gif_canvas(65535)
    for width, height in ((13300, 13300), (65535, 65535), (1, 2**31 - 1), (2**31 - 1, 1)):
        yield f"png {width} x {height}", png_with(size=(width, height))
        yield f"tiff {width} x {height}", tiff_with(width, height)
        bmp = bytearray(encoded("BMP"))
        bmp[18:26] = struct.pack("<ii", width, height)
        yield f"bmp {width} x {height}", bytes(bmp)
    jpeg = bytearray(encoded("JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 13300, 13300)
    yield "jpeg 13300 x 13300", bytes(jpeg)
    zeros = zlib.compress(bytes(1 << 28))
    yield "png text", png_with((b"zTXt", b"a\0\0" + zeros), (b"iTXt", b"a\0\1\0\0\0" + zeros))
    yield "png profile", png_with((b"iCCP", b"a\0\0" + zeros))
    yield "png many chunks", png_with(*[(b"tEXt", b"a\0" + bytes([97 + i % 26]) * 50) for i in range(5000)])
    yield "png pixels", png_with((b"IDAT", zeros))
    for name, tags in {
        "strips": {"t278": 1, "t273": 0xFFFFFFFF},
        "samples": {"t277": 65535},
        "tile": {"t322": 2**31 - 1, "t323": 2**31 - 1, "t324": 200},
        "negative": {"t256": -1},
        "compressed": {"t259": 5},
        "as jpeg": {"t259": 7},
    }.items():
        yield f"tiff {name}", tiff_with(64, 40, **tags)
    yield "tiff that is its own next page", tiff_with(8, 8)[:4] + struct.pack("<I", 4) + bytes(300)
    webp = bytearray(encoded("WEBP", lossless=True))
    webp[21:25] = b"\xff\xff\xff\x0f"  # 16384 x 16384
    yield "webp canvas", bytes(webp)
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x02\0\xff\xff\xff\xff\x08\0\0\0" * 5000
    yield "exif", encoded("JPEG", exif=exif[:65000])
    yield "chunks", png_with(*[(b"abCd", b"")] * 200_000)
    yield "markers", b"\xff\xd8" + b"\xff\xfe\x00\x02" * 200_000 + encoded("JPEG")[2:]
    yield "fill bytes", b"\xff\xd8" + b"\xff" * 1_000_000 + encoded("JPEG")[2:]


def mutations(each: int) -> Iterator[tuple[str, bytes]]:
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = {
        "baseline": encoded("JPEG", quality=85),
        "progressive": encoded("JPEG", quality=85, progressive=True, exif=exif),
        "grey": encoded("JPEG", crop(NAMES[1], 40, 64).convert("L"), restart_marker_blocks=3),
        "cmyk": encoded("JPEG", crop(NAMES[1], 40, 64).convert("CMYK")),
        "png": encoded("PNG", exif=exif),
        "palette": encoded("PNG", crop(NAMES[0], 40, 64).quantize(16)),
        "gif": encoded("GIF"),
        "tiff": encoded("TIFF", compression="tiff_lzw"),
        "raw tiff": encoded("TIFF", tiffinfo={0x112: 3}),
        "bmp": encoded("BMP"),
        "webp": encoded("WEBP"),
        "lossless": encoded("WEBP", lossless=True),
    }
    rng = np.random.default_rng(17)
    for kind, data in seeds.items():
        for number in range(each):
            damaged = bytearray(data)
            reach = len(data) if number % 2 else min(len(data), 120)
            for place in rng.integers(0, reach, rng.integers(1, 5)):
                damaged[place] = rng.choice([0, 0xFF, 0x7F, 0x80, int(rng.integers(256))])
            if number % 5 == 0:
                damaged = damaged[: int(rng.integers(1, len(data)))]
            elif number % 5 == 1:
                damaged += damaged[int(rng.integers(len(data))) :]
            yield f"{kind} {number}", bytes(damaged)


def sweep(each: int) -> None:
    read_all((*bombs(), *mutations(each)))


def read_all(files: Iterable[tuple[str, bytes]]) -> None:
    """Reads every file in this process; ends it with a message at the first that is slow or raises anything else."""
    import resource
    import time
    import warnings

    warnings.simplefilter("ignore")
    decode(encoded("JPEG"))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + (1 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
    read = refused = 0
    slowest, which = 0.0, ""
    for name, data in files:
        start = time.process_time()
        try:
            decode(data, name=name)
            read += 1
        except BadImage as bad:
            assert name in str(bad), name
            refused += 1
        except BaseException as error:
            sys.exit(f"{name}: {type(error).__name__}: {error}")
        slowest, which = max((slowest, which), (time.process_time() - start, name))
    if slowest > 5:
        sys.exit(f"{which} took {slowest:.1f} s")
    most_held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{read} read, {refused} refused, the slowest {which}: {slowest:.2f} s; {most_held} MB at most")


def in_a_process(program: str) -> str:
    """What a program that imports the tests prints; it must end with exit status 0."""
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    return done.stdout


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of the process is read from Linux's /proc")
def test_every_file_is_read_or_refused_by_name_in_a_gigabyte() -> None:
    """A longer sweep: SCRL_FAST_SWEEP=500 pytest tests/test_data_sweep.py (files of each kind)."""
    each = os.environ.get("SCRL_FAST_SWEEP", "40")
    program = f"import test_data_sweep; test_data_sweep.sweep({int(each)})"
    in_a_process(program)


# ---- one outcome, whichever decoder is installed ----


def test_headers_without_end_are_refused() -> None:
    """Pillow takes most of a second for each megabyte of fill bytes."""
    for data in (
        b"\xff\xd8" + b"\xff" * 100_000 + encoded("JPEG")[2:],
        b"\xff\xd8" + b"\xff\xfe\x00\x02" * 100_000 + encoded("JPEG")[2:],
        png_with(*[(b"abCd", b"")] * 100_001),
    ):
        if data[2:4] == b"\xff\xfe":  # comments alone ask for nothing of Pillow's
            assert decode(data).shape == (40, 64, 3)
        else:
            with pytest.raises(BadImage, match="more parts than any program writes"):
                decode(data)
    assert decode(b"\xff\xd8" + b"\xff" * 100 + encoded("JPEG")[2:]).shape == (40, 64, 3)
    assert decode(png_with(*[(b"abCd", b"")] * 1000)).shape == (40, 64, 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(len(JPEG_DECODERS) < 2, reason="one decoder only")
def test_every_decoder_takes_and_refuses_the_same_files(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encoded("JPEG", quality=85)
    files = [data for name, data in mutations(30) if name.split()[0] in ("baseline", "progressive", "grey", "cmyk")]
    files += [whole[:-cut] for cut in (1, 2, 3, 10, 100)] + [whole + b"trailing", whole + whole]
    taken = refused = 0
    for data in files:
        found: list[Any] = []
        for name in JPEG_DECODERS:
            monkeypatch.setenv("SCRL_FAST_JPEG", name)
            try:
                found.append(decode(data))
            except BadImage as bad:
                found.append(bad.cause)
        reference = found[JPEG_DECODERS.index("pillow")]
        if isinstance(reference, str):
            refused += 1
            assert found == [reference] * len(found)
        else:
            taken += 1
            assert all(within_one_level(pixels, reference) for pixels in found)
    assert taken > 20 and refused > 20


# ---- limits ----


def test_limits_are_options_and_say_so() -> None:
    ten = many_scans(10)
    for options, data, said in (
        ({"max_scans": 9}, ten, "it is a JPEG of more scans than data.max_scans=9"),
        ({"max_file_bytes": 99}, ten, f"{len(ten)} bytes are more than data.max_file_bytes=99"),
        ({"max_decoded_bytes": 9999}, ten, "64 x 40 pixels take 33280 bytes to decode, more than data.max_decoded"),
        ({}, gif_canvas(13300), "pixels in 138 bytes are more than data.max_pixels_per_byte=10000"),
    ):
        with pytest.raises(BadImage) as error:
            decode(data, limits=ImageLimits.of(DataConfig(**options)), name="file.jpg")
        assert said in str(error.value)
    assert decode(ten, limits=ImageLimits(max_scans=10)).shape == (40, 64, 3)
    thumbnail = encoded("JPEG", exif=b"Exif\0\0" + many_scans(60)[:60000])  # its scans are not the picture's
    assert decode(thumbnail, limits=ImageLimits(max_scans=1)).shape == (40, 64, 3)
    sequential = encoded("JPEG", quality=90)
    assert not Encoded(sequential).decoding_bytes > 7 * 40 * 64


def test_threads_share_the_memory_of_decoding() -> None:
    budget, held, most = MemoryBudget(100 << 20), [0], [0]
    lock = threading.Lock()

    def decode_one() -> None:
        for _ in range(20):
            with budget.reserved(40 << 20):
                with lock:
                    held[0] += 1
                    most[0] = max(most[0], held[0])
                with lock:
                    held[0] -= 1

    threads = [threading.Thread(target=decode_one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads) and most[0] <= 2
    with budget.reserved(500 << 20):  # more than all of it: alone
        pass


# ---- what is no image is named ----


@pytest.mark.parametrize(
    "data, said",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "is an HTML page"),
        (b"\xef\xbb\xbf\n <HTML>", "is an HTML page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is an XML document"),
        (b'{"message": "rate limit"}', "is JSON text"),
        (b"\0\0\0\x18ftypheic" + bytes(16), "is a HEIC image, which is not read; convert it"),
        (b"\0\0\0\x18ftypavif" + bytes(16), "is an AVIF image"),
        (b"\0\0\0\x18ftypisom" + bytes(16), "is a video"),
        (b"\xff\x0a" + bytes(30), "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(16), "JPEG 2000"),
        (b"%PDF-1.7", "PDF"),
        (bytes(5000), "nothing but zeros"),
        (b"hello", "not an image of a known format"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, said: str) -> None:
    with pytest.raises(BadImage, match=said):
        decode(data, name="photo.jpg")


def test_a_jpeg_of_12_bits_is_named() -> None:
    data = bytearray(encoded("JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    with pytest.raises(BadImage, match="is a JPEG of 12 bits a channel, which is not read; convert it to 8 bits"):
        decode(bytes(data))
