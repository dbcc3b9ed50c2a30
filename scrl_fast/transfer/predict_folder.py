"""``python -m scrl_fast.transfer predict``: the detections in a folder of images, as pictures and as COCO results.

OUT gets ``results.json`` (COCO's list of results, each with its ``file_name``), ``images.json`` (COCO's lists of images
and categories, whose ids the results use) and ``pictures/`` with the names of the images. Nothing is written outside
OUT, and no image is overwritten.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from scrl_fast.atomic_files import write_file, write_text
from scrl_fast.config.defaults import SHOWN_SCORE
from scrl_fast.data.decode import Pixels
from scrl_fast.data.image_files import DEFAULT_LIMITS, BadImage, ImageLimits, printable
from scrl_fast.data.prefetch import prefetched
from scrl_fast.data.sources.files import ImageFiles, image_folder
from scrl_fast.errors import UsageError
from scrl_fast.evaluate.batches import Progress
from scrl_fast.run.lock import inode_of
from scrl_fast.run.terminal import Terminal
from scrl_fast.transfer.draw import draw_prediction
from scrl_fast.transfer.masks import encode_masks
from scrl_fast.transfer.trained import Prediction, TrainedDetector

PICTURES, RESULTS, IMAGES = "pictures", "results.json", "images.json"
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_QUALITY = 92  # of JPEG: fine lines of a box stay clean


def predict_folder(
    detector: TrainedDetector,
    images: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    score: float = SHOWN_SCORE,
    workers: int = 2,
    overwrite: bool = False,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> dict[str, Any]:
    """Detect in every image below a folder and write pictures and results to ``out``.

    images: the folder, or one image; what lies in ``out`` is left out. score: detections above it are kept.
    workers: threads that read images. overwrite: take an ``out`` that holds something already.
    limits: what an image file may ask for.
    An image that cannot be read costs a line on stderr, as progress does.
    Returns ``{images, objects, unreadable, out}``: counts, the names of unreadable images, the folder.
    Raises UsageError for folders that do not fit, and when no image can be read.
    """
    check_folders(Path(images), Path(out), overwrite)
    source = images_below(Path(images), Path(out), limits)
    folder = OutputFolder(Path(out), [source.name_of(index) for index in range(len(source))])
    ids = image_ids(source.paths)
    rows, known, unreadable = [], [], []
    with _Progress(len(source)) as progress:
        for index, pixels in enumerate(_read_ahead(source, workers)):
            name = source.paths[index]
            if isinstance(pixels, BadImage):
                progress.say(f"left out: {pixels}")
                unreadable.append(printable(name))
                continue
            found = detector.predict(pixels, score=score)
            folder.write_picture(name, draw_prediction(pixels, found))
            size = {"width": pixels.shape[1], "height": pixels.shape[0]}
            known.append({"id": ids[index], "file_name": printable(name), **size})
            rows += coco_results(found, ids[index], detector.category_ids, printable(name))
            progress.advance()
    if not known:
        raise UsageError(f"images={printable(str(images))}: none of {len(source)} images can be read, {unreadable[0]}")
    categories = zip(detector.category_ids, detector.classes, strict=True)
    document = {"images": known, "categories": [{"id": number, "name": name} for number, name in categories]}
    folder.write_json(IMAGES, document)
    folder.write_json(RESULTS, rows)
    return {"images": len(known), "objects": len(rows), "unreadable": unreadable, "out": str(out)}


# ---- what comes in ----


def check_folders(images: Path, out: Path, overwrite: bool) -> None:
    """Raise UsageError where the output would lie among the images, or something lies there already."""
    if not images.exists():
        raise UsageError(f"images={printable(str(images))} does not exist")
    if out.exists() and not out.is_dir():
        raise UsageError(f"out={printable(str(out))} is a file, and must be a folder")
    inputs = images.resolve() if images.is_dir() else images.resolve().parent
    if inputs == out.resolve() or inputs.is_relative_to((out / PICTURES).resolve()):
        raise UsageError(f"out={printable(str(out))} is where the images lie: choose another folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UsageError(f"out={printable(str(out))} holds something already: choose another folder, or --overwrite it")


def images_below(images: Path, out: Path, limits: ImageLimits = DEFAULT_LIMITS) -> ImageFiles:
    """The image, or all images below the folder but those in ``out``. Raises UsageError where there is none."""
    if images.is_file():
        return ImageFiles(str(images.parent), [images.name], limits=limits)
    source = image_folder(str(images))
    below = out.resolve()
    kept = [path for path in source.paths if not (images / path).parent.resolve().is_relative_to(below)]
    if not kept:
        raise UsageError(f"images={printable(str(images))}: all images lie in out={printable(str(out))}")
    return ImageFiles(str(images), kept, limits=limits)


def image_ids(paths: Sequence[str]) -> list[int]:
    """The numbers that the names are, as COCO's are (000000000139.jpg), else 1, 2, ... in the order of the paths."""
    stems = [Path(path).stem for path in paths]
    if all(stem.isascii() and stem.isdecimal() and len(stem) <= 18 for stem in stems):
        numbers = [int(stem) for stem in stems]
        if len(set(numbers)) == len(numbers):
            return numbers
    return list(range(1, len(paths) + 1))


def _read_ahead(source: ImageFiles, workers: int) -> Iterator[Pixels | BadImage]:
    def read(index: int) -> Pixels | BadImage:
        try:
            return source.read(index)
        except BadImage as bad:
            return bad

    return prefetched(read, range(len(source)), workers)


# ---- what goes out ----


def coco_results(
    found: Prediction, image_id: int, category_ids: Sequence[int | str], file_name: str
) -> list[dict[str, Any]]:
    """Rows of COCO's results: box as x, y, width, height; masks as compressed run lengths."""
    rows = []
    for row in range(len(found)):
        x0, y0, x1, y1 = found.boxes[row].tolist()
        entry: dict[str, Any] = {"image_id": image_id, "category_id": category_ids[found.labels[row]]}
        entry |= {"bbox": [round(value, 3) for value in (x0, y0, x1 - x0, y1 - y0)]}
        entry |= {"score": round(float(found.scores[row]), 6), "file_name": file_name}
        if found.masks is not None:
            (encoded,) = encode_masks(found.masks[row : row + 1])
            entry["segmentation"] = {"size": [int(n) for n in encoded["size"]], "counts": encoded["counts"].decode()}
        if found.keypoints is not None:
            entry["keypoints"] = [round(value, 3) for value in found.keypoints[row].reshape(-1).tolist()]
        rows.append(entry)
    return rows


class OutputFolder:
    """Files below one folder: whole or not there, never through a link that leads out of it, never over an input.

    inputs: paths that must stay as they are. JSON files of an earlier use are removed: they are of other pictures.
    """

    def __init__(self, folder: Path, inputs: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.inputs = folder, {os.path.realpath(path) for path in inputs}
        self._inode = inode_of(folder)
        for name in (RESULTS, IMAGES):
            self._place(Path(name)).unlink(missing_ok=True)

    def write_picture(self, name: str, picture: Image.Image) -> None:
        """``pictures/NAME``, in the format that the name's extension says; PNG for an unknown one, which it gets."""
        kind = Image.registered_extensions().get(Path(name).suffix.lower(), "")
        if kind not in _FORMATS:
            kind, name = "PNG", f"{name}.png"
        data = io.BytesIO()
        picture.save(data, kind, **({"quality": _QUALITY} if kind in ("JPEG", "WEBP") else {}))
        write_file(self._place(Path(PICTURES, name)), lambda file: file.write(data.getvalue()))

    def write_json(self, name: str, document: Any) -> None:
        write_text(self._place(Path(name)), json.dumps(document) + "\n")

    def _place(self, relative: Path) -> Path:
        path = self.folder / relative
        if self._inode != inode_of(self.folder):  # else it would be made anew, with a part of the files
            raise UsageError(f"out={printable(str(self.folder))} was removed or moved while it was written to")
        inside = path.parent.resolve().is_relative_to(self.folder.resolve())  # before a folder is made behind a link
        if not inside or os.path.realpath(path) in self.inputs:
            what = "would overwrite one of the images" if inside else "lies behind a link out of the folder"
            raise UsageError(f"out={printable(str(self.folder))}: {printable(str(relative))} {what}")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class _Progress:
    """A bar where stderr is a terminal, else a line now and then."""

    def __init__(self, total: int) -> None:
        self.terminal = Terminal(sys.stderr, total=total, done=0, unit="image")
        self.lines = Progress("images", total, "images", self.terminal.write)

    def __enter__(self) -> _Progress:
        if self.terminal.bar is None:
            self.lines.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        try:
            self.lines.__exit__(*raised)
        finally:
            self.terminal.end_progress()

    @property
    def say(self) -> Callable[[str], None]:
        return self.terminal.write

    def advance(self) -> None:
        if self.terminal.bar is not None:
            self.terminal.advance()
        else:
            self.lines.advance()
