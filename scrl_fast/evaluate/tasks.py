"""The tasks of ``python -m scrl_fast.evaluate`` by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scrl_fast.evaluate.compare import compare_task
from scrl_fast.evaluate.encoder import EvaluatedEncoder
from scrl_fast.evaluate.image_tasks import finetune_task, knn_task, linear_task, rank_task
from scrl_fast.evaluate.region_tasks import dense_task, pca_task, roi_linear_task
from scrl_fast.evaluate.result import TaskContext, TaskResult

TASKS: dict[str, Callable[[Any, EvaluatedEncoder, TaskContext], TaskResult]] = {
    "linear": linear_task,
    "finetune": finetune_task,
    "knn": knn_task,
    "roi-linear": roi_linear_task,
    "dense-consistency": dense_task,
    "rank": rank_task,
    "pca": pca_task,
}

COMPARISONS: dict[str, Callable[[Any, TaskContext], TaskResult]] = {"compare": compare_task}
"""Tasks that load several encoders themselves."""
