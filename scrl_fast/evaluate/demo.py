"""What training has added: the encoder as it was against the encoder as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import nn

from scrl_fast.build import build_model
from scrl_fast.config.schema import Config
from scrl_fast.evaluate import demo_roi_linear


def compare_with_untrained(
    config: Config,
    encoder: nn.Module,
    source: Any,
    *,
    steps: int,
    say: Callable[[str], None],
    untrained: nn.Module | None = None,
) -> dict[str, Any]:
    """RoI linear accuracy on held-out demo scenes: ``{"roi_linear": {"random": ..., "trained": ...}}``.

    config: of the run. encoder: the trained one. source: the scenes it was trained on. steps: how many it was trained.
    say: takes lines for the log.
    untrained: the network before training, where a program handed it over. Any other is made anew: the seed alone
    decides its weights.
    """
    say("RoI linear accuracy on held-out scenes, for the untrained and for the trained encoder ...")
    device = next(encoder.parameters()).device
    before_it = build_model(config, source.num_classes, untrained).to(device).online.encoder
    trained = copy.deepcopy(before_it)  # one whose BatchNorm asks no other process
    trained.load_state_dict(encoder.state_dict())
    results = demo_roi_linear({"random": before_it, "trained": trained}, config, train=source)
    before, after = results["random"], results["trained"]
    say(
        f"linear classifier on frozen features of {after.boxes} boxes, {after.classes} classes: "
        f"random initialisation {before.accuracy:.1%}, after {steps} steps {after.accuracy:.1%} "
        f"({100 * (after.accuracy - before.accuracy):+.1f} points)"
    )
    return {"roi_linear": {name: asdict(each) for name, each in results.items()}}
