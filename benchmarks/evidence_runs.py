"""One trial of the evidence: an encoder of one method and seed, pre-trained and measured, in stages that are kept."""

from __future__ import annotations

import copy
import functools
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from numpy.typing import NDArray

import scrl_fast
from scrl_fast.atomic_files import write_text
from scrl_fast.build import build_model
from scrl_fast.config.schema import Config
from scrl_fast.data import DemoScenes
from scrl_fast.data.sources.demo import NUM_DIGITS
from scrl_fast.distributed.rendezvous import device_of
from scrl_fast.evaluate import roi_linear
from scrl_fast.evaluate.dense import dense_consistency
from scrl_fast.evaluate.images import frozen_copy, measure_batchnorm
from scrl_fast.models import Encoder
from scrl_fast.trainer import SCRLTrainer
from scrl_fast.transfer import average_precision, build_detector, fine_tune
from scrl_fast.weights.checkpoint_files import load as load_checkpoint

KEPT = 64  # checkpoints of a run: those of the learning curve, and one for every time that it was stopped
METHODS = ("random", "byol", "scrl")
MEASURES = ("roi_linear", "dense_retrieval", "image_probe", "detection_ap")
STAGES = (*MEASURES, "curve")
SIDE = 96  # pixels of a scene
ONE_DIGIT = {"digits": (1, 1), "digit_size": (32, 64)}  # in a scene, large like the object of a photograph
OBJECTS: dict[str, dict[str, Any]] = {"many": {}, "one": ONE_DIGIT}


@dataclass(frozen=True)
class Budget:
    """How much is spent on each encoder, whatever its method."""

    epochs: int = 6
    scenes: int = 2048
    batch_size: int = 64
    curve_points: int = 4
    curve_scenes: int = 512
    test_scenes: int = 1000
    dense_scenes: int = 512
    detector_scenes: int = 64
    detector_steps: int = 150
    """Few: after 300, on 256 scenes, random weights do as well."""
    detector_batch: int = 8
    detector_lr: float = 0.02
    detector_test: int = 400


BUDGETS = {
    "smoke": Budget(1, 128, 32, 1, 32, 64, 32, 32, 4, detector_test=64),  # does it run?
    "standard": Budget(),  # minutes on two CPU cores
    "long": Budget(
        epochs=200, scenes=8192, batch_size=256, curve_points=8, curve_scenes=2048, test_scenes=4000, dense_scenes=2048,
        detector_scenes=256, detector_steps=600, detector_batch=16, detector_test=4000,
    ),  # for a GPU
}  # fmt: skip


DETECTOR: dict[str, Any] = {  # anchors of 8 to 64 pixels; digits have 16 to 32
    "anchor_scale": 4.0, "fpn_channels": 32, "head_channels": 128, "norm_in_heads": False,
    "proposals_before_nms": (100, 60), "proposals": (60, 40), "rois_per_image": 24,
}  # fmt: skip


class Deadline(Exception):
    """The time given to this call is used up; the next call goes on."""


@dataclass
class Trial:
    """The stages of one method and seed. Finished stages are kept in ``folder/state.json``."""

    method: str
    seed: int
    budget: Budget
    lr: float
    ema: float
    folder: Path
    device: str = "auto"
    deadline: float = float("inf")
    measures: tuple[str, ...] = STAGES
    objects: str = "many"
    """In the scenes of pre-training: two to five digits (many), or one large one."""
    changes: tuple[tuple[str, Any], ...] = ()
    """Options of training that differ from the demo recipe's: (section.field, value)."""

    def __post_init__(self) -> None:
        self.path = self.folder / "state.json"
        changes = {name: list(value) if isinstance(value, tuple) else value for name, value in self.changes}
        self.settings = {"budget": asdict(self.budget), "lr": self.lr, "ema": self.ema}
        self.settings |= {"objects": self.objects, "changes": changes}
        self.state: dict[str, Any] = {"settings": self.settings, "curve": [], "seconds": {}}
        self.reload()

    def reload(self) -> None:
        """What this or another process has done of it."""
        if self.path.exists():
            self.state = json.loads(self.path.read_text())
            if self.state["settings"] != self.settings:
                raise SystemExit(f"{self.folder} was begun with other settings: remove it, or give another --work")

    def run(self) -> dict[str, Any]:
        """The row, once everything is done. Raises Deadline between two stages when time is up."""
        self.stage("pretrain", self.pretrain)
        for name in self.measures:
            self.stage(name, getattr(self, name))
        values = {name: self.state[name]["value"] for name in self.measures if name in MEASURES}
        return {"method": self.method, "seed": self.seed, **values}

    def stage(self, name: str, work: Any) -> None:
        if name in self.state["seconds"]:
            return
        if time.monotonic() > self.deadline:
            raise Deadline
        started = time.perf_counter()
        result = work()
        self.reload()  # another call may have done another stage meanwhile
        self.state[name] = result
        self.state["seconds"][name] = round(time.perf_counter() - started, 1)
        self.state.setdefault("commits", {})[name] = harness._commit()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(self.state, indent=1))
        print(
            f"{self.method} seed {self.seed}: {name} {self.shown(name)} [{self.state['seconds'][name]} s]", flush=True
        )

    def shown(self, name: str) -> str:
        return f"{self.state[name]['value']:.3f}" if name in MEASURES else ""

    # ---- pre-training ----

    def config(self) -> Config:
        """The demo recipe with this trial's method, length and learning rate; all else is common to the methods."""
        config = copy.deepcopy(_recipe())
        if self.method != "random":
            config.model.method = self.method
            config.optim.lr, config.optim.ema_momentum = self.lr, self.ema
            for name, value in self.changes:
                section, _, field = name.partition(".")
                setattr(getattr(config, section), field, value)
        config.data.demo_images = self.budget.scenes
        config.train.epochs, config.train.batch_size = self.budget.epochs, self.budget.batch_size
        config.train.seed, config.train.device = self.seed, self.device
        config.eval.roi_linear, config.run.tensorboard = False, False
        config.run.dir = str(self.folder / "run")
        return config

    def pretrain(self) -> dict[str, Any]:
        """To the end of the plan, from where an earlier call stopped, with checkpoints for the learning curve."""
        if self.method == "random":
            return {}
        config = self.config()
        config.run.checkpoint_every, config.run.log_every = self.curve_every(), max(1, self.curve_every() // 2)
        config.run.keep = KEPT
        config.resume = "auto"
        summary = SCRLTrainer(replace(config), source=self.scenes(**OBJECTS[self.objects])).fit()
        if summary["interrupted"]:
            raise Deadline
        return {key: summary.get(key) for key in ("step", "loss", "feature_std", "rankme")}

    def curve_every(self) -> int:
        """Steps between two points of the learning curve."""
        steps = self.budget.scenes // self.budget.batch_size * self.budget.epochs
        return max(1, steps // self.budget.curve_points)

    def encoder(self, checkpoint: str = "last.pt") -> Encoder:
        """In eval mode, its BatchNorm statistics measured anew on scenes as they are: for every method alike."""
        config = self.config()
        model = build_model(config, 0)  # the initialisation that training with this seed starts from
        if self.method != "random":
            path = self.folder / "run" / "checkpoints" / checkpoint
            model.load_state(load_checkpoint(path)["model"], strict=False)
        encoder = frozen_copy(model.online.encoder.to(device_of(self.device)))
        mean, std = (np.array(v, np.float32) * 255 for v in (config.views.mean, config.views.std))
        images = torch.from_numpy((self.scenes().images[:512] - mean) / std).permute(0, 3, 1, 2).float()
        measure_batchnorm(encoder, images.split(128))
        return encoder

    # ---- measures ----

    def scenes(self, split: str = "train", count: int = 0, **options: Any) -> DemoScenes:
        count = count or (self.budget.scenes if split == "train" else self.budget.test_scenes)
        return _scenes(count, self.seed, split, **options)

    def roi_linear(self) -> dict[str, Any]:
        result = roi_linear(self.encoder(), self.scenes(), self.scenes("test"))
        return {"value": result.accuracy, **asdict(result)}

    def dense_retrieval(self) -> dict[str, Any]:
        recipe, trained = _recipe(), self.config().views
        views = replace(recipe.views, mean=trained.mean, std=trained.std)  # views and boxes are every method's, else
        scenes = self.scenes("test", self.budget.dense_scenes)
        result = dense_consistency(self.encoder(), scenes, views, recipe.boxes, images=len(scenes))
        return {"value": result.retrieval, **asdict(result)}

    def image_probe(self) -> dict[str, Any]:
        """The same classifier on the average-pooled feature of whole scenes that hold one large digit."""
        sets = [WholeImages(self.scenes(split, **ONE_DIGIT)) for split in ("train", "test")]
        result = roi_linear(self.encoder(), *sets)
        return {"value": result.accuracy, **asdict(result)}

    def detection_ap(self) -> dict[str, Any]:
        """AP of a detector of `scrl_fast.transfer` fine-tuned from the encoder; all else is the same."""
        config, budget = self.config(), self.budget
        torch.manual_seed(self.seed)
        network = build_detector(
            "faster_rcnn",
            NUM_DIGITS,
            backbone=config.model.backbone,
            init=self.encoder(),
            short_side=SIDE,
            mean=config.views.mean,
            std=config.views.std,
            **DETECTOR,
        ).to(device_of(self.device))
        fine_tune(
            network,
            self.scenes("train", budget.detector_scenes),
            steps=budget.detector_steps,
            batch_size=budget.detector_batch,
            lr=budget.detector_lr,
            warmup_steps=budget.detector_steps // 8,
            seed=self.seed,
            flip=0.0,  # a mirrored digit is none
            clip_norm=5.0,
            workers=1,
        )
        result = average_precision(network, self.scenes("test", budget.detector_test), batch_size=50, workers=1)
        return {"value": result["AP"], "ap": result["AP"], "ap50": result["AP50"]}

    def curve(self) -> list[dict[str, Any]]:
        """RoI linear accuracy of every checkpoint, on fewer scenes; random weights are a curve of one point."""
        if self.method == "random":
            points = [(0, "")]
        else:
            found = sorted((self.folder / "run" / "checkpoints").glob("step_*.pt"))
            steps = [(int(path.stem.removeprefix("step_")), path.name) for path in found]
            points = [(step, name) for step, name in steps if step % self.curve_every() == 0]
        sets = [self.scenes(split, self.budget.curve_scenes) for split in ("train", "test")]
        return [{"step": step, "roi_linear": roi_linear(self.encoder(name), *sets).accuracy} for step, name in points]


@functools.cache
def _recipe() -> Config:
    return scrl_fast.load_recipe("demo")  # half a second


@functools.lru_cache(maxsize=4)
def _scenes(count: int, seed: int, split: str, **options: Any) -> DemoScenes:
    """Several measures look at the same ones."""
    return DemoScenes(count, SIDE, seed, split, **options)  # type: ignore[arg-type]


class WholeImages:
    """Scenes of one digit as labelled regions: one box a scene, the whole of it."""

    def __init__(self, scenes: DemoScenes) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def read(self, index: int) -> NDArray[np.uint8]:
        return self.scenes.read(index)

    def boxes(self, index: int) -> NDArray[np.float32]:
        return np.array([[0, 0, self.scenes.size, self.scenes.size]], np.float32)

    def labels(self, index: int) -> NDArray[np.int64]:
        return self.scenes.labels(index)[:1]
