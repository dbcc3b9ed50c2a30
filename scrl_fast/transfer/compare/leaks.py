"""Were validation images among the images that a start was pre-trained on? And among the labelled ones?

What a run was trained on is told by its config.yaml, and what it started from by its checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scrl_fast.atomic_files import write_json
from scrl_fast.config.files import Settings, build, under_present_names
from scrl_fast.data.image_files import BadImage
from scrl_fast.data.sources.base import identity_of
from scrl_fast.evaluate import pretraining
from scrl_fast.evaluate.batches import Progress, Say, silent
from scrl_fast.evaluate.pretraining import Stage
from scrl_fast.transfer.compare.config import LABELLED, CompareOptions
from scrl_fast.transfer.compare.look_alikes import BITS, Fingerprints, Match, fingerprints, matches
from scrl_fast.transfer.config import TransferConfig
from scrl_fast.transfer.custom import read_custom
from scrl_fast.transfer.dataset import read_split

MAX_LISTED = 20  # pairs of images that are written down


def stages_of(init: str) -> Iterator[Stage]:
    """The trainings behind a start, those of detectors too, the last one first."""
    return pretraining.stages_of(init, images_of_transfer)


def images_of_transfer(options: dict[str, Any], name: str) -> Any:
    """The images that a detector was trained on. options, name: of its run. Raises UsageError, BadImage or OSError."""
    transfer = build(TransferConfig, Settings(under_present_names(TransferConfig, options), name))
    return read_custom(transfer).train if transfer.task == "custom" else read_split(transfer, transfer.data.train)


@dataclass(frozen=True)
class Sharing:
    """Which validation images a set of images holds.

    name: the start, or the labelled images. images: compared of the set. unread: images of it that could not be read.
    why: what could not be compared, in words; empty where all was. pairs: names of the first validation images found,
    what they are in the set, and how they were recognised.
    """

    name: str
    images: int = 0
    unread: int = 0
    exact: int = 0
    alike: int = 0
    why: str = ""
    pairs: Sequence[dict[str, Any]] = ()


class LeakCheck:
    """Compares sets of images with the validation images, which are read once.

    val: the validation images. count: how many of them, the first ones, are measured. tick: called after every image;
    what it raises ends the check. file: keeps what was found, since large sets take their time.
    """

    def __init__(
        self,
        val: Any,
        count: int,
        options: CompareOptions,
        *,
        workers: int = 2,
        say: Say = silent,
        tick: Callable[[], None] = lambda: None,
        file: Path | None = None,
    ) -> None:
        self.val, self.options, self.workers, self.say, self.tick = val, options, workers, say, tick
        self.file, self.kept = file, _read_kept(file)
        self.indices = range(count)
        self._prints: Fingerprints | None = None

    def of_start(self, init: str) -> Sharing:
        """Over all trainings that the start has behind it."""
        return self._looked_up(init, list(stages_of(init)))

    def of_labelled(self, train: Any) -> Sharing:
        """Among the labelled images, which all starts are fine-tuned on."""
        return self._looked_up(LABELLED, [Stage(LABELLED, train)])

    def _looked_up(self, name: str, stages: list[Stage]) -> Sharing:
        """What was found before of the same images under the same options, or what is found now."""
        images = [
            [stage.name, stage.why, identity_of(stage.source) if stage.source is not None else {}] for stage in stages
        ]
        key = json.loads(json.dumps([self.key(), images]))
        kept = self.kept.get(name)
        if isinstance(kept, dict) and kept.get("key") == key:
            return Sharing(**kept["found"])
        found = self._of_stages(name, stages)
        self.kept[name] = {"key": key, "found": vars(found)}
        if self.file is not None:
            write_json(str(self.file), self.kept)
        return found

    def _of_stages(self, name: str, stages: list[Stage]) -> Sharing:
        total, reasons = Sharing(name), []
        found: dict[int, dict[str, Any]] = {}
        for stage in stages:
            if stage.why:
                reasons.append(f"{stage.name}: {stage.why}" if stage.name != name else stage.why)
                continue
            part = self.of_images(stage.name, stage.source, found)
            total = Sharing(name, total.images + part.images, total.unread + part.unread)
        alike = sum(pair["kind"] == "alike" for pair in found.values())
        pairs = [found[index] for index in sorted(found)[:MAX_LISTED]]
        return Sharing(name, total.images, total.unread, len(found) - alike, alike, "; ".join(reasons), pairs)

    def of_images(self, name: str, source: Any, found: dict[int, dict[str, Any]]) -> Sharing:
        """Adds what it finds to ``found``, by the number of the validation image."""
        prints = self._read(source, range(len(source)), name)
        if self._prints is None:
            self._prints = self._read(self.val, self.indices, "validation images")
        equal = lambda i, j: _same_pixels(self.val, i, source, j)  # noqa: E731
        for match in matches(self._prints, prints, equal, distance=self.options.near_distance):
            pair = _pair(match, self.val, source)
            if match.index not in found or (found[match.index]["kind"] == "alike" and match.kind != "alike"):
                found[match.index] = pair
        return Sharing(name, len(prints.indices), prints.unread)

    def _read(self, source: Any, indices: range, name: str) -> Fingerprints:
        with Progress(f"comparing images: {name}", len(indices), "images", self.say) as progress:

            def tick() -> None:
                self.tick()
                progress.advance()

            looks = self.options.leaks == "all"
            return fingerprints(source, indices, looks=looks, workers=self.workers, tick=tick)

    def key(self) -> dict[str, Any]:
        """What the outcome depends on beside the set that is compared."""
        kept = {"leaks": self.options.leaks, "near_distance": self.options.near_distance, "bits": BITS}
        return kept | {"measured": len(self.indices), "validation": identity_of(self.val)}


def _read_kept(file: Path | None) -> dict[str, Any]:
    try:
        kept = json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else {}
    except ValueError:
        kept = {}
    return kept if isinstance(kept, dict) else {}


def _pair(match: Match, val: Any, source: Any) -> dict[str, Any]:
    names = {"validation": val.name_of(match.index), "image": getattr(source, "name_of", str)(match.other)}
    return names | {"kind": match.kind, "bits": match.bits}


def _same_pixels(left: Any, i: int, right: Any, j: int) -> bool:
    try:
        return np.array_equal(left.read(i), right.read(j))
    except BadImage:
        return False


def in_words(sharing: Sharing, measured: int, options: CompareOptions) -> str:
    """What was found, in one sentence."""
    if not sharing.images:
        return f"not checked: {sharing.why}" if sharing.why else "nothing to check: it has seen no images"
    unread = f" ({sharing.unread} more cannot be read)" if sharing.unread else ""
    among = f"among {sharing.images} images{unread}"
    how = "compared as files only" if options.leaks == "exact" else "compared by file, pixels and looks"
    if sharing.exact or sharing.alike:
        alike = f" and {sharing.alike} alike (at most {options.near_distance} of {BITS} bits differ)"
        counts = f"{sharing.exact} the same{'' if options.leaks == 'exact' else alike}"
        text = f"{sharing.exact + sharing.alike} of {measured} validation images are {among}: {counts}"
    else:
        text = f"none of {measured} validation images is {among}, {how}"
    return f"{text}; not checked: {sharing.why}" if sharing.why else text


def in_short(sharing: Sharing, measured: int) -> str:
    """What was found, for a column of the table."""
    found = sharing.exact + sharing.alike
    if sharing.images or not sharing.why:
        return f"{found} of {measured}" + (" or more" if sharing.why else "")
    return "not checked"
