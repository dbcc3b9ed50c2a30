"""RoI linear from several starts on the same boxes: features once a start, a classifier for each share and seed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from scrl_fast.config.backbones import HUB_PREFIX, is_named
from scrl_fast.errors import UsageError, one_line
from scrl_fast.evaluate.batches import Progress, Say
from scrl_fast.evaluate.bootstrap import MEASURES
from scrl_fast.evaluate.cached_boxes import cached_box_features
from scrl_fast.evaluate.compare_table import StartResults, markdown, summary_of
from scrl_fast.evaluate.config import CompareOptions
from scrl_fast.evaluate.datasets import labelled_regions
from scrl_fast.evaluate.encoder import EvaluatedEncoder, load_evaluated
from scrl_fast.evaluate.images import STATISTICS_IMAGES
from scrl_fast.evaluate.pretraining import seen_before
from scrl_fast.evaluate.regions import BoxFeatures, classify
from scrl_fast.evaluate.result import NO_RESULT, TaskContext, TaskResult, save_plot
from scrl_fast.run.log import format_seconds
from scrl_fast.run.plots import draw_shares
from scrl_fast.run.start_tables import labels_of


def compare_task(options: CompareOptions, context: TaskContext) -> TaskResult:
    """Rows of every start, share and seed, and the table of them."""
    starts = load_starts(options, context.say)
    train, test = labelled_regions(options.data, options.seed, context.say)
    labels = labels_of(options.checkpoints)
    seen = {} if context.only_helps else _seen(options, labels, test, context.say)
    times = StartTimes(len(starts), min(len(train), STATISTICS_IMAGES) + len(train) + len(test), context.say)
    results: StartResults | None = None
    for number, (label, start) in enumerate(zip(labels, starts, strict=True), start=1):
        times.begin(number, label)
        inner = replace(context, say=times)
        found = cached_box_features(options, start, (train, test), inner)
        if results is None and not context.only_helps:
            results = StartResults.of(found[0].labels, found[1].labels, found[1].images, options)
        repeats = [(share, seed) for share in options.shares for seed in options.seeds_of(share)]
        with Progress("fitting", len(repeats), "classifiers", times) as fitting:
            for share, seed in fitting.over(repeats):  # the other processes wait for each, none for all
                context.world.broadcast_from_rank0(partial(_fit, results, found, len(train), (label, share, seed)))
        times.finish()
    if results is None:
        return NO_RESULT
    return _result(options, results, dict(zip(labels, starts, strict=True)), len(train), seen, context.say)


def _fit(results: StartResults | None, found: list[BoxFeatures], images: int, row: tuple[str, float, int]) -> None:
    """Adds the row of one classifier. images: to train on. row: start, share and seed."""
    assert results is not None  # rank 0 alone gets here
    _, share, seed = row
    result, predicted = classify(training_part(found[0], images, share, seed), found[1])
    results.add(*row, (predicted == found[1].labels).numpy(), result.train_boxes)


def _seen(options: CompareOptions, labels: Sequence[str], test: Any, say: Say) -> dict[str, str]:
    """Whether each start has seen test images, in words; said before the work begins."""
    if options.data.source == "demo":
        return {}
    found = {}
    for label, name in zip(labels, options.checkpoints, strict=True):
        try:
            found[label] = seen_before(name, test.images)
        except Exception as error:  # a run's folder may hold anything, and no comparison ends for it
            found[label] = f"not checked: {one_line(error)}"
        say(f"pre-training of {label}: {found[label]}")
    return found


def _result(
    options: CompareOptions,
    results: StartResults,
    starts: dict[str, EvaluatedEncoder],
    train_images: int,
    seen: dict[str, str],
    say: Say,
) -> TaskResult:
    """The table, the picture, and the values for ``--json``."""
    summary = summary_of(results)
    values: dict[str, Any] = {
        "rows": [row.values() | {"checkpoint": starts[row.start].name} for row in results.rows],
        "table": summary,
        "starts": {
            label: {"checkpoint": start.name, "backbone": start.encoder.name} for label, start in starts.items()
        },
        "train_images": train_images,
        "test_images": results.images,
    }
    backbones = {start.encoder.name for start in starts.values()}
    notes = [f"The starts are of several backbones: {', '.join(sorted(backbones))}."] if len(backbones) > 1 else []
    if seen:
        values["seen"] = seen
        notes += [f"Pre-training of {label}: {said}." for label, said in seen.items()]
    title = f"RoI linear on {results.boxes} boxes of {results.images} images, {train_images} images to train on"
    if options.plot:
        lines = {label: results.spreads(label, MEASURES[0], scale=100) for label in results.starts}
        picture = partial(draw_shares, lines=lines, ylabel="boxes named rightly, %", title=", ".join(sorted(backbones)))
        save_plot(options.plot, lambda path: _drawn(path, picture, say), say)
    return TaskResult(markdown(title, results, summary, notes), values)


def _drawn(path: str, draw: Callable[[str], None], say: Say) -> bool:
    """Whether there is a picture: no comparison ends for want of it."""
    try:
        draw(path)
    except ImportError:
        return False
    except Exception as error:  # a broken installation raises anything
        say(f"plot={path}: no picture: {one_line(error)}")
        return False
    return True


# ---- starts ----


def load_starts(options: CompareOptions, say: Say) -> list[EvaluatedEncoder]:
    """The encoders to compare, in the order given. Raises UsageError naming the start that cannot be used."""
    without_own = [name for name in options.checkpoints if is_named(name) and not name.startswith(HUB_PREFIX)]
    others = [name for name in options.checkpoints if name not in without_own]
    backbone, found = options.backbone, {}
    for name in (*others, *without_own):
        own = replace(options, checkpoint=name, backbone=backbone if name in without_own else options.backbone)
        try:
            found[name] = load_evaluated(own)
        except UsageError as error:
            raise UsageError(f"checkpoints: {name}: {str(error).removeprefix(f'init={name}: ')}") from error
        backbone = backbone or found[name].encoder.name
    starts = [found[name] for name in options.checkpoints]
    for start in starts:
        say(start.report)
    return starts


# ---- training images of a share ----


def training_part(features: BoxFeatures, images: int, share: float, seed: int) -> BoxFeatures:
    """The boxes of a share of the training images, drawn by seed; a larger share holds a smaller one of that seed.

    images: how many there are. Those that are drawn are numbered anew, so that every fifth of them chooses the penalty.
    """
    if share == 1:
        return features
    order = np.random.default_rng([seed, images]).permutation(images)
    chosen = np.sort(order[: max(1, round(share * images))])
    number = torch.full((images,), -1)
    number[torch.from_numpy(chosen)] = torch.arange(len(chosen))
    numbered = number[features.images]
    kept = numbered >= 0
    return BoxFeatures(features.features[kept.to(features.features.device)], features.labels[kept], numbered[kept])


# ---- progress ----


class StartTimes:
    """Says lines with the time left over all starts. images: that one start passes through where nothing is cached."""

    def __init__(self, starts: int, images: int, say: Say) -> None:
        self.starts, self.images, self.say = starts, images, say
        self.seconds: list[float] = []
        self.begin(1, "")

    def begin(self, number: int, label: str) -> None:
        """A start begins. number: from 1."""
        self.number, self.label, self.done, self.started = number, label, 0, time.monotonic()

    def advance(self, count: int, unit: str) -> None:
        """So many images of the start are done; classifiers are not counted."""
        self.done += count if unit == "images" else 0

    def __call__(self, line: str) -> None:
        """Says a line of progress with the start that it belongs to, and the time left for all starts."""
        spent, left = time.monotonic() - self.started, ""
        if self.done:
            whole = max(spent, spent * self.images / self.done, *self.seconds)  # classifiers included once one is done
            seconds = whole - spent + (self.starts - self.number) * whole
            left = f"; all {self.starts} starts: about {format_seconds(seconds)} left"
        self.say(f"{self.label}: {line}{left}")

    def finish(self) -> None:
        """A start is done: says how long it took, and what the others take at that pace."""
        self.seconds.append(time.monotonic() - self.started)
        open_starts = self.starts - self.number
        others = (
            f", the other {open_starts} about {format_seconds(open_starts * max(self.seconds))}" if open_starts else ""
        )
        self.say(f"{self.label}: done in {format_seconds(self.seconds[-1])}{others}")
