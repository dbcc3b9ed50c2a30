"""RoIAlign: pools each box of a feature map into a fixed grid of bins. A drop-in for torchvision's.

It is a linear and separable map, ``out[k] = wy[k] @ map @ wx[k].T`` with a few non-zero weights on each axis. Every
form here computes the weights once a box and axis; the backward pass gathers instead of scattering, so that the same
inputs give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from scrl_fast.ops import _native
from scrl_fast.ops._autograd import below_autograd, differentiated_otherwise, transformed
from scrl_fast.ops._roi_align_arguments import (
    box_rows,
    check_arguments,
    check_image_index,
    check_options,
    check_result,
    check_sampling_ratio,
)
from scrl_fast.ops._triton import define_triton
from scrl_fast.ops.backends import Backend, Operation, register
from scrl_fast.ops.onnx_translation import is_exporting, register_symbolics, roi_align_for_export

_LARGEST_GATHER = 1 << 24  # elements of the map that the reference copies at once


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Average of bilinear samples in each bin of each box: ``[K, C, pooled_height, pooled_width]`` in input's dtype.

    input: map ``[N, C, H, W]``; float32, float64, bfloat16 or float16, accumulated in float32 or wider, never cast by
        autocast. NCHW and channels_last are read as they lie, other layouts are copied.
    boxes: ``[K, 5]`` rows (image index, x0, y0, x1, y1) in units of input cells / spatial_scale, or one ``[L, 4]`` an
        image. Any order and any float dtype: read as float64 for a float64 map, else as float32. No gradient.
    output_size: bins (height, width), or one number for both. spatial_scale: map cells per unit of the boxes.
    sampling_ratio: samples a bin and axis, at most 4096; 0 or less takes ceil(bin size), in cells.
    aligned: False clamps boxes to at least one cell; True shifts by half a cell and clamps nothing. There bins of size
        0 (a box without width or height) take no sample where sampling_ratio adapts, ceil(0), and give zeros; a fixed
        one samples one spot that often. So does torchvision.
    A box with a non-finite edge gives a row of NaN and no gradient. So does an image index outside the batch on a GPU,
    where looking at it would wait for the device; on a CPU it raises.
    The gradient has input's layout and can be differentiated again. Where inf or NaN comes in for a box, it may spread
    to cells of the box's image that the box does not read.
    torch.func.grad, vjp and jvp and forward mode take `roi_align_reference`. torch.compile, torch.export, torch.fx and
    meta tensors are taken; torch.jit.script takes the module `RoIAlign`, not this function.
    Raises TypeError or ValueError naming the argument before memory is touched.
    Source: Mask R-CNN, arXiv 1703.06870, section 3; semantics of torchvision.ops.roi_align.
    """
    if not isinstance(input, Tensor) and has_torch_function((input,)):  # torch.fx
        plain = check_options(output_size, spatial_scale, sampling_ratio, aligned)
        return handle_torch_function(roi_align, (input,), input, boxes, *plain, backend=backend)
    size, *rest = check_arguments(input, output_size, spatial_scale, sampling_ratio, aligned)
    options: list[Any] = rest
    rows = box_rows(input, boxes)
    check_result(input, rows, size)
    if input.device.type == "meta":
        return _on_meta(input, rows, size, *options)
    if torch.compiler.is_exporting() and is_exporting():
        return roi_align_for_export(input, rows, size, *options)
    return _OPERATION.resolve(input.device.type, backend)(input, rows, size, *options)


class RoIAlign(nn.Module):
    """`roi_align` with its options fixed, as torchvision.ops.RoIAlign, which torch.jit.script puts in its place."""

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float = 1.0,
        sampling_ratio: int = -1,
        aligned: bool = False,
        *,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.backend = backend

    def forward(self, input: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
        return roi_align(
            input,
            boxes,
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
            backend=self.backend,
        )

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles instead: it knows no backends."""
        from torchvision.ops import RoIAlign as Scriptable

        size, scale, ratio, aligned = check_options(
            self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned
        )
        return Scriptable(size, scale, ratio, aligned)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )


# ---- plain PyTorch ----


def roi_align_reference(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """`roi_align` in plain PyTorch, differentiable; waits for the device once. Not for maps that hold inf or NaN."""
    size, spatial_scale, sampling_ratio, aligned = check_arguments(
        input, output_size, spatial_scale, sampling_ratio, aligned
    )
    rows = box_rows(input, boxes)
    check_image_index(rows, input.shape[0])
    count, channels = rows.shape[0], input.shape[1]
    if count == 0 or channels == 0:
        return input.sum() * 0 + input.new_zeros(count, channels, *size)
    image, x0, y0, x1, y1 = rows.detach().unbind(1)
    fine = rows[:, 1:].isfinite().all(1) & (image >= 0) & (image < input.shape[0])
    wy, fine_y = _axis_weights(y0, y1, size[0], input.shape[2], spatial_scale, sampling_ratio, aligned)
    wx, fine_x = _axis_weights(x0, x1, size[1], input.shape[3], spatial_scale, sampling_ratio, aligned)
    fine = fine & fine_y & fine_x
    index = torch.where(fine, image, 0).long()
    step = max(1, _LARGEST_GATHER // input[0].numel())
    pooled = []
    for chunk in (slice(start, start + step) for start in range(0, count, step)):
        maps = input.index_select(0, index[chunk]).to(rows.dtype)  # [k, C, H, W]
        with torch.autocast(input.device.type, enabled=False):
            pooled.append((wy[chunk, None] @ maps @ wx[chunk, None].mT).to(input.dtype))
    return torch.where(fine[:, None, None, None], torch.cat(pooled), math.nan)


def _reference(input: Tensor, rows: Tensor, size: tuple[int, int], *options: Any) -> Tensor:
    if torch.jit.is_tracing() and is_exporting():  # its loops would be those of the boxes at hand
        return roi_align_for_export(input, rows, size, *options)
    return roi_align_reference(input, rows, size, *options)


def _axis_weights(
    low: Tensor, high: Tensor, bins: int, size: int, scale: float, sampling_ratio: int, aligned: bool
) -> tuple[Tensor, Tensor]:
    """Weights ``[K, bins, size]`` of one axis, zero for a box that cannot be sampled, and which boxes can ``[K]``."""
    offset = 0.5 if aligned else 0.0
    start = low * scale - offset
    extent = (high * scale - offset) - start
    fine = start.isfinite() & extent.isfinite()
    start, extent = torch.where(fine, start, 0), torch.where(fine, extent, 0)
    if not aligned:
        extent = extent.clamp(min=1)
    bin_size = (extent / bins)[:, None]
    samples = torch.full_like(bin_size, sampling_ratio) if sampling_ratio > 0 else bin_size.ceil()
    first = start[:, None] + torch.arange(bins, device=low.device) * bin_size  # [K, bins]
    # A bin may be far larger than the map: of its samples, at most two a cell apart, only those near the map are made.
    near = torch.where((samples > 64) & (bin_size > 0), (-1 - first) * samples / bin_size - 3, 0).clamp(min=0).floor()
    most = int(samples.max()) if sampling_ratio > 0 else int(samples.max().clamp(0, 2 * size + 64))
    i = near[..., None] + torch.arange(most, device=low.device)  # [K, bins, most]
    samples, bin_size = samples[..., None], bin_size[..., None]
    position = first[..., None] + (i + 0.5) * bin_size / samples
    kept = (i < samples) & (position >= -1) & (position <= size) & fine[:, None, None]
    position = torch.where(kept, position, 0).clamp(0, size - 1)
    cell = position.long()
    fraction = position - cell
    share = torch.where(kept, 1 / samples, 0)
    weights = low.new_zeros(low.shape[0], bins, size)
    weights.scatter_add_(2, cell, share * (1 - fraction))
    return weights.scatter_add_(2, (cell + 1).clamp(max=size - 1), share * fraction), fine


# ---- compiled forms ----


def _on_meta(input: Tensor, rows: Tensor, size: tuple[int, int], *options: Any) -> Tensor:
    return torch.ops.scrl_fast.roi_align_triton(input, rows, options[0], *size, *options[1:])  # by its fake


def _dispatch_to(name: str) -> Callable[..., Tensor]:
    """The implementation of `roi_align` that calls torch.ops.scrl_fast.<name>."""

    def run(input: Tensor, rows: Tensor, size: tuple[int, int], *options: Any) -> Tensor:
        scale, sampling_ratio, aligned = options
        if differentiated_otherwise(input):
            return roi_align_reference(input, rows, size, scale, sampling_ratio, aligned)
        operator = getattr(torch.ops.scrl_fast, name).default
        arguments = (input, rows, scale, *size, sampling_ratio, aligned)
        if torch.compiler.is_compiling() or transformed(input, rows):
            return operator(*arguments)
        if torch.jit.is_tracing():
            register_symbolics()  # for torch.onnx.export, which traces
            return operator(*arguments)
        try:
            if input.requires_grad and torch.is_grad_enabled():
                return _Eager.apply(*arguments, operator, getattr(torch.ops.scrl_fast, f"{name}_backward").default)
            return _below_autograd(operator, *arguments)
        except RuntimeError as error:  # looking at the indices here as well would cost more than a small call
            if "has image index" not in str(error):
                raise
        check_image_index(rows, input.shape[0])
        raise AssertionError("the kernel refused an image index that is inside the batch")

    return run


class _Eager(torch.autograd.Function):
    """The operator's own autograd formula with less around it. Compilers and torch.func.vmap take the operator's."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *inputs, operator, ctx.backward_operator = arguments
        _save(ctx, tuple(inputs), None)
        return _below_autograd(operator, *inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call = ctx.backward_operator if torch.is_grad_enabled() else partial(_below_autograd, ctx.backward_operator)
        return call(grad, *ctx.saved_tensors, *ctx.options), *[None] * 8


def _below_autograd(operator: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Without asking the operator for its autograd formula, which takes 5 of a small call's 17 microseconds."""
    with below_autograd():
        return operator(*arguments)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None) -> None:
    input, boxes, scale, _, _, sampling_ratio, aligned = inputs
    ctx.save_for_backward(boxes)
    channels_last = input.stride(1) == 1 and not input.is_contiguous()
    ctx.options = (scale, sampling_ratio, aligned, input.shape, channels_last)


def _fake(
    input: Tensor,
    boxes: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    return input.new_empty((boxes.shape[0], input.shape[1], pooled_height, pooled_width))


def _fake_backward(
    grad: Tensor,
    boxes: Tensor,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    size: Sequence[int],
    channels_last: bool,
) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=layout)


def _register_autograd(name: str) -> None:
    """Autograd of ``scrl_fast::<name>`` and ``scrl_fast::<name>_backward``.

    The backward pass is linear in its gradient, and its own derivative is the forward pass again.
    """
    forward = getattr(torch.ops.scrl_fast, name).default
    backward = getattr(torch.ops.scrl_fast, f"{name}_backward").default

    def save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, boxes, scale, sampling_ratio, aligned, _, _ = inputs
        ctx.save_for_backward(boxes)
        ctx.options = (scale, grad.shape[2], grad.shape[3], sampling_ratio, aligned)

    torch.library.register_autograd(
        f"scrl_fast::{name}",
        lambda ctx, grad: (backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 6),
        setup_context=_save,
    )
    torch.library.register_autograd(
        f"scrl_fast::{name}_backward",
        lambda ctx, grad: (forward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 6),
        setup_context=save_backward,
    )


def _triton(input: Tensor, boxes: Tensor, *options: Any) -> Tensor:
    import scrl_fast.kernels.roi_align as kernels  # imports triton, only when it runs

    check_image_index(boxes, input.shape[0])
    check_sampling_ratio(options[3])
    return kernels.roi_align(input, boxes, *options)


def _triton_backward(grad: Tensor, *options: Any) -> Tensor:
    import scrl_fast.kernels.roi_align as kernels

    check_sampling_ratio(options[2])
    return kernels.roi_align_backward(grad, *options)


define_triton("roi_align_triton", _fake, _triton)
define_triton("roi_align_triton_backward", _fake_backward, _triton_backward)
_register_autograd("roi_align_triton")
if not _native.load_failure("_ops"):
    torch.library.register_fake("scrl_fast::roi_align", _fake)
    torch.library.register_fake("scrl_fast::roi_align_backward", _fake_backward)
    _register_autograd("roi_align")

_OPERATION = register(
    Operation(
        "roi_align",
        reference=_reference,
        native=_dispatch_to("roi_align"),
        native_failure=lambda device_type: _native.op_failure("roi_align", device_type),
        triton=_dispatch_to("roi_align_triton"),
    )
)
