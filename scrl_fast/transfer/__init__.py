"""Fine-tune detectors from pre-trained weights on COCO, VOC, Cityscapes or any images with labelled boxes.

``python -m scrl_fast.transfer TASK`` is the command; from Python::

    detector = build_detector("faster_rcnn", classes=10, backbone="resnet18", init="last.pt", short_side=96)
    losses = fine_tune(detector, train_scenes, steps=500, batch_size=16, lr=0.02)
    result = average_precision(detector, test_scenes)  # {"AP": ..., "AP50": ..., ...}, 0 to 1
    found = load_detector("runs/coco").predict("street.jpg")  # boxes, labels, names, scores

``train_scenes`` and ``test_scenes`` have ``read(i)``, ``boxes(i)`` and ``labels(i)``, as for
`scrl_fast.evaluate.roi_linear`: the demo's scenes, or the result of ``read_coco``, ``read_voc`` or ``read_cityscapes``.
Names are loaded when they are first used, so that a misspelt option is answered before torch is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from scrl_fast._lazy import loader_of

if TYPE_CHECKING:
    from scrl_fast.transfer.detector import build_detector as build_detector
    from scrl_fast.transfer.export import export_detector as export_detector
    from scrl_fast.transfer.fine_tuning import fine_tune as fine_tune
    from scrl_fast.transfer.predict import average_precision as average_precision
    from scrl_fast.transfer.predict import detect as detect
    from scrl_fast.transfer.trained import Prediction as Prediction
    from scrl_fast.transfer.trained import TrainedDetector as TrainedDetector
    from scrl_fast.transfer.trained import load_detector as load_detector

_ATTRIBUTES = {
    "Prediction": "scrl_fast.transfer.trained",
    "TrainedDetector": "scrl_fast.transfer.trained",
    "average_precision": "scrl_fast.transfer.predict",
    "build_detector": "scrl_fast.transfer.detector",
    "detect": "scrl_fast.transfer.predict",
    "export_detector": "scrl_fast.transfer.export",
    "fine_tune": "scrl_fast.transfer.fine_tuning",
    "load_detector": "scrl_fast.transfer.trained",
}

__all__ = [
    "Prediction",
    "TrainedDetector",
    "average_precision",
    "build_detector",
    "detect",
    "export_detector",
    "fine_tune",
    "load_detector",
]

__getattr__ = loader_of(__name__, _ATTRIBUTES)
