"""``python -m scrl_fast.transfer export``: a trained detector for torchvision alone, or as ONNX.

Every file is written under a temporary name, read back and compared with the detector before it gets its name.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scrl_fast.atomic_files import replacing, write_synced, write_text
from scrl_fast.config.defaults import SCORE_THRESHOLD
from scrl_fast.errors import UsageError
from scrl_fast.models.encoders import TORCHVISION_NAMES
from scrl_fast.transfer import torchvision_detector
from scrl_fast.transfer.detections import first_label, hard_masks
from scrl_fast.transfer.trained import TrainedDetector, set_threshold
from scrl_fast.weights.layouts import BATCH_COUNTER

SUFFIXES = {"torchvision": ".pth", "onnx": ".onnx"}
"""Every format with its suffix."""
OPSET = 17
BOX_TOLERANCE = 0.05
"""Largest difference of a box's edge between onnxruntime and PyTorch, in pixels."""
_CHECKED_SIZES = ((240, 320), (333, 250))  # height, width


def export_detector(
    detector: TrainedDetector,
    to: str,
    out: str | os.PathLike[str],
    *,
    score: float = SCORE_THRESHOLD,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a detector for other programs.

    to: ``torchvision``: a state dict OUT.pth, and OUT.py, which builds the network with torchvision alone;
        ``onnx``: a graph from ``image`` float32 ``[3, H, W]``, 0 to 1, of any size, to ``boxes`` ``[n, 4]``, ``labels``
        ``[n]`` from 0, ``scores`` and, where the detector has them, ``masks`` bool ``[n, H, W]`` or ``keypoints``
        ``[n, K, 3]``; its metadata hold the names of the classes.
    score: detections above it are kept.
    Returns ``{files, checked}``: what was written, and how it was verified.
    Raises UsageError where torchvision has no place for the architecture, and where a file exists without
    ``overwrite``.
    """
    if to not in SUFFIXES:
        raise UsageError(f"to={to}: must be one of {', '.join(SUFFIXES)}")
    out = Path(out)
    if out.suffix != SUFFIXES[to]:
        raise UsageError(f"{out}: --to={to} writes a {SUFFIXES[to]} file: {out.stem}{SUFFIXES[to]}")
    files = [out, out.with_suffix(".py")] if to == "torchvision" else [out]
    for path in files:
        if path.is_dir() or (path.exists() and not overwrite):
            raise UsageError(f"{path} exists already: choose another name, or --overwrite it")
    if not out.parent.is_dir():
        raise UsageError(f"{out}: the folder {out.parent} does not exist")
    network = copy.deepcopy(detector.network).cpu()
    with replacing(out) as temporary:
        if to == "onnx":
            checked = _write_onnx(detector, network, temporary, score)
        else:
            checked, script = _write_torchvision(detector, network, temporary, score)
            files[1].unlink(missing_ok=True)  # an end in between leaves weights alone, never with another's script
        os.replace(temporary, out)
        if to == "torchvision":
            write_text(files[1], script)
    return {"files": [str(path) for path in files], "checked": checked}


# ---- torchvision ----


def torchvision_options(detector: TrainedDetector, score: float) -> dict[str, Any]:
    """What `torchvision_detector.build` needs to know. Raises UsageError naming what torchvision's classes lack."""
    config = detector.config
    norm = config.norm_in_heads and config.norm != "frozen"
    if config.backbone not in TORCHVISION_NAMES:
        raise UsageError(
            f"model.backbone={config.backbone} is none of torchvision's networks, so its detector does not load there; "
            "--to=onnx takes it"
        )
    if config.detector == "retinanet" and norm:
        raise UsageError(
            "model.detector=retinanet with model.norm_in_heads=True has a norm for each level of the pyramid, and "
            "torchvision's RetinaNetHead has one for all: it does not load there; --to=onnx takes it"
        )
    counts = {"keypoints": 0}
    if config.detector == "keypoint_rcnn":
        head: Any = detector.network.roi_heads
        counts = {"keypoints": head.keypoint_predictor.kps_score_lowres.out_channels}
    same = ("detector", "backbone", "fpn_channels", "head_channels", "mask_channels", "keypoint_channels")
    numbers = ("anchor_scale", "nms_threshold", "detections")
    return {
        "classes": detector.classes,
        **{name: getattr(config, name) for name in (*same, *numbers)},
        **counts,
        "norm_in_heads": norm,
        "score_threshold": score,
        "proposals_before_nms": config.proposals_before_nms[1],
        "proposals": config.proposals[1],
        "aligned": config.roi_aligned and config.roi_align == "scrl_fast",
        "sampling_ratio": config.roi_sampling_ratio,
        "min_size": config.test_short_side,
        "max_size": config.long_side,
        "mean": list(config.mean),
        "std": list(config.std),
    }


def _write_torchvision(detector: TrainedDetector, network: nn.Module, path: Path, score: float) -> tuple[str, str]:
    """Writes the weights; returns how they were checked, and the script that builds their network."""
    options = torchvision_options(detector, score)
    built = torchvision_detector.build(options=options)
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    for name, tensor in built.state_dict().items():
        if name.endswith(BATCH_COUNTER) and name not in state:  # frozen norms count nothing
            state[name] = tensor
    write_synced(path, lambda file: torch.save(state, file))  # type: ignore[arg-type]
    loaded = torchvision_detector.build(str(path), options)
    wrong = [name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, state[name])]
    if wrong:
        raise RuntimeError(f"{path} was written wrongly: {wrong[:4]} differ when read back")
    source = Path(torchvision_detector.__file__).read_text(encoding="utf-8")
    literal = f"OPTIONS: dict[str, Any] = {options!r}\n"
    checked = f"{len(state)} tensors load strictly into torchvision's {type(loaded).__name__}"
    return checked, source.replace("OPTIONS: dict[str, Any] = {}\n", literal, 1)


# ---- ONNX ----


class _Graph(nn.Module):
    """One image to the arrays of a `Prediction`, soft masks made hard."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.first_label = network, first_label(network)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        (found,) = self.network([image])
        arrays = [found["boxes"], found["labels"] - self.first_label, found["scores"]]
        if "masks" in found:
            arrays.append(hard_masks(found["masks"]))
        if "keypoints" in found:
            arrays.append(found["keypoints"])
        return tuple(arrays)


def _write_onnx(detector: TrainedDetector, network: nn.Module, path: Path, score: float) -> str:
    try:
        import onnx
    except ImportError as error:
        raise UsageError("--to=onnx needs the package onnx: pip install 'scrl-fast[export]'") from error
    set_threshold(network, score)
    names = ["boxes", "labels", "scores"]
    names += {"mask_rcnn": ["masks"], "keypoint_rcnn": ["keypoints"]}.get(detector.config.detector, [])
    graph = _Graph(network).eval()
    with torch.no_grad(), _quiet():
        torch.onnx.export(
            graph,
            (_noise(*_CHECKED_SIZES[0]),),
            str(path),
            dynamo=False,  # torch.export does not follow torchvision's detectors, whose shapes depend on the boxes
            opset_version=OPSET,
            input_names=["image"],
            output_names=names,
            dynamic_axes={"image": {1: "height", 2: "width"}, **{name: {0: "objects"} for name in names}},
        )
    model = onnx.load(str(path))
    described = {"classes": detector.classes, "category_ids": detector.category_ids, "score": score}
    for name, value in described.items():
        model.metadata_props.add(key=name, value=json.dumps(value))
    onnx.save(model, str(path))
    return _checked_onnx(graph, path)


def _checked_onnx(graph: nn.Module, path: Path) -> str:
    """Compares onnxruntime's boxes with PyTorch's on noise of two sizes. Raises RuntimeError where they differ."""
    try:
        import onnxruntime
    except ImportError:
        return "not checked: onnxruntime is not installed"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    compared = 0
    for size in _CHECKED_SIZES:
        image = _noise(*size)
        found = session.run(None, {"image": image.numpy()})
        with torch.no_grad():
            expected = [array.numpy() for array in graph(image)]
        if found[0].shape != expected[0].shape or not _same_boxes(found, expected):
            raise RuntimeError(f"{path}: onnxruntime and PyTorch find other boxes in an image of {size}")
        compared += len(expected[0])
    return f"onnxruntime and PyTorch find the same {compared} boxes in noise of two sizes"


def _same_boxes(found: list[Any], expected: list[Any]) -> bool:
    """Whether each box has one of the same score and label near it: equal scores may stand in another order."""
    boxes, labels, scores = found[:3]
    for box, label, score in zip(*expected[:3], strict=True):
        near = (np.abs(boxes - box) <= BOX_TOLERANCE).all(1) & (labels == label) & (np.abs(scores - score) <= 1e-3)
        if not near.any():
            return False
    return True


def _noise(height: int, width: int) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(height))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracer's remarks on every number that torchvision reads out of a tensor."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
