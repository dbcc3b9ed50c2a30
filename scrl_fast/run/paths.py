"""Names in a run folder, and which run folder a path lies in."""

from scrl_fast.config.run_folder import CHECKPOINTS, CONFIG, folder_of

__all__ = ["CHECKPOINTS", "CONFIG", "folder_of"]
