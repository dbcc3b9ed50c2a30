"""The input: sources of images, decoding, and the loader that makes batches of two views."""

from scrl_fast.data.bad import TooManyBadImages
from scrl_fast.data.batch import Batch, PackedBatch
from scrl_fast.data.decode import BadImage, decoders
from scrl_fast.data.demo import DemoScenes
from scrl_fast.data.gpu import views_on_gpu
from scrl_fast.data.loader import Loader, LoaderStalled
from scrl_fast.data.source import Source, make_source
from scrl_fast.data.transfer import on_device

__all__ = [
    "BadImage",
    "Batch",
    "DemoScenes",
    "Loader",
    "LoaderStalled",
    "PackedBatch",
    "Source",
    "TooManyBadImages",
    "decoders",
    "make_source",
    "on_device",
    "views_on_gpu",
]
