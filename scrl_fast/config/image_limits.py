"""The options that limit what an image file may ask for: of training, evaluation and transfer alike."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

from scrl_fast.config.defaults import MAX_PIXELS
from scrl_fast.config.validation import at_least, check_fields


@dataclass(kw_only=True)
class ImageLimitOptions:
    """What every section `data` has; its `__post_init__` passes `IMAGE_LIMIT_RANGES` to `check_fields`."""

    max_pixels: int = MAX_PIXELS
    """Images with more pixels than this are refused before they are decoded."""
    max_file_bytes: int = 268_435_456
    """Image files larger than this are refused before they are read."""
    max_pixels_per_byte: int = 10_000
    """Images of more than 16 megapixels are refused when their file is smaller than this asks for: a file of a hundred
    bytes may claim 177 megapixels. PNG and GIF stay below it, whatever they show."""
    max_scans: int = 100
    """JPEGs of more scans than this are refused: each scan costs time, and 3,000 of them 30 s."""
    max_decoded_bytes: int = 1_610_612_736
    """Images whose decoding takes more memory than this are refused before they are decoded: about 7 bytes a pixel,
    13 in a progressive JPEG."""
    decode_memory: int = 8_589_934_592
    """Bytes that the threads of a process may take together for decoding large images; a thread waits for its share."""


IMAGE_LIMIT_RANGES = dict.fromkeys((field.name for field in fields(ImageLimitOptions)), at_least(1))


def add_image_limits(parser: argparse.ArgumentParser, **also: str) -> None:
    """Gives a command that has no section `data` its options, under the names that refused images are told with.

    also: a further spelling of an option, by the limit's name.
    """
    group = parser.add_argument_group("limits of image files (the documentation explains them)")
    for field in fields(ImageLimitOptions):
        names = [f"--data.{field.name}", *([also[field.name]] if field.name in also else [])]
        group.add_argument(*names, dest=field.name, type=int, default=field.default, help="default: %(default)s")


def image_limits_of(args: argparse.Namespace) -> ImageLimitOptions:
    """The values of `add_image_limits`. Raises UsageError naming one that is out of range."""
    options = ImageLimitOptions(**{field.name: getattr(args, field.name) for field in fields(ImageLimitOptions)})
    check_fields(options, "data", **IMAGE_LIMIT_RANGES)
    return options
