"""Errors about files of weights."""

from __future__ import annotations

from scrl_fast.errors import UsageError


class WeightsError(UsageError):
    """Weights that cannot be read, or that do not fit the network they were meant for."""


class CheckpointError(WeightsError):
    """A checkpoint that is missing, damaged, or not what was asked for."""
