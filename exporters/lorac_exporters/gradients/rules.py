"""The table of gradient rules: one for each operator of the ONNX standard (opset 18) that can be trained through."""

from __future__ import annotations

from lorac_exporters.gradients import (
    activations,
    conv_transpose,
    convolution,
    elementwise,
    linear,
    normalization,
    pooling,
    resizing,
    shaping,
)
from lorac_exporters.gradients.rule import Rule

RULES: dict[str, Rule] = {
    **activations.RULES,
    **conv_transpose.RULES,
    **convolution.RULES,
    **elementwise.RULES,
    **linear.RULES,
    **normalization.RULES,
    **pooling.RULES,
    **resizing.RULES,
    **shaping.RULES,
}
