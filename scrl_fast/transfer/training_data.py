"""The annotated images of one run: both splits, the images to train on, and their batches."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from typing import Any

from scrl_fast.data import identity_of
from scrl_fast.data.prefetch import Prefetcher
from scrl_fast.data.sources.shared_images import shared_images
from scrl_fast.distributed.world import World
from scrl_fast.run.agreement import check_same_everywhere
from scrl_fast.transfer.checks import check_batch_size, check_data, check_splits
from scrl_fast.transfer.config import TransferConfig
from scrl_fast.transfer.custom import read_custom
from scrl_fast.transfer.dataset import KEYPOINTS, Example, Examples, count_without_masks, read_split, trainable
from scrl_fast.transfer.fine_tuning import training_batches
from scrl_fast.transfer.schedule import follow_data


class TransferData:
    """Both splits of a run, read and checked against its options.

    train, val: `ImagesWithBoxes` to use instead of those that ``config.data`` names; ``train`` stays None where
    ``config.eval.only`` trains nothing. val_name: of ``val``. indices: the images to train on. notes: what the user
    should know of them.
    Raises UsageError naming the option, the path or the file.
    """

    def __init__(
        self,
        config: TransferConfig,
        world: World,
        device_type: str,
        *,
        train: Any = None,
        val: Any = None,
        val_name: str = "",
    ) -> None:
        self.config, self.world = config, world
        self.masks = config.model.detector == "mask_rcnn"
        self.keypoints = KEYPOINTS if config.model.detector == "keypoint_rcnn" else 0
        self.val_name, self.found = val_name or config.data.val or "the validation part", []
        if config.task == "custom" and (train is None or val is None):
            custom = read_custom(config)
            self.val_name, self.found = custom.val_name, custom.found
            train, val = custom.train if train is None else train, custom.val if val is None else val
        self.val = read_split(config, config.data.val) if val is None else val
        self.train = train
        if config.eval.only:
            if train is not None and config.task == "custom":  # its options are those of the run that it measures
                config = self.config = self.fitted(config, len(self.trainable(train)))
            self.train = None
        elif train is None:
            self.train = read_split(config, config.data.train)
        measured = {f"data.val {name}": value for name, value in identity_of(self.val).items()}
        check_same_everywhere(world, config.to_dict(), {"device": device_type, **self.identity(), **measured})
        check_splits(self.train, self.val, keypoints=self.keypoints > 0)
        self.indices: list[int] = []
        if self.train is not None:
            self.indices = self.trainable(self.train)
            config = self.config = self.fitted(config, len(self.indices))
            check_batch_size(config.train.batch_size, len(self.indices), world.size)
        self.notes = [*self.found, *check_data(config, self.train, self.val, self.indices)]
        if config.task != "custom":  # whose own notes tell of files with the same content, too
            self.notes += shared_images(self.train, self.val, content=False)

    def trainable(self, source: Any) -> list[int]:
        """Indices of the images that the detector can be trained on."""
        return trainable(source, self.config.data, masks=self.masks, keypoints=self.keypoints > 0)

    def fitted(self, config: TransferConfig, images: int) -> TransferConfig:
        """The options with what follows the data: length and schedule; for custom the classes, and a batch of few.

        images: number of images to train on.
        """
        if config.task == "custom":
            config = replace(config, data=replace(config.data, classes=tuple(map(str, self.val.classes))))
        fitted = fit_length(config, images, self.world.size)
        if (fitting := fitted.train.batch_size) != config.train.batch_size:
            self.found.append(f"train.batch_size={config.train.batch_size} is more than there are images: {fitting}")
        return fitted

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.indices) // self.config.train.batch_size)

    def identity(self) -> dict[str, Any]:
        """What checkpoints keep of the training images; nothing where nothing is trained."""
        return {} if self.train is None else identity_of(self.train)

    def describe(self) -> list[str]:
        """Lines about the training images for the head of the log."""
        train = self.config.train
        passes = train.steps * train.batch_size / len(self.indices)
        lines = [
            f"{len(self.indices)} of {len(self.train)} images, {self.steps_per_epoch} steps an epoch; "
            f"{passes:.3g} passes in all"
        ]
        if self.masks and (lost := count_without_masks(self.train, self.indices)):
            lines.append(f"{lost} objects without a mask are left out of training")
        return lines

    def batches(self, first_label: int, start: int, stop: int) -> Generator[list[Example], None, None]:
        """This process's part of the batches of steps ``start`` to ``stop``, read ahead."""
        data, train = self.config.data, self.config.train
        examples = Examples(
            self.train,
            first_label=first_label,
            masks=self.masks,
            keypoints=self.keypoints,
            flip=data.flip,
            seed=train.seed,
        )
        name_of = getattr(self.train, "name_of", str)
        with closing(
            Prefetcher(max(1, data.workers), data.prefetch, timeout=data.timeout, name_of=lambda item: name_of(item[0]))
        ) as prefetcher:
            yield from training_batches(
                examples,
                self.indices,
                train.batch_size,
                seed=train.seed,
                start=start,
                stop=stop,
                prefetcher=prefetcher,
                rank=self.world.rank,
                world_size=self.world.size,
            )


def fit_length(config: TransferConfig, images: int, processes: int = 1) -> TransferConfig:
    """The options with the length and schedule that follow so many images, and for custom no larger batch than them."""
    train = config.train
    if config.task == "custom" and train.batch_size > images >= processes:
        train = replace(train, batch_size=images // processes * processes)
    return follow_data(replace(config, train=train), images)
