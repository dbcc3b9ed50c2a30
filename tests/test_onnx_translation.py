"""RoIAlign in ONNX: onnxruntime gives our numbers, by either exporter, and what ONNX cannot express is named."""

from __future__ import annotations

import io
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision  # noqa: F401  as in every program that has a detector
from conftest import available_backends

from scrl_fast import ops
from scrl_fast.ops.onnx_translation import onnx_attributes

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime runs the graphs")
pytest.importorskip("onnxscript", reason="torch's exporter needs onnxscript")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
EXPORTERS = ("tracing", "dynamo", "table")
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def example(dtype, count=40, seed=0):
    """Maps, and boxes in, across and beyond them, among them some without width or height."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 80 - 15
    side = torch.rand(count, 2, generator=generator) * 70
    side[:4] = torch.tensor([[0.0, 0], [0, 9], [9, 0], [0.5, 0.5]])
    image = torch.randint(0, 2, (count, 1), generator=generator)
    boxes = torch.cat([image, corner, corner + side], 1)
    features = torch.randn(2, 3, 13, 17, generator=generator).to(dtype)
    return features, boxes.double() if dtype == torch.float64 else boxes.float()


def exported(module, inputs, exporter, **options):
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    file = io.BytesIO()
    if exporter == "tracing":
        axes = {"features": [0, 2, 3], "boxes": [0]}
        options = {"opset_version": 17, "dynamic_axes": axes, "input_names": list(axes), **options}
        torch.onnx.export(module, inputs, file, dynamo=False, **options)
    elif exporter == "dynamo":
        shapes = ({0: "images", 2: "height", 3: "width"}, {0: "count"})
        torch.onnx.export(module, inputs, file, dynamo=True, dynamic_shapes=shapes, verbose=False, **options)
    else:
        program = torch.export.export(module, inputs)
        table = ops.onnx_translation_table()
        torch.onnx.export(program, inputs, file, dynamo=True, custom_translation_table=table, verbose=False, **options)
    return file.getvalue()


def run(graph, inputs):
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    (found,) = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    return torch.from_numpy(np.asarray(found))


def kinds(graph):
    import onnx

    return [node.op_type for node in onnx.load_from_string(graph).graph.node]


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [-1, 0, 1, 3])
def test_onnxruntime_gives_our_numbers(exporter, aligned, ratio):
    module, inputs = ops.RoIAlign((3, 2), 0.25, ratio, aligned), example(torch.float32)
    graph = exported(module, inputs, exporter)
    assert kinds(graph).count("RoiAlign") == 1
    others = [inputs] if exporter == "table" else [inputs, example(torch.float32, count=7, seed=1)]
    for each in others:
        found = run(graph, each)
        torch.testing.assert_close(found, module(*each), rtol=0, atol=TOLERANCE[torch.float32])
        assert found.abs().max() > 0.5


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(exporter, dtype):
    module, inputs = ops.RoIAlign(2, 0.25, 2, True), example(dtype)
    found = run(exported(module, inputs, exporter), inputs)
    assert found.dtype == dtype
    torch.testing.assert_close(found, module(*inputs), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_bfloat16_is_computed_in_float(exporter):
    """onnxruntime takes no NumPy array of it, so the graph is read instead."""
    import onnx

    nodes = onnx.load_from_string(exported(ops.RoIAlign(2, 0.25), example(torch.bfloat16), exporter)).graph.node
    casts = [node.attribute[0].i for node in nodes if node.op_type == "Cast"]
    assert onnx.TensorProto.FLOAT in casts and casts[-1] == onnx.TensorProto.BFLOAT16


@pytest.mark.parametrize("exporter", ["tracing", "dynamo"])
@pytest.mark.parametrize("backend", available_backends("roi_align"))
def test_every_backend_is_exported(backend, exporter):
    module, inputs = ops.RoIAlign(2, 0.25, 2, True, backend=backend), example(torch.float32)
    found = run(exported(module, inputs, exporter), inputs)
    torch.testing.assert_close(found, module(*inputs), rtol=0, atol=TOLERANCE[torch.float32])


def test_a_list_of_boxes_and_a_layer_before(tmp_path):
    """As in a network: the map carries a gradient, boxes come one tensor an image."""

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 4, 3)

        def forward(self, images, boxes):
            return ops.roi_align(self.layer(images), [boxes], (2, 2), 0.5, 2, True)

    network, inputs = Network().eval(), (torch.randn(1, 3, 20, 24), torch.tensor([[1.0, 2, 20, 30], [4, 5, 6, 9]]))
    for exporter in ("tracing", "table"):
        options = {"dynamic_axes": None} if exporter == "tracing" else {}
        found = run(exported(network, inputs, exporter, **options), inputs)
        torch.testing.assert_close(found, network(*inputs).detach(), rtol=0, atol=1e-5)


def test_a_scale_that_32_bits_do_not_hold():
    """Of float32 maps it is rounded as everything is; of float64 maps it is not, or refused."""
    scale = 1 / 7
    module, inputs = ops.RoIAlign(2, scale, 2), example(torch.float32)
    for exporter in EXPORTERS:
        torch.testing.assert_close(run(exported(module, inputs, exporter), inputs), module(*inputs), rtol=0, atol=1e-5)
    inputs = example(torch.float64)
    found = run(exported(module, inputs, "dynamo"), inputs)
    torch.testing.assert_close(found, module(*inputs), rtol=0, atol=TOLERANCE[torch.float64])
    for exporter in ("tracing", "table"):
        with pytest.raises(Exception) as refused:
            exported(module, inputs, exporter)
        assert f"spatial_scale={scale} of a float64 map" in _whole(refused.value)


def _whole(error):
    """The message and those of its causes."""
    return f"{error}\n{_whole(error.__cause__)}" if error else ""


def test_opsets_that_cannot_express_a_call_are_named():
    inputs = example(torch.float32)
    with pytest.raises(ValueError, match="aligned=True needs ONNX's opset 16 or later"):
        exported(ops.RoIAlign(2, 0.25, 2, True), inputs, "tracing", opset_version=15)
    with pytest.raises(ValueError, match="needs ONNX's opset 10 or later"):
        exported(ops.RoIAlign(2, 0.25, 2), inputs, "tracing", opset_version=9)
    with pytest.raises(ValueError, match="aligned=True needs ONNX's opset 16"):
        onnx_attributes((2, 2), 1.0, 2, True, opset=11)
    module = ops.RoIAlign(2, 0.25, 2)  # what opset 10 can
    found = run(exported(module, inputs, "tracing", opset_version=11), inputs)
    torch.testing.assert_close(found, module(*inputs), rtol=0, atol=TOLERANCE[torch.float32])


def test_without_torchvision_onnxs_own_operator_is_taken():
    code = """
import io, logging, sys, torch, onnxruntime
from scrl_fast import ops
logging.getLogger("torch.onnx").setLevel(logging.ERROR)
module, file = ops.RoIAlign((3, 2), 1 / 3, -1, True), io.BytesIO()
inputs = torch.randn(2, 3, 13, 17), torch.tensor([[0, 1.0, 2, 9, 8], [1, 0, 0, 16, 12]])
torch.onnx.export(module, inputs, file, dynamo=True, verbose=False)
assert "torchvision" not in sys.modules
session = onnxruntime.InferenceSession(file.getvalue())
feeds = {each.name: value.numpy() for each, value in zip(session.get_inputs(), inputs)}
torch.testing.assert_close(torch.from_numpy(session.run(None, feeds)[0]), module(*inputs), rtol=0, atol=2e-6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "AssertionError" in done.stderr and "torchvision" in done.stderr:
        pytest.skip("this release of torch imports torchvision to export")
    assert done.returncode == 0, done.stderr[-2000:]
