"""Our RoIAlign in the place of torchvision's: detectors of others call it, and everything is as before after `undo`."""

from __future__ import annotations

import logging
import sys
import threading
import types

import pytest
import torch
import torchvision
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn, maskrcnn_resnet50_fpn, roi_heads
from torchvision.ops import poolers

from scrl_fast import ops
from scrl_fast.ops import patch_roi_align, roi_align

PATCH = sys.modules["scrl_fast.ops.patch_roi_align"]
ORIGINAL = [torchvision.ops.roi_align]  # in a list, since a name of a module is what the patch looks for
MODULE = sys.modules["torchvision.ops.roi_align"]


@pytest.fixture(autouse=True)
def everything_is_restored():
    before = {name: dict(vars(module)) for name, module in sys.modules.items() if name.startswith("torchvision")}
    yield
    assert torchvision.ops.roi_align is ORIGINAL[0] is poolers.roi_align is roi_heads.roi_align is MODULE.roi_align
    for name, namespace in before.items():
        now = vars(sys.modules[name])
        assert list(now) == list(namespace) and all(now[key] is value for key, value in namespace.items()), name
    assert not PATCH._active and not PATCH._places and PATCH._installed is None


@pytest.fixture
def calls(monkeypatch):
    """The options of every call that reaches our function."""
    seen = []

    def counted(*arguments, **options):
        seen.append((*arguments[2:], options))
        return roi_align(*arguments, **options)

    monkeypatch.setattr(PATCH, "roi_align", counted)
    return seen


def example():
    return torch.rand(2, 3, 13, 17), torch.tensor([[0, 1.0, 2, 9, 8], [1, 0, 0, 16, 12]])


def test_torchvisions_function_and_classes_are_ours_inside_the_block(calls):
    features, boxes = example()
    expected = ORIGINAL[0](features, boxes, [3, 2], 0.5, 2, True)
    module = torchvision.ops.RoIAlign([3, 2], 0.5, 2, True)  # made before: no network is built anew
    with patch_roi_align() as patch:
        for found in (torchvision.ops.roi_align(features, boxes, [3, 2], 0.5, 2, True), module(features, boxes)):
            torch.testing.assert_close(found, expected)
        torchvision.ops.roi_align(features, [boxes[:1, 1:], boxes[1:, 1:]], 4)
    assert calls == [([3, 2], 0.5, 2, True, {"backend": None})] * 2 + [(4, 1.0, -1, False, {"backend": None})]
    assert {"torchvision.ops.roi_align", "torchvision.ops.poolers.roi_align"} <= set(patch.changed)
    torchvision.ops.roi_align(features, boxes, 2)
    assert len(calls) == 3


@pytest.mark.parametrize("build", [fasterrcnn_mobilenet_v3_large_320_fpn, maskrcnn_resnet50_fpn])
def test_torchvisions_detectors_call_ours_and_find_the_same(build, calls):
    torch.manual_seed(0)
    options = {"weights": None, "weights_backbone": None, "num_classes": 5, "min_size": 64, "max_size": 96}
    network = build(**options, box_score_thresh=0.0, box_detections_per_img=10).eval()
    images = [torch.rand(3, 60, 80)]
    with torch.no_grad():
        (expected,) = network(images)
        with patch_roi_align():
            (found,) = network(images)
    assert len(calls) == (2 if "masks" in expected else 1) * len(network.roi_heads.box_roi_pool.featmap_names) or calls
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-3)
    network.train()
    target = {"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([1])}
    target |= {"masks": torch.ones(1, 60, 80, dtype=torch.uint8)} if "masks" in expected else {}
    before = len(calls)
    with patch_roi_align():
        sum(network(images, [target]).values()).backward()
    aligned_masks = [options for options in calls[before:] if options[0] == (28, 28)]
    assert len(calls) > before and bool(aligned_masks) == (
        "masks" in expected
    )  # targets of masks are cut out by it, too


def detectron2_alike():
    """As detectron2.layers.roi_align imports and calls it."""
    module = types.ModuleType("detectron2_alike")
    code = "from torchvision.ops import roi_align\ndef pool(x, rois): return roi_align(x, rois, (4, 4), 0.25, 0, True)"
    exec(code, vars(module))
    sys.modules[module.__name__] = module
    return module


@pytest.mark.parametrize("when", ["before", "inside"])
def test_modules_that_imported_the_function_are_taken_and_restored(when, calls):
    try:
        module = detectron2_alike() if when == "before" else None
        with patch_roi_align() as patch:
            module = module or detectron2_alike()
            features, boxes = example()
            torch.testing.assert_close(
                module.pool(features, boxes), ORIGINAL[0](features, boxes, (4, 4), 0.25, 0, True)
            )
        assert calls == [((4, 4), 0.25, 0, True, {"backend": None})]
        assert ("detectron2_alike.roi_align" in patch.changed) == (when == "before")
        assert module.roi_align is ORIGINAL[0]
    finally:
        del sys.modules["detectron2_alike"]


def test_as_a_function_until_undone(calls, caplog):
    with caplog.at_level(logging.INFO, logger="scrl_fast"):
        patch = patch_roi_align()
    assert "RoIAlign is scrl_fast's in" in caplog.text and "torchvision.ops.poolers.roi_align" in caplog.text
    assert torchvision.ops.roi_align is not ORIGINAL[0] and torchvision.ops.roi_align.__name__ == "roi_align"
    patch.undo()
    patch.undo()
    assert torchvision.ops.roi_align is ORIGINAL[0] and ops.roi_align is roi_align


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_nested_patches_end_in_any_order(order, calls):
    features, boxes = example()
    patches = [patch_roi_align(), patch_roi_align(backend="reference"), patch_roi_align()]
    assert patches[0].changed and not patches[1].changed and not patches[2].changed
    backends = [None, "reference", None]
    for number in order:
        torchvision.ops.roi_align(features, boxes, 2)
        assert calls[-1][-1] == {"backend": backends[-1]}  # of the newest that is left
        place = [patch for patch in patches if patch in PATCH._active].index(patches[number])
        del backends[place]
        patches[number].undo()
    torchvision.ops.roi_align(features, boxes, 2)
    assert len(calls) == 3


def test_an_error_inside_the_block_restores_too():
    with pytest.raises(ValueError, match="image index"), patch_roi_align():
        torchvision.ops.roi_align(torch.rand(1, 3, 4, 4), torch.tensor([[7.0, 0, 0, 1, 1]]), 2)


def test_what_others_put_there_meanwhile_stays(monkeypatch):
    mine = lambda *arguments: None  # noqa: E731
    with patch_roi_align():
        monkeypatch.setattr(roi_heads, "roi_align", mine)
    assert roi_heads.roi_align is mine
    monkeypatch.undo()  # puts the patch's function back, which is nobody's any more
    roi_heads.roi_align = ORIGINAL[0]


def test_threads_share_the_patch(calls):
    """Many begin and end one at once; all see ours meanwhile, torchvision's is back afterwards."""
    features, boxes = example()
    begun, errors = threading.Barrier(8), []

    def work():
        try:
            begun.wait()
            for _ in range(5):
                with patch_roi_align():
                    before = len(calls)
                    torchvision.ops.roi_align(features, boxes, 2)
                    assert len(calls) > before
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(calls) == 40


def test_half_precision_stays_half_under_autocast():
    """torchvision's operator computes in float32 there."""
    features, boxes = example()
    with torch.autocast("cpu", torch.bfloat16), patch_roi_align():
        assert torchvision.ops.roi_align(features.bfloat16(), boxes, 2).dtype == torch.bfloat16
