"""Networks: encoders, projection heads, and SCRL (BYOL is SCRL without boxes)."""

from scrl_fast.models.encoders import Encoder, build_encoder, encoder_names
from scrl_fast.models.heads import projection_head
from scrl_fast.models.scrl import SCRL, Branch, SCRLOutput

__all__ = [
    "SCRL",
    "Branch",
    "Encoder",
    "SCRLOutput",
    "build_encoder",
    "encoder_names",
    "projection_head",
]
