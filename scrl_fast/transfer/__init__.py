"""The backbone goes to work: detectors on COCO, VOC, Cityscapes or any labelled regions, from pre-trained weights.

``python -m scrl_fast.transfer TASK`` is the command; from Python::

    detector = build_detector("faster_rcnn", classes=10, backbone="resnet18", init="last.pt", short_side=96)
    losses = fine_tune(detector, train_scenes, steps=500, batch_size=16, lr=0.02)
    result = average_precision(detector, test_scenes)  # {"AP": ..., "AP50": ..., ...}, 0 to 1

where scenes are anything with ``read(i)``, ``boxes(i)`` and ``labels(i)`` (`scrl_fast.evaluate.roi_linear` takes the
same): the demo's scenes and what ``data.coco`` and ``data.voc`` read.
"""

from scrl_fast.transfer.detector import build_detector
from scrl_fast.transfer.fine_tune import fine_tune
from scrl_fast.transfer.predict import average_precision, detect

__all__ = ["average_precision", "build_detector", "detect", "fine_tune"]
