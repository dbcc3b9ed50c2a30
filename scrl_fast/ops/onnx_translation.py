"""RoIAlign in ONNX: ``scrl_fast::roi_align`` becomes the standard's operator RoiAlign.

``torch.onnx.export`` of a model that calls `roi_align` needs nothing of this, with either exporter. A program that
``torch.export`` made before takes `onnx_translation_table`.
ONNX's operator knows float and double; half precision is computed in float and rounded once, as in our own kernels. It
leaves open what a box with a non-finite edge gives.
"""

from __future__ import annotations

import functools
import struct
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OPERATORS = ("roi_align", "roi_align_triton")
_FIRST_OPSET, _ALIGNED_OPSET = 10, 16  # of the operator, and of its half-pixel shift
_EXPORTED_OPSET = 18  # the lowest of torch.export's exporter


def onnx_translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What ``torch.onnx.export(program, ..., custom_translation_table=...)`` needs to know of our operators.

    For a program that torch.export made. Needs onnxscript, as the exporter does. A call that ONNX cannot express ends
    the export with an error naming the argument and its value.
    """
    from onnxscript import DOUBLE, FLOAT, INT64
    from onnxscript import opset18 as opset

    op: Any = opset

    def roi_align(
        input: Any,
        boxes: Any,
        spatial_scale: float,
        pooled_height: int,
        pooled_width: int,
        sampling_ratio: int,
        aligned: bool,
    ) -> Any:
        kind = DOUBLE.dtype if input.dtype == DOUBLE.dtype else FLOAT.dtype
        check_scale(spatial_scale, double=kind == DOUBLE.dtype)
        size = (pooled_height, pooled_width)
        corners = op.Slice(boxes, [1], [5], [1])
        pooled = op.RoiAlign(
            input if input.dtype == kind else op.Cast(input, to=kind),
            corners if boxes.dtype == kind else op.Cast(corners, to=kind),
            op.Cast(op.Squeeze(op.Slice(boxes, [0], [1], [1]), [1]), to=INT64.dtype),
            **onnx_attributes(size, spatial_scale, sampling_ratio, aligned, opset=_EXPORTED_OPSET),
        )
        return pooled if input.dtype == kind else op.CastLike(pooled, input)

    operators = [getattr(torch.ops.scrl_fast, name, None) for name in OPERATORS]
    return {operator.default: roi_align for operator in operators if operator is not None}


def onnx_attributes(
    size: tuple[int, int], spatial_scale: float, sampling_ratio: int, aligned: bool, *, opset: int
) -> dict[str, Any]:
    """Attributes of ONNX's RoiAlign. Raises ValueError naming the argument that the opset cannot express."""
    if opset < _FIRST_OPSET:
        raise ValueError(f"roi_align needs ONNX's opset {_FIRST_OPSET} or later: opset_version must not be below")
    if aligned and opset < _ALIGNED_OPSET:
        raise ValueError(f"roi_align with aligned=True needs ONNX's opset {_ALIGNED_OPSET} or later as opset_version")
    mode = {"coordinate_transformation_mode": "half_pixel" if aligned else "output_half_pixel"}
    return {
        **(mode if opset >= _ALIGNED_OPSET else {}),  # before, it was output_half_pixel
        "mode": "avg",
        "output_height": size[0],
        "output_width": size[1],
        "sampling_ratio": max(sampling_ratio, 0),  # 0 adapts
        "spatial_scale": float(spatial_scale),
    }


def check_scale(spatial_scale: float, *, double: bool) -> None:
    """Raise ValueError for the scale of a float64 map that ONNX, which holds it in 32 bits, would change."""
    (kept,) = struct.unpack("f", struct.pack("f", spatial_scale))
    if double and kept != spatial_scale:
        raise ValueError(
            f"roi_align with spatial_scale={spatial_scale} of a float64 map: ONNX holds it in 32 bits, as {kept}; "
            "multiply the boxes by it, with spatial_scale=1"
        )


def is_exporting() -> bool:
    """Whether torch.onnx.export is at work; asked only while something is exported."""
    import torch.onnx

    return torch.onnx.is_in_onnx_export()


def roi_align_for_export(
    input: Tensor, rows: Tensor, size: tuple[int, int], spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    """`roi_align` in operators that torch's exporter knows: torchvision's, or ONNX's own where that is not imported.

    The exporter has listed the operators before it calls this, so it would not find those of a later import.
    """
    kind = torch.float64 if input.dtype == torch.float64 else torch.float32
    features, image, corners = input.to(kind), rows[:, :1].to(kind), rows[:, 1:].to(kind)
    if kind == torch.float64:  # attributes have 32 bits, and so have numbers that the exporter finds in the code
        corners, spatial_scale = corners * torch.tensor(spatial_scale, dtype=kind, device=corners.device), 1.0
    if torch.jit.is_tracing():  # that exporter looks for operators afterwards
        import torchvision.ops  # noqa: F401
    if "torchvision" in sys.modules:  # computes when the exported program is run, to verify it
        rows = torch.cat([image, corners], 1)
        pooled = torch.ops.torchvision.roi_align(features, rows, spatial_scale, *size, max(sampling_ratio, 0), aligned)
    else:
        pooled = torch.onnx.ops.symbolic(
            "RoiAlign",
            (features, corners, image[:, 0].long()),
            onnx_attributes(size, spatial_scale, sampling_ratio, aligned, opset=_EXPORTED_OPSET),
            dtype=kind,
            shape=(rows.shape[0], input.shape[1], *size),
            version=_ALIGNED_OPSET,
        )
    return pooled.to(input.dtype)


@functools.cache
def register_symbolics() -> None:
    """Tells torch.onnx.export(dynamo=False) of our operators, once."""
    import torch.onnx

    for opset in (_FIRST_OPSET - 1, _FIRST_OPSET, _ALIGNED_OPSET):  # each serves those from it up to the next
        for name in OPERATORS:
            torch.onnx.register_custom_op_symbolic(f"scrl_fast::{name}", _symbolic_of(opset), opset)


def _symbolic_of(opset: int) -> Callable[..., Any]:
    """The nodes of one call, for the exporter that traces with TorchScript."""
    from torch.onnx import TensorProtoDataType as Kind
    from torch.onnx.symbolic_helper import parse_args

    @parse_args("v", "v", "f", "i", "i", "i", "b")
    def symbolic(
        graph: Any, input: Any, boxes: Any, scale: float, height: int, width: int, ratio: int, aligned: bool
    ) -> Any:
        own = input.type().dtype()
        wide = Kind.DOUBLE if own == torch.float64 else Kind.FLOAT
        check_scale(scale, double=own == torch.float64)
        attributes = onnx_attributes((height, width), scale, ratio, bool(aligned), opset=opset)
        constant = lambda value: graph.op("Constant", value_t=torch.tensor(value))  # noqa: E731
        suffix = {str: "_s", int: "_i", float: "_f"}
        pooled = graph.op(
            "RoiAlign",
            graph.op("Cast", input, to_i=wide),
            graph.op("Cast", graph.op("Gather", boxes, constant([1, 2, 3, 4]), axis_i=1), to_i=wide),
            graph.op("Cast", graph.op("Gather", boxes, constant(0), axis_i=1), to_i=Kind.INT64),
            **{name + suffix[type(value)]: value for name, value in attributes.items()},
        )
        narrow = {torch.float16: Kind.FLOAT16, torch.bfloat16: Kind.BFLOAT16}.get(own)
        return pooled if narrow is None else graph.op("Cast", pooled, to_i=narrow)

    return symbolic
