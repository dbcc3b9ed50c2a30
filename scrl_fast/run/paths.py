"""Names in a run folder, and which run folder a path lies in."""

from scrl_fast.config.run_folder import CHECKPOINTS, CONFIG, folder_of

METRICS, LOG, ENVIRONMENT = "metrics.jsonl", "log.txt", "env.json"
BOXES, CURVES = "boxes.png", "curves.png"

__all__ = ["BOXES", "CHECKPOINTS", "CONFIG", "CURVES", "ENVIRONMENT", "LOG", "METRICS", "folder_of"]
