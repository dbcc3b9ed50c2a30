"""Every operation over odd tensors, forward and backward, against float64: 20,000 calls in one process.

A process that dies, memory written beside a tensor, and an error that is none of ours fail alike. SCRL_FAST_FUZZ_CALLS
sets the number of calls of all operations together (these take a minute of one core), SCRL_FAST_FUZZ_FIRST the number
of the first: each call depends on its number only, which a failure names.
"""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import available_backends, guarded, num_threads
from odd_tensors import LAYOUTS, WRITABLE, odd_tensor
from torch import Tensor

from scrl_fast import ops
from scrl_fast.ops.augment_views import augment_views
from scrl_fast.ops.lars_step import lars_step_
from scrl_fast.ops.view_table import RESIZE_BLUR, VIEW_DTYPE, PackedImages

CALLS = int(os.environ.get("SCRL_FAST_FUZZ_CALLS", "20000"))
FIRST = int(os.environ.get("SCRL_FAST_FUZZ_FIRST", "0"))
TRITON_EVERY = 200  # its interpreter takes 10 to 100 ms a call
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
REFUSED = re.compile("overlaps itself|shares memory")
SIZES = (0, 1, 1, 2, 3, 5, 8, 17, 33)


def agree(ours: Tensor, exact: Tensor, terms: float, what: str, largest: float = 1.0) -> None:
    """terms: roundings that may have added up, of the largest number; largest: one that went in on the way."""
    assert ours.shape == exact.shape, f"{what}: shape {list(ours.shape)}, expected {list(exact.shape)}"
    if not exact.numel():
        return
    assert torch.equal(ours.isnan(), exact.isnan()), f"{what}: NaN elsewhere"
    difference = (ours.double() - exact.double()).nan_to_num(0).abs().max().item()
    largest = max(exact.double().nan_to_num(0).abs().max().item(), largest)
    assert difference <= terms * torch.finfo(ours.dtype).eps * largest, f"{what}: off by {difference}"


def backend_of(operation: str, draw: random.Random, call: int) -> str:
    found = available_backends(operation)
    if "triton" in found:
        if call % TRITON_EVERY == 0:
            return "triton"
        found.remove("triton")
    return draw.choices(found, [4, 1][: len(found)])[0]


# ---- RoIAlign ----


def some_boxes(draw: random.Random, count: int, images: int, extent: float, thirds: float) -> Tensor:
    """On quarters, so that every sample's place is exact in float32 too: one on the map's border, -1, must not be
    inside in one precision and outside in the other. thirds: for three bins, the least extent of boxes; else 0.
    """
    step = 3 if thirds else 1
    rows = torch.empty(count, 5)
    for k in range(count):
        low = [draw.randint(-8, int(4 * extent) + 4) / 4 for _ in range(2)]
        sides = [step * draw.choice((0, 0.25, 1, 2.5, draw.randint(0, int(8 * extent)) / 4)) for _ in low]
        high = [edge + max(side, thirds) for edge, side in zip(low, sides, strict=True)]
        rows[k] = torch.tensor([draw.randrange(images), *low, *high])
        if draw.random() < 0.05:
            rows[k, draw.randint(1, 4)] = draw.choice((math.nan, math.inf, -math.inf))
    return rows


def fuzz_roi_align(draw: random.Random, call: int) -> None:
    backend, dtype = backend_of("roi_align", draw, call), draw.choice(DTYPES)
    shape = [draw.choice((0, 1, 2, 3)), draw.choice((*SIZES, 70)), *(draw.choice((0, 1, 2, 5, 7, 9)) for _ in range(2))]
    input = odd_tensor(draw, shape, dtype).requires_grad_()
    count = draw.choice((0, 1, 3, 6)) if shape[0] else 0
    scale, size = draw.choice((1.0, 0.5, 0.25)), (draw.choice((1, 1, 2, 4)), draw.choice((1, 1, 2, 3)))
    boxes = some_boxes(draw, count, shape[0], max(shape[2:]) / scale, 3 / scale if size[1] == 3 else 0)
    boxes = boxes.to(dtype if dtype.itemsize > 2 else torch.float32)
    boxes = boxes.repeat(1, 2)[:, :5] if draw.random() < 0.3 else boxes
    options = (size, scale, draw.choice((-1, 1, 2, 4)), draw.random() < 0.5)
    if count and not shape[2] * shape[3]:
        with pytest.raises(ValueError, match="input has no cells to sample"):
            ops.roi_align(input, boxes, *options, backend=backend)
        return
    wide = input.detach().double().requires_grad_()
    ours = ops.roi_align(input, boxes, *options, backend=backend)
    exact = ops.roi_align_reference(wide, boxes, *options)
    agree(ours, exact, 16, "output")
    cotangent = odd_tensor(draw, list(ours.shape), dtype)
    (grad,) = torch.autograd.grad(ours, input, cotangent)
    (exact_grad,) = torch.autograd.grad(exact, wide, cotangent.double())
    agree(grad, exact_grad, 64, "gradient")


# ---- losses ----


def fuzz_losses(draw: random.Random, call: int) -> None:
    two_views, dtype = draw.random() < 0.5, draw.choice(DTYPES)
    rows = draw.choice(SIZES)
    shape = [2 * rows] if two_views else draw.choice(([rows], [draw.choice(SIZES), rows], []))
    shape = [*shape, draw.choice((*SIZES, 64, 100))]
    pair = [odd_tensor(draw, shape, dtype) for _ in range(2)]
    wanted = [draw.random() < 0.7 for _ in pair]
    for tensor, with_grad in zip(pair, wanted, strict=True):
        tensor.requires_grad_(with_grad)
    wide = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in pair]
    if two_views:
        backend = backend_of("two_view_loss", draw, call)
        ours, exact = ops.two_view_loss(*pair, backend=backend), ops.two_view_loss(*wide, backend="reference")
    else:
        backend, reduction = backend_of("normalized_mse_loss", draw, call), draw.choice(("none", "sum", "mean"))
        ours = ops.normalized_mse_loss(*pair, reduction, backend=backend)
        exact = ops.normalized_mse_loss(*wide, reduction, backend="reference")
    agree(ours, exact, 64, "loss")
    leaves = [tensor for tensor in pair if tensor.requires_grad]
    if leaves:
        cotangent = odd_tensor(draw, list(ours.shape), ours.dtype)
        grads = torch.autograd.grad(ours, leaves, cotangent)
        exact_grads = torch.autograd.grad(exact, [t for t in wide if t.requires_grad], cotangent.double())
        shortest = min((t.norm(dim=-1).min().item() for t in wide if t.numel()), default=1.0)
        largest = 4 * cotangent.double().abs().sum().item() / shortest
        for grad, exact_grad in zip(grads, exact_grads, strict=True):
            agree(grad, exact_grad, 64, "gradient", largest)


# ---- lists of tensors ----


def draw_shape(draw: random.Random) -> list[int]:
    return [draw.choice(SIZES) for _ in range(draw.randint(0, 3))]


def spoiled(draw: random.Random, written: list[Tensor], read: list[Tensor]) -> bool:
    """Now and then makes a tensor that is written overlap itself or another; whether it did."""
    places = [i for i, tensor in enumerate(written) if tensor.numel() > 1 and tensor.dim()]
    if draw.random() > 0.15 or not places:
        return False
    i = draw.choice(places)
    how = draw.choice(("expanded", "twice", "shifted"))
    if how == "expanded":
        written[i] = written[i].flatten()[:1].expand(written[i].shape)
    elif how == "twice":
        written.append(written[i])
        read.append(read[i])
    else:
        flat = torch.zeros(written[i].numel() + 1, dtype=written[i].dtype)
        written[i], read[i] = flat[1:].view(written[i].shape), flat[:-1].view(written[i].shape)
    return True


def fuzz_ema_update(draw: random.Random, call: int) -> None:
    backend = backend_of("ema_update_", draw, call)
    shapes = [(draw_shape(draw), draw.choice(DTYPES)) for _ in range(draw.randint(0, 4))]
    targets = [odd_tensor(draw, shape, dtype, WRITABLE) for shape, dtype in shapes]
    sources = [odd_tensor(draw, shape, dtype) for shape, dtype in shapes]
    number = draw.choice((0.0, 0.25, 0.9, 1.0))
    momentum = torch.tensor(number, dtype=draw.choice((torch.float32, torch.float64))) if call % 3 else number
    if spoiled(draw, targets, sources):
        before = [target.clone() for target in targets]
        with pytest.raises(ValueError, match=REFUSED):
            ops.ema_update_(targets, sources, momentum, backend=backend)
        assert all(map(torch.equal, targets, before)), "memory was touched before the check"
        return
    exact = [torch.lerp(s.double(), t.double(), float(momentum)) for t, s in zip(targets, sources, strict=True)]
    with guarded(*targets) as targets:
        ops.ema_update_(iter(targets), sources, momentum, backend=backend)
    for target, value in zip(targets, exact, strict=True):
        agree(target, value, 4, "target")


def fuzz_lars_step(draw: random.Random, call: int) -> None:
    backend = backend_of("lars_step_", draw, call)
    shapes = [(draw_shape(draw), draw.choice(DTYPES)) for _ in range(draw.randint(0, 4))]
    params, buffers, targets = ([odd_tensor(draw, s, d, WRITABLE) for s, d in shapes] for _ in range(3))
    grads = [odd_tensor(draw, s, d) for s, d in shapes]
    options: dict[str, Any] = {
        "lr": draw.choice((0.0, 0.1)),
        "momentum": draw.choice((0.0, 0.9)),
        "weight_decay": draw.choice((0.0, 0.1)),
        "trust_coefficient": 0.5,
        "adapt": [draw.random() < 0.7 for _ in shapes],
        "ema_momentum": 0.75,
    }
    if spoiled(draw, params, grads):
        extra = len(params) - len(buffers)
        buffers, targets = (
            [*t, *(torch.zeros_like(p) for p in params[-extra:])] if extra else t for t in (buffers, targets)
        )
        options["adapt"] = True
        with pytest.raises(ValueError, match=REFUSED):
            lars_step_(params, grads, buffers, ema_targets=targets, backend=backend, **options)
        return
    wide = [[t.to(torch.float64, copy=True) for t in tensors] for tensors in (params, grads, buffers, targets)]
    lars_step_(*wide[:3], ema_targets=wide[3], backend="reference", **options)
    with guarded(*params, *buffers, *targets) as written:
        count = len(params)
        params, buffers, targets = written[:count], written[count : 2 * count], written[2 * count :]
        lars_step_(params, iter(grads), buffers, ema_targets=targets, backend=backend, **options)
    for name, ours, exact in (("param", params, wide[0]), ("buffer", buffers, wide[2]), ("target", targets, wide[3])):
        for tensor, value in zip(ours, exact, strict=True):
            # PyTorch's norm of a strided tensor adds one by one
            summed = tensor.numel() / 16 if tensor.dtype == torch.float64 else 0
            agree(tensor, value, 16 + summed, name)


# ---- the data's side ----


def fuzz_augment_views(draw: random.Random, call: int) -> None:
    """Within two levels of Pillow's, whose order of passes depends on the sizes, or four after a blur, which resizes
    twice more; of pixels that no filter clips."""
    backend = "native" if "native" in available_backends("augment_views") else "reference"
    count, size = draw.randint(0, 3), draw.choice((1, 2, 7, 8, 33))
    sides = np.array([[draw.randint(1, 40), draw.randint(1, 40)] for _ in range(count)], np.int64).reshape(-1, 2)
    lengths = sides.prod(axis=1) * 3
    buffer = np.frombuffer(draw.randbytes(int(lengths.sum()) + draw.randint(0, 2)), np.uint8) % 64 + 96
    table = np.zeros(draw.randint(0, 3) if count else 0, VIEW_DTYPE)
    table["order"] = range(4)
    for row in table:
        row["image"] = image = draw.randrange(count)
        row["h"], row["w"] = (draw.randint(1, int(side)) for side in sides[image])
        row["y"], row["x"] = (draw.randint(0, int(s) - row[n]) for s, n in zip(sides[image], ("h", "w"), strict=True))
        row["flip"] = draw.random() < 0.5
        if draw.random() < 0.3:
            row["blur"], row["blur_amount"] = RESIZE_BLUR, draw.choice((1.0, 1.5, 60.0))
    images = PackedImages(buffer, np.cumsum(lengths) - lengths, sides[:, 0].copy(), sides[:, 1].copy())
    options: dict[str, Any] = {"size": size, "mean": (0, 0, 0), "std": (1, 1, 1), "dtype": torch.uint8}
    if count and draw.random() < 0.2:  # sizes that no buffer holds, some of whose products wrap to small numbers
        wrong = getattr(images, draw.choice(("heights", "widths", "offsets")))
        wrong[draw.randrange(count)] = draw.choice((-1, 1 << 31, 1 << 62, (1 << 63) - 1, (1 << 62) // 3 + 1))
        with pytest.raises(ValueError, match="is empty or reaches outside the buffer"):
            augment_views(images, table, backend=backend, **options)
        return
    spaced = torch.zeros(2 * len(table), 3, size, size, dtype=torch.uint8)
    if draw.random() < 0.5:
        spaced = spaced.contiguous(memory_format=torch.channels_last)
    made = augment_views(images, table, backend=backend, out=spaced[::2], **options)
    exact = augment_views(images, table, backend="reference", **options)
    allowed = torch.where(torch.from_numpy(table["blur"] != 0), 4, 2)
    assert ((made.int() - exact.int()).abs().flatten(1) <= allowed[:, None]).all()
    assert not spaced[1::2].any(), "a view beside was written"


def odd_integers(draw: random.Random, rows: np.ndarray) -> np.ndarray | Tensor:
    how = draw.choice(("dense", "permuted", "gaps", "int32", "tensor"))
    if how == "permuted":
        return np.asfortranarray(rows)
    if how == "gaps":
        return np.repeat(rows, 2, axis=0)[::2]
    return rows.astype(np.int32) if how == "int32" else torch.from_numpy(rows) if how == "tensor" else rows


def fuzz_box_pairs(draw: random.Random, call: int) -> None:
    """Bit for bit."""
    count, limit = draw.choice((0, 1, 2, 3)), draw.choice((8, 64, 1 << 20))
    crops = []
    for _ in range(2):
        rows = [[draw.randrange(4), draw.randrange(4), *(draw.randrange(1, limit) for _ in "hw"), draw.randrange(2)]
                for _ in range(count)]  # fmt: skip
        crops.append(np.array(rows, np.int64).reshape(-1, 5))
    state = draw.getstate()
    kinds = []
    for rows in crops:
        draw.setstate(state)  # both of one kind
        kinds.append(odd_integers(draw, rows))
    options: dict[str, Any] = {
        "view_size": draw.choice((32, 96)), "min_size": draw.choice((1, 8, 32)), "boxes_per_image": draw.randint(1, 4),
        "iou_threshold": draw.choice((0.3, 1.0)), "grid": draw.random() < 0.5, "jitter": draw.choice((0.0, 0.2)),
    }  # fmt: skip
    seed = draw.getrandbits(64)
    sample: list[Callable[..., Any]] = [
        lambda *crops, backend: ops.sample_box_pairs(*crops, **options, seed=seed, step=call, backend=backend),
        lambda *crops, backend: ops.sample_box_pairs_replay(
            *crops, **options, random_state=np.random.RandomState(seed % (1 << 32)), backend=backend
        ),
    ]
    name = ("sample_box_pairs", "sample_box_pairs_replay")[call % 2]
    backend = "native" if "native" in available_backends(name) else "reference"
    made = sample[call % 2](*kinds, backend=backend)
    exact = sample[call % 2](*crops, backend="reference")
    for ours, theirs in zip(made, exact, strict=True):
        assert np.array_equal(np.asarray(ours), theirs)


SHARES = {
    fuzz_roi_align: 0.3,
    fuzz_losses: 0.25,
    fuzz_ema_update: 0.2,
    fuzz_lars_step: 0.13,
    fuzz_augment_views: 0.06,
    fuzz_box_pairs: 0.06,
}


@pytest.mark.parametrize("fuzz", SHARES, ids=lambda fuzz: fuzz.__name__)
def test_odd_tensors(fuzz: Callable[[random.Random, int], None]) -> None:
    assert set(WRITABLE) < set(LAYOUTS)
    for call in range(FIRST, FIRST + math.ceil(CALLS * SHARES[fuzz])):
        try:
            with num_threads(3 if call % 16 == 0 else 1):  # the calls are small
                fuzz(random.Random(f"{fuzz.__name__} {call}"), call)
        except BaseException:
            print(f"{fuzz.__name__}: call {call}; repeat it with SCRL_FAST_FUZZ_FIRST={call} SCRL_FAST_FUZZ_CALLS=1")
            raise
