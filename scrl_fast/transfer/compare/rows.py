"""The rows of a comparison: which there are, in which order, where each is kept, and when one is finished."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from scrl_fast.atomic_files import digest_of, expected_digest, write_json, write_text
from scrl_fast.config.backbones import code_arguments, is_named
from scrl_fast.config.files import under_present_names
from scrl_fast.config.yaml_text import dump
from scrl_fast.data.sources.base import identity_of
from scrl_fast.errors import UsageError
from scrl_fast.run.folder import newest_checkpoint
from scrl_fast.run.precision import Precision
from scrl_fast.run.resume import changed_options, flatten
from scrl_fast.run.start_tables import labels_of, percent
from scrl_fast.transfer.best import main_metric
from scrl_fast.transfer.compare.config import CompareConfig
from scrl_fast.transfer.config import TransferConfig
from scrl_fast.transfer.training_data import fit_length
from scrl_fast.weights.checkpoint_files import CheckpointError, find
from scrl_fast.weights.errors import WeightsError
from scrl_fast.weights.file_kinds import check_regular

CHECKPOINTS_PER_ROW = 10  # where run.checkpoint_every leaves it open: an epoch of a small share is short


@dataclass(frozen=True)
class Row:
    """One detector to train: a start, a share of the labels and a seed."""

    init: str
    label: str
    """The start in tables and names of files; short, and no other start's."""
    share: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its file and of its run folder."""
        return f"{self.label}-{self.share:g}-seed{self.seed}"

    def describe(self) -> str:
        """The row in words."""
        return f"{self.label}, {percent(self.share)} of the labels, seed {self.seed}"


def rows_of(config: CompareConfig) -> list[Row]:
    """All rows in the order in which they run: seed by seed, in it from the smallest share on, there every start.

    So a stop at any time leaves whole comparisons of all starts, and a repeat more of them with every seed.
    """
    labels = labels_of(config.inits)
    seeds = range(config.train.seed, config.train.seed + config.seeds)
    return [
        Row(init, label, share, seed)
        for seed in seeds
        for share in config.shares
        for init, label in zip(config.inits, labels, strict=True)
    ]


def options_of(row: Row, config: CompareConfig, folder: Path) -> TransferConfig:
    """The options with which ``python -m scrl_fast.transfer`` trains this row, in a run folder of the comparison."""
    base = config.transfer_options()
    return replace(
        base,
        init=row.init,
        data=replace(base.data, subset=row.share, subset_seed=base.data.subset_seed + row.seed),
        train=replace(base.train, seed=row.seed),
        run=replace(base.run, dir=str(folder / "runs" / row.name)),
    )


def fitted_to(config: TransferConfig, images: int) -> TransferConfig:
    """A row's options with what follows its number of images."""
    config = fit_length(config, images)
    every = config.run.checkpoint_every or max(1, config.train.steps // CHECKPOINTS_PER_ROW)
    return replace(config, run=replace(config.run, checkpoint_every=every))


# ---- what is kept of a row ----

RESULT_OPTIONS = ("eval.images", "train.max_steps")
"""Options that change a row's result, though a run may change them when it goes on."""


def fingerprint_of(init: str) -> str:
    """SHA-256 of the weights file that a start means; its name where it means none."""
    if is_named(init):
        return init
    try:
        path = find(init)
        check_regular(path)  # a pipe or a device has no end to be read to
        return expected_digest(path) or digest_of(path)
    except (CheckpointError, WeightsError, OSError):  # a folder in another layout, or a start whose rows will fail
        return "no checkpoint"


def digest_of_labels(source: Any) -> str:
    """SHA-256 of the names of annotated images and of their boxes and labels."""
    found = hashlib.sha256(json.dumps(identity_of(source), sort_keys=True).encode())
    for index in range(len(source)):
        found.update(np.ascontiguousarray(source.boxes(index), np.float32).tobytes())
        found.update(np.ascontiguousarray(source.labels(index), np.int64).tobytes())
    return found.hexdigest()


class RowFiles:
    """``rows/NAME.json`` of a comparison's folder: options and start of each row, and its result once it is finished.

    ``rows/NAME.yaml`` beside it holds the options for the row alone. data: what `digest_of_labels` says of both parts.
    """

    def __init__(self, folder: Path, inits: Sequence[str], data: Mapping[str, str]) -> None:
        self.folder, self.data = folder / "rows", dict(data)
        self.starts = {init: fingerprint_of(init) for init in inits}

    def path(self, row: Row) -> Path:
        return self.folder / f"{row.name}.json"

    def command(self, row: Row, config: TransferConfig) -> str:
        """The command that trains and measures this row alone, in a run folder of its own, to the same numbers."""
        words = ["python", "-m", "scrl_fast.transfer", config.task, f"--config={self.path(row).with_suffix('.yaml')}"]
        return shlex.join([*words, *code_arguments(config.model.backbone)])

    def write(self, row: Row, config: TransferConfig, result: Mapping[str, float] | None = None) -> None:
        """The row begins, or with a result it is finished."""
        document = {"row": asdict(row), "start": self.starts[row.init], "config": config.to_dict(), "data": self.data}
        write_json(str(self.path(row)), document | {"result": result and dict(result)})
        if result is None:
            alone = replace(config, run=replace(config.run, dir=""))
            write_text(self.path(row).with_suffix(".yaml"), dump(alone.to_dict()))

    def kept_precision(self, precision: Precision) -> Any:
        """fp32, bf16 or fp16 for every row: what the rows were begun with, else what is chosen here.

        A table begun on one kind of processor goes on in the same precision on another.
        """
        if precision.asked != "auto":
            return precision.asked
        for path in sorted(self.folder.glob("*.json")):
            try:
                before = json.loads(path.read_text(encoding="utf-8"))["config"]
                kept = precision.settled(before)["train"]["precision"]
            except (OSError, ValueError, KeyError, TypeError, AttributeError):  # `read` names it, if it is a row
                continue
            if kept in ("fp32", "bf16", "fp16"):
                return kept
        return precision.chosen

    def read(self, row: Row, config: TransferConfig, precision: Precision) -> dict[str, float] | None:
        """The result of a finished row; None of one that is not.

        precision: to tell what ``auto`` meant in rows of earlier releases.

        Raises UsageError where the row was begun with other options, or its start has changed since: the table would
        compare what cannot be compared.
        """
        path = self.path(row)
        if not path.is_file():
            return None
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            before, start, result = document["config"], document["start"], document["result"]
            if result is None and not newest_checkpoint(config.run.dir):  # it failed before it began
                return None
            same_data = document["data"] == self.data
            result = result and {str(name): float(value) for name, value in result.items()}
            before = precision.settled(under_present_names(TransferConfig, before))
            changed = _changed(before, config.to_dict())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is no row of a comparison ({error}): remove it to make the row again") from None
        way_out = f"choose another --compare.dir, or remove it and {config.run.dir} to make the row again"
        if changed:
            raise UsageError(f"{path} was made with other options ({', '.join(changed)}): {way_out}")
        if not same_data:
            raise UsageError(f"{path} was made with other images or labels in data.root: {way_out}")
        if before.get("init") != config.init or start != self.starts[row.init]:
            raise UsageError(f"{path} was made from {before.get('init')} as it was then, not as it is now: {way_out}")
        return result


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    defaults = TransferConfig().to_dict()
    old, new = {**flatten(defaults), **flatten(before)}, flatten(now)
    counted = [f"{name} {old.get(name)} -> {new[name]}" for name in RESULT_OPTIONS if old.get(name) != new[name]]
    return changed_options(before, now, defaults=defaults) + counted


def values_of(row: Row, task: str, result: Mapping[str, float]) -> dict[str, Any]:
    """A row of the table: ``{init, share, seed, AP, AP50, ...}`` in points; None for what the data cannot tell (-1)."""
    clean = {name: None if value == -1 else value for name, value in result.items()}
    kind = main_metric(result).removesuffix("AP")
    head = {name: clean[kind + name] for name in ("AP", "AP50") if name not in clean and kind + name in clean}
    return {"init": row.init, "start": row.label, "share": row.share, "seed": row.seed, **head, **clean}
