"""Which rule lowers which ONNX operator: the tables of all rule modules in one."""

from __future__ import annotations

from lorac_exporters.tflite import (
    activations,
    conv_transpose,
    convolution,
    elementwise,
    linear,
    moves,
    normalization,
    pooling,
    reductions,
    resizing,
    shaping,
    shuffling,
)
from lorac_exporters.tflite.lowering import Rule

_MODULES = (
    activations,
    conv_transpose,
    convolution,
    elementwise,
    linear,
    moves,
    normalization,
    pooling,
    reductions,
    resizing,
    shaping,
    shuffling,
)

RULES: dict[str, Rule] = {operator: rule for module in _MODULES for operator, rule in module.RULES.items()}
