"""metrics.jsonl: one row of strict JSON a logging point, read and cut back after a crash."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scrl_fast.atomic_files import naming, write_text


class MetricsFile:
    """The rows of a run, to be continued after ``step``: rows of later steps are dropped, which the run writes again.

    skipped: lines that hold no row. The file as it was is then kept beside it, with ``.damaged`` behind its name.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        rows, self.skipped = parse_metrics(path)
        if self.skipped:
            shutil.copyfile(path, path.with_name(path.name + ".damaged"))
        if path.exists():
            replace_metrics(path, [row for row in rows if row["step"] <= step])
        self.open()

    def open(self) -> None:
        self.file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row, readable at once."""
        with naming(self.path):
            self.file.write(json_line(row))

    def amend(self, extra: Mapping[str, Any]) -> None:
        """Adds to the last row, if there is one."""
        if rows := read_metrics(self.path):
            self.close()
            replace_metrics(self.path, [*rows[:-1], {**rows[-1], **extra}])
            self.open()

    def close(self) -> None:
        self.file.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a line that holds none is left out, a missing file has none."""
    return parse_metrics(path)[0]


def parse_metrics(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], int]:
    """(rows, number of lines that hold none): a last line that a crash cut off does not count."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], 0
    rows = [_row(line) for line in lines[:-1]]
    last = _row(lines[-1])  # without its newline
    good = [row for row in rows if row is not None]
    return good + ([last] if last is not None else []), len(rows) - len(good)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no UTF-8
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def replace_metrics(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes all rows anew; a reader, or a crash, finds the old file or the new one, never half of one."""
    write_text(path, "".join(map(json_line, rows)))


def json_line(row: Mapping[str, Any]) -> str:
    """One line of strict JSON: NaN and infinities, which JSON lacks, become null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(clean) + "\n"
