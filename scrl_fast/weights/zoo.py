"""Trained weights by name: torchvision's, timm's, or a repository's on the Hugging Face hub, each from its cache."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import nn

from scrl_fast.atomic_files import digest_of
from scrl_fast.config.backbones import HUB_PREFIX, TIMM_PREFIX, TIMM_WEIGHTS, TORCHVISION_WEIGHTS, is_zoo
from scrl_fast.config.yaml_text import shortened
from scrl_fast.models.encoders import TORCHVISION_NAMES
from scrl_fast.weights.errors import WeightsError
from scrl_fast.weights.files import HUB_CONFIG, HUB_WEIGHTS
from scrl_fast.weights.layouts import BATCH_COUNTER, Weights, read
from scrl_fast.weights.tensor_values import FLOATS

_DIGEST_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.")  # of a file of torch.hub: where its SHA-256 begins
_HUB_SECONDS = 5.0  # for the first answer of the Hugging Face hub; its client alone tries for a minute and more
_log = logging.getLogger("scrl_fast")
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
    advice = " ".join(f"--{section}.{name}={','.join(map(str, value))}" for name, value in differ.items())
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
    kept = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(found.url).path).name)
    if os.path.lexists(kept):
        return _weights(str(found), "torchvision", _read_kept(TORCHVISION_WEIGHTS, kept).named)
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
    settings = timm.get_pretrained_cfg(name)
    kept = _kept_by_timm(settings)
    file_state = _read_kept(TIMM_WEIGHTS, kept).named if kept else {}
    missing: list[str] = []
    try:
        # a network made only for its weights
        with hub_or_cache(), torch.random.fork_rng(devices=[]), _recording_missing(missing):
            network: nn.Module = timm.create_model(name, pretrained=True, **own)
    except Exception as error:
        if kept:
            raise _kept_error(TIMM_WEIGHTS, kept, f"it does not fit {backbone}: {shortened(error)}") from error
        raise _download_error("timm", f"the weights of {backbone}", _hub_cache(), error) from error
    if cause := _not_filled(network, missing, file_state):
        raise _kept_error(TIMM_WEIGHTS, kept, cause) if kept else WeightsError(f"init=timm: timm's file {cause}")
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
    with hub_or_cache():
        return _from_repository(init, name, revision, hf_hub_download, errors)


def _from_repository(init: str, name: str, revision: str, hf_hub_download: Any, errors: Any) -> Weights:
    missing: Exception = LookupError(name)
    for file in HUB_FILES:
        try:
            path = Path(hf_hub_download(name, file, revision=revision or None))
        except errors.EntryNotFoundError as error:  # not in the repository; without network: not in the cache
            missing = error
            continue
        except Exception as error:
            raise _download_error(init, f"the repository {name}", _hub_cache(), error) from error
        else:
            if file == HUB_WEIGHTS:
                _fetch_config(hf_hub_download, name, revision)
            return _read_kept(init, path, whole_folder=file == HUB_WEIGHTS)
    raise _download_error(init, f"{' or '.join(HUB_FILES)} of {name}", _hub_cache(), missing)


def _not_filled(network: nn.Module, missing: list[str], file_state: dict[str, Any]) -> str:
    """What a network of timm's did not get from its file, or got from whole numbers; "" where all is as it should be.

    missing: names that the file lacks, of the whole model. file_state: the file's tensors, where they are known.
    """

    def own_names(key: str) -> list[str]:  # of the parts that a feature extractor keeps, under its names
        return [name for name in (key, key.replace(".", "_", 1), f"model.{key}") if name in own]

    own = network.state_dict()
    if lost := [key for key in missing if own_names(key) and not key.endswith(BATCH_COUNTER)]:
        return f"it lacks {len(lost)} of the network's tensors, such as {lost[0]}"
    for key, tensor in file_state.items():
        if tensor.dtype not in FLOATS and any(own[name].is_floating_point() for name in own_names(key)):
            return f"its tensor {key} holds no floats but {tensor.dtype}"
    return ""


@contextmanager
def _recording_missing(names: list[str]) -> Iterator[None]:
    """Adds the tensors that a network did not get to ``names``: timm leaves them random without a word.

    timm has no way to ask, since it drops the classifier by loading without `strict`.
    """
    original = nn.Module.load_state_dict

    def load_state_dict(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        result = original(self, *arguments, **options)
        names.extend(result.missing_keys)
        return result

    nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.load_state_dict = original  # type: ignore[method-assign]


def _kept_by_timm(settings: Any) -> Path | None:
    """The file of weights that timm would read from a cache; None where it has none, or takes other ways."""
    repository = getattr(settings, "hf_hub_id", None)
    if not repository or getattr(settings, "hf_hub_filename", None):
        return None
    if (cache := _hub_cache()) is None:
        return None
    name, _, revision = repository.partition("@")
    folder = cache / f"models--{name.replace('/', '--')}"
    reference = folder / "refs" / (revision or "main")
    try:
        commit = reference.read_text().strip() if reference.is_file() else revision
    except (OSError, ValueError):
        return None
    files = (folder / "snapshots" / commit / file for file in HUB_FILES)  # a pipe too, which timm would wait for
    return next((file for file in files if commit and os.path.exists(file)), None)


def _read_kept(zoo: str, file: Path, whole_folder: bool = False) -> Weights:
    """The weights in a file of a cache, which may be cut, an error page, or another program's.

    whole_folder: with the config.json beside it. Raises WeightsError naming the file, the fault and the way round.
    """
    try:
        found = read(file.parent if whole_folder and file.is_file() else file)
    except WeightsError as error:
        raise _kept_error(zoo, file, str(error)) from error
    if (said := _DIGEST_IN_NAME.search(file.name)) and not (digest := digest_of(file)).startswith(said[1]):
        raise _kept_error(zoo, file, f"its SHA-256 begins with {digest[: len(said[1])]}, its name says {said[1]}")
    return found


def _kept_error(zoo: str, file: Path, cause: str) -> WeightsError:
    real = Path(os.path.realpath(file))  # the hub's client links to it, and links to it again where only the link goes
    place = f"{file}" if real == file else f"{real}, to which {file} links"
    return WeightsError(
        f"init={zoo}: the file in the cache is not what was downloaded ({cause}); remove {place}, so that it is "
        "downloaded again, or give a file instead"
    )


def _fetch_config(download: Any, name: str, revision: str) -> None:
    """config.json beside the weights, from which their normalisation is read; a repository may have none."""
    try:
        download(name, HUB_CONFIG, revision=revision or None)
    except Exception:
        return


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Inside, the client of the Hugging Face hub looks into its cache alone, at once, where the hub does not answer."""
    try:
        from huggingface_hub import constants
    except ImportError:
        yield
        return
    asked_for = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = asked_for or not _hub_answers(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = asked_for


def _hub_answers(address: str) -> bool:
    from huggingface_hub.utils import get_session

    try:
        get_session().head(address, timeout=_HUB_SECONDS)
    except Exception as error:  # of the client's own HTTP library
        _log.warning("%s does not answer (%s): only its cache on this machine is read", address, type(error).__name__)
        return False
    return True


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
