"""The operations of SCRL, each usable on its own; a module's file name is its operation's name in every room.

Imported eagerly on purpose: modules share their names with the functions in them, and a lazy import of the module would
put it in the function's place.
"""

from scrl_fast.ops.augment_views import augment_views
from scrl_fast.ops.ema_update import ema_update_
from scrl_fast.ops.lars_step import lars_step_
from scrl_fast.ops.normalized_mse_loss import normalized_mse_loss, two_view_loss
from scrl_fast.ops.onnx_translation import onnx_translation_table
from scrl_fast.ops.patch_roi_align import RoIAlignPatch, patch_roi_align
from scrl_fast.ops.roi_align import RoIAlign, roi_align, roi_align_reference
from scrl_fast.ops.sample_box_pairs import sample_box_pairs
from scrl_fast.ops.sample_box_pairs_replay import sample_box_pairs_replay
from scrl_fast.ops.view_table import PackedImages, pack_images

__all__ = [
    "PackedImages",
    "RoIAlign",
    "RoIAlignPatch",
    "augment_views",
    "ema_update_",
    "lars_step_",
    "normalized_mse_loss",
    "onnx_translation_table",
    "pack_images",
    "patch_roi_align",
    "roi_align",
    "roi_align_reference",
    "sample_box_pairs",
    "sample_box_pairs_replay",
    "two_view_loss",
]
