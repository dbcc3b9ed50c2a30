"""Optimizers of pre-training: LARS and AdamW, each with the target network's moving average beside its update."""

from scrl_fast.optim.adamw import AdamW
from scrl_fast.optim.lars import LARS, lars_param_groups

__all__ = ["LARS", "AdamW", "lars_param_groups"]
