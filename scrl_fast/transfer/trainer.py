"""Fine-tuning of a detector: its data, update, metric and state; `scrl_fast.run.loop` does the rest."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from scrl_fast import info
from scrl_fast.config.backbones import code_arguments
from scrl_fast.config.run_folder import BEST
from scrl_fast.config.validation import validated
from scrl_fast.data.bad_images import BadImage
from scrl_fast.data.workers import LoaderStalled
from scrl_fast.distributed import rendezvous
from scrl_fast.distributed.world import World
from scrl_fast.errors import UsageError
from scrl_fast.evaluate.batches import Progress
from scrl_fast.metrics import LossWindow
from scrl_fast.run.checkpoint import load_optimizer_state, loading
from scrl_fast.run.folder import place_run
from scrl_fast.run.loop import TrainingLoop
from scrl_fast.run.numerics import keep_memory, set_numerics, step_seed
from scrl_fast.run.precision import Precision
from scrl_fast.run.task import TrainingTask
from scrl_fast.transfer.best import Best
from scrl_fast.transfer.categories import categories_of
from scrl_fast.transfer.config import TransferConfig
from scrl_fast.transfer.dataset import KEYPOINTS, Example
from scrl_fast.transfer.detections import Detections, first_label
from scrl_fast.transfer.detector import build_detector, check_same_detector
from scrl_fast.transfer.fine_tuning import DetectionLossError, build_sgd, train_step
from scrl_fast.transfer.metrics import measure
from scrl_fast.transfer.predict import detect
from scrl_fast.transfer.schedule import Pace
from scrl_fast.transfer.training_data import TransferData


class Transfer(TrainingTask[list[Example]]):
    """One task of `scrl_fast.transfer.config.TASK_DEFAULTS`: ``Transfer(config).fit()``.

    train, val: annotated images to use instead of those that ``config.data`` names. val_name: of ``val``, for the log.
    world: rank and size of this process, where torchrun does not announce them.
    Raises UsageError naming the option, path or key for everything that can be found before the first step.
    After construction ``model``, ``optimizer`` and `train_step` may also be used without ``fit``.
    """

    start_options: ClassVar[Mapping[str, Any]] = {"resume": "", "json": ""}

    def __init__(
        self,
        config: TransferConfig,
        *,
        train: Any = None,
        val: Any = None,
        val_name: str = "",
        world: World | None = None,
    ) -> None:
        config = validated(config)
        if train is None or val is None:
            config.check_ready()
        self.device = rendezvous.device_of(config.train.device)
        patience = rendezvous.exchange_timeout(config.data.timeout)
        self.world = rendezvous.join(self.device, timeout=patience) if world is None else world
        self.trains = not config.eval.only
        self.data = TransferData(config, self.world, self.device.type, train=train, val=val, val_name=val_name)
        config = self.data.config
        self.steps_per_epoch = self.data.steps_per_epoch
        self.last_step = config.train.last_step
        self.evaluate_every = config.eval.every
        kind = f"{config.task}-{config.model.detector}"
        self.config = config = place_run(config, self.world, kind)
        self.loop = TrainingLoop(self, write_environment=info.write_environment)
        set_numerics(config.train.deterministic, self.device)
        if self.device.type == "cpu":
            keep_memory()  # a fifth of the time of measuring (benchmarks/results/evaluation_profile_cpu.json)
        torch.backends.cudnn.benchmark = False  # the padded images' shapes change from step to step

        torch.manual_seed(config.train.seed)
        self.model = self.build().to(self.device)
        if config.train.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = build_sgd(self.model, config.optim)
        self.ddp_model: nn.Module | None = None  # the model as all processes train it, from the first step on
        self.precision = Precision(config.train.precision, self.device, self.world)
        self.config = self.precision.noted_in(self.config)
        self.scaler = self.make_scaler()
        self.losses = LossWindow()
        self.pace = Pace(self.last_step)
        self.best = Best()

    @property
    def network(self) -> nn.Module:
        """The earlier name of ``model``."""
        return self.model

    def fit(self) -> dict[str, Any]:
        """Trains to the end of the plan, to ``train.max_steps`` or to a signal, and measures.

        Returns ``{run_dir, step, loss, result, interrupted, checkpoint, resume_command, seconds}``.
        Raises what the data raise, once the steps before are saved.
        """
        return self.loop.run()

    def build(self) -> nn.Module:
        """The detector with the weights of ``init``; a resumed run has its own and reads none."""
        config = self.config
        return build_detector(
            config.model.detector,
            len(self.data.val.classes),
            backbone=config.model.backbone,
            init="random" if self.loop.found.path else config.init or "random",
            branch=config.model.branch,
            keypoints=KEYPOINTS,
            config=config.model,
        )

    def make_scaler(self) -> torch.amp.GradScaler:
        """Scales the loss in fp16; else it does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision.chosen == "fp16")

    # ---- data ----

    def batches(self) -> Generator[list[Example], None, None]:
        """This process's part of the batches, from the present step on."""
        return self.data.batches(first_label(self.model), self.step, self.last_step)

    def batch_weight(self, batch: list[Example]) -> int:
        """Images."""
        return len(batch)

    def data_error(self, error: Exception, where: str) -> Exception:
        """An image that cannot be read ends the run, since its objects would be missing."""
        if not isinstance(error, (BadImage, LoaderStalled)):
            return error
        what = f"cannot read {error}" if isinstance(error, BadImage) else error
        saved = "the steps so far are saved; put it right and go on with --resume=auto"
        return UsageError(f"{where}: {what}; {saved if self.step and self.trains else 'put it right'}")

    # ---- one update ----

    def train_step(self, batch: Sequence[Example], weight: int | None = None) -> None:
        """One update. Raises DetectionLossError, naming the step and the last good checkpoint, before a bad one."""
        config = self.config
        if self.ddp_model is None:
            self.ddp_model = self.world.wrap_ddp(self.model, self.device, static=False)
        self.ddp_model.train()
        try:
            row = train_step(
                self.ddp_model,
                self.optimizer,
                batch,
                lr=config.optim.rate(self.step, config.train.batch_size),
                seed=step_seed(config.train.seed, self.step, self.world.rank),
                device=self.device,
                autocast=self.precision.autocast,
                scaler=self.scaler if self.precision.chosen == "fp16" else None,
                clip_norm=config.optim.clip_norm,
            )
        except DetectionLossError as error:
            raise DetectionLossError(
                f"step {self.step + 1}: {error}, and {self.loop.last_good()}. "
                "Try a lower --optim.lr, a longer --optim.warmup_steps, --optim.clip_norm=1 or --train.precision=fp32"
            ) from error
        self.loop.advance(config.train.batch_size)
        self.losses.rows.append(row)

    # ---- what is logged ----

    def step_note(self) -> str:
        """How long the run takes here, once that is known."""
        return self.pace.step_done(self.step)

    def log_row(self) -> dict[str, Any]:
        """The mean losses since the last row."""
        return self.world.average(self.losses.take()) | {"lr": self.optimizer.param_groups[0]["lr"]}

    @property
    def command(self) -> list[str]:
        return ["transfer", self.config.task]

    def describe(self) -> list[str]:
        config, model, train = self.config, self.config.model, self.config.train
        lines = [
            *self.data.notes,
            f"{config.task}: {model.detector} with {model.backbone} on {self.device} in {self.precision.chosen}",
        ]
        if not self.trains:
            return lines
        if self.world.is_distributed:
            lines.append(f"{self.world.size} processes with {train.batch_size // self.world.size} images each")
        rate = config.optim.lr * train.batch_size / config.optim.reference_batch
        lines.append(f"{self.last_step} steps of {train.batch_size} images, learning rate {rate:.4g}")
        return [*lines, *self.precision.notes(), *self.data.describe()]

    def resume_arguments(self) -> list[str]:
        """A measurement writes no checkpoint of its own: it starts again from the one that was named."""
        resume = f"--resume={'auto' if self.trains else self.config.resume}"
        return [resume, *code_arguments(self.config.model.backbone)]

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """Detector, optimizer, loss scale, the losses since the last row, and the names of the classes."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": {"scaler": self.scaler.state_dict()},  # every step seeds torch's generator anew
            "loader": {"epoch": epoch, "batch": done, "world_size": self.world.size},
            "log": self.losses.state_dict(),
            "categories": categories_of(self.data.val).to_plain(),
            "best": self.best.to_plain(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint. Raises UsageError for one of another detector."""
        with loading("model"):
            check_same_detector(self.model, dict(state), str(self.loop.found.path))
            self.model.load_state_dict(state["model"])
        with loading("config"):
            self.config = self.precision.resume(self.config, state["config"])
            self.scaler = self.make_scaler()
        with loading("optimizer"):
            load_optimizer_state(self.optimizer, state["optimizer"], state["step"])
        with loading("rng"):
            if scale := state["rng"]["scaler"]:  # none where the checkpoint was not made in fp16
                self.scaler.load_state_dict(scale)
        with loading("log"):
            self.losses.load_state_dict(state.get("log", {}))
        with loading("best"):
            self.best = Best.of(state.get("best", {}))

    def data_identity(self) -> dict[str, Any]:
        return self.data.identity()

    def initialise(self) -> list[str]:
        """What `build` took from ``init``."""
        return [f"init: {self.model.init_report}"]

    # ---- measurement ----

    def evaluate(self) -> dict[str, Any]:
        """The task's metric on the validation split, in points (0 to 100), as ``{"result": {...}}``, and into the log.

        Empty when a signal to any process came before or ended it there and then.
        """
        count = min(len(self.data.val), self.config.eval.images or len(self.data.val))
        if not self.loop.stop:
            self.loop.log.say(f"measuring on {count} images of {self.data.val_name} ...")
        mine = range(self.world.rank, count, self.world.size)

        def detections() -> list[Detections]:
            with Progress("measuring", len(mine), "images", self.loop.log.say) as progress:
                return list(progress.over(self.detect(mine)))

        result = self.loop.measure(detections, self.average_precision)
        if result is None:
            return {}
        self.loop.log.amend({self.config.task: result})
        self.loop.log.say(f"step {self.step}: " + "  ".join(f"{name} {value:.2f}" for name, value in result.items()))
        return {"result": result} | self.keep_best(result)

    def keep_best(self, result: Mapping[str, float]) -> dict[str, Any]:
        """Keeps the detector as best.pt where no measurement before, each after eval.every steps, was better."""
        if not (self.trains and self.evaluate_every):
            return {}
        path = self.loop.checkpoints.folder / BEST
        if self.best.improve(result, self.step):
            self.loop.save()
            self.loop.log.say(f"best so far: {self.best} ({path})")
        elif self.step == self.last_step:
            self.loop.log.say(f"best: {self.best} ({path})")
        return {"best": self.best.to_plain() | {"checkpoint": str(path)}}

    def is_best(self) -> bool:
        """Whether the best measurement is of this step; the last checkpoint where none are made on the way."""
        return self.step == (self.best.step if self.evaluate_every else self.last_step)

    def average_precision(self, found: Sequence[Detections]) -> dict[str, float]:
        """The task's metric of detections in the validation split."""
        return measure(self.config.task, sorted(found, key=lambda image: image.index), self.data.val)

    def detect(self, indices: Sequence[int]) -> Iterator[Detections]:
        """Detections in these images of the validation split, in order."""
        return detect(
            self.model,
            self.data.val,
            indices,
            batch_size=self.config.eval.batch_size,
            workers=self.config.data.workers,
            timeout=self.config.data.timeout,
            autocast=self.precision.autocast if self.device.type != "cpu" else None,  # comparable on every CPU
        )
