"""What ``python -m scrl_fast.transfer`` does besides its tasks. torch is imported once the options are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scrl_fast.config.command_line import CommandParser
from scrl_fast.config.defaults import MAX_RESIZED, SCORE_THRESHOLD, SHOWN_SCORE
from scrl_fast.config.image_limits import add_image_limits, image_limits_of
from scrl_fast.config.validation import check_device, clean_path
from scrl_fast.errors import UsageError, tell, tell_result
from scrl_fast.transfer.config import LARGEST_SIDE

PROG = "python -m scrl_fast.transfer"
MOST_WORKERS = 1024
"""Threads that read images; more are a mistake."""
SUMMARIES = {
    "predict": "use a trained detector on a folder of images",
    "export": "write a trained detector for torchvision or as ONNX",
    "compare": "a task from several starts, with error bars",
}
"""A line on each command."""


def predict(argv: Sequence[str]) -> None:
    """``predict --detector=RUN --images=DIR --out=OUT``: pictures with boxes, and COCO results."""
    parser = CommandParser(
        prog=f"{PROG} predict",
        description="Detect objects in images: pictures with boxes in OUT/pictures, COCO results in OUT/results.json.",
    )
    _add_detector(parser)
    parser.add_argument("--images", type=clean_path, required=True, help="folder of images, at any depth, or one image")
    parser.add_argument("--out", type=clean_path, required=True, help="folder to write to, new or empty")
    _add_score(parser, SHOWN_SCORE)
    parser.add_argument("--workers", type=int, default=2, help="threads that read images (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="take a folder OUT that holds something already")
    add_image_limits(parser)
    args = parser.parse(argv)
    limits = image_limits_of(args)
    _check_score(args.score)
    _check_pixels(args.max_resized)
    if not 0 <= args.workers <= MOST_WORKERS:
        raise UsageError(f"--workers={args.workers}: must be from 0 to {MOST_WORKERS}")
    check_device("device", args.device)
    from scrl_fast.run.signals import ending_cleanly

    kept = f"ended before all images were done; the pictures in {args.out} are whole, its JSON files are not written"
    with ending_cleanly("scrl_fast.transfer", kept):
        from scrl_fast.data.image_files import ImageLimits
        from scrl_fast.run.numerics import keep_memory
        from scrl_fast.transfer.predict_folder import check_folders, predict_folder
        from scrl_fast.transfer.trained import load_detector

        keep_memory()
        check_folders(Path(args.images), Path(args.out), args.overwrite)  # before a detector is read
        loading: dict[str, Any] = {"device": args.device, "backbone": args.backbone, "max_pixels": args.max_resized}
        detector = load_detector(args.detector, **loading)
        tell(f"detector: {detector.path}")
        options: dict[str, Any] = {"score": args.score, "workers": args.workers, "overwrite": args.overwrite}
        options["limits"] = ImageLimits.of(limits)
        done = predict_folder(detector, args.images, args.out, **options)
    left_out = f", {len(done['unreadable'])} images could not be read" if done["unreadable"] else ""
    none_left = not done["objects"] and args.score > 0
    weaker = f", none scores above --score={args.score:g}: a lower one keeps weaker ones" if none_left else ""
    tell_result(f"{done['objects']} objects in {done['images']} images{left_out}{weaker}: {args.out}")


def export(argv: Sequence[str]) -> None:
    """``export --detector=RUN --to=FORMAT --out=FILE``: the detector for torchvision alone, or as ONNX."""
    parser = CommandParser(
        prog=f"{PROG} export",
        description="Write a trained detector: torchvision's state dict with a file that builds it, or an ONNX graph.",
    )
    _add_detector(parser)
    parser.add_argument("--to", choices=("torchvision", "onnx"), required=True, help="layout to write")
    parser.add_argument("--out", type=clean_path, required=True, help="file to write: .pth or .onnx")
    _add_score(parser, SCORE_THRESHOLD)
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    args = parser.parse(argv)
    _check_score(args.score)
    _check_pixels(args.max_resized)
    from scrl_fast.run.signals import EXPORT_ENDED, ending_cleanly

    with ending_cleanly("scrl_fast.transfer", EXPORT_ENDED):
        from scrl_fast.transfer.export import export_detector
        from scrl_fast.transfer.trained import load_detector

        detector = load_detector(args.detector, device="cpu", backbone=args.backbone, max_pixels=args.max_resized)
        tell(f"detector: {detector.path}")
        done = export_detector(detector, args.to, args.out, score=args.score, overwrite=args.overwrite)
    tell_result(f"{detector.config.detector} as {args.to}: {', '.join(done['files'])} ({done['checked']})")


def _check_score(score: float) -> None:
    if not 0 <= score <= 1:
        raise UsageError(f"--score={score}: must be from 0 to 1")


def _add_detector(parser: CommandParser) -> None:
    parser.add_argument("--detector", metavar="RUN", type=clean_path, required=True, help="run folder or checkpoint")
    own = "package.module:function of a detector on a network of your own, which no file may name alone"
    parser.add_argument("--backbone", default="", help=own)
    larger = "a detector whose options resize images to more is refused (default: %(default)s)"
    parser.add_argument("--max_pixels", dest="max_resized", type=int, default=MAX_RESIZED, help=larger)


def _add_score(parser: CommandParser, default: float) -> None:
    parser.add_argument("--score", type=float, default=default, help="keep objects above it (default: %(default)s)")


def _check_pixels(max_pixels: int) -> None:
    if not 1 <= max_pixels <= LARGEST_SIDE**2:
        raise UsageError(f"--max_pixels={max_pixels}: must be from 1 to {LARGEST_SIDE**2}")


LESS_MEMORY_TRAINING = (
    "lower --train.batch_size, --model.short_side, --model.long_side or --data.workers, or use "
    "--train.precision=bf16 or a smaller --model.backbone"
)
LESS_MEMORY = {
    "predict": "lower --workers, or use smaller images; a detector on smaller images is trained by --model.short_side",
    "export": "export it on a machine with more memory: nothing was written",
}
"""Which options of a command lower its need of memory."""
COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"predict": predict, "export": export}
