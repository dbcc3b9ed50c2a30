"""metrics.jsonl: one row of strict JSON a logging point, read and cut back after a crash."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut off by a crash is left out, a missing file has none."""
    rows = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def keep_metrics_until(path: str | os.PathLike[str], step: int) -> None:
    """Drops the rows of steps after ``step``, which a resumed run writes again. The file is replaced in one move."""
    path = Path(path)
    if not path.exists():
        return
    replace_metrics(path, [row for row in read_metrics(path) if row.get("step", 0) <= step])


def replace_metrics(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes all rows anew; a reader, or a crash, finds the old file or the new one, never half of one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(map(json_line, rows)), encoding="utf-8")
    os.replace(temporary, path)


def json_line(row: Mapping[str, Any]) -> str:
    """One line of strict JSON: NaN and infinities, which JSON lacks, become null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(clean) + "\n"
