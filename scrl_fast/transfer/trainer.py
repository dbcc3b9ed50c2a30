"""Fine-tuning of a detector with a run folder: checkpoints, exact resume, log and metric."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from scrl_fast import build as prepare
from scrl_fast._version import __version__
from scrl_fast.config.files import dump, under_present_names
from scrl_fast.config.validation import validated
from scrl_fast.data.bad_images import BadImage
from scrl_fast.data.prefetch import Prefetcher
from scrl_fast.data.workers import LoaderStalled
from scrl_fast.distributed import world as distributed
from scrl_fast.distributed.world import World
from scrl_fast.errors import UsageError
from scrl_fast.run import checkpoint
from scrl_fast.run import log as runlog
from scrl_fast.run.resume import changed_options, choose, step_in_name
from scrl_fast.run.signals import OF_ANOTHER, StopRequest
from scrl_fast.transfer.config import TransferConfig
from scrl_fast.transfer.dataset import (
    KEYPOINTS,
    Example,
    Examples,
    check_categories,
    check_keypoints,
    count_without_masks,
    read_split,
    reading,
    trainable,
)
from scrl_fast.transfer.detections import Detections
from scrl_fast.transfer.detector import build_detector, check_same_detector
from scrl_fast.transfer.fine_tune import DetectionLossError, build_sgd, train_step, training_batches
from scrl_fast.transfer.predict import detect
from scrl_fast.transfer.pyramid import SUPERVISED

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Transfer:
    """One task of `scrl_fast.transfer.config.TASK_DEFAULTS`: ``Transfer(config).fit()``.

    train, val: annotated images to use instead of those that ``config.data`` names.
    world: this process among its fellows, where it is not the one that torchrun announces.
    Raises ValueError naming the option, path or key for whatever can be known to be wrong before the first step.
    After construction ``network``, ``optimizer`` and `step_once` may also be used without ``fit``.
    """

    def __init__(
        self, config: TransferConfig, *, train: Any = None, val: Any = None, world: World | None = None
    ) -> None:
        config = validated(config)
        if train is None or val is None:
            config.check_ready()
        self.device = distributed.device_of(config.train.device)
        patience = distributed.exchange_timeout(config.data.timeout)
        self.world = distributed.join(self.device, timeout=patience) if world is None else world
        self.val = read_split(config, config.data.val) if val is None else val
        self.train = None if config.eval.only else read_split(config, config.data.train) if train is None else train
        if self.train is not None:
            check_categories(self.train, self.val)
        self.masks = config.model.detector == "mask_rcnn"
        self.keypoints = KEYPOINTS if config.model.detector == "keypoint_rcnn" else 0
        if self.keypoints:
            check_keypoints(self.val)
        self.indices: list[int] = []
        if self.train is not None:
            if self.keypoints:
                check_keypoints(self.train)
            self.indices = trainable(self.train, config.data, masks=self.masks, keypoints=self.keypoints > 0)
        if self.train is not None and config.train.batch_size > len(self.indices):
            raise ValueError(
                f"train.batch_size={config.train.batch_size}: the data set has {len(self.indices)} images to train on"
            )
        if config.train.batch_size % self.world.size:
            raise ValueError(
                f"train.batch_size={config.train.batch_size}: must be a multiple of the {self.world.size} processes"
            )
        self.steps_per_epoch = max(1, len(self.indices) // config.train.batch_size)
        kind = f"{config.task}-{config.model.detector}"
        self.config = config = prepare.place_run(config, self.world, kind, ("random", SUPERVISED))
        self.folder = Path(config.run.dir)
        self.checkpoints = checkpoint.CheckpointManager(self.folder / runlog.CHECKPOINTS, keep=config.run.keep)
        self.found = self.world.from_first(lambda: choose(config.resume, self.checkpoints))
        prepare.set_numerics(config.train.deterministic, self.device)
        torch.backends.cudnn.benchmark = False  # the padded images' shapes change from step to step

        torch.manual_seed(config.train.seed)
        self.network = self.build().to(self.device)
        if config.train.channels_last:
            self.network = self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = build_sgd(self.network, config.optim)
        self.parallel: nn.Module | None = None  # the network as all processes train it
        precision = config.train.precision
        if precision == "auto":
            precision = "bf16" if self.device.type == "cuda" else "fp32"
        self.precision, self.autocast = precision, AUTOCAST.get(precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.step = self.saved = 0
        self.last_step = min(config.train.steps, config.train.max_steps or config.train.steps)
        self.clock = runlog.Clock()
        self.pending: list[dict[str, float]] = []

    def build(self) -> nn.Module:
        """The detector with the weights of ``init``; a resumed run has its own and reads none."""
        config = self.config
        return build_detector(
            config.model.detector,
            len(self.val.classes),
            backbone=config.model.backbone,
            init="random" if self.found[1] else config.init or "random",
            branch=config.model.branch,
            keypoints=KEYPOINTS,
            config=config.model,
        )

    def fit(self) -> dict[str, Any]:
        """Trains to the end of the plan, to ``train.max_steps`` or to a signal, and measures.

        Returns ``{run_dir, step, loss, result, interrupted, checkpoint, resume_command, seconds}``.
        """
        started = time.perf_counter()
        notes = self.restore()
        with runlog.RunLog.of(self) as self.log, StopRequest() as stop:
            self.introduce(notes)
            if not self.config.eval.only:
                self.train_all(stop)
            return self.finish(stop, started)

    def train_all(self, stop: StopRequest) -> None:
        """The steps that are left."""
        config = self.config
        save_every = config.run.checkpoint_every or self.steps_per_epoch
        self.clock.read()
        data, name_of = config.data, getattr(self.train, "name_of", str)
        with closing(
            Prefetcher(
                max(1, data.workers),
                data.prefetch,
                timeout=data.timeout,
                name_of=lambda wanted: name_of(wanted[0]),  # of an index and an epoch
            )
        ) as prefetcher:
            source = self.examples(prefetcher)
            while (batch := self.next_batch(source, stop)) is not None:
                self.step_once(batch)
                self.log.tick()
                if self.step % config.run.log_every == 0 or self.step in (1, self.last_step):
                    self.report()
                if self.step % save_every == 0 or self.step == self.last_step:
                    self.save()
                if config.eval.every and self.step % config.eval.every == 0 and self.step < self.last_step:
                    self.measure(stop)
        if self.saved < self.step:  # another run's checkpoint, and no step left to make
            self.save()

    def next_batch(self, source: Iterator[list[Example]], stop: StopRequest) -> list[Example] | None:
        """The next batch; None at the end, or when a process was asked to stop. Then there is a checkpoint of the step.

        An image that cannot be read, since its objects would be missing, or that takes longer than ``data.timeout``
        ends the run, after a checkpoint. All processes hear of it, or of a signal, in one message a step.
        Raises UsageError naming the file, PeerFailed where another process has it.
        """
        with self.clock.waiting():  # slow data must not keep a request waiting
            batch, failure = reading(stop, lambda: next(source)) if self.step < self.last_step else (None, None)
        asked, failed = self.world.sums([int(bool(stop)), int(failure is not None)])
        if asked and not stop:
            stop.signal_name = OF_ANOTHER
        if asked and self.saved < self.step:
            self.save()
        self.end_if_data_failed(failure, failed, f"step {self.step + 1}")
        return None if asked else batch

    def end_if_data_failed(self, failure: BadImage | LoaderStalled | None, failed: int, where: str) -> None:
        """Ends the run in all processes, after a checkpoint, when the data of ``failed`` of them did, or of this one.

        Raises UsageError naming the file, PeerFailed where another process has it.
        """
        if not failed:
            return
        trains = not self.config.eval.only
        if trains and self.saved < self.step:
            self.save()
        if failure is None:
            raise distributed.PeerFailed("stopped because the data of another process failed")
        kept = "the steps so far are saved; put it right and go on with --resume=auto"
        what = f"cannot read {failure}" if isinstance(failure, BadImage) else failure
        raise UsageError(f"{where}: {what}; {kept if self.step and trains else 'put it right'}") from failure

    def examples(self, prefetcher: Prefetcher) -> Iterator[list[Example]]:
        """This process's batches from the present step on."""
        config = self.config
        examples = Examples(
            self.train,
            first_label=int(self.network.first_label),  # type: ignore[arg-type]
            masks=self.masks,
            keypoints=self.keypoints,
            flip=config.data.flip,
            seed=config.train.seed,
        )
        return training_batches(
            examples,
            self.indices,
            config.train.batch_size,
            seed=config.train.seed,
            start=self.step,
            stop=self.last_step,
            prefetcher=prefetcher,
            rank=self.world.rank,
            world_size=self.world.size,
        )

    def step_once(self, batch: Sequence[Example]) -> None:
        """One update."""
        config = self.config
        if self.parallel is None:
            self.parallel = self.world.parallel(self.network, self.device, static=False)
        self.parallel.train()
        try:
            row = train_step(
                self.parallel,
                self.optimizer,
                batch,
                lr=config.optim.rate(self.step, config.train.batch_size),
                seed=prepare.step_seed(config.train.seed, self.step, self.world.rank),
                device=self.device,
                autocast=self.autocast,
                scaler=self.scaler if self.precision == "fp16" else None,
                clip_norm=config.optim.clip_norm,
            )
        except DetectionLossError as error:
            good = self.checkpoints.newest_good()
            kept = f"the last good checkpoint is {good}" if good else "no checkpoint was written yet"
            raise DetectionLossError(
                f"step {self.step + 1}: {error}, and {kept}. "
                "Try a lower --optim.lr, a longer --optim.warmup_steps, --optim.clip_norm=1 or --train.precision=fp32"
            ) from error
        self.step += 1
        self.clock.images += len(batch)
        self.pending.append(row)

    def report(self) -> None:
        """One logging point: means since the last one."""
        rows, self.pending = self.pending, []
        names = list(rows[0])
        means = torch.tensor([fmean(row[name] for row in rows) for name in names], dtype=torch.float64)
        means = self.world.sum_(means) / self.world.size
        row: dict[str, Any] = {"step": self.step, "epoch": round(self.step / self.steps_per_epoch, 6)}
        row |= dict(zip(names, means.tolist(), strict=True))
        row |= {"lr": self.optimizer.param_groups[0]["lr"], **self.clock.read()}
        row["images_per_s"] *= self.world.size
        if self.device.type == "cuda":
            row["peak_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        self.log.metrics(row, seconds_per_step=self.clock.seconds / len(rows))

    def save(self) -> None:
        """Writes a checkpoint of this step."""
        self.saved = self.step
        if self.world.rank == 0:
            self.checkpoints.save(self.state(), self.step, best=self.step == self.last_step)

    def state(self) -> dict[str, Any]:
        """All that the run needs to go on as if it had never stopped."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        return {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "epoch": epoch,
            "config": self.config.to_dict(),
            "rng": {"scaler": self.scaler.state_dict()},  # every step seeds torch's generator anew
            "loader": {"epoch": epoch, "batch": done, "world_size": self.world.size},
            "version": __version__,
            "log": {"pending": self.pending},
        }

    def restore(self) -> list[str]:
        """Loads what ``resume`` asks for; returns what there is to say about it and about ``init``."""
        config = self.config
        newest, path, own, notes = self.found
        if path is None:
            return [*notes, f"init: {self.network.init_report}"]
        state = checkpoint.load(path, expect=checkpoint.CHECKPOINT_KEYS)
        if newest is not None and step_in_name(newest) > state["step"]:
            raise ValueError(
                f"resume={config.resume}: run.dir {str(self.folder)!r} holds a newer checkpoint, {newest.name}; to "
                "branch off from an older one, give the new run its own --run.dir"
            )
        check_same_detector(self.network, state, path)
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["rng"]["scaler"])
        self.step = state["step"]
        self.saved = self.step if own else 0
        self.pending = list(state.get("log", {}).get("pending", []))
        notes.append(f"resumed from {path} at step {self.step}")
        if changed := changed_options(
            under_present_names(TransferConfig, state["config"]), config.to_dict(), besides=("json",)
        ):
            notes.append(f"not the same run any more, these options have changed: {', '.join(changed)}")
        return notes

    def measure(self, stop: StopRequest) -> dict[str, float] | None:
        """The task's metric on the validation split, in points (0 to 100), and into the log.

        None when a signal to any process came before or ended it there and then: all of them hear of it, and of data
        that failed, which end the run as in `next_batch`.
        """
        from scrl_fast.transfer.metrics import measure

        count = min(len(self.val), self.config.eval.images or len(self.val))
        if not stop:
            self.log.say(f"measuring on {count} images of {self.config.data.val} ...")
        mine = range(self.world.rank, count, self.world.size)
        own, failure = reading(stop, lambda: self.detections(mine))
        lacking, failed = self.world.sums([int(own is None), int(failure is not None)])
        self.end_if_data_failed(failure, failed, f"the measurement after step {self.step}")
        result: dict[str, float] | None = None
        if not lacking:  # else some would wait for what others have broken off
            found = sorted(self.world.gathered(own or []), key=lambda image: image.index)
            result = self.world.from_first(
                lambda: stop.until_signal(lambda: measure(self.config.task, found, self.val))
            )
        if result is None:
            stop.signal_name = stop.signal_name or OF_ANOTHER
            return None
        self.log.amend({self.config.task: result})
        self.log.say(f"step {self.step}: " + "  ".join(f"{name} {value:.2f}" for name, value in result.items()))
        return result

    def detections(self, indices: Sequence[int]) -> list[Detections]:
        """Detections in these images of the validation split, in order."""
        return list(
            detect(
                self.network,
                self.val,
                indices,
                batch_size=self.config.eval.batch_size,
                workers=self.config.data.workers,
                timeout=self.config.data.timeout,
                autocast=self.autocast,
            )
        )

    def introduce(self, notes: Sequence[str]) -> None:
        """What this run is, for the person at the terminal and, in files, for whoever asks later."""
        for note in notes:
            self.log.say(note)
        config, model = self.config, self.config.model
        self.log.say(f"{config.task}: {model.detector} with {model.backbone} on {self.device} in {self.precision}")
        if self.train is not None:
            plan = f"{self.last_step} steps of {config.train.batch_size}, {self.steps_per_epoch} an epoch"
            rate = config.optim.lr * config.train.batch_size / config.optim.reference_batch
            if self.world.several:
                self.log.say(
                    f"{self.world.size} processes with {config.train.batch_size // self.world.size} images each"
                )
            self.log.say(f"{len(self.indices)} of {len(self.train)} images, {plan}, learning rate {rate:.4g}")
            if self.masks and (lost := count_without_masks(self.train, self.indices)):
                self.log.say(f"{lost} objects without a mask are left out of training")
        self.log.say(f"run folder: {self.folder}")
        if self.world.rank == 0:
            text = dump(replace(config, resume="", json="").to_dict())
            (self.folder / runlog.CONFIG).write_text(text, encoding="utf-8")
            runlog.write_environment(self.folder / runlog.ENVIRONMENT)

    def finish(self, stop: StopRequest, started: float) -> dict[str, Any]:
        """The measurement and the last words."""
        self.log.end_progress()
        row = (runlog.read_metrics(self.folder / runlog.METRICS) or [{}])[-1]
        summary: dict[str, Any] = {"run_dir": str(self.folder), "step": self.step, "loss": row.get("loss", math.nan)}
        if (result := self.measure(stop)) is not None:
            summary["result"] = result
        summary["interrupted"] = stop.signal_name
        path = self.checkpoints.folder / "last.pt"
        summary["checkpoint"] = str(path) if path.exists() else self.config.resume
        summary["resume_command"] = self.resume_command()
        summary["seconds"] = time.perf_counter() - started
        if stop:
            unmeasured = f"{stop.signal_name}: stopped before the measurement was complete. To measure anew:"
            self.log.say(unmeasured if self.config.eval.only else stop.farewell(self.step))
            self.log.say(f"  {summary['resume_command']}")
        else:
            self.log.say(f"done: {self.step} steps; checkpoint and log are in {self.folder}")
        return summary

    def resume_command(self) -> str:
        """What to type to go on from here, or to measure again: that writes no checkpoint of its own."""
        resume = self.config.resume if self.config.eval.only else "auto"
        arguments = [self.config.task, f"--config={self.folder / runlog.CONFIG}", f"--resume={resume}"]
        return f"{distributed.launcher()} -m scrl_fast.transfer {shlex.join(arguments)}"
