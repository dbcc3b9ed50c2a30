"""From the options of a run to its folder, device, networks and optimizer; what can be wrong is found here, early."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from scrl_fast.config.schema import Config, TrainConfig, check_enough
from scrl_fast.distributed import world as distributed
from scrl_fast.distributed.world import World
from scrl_fast.models import SCRL
from scrl_fast.ops import backends
from scrl_fast.optim import LARS, lars_param_groups
from scrl_fast.run import log as runlog
from scrl_fast.run import paths as run_folder

if TYPE_CHECKING:
    from scrl_fast.data import Batch

Options = TypeVar("Options", bound=Any)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def check_run(config: Config, *, images: int, world_size: int = 1, device_type: str = "cpu") -> None:
    """Checks what options, data set and machine must agree on, before a network is allocated.

    images: size of the data set. device_type: of the training device.
    Raises ValueError naming the option, its value and what to do.
    """
    config.check_ready()
    if config.run.wandb:
        runlog.import_wandb(config.run.wandb)  # not only when the log is opened, after the networks are built
    check_enough(images, config, world_size)
    check_compiled(config.train, world_size, device_type)
    backends.check_forced(device_type)


def check_compiled(train: TrainConfig, world_size: int, device_type: str) -> None:
    """Raises ValueError where ``train.compile`` or ``train.cuda_graphs`` is asked for and cannot be had."""
    if train.checkpoint_activations and (train.compile or train.cuda_graphs):
        what = "train.compile" if train.compile else "train.cuda_graphs"
        raise ValueError(
            f"{what}=True does not go with train.checkpoint_activations, which the compiler cannot follow: leave one "
            "out, or take a smaller train.batch_size and more train.accumulate"
        )
    if not train.cuda_graphs:
        return
    if device_type != "cuda":
        raise ValueError(f"train.cuda_graphs=True replays the encoders on a GPU, but this run is on {device_type}")
    reasons = {
        f"{world_size} processes, whose exchanges of BatchNorm statistics end a graph": world_size > 1,
        f"train.accumulate={train.accumulate}, since graphs reuse the memory of the first batch's gradients": (
            train.accumulate > 1
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"train.cuda_graphs=True does not go with {reason}: leave it out, or use train.compile")


def choose_folder(config: Any, kind: str = "", known: Sequence[str] = ("random",)) -> str:
    """``run.dir``; without one, the folder of the run that ``resume`` points into, or a new one under ``runs/``.

    config: with ``run``, ``resume`` and ``init``. kind: first words of a new folder's name, by default source and
    method. known: what ``init`` may be beside a path.
    Raises ValueError for ``resume=auto`` without ``run.dir``, and for a checkpoint that is not there.
    """
    for option in ("resume", "init"):
        path = getattr(config, option)
        if option == "init" and config.resume and (config.resume != "auto" or newest_checkpoint(config.run.dir)):
            continue  # not read where there is a checkpoint to go on from, and perhaps gone by now
        if path not in ("", *(known if option == "init" else ("auto",))) and not os.path.exists(path):
            raise ValueError(f"{option}={path}: there is no such checkpoint or run folder")
    if config.run.dir:
        return config.run.dir
    if config.resume == "auto":
        raise ValueError("resume=auto continues the run in run.dir, which is empty: name the folder with --run.dir")
    if config.resume and (folder := run_folder.folder_of(config.resume)):
        return str(folder)
    return f"runs/{kind or f'{config.data.source}-{config.model.method}'}-{time.strftime('%Y%m%d-%H%M%S')}"


def place_run(config: Options, world: World, kind: str = "", known: Sequence[str] = ("random",)) -> Options:
    """The options with the run folder in them, which now exists; process 0 decides for all.

    config, kind, known: as for `choose_folder`.
    After a restart by ``torchrun --max-restarts`` it is the folder of the first attempt, to be resumed as soon as an
    attempt has saved a checkpoint; until then every attempt begins, or is refused, as the first one.
    Raises ValueError as `choose_folder` and `scrl_fast.run.log.prepare_folder` do.
    """

    def begin() -> str:
        folder = choose_folder(config, kind, known)
        runlog.prepare_folder(folder, resume=bool(config.resume))
        return f"{newest_checkpoint(folder)}/{folder}"

    def place() -> tuple[str, str, str]:
        decided, again = distributed.remembered("run.dir", begin)
        found, _, folder = decided.partition("/")
        if again:
            runlog.prepare_folder(folder, resume=True)
            if newest_checkpoint(folder) != found:
                return folder, "auto", ""
        return folder, config.resume, config.init

    folder, resume, init = world.from_first(place)
    return replace(config, run=replace(config.run, dir=folder), resume=resume, init=init)


def newest_checkpoint(folder: str) -> str:
    """Name and time of the newest checkpoint in a run folder, damaged or not; empty without one or without folder."""
    newest = max(Path(folder, runlog.CHECKPOINTS).glob("step_*.pt"), default=None) if folder else None
    return f"{newest.name} {newest.stat().st_mtime_ns}" if newest else ""


def set_threads(config: Config, device: torch.device, before: int = 0) -> Config:
    """Fixes the number of CPU threads; returns the options with it. before: that of the run to go on with."""
    if device.type != "cpu":
        return config
    torch.set_num_threads(config.train.threads or before or torch.get_num_threads())
    return replace(config, train=replace(config.train, threads=torch.get_num_threads()))


def keep_memory() -> bool:
    """Tells malloc to keep freed memory and to reuse it for large tensors, for this process; False where it cannot.

    By default glibc maps each large block anew, and the first touch of fresh pages is slow; the encoder's outputs and
    gradients pay it in every layer (``benchmarks/memory_bench.py`` measures how much).
    """
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) and libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1))
    except (OSError, AttributeError, TypeError):  # no glibc
        return False


def set_numerics(deterministic: bool, device: torch.device) -> None:
    """torch's process-wide switches: bit-equal runs, or the fastest convolutions for shapes that never change."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by cuBLAS, read at its first call
        torch.use_deterministic_algorithms(True)
        # the switch also fills fresh memory, for debugging: a write of every output that nobody reads
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not deterministic


def build_model(config: Config, num_classes: int) -> SCRL:
    """The networks with their initial weights, which ``train.seed`` alone decides; a probe where there are classes."""
    torch.manual_seed(config.train.seed)
    model = config.model
    networks = SCRL(
        model.backbone,
        method=model.method,
        hidden_dim=model.hidden_dim,
        projection_dim=model.projection_dim,
        pool_size=model.pool_size,
        pool_reduce=model.pool_reduce,
        sampling_ratio=model.sampling_ratio,
        aligned=model.aligned,
        target_init="random" if config.compat == "kakaobrain" else model.target_init,
        num_classes=num_classes,
    )
    stride = networks.online.encoder.stride
    if config.views.size < stride:  # of timm's encoders it is known only now
        raise ValueError(f"views.size={config.views.size}: must be at least {stride}, the stride of {model.backbone}")
    return networks


def compile_encoders(model: SCRL, train: TrainConfig) -> None:
    """torch.compile, and CUDA graphs, for the encoders as far as the options ask for it.

    Only the encoders, whose shapes never change; boxes and heads, whose shapes do, stay as they are.
    """
    if train.compile or train.cuda_graphs:
        for branch in (model.online, model.target):
            branch.encoder.compile(dynamic=False, **({"mode": "reduce-overhead"} if train.cuda_graphs else {}))


def build_optimizer(model: SCRL, config: Config, global_batch: int) -> LARS:
    """LARS over online network and predictor, with the target's EMA attached, and the probe by plain SGD beside it.

    Every group carries ``peak_lr``, its learning rate at the top of the schedule, scaled by the global batch.
    With ``compat=kakaobrain`` the probe is one more head under LARS, as in the published implementation; it is read
    by nobody but the monitor either way.
    """
    optim = config.optim
    scale = global_batch / optim.reference_batch
    probe_too = config.compat == "kakaobrain"
    named = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (probe_too or not name.startswith("probe."))
    ]
    groups = lars_param_groups(named, optim.weight_decay, compat=config.compat)
    for group in groups:
        group["peak_lr"] = optim.lr * scale
    if model.probe is not None and not probe_too:
        peak = optim.probe_lr * scale
        groups.append({"params": list(model.probe.parameters()), "adapt": False, "weight_decay": 0.0, "peak_lr": peak})
    optimizer = LARS(
        groups,
        lr=optim.lr * scale,
        momentum=optim.momentum,
        trust_coefficient=optim.trust_coefficient,
        eps=optim.eps,
        skip_nonfinite=True,
    )
    optimizer.attach_ema(*model.ema_pairs())
    return optimizer


def step_seed(seed: int, step: int, rank: int) -> int:
    """A 63-bit seed for whatever torch draws in one step of one process (drop path and its like)."""
    return int(np.random.SeedSequence([seed % 2**64, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def loss_shares(batches: Sequence[Batch], total: int) -> list[float]:
    """Each batch's share of ``total`` box pairs, so that the weighted losses add up to the mean over all of them."""
    return [count_pairs(batch) / max(total, 1) for batch in batches]


def count_pairs(batch: Batch) -> int:
    """Box pairs of a batch; without boxes (BYOL) its images."""
    return batch.views.shape[0] // 2 if batch.boxes is None else batch.boxes[0].shape[0]
