"""Check a gradient rule: against PyTorch autograd, and against finite differences of the ONNX operators themselves.

The loss is sum(y * c) with a random cotangent c, so that every element of the gradient counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch

from lorac_exporters.gradients.reverse import differentiate
from lorac_exporters.gradients.tape import Tape
from lorac_exporters.graph_tools import name_of, to_bytes

Arrays = dict[str, np.ndarray]
TOLERANCE = 2e-5  # of the largest element of a gradient, float32 against float64
STEP = 1e-2


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def graph_of(body: str, inputs: Arrays, *, fixed: Sequence[str] = (), batch: bool = True) -> ir.Model:
    """A graph that computes ``y`` from ``inputs``: the lines of ``body`` in ONNX's own text syntax.

    The first axis of ``x`` is symbolic with ``batch``; inputs named in ``fixed`` become initializers.
    """
    kinds = {"float32": "float", "int64": "int64", "bool": "bool"}
    declared = []
    for name, value in inputs.items():
        sizes = [str(d) for d in value.shape]
        if batch and name == "x" and sizes:
            sizes[0] = "batch"
        shape = f"[{','.join(sizes)}]" if sizes else ""  # brackets around nothing would say "of any rank"
        declared.append(f"{kinds[str(value.dtype)]}{shape} {name}")
    text = f'<ir_version: 9, opset_import: ["" : 18]> g ({", ".join(declared)}) => (float[] y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    for name in fixed:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(inputs[name], name))
        proto.graph.input.remove(next(i for i in proto.graph.input if i.name == name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True))


def run(model: ir.Model, inputs: Arrays) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(to_bytes(model), options, providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}
    return session.run(None, {k: np.asarray(v) for k, v in inputs.items() if k in wanted})


def gradients(model: ir.Model, inputs: Arrays, wrt: Sequence[str], cotangent: np.ndarray) -> Arrays:
    """Gradients of sum(y * cotangent) as our graph computes them; ``model`` is changed."""
    graph = model.graph
    y = graph.outputs[0]
    assert y.shape is not None
    c = ir.Value(name="cotangent", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(list(y.shape)))
    graph.inputs.append(c)
    tape = Tape(graph, "test.")
    named = {name_of(v): v for v in [*graph.inputs, *graph.initializers.values()]}
    graph.outputs[:] = differentiate(tape, y, [named[n] for n in wrt], seed=c)
    found = run(model, {**inputs, "cotangent": cotangent})
    return dict(zip(wrt, found, strict=True))


def check(
    body: str,
    inputs: Arrays,
    reference: Callable[..., torch.Tensor],
    *,
    wrt: Sequence[str] | None = None,
    fixed: Sequence[str] = (),
    batch: bool = True,
    tolerance: float = TOLERANCE,
    differences: bool = True,
) -> None:
    """Hold the gradients of ``body`` against PyTorch's of ``reference(**inputs)`` and against finite differences.

    ``wrt`` names the inputs to differentiate for, by default all of floats. ``differences`` False leaves out the
    finite differences, for operators with kinks that a step would cross.
    """
    wrt = [n for n, v in inputs.items() if v.dtype == np.float32] if wrt is None else wrt
    (y,) = run(graph_of(body, inputs, fixed=fixed, batch=batch), inputs)
    cotangent = np.random.default_rng(9).standard_normal(y.shape).astype(np.float32)
    found = gradients(graph_of(body, inputs, fixed=fixed, batch=batch), inputs, wrt, cotangent)
    expected, value = autograd(reference, inputs, wrt, cotangent)
    np.testing.assert_allclose(y, value, rtol=0, atol=tolerance * max(1.0, np.abs(value).max(initial=0)))
    for name in wrt:
        assert found[name].shape == inputs[name].shape, name
        scale = max(np.abs(expected[name]).max(initial=0), 1e-3)
        np.testing.assert_allclose(found[name] / scale, expected[name] / scale, rtol=0, atol=tolerance, err_msg=name)
    if differences:
        check_differences(graph_of(body, inputs, fixed=fixed, batch=batch), inputs, found, cotangent)


def autograd(
    reference: Callable[..., torch.Tensor], inputs: Arrays, wrt: Sequence[str], cotangent: np.ndarray
) -> tuple[Arrays, np.ndarray]:
    """PyTorch's gradients in float64, and the value."""
    tensors = {k: torch.tensor(v, dtype=torch.float64 if v.dtype == np.float32 else None) for k, v in inputs.items()}
    for name in wrt:
        tensors[name].requires_grad_()
    y = reference(**tensors)
    (y * torch.tensor(cotangent, dtype=torch.float64)).sum().backward()
    return {n: tensors[n].grad.numpy() for n in wrt}, y.detach().numpy()


def check_differences(model: ir.Model, inputs: Arrays, found: Arrays, cotangent: np.ndarray) -> None:
    """Central differences along a random direction of each input; ``fixed`` inputs are left out."""
    given = {i.name for i in model.graph.inputs}
    for index, (name, gradient) in enumerate(found.items()):
        if name not in given:
            continue
        direction = np.random.default_rng(index).standard_normal(gradient.shape).astype(np.float32)
        values = [
            float(
                (
                    run(model, {**inputs, name: inputs[name] + sign * STEP * direction})[0].astype(float) * cotangent
                ).sum()
            )
            for sign in (1, -1)
        ]
        measured = (values[0] - values[1]) / (2 * STEP)
        predicted = float((gradient.astype(float) * direction).sum())
        scale = float(np.linalg.norm(gradient) * np.linalg.norm(direction)) / max(np.sqrt(gradient.size), 1)
        assert abs(measured - predicted) <= 2e-2 * max(scale, 1e-2), (name, measured, predicted)
