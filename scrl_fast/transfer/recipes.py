"""The recipes of transfer: options that ``--config NAME`` sets beneath those of the command line."""

from __future__ import annotations

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    # tried on Aquarium (448 photographs) with two CPU cores: docs/transfer.md
    "small": {
        "model": {
            "short_side": [192, 192],
            "test_short_side": 192,
            "anchor_scale": 4.0,
            "fpn_channels": 64,
            "head_channels": 256,
            "mask_channels": 64,
            "keypoint_channels": 128,
            "proposals": [200, 100],
            "proposals_before_nms": [400, 200],
            "rois_per_image": 64,
        },
        "optim": {"lr": 0.16, "clip_norm": 5.0, "warmup_steps": -1, "lr_steps": [-1, -1]},
        "train": {"batch_size": 4, "steps": 600},
    },
}
"""By name."""
