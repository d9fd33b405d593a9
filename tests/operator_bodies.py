"""One small graph for each operator: ``c`` (batch, 4, 8, 8) in, ``y`` out. For `test_rewrites` and `test_preflight`."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
from exporter_graphs import Arrays, constants, from_text, image, numbers, outputs

CONSTANTS: Arrays = constants(
    zero=0.0,
    half=0.5,
    two=2.0,
    axes=[2, 3],
    spatial=[3, 2],
    first=[1],
    third=[3],
    pads=[0, 0, 1, 2, 0, 0, 0, 1],
    rows=[-1, 4, 64],
    wide=[1, 4, 3, 3],
    tiles=[1, 1, 2, 1],
    scales=[1.0, 1.0, 2.0, 2.0],
    order=[2, 1, 0, 1],
) | numbers(
    slope=(4, 1, 1),
    v=(4,),
    u=(8,),
    square=(8, 8),
    k=(4, 4, 3, 3),
    deep=(4, 1, 3, 3),
    k1=(4, 4, 3),
    deep1=(4, 1, 3),
    up=(4, 4, 2, 2),
)
POSITIVE = "a = Mul (c, c) b = Add (a, half) "

DIFFERENTIABLE = {
    "Abs": "y = Abs (c)",
    "Add": "y = Add (c, slope)",
    "Cast": "y = Cast <to = 1> (c)",
    "Clip": "y = Clip (c, zero, half)",
    "Concat": "r = Relu (c) y = Concat <axis = 1> (c, r)",
    "Conv": "y = Conv <pads = [1, 0, 2, 1], strides = [2, 1], dilations = [1, 2]> (c, k, v)",
    "Conv 1-D": "r = Reshape (c, rows) y = Conv <strides = [2], pads = [1, 0]> (r, k1)",
    "Conv 1-D grouped, same size": "r = Reshape (c, rows) y = Conv <group = 4, pads = [2, 0]> (r, deep1)",
    "Conv depthwise": "y = Conv <pads = [1, 1, 1, 1], strides = [2, 2], group = 4> (c, deep, v)",
    "Cos": "y = Cos (c)",
    "Div": POSITIVE + "y = Div (c, b)",
    "Dropout": "y = Dropout (c)",
    "Erf": "y = Erf (c)",
    "Exp": "y = Exp (c)",
    "Expand": "g = GlobalAveragePool (c) y = Expand (g, wide)",
    "Flatten": "y = Flatten (c)",
    "Gather": "y = Gather <axis = 2> (c, order)",
    "Gemm": "g = GlobalAveragePool (c) f = Flatten (g) y = Gemm (f, gemm)",
    "GlobalAveragePool": "y = GlobalAveragePool (c)",
    "Identity": "y = Identity (c)",
    "LeakyRelu": "y = LeakyRelu <alpha = 0.3> (c)",
    "Log": POSITIVE + "y = Log (b)",
    "LogSoftmax": "y = LogSoftmax <axis = 1> (c)",
    "MatMul": "y = MatMul (c, square)",
    "Max": "y = Max (c, half)",
    "MaxPool": "y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (c)",
    "Min": "y = Min (c, half)",
    "Mul": "g = GlobalAveragePool (c) s = Sigmoid (g) y = Mul (c, s)",
    "Neg": "y = Neg (c)",
    "Pad": "y = Pad (c, pads)",
    "Pow": "y = Pow (c, two)",
    "Reciprocal": POSITIVE + "y = Reciprocal (b)",
    "ReduceL2": "y = ReduceL2 (c, axes)",
    "ReduceLogSumExp": "y = ReduceLogSumExp (c, axes)",
    "ReduceMean": "y = ReduceMean <keepdims = 0> (c, axes)",
    "ReduceSum": "y = ReduceSum (c, axes)",
    "Relu": "y = Relu (c)",
    "Reshape": "y = Reshape (c, rows)",
    "Sigmoid": "y = Sigmoid (c)",
    "Sin": "y = Sin (c)",
    "Slice": "y = Slice (c, first, third, first)",
    "Softmax": "s = Softmax <axis = 1> (c) y = Mul (s, slope)",
    "Split": "a, b = Split <axis = 1, num_outputs = 2> (c) y = Mul (a, b)",
    "Sqrt": POSITIVE + "y = Sqrt (b)",
    "Squeeze": "g = GlobalAveragePool (c) y = Squeeze (g, axes)",
    "Sub": "m = ReduceMean (c, first) r = Relu (c) y = Sub (r, m)",
    "Tanh": "y = Tanh (c)",
    "Tile": "y = Tile (c, tiles)",
    "Transpose": "y = Transpose <perm = [0, 2, 3, 1]> (c)",
    "Unsqueeze": "y = Unsqueeze (c, first)",
    "Where": "g = Greater (c, zero) y = Where (g, c, zero)",
}

REWRITTEN = {
    "AveragePool": "y = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (c)",
    "AveragePool, padded": "y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (c)",
    "AveragePool, counting": "y = AveragePool <kernel_shape = [3, 2], pads = [1, 0, 1, 1], count_include_pad = 1> (c)",
    "AveragePool, ceiling": "y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1> (c)",
    "AveragePool, 1-D": "r = Reshape (c, rows) y = AveragePool <kernel_shape = [3], strides = [2]> (r)",
    "Celu": "y = Celu <alpha = 0.7> (c)",
    "DepthToSpace": "y = DepthToSpace <blocksize = 2> (c)",
    "DepthToSpace, CRD": 'y = DepthToSpace <blocksize = 2, mode = "CRD"> (c)',
    "Elu": "y = Elu <alpha = 0.7> (c)",
    "GlobalMaxPool": "y = GlobalMaxPool (c)",
    "HardSigmoid": "y = HardSigmoid <alpha = 0.16666667, beta = 0.4> (c)",
    "HardSwish": "y = HardSwish (c)",
    "InstanceNormalization": "y = InstanceNormalization <epsilon = 0.01> (c, v, v)",
    "LayerNormalization": "y = LayerNormalization <axis = -1> (c, u, u)",
    "LayerNormalization, no bias": "y = LayerNormalization <axis = 3, epsilon = 0.1> (c, u)",
    "Mean": "r = Relu (c) t = Tanh (c) y = Mean (c, r, t)",
    "Mish": "y = Mish (c)",
    "PRelu": "y = PRelu (c, slope)",
    "Pad, reflect": 'y = Pad <mode = "reflect"> (c, pads)',
    "Pad, edge": 'y = Pad <mode = "edge"> (c, pads)',
    "ReduceMax": "y = ReduceMax (c, axes)",
    "ReduceMax, no axes kept": "y = ReduceMax <keepdims = 0> (c, spatial)",
    "Selu": "y = Selu (c)",
    "Softplus": "y = Softplus (c)",
    "Softsign": "y = Softsign (c)",
    "SpaceToDepth": "y = SpaceToDepth <blocksize = 2> (c)",
    "Sum": "r = Relu (c) t = Tanh (c) y = Sum (c, r, t)",
    "Sum of one": "r = Relu (c) y = Sum (r)",
    "ThresholdedRelu": "y = ThresholdedRelu <alpha = 0.3> (c)",
}

REFUSED = {
    "Conv 1-D grouped, smaller": "r = Reshape (c, rows) y = Conv <group = 4> (r, deep1)",
    "ConvTranspose": "y = ConvTranspose (c, up)",
    "CumSum": "y = CumSum (c, two_int)",
    "Einsum": 'y = Einsum <equation = "nchw->nhwc"> (c)',
    "Floor": "y = Floor (c)",
    "LRN": "y = LRN <size = 3> (c)",
    "LpPool": "y = LpPool <kernel_shape = [2, 2]> (c)",
    "PRelu, computed slope": "s = Sigmoid (c) y = PRelu (c, s)",
    "ReduceMax over channels": "y = ReduceMax (c, first)",
    "ReduceProd": "y = ReduceProd (c, axes)",
    "Resize": 'y = Resize <mode = "nearest"> (c, , scales)',
    "Round": "y = Round (c)",
    "Sign": "y = Sign (c)",
}


def operator_model(body: str) -> ir.Model:
    """x (batch, 3, 8, 8) -> convolution ``w`` -> the operator -> ``logits`` (batch, 5), uneven in every element."""
    extra = {"gemm": numbers(gemm=(4, 3))["gemm"], "two_int": np.array(2)} | CONSTANTS
    text = f"c = Conv <pads = [1, 1, 1, 1]> (x, w, bias) {body} flat = Flatten (y) logits = MatMul (flat, head)"
    weights = numbers(w=(4, 3, 3, 3), bias=(4,)) | extra
    plain = from_text(text, weights=weights | numbers(head=(1, 5)), y="float[batch,5] logits")
    width = _width(plain)
    weights["head"] = numbers(head=(width, 5))["head"] / np.float32(np.sqrt(width))
    used = set(re.findall(r"\w+", text))
    return from_text(text, weights={k: v for k, v in weights.items() if k in used}, y="float[batch,5] logits")


def _width(model: ir.Model) -> int:
    flat = model.clone()
    node = next(n for n in flat.graph if n.outputs[0].name == "flat")
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", None])
    flat.graph.outputs[:] = [node.outputs[0]]
    flat.graph.remove(list(flat.graph)[-1], safe=True)
    return outputs(flat, image(2, 3, 8, 8)).shape[1]
