"""Writes an encoder in the layout of other libraries: one function a format."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scrl_fast.atomic_files import write_synced
from scrl_fast.config.backbones import TIMM_PREFIX, has_own_names, is_code
from scrl_fast.models import Encoder
from scrl_fast.models.encoders import TORCHVISION_NAMES
from scrl_fast.weights.errors import WeightsError
from scrl_fast.weights.files import HUB_CONFIG, HUB_WEIGHTS
from scrl_fast.weights.layouts import BATCH_COUNTER, PUBLISHED_PARTS, State, Weights, to_detectron2, to_published
from scrl_fast.weights.metadata import flattened
from scrl_fast.weights.momentum import momentum_by_name, parameter_order
from scrl_fast.weights.tensor_values import check_floats

DETECTRON2_NOTE = (
    "detectron2: INPUT.FORMAT=RGB (its default is BGR), MODEL.RESNETS.STRIDE_IN_1X1=False, MODEL.PIXEL_MEAN and "
    "PIXEL_STD as given here times 255"
)

REFERENCE_BACKBONES = ("resnet50", "resnet101")
"""Encoders of the published implementation."""
_LARS_SETTINGS = ("lr", "momentum", "weight_decay")


def contiguous(encoder: Encoder) -> State:
    """The encoder's tensors on the CPU, contiguous in NCHW."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.body.state_dict().items()}


def check_family(encoder: Encoder, library: str) -> None:
    """Raise WeightsError for an encoder without a counterpart in the library."""
    if encoder.name not in TORCHVISION_NAMES:
        raise WeightsError(
            f"{library} has no network like {encoder.name!r}: it takes {', '.join(TORCHVISION_NAMES)}; "
            "--to safetensors, hf and onnx take any encoder"
        )


def check_reference_backbone(encoder: Encoder) -> None:
    """Raise WeightsError for an encoder that the published implementation does not know."""
    if encoder.name not in REFERENCE_BACKBONES:
        raise WeightsError(
            f"the published implementation has no network like {encoder.name!r}: it takes "
            f"{' and '.join(REFERENCE_BACKBONES)}"
        )


def _save(document: object, path: Path) -> None:
    """`torch.save` with the operating system's own error, such as a full disk, in place of one that names none."""
    write_synced(path, lambda file: torch.save(document, file))  # type: ignore[arg-type]


def write_torchvision(path: Path, encoder: Encoder, metadata: Mapping[str, Any]) -> None:
    """Writes the state dict of ``torchvision.models.NAME`` without ``fc``."""
    check_family(encoder, "torchvision")
    _save(contiguous(encoder), path)


def write_timm(path: Path, encoder: Encoder, metadata: Mapping[str, Any]) -> None:
    """Writes the state dict of ``timm.create_model(NAME, num_classes=0)``, as safetensors where the suffix says so."""
    state = contiguous(encoder)
    if encoder.name.startswith(TIMM_PREFIX):
        state = timm_names(encoder, state)
    else:
        check_family(encoder, "timm")
    if path.suffix == ".safetensors":
        write_safetensors_state(path, state, metadata)
    else:
        _save(state, path)


def timm_names(encoder: Encoder, state: State) -> State:
    """Renames tensors from timm's feature extractor to timm's whole model.

    The encoder has no layers behind the last feature map (a final norm), so the result lacks them.
    """
    import timm

    with torch.device("meta"):
        whole = timm.create_model(encoder.name.removeprefix(TIMM_PREFIX), num_classes=0)
    spelled = {}
    for name in whole.state_dict():
        for spelling in (name, name.replace(".", "_", 1), f"model.{name}"):
            if spelling in state:
                spelled[name] = state[spelling]
    return spelled


def write_detectron2(path: Path, encoder: Encoder, metadata: Mapping[str, Any]) -> None:
    """Writes the pickle of NumPy arrays that detectron2's checkpointer reads."""
    check_family(encoder, "detectron2")
    named = ((to_detectron2(name), tensor.numpy()) for name, tensor in contiguous(encoder).items())
    model = {name: array for name, array in named if name is not None}
    content = {"model": model, "__author__": "scrl_fast", "matching_heuristics": True}
    write_synced(path, lambda file: pickle.dump(content, file, protocol=4))


def write_mmdet(path: Path, encoder: Encoder, metadata: Mapping[str, Any]) -> None:
    """Writes ``backbone.*`` under ``state_dict``, for init_cfg=dict(type='Pretrained', prefix='backbone.') of mmdet."""
    check_family(encoder, "mmdet")
    state = {f"backbone.{name}": tensor for name, tensor in contiguous(encoder).items()}
    _save({"meta": flattened(metadata), "state_dict": state}, path)


def write_safetensors(path: Path, encoder: Encoder, metadata: Mapping[str, Any]) -> None:
    """Writes the encoder under its own names, with the metadata in the header."""
    write_safetensors_state(path, contiguous(encoder), metadata)


def write_safetensors_state(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes these tensors as a safetensors file."""
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise WeightsError("safetensors is not installed: pip install safetensors") from error
    content = save(dict(state), metadata=flattened(metadata))  # its own save_file makes a private file
    write_synced(path, lambda file: file.write(content))


def write_reference(path: Path, weights: Weights) -> None:
    """Writes the published implementation's checkpoint, with heads and momentum.

    Schedules and loss scaler are "fake_state_dict", which that implementation skips. Its optimizer always numbers the
    evaluator's two parameters; without a probe they have places there and no momentum.
    Raises WeightsError for an encoder that it does not know.
    """
    for part, state in weights.parts.items():
        check_floats(f"{weights.path}: {part}", state, BATCH_COUNTER)
    renamed = {part: {_reference_name(part, n): t for n, t in state.items()} for part, state in weights.parts.items()}
    epoch = weights.metadata.get("epoch", 0)
    document: dict[str, Any] = {"tag": "last", "epoch": epoch if isinstance(epoch, int) else 0}
    document |= {"max_eval_score": 0.0, "max_eval_epoch": 0}
    for key, part in PUBLISHED_PARTS.items():
        document[key] = renamed.get(part) or "fake_state_dict"
    document |= {"xent_loss_state_dict": {}, "optimizer_state_dict": _reference_optimizer(weights)}
    document |= {"scheduler_state_dict": "fake_state_dict", "scaler_state_dict": "fake_state_dict"}
    _save(document, path)


def _reference_name(part: str, name: str) -> str:
    if part == "probe":
        return f"linear.{name}"
    return to_published(name.removeprefix("encoder.body.")) if name.startswith("encoder.body.") else name


def _reference_optimizer(weights: Weights) -> dict[str, Any] | str:
    buffers = momentum_by_name(weights)
    if not buffers:
        return "fake_state_dict"
    check_floats(f"{weights.path}: momentum", buffers, BATCH_COUNTER)
    adapted, plain, _ = parameter_order(Weights("", "scrl-reference", weights.parts))
    try:
        settings = {name: float((weights.optimizer or {})["param_groups"][0][name]) for name in _LARS_SETTINGS}
    except (LookupError, TypeError, ValueError) as error:
        raise WeightsError(f"{weights.path}: its optimizer does not name {', '.join(_LARS_SETTINGS)}") from error
    common = {"lr": settings["lr"], "momentum": settings["momentum"], "dampening": 0.0, "nesterov": False}
    order = adapted + plain
    indices = list(range(len(order)))
    groups = [
        {
            **common,
            "weight_decay": settings["weight_decay"],
            "lars_adaptation": True,
            "params": indices[: len(adapted)],
        },
        {**common, "weight_decay": 0.0, "lars_adaptation": False, "params": indices[len(adapted) :]},
    ]
    state = {i: {"momentum_buffer": buffers[name]} for i, name in enumerate(order) if name in buffers}
    return {"state": state, "param_groups": groups}


def write_onnx(path: Path, encoder: Encoder, metadata: Mapping[str, Any], *, size: int) -> float:
    """Writes the encoder as a graph: ``images [batch, 3, height, width]`` to ``features``; batch and sides may vary.

    Parameters keep their names and norms stay norms (runtimes fold them when they load the graph), so
    `scrl_fast.weights.onnx_files.read_onnx` reads the file back.
    Returns the largest difference between onnxruntime and PyTorch, relative to the largest feature; -1 where
    onnxruntime is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  torch.onnx asks for it
    except ImportError as error:
        raise WeightsError(f"--to onnx needs {error.name}: pip install 'scrl-fast[export]'") from error
    encoder = encoder.to("cpu", torch.float32).to(memory_format=torch.contiguous_format).eval()
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    program = torch.onnx.export(
        encoder, (images,), dynamo=True, input_names=["images"], output_names=["features"], verbose=False,
        dynamic_shapes=(dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),), optimize=False,
    )  # fmt: skip
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, flattened(metadata))
    onnx.save(model, str(path))
    return onnx_difference(path, encoder, images[:1])


def onnx_difference(path: Path, encoder: nn.Module, images: Tensor) -> float:
    """Largest difference between onnxruntime and PyTorch, relative to the largest feature; -1 without onnxruntime."""
    try:
        import onnxruntime
    except ImportError:
        return -1.0
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = encoder(images)
    return float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def write_hub(folder: Path, encoder: Encoder, metadata: Mapping[str, Any], *, size: int) -> None:
    """Writes Hugging Face's layout: model.safetensors, config.json (timm reads it too) and README.md as model card."""
    folder.mkdir(parents=True, exist_ok=True)
    state = contiguous(encoder)
    if encoder.name.startswith(TIMM_PREFIX):
        state = timm_names(encoder, state)
    write_safetensors_state(folder / HUB_WEIGHTS, state, metadata)
    config = {**metadata, **_timm_config(encoder, metadata, size)}
    (folder / HUB_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(encoder, metadata), encoding="utf-8")


def _timm_config(encoder: Encoder, metadata: Mapping[str, Any], size: int) -> dict[str, Any]:
    if encoder.name not in TORCHVISION_NAMES and not encoder.name.startswith(TIMM_PREFIX):
        return {}
    pretrained = {"input_size": [3, size, size], "num_classes": 0, "mean": metadata["mean"], "std": metadata["std"]}
    name = encoder.name.removeprefix(TIMM_PREFIX)
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": encoder.out_channels,
        "pretrained_cfg": {**pretrained, "interpolation": "bicubic", "crop_pct": 0.875},
    }


def model_card(encoder: Encoder, metadata: Mapping[str, Any]) -> str:
    """README.md of a model folder: origin, settings and the lines that load it."""
    rows = [f"| {name} | {value} |" for name, value in metadata.items() if name not in ("config", "notes")]
    timm_name = encoder.name.removeprefix(TIMM_PREFIX)
    load = (
        f'import timm\n\nmodel = timm.create_model("{timm_name}", num_classes=0)\n'
        if encoder.name.startswith(TIMM_PREFIX)
        else f"import torch\nimport torchvision\n\nmodel = torchvision.models.{encoder.name}(weights=None)\n"
        "model.fc = torch.nn.Identity()\n"
        if encoder.name in TORCHVISION_NAMES
        else _own_module_lines(encoder.name)
        if has_own_names(encoder.name)
        else f'import scrl_fast\n\nmodel = scrl_fast.models.build_encoder("{encoder.name}").body\n'
    )
    return "\n".join(
        [
            "---",
            "tags: [self-supervised-learning, feature-extraction, object-detection]",
            "library_name: timm" if encoder.name != "resnet10_tiny" else "library_name: pytorch",
            "---",
            f"# {encoder.name}, pre-trained by {str(metadata.get('method') or 'SCRL').upper()}",
            "",
            "An encoder pre-trained without labels by scrl_fast. It gives feature maps, has no classifier, and is",
            "meant to be fine-tuned, for detection above all.",
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
            "```python",
            "from safetensors.torch import load_file",
            f'{load}model.load_state_dict(load_file("{HUB_WEIGHTS}"))',
            "```",
            "",
            "Images are RGB in 0..1, minus `mean`, divided by `std`. `config.json` holds every option of the training,",
            "where they are known. Add data, licence and measured results before you publish this.",
            "",
        ]
    )  # fmt: skip


def _own_module_lines(name: str) -> str:
    """The lines of a model card that make a network of the user's own."""
    if not is_code(name):
        return f"model = ...  # the {name.strip('<>')} that was handed to the trainer\n"
    module, _, attribute = name.partition(":")
    first = attribute.partition(".")[0]
    return f"from {module} import {first}\n\nmodel = {attribute}()\n"
