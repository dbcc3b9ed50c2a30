"""What a frozen encoder learned, measured: linear, k-NN, fine-tuning, RoI linear, dense consistency, rank, pca.

``python -m scrl_fast.evaluate TASK`` from the command line. Names are loaded when they are first used, so that a
misspelt option is answered before torch is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from scrl_fast._lazy import loader_of

if TYPE_CHECKING:
    from scrl_fast.evaluate.dense import DenseResult as DenseResult
    from scrl_fast.evaluate.dense import dense_consistency as dense_consistency
    from scrl_fast.evaluate.regions import LabelledRegions as LabelledRegions
    from scrl_fast.evaluate.regions import RoILinearResult as RoILinearResult
    from scrl_fast.evaluate.regions import demo_roi_linear as demo_roi_linear
    from scrl_fast.evaluate.regions import roi_linear as roi_linear

_ROI_LINEAR = ("LabelledRegions", "RoILinearResult", "demo_roi_linear", "roi_linear")
_ATTRIBUTES = {
    **dict.fromkeys(_ROI_LINEAR, "scrl_fast.evaluate.regions"),
    **dict.fromkeys(("DenseResult", "dense_consistency"), "scrl_fast.evaluate.dense"),
}

__all__ = ["DenseResult", "LabelledRegions", "RoILinearResult", "demo_roi_linear", "dense_consistency", "roi_linear"]

__getattr__ = loader_of(__name__, _ATTRIBUTES)
