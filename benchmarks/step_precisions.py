"""Both precisions of the step side by side: our step in the one that is not the benchmark's, the plain step in bf16."""

from __future__ import annotations

from typing import Any

import timing
from step_rival import PlainProcess

from scrl_fast.run.precision import cpu_bf16
from scrl_fast.trainer import SCRLTrainer

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}


class OtherPrecision:
    """The providers that a case has besides, on a CPU.

    trainer: ours, in that precision. step: a call of it. kept: bytes of encoder activations an image. plain: the plain
    step under bf16 autocast. dtypes: by backend, of all rows that are not in the benchmark's dtype.
    """

    def __init__(self, dtype: str, trainer: SCRLTrainer, step: timing.Call, kept: int, plain: PlainProcess) -> None:
        self.name, self.trainer, self.kept, self.plain = PRECISIONS[dtype], trainer, kept, plain
        self.providers: dict[str, timing.Call] = {f"scrl_fast/step {self.name}": step, "torch/plain step bf16": plain}
        self.dtypes = {f"step {self.name}": dtype, "plain step bf16": "bfloat16", "plain step": "float32"}

    def shares(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """How the precisions compare: times, and memory an image. `precision_bench.py` compares what they learn."""
        times = {row["backend"]: row["p50_ms"] for row in rows}
        found: dict[str, Any] = {f"activation_bytes_per_image_{self.name}": self.kept}
        ours, slower = times.get("step"), times.get(f"step {self.name}")
        if ours and slower:
            found[f"{self.name}_over_ours"] = slower / ours
        if ours and "plain step bf16" in times:
            found["plain_bf16_over_ours"] = times["plain step bf16"] / ours
        return found

    def close(self) -> None:
        """Ends the process of the plain step and the threads that make views."""
        self.plain.close()
        self.trainer.loader.close()


def name_precisions(rows: list[dict[str, Any]], dtypes: dict[str, str]) -> None:
    """Each row's own dtype, and whether it is only emulated. dtypes: by backend, where not the benchmark's."""
    for row in rows:
        row["dtype"] = dtypes.get(row["backend"], row["dtype"])
        if row["device"] == "cpu" and row["dtype"] == "bfloat16" and not cpu_bf16().native:
            row["dtype"] = "bfloat16 (emulated)"
