"""The data of the task ``custom``: a folder of labelled images as people have it, in one of the usual layouts."""

from __future__ import annotations

from scrl_fast.data.image_files import ImageLimits
from scrl_fast.data.sources.labelled_parts import LabelledChoice, LabelledParts, read_parts
from scrl_fast.transfer.config import TransferConfig


def read_custom(config: TransferConfig) -> LabelledParts:
    """Both parts of the data set that ``config.data`` names.

    Raises UsageError naming the folder, the file or the option.
    """
    data = config.data
    return read_parts(
        LabelledChoice(
            data.root,
            train=data.train,
            val=data.val,
            layout=data.layout,
            classes=data.classes,
            val_share=data.val_share,
            val_seed=data.val_seed,
            limits=ImageLimits.of(data),
        )
    )
