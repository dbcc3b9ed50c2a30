"""Fine-tune detectors from pre-trained weights on COCO, VOC, Cityscapes or any images with labelled boxes.

``python -m scrl_fast.transfer TASK`` is the command; from Python::

    detector = build_detector("faster_rcnn", classes=10, backbone="resnet18", init="last.pt", short_side=96)
    losses = fine_tune(detector, train_scenes, steps=500, batch_size=16, lr=0.02)
    result = average_precision(detector, test_scenes)  # {"AP": ..., "AP50": ..., ...}, 0 to 1

``train_scenes`` and ``test_scenes`` have ``read(i)``, ``boxes(i)`` and ``labels(i)``, as for
`scrl_fast.evaluate.roi_linear`: the demo's scenes, or the result of ``read_coco``, ``read_voc`` or ``read_cityscapes``.
Names are loaded when they are first used, so that a misspelt option is answered before torch is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from scrl_fast._lazy import loader_of

if TYPE_CHECKING:
    from scrl_fast.transfer.detector import build_detector as build_detector
    from scrl_fast.transfer.fine_tuning import fine_tune as fine_tune
    from scrl_fast.transfer.predict import average_precision as average_precision
    from scrl_fast.transfer.predict import detect as detect

_ATTRIBUTES = {
    "average_precision": "scrl_fast.transfer.predict",
    "build_detector": "scrl_fast.transfer.detector",
    "detect": "scrl_fast.transfer.predict",
    "fine_tune": "scrl_fast.transfer.fine_tuning",
}

__all__ = ["average_precision", "build_detector", "detect", "fine_tune"]

__getattr__ = loader_of(__name__, _ATTRIBUTES)
