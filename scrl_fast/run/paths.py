"""Names in a run folder, and which run folder a path lies in."""

from scrl_fast.config.run_folder import CHECKPOINTS, CONFIG, METRICS, folder_of, is_run

LOG, ENVIRONMENT = "log.txt", "env.json"
BOXES, CURVES = "boxes.png", "curves.png"

__all__ = ["BOXES", "CHECKPOINTS", "CONFIG", "CURVES", "ENVIRONMENT", "LOG", "METRICS", "folder_of", "is_run"]
