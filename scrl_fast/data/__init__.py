"""The input: sources of images, decoding, and the loader that makes batches of two views."""

from scrl_fast.data.bad import TooManyBadImages
from scrl_fast.data.decode import BadImage, decoders
from scrl_fast.data.demo import DemoScenes
from scrl_fast.data.loader import Batch, Loader, LoaderStalled
from scrl_fast.data.source import Source, make_source
from scrl_fast.data.transfer import on_device

__all__ = [
    "BadImage",
    "Batch",
    "DemoScenes",
    "Loader",
    "LoaderStalled",
    "Source",
    "TooManyBadImages",
    "decoders",
    "make_source",
    "on_device",
]
