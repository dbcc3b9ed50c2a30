"""Several processes that train one network: the process group, its start, and BatchNorm over all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scrl_fast._lazy import loader_of

if TYPE_CHECKING:
    from scrl_fast.distributed.world import World as World

__all__ = ["World"]

__getattr__ = loader_of(__name__, {"World": "scrl_fast.distributed.world"})
