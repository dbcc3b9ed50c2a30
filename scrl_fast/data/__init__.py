"""The input: sources of images, decoding, and the loader that makes batches of two views."""

from scrl_fast.data.bad_images import TooManyBadImages
from scrl_fast.data.batch import Batch, PackedBatch
from scrl_fast.data.gpu import views_on_gpu
from scrl_fast.data.image_files import BadImage, ImageLimits
from scrl_fast.data.jpeg import decoders
from scrl_fast.data.loader import Loader
from scrl_fast.data.sources.base import ImagesWithBoxes, Source, identity_of
from scrl_fast.data.sources.demo import DemoScenes
from scrl_fast.data.sources.factory import make_source
from scrl_fast.data.to_device import on_device
from scrl_fast.data.workers import LoaderStalled

__all__ = [
    "BadImage",
    "Batch",
    "DemoScenes",
    "ImageLimits",
    "ImagesWithBoxes",
    "Loader",
    "LoaderStalled",
    "PackedBatch",
    "Source",
    "TooManyBadImages",
    "decoders",
    "identity_of",
    "make_source",
    "on_device",
    "views_on_gpu",
]
