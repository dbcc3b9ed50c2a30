"""Settings of a Faster R-CNN of detectron2 or mmdet that starts from an exported ResNet, as those libraries read them.

They say what an encoder of ours needs and those libraries' defaults are not: RGB images with the normalisation of
training, the stride in the 3 x 3 convolution, no frozen stages, norms that are trained. The rest is the default there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

_BASIC_DEPTHS = (18, 34)  # of two convolutions a block: a quarter of the channels


def resnet_depth(backbone: str) -> int:
    """50 of ``resnet50``; 0 for an encoder that those libraries do not make by its depth."""
    found = re.fullmatch(r"(?:timm:)?resnet(18|34|50|101|152)", backbone)
    return int(found[1]) if found else 0


def detectron2_config(weights: str, depth: int, mean: Sequence[float], std: Sequence[float]) -> str:
    """YAML for ``cfg.merge_from_file``. weights: the exported file. mean, std: of RGB in 0 to 1."""
    levels, pyramid = [f"res{stage}" for stage in (2, 3, 4, 5)], [f"p{stage}" for stage in (2, 3, 4, 5, 6)]
    resnet: dict[str, Any] = {"DEPTH": depth, "NORM": "SyncBN", "STRIDE_IN_1X1": False, "OUT_FEATURES": levels}
    if depth in _BASIC_DEPTHS:
        resnet["RES2_OUT_CHANNELS"] = 64
    model = {
        "META_ARCHITECTURE": "GeneralizedRCNN",
        "WEIGHTS": weights,
        "PIXEL_MEAN": _levels(mean),
        "PIXEL_STD": _levels(std),
        "BACKBONE": {"NAME": "build_resnet_fpn_backbone", "FREEZE_AT": 0},
        "RESNETS": resnet,
        "FPN": {"IN_FEATURES": list(levels), "NORM": "SyncBN"},
        "ANCHOR_GENERATOR": {"SIZES": [[32], [64], [128], [256], [512]], "ASPECT_RATIOS": [[0.5, 1.0, 2.0]]},
        "RPN": {
            "IN_FEATURES": pyramid,
            "PRE_NMS_TOPK_TRAIN": 2000,
            "PRE_NMS_TOPK_TEST": 1000,
            "POST_NMS_TOPK_TRAIN": 1000,
            "POST_NMS_TOPK_TEST": 1000,
        },
        "ROI_HEADS": {"NAME": "StandardROIHeads", "IN_FEATURES": pyramid[:-1]},
        "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 2, "POOLER_RESOLUTION": 7},
    }
    head = "# Faster R-CNN of detectron2. NORM: SyncBN needs several GPUs, BN takes one. Data and schedule are yours.\n"
    return head + yaml.safe_dump({"VERSION": 2, "MODEL": model, "INPUT": {"FORMAT": "RGB"}}, sort_keys=False)


def mmdet_config(weights: str, depth: int, mean: Sequence[float], std: Sequence[float]) -> str:
    """A Python configuration of mmdet 3. weights: the exported file, beside the configuration."""
    place = "{{ fileDirname }}/" + weights  # mmengine puts the folder of the configuration there
    neck = "    neck=dict(in_channels=[64, 128, 256, 512]),\n" if depth in _BASIC_DEPTHS else ""
    parts = ("models/faster-rcnn_r50_fpn", "datasets/coco_detection", "schedules/schedule_1x", "default_runtime")
    bases = "".join(f"    {f'mmdet::_base_/{part}.py'!r},\n" for part in parts)
    return f"""# Faster R-CNN of mmdet on COCO. norm_cfg: SyncBN needs several GPUs, BN takes one.
_base_ = [
{bases}]
model = dict(
    data_preprocessor=dict(mean={_levels(mean)}, std={_levels(std)}, bgr_to_rgb=True),
    backbone=dict(
        depth={depth},
        frozen_stages=-1,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        norm_eval=False,
        style="pytorch",
        init_cfg=dict(type="Pretrained", checkpoint={place!r}, prefix="backbone."),
    ),
{neck})
"""


def _levels(values: Sequence[float]) -> list[float]:
    """On the scale of 0 to 255."""
    return [round(255 * float(value), 4) for value in values]
