"""The input: sources of images, decoding, and the loader that makes batches of two views.

Names are loaded when they are first used, so that ``python -m scrl_fast.data.pack`` answers a misspelt option before
torch is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from scrl_fast._lazy import loader_of

if TYPE_CHECKING:
    from scrl_fast.data.bad_images import TooManyBadImages as TooManyBadImages
    from scrl_fast.data.batch import Batch as Batch
    from scrl_fast.data.batch import PackedBatch as PackedBatch
    from scrl_fast.data.gpu import views_on_gpu as views_on_gpu
    from scrl_fast.data.image_files import BadImage as BadImage
    from scrl_fast.data.image_files import ImageLimits as ImageLimits
    from scrl_fast.data.jpeg import decoders as decoders
    from scrl_fast.data.loader import Loader as Loader
    from scrl_fast.data.sources.base import ImagesWithBoxes as ImagesWithBoxes
    from scrl_fast.data.sources.base import Source as Source
    from scrl_fast.data.sources.base import identity_of as identity_of
    from scrl_fast.data.sources.demo import DemoScenes as DemoScenes
    from scrl_fast.data.sources.factory import make_source as make_source
    from scrl_fast.data.to_device import on_device as on_device
    from scrl_fast.data.workers import LoaderStalled as LoaderStalled

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

__getattr__ = loader_of(
    __name__,
    {
        "BadImage": "scrl_fast.data.image_files",
        "Batch": "scrl_fast.data.batch",
        "DemoScenes": "scrl_fast.data.sources.demo",
        "ImageLimits": "scrl_fast.data.image_files",
        "ImagesWithBoxes": "scrl_fast.data.sources.base",
        "Loader": "scrl_fast.data.loader",
        "LoaderStalled": "scrl_fast.data.workers",
        "PackedBatch": "scrl_fast.data.batch",
        "Source": "scrl_fast.data.sources.base",
        "TooManyBadImages": "scrl_fast.data.bad_images",
        "decoders": "scrl_fast.data.jpeg",
        "identity_of": "scrl_fast.data.sources.base",
        "make_source": "scrl_fast.data.sources.factory",
        "on_device": "scrl_fast.data.to_device",
        "views_on_gpu": "scrl_fast.data.gpu",
    },
)
