"""What a frozen encoder learned, measured."""

from scrl_fast.evaluate.roi_linear import LabelledRegions, RoILinearResult, demo_roi_linear, roi_linear

__all__ = ["LabelledRegions", "RoILinearResult", "demo_roi_linear", "roi_linear"]
