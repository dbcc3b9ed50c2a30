"""What the tests of the trainer share: a few random pictures and a tiny network to train on them."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np

from scrl_fast.config.schema import Config
from scrl_fast.trainer import SCRLTrainer


class Pictures:
    """Random images, labelled or not."""

    def __init__(self, count=12, num_classes=0):
        self.images = np.random.default_rng(0).integers(0, 256, (count, 40, 44, 3), dtype=np.uint8)
        self.num_classes = num_classes

    def __len__(self):
        return len(self.images)

    def read(self, index):
        return self.images[index]

    def label(self, index):
        return index % self.num_classes if self.num_classes else -1

    def name_of(self, index):
        return f"picture {index}"


def make_config(folder, **train):
    config = Config()
    config.data.workers = 0
    config.views.size, config.views.recipe = 32, "simple"
    config.boxes.min_size, config.boxes.per_image = 8, 3
    config.model.backbone = "resnet10_tiny"
    config.model.hidden_dim, config.model.projection_dim = 16, 8
    config.optim.warmup_epochs = 1
    config.run.dir, config.run.tensorboard, config.run.log_every = str(folder), False, 2
    options = {"batch_size": 4, "epochs": 2, "precision": "fp32", "device": "cpu"}  # the same bits wherever it runs
    config.train = dataclasses.replace(config.train, **options | train)
    return config


def make_trainer(folder, source=None, **train):
    return SCRLTrainer(make_config(folder, **train), source=source or Pictures())


def state_of(trainer):
    weights = {key: value for name, part in trainer.model.state().items() if part for key, value in part.items()}
    buffers = [state["momentum_buffer"] for state in trainer.optimizer.state.values()]
    return copy.deepcopy([*trainer.model.state_dict().values(), *weights.values(), *buffers])


def first_batch(trainer):
    stream = trainer.batches()
    (batch,) = next(stream)
    stream.close()
    return batch


def first_batch_group(trainer):
    stream = trainer.batches()
    group = next(stream)
    stream.close()
    return group


def with_boxes(batch, count):
    return dataclasses.replace(batch, boxes=tuple(boxes[:count] for boxes in batch.boxes))
