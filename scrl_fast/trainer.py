"""Pre-training, top to bottom: batches in, checkpoints and a run folder out."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from scrl_fast import build as prepare
from scrl_fast.config.schema import Config
from scrl_fast.config.validation import validated
from scrl_fast.data import Batch, Loader, make_source, on_device, views_on_gpu
from scrl_fast.distributed import world as distributed
from scrl_fast.distributed.world import World
from scrl_fast.evaluate.demo import compare_with_untrained
from scrl_fast.metrics import StepMeter, as_rows, feature_std, rankme
from scrl_fast.run import checkpoint, resume
from scrl_fast.run import log as runlog
from scrl_fast.run import plots as pictures
from scrl_fast.run.signals import OF_ANOTHER, StopRequest
from scrl_fast.schedules import ema_momentum, learning_rate

MONITOR_ROWS = 2048  # projections that the collapse monitors look at: an SVD of more takes longer and says the same
CURVES_EVERY = 600.0  # seconds between redrawings of curves.png


class NonFiniteError(RuntimeError):
    """A loss or a gradient became NaN or infinite; the parameters are those of the step before."""


class SCRLTrainer:
    """SCRL (or BYOL) pre-training of one encoder.

    config: see `scrl_fast.config.schema.Config`. source: images to use instead of those that ``config.data`` names.
    world: this process among its fellows, where it is not the one that torchrun announces; the first one writes. Its
    process group, or one that exists already, must wait at least `distributed.exchange_timeout(config.data.timeout)`:
    PyTorch does not tell how long it does, and slow files are named only if the others are still there.
    Raises ValueError naming the option for whatever can be known to be wrong before the networks exist.

    After construction ``model``, ``optimizer``, ``loader`` and ``train_step`` may also be used without ``fit``.
    """

    def __init__(self, config: Config, *, source: Any = None, world: World | None = None) -> None:
        config = validated(config)
        train = config.train
        config.check_ready()
        self.device = distributed.device_of(train.device)
        patience = distributed.exchange_timeout(config.data.timeout)
        self.world = distributed.join(self.device, timeout=patience) if world is None else world
        self.rank, world_size = self.world.rank, self.world.size
        self.source: Any = make_source(config) if source is None else source
        prepare.check_run(config, images=len(self.source), world_size=world_size, device_type=self.device.type)
        self.threads_asked = train.threads
        self.config = config = prepare.set_threads(prepare.place_run(config, self.world), self.device)
        if self.device.type == "cpu" and train.keep_memory:
            prepare.keep_memory()
        self.folder = Path(config.run.dir)
        self.bf16 = train.precision == "bf16" or (train.precision == "auto" and self.device.type == "cuda")
        prepare.set_numerics(train.deterministic, self.device)
        self.view_format: dict[str, Any] = {
            "channels_last": train.channels_last,
            "dtype": torch.bfloat16 if self.bf16 else torch.float32,  # what autocast would make of them anyway
        }

        on_gpu = self.device.type == "cuda"
        self.loader = Loader(
            self.source,
            config,
            rank=self.rank,
            world_size=world_size,
            dtype=torch.uint8 if on_gpu else torch.float32,  # a quarter of the bytes cross the bus
            pin_memory=on_gpu,
            packed=views_on_gpu(config.data, self.device),
            gpu=self.device if config.data.decode == "gpu" else None,
            longest=0.9 * patience.total_seconds() if self.world.several else math.inf,
            bad_files_path=self.folder / ("bad_files.jsonl" if self.rank == 0 else f"bad_files_{self.rank}.jsonl"),
            reading_path=self.folder / ("reading.txt" if self.rank == 0 else f"reading_{self.rank}.txt"),
        )
        self.steps_per_epoch = len(self.loader) // train.accumulate
        self.planned_steps = self.steps_per_epoch * train.epochs
        self.last_step = min(self.planned_steps, train.max_steps or self.planned_steps)
        self.save_every = config.run.checkpoint_every or self.steps_per_epoch
        self.global_batch = train.batch_size * train.accumulate * world_size

        self.model = prepare.build_model(config, self.source.num_classes).to(self.device)
        if train.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.optimizer = prepare.build_optimizer(self.model, config, self.global_batch)
        self.model.online.encoder.checkpointing = train.checkpoint_activations
        prepare.compile_encoders(self.model, train)

        self.network: torch.nn.Module | None = None  # the model as all processes train it, from the first step on
        self.step = self.saved = 0  # updates made so far, and at the last checkpoint
        self.asked = False  # some process was told to stop
        self.checkpoints = checkpoint.CheckpointManager(self.folder / runlog.CHECKPOINTS, keep=config.run.keep)
        self.best = -math.inf  # probe accuracy of best.pt
        self.scores: list[float] = []  # probe accuracies at the logging points since the last checkpoint
        self.meter = StepMeter()
        self.pending: list[list[float]] = []  # what the meter gave since the last logging point
        self.clock = runlog.Clock()
        self.drawn = time.monotonic()  # when curves.png was drawn last
        self.projections: Tensor | None = None  # of the last batch
        self.momentum = config.optim.ema_momentum  # of the last update
        self.last_row: dict[str, Any] = {}

    def fit(self) -> dict[str, Any]:
        """Trains to the end of the plan, to ``train.max_steps``, or to a signal, and says what came out.

        Returns ``{run_dir, step, epoch, loss, feature_std, rankme, interrupted, checkpoint, resume_command, seconds}``
        and evaluation results. SIGINT, SIGTERM and SIGUSR1 finish the step or end the wait for data, save, and return
        with ``interrupted`` set.
        Raises NonFiniteError, naming the step and the last good checkpoint, when the numbers break down, and what the
        data raise, once the steps before are saved.
        """
        started = time.perf_counter()
        notes = resume.restore(self)
        with runlog.RunLog.of(self) as self.log, closing(self.loader), StopRequest() as stop:
            self.introduce(notes)
            self.clock.read()
            with closing(self.batches()) as stream:
                for batches, pairs in self.agreed(stream, stop):
                    self.train_step(batches, pairs)
                    self.log.tick()
                    if self.step % self.config.run.log_every == 0 or self.step in (1, self.last_step):
                        self.report()
                    if self.step % self.save_every == 0 or self.step == self.last_step:
                        self.save()
                    elif self.stopping(stop):  # an extra checkpoint, but no extra row: the resumed run writes the same
                        self.save(planned=False)
                    if self.stopping(stop):
                        break
            if self.step > self.saved:  # another run's checkpoint and no step left to make, or a signal just now
                self.save(planned=not stop)
            return self.finish(stop) | {"seconds": time.perf_counter() - started}

    def batches(self) -> Generator[list[Batch], None, None]:
        """Groups of ``train.accumulate`` batches, from the step after the last one made to the last one planned.

        They lie on the device, ready for ``train_step``; on a GPU the next one is copied beside the computation.
        """
        accumulate = self.config.train.accumulate
        epoch, done = divmod(self.step, self.steps_per_epoch)
        made = self.loader.stream(epoch, done * accumulate, (self.last_step - self.step) * accumulate)
        with closing(on_device(made, self.device, self.config.views, **self.view_format)) as stream:
            while self.step < self.last_step:
                self.loader.begin_step()
                with self.clock.waiting():
                    group = [next(stream) for _ in range(accumulate)]
                if self.step == 0:
                    self.draw_boxes(group[0])
                yield group

    def agreed(
        self, stream: Iterator[list[Batch]], stop: StopRequest
    ) -> Generator[tuple[list[Batch], int], None, None]:
        """Groups of batches with the box pairs of all processes, as long as every process has one.

        One small message a step between the hosts: pairs, requests to stop, data that failed, and waits for data that a
        signal ended. So all processes stop at the same step, with a checkpoint of it.
        """
        failure: Exception | None = None
        while self.step < self.last_step:
            group: list[Batch] = []
            try:
                group = stop.until_signal(lambda: next(stream)) or []  # slow data must not keep a request waiting
            except Exception as error:
                failure = error
            flags = [stop.signal_name != "", failure is not None, not group]
            pairs, asked, failed, lacking = self.world.sums([sum(map(prepare.count_pairs, group)), *map(int, flags)])
            self.asked = asked > 0
            if failed:
                self.save_before_the_end()
                raise failure or distributed.PeerFailed("stopped because the data of another process failed")
            if lacking:
                if self.stopping(stop) and self.step > self.saved:
                    self.save(planned=False)
                return
            yield group, pairs

    def stopping(self, stop: StopRequest) -> bool:
        """Whether to end after this step: in one process at any signal so far, in several at one that all heard of."""
        if self.asked and not stop:
            stop.signal_name = OF_ANOTHER
        return self.asked if self.world.several else bool(stop)

    def train_step(self, batches: Sequence[Batch], pairs: int | None = None) -> None:
        """One update from ``train.accumulate`` batches; nothing in here waits for the device.

        pairs: box pairs of this step in all processes, if known. The loss is the mean over them, so accumulation and
        several processes equal the large batch, but that accumulated batches pass BatchNorm one by one.
        """
        torch.manual_seed(prepare.step_seed(self.config.train.seed, self.step, self.rank))
        momentum = self.set_schedule()
        if self.config.train.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # what the graphs of the step before returned may be overwritten
        if self.network is None:
            self.network = self.world.parallel(self.model, self.device, static=len(batches) == 1)
        own_pairs = sum(map(prepare.count_pairs, batches))
        shares = prepare.loss_shares(batches, self.world.sums([own_pairs])[0] if pairs is None else pairs)
        batches = [batch.to(self.device, self.config.train.channels_last) for batch in batches]
        labelled = self.count_labelled(batches)
        rows = []
        for batch, share in zip(batches, shares, strict=True):
            with self.reducing_after(batch is batches[-1]):
                rows.append(self.accumulate(batch, share, labelled))
        self.optimizer.step(ema_momentum=momentum)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.clock.images += self.global_batch
        totals = [sum(column) for column in zip(*rows, strict=True)]
        self.meter.add([*totals, self.optimizer.skipped.reshape(())], own_pairs)

    def accumulate(self, batch: Batch, share: float, labelled: Tensor | None) -> list[Tensor]:
        """Forward and backward of one batch; its parts of loss, probe loss, labelled views and right answers.

        share: of the box pairs of the step. labelled: views of the step whose image has a label, in all processes.
        """
        assert self.network is not None
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            output = self.network(batch.views, batch.boxes, batch.labels)
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
        if isinstance(self.network, torch.nn.parallel.DistributedDataParallel) and not last:
            return self.network.no_sync()
        return nullcontext()

    def count_labelled(self, batches: Sequence[Batch]) -> Tensor | None:
        """Labelled views of the step in all processes, at least 1, on the device; None without a probe."""
        if self.model.probe is None:
            return None
        counts = torch.stack([(batch.labels >= 0).sum() for batch in batches])
        return self.world.sum_(2 * counts.sum()).clamp(min=1)

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

    def read_meter(self) -> None:
        """Brings the finished steps' numbers to the host. Raises NonFiniteError at the first one that went wrong."""
        rows = self.meter.drain()
        if rows and self.world.several:
            rows = self.world.sum_(torch.tensor(rows, dtype=torch.float64)).tolist()
        for step, (loss, *_, skipped, _pairs) in enumerate(rows, self.step - len(rows) + 1):
            if not math.isfinite(loss) or skipped > 0:
                good = self.checkpoints.newest_good()
                what = f"the loss is {loss}" if not math.isfinite(loss) else "a gradient is not finite"
                kept = f"the last good checkpoint is {good}" if good else "no checkpoint was written yet"
                raise NonFiniteError(
                    f"step {step}: {what}; the update was not made, and {kept}. Try a lower --optim.lr, a longer "
                    "--optim.warmup_epochs, or --train.precision=fp32"
                )
        self.pending += rows

    def report(self) -> None:
        """One logging point: the means since the last one, and the collapse monitors of this step's last batch."""
        self.read_meter()
        rows, self.pending = self.pending, []
        loss, probe_loss, correct, count, _, pairs = (list(column) for column in zip(*rows, strict=True))
        assert self.projections is not None
        monitored = self.world.rows(as_rows(self.projections), MONITOR_ROWS)
        speed = self.clock.read()
        speed["data_wait"] = self.world.sum_(torch.tensor(speed["data_wait"])).item() / self.world.size
        row: dict[str, Any] = {
            "step": self.step,
            "epoch": round(self.step / self.steps_per_epoch, 6),
            "loss": fmean(loss),
            "lr": self.optimizer.param_groups[0]["lr"],
            "ema_momentum": self.momentum,
            **speed,
            "feature_std": feature_std(monitored).item(),
            "rankme": rankme(monitored).item(),
            "pairs_per_image": sum(pairs) / (self.global_batch * len(rows)),
        }
        if sum(count):
            row |= {"probe_loss": fmean(probe_loss), "probe_accuracy": sum(correct) / sum(count)}
            self.scores.append(row["probe_accuracy"])
        if self.device.type == "cuda":
            row["peak_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        self.last_row = row
        self.log.metrics(row, seconds_per_step=self.clock.seconds / len(rows))

    def save(self, planned: bool = True) -> None:
        """Writes a checkpoint of this step; a planned one is the best if the probe has never been more accurate.

        Without labels the newest counts as the best: the loss is lowest in a collapsed network, and RankMe highest
        in an untrained one.
        """
        self.read_meter()  # a step that went wrong must not be saved
        self.saved = self.step
        better = planned and not self.source.num_classes
        if planned and self.scores:
            score = fmean(self.scores)
            better, self.best, self.scores = score > self.best, max(score, self.best), []
        loaders = self.world.gathered([self.loader.state_dict()])
        if self.rank == 0:
            self.checkpoints.save(resume.training_state(self, loaders), self.step, best=better)
            if time.monotonic() - self.drawn > CURVES_EVERY:
                self.draw_curves()

    def save_before_the_end(self) -> None:
        """Saves the steps since the last checkpoint when the data fail."""
        if self.step > self.saved:
            self.save(planned=False)
            self.log.say(f"the data failed; all {self.step} steps are saved. To continue: {self.resume_command()}")

    def introduce(self, notes: Sequence[str]) -> None:
        """What this run is, for the person at the terminal and, in files, for whoever asks later."""
        config, train = self.config, self.config.train
        for note in notes:
            self.log.say(note)
        precision = "bf16" if self.bf16 else "fp32"
        self.log.say(f"{config.model.method} with {config.model.backbone} on {self.device} in {precision}")
        plan = f"{self.steps_per_epoch} steps x {train.epochs} epochs"
        peak = self.optimizer.param_groups[0]["peak_lr"]
        if self.world.several:
            self.log.say(f"{self.world.size} processes with {train.batch_size} images each")
        self.log.say(f"{len(self.source)} images, {self.global_batch} a step, {plan}, peak learning rate {peak:.4g}")
        self.log.say(f"run folder: {self.folder}")
        if self.rank == 0:
            text = replace(config, resume="", init="", init_momentum=False).to_yaml()
            (self.folder / runlog.CONFIG).write_text(text, encoding="utf-8")
            runlog.write_environment(self.folder / runlog.ENVIRONMENT)

    def finish(self, stop: StopRequest) -> dict[str, Any]:
        """Curves, evaluation and the last words."""
        self.log.end_progress()
        bad = len(set(self.world.gathered(list(self.loader.bad_files))))
        row = self.last_row or (runlog.read_metrics(self.folder / runlog.METRICS) or [{}])[-1]
        keys = ("loss", "feature_std", "rankme", "probe_accuracy")
        summary: dict[str, Any] = {"run_dir": str(self.folder), "step": self.step, "epoch": row.get("epoch")}
        summary |= {key: row[key] for key in keys if key in row}
        self.draw_curves()
        evaluates = self.rank == 0 and self.config.eval.roi_linear and self.config.data.source == "demo"
        if evaluates and not stop:
            with stop.at_once():
                summary |= self.evaluate()
        summary["interrupted"] = stop.signal_name
        summary["checkpoint"] = str(next(self.checkpoints.folder.glob("last.pt"), ""))
        summary["resume_command"] = self.resume_command()
        if stop:
            self.log.say(stop.farewell(self.step))
            self.log.say(f"  {summary['resume_command']}")
        else:
            if bad:
                files = "bad_files*.jsonl" if self.world.several else "bad_files.jsonl"
                self.log.say(f"{bad} images could not be read, others stood in for them: {self.folder}/{files}")
            self.log.say(f"done: {self.step} steps; checkpoint and curves are in {self.folder}")
        if self.asked:  # a launcher that sees one process end may kill the first one before it has said all this
            self.world.sums([0])
        return summary

    def evaluate(self) -> dict[str, Any]:
        """RoI linear accuracy of the encoder as it was before training and as it is now, measured the same way."""
        result = compare_with_untrained(self)
        self.log.amend(result)
        return result

    def resume_command(self) -> str:
        """What to type to go on from here; where nothing is saved yet, from what this run began with."""
        arguments = [f"--config={self.folder / runlog.CONFIG}", "--resume=auto"]
        if self.config.init and not self.step:
            arguments += [f"--init={self.config.init}", f"--init_momentum={self.config.init_momentum}"]
        return f"{distributed.launcher()} -m scrl_fast.train {shlex.join(arguments)}"

    def draw_boxes(self, batch: Batch) -> None:
        """boxes.png: what the network is asked to match, from the first batch."""
        if self.rank == 0:
            views = self.config.views
            pictures.draw_boxes(self.folder / "boxes.png", batch.views, batch.boxes, mean=views.mean, std=views.std)

    def draw_curves(self) -> None:
        """curves.png from metrics.jsonl."""
        self.drawn = time.monotonic()
        rows = runlog.read_metrics(self.folder / runlog.METRICS) if self.rank == 0 else []
        if rows and not pictures.draw_curves(self.folder / "curves.png", rows):
            self.log.say_once("matplotlib is not installed: no curves.png (pip install matplotlib brings it)")
