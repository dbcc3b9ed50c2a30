"""Puts our RoIAlign in the place of torchvision's, for detectors that others wrote."""

from __future__ import annotations

import functools
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from scrl_fast.ops.backends import Backend
from scrl_fast.ops.roi_align import roi_align

Place = tuple[dict[str, Any], str]
_lock = threading.RLock()
_active: list[RoIAlignPatch] = []
_installed: tuple[Any, Any] | None = None  # torchvision's function and the one in its place
_places: list[Place] = []
_log = logging.getLogger("scrl_fast")


class RoIAlignPatch:
    """What `patch_roi_align` returns: `undo` ends it, and so does the end of a ``with`` block.

    changed: dotted names that call our `roi_align` now; empty for a patch inside another one.
    """

    def __init__(self, backend: Backend | None) -> None:
        self.backend = backend
        self.changed: tuple[str, ...] = ()

    def undo(self) -> None:
        """Restores torchvision's function, once no other patch is left. Safe to call twice."""
        with _lock:
            if self in _active:
                _active.remove(self)
                if not _active:
                    _restore()

    def __enter__(self) -> RoIAlignPatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def patch_roi_align(*, backend: Backend | None = None) -> RoIAlignPatch:
    """Replaces ``torchvision.ops.roi_align`` by ours in every module that imports it by name, now or until ``undo``.

    Returns the patch. Its ``changed`` lists the replaced names, which the logger ``scrl_fast`` gives in one line.
    Torchvision's and detectron2's detectors are included. Existing networks need not be rebuilt.
    The calls then behave as `roi_align`: the gradient is deterministic, half precision is read and returned as it is
    under autocast, boxes that are not finite give NaN, and an image index outside the batch raises ValueError.
    Does not reach: default arguments, functools.partial, scripted modules. torch.jit.script cannot compile ours: script
    before the patch, or after ``undo``.
    Patches may be nested. The newest one's ``backend`` counts, and torchvision's function comes back when all are
    undone, in any order.
    The patch is process-wide. Its lock guards the replacement, not the calls: do not patch or undo while another thread
    imports or builds a detector.
    """
    patch = RoIAlignPatch(backend)
    with _lock:
        first = not _active
        _active.append(patch)
        if first:
            patch.changed = _replace()
            _log.info("RoIAlign is scrl_fast's in %s", ", ".join(patch.changed))
    return patch


def _replace() -> tuple[str, ...]:
    global _installed
    from torchvision.ops import roi_align as original

    ours = _in_place_of(original)
    found = list(_holders(original))
    for _, namespace, name in found:
        namespace[name] = ours
    _places.extend((namespace, name) for _, namespace, name in found)
    _installed = original, ours
    return tuple(sorted(f"{module}.{name}" for module, _, name in found))


def _restore() -> None:
    global _installed
    assert _installed is not None
    original, ours = _installed
    since = [(namespace, name) for _, namespace, name in _holders(ours)]  # modules that were imported meanwhile
    for namespace, name in (*_places, *since):
        if namespace.get(name) is ours:  # what someone else has put there stays
            namespace[name] = original
    _places.clear()
    _installed = None


def _in_place_of(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def replacement(
        input: Any,
        boxes: Any,
        output_size: Any,
        spatial_scale: float = 1.0,
        sampling_ratio: int = -1,
        aligned: bool = False,
    ) -> Any:
        backend = _active[-1].backend if _active else None
        return roi_align(input, boxes, output_size, spatial_scale, sampling_ratio, aligned, backend=backend)

    return replacement


def _holders(function: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every name of a module that is this function: the module's name, its namespace, the name."""
    for module_name, module in list(sys.modules.items()):
        namespace = getattr(module, "__dict__", None)
        if isinstance(namespace, dict):
            for name in [name for name, value in list(namespace.items()) if value is function]:
                yield module_name, namespace, name
