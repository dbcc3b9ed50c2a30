"""What training has added: the encoder as it was against the encoder as it is."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from scrl_fast import build as prepare

if TYPE_CHECKING:
    from scrl_fast.trainer import SCRLTrainer


def compare_with_untrained(trainer: SCRLTrainer) -> dict[str, Any]:
    """RoI linear accuracy on held-out scenes, logged too: ``{"roi_linear": {"random": ..., "trained": ...}}``.

    The untrained encoder is made anew: the seed alone decides its weights. Only for ``data.source=demo``.
    """
    from scrl_fast.evaluate import demo_roi_linear

    trainer.log.say("RoI linear accuracy on held-out scenes, for the untrained and for the trained encoder ...")
    untrained = prepare.build_model(trainer.config, trainer.source.num_classes).to(trainer.device)
    trained = copy.deepcopy(untrained.online.encoder)  # one whose BatchNorm asks no other process
    trained.load_state_dict(trainer.model.online.encoder.state_dict())
    encoders = {"random": untrained.online.encoder, "trained": trained}
    results = demo_roi_linear(encoders, trainer.config, train=trainer.source)
    before, after = results["random"], results["trained"]
    trainer.log.say(
        f"linear classifier on frozen features of {after.boxes} boxes, {after.classes} classes: "
        f"random initialisation {before.accuracy:.1%}, after {trainer.step} steps {after.accuracy:.1%} "
        f"({100 * (after.accuracy - before.accuracy):+.1f} points)"
    )
    return {"roi_linear": {name: asdict(each) for name, each in results.items()}}
