"""``python -m scrl_fast.export CHECKPOINT --to FORMAT OUT``: the trained encoder for other libraries.

Every file is written under a temporary name, read back, compared tensor by tensor, and only then renamed.
``OUT.json`` beside it holds the metadata (safetensors, mmdet, ONNX and folders hold it inside as well); beside a ResNet
for detectron2 or mmdet lie the settings of a detector.
Exit codes: 0 done, 2 wrong usage or input, 128 and its number by a signal, 1 anything else.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from scrl_fast.atomic_files import replacing, write_text
from scrl_fast.config.backbones import has_own_names
from scrl_fast.config.command_line import CommandParser
from scrl_fast.config.defaults import VIEW_SIZE
from scrl_fast.config.validation import clean_path
from scrl_fast.config.yaml_text import read_text, shortened
from scrl_fast.errors import UsageError, friendly_errors, tell_result

PROG = "python -m scrl_fast.export"
FORMATS = ("torchvision", "timm", "detectron2", "mmdet", "safetensors", "scrl-reference", "onnx", "hf")
SUFFIXES = {"detectron2": ".pkl", "safetensors": ".safetensors", "onnx": ".onnx"}
"""File suffixes by which readers tell the format."""
HUB_FOLDER = ("README.md", "config.json", "model.safetensors")
ONNX_TOLERANCE = 1e-4
LESS_MEMORY = "lower --size (ONNX), or choose another layout: nothing was written"
PRIVATE_OPTIONS = (("data", "root"), ("run", "dir"), ("run", "wandb"))


def export(
    checkpoint: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str],
    *,
    branch: str = "online",
    backbone: str = "",
    size: int = VIEW_SIZE,
    overwrite: bool = False,
    encoder: Any = None,
    push: str = "",
) -> dict[str, Any]:
    """Write the encoder of ``checkpoint`` (anything that `scrl_fast.weights.read` reads) in the layout ``to``.

    to: one of `FORMATS`. out: the file, or for ``hf`` the folder, to write.
    branch: online (what SCRL evaluates) or target. ``scrl-reference`` takes both, and heads and momentum.
    backbone: the encoder's name, where the file does not say and its shapes do not tell.
    encoder: a network that is filled with the weights, for a run whose encoder was handed over in Python.
    size: side of the images by which an ONNX graph is traced and checked; it then takes any. In ``hf``'s config.json
        the input size that timm reports.
    push: of ``hf``, the repository ``OWNER/NAME`` of the Hugging Face hub to which the folder is uploaded; it is made
        where it does not exist, private.
    Returns the metadata; ``checked`` says how the file was verified.
    Raises UsageError where the layout has no place for the encoder, where ``out`` exists without ``overwrite``, and
    where the hub refuses; the folder stays then.
    """
    from scrl_fast import weights

    out = Path(out)
    if to not in FORMATS:
        raise UsageError(f"to={to}: must be one of {', '.join(FORMATS)}")
    check_suffix(to, out)
    check_output(to, out, overwrite)
    hub = _hub(to, push) if push else None
    if to in ("onnx", "hf") and size < 1:
        raise UsageError(f"size={size}: must be at least 1, the side of an image in pixels")
    if not out.parent.is_dir():
        raise UsageError(f"{out}: the folder {out.parent} does not exist")
    from scrl_fast.weights.detector_configs import resnet_depth

    source = weights.read(checkpoint)
    encoder = _encoder_of(source, backbone, "target" if branch == "target" else "online", encoder)
    metadata = describe(source, encoder.name, branch if to != "scrl-reference" else "online and target", to)
    with replacing(out, suffix=out.suffix) as temporary:
        metadata["checked"] = _write(to, temporary, source, encoder, metadata, size)
        _move(temporary, out)
    if to != "hf":
        write_text(metadata_file(out), json.dumps(metadata, indent=2) + "\n")
    if depth := resnet_depth(encoder.name):
        _write_detector_config(to, out, depth, metadata)
    if hub is not None:
        metadata["pushed"] = _push(hub, out, push)
    return metadata


def _write_detector_config(to: str, out: Path, depth: int, metadata: dict[str, Any]) -> None:
    from scrl_fast.weights.detector_configs import detectron2_config, mmdet_config

    if path := detector_config_file(to, out):
        write = detectron2_config if to == "detectron2" else mmdet_config
        write_text(path, write(out.name, depth, metadata["mean"], metadata["std"]))


def _hub(to: str, push: str) -> Any:
    """The hub's client. Raises UsageError before anything is written."""
    if to != "hf":
        raise UsageError(f"push={push}: --to={to} writes no folder for the hub; --to=hf does")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", push):
        raise UsageError(f"push={push}: must be OWNER/NAME")
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UsageError(f"push={push} needs huggingface_hub: pip install huggingface_hub") from None
    return HfApi()


def _push(hub: Any, folder: Path, repository: str) -> str:
    """Uploads the folder's files; returns the address of the commit."""
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, folder_path=str(folder), allow_patterns=list(HUB_FOLDER)))
    except Exception as error:  # the network, or the hub's answer: no token, no right, another's name
        why = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"push={repository}: {folder} is written, but the hub did not take it: {why}") from error


def _encoder_of(source: Any, backbone: str, branch: Literal["online", "target"], given: Any) -> Any:
    """The encoder with the weights of ``source``; of a network that was given, a copy."""
    from scrl_fast import models, weights

    if given is None:
        return weights.encoder_of(source, backbone=backbone, branch=branch)
    encoder = models.wrap_module(copy.deepcopy(given), size=weights.view_size(source))
    weights.load_into(encoder, source, branch=branch)
    return encoder


def check_suffix(to: str, out: Path) -> None:
    """Raise UsageError for a suffix that means another format."""
    wanted = SUFFIXES.get(to)
    if wanted and out.suffix != wanted:
        raise UsageError(
            f"{out}: --to {to} writes a {wanted} file, and readers tell the format by the suffix: {out.stem}{wanted}"
        )
    if to != "hf" and out.suffix in SUFFIXES.values() and not wanted and (to, out.suffix) != ("timm", ".safetensors"):
        raise UsageError(f"{out}: --to {to} writes a torch file, which {out.suffix} is not: {out.stem}.pth")


def check_output(to: str, out: Path, overwrite: bool) -> None:
    """Raise UsageError where ``out`` or the metadata file beside it exists and may not, or cannot, be replaced."""
    if out.exists() and out.is_dir() != (to == "hf"):
        raise UsageError(f"{out} is {'a folder' if out.is_dir() else 'a file'}, and --to {to} writes the other")
    files = (out,) if to == "hf" else (out, metadata_file(out), detector_config_file(to, out))
    for path in filter(None, files):
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists already: choose another name, or --overwrite it")


def detector_config_file(to: str, out: Path) -> Path | None:
    """The settings of a detector beside ``out``; None where the layout is of no detection library."""
    ending = {"detectron2": "_detectron2.yaml", "mmdet": "_mmdet.py"}.get(to)
    return out.with_name(out.stem + ending) if ending else None


def metadata_file(out: Path) -> Path:
    """The metadata file beside ``out``."""
    return out.with_name(out.name + ".json")


def describe(source: Any, backbone: str, branch: str, to: str) -> dict[str, Any]:
    """The metadata of an export: backbone, method, epochs, commit, normalisation, options."""
    from scrl_fast import info
    from scrl_fast.config.schema import ViewsConfig

    said = source.metadata
    config = said.get("config") or {}
    views = config.get("views") or said
    version = info.collect()["scrl_fast"]
    metadata: dict[str, Any] = {
        "backbone": backbone,
        "method": said.get("method") or config.get("model", {}).get("method", ""),
        "branch": said.get("branch") or branch,
        "epochs": config.get("train", {}).get("epochs", said.get("epochs", said.get("epoch", 0))),
        "epoch": said.get("epoch", 0),
        "step": said.get("step", 0),
        "mean": list(views.get("mean", ViewsConfig.mean)),
        "std": list(views.get("std", ViewsConfig.std)),
        "color": "RGB",
        "format": to,
        "source_layout": source.layout,
        "scrl_fast": version["version"],
        "commit": said.get("commit") or training_commit(source.path) or version["commit"] or "",
    }
    if config:
        metadata["config"] = without_private_options(config)
    if to == "detectron2":
        from scrl_fast.weights.formats import DETECTRON2_NOTE

        metadata["notes"] = DETECTRON2_NOTE
    return metadata


def training_commit(path: str) -> str:
    """The commit of the run whose folder holds the checkpoint; "" for a checkpoint outside any run folder."""
    from scrl_fast.config.run_folder import ENVIRONMENT

    try:
        found = json.loads(read_text(Path(path).resolve().parent.parent / ENVIRONMENT))
        return shortened(found["scrl_fast"]["commit"] or "")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def without_private_options(config: dict[str, Any]) -> dict[str, Any]:
    """The options without paths and accounts of the training machine, since exports get published."""
    kept = {name: dict(value) if isinstance(value, dict) else value for name, value in config.items()}
    for section, name in PRIVATE_OPTIONS:
        if isinstance(kept.get(section), dict):
            kept[section].pop(name, None)
    return {name: value for name, value in kept.items() if name not in ("init", "resume", "json")}


def _write(to: str, path: Path, source: Any, encoder: Any, metadata: dict[str, Any], size: int) -> str:
    """Writes one format; returns how the file was verified."""
    from scrl_fast.weights import formats

    if to == "onnx":
        ran = _checked_onnx(formats.write_onnx(path, encoder, metadata, size=size))
        return f"{_checked_encoder(path, encoder)}, {ran}"
    if to == "scrl-reference":
        if "projector.net.0.weight" not in source.parts["online"] or "predictor" not in source.parts:
            raise UsageError(f"--to scrl-reference writes all networks, and {source.path} holds the encoder only")
        formats.check_reference_backbone(encoder)
        formats.write_reference(path, source)
        return _checked_reference(path, source)
    if to == "hf":
        formats.write_hub(path, encoder, metadata, size=size)
    else:
        writers: dict[str, Callable[..., None]] = {
            "torchvision": formats.write_torchvision,
            "timm": formats.write_timm,
            "detectron2": formats.write_detectron2,
            "mmdet": formats.write_mmdet,
            "safetensors": formats.write_safetensors,
        }
        writers[to](path, encoder, metadata)
    return _checked_encoder(path, encoder)


def _checked_encoder(path: Path, encoder: Any) -> str:
    import torch

    from scrl_fast import weights

    if has_own_names(encoder.name):
        other = copy.deepcopy(encoder)
        with torch.no_grad():
            for tensor in other.state_dict().values():
                tensor.zero_()
        weights.load_into(other, path)
    else:
        other = weights.encoder_of(path, backbone=encoder.name)
    mine, theirs = encoder.body.state_dict(), other.body.state_dict()
    names = [name for name in mine if not name.endswith("num_batches_tracked")]  # not every format keeps counters
    if wrong := [name for name in names if not torch.equal(mine[name], theirs[name])]:
        raise RuntimeError(f"{path} was written wrongly: {wrong[:4]} differ when read back")
    return f"{len(names)} tensors equal when read back"


def _checked_reference(path: Path, source: Any) -> str:
    import torch

    from scrl_fast import weights

    found = weights.read(path)
    for part, state in source.parts.items():
        wrong = [name for name, tensor in state.items() if not torch.equal(found.parts[part][name], tensor.cpu())]
        if wrong:
            raise RuntimeError(f"{path} was written wrongly: {part} {wrong[:4]} differ when read back")
    return f"{sum(map(len, source.parts.values()))} tensors equal when read back"


def _checked_onnx(difference: float) -> str:
    if difference < 0:
        return "not checked: onnxruntime is not installed"
    if not difference <= ONNX_TOLERANCE:
        raise RuntimeError(f"onnxruntime and PyTorch differ by {difference:.1e}, more than {ONNX_TOLERANCE:.0e}")
    return f"onnxruntime and PyTorch differ by at most {difference:.1e} of the largest feature"


def _move(temporary: Path, out: Path) -> None:
    if temporary.is_dir() and out.is_dir():
        for file in temporary.iterdir():  # a folder of ours or a clone of a hub repository: only our files change
            os.replace(file, out / file.name)
    else:
        os.replace(temporary, out)
    for data in out.parent.glob(temporary.name + "*"):  # ONNX keeps weights beyond 2 GB beside the graph
        data.unlink() if data.is_file() else None


def _parser() -> CommandParser:
    parser = CommandParser(prog=PROG, description="Write the encoder of a checkpoint in the layout of another library.")
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=clean_path,
        help="a checkpoint or run folder, or any weights --init takes",
    )
    parser.add_argument("out", metavar="OUT", type=clean_path, help="file to write; for hf a folder")
    parser.add_argument("--to", choices=FORMATS, required=True, help="layout to write")
    parser.add_argument("--branch", choices=("online", "target"), default="online", help="default: %(default)s")
    parser.add_argument(
        "--backbone", default="", help="name of the encoder, where the file does not tell, or package.module:function"
    )
    parser.add_argument(
        "--size",
        type=int,
        default=VIEW_SIZE,
        help="image side: onnx is traced with it, hf names it (default: %(default)s)",
    )
    parser.add_argument(
        "--push", default="", metavar="OWNER/NAME", help="upload the folder of hf to this repository of the hub"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, those of the process by default; return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    with friendly_errors("scrl_fast.export", debug="--debug" in argv, less_memory=LESS_MEMORY):
        args = vars(_parser().parse(argv))
        args.pop("debug")
        from scrl_fast.run.signals import EXPORT_ENDED, ending_cleanly

        with ending_cleanly("scrl_fast.export", EXPORT_ENDED):
            metadata = export(**args)
        tell_result(
            f"{metadata['branch']} {metadata['backbone']} as {args['to']}: {args['out']} ({metadata['checked']})"
        )
        if "notes" in metadata:
            tell_result(metadata["notes"])
        if (settings := detector_config_file(args["to"], Path(args["out"]))) and settings.exists():
            tell_result(f"settings of a detector: {settings}")
        if "pushed" in metadata:
            tell_result(f"uploaded: {metadata['pushed']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
