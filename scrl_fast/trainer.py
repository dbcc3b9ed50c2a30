"""Pre-training, top to bottom: batches in, updates, numbers and a state out; `scrl_fast.run.loop` does the rest."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from scrl_fast import info
from scrl_fast.build import build, check_global_batch, check_run, initialise, with_encoder
from scrl_fast.config.backbones import code_arguments
from scrl_fast.config.run_folder import BOXES
from scrl_fast.config.schema import Config
from scrl_fast.config.validation import validated
from scrl_fast.data import Batch, Loader, identity_of, make_source, on_device, views_on_gpu
from scrl_fast.distributed import rendezvous
from scrl_fast.distributed.world import World
from scrl_fast.errors import UsageError
from scrl_fast.evaluate.demo import compare_with_untrained
from scrl_fast.evaluate.probe_validation import ProbeValidation
from scrl_fast.metrics import LogWindow, StepMeter, as_rows, feature_std, rankme
from scrl_fast.run import plots
from scrl_fast.run.agreement import check_same_everywhere
from scrl_fast.run.checkpoint import load_networks, load_optimizer_state, loading
from scrl_fast.run.folder import place_run
from scrl_fast.run.loop import TrainingLoop
from scrl_fast.run.numerics import keep_memory, set_numerics, set_threads, step_seed
from scrl_fast.run.precision import Precision
from scrl_fast.run.task import TrainingTask
from scrl_fast.schedules import ema_momentum, learning_rate

MONITOR_ROWS = 2048  # projections that the collapse monitors look at: an SVD of more takes longer and says the same
MAX_PAIRLESS = 64  # images without a box pair from the start on: a few may have none by chance


class NonFiniteError(RuntimeError):
    """A loss or a gradient became NaN or infinite; the parameters are those of the step before."""


class SCRLTrainer(TrainingTask[list[Batch]]):
    """SCRL (or BYOL) pre-training of one encoder.

    config: see `scrl_fast.config.schema.Config`. source: images to use instead of those that ``config.data`` names.
    encoder: any network that gives a feature map (see `scrl_fast.models.wrap_module`), trained in place, instead of the
    one that ``model.backbone`` names; that option then holds ``<ClassName>``.
    world: rank and size of this process, where torchrun does not announce them; rank 0 writes. Its process group, or
    one that exists already, must wait at least `rendezvous.exchange_timeout(config.data.timeout)`: PyTorch does not
    tell how long it does, and slow files are named only if the other processes still wait.
    Raises UsageError naming the option for everything that can be found before the networks exist.

    After construction ``model``, ``optimizer``, ``loader`` and ``train_step`` may also be used without ``fit``.
    """

    start_options: ClassVar[Mapping[str, Any]] = {"resume": "", "init": "", "init_momentum": False}
    process_options: ClassVar[tuple[str, ...]] = ("train.batch_size", "train.accumulate", "train.threads")
    network = property(lambda trainer: trainer.ddp_model)  # its name in earlier releases

    def __init__(
        self, config: Config, *, source: Any = None, encoder: torch.nn.Module | None = None, world: World | None = None
    ) -> None:
        config = validated(config if encoder is None else with_encoder(config, encoder))
        train = config.train
        config.check_ready()
        self.device = rendezvous.device_of(train.device)
        patience = rendezvous.exchange_timeout(config.data.timeout)
        self.world = rendezvous.join(self.device, timeout=patience) if world is None else world
        self.source: Any = make_source(config) if source is None else source
        self.identity: dict[str, Any] | None = None
        check_same_everywhere(self.world, config.to_dict(), {"device": self.device.type, **self.data_identity()})
        check_run(config, images=len(self.source), world_size=self.world.size, device_type=self.device.type)
        self.validation = ProbeValidation(config, self.source, self.world) if config.eval.validation else None
        self.precision = Precision(train.precision, self.device, self.world)
        config = place_run(config, self.world, f"{config.data.source}-{config.model.method}")
        self.config = config = self.precision.noted_in(config)
        self.threads_asked = train.threads
        self.set_threads()
        if self.device.type == "cpu" and train.keep_memory:
            keep_memory()
        set_numerics(train.deterministic, self.device)
        self.loop = TrainingLoop(self, write_environment=info.write_environment)
        self.loader = self.open_loader(patience.total_seconds())
        self.steps_per_epoch = len(self.loader) // train.accumulate
        self.planned_steps = self.steps_per_epoch * train.epochs
        self.last_step = min(self.planned_steps, train.max_steps or self.planned_steps)
        self.global_batch = train.batch_size * train.accumulate * self.world.size

        sizes = {"num_classes": self.source.num_classes, "global_batch": self.global_batch}
        self.model, self.optimizer = build(self.config, **sizes, device=self.device, encoder=encoder)
        self.compares = config.eval.roi_linear and config.data.source == "demo"
        self.untrained = copy.deepcopy(encoder) if encoder is not None and self.compares else None
        self.ddp_model: torch.nn.Module | None = None  # the model as all processes train it, from the first step on
        self.meter = StepMeter()
        self.window = LogWindow()  # what the meter gave since the last logging point
        self.projections: Tensor | None = None  # of the last batch
        self.momentum = config.optim.ema_momentum  # of the last update

    def fit(self) -> dict[str, Any]:
        """Trains to the end of the plan, to ``train.max_steps``, or to a signal, and says what came out.

        Returns ``{run_dir, step, epoch, loss, feature_std, rankme, interrupted, checkpoint, resume_command, seconds}``
        and evaluation results. SIGINT, SIGTERM and SIGUSR1 finish the step or end the wait for data, save, and return
        with ``interrupted`` set.
        Raises NonFiniteError, naming the step and the last good checkpoint, when the numbers break down, and what the
        data raise, once the steps before are saved.
        """
        with closing(self.loader):
            return self.loop.run()

    def set_threads(self, before: int = 0) -> None:
        """Fixes the number of CPU threads and notes it in the options. before: that of the run that goes on."""
        threads = set_threads(self.threads_asked, self.device, before)
        self.config = replace(self.config, train=replace(self.config.train, threads=threads))

    def open_loader(self, patience: float) -> Loader:
        """The loader of this process. patience: seconds that other processes wait for it."""
        on_gpu, rank = self.device.type == "cuda", self.world.rank
        own = "" if rank == 0 else f"_{rank}"
        return Loader(
            self.source,
            self.config,
            rank=rank,
            world_size=self.world.size,
            dtype=torch.uint8 if on_gpu else torch.float32,  # a quarter of the bytes cross the bus
            pin_memory=on_gpu,
            packed=views_on_gpu(self.config.data, self.device),
            gpu=self.device if self.config.data.decode == "gpu" else None,
            longest=0.9 * patience if self.world.is_distributed else math.inf,
            bad_files_path=self.folder / f"bad_files{own}.jsonl",
            reading_path=self.folder / f"reading{own}.txt",
        )

    def batches(self) -> Generator[list[Batch], None, None]:
        """Groups of ``train.accumulate`` batches, from the step after the last one made to the last one planned.

        They lie on the device, ready for ``train_step``; on a GPU the next one is copied beside the computation.
        """
        train = self.config.train
        epoch, done = divmod(self.step, self.steps_per_epoch)
        left = (self.last_step - self.step) * train.accumulate
        made = self.loader.stream(epoch, done * train.accumulate, left)
        dtype = self.precision.autocast or torch.float32  # what autocast would make of them anyway
        ready = on_device(made, self.device, self.config.views, channels_last=train.channels_last, dtype=dtype)
        with closing(ready) as stream:
            while self.step < self.last_step:
                self.loader.begin_step()
                yield [next(stream) for _ in range(train.accumulate)]

    def batch_weight(self, batch: list[Batch]) -> int:
        """Box pairs."""
        return sum(each.pairs for each in batch)

    def first_batch(self, batch: list[Batch]) -> None:
        """boxes.png: what the network is asked to match."""
        if self.world.rank == 0:
            first, views, path = batch[0], self.config.views, self.folder / BOXES
            draw = functools.partial(plots.draw_boxes, path, first.views, first.boxes, mean=views.mean, std=views.std)
            self.loop.log.optional(BOXES, "pillow", draw)

    # ---- one update ----

    def train_step(self, batch: Sequence[Batch], pairs: int | None = None) -> None:
        """One update from ``train.accumulate`` batches; nothing in here waits for the device.

        pairs: box pairs of this step in all processes, if known. The loss is the mean over them, so accumulation and
        several processes equal the large batch, but that accumulated batches pass BatchNorm one by one.
        """
        torch.manual_seed(step_seed(self.config.train.seed, self.step, self.world.rank))
        momentum = self.set_schedule()
        if self.config.train.cuda_graphs:  # what the graphs of the step before returned may be overwritten
            torch.compiler.cudagraph_mark_step_begin()
        if self.ddp_model is None:
            self.ddp_model = self.world.wrap_ddp(self.model, self.device, static=len(batch) == 1)
        own_pairs = sum(each.pairs for each in batch)
        total = max(self.world.all_reduce_ints([own_pairs])[0] if pairs is None else pairs, 1)
        batches = [each.to(self.device, self.config.train.channels_last) for each in batch]
        labelled = self.count_labelled(batches)
        rows = []
        for each in batches:
            with self.reducing_after(each is batches[-1]):
                rows.append(self.accumulate(each, each.pairs / total, labelled))
        if clip_norm := self.config.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.trained_parameters(), clip_norm)
        self.optimizer.step(ema_momentum=momentum)
        self.optimizer.zero_grad(set_to_none=True)
        self.loop.advance(self.global_batch)
        totals = [sum(column) for column in zip(*rows, strict=True)]
        self.meter.add([*totals, self.optimizer.skipped.reshape(())], own_pairs)

    def accumulate(self, batch: Batch, share: float, labelled: Tensor | None) -> list[Tensor]:
        """Forward and backward of one batch; its parts of loss, probe loss, labelled views and right answers.

        share: of the box pairs of the step. labelled: views of the step whose image has a label, in all processes.
        """
        assert self.ddp_model is not None
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision.bf16):
            output = self.ddp_model(batch.views, batch.boxes, batch.labels)
        objective = loss = output.loss * share
        row = [loss.detach(), *[torch.zeros_like(loss.detach())] * 3]
        if labelled is not None:  # the probe's input carries no gradient: encoder and heads do not feel it
            probe_loss = output.probe_loss * output.probe_count / labelled
            objective = loss + probe_loss
            row[1:] = [probe_loss.detach(), output.probe_correct.detach(), output.probe_count.detach()]
        (objective * self.world.size).backward()  # several processes: their gradients are averaged, not summed
        self.projections = output.projections.detach()
        return row

    def reducing_after(self, last: bool) -> AbstractContextManager[object]:
        """Several processes exchange gradients after the last batch of a step only."""
        if isinstance(self.ddp_model, torch.nn.parallel.DistributedDataParallel) and not last:
            return self.ddp_model.no_sync()
        return nullcontext()

    def count_labelled(self, batches: Sequence[Batch]) -> Tensor | None:
        """Labelled views of the step in all processes, at least 1, on the device; None without a probe."""
        if self.model.probe is None:
            return None
        counts = torch.stack([(batch.labels >= 0).sum() for batch in batches])
        return self.world.all_reduce_(2 * counts.sum()).clamp(min=1)

    def set_schedule(self) -> float:
        """Sets the learning rates of the coming update and returns the momentum of the target network after it."""
        train, optim = self.config.train, self.config.optim
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(
                self.step,
                base=group["peak_lr"],
                steps_per_epoch=self.steps_per_epoch,
                epochs=train.epochs,
                warmup_epochs=optim.warmup_epochs,
            )
        self.momentum = ema_momentum(self.step, base=optim.ema_momentum, total_steps=self.planned_steps)
        return self.momentum

    # ---- what is logged ----

    def read_meter(self) -> None:
        """Brings the finished steps' numbers to the host. Raises NonFiniteError at the first one that went wrong."""
        rows = self.meter.drain()
        if rows and self.world.is_distributed:
            rows = self.world.all_reduce_(torch.tensor(rows, dtype=torch.float64)).tolist()
        for step, (loss, *_, skipped, _pairs) in enumerate(rows, self.step - len(rows) + 1):
            if not math.isfinite(loss) or skipped > 0:
                what = f"the loss is {loss}" if not math.isfinite(loss) else "a gradient is not finite"
                raise NonFiniteError(
                    f"step {step}: {what}; the update was not made, and {self.loop.last_good()}. Try a lower "
                    "--optim.lr, a longer --optim.warmup_epochs, or --train.precision=fp32"
                )
        self.window.rows += rows

    def log_row(self) -> dict[str, Any]:
        """The means since the last row, and the collapse monitors of this step's last batch."""
        self.read_meter()
        steps, means = len(self.window.rows), self.window.take(self.global_batch)
        if not means["pairs_per_image"]:
            self.tell_missing_pairs(steps)
        assert self.projections is not None
        monitored = self.world.all_gather_rows(as_rows(self.projections), MONITOR_ROWS)
        return {
            **means,
            "lr": self.optimizer.param_groups[0]["lr"],
            "ema_momentum": self.momentum,
            "feature_std": feature_std(monitored).item(),
            "rankme": rankme(monitored).item(),
        }

    def tell_missing_pairs(self, steps: int) -> None:
        """Says that so many steps had no box pair. Raises UsageError when the run has had none at all.

        Without pairs the loss is 0 and nothing is learned. The first few images alone may lack them by chance.
        """
        size, least = self.config.views.size, self.config.boxes.min_size
        what = f"no box pair in the last {steps} steps: boxes of boxes.min_size={least} pixels hardly fit into the "
        what += f"overlap of two views of views.size={size}"
        if not self.window.pairs and (self.step * self.global_batch >= MAX_PAIRLESS or self.step == self.last_step):
            raise UsageError(f"{what}, and nothing can be learned; lower --boxes.min_size or raise --views.size")
        self.loop.log.say(what)

    @property
    def command(self) -> list[str]:
        return ["train"]

    def describe(self) -> list[str]:
        config, train = self.config, self.config.train
        run = f"{config.model.method} with {config.model.backbone} on {self.device} in {self.precision.chosen}"
        lines = [f"{run}; {self.loader.workers} threads read images", *self.precision.notes()]
        if self.world.is_distributed:
            lines.append(f"{self.world.size} processes with {train.batch_size} images each")
        plan, peak = f"{self.steps_per_epoch} steps x {train.epochs} epochs", self.optimizer.param_groups[0]["peak_lr"]
        if classes := getattr(self.source, "summary", ""):  # a source may say what it found
            lines.append(classes)
        return [*lines, f"{len(self.source)} images, {self.global_batch} a step, {plan}, peak learning rate {peak:.4g}"]

    def summary(self, row: Mapping[str, Any]) -> dict[str, Any]:
        keys = ("loss", "feature_std", "rankme", "probe_accuracy")
        self.bad_images = len(set(self.world.gather_objects(list(self.loader.bad_files))))
        return {"epoch": row.get("epoch")} | {key: row[key] for key in keys if key in row}

    def last_words(self) -> list[str]:
        if not self.bad_images:
            return []
        files = "bad_files*.jsonl" if self.world.is_distributed else "bad_files.jsonl"
        return [f"{self.bad_images} images could not be read, others stood in for them: {self.folder}/{files}"]

    def resume_arguments(self) -> list[str]:
        """Where nothing is saved yet, a run starts again from what it began with."""
        init = self.config.init if not self.step else ""
        begin = [f"--init={init}", f"--init_momentum={self.config.init_momentum}"] if init else []
        return ["--resume=auto", *code_arguments(self.config.model.backbone), *begin]

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimizer, loader and the numbers since the last row.

        Raises NonFiniteError after a step that went wrong, so that it is not saved.
        """
        self.read_meter()
        epoch, done = divmod(self.step, self.steps_per_epoch)
        loaders = self.world.gather_objects([self.loader.state_dict()])
        place = {"epoch": epoch, "batch": done * self.config.train.accumulate, "world_size": self.world.size}
        return {
            "model": self.model.state(),
            "optimizer": self.optimizer.state_dict(),
            "rng": {"torch": torch.get_rng_state()},  # every step seeds it anew; here for what else may go on from it
            "loader": {**place, "processes": loaders},
            "log": self.window.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint; the options stay those of the config.

        In a checkpoint from before every process kept its own count (no ``loader.processes``), the bad images are those
        of process 0 alone, and several processes share them as if they were all.
        Raises UsageError when the global batch is another one: step numbers and schedules would mean something else.
        """
        with loading("config"):
            check_global_batch(self.config, state, self.world.size)
            self.config = self.precision.resume(self.config, state["config"])
        if not self.threads_asked and state["loader"].get("world_size", 1) == self.world.size:
            self.set_threads(before=state["config"]["train"].get("threads", 0))
        with loading("model"):
            load_networks(self.model, state["model"])
        with loading("optimizer"):
            load_optimizer_state(self.optimizer, state["optimizer"], state["step"])
        with loading("rng"):
            torch.set_rng_state(state["rng"]["torch"])
        with loading("loader"):
            self.loader.load_state_dict(state["loader"].get("processes", [state["loader"]]))
        with loading("log"):
            self.window.load_state_dict(state.get("log", {}))

    def data_identity(self) -> dict[str, Any]:
        if self.identity is None:
            self.identity = identity_of(self.source)
        return self.identity

    def initialise(self) -> list[str]:
        config = self.config
        how = {"momentum": config.init_momentum, "views": config.views}
        return initialise(self.model, self.optimizer, config.init, **how)

    def before_save(self) -> None:
        """The probe's top-1 on the validation images, where there are any; else its accuracy in training counts."""
        if self.validation is not None:
            if self.loop.clock.steps:  # since the last row
                self.loop.log_step()
            top1 = self.validation.top1(self.model)
            self.loop.log.amend({"validation_accuracy": top1})
            self.loop.log.say(f"step {self.step}: the online probe names {top1:.2%} of the validation images")
            self.window.scores = [top1]
        self.window.end_interval()

    def is_best(self) -> bool:
        """Whether the probe has never been more accurate.

        Without labels the newest counts as the best: the loss is lowest in a collapsed network, and RankMe highest
        in an untrained one.
        """
        return self.window.improved if self.window.improved is not None else not self.source.num_classes

    def evaluate(self) -> dict[str, Any]:
        """The demo's RoI linear accuracy, in process 0; a signal ends it there and then."""
        if self.world.rank or not self.compares:
            return {}
        result = self.loop.stop.run_interruptible(self.measure) or {}
        self.loop.log.amend(result)
        return result

    def measure(self) -> dict[str, Any]:
        """RoI linear accuracy of the encoder as it was before training and as it is now, measured the same way."""
        encoder, say, before = self.model.online.encoder, self.loop.log.say, self.untrained
        return compare_with_untrained(self.config, encoder, self.source, steps=self.step, say=say, untrained=before)
