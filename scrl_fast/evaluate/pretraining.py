"""Which images a start was pre-trained on: as its run's config.yaml and the checkpoint it began from say."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scrl_fast.config.backbones import RANDOM, TORCHVISION_WEIGHTS, is_named
from scrl_fast.config.files import Settings, build, under_present_names
from scrl_fast.config.run_folder import CONFIG, folder_of
from scrl_fast.config.schema import Config
from scrl_fast.config.yaml_text import read_yaml
from scrl_fast.data.image_files import BadImage, printable
from scrl_fast.data.sources.factory import make_source
from scrl_fast.data.sources.shared_images import shared_files
from scrl_fast.errors import UsageError
from scrl_fast.weights.checkpoint_files import CheckpointError, load

FILES = ("folder", "imagefolder", "imagenet", "list")
"""Values of data.source whose images are files of this machine; a run's config.yaml makes nothing else be opened."""
MAX_ANCESTORS = 4  # runs that started from one another, at most
OfTransfer = Callable[[dict[str, Any], str], Any]


@dataclass(frozen=True)
class Stage:
    """One training that a start has behind it. source: its images, None where ``why`` says that they are not here."""

    name: str
    source: Any = None
    why: str = ""


def stages_of(
    init: str, of_transfer: OfTransfer | None = None, *, kinds: Collection[str] | None = None
) -> Iterator[Stage]:
    """The trainings behind a start, the last one first.

    of_transfer: reads the images that a detector's run had. kinds: values of data.source that may be opened, else all.
    """
    for _ in range(MAX_ANCESTORS):
        if init == RANDOM:
            return
        if is_named(init):
            whose = ", ImageNet's," if init == TORCHVISION_WEIGHTS else ""
            yield Stage(init, why=f"its images{whose} are not here")
            return
        options, init, why = _options_of(init)
        name = str(folder_of(init) or init)
        if why:
            yield Stage(name, why=why)
            return
        yield _stage(name, options, of_transfer, kinds)
        init = options.get("init") or RANDOM
        if not is_named(init) and not Path(init).exists():
            yield Stage(init, why=f"{name} started from it, and it is not here")
            return


def _options_of(init: str) -> tuple[dict[str, Any], str, str]:
    """The options of the run behind a start, the start itself, and why there are none.

    Those of config.yaml, where a folder that has moved can be put right; ``init`` is the checkpoint's, since a run
    that goes on reads none.
    """
    folder, options = folder_of(init), {}
    try:
        if folder is not None and (folder / CONFIG).is_file():
            options = read_yaml(folder / CONFIG)
        saved = load(init).get("config")
    except (UsageError, CheckpointError, OSError, ValueError):
        saved = None
    saved = saved if isinstance(saved, dict) else {}
    options = options if isinstance(options, dict) and options else saved
    if not isinstance(options.get("data"), dict):
        return {}, init, "it does not say what it was trained on: no run of scrl_fast"
    if isinstance(model := options.get("model"), dict):  # code that makes the network has no say in what was seen
        options = options | {"model": {name: value for name, value in model.items() if name != "backbone"}}
    return options | {"init": saved.get("init") or options.get("init") or ""}, init, ""


def _stage(name: str, options: dict[str, Any], of_transfer: OfTransfer | None, kinds: Collection[str] | None) -> Stage:
    try:
        if "task" in options:
            if of_transfer is None:
                return Stage(name, why="it is a detector's run")
            return Stage(name, of_transfer(options, name))
        seen = build(Config, Settings(under_present_names(Config, options) | {"resume": "", "init": ""}, name))
        if seen.data.source == "demo":
            return Stage(name, why="it was trained on drawn scenes")
        if kinds is not None and seen.data.source not in kinds:
            return Stage(name, why="its images are no files")
        return Stage(name, make_source(seen))
    except (UsageError, BadImage, OSError) as error:
        return Stage(name, why=f"its images are not here ({' '.join(str(error).split())[:200]})")


def seen_before(start: str, test: Any) -> str:
    """Whether test images are among those that a start was pre-trained on, compared as files, in words.

    test: images with ``name_of``.
    """
    found: set[str] = set()
    images, reasons, contents = 0, [], True
    for stage in stages_of(start, kinds=FILES):
        if stage.why or not hasattr(stage.source, "name_of"):
            reasons.append(stage.why or "its images are no files")
            continue
        images += len(stage.source)
        shared, compared = shared_files(stage.source, test, content=True)
        found, contents = found | shared, contents and compared
    unchecked = f"not checked: {'; '.join(reasons)}" if reasons else ""
    if not images:
        return unchecked or "nothing to check: it has seen no images"
    count = f"{len(found) or 'none'} of {len(test)} test images {'are' if len(found) > 1 else 'is'}"
    how = "compared as files" if contents else "compared by path and link; too many agree in size to compare contents"
    such = f", such as {printable(min(found))}" if found else ""
    return "; ".join(filter(None, [f"{count} among {images:,} images, {how}{such}", unchecked]))
