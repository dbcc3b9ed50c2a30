"""Names of classes whose objects stand beside weights and are not needed."""

from __future__ import annotations

SKIPPED = frozenset(
    f"{module}.{name}"
    for modules, names in [
        (("argparse",), ("Namespace",)),
        (("collections",), ("deque",)),
        (("types",), ("SimpleNamespace",)),
        (("datetime",), ("datetime", "date", "timedelta")),
        (("pathlib", "pathlib._local"), ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
        (("omegaconf.dictconfig", "omegaconf.listconfig"), ("DictConfig", "ListConfig")),
        (("yacs.config", "fvcore.common.config", "detectron2.config.config"), ("CfgNode",)),
        (("easydict",), ("EasyDict",)),
        (("mmengine.logging.history_buffer",), ("HistoryBuffer",)),
        (("mmengine.config.config", "mmcv.utils.config"), ("ConfigDict",)),
        (("pytorch_lightning.utilities.parsing", "lightning.pytorch.utilities.parsing"), ("AttributeDict",)),
        (("lightning_fabric.utilities.data", "lightning.fabric.utilities.data"), ("AttributeDict",)),
    ]
    for module in modules
    for name in names
)
"""Classes of options and logs beside the weights of training scripts: they are not read."""
