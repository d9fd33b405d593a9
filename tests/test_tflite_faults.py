"""Faults planted in the writer: the comparison that all these tests share finds each, and so do the random networks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from exporter_graphs import constants, from_text, numbers
from random_networks import random_network
from tflite_agreement import judge

from lorac_exporters.tflite import activations, convolution, linear, padding, pooling
from lorac_exporters.tflite import lower as lower_module
from lorac_exporters.tflite.lowering import Lowering
from lorac_exporters.tflite.network import Network
from lorac_exporters.tflite.padding import Axis

Patch = pytest.MonkeyPatch
WEIGHTS = numbers(
    w=(4, 3, 3, 3),
    even=(4, 3, 2, 2),
    bias=(4,),
    deep=(4, 1, 3, 3),
    flat=(4, 3, 1, 3),
    shuffled=(8, 4, 1, 1),
    fc=(256, 5),
) | constants(low=-0.25, high=0.5)
CONV = "c = Conv <pads = [1, 1, 1, 1]> (x, w, bias) "


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is planted, the nodes that show it on x (batch, 3, 8, 8), and the shape of their result y."""

    plant: Callable[[Patch], None]
    body: str
    shape: tuple[int, ...]


def swapped_padding(patch: Patch) -> None:
    needed = Axis.needed.fget
    assert needed is not None
    patch.setattr(Axis, "needed", property(lambda axis: needed(axis)[::-1]))


def always_same(patch: Patch) -> None:
    patch.setattr(padding, "padding_of", lambda axes: "SAME")


def same_with_cells_left_over(patch: Patch) -> None:
    """Right by the schema, wrong on tflite-runtime 2.14.0 with XNNPACK: a kernel smaller than its stride."""

    def same(axis: Axis) -> tuple[int, int] | None:
        total = max(0, (axis.count - 1) * axis.stride + axis.span - axis.size)
        return (total // 2, total - total // 2) if axis.count == -(-axis.size // axis.stride) else None

    patch.setattr(Axis, "same", property(same))


def wrong_depthwise_order(patch: Patch) -> None:
    view = convolution._as_image_kernel
    order = (1, 3, 2, 0)
    patch.setattr(convolution, "_depthwise", lambda low, weight: low.arranged(weight, view(low, weight), order))


def folded_with_two_users(patch: Patch) -> None:
    def fold(network: Network) -> None:
        for relu in [operator for operator in network.operators if operator.kind == "RELU"]:
            given, made = relu.inputs[0], relu.outputs[0]
            maker = None if given is None else network.producer(given)
            if maker is not None and maker.kind == "CONV_2D":
                network.operators.remove(relu)
                maker.options["fused_activation_function"], maker.outputs = "RELU", [made]
                for operator in network.operators:
                    operator.inputs = [made if tensor is given else tensor for tensor in operator.inputs]

    patch.setattr(lower_module, "PASSES", (fold, *lower_module.PASSES))


def zero_in_max_pool(patch: Patch) -> None:
    patch.setattr(pooling, "LOWEST", 0.0)


def padding_never_counted(patch: Patch) -> None:
    counted = pooling._counted
    patch.setattr(pooling, "_counted", lambda axis, include_pads: counted(axis, include_pads=False))


def weights_not_permuted(patch: Patch) -> None:
    patch.setattr(linear, "flattened_from", lambda lowering, value: None)


def pixels_in_the_other_order(patch: Patch) -> None:
    patch.setattr(convolution, "shuffled_by", lambda value: 1)


def fixed_batch(patch: Patch) -> None:
    ints = Lowering.ints
    patch.setattr(Lowering, "ints", lambda self, name, sizes: ints(self, name, [1 if n == -1 else n for n in sizes]))


def swapped_limits(patch: Patch) -> None:
    bound = activations._bound
    patch.setattr(activations, "_bound", lambda lowering, node, i, default: bound(lowering, node, 3 - i, default))


def swapped_strides(patch: Patch) -> None:
    strides = padding.strides_of
    patch.setattr(convolution, "strides_of", lambda axes: strides(axes[::-1]))


def no_dilation(patch: Patch) -> None:
    options = convolution._options
    ones = {"dilation_h_factor": 1, "dilation_w_factor": 1}
    patch.setattr(convolution, "_options", lambda axes: options(axes) | ones)


FAULTS = {
    "padding swapped": Fault(swapped_padding, "y = Conv <pads = [1, 0, 0, 1]> (x, even, bias)", (4, 8, 8)),
    "always SAME": Fault(always_same, "y = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w, bias)", (4, 4, 4)),
    "SAME with cells left over": Fault(
        same_with_cells_left_over, "y = Conv <pads = [0, 0, 0, 1], strides = [2, 2]> (x, flat, bias)", (4, 4, 4)
    ),
    "depthwise permutation wrong": Fault(
        wrong_depthwise_order, CONV + "y = Conv <pads = [1, 1, 1, 1], group = 4> (c, deep, bias)", (4, 8, 8)
    ),
    "activation folded with two users": Fault(folded_with_two_users, CONV + "r = Relu (c) y = Add (r, c)", (4, 8, 8)),
    "padding of a maximum is zero": Fault(
        zero_in_max_pool,
        CONV + "n = Exp (c) m = Neg (n) y = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]> (m)",
        (4, 4, 4),
    ),
    "count_include_pad ignored": Fault(
        padding_never_counted,
        CONV + "y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (c)",
        (4, 8, 8),
    ),
    "weights after Flatten not permuted": Fault(
        weights_not_permuted, CONV + "f = Flatten (c) y = MatMul (f, fc)", (5,)
    ),
    "pixels shuffled in the other order": Fault(
        pixels_in_the_other_order,
        CONV + 'd = Conv (c, shuffled) y = DepthToSpace <blocksize = 2, mode = "CRD"> (d)',
        (2, 16, 16),
    ),
    "batch fixed in a shape": Fault(fixed_batch, CONV + "y = Flatten (c)", (256,)),
    "limits of Clip swapped": Fault(swapped_limits, CONV + "y = Clip (c, low, high)", (4, 8, 8)),
    "strides swapped": Fault(swapped_strides, "y = Conv <strides = [1, 2]> (x, w, bias)", (4, 6, 3)),
    "dilation forgotten": Fault(no_dilation, "y = Conv <dilations = [2, 2]> (x, w, bias)", (4, 4, 4)),
}


def model(fault: Fault) -> ir.Model:
    named = set(re.findall(r"\w+", fault.body))
    weights = {name: value for name, value in WEIGHTS.items() if name in named}
    return from_text(fault.body, weights=weights, y=f"float[batch,{','.join(map(str, fault.shape))}] y")


def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("name", FAULTS)
def test_the_comparison_finds_a_planted_fault(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = model(FAULTS[name])
    sound = judge(graph, images())
    assert (sound.refused, sound.wrong, sound.idle) == (None, False, False), sound
    FAULTS[name].plant(monkeypatch)
    found = judge(graph, images())
    assert found.refused is None
    assert found.wrong


@pytest.mark.parametrize("name", FAULTS)
def test_random_networks_find_a_planted_fault(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[name].plant(monkeypatch)
    assert any(_is_wrong(seed) for seed in range(100))


def _is_wrong(seed: int) -> bool:
    network = random_network(seed)
    batch = np.random.default_rng(seed).standard_normal((2, *network.shape)).astype(np.float32)
    return judge(ir.from_proto(network.model), batch).wrong
