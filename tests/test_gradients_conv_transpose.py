"""Gradients of ConvTranspose against PyTorch's, for every geometry."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from gradient_cases import check, gradients, graph_of, normal
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lorac_exporters.graph_tools import nodes_of
from lorac_runtime.errors import ConversionError


@dataclasses.dataclass(frozen=True)
class Case:
    """A transposed convolution; one entry per spatial axis in kernel, size, strides, dilations and the paddings."""

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    c_in: int = 4
    c_out: int = 6
    groups: int = 1
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    begins: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    extra: tuple[int, ...] = ()
    batch: int = 2

    def of(self, name: str) -> tuple[int, ...]:
        return getattr(self, name) or (int(name in ("strides", "dilations")),) * len(self.kernel)

    def body(self, bias: bool) -> str:
        attributes = {
            "strides": self.of("strides"),
            "dilations": self.of("dilations"),
            "pads": self.of("begins") + self.of("ends"),
            "output_padding": self.of("extra"),
        }
        text = ", ".join(f"{k} = {list(v)}" for k, v in attributes.items())
        return f"y = ConvTranspose <{text}, group = {self.groups}> (x, w{', b' if bias else ''})"

    def inputs(self, bias: bool) -> dict[str, np.ndarray]:
        found = {
            "x": normal(self.batch, self.c_in, *self.size),
            "w": normal(self.c_in, self.c_out // self.groups, *self.kernel, seed=1),
        }
        return found | ({"b": normal(self.c_out, seed=2)} if bias else {})

    def reference(self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        """PyTorch's without padding, then cropped by the pads and grown by the output padding."""
        function = {1: torch.conv_transpose1d, 2: torch.conv_transpose2d}[len(self.kernel)]
        full = function(x, w, None, stride=self.of("strides"), groups=self.groups, dilation=self.of("dilations"))
        pads = []
        for begin, end, extra in zip(*map(self.of, ("begins", "ends", "extra")), strict=True):
            pads = [-begin, extra - end, *pads]
        y = torch.nn.functional.pad(full, pads)
        return y if b is None else y + b.reshape(1, -1, *[1] * len(self.kernel))


CASES = {
    "2x2 stride 2": Case((3, 4), (2, 2), strides=(2, 2)),
    "3x3": Case((4, 5), (3, 3), begins=(1, 1), ends=(1, 1)),
    "1x1": Case((3, 4), (1, 1)),
    "1x1 stride 2": Case((3, 4), (1, 1), strides=(2, 2)),
    "4x4 stride 2": Case((3, 4), (4, 4), strides=(2, 2), begins=(1, 1), ends=(1, 1)),
    "3x3 stride 2 with output padding": Case((3, 4), (3, 3), strides=(2, 2), begins=(1, 1), ends=(1, 1), extra=(1, 1)),
    "output padding that no tap reaches": Case((3, 4), (3, 3), strides=(2, 2), extra=(1, 1)),
    "asymmetric": Case((4, 3), (3, 2), strides=(2, 3), begins=(1, 0), ends=(0, 1)),
    "kernel smaller than stride": Case((3, 3), (2, 2), strides=(3, 3), extra=(1, 2)),
    "dilation": Case((4, 5), (3, 3), dilations=(2, 3), begins=(2, 1), ends=(1, 2)),
    "to fewer channels": Case((4, 3), (3, 3), c_in=6, c_out=2, strides=(2, 2)),
    "groups": Case((3, 4), (3, 3), groups=2, strides=(2, 2), begins=(1, 1), ends=(1, 1), extra=(1, 1)),
    "depthwise": Case((3, 4), (4, 4), c_in=4, c_out=4, groups=4, strides=(2, 2), begins=(1, 1), ends=(1, 1)),
    "depthwise with a multiplier": Case((3, 4), (3, 3), c_in=3, c_out=6, groups=3),
    "one channel": Case((3, 4), (3, 3), c_in=1, c_out=1, strides=(2, 2)),
    "one position": Case((1, 1), (3, 3), strides=(2, 2)),
    "a batch of one": Case((3, 4), (2, 2), strides=(2, 2), batch=1),
    "1-D": Case((5,), (3,), begins=(1,), ends=(1,)),
    "1-D stride 2 with output padding": Case((5,), (3,), strides=(2,), begins=(1,), ends=(1,), extra=(1,)),
    "1-D depthwise dilated": Case((5,), (3,), c_in=4, c_out=4, groups=4, dilations=(2,), begins=(0,), ends=(3,)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_gradients_of_a_transposed_convolution_are_pytorchs(name: str, bias: bool) -> None:
    case = CASES[name]
    check(case.body(bias), case.inputs(bias), case.reference)


@pytest.mark.parametrize("name", CASES)
def test_the_input_gradient_of_a_frozen_transposed_convolution_is_pytorchs(name: str) -> None:
    case = CASES[name]
    check(case.body(True), case.inputs(True), case.reference, wrt=["x"], fixed=["w", "b"])


@pytest.mark.parametrize("wrt", [["w"], ["b"], ["x", "b"], ["w", "x"]], ids=str)
def test_a_part_of_the_gradients_is_what_it_is_among_all(wrt: Sequence[str]) -> None:
    case = CASES["3x3 stride 2 with output padding"]
    check(case.body(True), case.inputs(True), case.reference, wrt=wrt)


def test_the_input_gradient_is_one_convolution_with_the_same_weight() -> None:
    case = CASES["4x4 stride 2"]
    model = graph_of(case.body(False), case.inputs(False), fixed=["w"])
    gradients(model, case.inputs(False), ["x"], normal(2, 6, 6, 8))
    (found,) = nodes_of(model.graph, "Conv")
    assert found.inputs[1] is model.graph.initializers["w"]


@pytest.mark.parametrize("attribute", ['auto_pad = "SAME_UPPER"', "output_shape = [6, 8]"])
def test_automatic_padding_is_refused_by_name(attribute: str) -> None:
    inputs = CASES["2x2 stride 2"].inputs(False)
    model = graph_of(f"y = ConvTranspose <strides = [2, 2], {attribute}> (x, w)", inputs)
    with pytest.raises(ConversionError, match=r"ConvTranspose .* pads automatically"):
        gradients(model, inputs, ["x"], normal(2, 6, 6, 8))


def test_output_padding_that_onnxruntime_computes_wrongly_is_refused_by_name() -> None:
    case = Case((3, 4), (2, 2), strides=(2, 1), dilations=(4, 3), extra=(1, 2))
    with pytest.raises(ConversionError, match=r"ConvTranspose .* output_padding \[1, 2\].* strides, here \[2, 1\]"):
        gradients(graph_of(case.body(False), case.inputs(False)), case.inputs(False), ["x"], normal(2, 6, 10, 9))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rank = draw(st.integers(1, 2))
    limits = {
        "size": (1, 5),
        "kernel": (1, 4),
        "strides": (1, 3),
        "dilations": (1, 3),
        "begins": (0, 4),
        "ends": (0, 4),
    }
    each = {name: tuple(draw(st.integers(*ends)) for _ in range(rank)) for name, ends in limits.items()}
    each["extra"] = tuple(draw(st.integers(0, s - 1)) for s in each["strides"])
    for n, k, s, d, begin, end, extra in zip(*each.values(), strict=True):
        assume((n - 1) * s + d * (k - 1) + 1 + extra > begin + end)
    groups = draw(st.integers(1, 3))
    c_in, c_out = (groups * draw(st.integers(1, 3)) for _ in range(2))
    return Case(c_in=c_in, c_out=c_out, groups=groups, batch=draw(st.integers(1, 3)), **each)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=cases(), bias=st.booleans())
def test_the_gradients_of_any_transposed_convolution_are_pytorchs(case: Case, bias: bool) -> None:
    check(case.body(bias), case.inputs(bias), case.reference, differences=False)
