"""Trained weights by name: torchvision's, timm's, or a repository's on the Hugging Face hub, each from its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from scrl_fast.config.backbones import HUB_PREFIX, TIMM_PREFIX, TIMM_WEIGHTS, TORCHVISION_WEIGHTS, is_zoo
from scrl_fast.models.encoders import TORCHVISION_NAMES
from scrl_fast.weights.errors import WeightsError
from scrl_fast.weights.files import HUB_CONFIG, HUB_WEIGHTS
from scrl_fast.weights.layouts import Weights, read

HUB_FILES = (HUB_WEIGHTS, "pytorch_model.bin")
"""Files of a repository that may hold the weights; the first that is there counts."""


def read_initial(init: str, backbone: str) -> Weights:
    """The weights that ``init`` means for an encoder: of a zoo, or of a file or folder.

    init: torchvision (its ImageNet-supervised ones), timm (its default ones of that model), hf-hub:OWNER/NAME, perhaps
        with @REVISION, or a path for `scrl_fast.weights.read`. backbone: the encoder's name.
    Raises WeightsError where the zoo has none, where they cannot be downloaded and are in no cache, and as `read` does.
    """
    if not is_zoo(init):
        return read(init)
    if init == TORCHVISION_WEIGHTS:
        return _of_torchvision(backbone)
    return _of_timm(backbone) if init == TIMM_WEIGHTS else _of_hub(init)


def normalization_notes(source: Weights, own: dict[str, Any], section: str) -> list[str]:
    """A note where the weights were trained on images normalised otherwise, if they say so.

    own: mean and std now. section: of the options that hold them.
    """
    views = source.metadata.get("config", {}).get("views")
    said = views if isinstance(views, dict) else source.metadata
    own = {name: list(own[name]) for name in ("mean", "std")}
    differ = {name: said[name] for name in own if isinstance(said.get(name), list) and said[name] != own[name]}
    advice = " ".join(f"--{section}.{name}={value}".replace(" ", "") for name, value in differ.items())
    return [f"it was trained on images normalised otherwise than here: {advice}"] if differ else []


def _of_torchvision(backbone: str) -> Weights:
    import torchvision

    if backbone not in TORCHVISION_NAMES:
        raise WeightsError(f"init=torchvision: torchvision has no ImageNet weights of {backbone}")
    chosen = torchvision.models.get_model_weights(backbone)
    try:
        found = chosen["IMAGENET1K_V1"]
    except KeyError:  # torchvision has the largest ResNeXt under one recipe only
        found = chosen["DEFAULT"]
    try:
        state = found.get_state_dict(progress=False, check_hash=True)
    except Exception as error:
        raise _download_error("torchvision", f"the weights of {backbone}", Path(torch.hub.get_dir()), error) from error
    return _weights(str(found), "torchvision", state)


def _of_timm(backbone: str) -> Weights:
    if not backbone.startswith(TIMM_PREFIX) and backbone not in TORCHVISION_NAMES:
        raise WeightsError(f"init=timm: timm has no weights of {backbone}")
    try:
        import timm
    except ImportError as error:
        raise WeightsError("init=timm needs timm: pip install timm") from error
    name = backbone.removeprefix(TIMM_PREFIX)
    own: dict[str, Any] = {"features_only": True} if backbone.startswith(TIMM_PREFIX) else {"num_classes": 0}
    if not timm.is_model_pretrained(name):
        tags = [f"timm:{tag}" for tag in timm.list_models(f"{name.split('.')[0]}.*", pretrained=True)]
        known = f"; it has {', '.join(tags[:5])}" if tags else ""
        raise WeightsError(f"init=timm: timm has no weights of {backbone}{known}")
    try:
        with torch.random.fork_rng(devices=[]):  # a network that is made only for its weights
            network: nn.Module = timm.create_model(name, pretrained=True, **own)
    except Exception as error:
        raise _download_error("timm", f"the weights of {backbone}", _hub_cache(), error) from error
    settings = timm.get_pretrained_cfg(name)
    said = {"mean": list(settings.mean), "std": list(settings.std)} if settings is not None else {}
    return _weights(f"timm's {name}", "timm", network.state_dict(), said)


def _of_hub(init: str) -> Weights:
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        raise WeightsError(f"init={init} needs huggingface_hub: pip install huggingface_hub") from error
    name, _, revision = init.removeprefix(HUB_PREFIX).partition("@")
    if name.count("/") != 1 or not all(name.split("/")):
        raise WeightsError(f"init={init}: must be {HUB_PREFIX}OWNER/NAME, or {HUB_PREFIX}OWNER/NAME@REVISION")
    missing: Exception = LookupError(name)
    for file in HUB_FILES:
        try:
            path = Path(hf_hub_download(name, file, revision=revision or None))
        except errors.LocalEntryNotFoundError as error:  # no network, and not in the cache
            missing = error
        except errors.EntryNotFoundError as error:  # the repository has no such file
            missing = error
            continue
        except Exception as error:
            raise _download_error(init, f"the repository {name}", _hub_cache(), error) from error
        else:
            if file == HUB_WEIGHTS:
                _fetch_config(hf_hub_download, name, revision)
                return read(path.parent)
            return read(path)
        break
    raise _download_error(init, f"{' or '.join(HUB_FILES)} of {name}", _hub_cache(), missing)


def _fetch_config(download: Any, name: str, revision: str) -> None:
    """config.json beside the weights, from which their normalisation is read; a repository may have none."""
    try:
        download(name, HUB_CONFIG, revision=revision or None)
    except Exception:
        return


def _hub_cache() -> Path | None:
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return None
    return Path(HF_HUB_CACHE)


def _download_error(zoo: str, what: str, cache: Path | None, error: Exception) -> WeightsError:
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
    place = f", and they are not in the cache {cache}" if cache else ""
    return WeightsError(f"init={zoo}: {what} cannot be downloaded ({reason}){place}; give a file instead")


def _weights(path: str, layout: str, state: dict[str, Any], said: dict[str, Any] | None = None) -> Weights:
    return Weights(path, layout, {"online": {f"encoder.body.{n}": t for n, t in state.items()}}, metadata=said or {})
