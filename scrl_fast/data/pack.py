"""``python -m scrl_fast.data.pack DIR OUT``: images made smaller once, in tar shards that train with source=packed.

Shard s holds images s * N to s * N + N - 1 of the source, whatever is bad among them, and appears under its name only
when it is whole: after a kill the same command goes on with the first one missing, or cut since.
Exit codes: 0 done; 2 wrong usage or input; 128 and its number by a signal; 1 anything else.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import sys
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from scrl_fast.atomic_files import publish, write_synced, write_text
from scrl_fast.config.command_line import CommandParser
from scrl_fast.config.image_limits import add_image_limits, image_limits_of
from scrl_fast.config.schema import DataConfig
from scrl_fast.config.validation import clean_path
from scrl_fast.data.bad_images import BadFiles
from scrl_fast.data.decode import Encoded
from scrl_fast.data.image_files import BadImage
from scrl_fast.data.jpeg import SHRINKS
from scrl_fast.data.sources.shard_index import shard_index
from scrl_fast.data.sources.shards import MANIFEST, read_manifest
from scrl_fast.errors import UsageError, friendly_errors, tell_result
from scrl_fast.run.signals import ending_cleanly
from scrl_fast.run.terminal import Terminal

SOURCES = ("folder", "imagefolder", "imagenet", "list", "tar", "hf")
LESS_MEMORY = "lower --workers or --max-pixels; the same command goes on with the shards that are missing"
_log = logging.getLogger("scrl_fast")
_SUSPICIOUS = 10  # so many images in a shard, all of them bad, are a lost disk rather than bad images


def pack(
    source: Any,
    out: str | os.PathLike[str],
    *,
    shorter_side: int = 512,
    quality: int = 92,
    shard_images: int = 2048,
    workers: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the images of a source (one of image files: not the demo) into shards in the folder `out`.

    shorter_side: pixels to which images are shrunk, never enlarged; an upright baseline JPEG that is no larger is kept
    as it is. quality: of the JPEGs. shard_images: images per shard. workers: threads, 0 for one per core.
    Returns what packed.json says. Raises UsageError if `out` holds something else, or no image can be read.
    """
    for name, value, most in (("shorter_side", shorter_side, 1 << 16), ("quality", quality, 100)):
        if not 1 <= value <= most:
            raise UsageError(f"{name} must lie in 1..{most}, got {value}")
    if not shard_images >= 1:
        raise UsageError(f"shard_images must be at least 1, got {shard_images}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    options = {"shorter_side": shorter_side, "quality": quality, "shard_images": shard_images}
    with _alone(folder):
        manifest = _begin(folder, options, source)
        bad = BadFiles(len(source), 1.0, folder / "bad_files.jsonl")
        starts = range(0, len(source), shard_images)
        paths = [folder / f"{number:05d}.tar" for number in range(len(starts))]
        terminal = Terminal(sys.stderr if progress else None, total=len(source), done=0, unit="image")
        with ExitStack() as ends:
            ends.callback(terminal.end_progress)
            pool = ends.enter_context(ThreadPoolExecutor(workers or os.cpu_count() or 1))
            for start, path in zip(starts, paths, strict=True):
                numbers = range(start, min(start + shard_images, len(source)))
                if _is_whole(path):
                    terminal.advance(len(numbers))
                    continue
                try:
                    _write_shard(path, source, numbers, options, pool, bad, terminal)
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        return _finish(folder, manifest, paths, bad)


def _begin(folder: Path, options: dict[str, int], source: Any) -> dict[str, Any]:
    """The manifest of a pack that begins or goes on; leftovers of a kill are removed."""
    names = hashlib.sha256()
    root = str(getattr(source, "root", ""))
    for index in range(len(source)):  # without the root, so that images that were moved as a whole are the same
        names.update(source.name_of(index).removeprefix(root).encode("utf-8", "surrogateescape") + b"\0")
    wanted = {"options": options, "source_images": len(source), "source_names": names.hexdigest()}
    there = read_manifest(folder)
    if there is None and any(folder.glob("*.tar")):
        raise UsageError(f"{str(folder)!r} holds shards of something else; choose another folder")
    if there is not None and (different := [key for key, value in wanted.items() if there.get(key) != value]):
        what = f"with {there.get('options')}" if different == ["options"] else "of other images"
        raise UsageError(f"{str(folder)!r} holds a pack {what}; choose another folder, or the same images and options")
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    manifest = {"complete": False, "images": 0, "classes": list(getattr(source, "classes", [])), "shards": [], **wanted}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1))
    return manifest


def _write_shard(
    path: Path,
    source: Any,
    numbers: range,
    options: dict[str, int],
    pool: ThreadPoolExecutor,
    bad: BadFiles,
    terminal: Terminal,
) -> None:
    def make(index: int) -> bytes | BadImage:
        try:
            return smaller(source.open(index), options["shorter_side"], options["quality"])
        except BadImage as error:
            return error

    def write(file: Any) -> None:
        good = 0
        with tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as archive:
            for index, data in zip(numbers, pool.map(make, numbers), strict=True):
                terminal.advance()
                if isinstance(data, BadImage):
                    bad.add(data, 0)
                    continue
                bad.good()
                good += 1
                _add(archive, f"{index:09d}.jpg", data)
                if (label := source.label(index)) >= 0:
                    _add(archive, f"{index:09d}.cls", str(label).encode())
        if not good and len(numbers) >= _SUSPICIOUS:
            first, last = source.name_of(numbers[0]), source.name_of(numbers[-1])
            raise UsageError(f"no image from {first!r} to {last!r} can be read; is the disk still there?")

    temporary = path.with_name(f".{path.name}.tmp")
    try:
        publish(temporary, path, write_synced(temporary, write))
    finally:
        temporary.unlink(missing_ok=True)


def _is_whole(path: Path) -> bool:
    """Whether the shard is there and, as far as its headers tell, undamaged; what was cut since is written anew."""
    problems = shard_index(str(path)).problems if path.exists() else []
    for problem in problems:
        _log.warning("%s %s: it is written anew", path, problem)
    return path.exists() and not problems


def smaller(image: Encoded, shorter_side: int, quality: int) -> bytes:
    """The image as a JPEG whose shorter side is at most `shorter_side` pixels. Raises BadImage."""
    height, width = image.height, image.width
    scale = shorter_side / min(height, width)
    if scale >= 1 and image.is_upright_baseline_jpeg:
        image.decode()  # a damaged one must not be kept
        return image.data
    pixels = image.decode(next((s for s in SHRINKS if s * scale <= 0.5 and image.can_shrink(s)), 1))
    picture = Image.fromarray(pixels)
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _finish(folder: Path, manifest: dict[str, Any], paths: list[Path], bad: BadFiles) -> dict[str, Any]:
    images = sum(len(shard_index(str(path)).offsets) for path in paths)  # leaves each index beside its shard
    if not images:
        first = next(iter(bad.errors.items()), ("", ""))
        raise UsageError(f"none of the {manifest['source_images']} images can be read; the first: {': '.join(first)}")
    manifest |= {"complete": True, "images": images, "shards": [path.name for path in paths]}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1))
    return manifest


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two at work in one folder would remove each other's unfinished shards."""
    with open(folder / ".lock", "a", encoding="utf-8") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another pack is being written into {str(folder)!r}") from None
        except (ImportError, OSError):  # Windows; network shares without locks
            pass
        yield


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m scrl_fast.data.pack", description="Pack images into shards for source=packed."
    )
    parser.add_argument("dir", metavar="DIR", type=clean_path, help="the images: what --data.root would be")
    parser.add_argument("out", metavar="OUT", type=clean_path, help="folder for the shards; continued if unfinished")
    parser.add_argument("--source", choices=SOURCES, default="folder", help="what DIR is (default: %(default)s)")
    parser.add_argument("--shorter-side", type=int, default=512, help="pixels, never enlarged (default: %(default)s)")
    parser.add_argument("--quality", type=int, default=92, help="of the JPEGs (default: %(default)s)")
    parser.add_argument("--shard-images", type=int, default=2048, help="images per shard (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="threads (default: one per core)")
    patience = "seconds to wait for a store that does not answer (default: %(default)g)"
    parser.add_argument("--data.timeout", dest="timeout", type=float, default=DataConfig().timeout, help=patience)
    add_image_limits(parser, max_pixels="--max-pixels")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, those of the process by default; return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    with friendly_errors("scrl_fast.data.pack", debug="--debug" in argv, less_memory=LESS_MEMORY):
        args = _parser().parse(argv)
        from scrl_fast.data.sources.factory import make_source  # torch, only once the options are known to be right

        kept = f"ended before all shards were written; those in {args.out} are whole, the same command goes on"
        with ending_cleanly("scrl_fast.data.pack", kept):
            source = make_source(
                DataConfig(source=args.source, root=args.dir, timeout=args.timeout, **vars(image_limits_of(args)))
            )
            manifest = pack(
                source,
                args.out,
                shorter_side=args.shorter_side,
                quality=args.quality,
                shard_images=args.shard_images,
                workers=max(0, args.workers),
            )
        bad = manifest["source_images"] - manifest["images"]
        told = f", {bad} that cannot be read are listed in {os.path.join(args.out, 'bad_files.jsonl')}" if bad else ""
        tell_result(f"{manifest['images']} images in {len(manifest['shards'])} shards{told}")
        tell_result(f"train with --data.source=packed --data.root={args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
