"""Sequences are images of height 1 to convolutions and pools; operators between them can work on the images too.

Each convolution of a sequence is lowered with a RESHAPE before and one after it. Where only functions of single
elements lie between, the RESHAPE moves behind them, meets the next one, and both go.
"""

from __future__ import annotations

import numpy as np

from lorac_exporters.graph_tools import unique_name
from lorac_exporters.tflite.network import Network, Operator, Tensor

_ELEMENTWISE = frozenset(
    {
        "ADD",
        "DIV",
        "ELU",
        "GELU",
        "HARD_SWISH",
        "LEAKY_RELU",
        "LOGISTIC",
        "MUL",
        "RELU",
        "RELU6",
        "RELU_N1_TO_1",
        "SUB",
        "TANH",
    }
)


def stay_images(network: Network) -> None:
    """Let operators on single elements read images of height 1 where their operands were made from such."""
    makers = {out: operator for operator in network.operators for out in operator.outputs}
    names = {tensor.name for tensor in network.tensors()}
    done: list[Operator] = []
    for operator in network.operators:
        images = [_image(makers, tensor) for tensor in operator.inputs]
        done.append(operator)
        if operator.kind in _ELEMENTWISE and all(images) and any(image not in operator.inputs for image in images):
            made = operator.outputs[0]
            name = unique_name(f"{made.name}_image", names)
            reshape = _work_on(operator, images, name, unique_name(f"{name}_shape", names))
            names |= {tensor.name for tensor in reshape.inputs if tensor is not None}
            makers[made] = reshape
            makers[operator.outputs[0]] = operator
            done.append(reshape)
    network.operators = done


def _image(makers: dict[Tensor, Operator], tensor: Tensor | None) -> Tensor | None:
    """The image of height 1 that a sequence was made from, or a constant that fits it as well; else None."""
    if tensor is None:
        return None
    if tensor.data is not None:
        return tensor if len(tensor.shape) < 3 or tensor.shape[:-2] == (1,) else None
    maker = makers.get(tensor)
    source = None if maker is None or maker.kind != "RESHAPE" else maker.inputs[0]
    if source is None or len(tensor.shape) != 3 or source.signature != _as_image(tensor.signature):
        return None
    return source


def _work_on(operator: Operator, images: list[Tensor | None], name: str, target_name: str) -> Operator:
    """Change the operator in place; returns the RESHAPE that makes the sequence again."""
    (made,) = operator.outputs
    image = Tensor(name, _as_image(made.shape), made.dtype, batch_axis=made.batch_axis)
    operator.inputs, operator.outputs = images, [image]
    target = Tensor(target_name, (3,), "int32", data=np.array(made.signature, np.int32))
    return Operator("RESHAPE", [image, target], [made])


def _as_image(shape: tuple[int, ...]) -> tuple[int, ...]:
    batch, length, channels = shape
    return batch, 1, length, channels
