"""Every number that an operation or an optimizer takes: right ones of any type, wrong ones named with their value."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from conftest import available_backends

from scrl_fast import ops
from scrl_fast.config.schema import Config
from scrl_fast.config.validation import validated
from scrl_fast.errors import UsageError
from scrl_fast.ops._arguments import check_number, shown
from scrl_fast.ops.augment_views import augment_views
from scrl_fast.ops.view_table import VIEW_DTYPE, PackedImages
from scrl_fast.optim import LARS, AdamW

INFINITE = [float("inf"), -float("inf"), np.float64("inf")]
WRONG: list[Any] = [
    *(10**400, -(10**400), 10**5000, Fraction(10**400), -1, np.int64(-5), float("nan"), np.float64("nan")),
    *(Decimal("0.5"), "0.5", b"1", None, 1j, object(), np.array(0.5), np.array([0.5, 0.5])),
]
MAP, BOXES = torch.zeros(1, 2, 4, 4), torch.tensor([[0, 0.0, 0, 2, 2]])
CROPS = np.array([[0, 0, 50, 50, 0]] * 2)
IMAGES = PackedImages(np.zeros(0, np.uint8), *(np.zeros(0, np.int64) for _ in range(3)))


def tensors() -> list[torch.Tensor]:
    return [torch.ones(3)]


def roi_align(**number: Any) -> Any:
    return ops.roi_align(MAP, BOXES, **({"output_size": 2} | number))


def boxes(**number: Any) -> Any:
    return ops.sample_box_pairs(CROPS, CROPS, **({"view_size": 224, "seed": 0, "step": 0} | number))


def views(**number: Any) -> Any:
    return augment_views(IMAGES, np.zeros(0, VIEW_DTYPE), **({"size": 8, "mean": (0, 0, 0), "std": (1, 1, 1)} | number))


def step_of(kind: type[LARS | AdamW]) -> Callable[..., Any]:
    def step(**number: Any) -> Any:
        parameter = torch.nn.Parameter(torch.ones(3))
        ema = {name: number.pop(name) for name in ("ema_momentum",) if name in number}
        optimizer: Any = kind([parameter], **({"lr": 0.1} | number))
        optimizer.attach_ema(tensors(), [parameter])
        parameter.grad = torch.ones(3)
        optimizer.step(**ema)
        return parameter

    return step


def lars_step(**number: Any) -> Any:
    return ops.lars_step_(tensors(), tensors(), tensors(), **({"lr": 0.1} | number))


def ema(**number: Any) -> Any:
    return ops.ema_update_(tensors(), tensors(), **number)


LARS_NUMBERS = ("lr", "momentum", "weight_decay", "trust_coefficient", "eps")
CALLS: list[tuple[Callable[..., Any], str]] = [
    (ema, "momentum"),
    *((lars_step, name) for name in (*LARS_NUMBERS, "grad_scale", "adapt")),
    *((roi_align, name) for name in ("output_size", "spatial_scale", "sampling_ratio", "aligned")),
    *(
        (boxes, name)
        for name in ("view_size", "boxes_per_image", "min_size", "iou_threshold", "jitter", "grid", "step")
    ),
    *((views, name) for name in ("size", "mean", "std", "threads", "solarize_threshold")),
    *((step_of(LARS), name) for name in (*LARS_NUMBERS, "ema_momentum")),
    *((step_of(AdamW), name) for name in ("lr", "weight_decay", "eps", "betas", "ema_momentum")),
]
TAKEN = {  # that are no mistake for these
    "grad_scale": {"-1", "np.int64(-5)"},
    "solarize_threshold": {"-1", "np.int64(-5)"},
    "sampling_ratio": {"-1", "np.int64(-5)", shown(-(10**400))},
    "ema_momentum": {"None"},
}


@pytest.mark.parametrize(
    ("call", "name"), CALLS, ids=lambda value: value if isinstance(value, str) else value.__qualname__
)
def test_a_wrong_number_is_named_with_its_value(call: Callable[..., Any], name: str) -> None:
    also = [] if name == "solarize_threshold" else INFINITE
    for value in [*WRONG, *also]:
        if shown(value) in TAKEN.get(name, ()):
            call(**{name: value})
            continue
        with pytest.raises((TypeError, ValueError)) as refused:
            call(**{name: value})
        said = str(refused.value)
        assert name in said and len(said) < 300 and "\n" not in said, (value, said)


@pytest.mark.parametrize("backend", available_backends("ema_update_"))
def test_numbers_of_any_type_are_one_number(backend: Any) -> None:
    expected = None
    for value in (0.5, Fraction(1, 2), np.float32(0.5), np.float64(0.5), np.array([0.5])[0]):
        targets = tensors()
        ops.ema_update_(targets, [torch.zeros(3)], value, backend=backend)
        expected = targets[0] if expected is None else expected
        assert torch.equal(targets[0], expected)
    for kind in (LARS, AdamW):
        assert torch.equal(step_of(kind)(lr=Fraction(1, 2)), step_of(kind)(lr=np.float64(0.5)))


@pytest.mark.parametrize("kind", [np.int64, np.array, torch.tensor])
def test_integers_without_dimensions_are_integers(kind: Any) -> None:
    expected = boxes(seed=5, step=3)
    assert all(np.array_equal(*pair) for pair in zip(boxes(seed=kind(5), step=kind(3)), expected, strict=True))
    for wrong in (torch.tensor(5.0), torch.tensor(True), torch.tensor([5]), np.array([5])):
        with pytest.raises(TypeError, match="seed must be an integer"):
            boxes(seed=wrong)


def test_mean_and_std_may_be_tensors() -> None:
    image = PackedImages(np.arange(48, dtype=np.uint8), *(np.array([n]) for n in (0, 4, 4)))
    table = np.zeros(1, VIEW_DTYPE)
    table["h"], table["w"], table["order"] = 4, 4, [[0, 1, 2, 3]]
    got, expected = (
        augment_views(image, table, size=8, mean=kind([0.5, 0.25, 0.125]), std=kind([0.5, 0.25, 1.0]))
        for kind in (torch.tensor, tuple)
    )
    assert torch.equal(got, expected)


def test_long_values_are_cut() -> None:
    assert (
        shown(10**4000)[:3] == "100"
        and len(shown(10**4000)) < 100
        and shown(10**5000) == "a int of thousands of digits"
    )
    assert shown((7, 7.5)) == "(7, 7.5)" and shown([1]) == "[1]" and shown(object()) == "object"
    assert check_number("x", float("inf"), finite=False) == float("inf")


@pytest.mark.parametrize("value", [10**400, -(10**400), 2**63], ids=["large", "small", "64 bits"])
def test_options_are_numbers_that_a_machine_counts(value: int) -> None:
    for section, name in (("optim", "lr"), ("train", "epochs"), ("data", "workers")):
        config = Config()
        setattr(getattr(config, section), name, value)
        with pytest.raises(UsageError, match=rf"{section}\.{name}: is a whole number of \d+ bits"):
            validated(config)


# ---- more than memory holds ----


def expanded(*shape: int) -> torch.Tensor:
    return torch.ones(1).expand(*shape)


def views_of(count: int, size: int = 8) -> Any:
    row = np.zeros(1, VIEW_DTYPE)
    row["h"] = row["w"] = 2
    row["order"] = [range(4)]
    images = PackedImages(np.zeros(300, np.uint8), *(np.array([n], np.int64) for n in (0, 10, 10)))
    return augment_views(images, np.broadcast_to(row, (count,)), size=size, mean=(0, 0, 0), std=(1, 1, 1))


def draw(count: int, boxes_per_image: int) -> Any:
    crops = np.broadcast_to(CROPS[0], (count, 5))
    return ops.sample_box_pairs(crops, crops, view_size=224, seed=0, step=0, boxes_per_image=boxes_per_image)


def align(input: torch.Tensor, boxes: torch.Tensor, size: int = 2, backend: Any = None) -> Any:
    return ops.roi_align(input, boxes, size, backend=backend)


LARGE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "rows": (lambda b: ops.normalized_mse_loss(expanded(2**61, 2), expanded(2**61, 2), backend=b), "input of"),
    "a row": (lambda b: ops.normalized_mse_loss(expanded(1, 2**62), expanded(1, 2**62), backend=b), "input of"),
    "two views": (lambda b: ops.two_view_loss(expanded(2**61, 2), expanded(2**61, 2), backend=b), "online of"),
    "targets": (lambda b: ops.ema_update_([expanded(2**62)], [expanded(2**62)], 0.5, backend=b), "targets.0. overlaps"),
    "map": (lambda b: align(expanded(2**56, 2, 4, 4), BOXES, backend=b), "input of"),
    "channels": (lambda b: align(expanded(1, 2**58, 4, 4), BOXES, backend=b), "input of"),
    "boxes": (lambda b: align(MAP, expanded(2**58, 5), backend=b), "the result of"),
    "bins": (lambda b: align(MAP, BOXES.expand(2**20, 5), 30_000, backend=b), "the result of"),
    "table": (lambda b: views_of(2**56), "table of"),
    "views": (lambda b: views_of(2**14, 1 << 14), "the views of"),
    "crops": (lambda b: draw(2**56, 1), "crops1 of"),
    "box pairs": (lambda b: draw(2**20, (1 << 20) - 1), "boxes_per_image of"),
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("case", LARGE)
def test_what_memory_cannot_hold_is_refused_by_name(case: str, backend: Any) -> None:
    call, said = LARGE[case]
    with pytest.raises(ValueError, match=said):
        call(backend)
