"""The operations of SCRL, each usable on its own; a module's file name is its operation's name in every room.

Imported eagerly on purpose: modules share their names with the functions in them, and a lazy import of the module would
put it in the function's place.
"""

from scrl_fast.ops.ema_update import ema_update_

__all__ = ["ema_update_"]
