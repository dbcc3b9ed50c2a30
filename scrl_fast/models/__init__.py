"""Networks: encoders, projection heads, and SCRL (BYOL is SCRL without boxes)."""

from scrl_fast.models.custom import ModuleEncoder, wrap_module
from scrl_fast.models.encoder import Encoder
from scrl_fast.models.encoders import build_encoder, encoder_names
from scrl_fast.models.heads import projection_head
from scrl_fast.models.scrl import SCRL, Branch, SCRLOutput

__all__ = [
    "SCRL",
    "Branch",
    "Encoder",
    "ModuleEncoder",
    "SCRLOutput",
    "build_encoder",
    "encoder_names",
    "projection_head",
    "wrap_module",
]
