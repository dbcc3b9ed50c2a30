"""Arguments of the operations as callers have them: NumPy's numbers, generators, another optimizer's state; and wrong
ones, which are named with their value before memory is touched."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import available_backends
from torch import Tensor, nn

from scrl_fast import ops
from scrl_fast.config.defaults import MAX_SAMPLES
from scrl_fast.ops.augment_views import augment_views
from scrl_fast.ops.view_table import VIEW_DTYPE, PackedImages
from scrl_fast.optim import LARS

ROOT = Path(__file__).parent.parent
MAP = torch.arange(2 * 3 * 5 * 7, dtype=torch.float32).view(2, 3, 5, 7)
BOXES = torch.tensor([[0, 1.0, 2, 9, 8], [1, 0, 0, 16, 12]])

# ---- RoIAlign in another's place ----

TAKEN: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("output_size", {"output_size": np.int64(4)}, {"output_size": 4}),
    ("output_size pair", {"output_size": (np.int32(4), np.uint8(2))}, {"output_size": (4, 2)}),
    ("output_size array", {"output_size": np.array([4, 2])}, {"output_size": (4, 2)}),
    ("output_size list", {"output_size": [4, 2]}, {"output_size": (4, 2)}),
    ("output_size size", {"output_size": torch.Size((4, 2))}, {"output_size": (4, 2)}),
    ("spatial_scale", {"spatial_scale": np.float32(0.5)}, {"spatial_scale": 0.5}),
    ("spatial_scale integer", {"spatial_scale": 1}, {"spatial_scale": 1.0}),
    ("sampling_ratio", {"sampling_ratio": np.int64(2)}, {"sampling_ratio": 2}),
    ("sampling_ratio far below 0", {"sampling_ratio": -(1 << 70)}, {"sampling_ratio": -1}),
    ("aligned", {"aligned": np.bool_(True)}, {"aligned": True}),
    ("aligned as a number", {"aligned": 1}, {"aligned": True}),
]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("given, plain", [case[1:] for case in TAKEN], ids=[case[0] for case in TAKEN])
def test_numbers_of_other_kinds(given: dict[str, Any], plain: dict[str, Any], backend: str) -> None:
    if backend not in available_backends("roi_align"):
        pytest.skip("the compiled library is not here")
    options: dict[str, Any] = {"output_size": 2, "backend": backend}
    assert torch.equal(ops.roi_align(MAP, BOXES, **(options | given)), ops.roi_align(MAP, BOXES, **(options | plain)))


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"output_size": 7.0}, ValueError, "output_size must be one or two positive integers, got 7.0"),
    ({"output_size": "7"}, ValueError, "output_size must be one or two positive integers, got '7'"),
    ({"output_size": (7, 7.5)}, ValueError, "output_size must be one or two positive integers, got (7, 7.5)"),
    ({"output_size": True}, ValueError, "output_size must be one or two positive integers, got True"),
    ({"output_size": None}, ValueError, "output_size must be one or two positive integers, got None"),
    ({"output_size": ()}, ValueError, "output_size must be one or two positive integers, got ()"),
    ({"output_size": (1 << 20, 1 << 20)}, ValueError, "output_size must have at most 2147483647 bins"),
    ({"output_size": 1 << 40}, ValueError, "output_size must be one or two positive integers, got 1099511627776"),
    ({"spatial_scale": "0.5"}, TypeError, "spatial_scale must be a number, got '0.5'"),
    ({"spatial_scale": None}, TypeError, "spatial_scale must be a number, got None"),
    ({"spatial_scale": True}, TypeError, "spatial_scale must be a number, got True"),
    ({"spatial_scale": torch.ones(())}, TypeError, "spatial_scale must be a number, got Tensor"),
    ({"spatial_scale": -1}, ValueError, "spatial_scale must be positive and finite, got -1"),
    ({"sampling_ratio": "2"}, TypeError, "sampling_ratio must be an integer, got '2'"),
    ({"sampling_ratio": None}, TypeError, "sampling_ratio must be an integer, got None"),
    ({"aligned": "False"}, TypeError, "aligned must be True or False, got 'False'"),
    ({"aligned": None}, TypeError, "aligned must be True or False, got None"),
]


@pytest.mark.parametrize("wrong, error, message", REFUSED, ids=[message for _, _, message in REFUSED])
def test_wrong_options_of_roi_align(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ops.roi_align(MAP, BOXES, **({"output_size": 2} | wrong))


def test_roi_align_on_meta_tensors() -> None:
    input = MAP.to("meta").requires_grad_()
    pooled = ops.roi_align(input, BOXES.to("meta"), (4, 2))
    assert (pooled.device.type, pooled.shape, pooled.dtype) == ("meta", (2, 3, 4, 2), torch.float32)
    pooled.sum().backward()
    assert input.grad is not None and input.grad.shape == MAP.shape


def test_roi_align_in_torch_fx() -> None:
    module = ops.RoIAlign(np.int64(4), 0.5, 2, True, backend="reference")
    traced = torch.fx.symbolic_trace(module)
    assert torch.equal(traced(MAP, BOXES), module(MAP, BOXES))


class Pooler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.align = ops.RoIAlign((4, 2), 0.5, 2, True)

    def forward(self, input: Tensor, boxes: Tensor) -> Tensor:
        return self.align(input, boxes)


def test_scripting_takes_torchvisions_module() -> None:
    module = Pooler()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit, that it will go
        scripted = torch.jit.script(module)
    torch.testing.assert_close(scripted(MAP, BOXES), ops.roi_align(MAP, BOXES, (4, 2), 0.5, 2, True))


def test_most_samples_are_one_number() -> None:
    header = (ROOT / "csrc/roi_align.h").read_text()
    assert f"kMostSamples = {MAX_SAMPLES};" in header and f"at most {MAX_SAMPLES};" in (ops.roi_align.__doc__ or "")


# ---- nothing at all ----


@pytest.mark.parametrize("backend", available_backends("roi_align"))
@pytest.mark.parametrize("shape", [(1, 3, 0, 9), (1, 3, 9, 0), (0, 3, 4, 4), (2, 0, 4, 4), (0, 0, 0, 0)], ids=str)
def test_no_boxes_on_an_empty_map(shape: tuple[int, ...], backend: str) -> None:
    """The backward pass divided by the map's height, and the process was gone."""
    input = torch.zeros(shape, requires_grad=True)
    pooled = ops.roi_align(input, torch.zeros(0, 5), (2, 3), backend=backend)
    pooled.sum().backward()
    assert pooled.shape == (0, shape[1], 2, 3) and input.grad is not None and input.grad.shape == shape


def test_the_compiled_operator_checks_what_python_does_not_see() -> None:
    if "native" not in available_backends("roi_align"):
        pytest.skip("the compiled library is not here")
    op, backward = torch.ops.scrl_fast.roi_align, torch.ops.scrl_fast.roi_align_backward
    with pytest.raises(RuntimeError, match="a box must have bins"):
        op(MAP, BOXES, 1.0, 0, 2, -1, False)
    with pytest.raises(RuntimeError, match="a box must have bins"):
        backward(torch.zeros(2, 3, 0, 0), BOXES, 1.0, -1, False, list(MAP.shape), False)
    with pytest.raises(RuntimeError, match="whose product exceeds"):
        op(MAP, BOXES[:0], 1.0, 1 << 20, 1 << 20, -1, False)
    with pytest.raises(RuntimeError, match="without overlap"):
        overlapping = torch.zeros(1, 3, 5, 7).expand(2, 3, 5, 7)
        torch.ops.scrl_fast.roi_align_backward_out(torch.zeros(2, 3, 1, 1), BOXES, 1.0, -1, False, overlapping)


@pytest.mark.parametrize("backend", available_backends("two_view_loss"))
def test_no_rows_that_lie_with_gaps(backend: str) -> None:
    rows = torch.empty(0, 30)[:, ::2].requires_grad_()
    loss = ops.two_view_loss(rows, rows.detach(), backend=backend)
    loss.backward()
    assert loss.item() == 0 and rows.grad is not None and rows.grad.shape == (0, 15)
    assert ops.normalized_mse_loss(rows, rows, "none", backend=backend).shape == (0,)


# ---- sizes whose products wrap ----

WRAPPING = [  # offset, height, width
    (0, 1 << 62, 4),
    (0, 4, 1 << 62),
    (0, (1 << 63) - 1, 1),
    (0, 1 << 31, 1 << 31),
    (0, 0x5555555555555556, 1),  # three times this is 2 beyond 2^64
    ((1 << 63) - 1, 1, 1),
    (4090, 1, 3),
    (-1, 1, 1),
]


@pytest.mark.parametrize("backend", available_backends("augment_views"))
@pytest.mark.parametrize("offset, height, width", WRAPPING)
def test_images_outside_their_buffer(offset: int, height: int, width: int, backend: str) -> None:
    images = PackedImages(np.zeros(4096, np.uint8), *(np.array([n], np.int64) for n in (offset, height, width)))
    row = np.zeros(1, VIEW_DTYPE)
    row["h"], row["w"], row["y"], row["order"] = 1, 1, min(height, 2**31) - 1, [range(4)]
    for table in (row, row[:0]):
        with pytest.raises(ValueError, match="image 0 is empty or reaches outside the buffer"):
            augment_views(images, table, size=8, mean=(0, 0, 0), std=(1, 1, 1), backend=backend)


def test_the_compiled_views_check_rows_that_python_was_told_not_to() -> None:
    if "native" not in available_backends("augment_views"):
        pytest.skip("the compiled library is not here")
    images = PackedImages(np.zeros(300, np.uint8), *(np.array([n], np.int64) for n in (0, 10, 10)))
    options: dict[str, Any] = {"size": 4, "mean": (0, 0, 0), "std": (1, 1, 1), "checked": True, "backend": "native"}
    for wrong in (
        {"image": 1},
        {"image": -1},
        {"y": 5, "h": 6},
        {"x": 8, "w": 3},
        {"y": -1},
        {"h": 0},
        {"h": 2**31 - 1},
    ):
        row = np.zeros(1, VIEW_DTYPE)
        for name, value in ({"h": 2, "w": 2} | wrong).items():
            row[name] = value
        with pytest.raises(ValueError, match="table row 0: the crop lies outside its image"):
            augment_views(images, row, **options)


WRONG_VIEWS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"size": 8.0}, TypeError, "size must be an integer, got 8.0"),
    ({"size": 0}, ValueError, "size must lie in 1..16384, got 0"),
    ({"threads": 1 << 40}, ValueError, "threads must lie in 1..65536, got 1099511627776"),
    ({"threads": "2"}, TypeError, "threads must be an integer, got '2'"),
    ({"solarize_threshold": float("nan")}, ValueError, "solarize_threshold must be in [-inf, inf], got nan"),
    ({"solarize_threshold": "128"}, TypeError, "solarize_threshold must be a number, got '128'"),
]


@pytest.mark.parametrize("wrong, error, message", WRONG_VIEWS, ids=[message for _, _, message in WRONG_VIEWS])
def test_wrong_options_of_augment_views(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    images = PackedImages(np.zeros(0, np.uint8), *(np.zeros(0, np.int64) for _ in range(3)))
    with pytest.raises(error, match=re.escape(message)):
        augment_views(images, np.zeros(0, VIEW_DTYPE), **({"size": 8, "mean": (0, 0, 0), "std": (1, 1, 1)} | wrong))
    with pytest.raises(
        TypeError, match=re.escape("images.heights must be an int64 array [0], as offsets is, got float64")
    ):
        wrong_images = images._replace(heights=np.zeros(0))
        augment_views(wrong_images, np.zeros(0, VIEW_DTYPE), size=8, mean=(0, 0, 0), std=(1, 1, 1))


# ---- lists of tensors ----


@pytest.mark.parametrize("backend", available_backends("ema_update_"))
def test_parameters_of_modules_as_they_come(backend: str) -> None:
    target, source = nn.Linear(4, 3), nn.Linear(4, 3)
    exact = torch.lerp(source.weight, target.weight, 0.75).detach()
    ops.ema_update_(target.parameters(), source.parameters(), 0.75, backend=backend)
    torch.testing.assert_close(target.weight.detach(), exact)
    ops.ema_update_(source.parameters(), source.parameters(), np.float32(0.5), backend=backend)  # a source of its own
    grads, buffers = ([torch.zeros_like(p) for p in source.parameters()] for _ in range(2))
    ops.lars_step_(source.parameters(), iter(grads), iter(buffers), lr=np.float64(0.1), backend=backend)
    for wrong in (source.weight, dict(source.named_parameters()), "weights", 3):
        with pytest.raises(TypeError, match="targets must be a list of tensors, got"):
            ops.ema_update_(wrong, [source.weight], 0.5, backend=backend)  # type: ignore[arg-type]


def overlaps() -> list[tuple[str, list[Tensor], list[Tensor], str]]:
    """Of one memory of 8: targets, sources, and which two are named."""
    x, y = torch.zeros(8), torch.ones(8)
    return [
        ("twice", [x, x], [y, y], "targets[1] shares memory with targets[0]"),
        ("parts", [x[:5], x[4:7]], [y[:5], y[:3]], "targets[1] shares memory with targets[0]"),
        ("source behind", [x[:5]], [x[3:]], "sources[0] shares memory with targets[0]"),
        ("source before", [x[3:]], [x[:5]], "sources[0] shares memory with targets[0]"),
        ("source of another", [x[:4], x[4:]], [x[4:], y[:4]], "shares memory with targets[1]"),
        ("expanded", [x[:1].expand(8)], [y], "targets[0] overlaps itself"),
        ("windows", [x.as_strided((3, 4), (2, 1))], [y[:4].expand(3, 4)], "targets[0] overlaps itself"),
        ("columns", [x.view(4, 2)[:, 0], x[::4]], [y[:4], y[:2]], "targets[1] shares memory with targets[0]"),
        ("other dtype", [x[:4], x.view(torch.float16)[6:9]], [y[:4], y[:3].half()], "targets[1] shares memory with"),
    ]


@pytest.mark.parametrize("backend", available_backends("ema_update_"))
@pytest.mark.parametrize("case", range(len(overlaps())), ids=[case[0] for case in overlaps()])
def test_shared_memory_is_refused(case: int, backend: str) -> None:
    _, targets, sources, message = overlaps()[case]
    before = [t.clone() for t in targets]
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.ema_update_(targets, sources, 0.5, backend=backend)
    assert all(map(torch.equal, targets, before)), "memory was touched before the check"


@pytest.mark.parametrize("backend", available_backends("lars_step_"))
def test_shared_memory_is_refused_in_a_step(backend: str) -> None:
    x, y, z = torch.ones(8), torch.ones(8), torch.ones(8)
    for lists, message in [
        (([x, x], [y, y], [z[:4], z[4:]]), "shape"),
        (([x], [y], [x]), "momentum_buffers[0] shares memory with params[0]"),
        (([x], [x], [y]), "grads[0] shares memory with params[0]"),
        (([x[:4]], [y[:4]], [x[2:6]]), "momentum_buffers[0] shares memory with params[0]"),
        (
            ([x[:4], x[4:]], [y[:4], y[4:]], [z[:4], z[:4]]),
            "momentum_buffers[1] shares memory with momentum_buffers[0]",
        ),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            ops.lars_step_(*lists, lr=0.1, backend=backend)
    with pytest.raises(ValueError, match=re.escape("ema_targets[0] shares memory with params[0]")):
        ops.lars_step_([x], [y], [z], lr=0.1, ema_targets=[x], ema_momentum=0.5, backend=backend)
    assert (x == 1).all() and (z == 1).all()
    ops.lars_step_([x[:4], x[4:]], [y[:4], y[:4]], [z[:4], z[4:]], lr=0.1, backend=backend)  # a gradient twice is read


@pytest.mark.parametrize("backend", available_backends("ema_update_"))
def test_columns_of_one_matrix_are_apart(backend: str) -> None:
    matrix = torch.zeros(4, 2)
    ops.ema_update_([matrix[:, 0], matrix[:, 1]], [torch.ones(4), 2 * torch.ones(4)], 0.5, backend=backend)
    assert torch.equal(matrix, torch.tensor([[0.5, 1.0]]).expand(4, 2))


@pytest.mark.parametrize("backend", available_backends("ema_update_"))
def test_momentum_on_another_device_is_refused(backend: str) -> None:
    """On a GPU the kernel would read the other one's memory."""
    with pytest.raises(ValueError, match="momentum is on meta, targets on cpu"):
        ops.ema_update_([torch.zeros(3)], [torch.ones(3)], torch.ones((), device="meta"), backend=backend)


# ---- LARS ----


def stepped(optimizer: torch.optim.Optimizer, net: nn.Module) -> dict[str, Any]:
    net(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def test_state_of_another_optimizer_is_named() -> None:
    net = nn.Linear(4, 3)
    lars = LARS(net.parameters(), 0.1)
    sgd = stepped(torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), net)
    before = str(lars.state_dict())
    with pytest.raises(ValueError, match=r"param_groups\[0\] lacks trust_coefficient, eps, adapt, grad_scale"):
        lars.load_state_dict(sgd)
    own = stepped(LARS(net.parameters(), 0.1), net)
    group = own["param_groups"][0]
    adam = {"state": {0: {"step": 1, "exp_avg": torch.zeros(3, 4)}}, "param_groups": [group]}
    with pytest.raises(ValueError, match=r"not a state of LARS: state\[0\] holds step, exp_avg"):
        lars.load_state_dict(adam)
    with pytest.raises(ValueError, match=re.escape("state[1]['momentum_buffer'] is [4], the parameter [3]")):
        lars.load_state_dict({"state": {1: {"momentum_buffer": torch.zeros(4)}}, "param_groups": [group]})
    with pytest.raises(ValueError, match=re.escape("momentum must be in [0, inf], got -1")):
        lars.load_state_dict({"state": {}, "param_groups": [group | {"momentum": -1}]})
    with pytest.raises(ValueError, match="different number of parameter groups"):
        lars.load_state_dict({"state": {}, "param_groups": [group, group]})
    assert str(lars.state_dict()) == before, "a refused state changed the optimizer"
    lars.load_state_dict(own)
    assert torch.equal(lars.state_dict()["state"][0]["momentum_buffer"], own["state"][0]["momentum_buffer"])


def test_sparse_gradients_and_complex_parameters_are_named() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    lars = LARS(table.parameters(), 0.1)
    table(torch.tensor([1])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(TypeError, match=re.escape("grads[0] is sparse (torch.sparse_coo)")):
        lars.step()
    assert torch.equal(table.weight, before)
    with pytest.raises(TypeError, match=re.escape("params[0] has dtype torch.complex64: LARS takes torch.float32")):
        LARS([nn.Parameter(torch.zeros(3, dtype=torch.complex64))], 0.1)
    with pytest.raises(TypeError, match=re.escape("targets must be a list of tensors, got Tensor")):
        lars.attach_ema(torch.zeros(3), [torch.zeros(3)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape("sources[0] shares memory with targets[0]")):
        lars.attach_ema([table.weight.detach()], [table.weight])


def test_closures_and_generators() -> None:
    net, target = nn.Linear(4, 3), nn.Linear(4, 3)
    lars = LARS(net.parameters(), 0.1)
    lars.attach_ema(target.parameters(), net.parameters())

    def closure() -> float:
        lars.zero_grad()
        loss = net(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss.item()

    first = lars.step(closure, ema_momentum=0.5)
    assert lars.step(closure) < first


# ---- a torch that keeps other things to itself ----

WITHOUT = """
import torch
del torch._C._autograd._get_current_graph_task_keep_graph
from scrl_fast import ops
from scrl_fast.ops import _autograd
assert not _autograd.PRIVATE
x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
b = torch.tensor([[0, 1.0, 2, 9, 8], [1, 0, 0, 16, 12]], dtype=torch.float64)
rows, other = torch.randn(2, 6, 5, dtype=torch.float64)
calls = [
    (lambda x, backend: ops.roi_align(x, b, 2, 0.25, backend=backend), x),
    (lambda r, backend: ops.two_view_loss(r, other, backend=backend), rows),
    (lambda r, backend: ops.normalized_mse_loss(other, r, "sum", backend=backend), rows),
]
for call, leaf in calls:
    def scalar(x, backend):
        return (call(x, backend) * 3).sum()
    grads = []
    for backend in (None, "reference"):
        x = leaf.clone().requires_grad_()
        (grad,) = torch.autograd.grad(scalar(x, backend), x)
        grads += [grad, torch.func.grad(scalar)(leaf, backend)]
        grads.append(torch.func.jvp(lambda x: call(x, backend), (leaf,), (torch.ones_like(leaf),))[1].sum())
        grads.append(torch.func.vmap(lambda x: call(x, backend))(torch.stack([leaf, leaf])))
    for ours, theirs in zip(grads[:4], grads[4:]):
        torch.testing.assert_close(ours, theirs)
print("right")
"""


def test_without_private_symbols_of_torch() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.stdout.strip() == "right", done.stderr[-2000:]
