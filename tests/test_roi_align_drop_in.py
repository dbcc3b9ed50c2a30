"""RoIAlign where torchvision's stood: signature, output sizes, autocast, export with any number of boxes."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
import torchvision.ops
from conftest import implementations
from torch import Tensor

from scrl_fast.ops import RoIAlign, roi_align

BOXES = [[0.0, 0, 0, 100, 100], [1, 10, 10, 50, 80], [0, 0, 0, 32, 200]]
everywhere = pytest.mark.parametrize("device, backend", implementations("roi_align"))


def work(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    map = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    return map.to(device, dtype), torch.tensor(BOXES, device=device)


@pytest.mark.parametrize("name", ["roi_align", "RoIAlign"])
def test_takes_torchvisions_arguments(name: str) -> None:
    ours = inspect.signature({"roi_align": roi_align, "RoIAlign": RoIAlign}[name]).parameters
    theirs = inspect.signature(getattr(torchvision.ops, name)).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert [p.kind for p in list(ours.values())[len(theirs) :]] == [inspect.Parameter.KEYWORD_ONLY]
    for parameter in theirs.values():
        if parameter.default is not inspect.Parameter.empty:
            assert ours[parameter.name].default == parameter.default


@everywhere
@pytest.mark.parametrize("size", [2, [2, 3], (2, 3), torch.Size([3, 1])], ids=str)
def test_output_sizes(device: str, backend: str, size) -> None:
    map, boxes = work(device)
    made = roi_align(map, boxes, size, 1 / 32, backend=backend)
    torch.testing.assert_close(made, torchvision.ops.roi_align(map, boxes, size, 1 / 32))


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(device: str, backend: str, dtype: torch.dtype) -> None:
    """torchvision's is cast to float32 there and back; ours keeps the map's dtype and accumulates in float32."""
    map, boxes = work(device, dtype)
    outside = roi_align(map, boxes, 1, 1 / 32, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        inside = roi_align(map.requires_grad_(), boxes, 1, 1 / 32, backend=backend)
        (grad,) = torch.autograd.grad(inside.sum(), map)
    assert inside.dtype == grad.dtype == dtype and torch.equal(inside, outside)


def test_module_copies_pickles_and_says_what_it_is() -> None:
    module = RoIAlign(2, 1 / 32, aligned=True)
    map, boxes = work()
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again(map, boxes), module(map, boxes)) and repr(again) == repr(module)
    assert "aligned=True" in repr(module)


def test_export_with_any_number_of_boxes() -> None:
    map, boxes = work()
    shapes = ({}, {0: torch.export.Dim("boxes", min=2)})
    exported = torch.export.export(RoIAlign(2, 1 / 32), (map, boxes), dynamic_shapes=shapes).module()
    many = boxes.repeat(3, 1)
    assert torch.equal(exported(map, many), roi_align(map, many, 2, 1 / 32))
