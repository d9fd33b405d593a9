"""Gradients of Conv against PyTorch's, for every geometry."""

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
    """A convolution; one entry per spatial axis in kernel, size, strides, dilations, begins and ends."""

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    c_in: int = 4
    c_out: int = 6
    groups: int = 1
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    begins: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    batch: int = 2

    def of(self, name: str) -> tuple[int, ...]:
        default = 0 if name in ("begins", "ends") else 1
        return getattr(self, name) or (default,) * len(self.kernel)

    def body(self, bias: bool) -> str:
        attributes = {
            "strides": self.of("strides"),
            "dilations": self.of("dilations"),
            "pads": self.of("begins") + self.of("ends"),
        }
        text = ", ".join(f"{k} = {list(v)}" for k, v in attributes.items())
        return f"y = Conv <{text}, group = {self.groups}> (x, w{', b' if bias else ''})"

    def inputs(self, bias: bool) -> dict[str, np.ndarray]:
        found = {
            "x": normal(self.batch, self.c_in, *self.size),
            "w": normal(self.c_out, self.c_in // self.groups, *self.kernel, seed=1),
        }
        return found | ({"b": normal(self.c_out, seed=2)} if bias else {})

    def reference(self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        pads = [p for pair in zip(reversed(self.of("begins")), reversed(self.of("ends")), strict=True) for p in pair]
        function = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[len(self.kernel)]
        x = torch.nn.functional.pad(x, pads)
        return function(x, w, b, stride=self.of("strides"), dilation=self.of("dilations"), groups=self.groups)


CASES = {
    "3x3": Case((5, 6), (3, 3), begins=(1, 1), ends=(1, 1)),
    "3x3 without padding": Case((5, 6), (3, 3)),
    "1x1": Case((4, 3), (1, 1)),
    "1x1 to fewer channels": Case((4, 3), (1, 1), c_in=6, c_out=2),
    "1x1 stride 2": Case((6, 6), (1, 1), strides=(2, 2)),
    "1x1 stride 2, a row left over": Case((5, 7), (1, 1), strides=(2, 2)),
    "1x1 with padding": Case((4, 4), (1, 1), begins=(1, 0), ends=(0, 2)),
    "3x3 to fewer channels": Case((5, 6), (3, 3), c_in=6, c_out=2, begins=(1, 1), ends=(1, 1)),
    "1x3": Case((5, 6), (1, 3), begins=(0, 1), ends=(0, 1)),
    "3x1": Case((5, 6), (3, 1), c_in=5, c_out=3, begins=(1, 0), ends=(1, 0)),
    "2x4": Case((5, 6), (2, 4), begins=(1, 2), ends=(0, 1)),
    "stride 2": Case((8, 8), (3, 3), strides=(2, 2), begins=(1, 1), ends=(1, 1)),
    "stride 2, odd size": Case((7, 9), (3, 3), strides=(2, 2), begins=(1, 1), ends=(1, 1)),
    "stride 2, a row left over": Case((8, 6), (3, 3), strides=(2, 2)),
    "stem 7x7 stride 2": Case((12, 13), (7, 7), c_in=3, strides=(2, 2), begins=(3, 3), ends=(3, 3)),
    "patches 4x4 stride 4": Case((8, 12), (4, 4), c_in=3, strides=(4, 4)),
    "patches with cells left over": Case((11, 13), (4, 4), c_in=3, strides=(4, 4)),
    "kernel smaller than stride": Case((9, 8), (2, 2), strides=(3, 3)),
    "stride 3, asymmetric": Case((8, 7), (3, 2), strides=(3, 3), begins=(0, 1), ends=(2, 1)),
    "stride 2x1": Case((8, 6), (3, 3), strides=(2, 1), begins=(1, 1), ends=(1, 1)),
    "stride 1x3, a column left over": Case((4, 9), (3, 3), strides=(1, 3)),
    "SAME at stride 2": Case((6, 8), (3, 3), strides=(2, 2), begins=(0, 0), ends=(1, 1)),
    "dilation": Case((9, 8), (3, 3), dilations=(2, 2), begins=(2, 2), ends=(2, 2)),
    "dilation and stride": Case((9, 10), (3, 2), dilations=(2, 3), strides=(2, 2), begins=(1, 2), ends=(2, 1)),
    "padding beyond the kernel": Case((4, 5), (3, 3), begins=(4, 3), ends=(3, 4)),
    "padding beyond the kernel on one side": Case((4, 5), (3, 3), c_in=6, c_out=2, begins=(3, 0), ends=(0, 5)),
    "padding beyond the kernel, stride 2": Case((4, 5), (3, 3), strides=(2, 2), begins=(4, 5), ends=(5, 3)),
    "groups": Case((5, 6), (3, 3), groups=2, begins=(1, 1), ends=(1, 1)),
    "groups to fewer channels": Case((5, 6), (3, 3), c_in=8, groups=2, c_out=2, begins=(1, 1), ends=(1, 1)),
    "groups, stride 2": Case((6, 7), (3, 3), groups=2, strides=(2, 2), begins=(1, 1), ends=(1, 1)),
    "groups 1x1": Case((4, 4), (1, 1), groups=2),
    "depthwise": Case((5, 6), (3, 3), c_in=4, c_out=4, groups=4, begins=(1, 1), ends=(1, 1)),
    "depthwise stride 2": Case((8, 7), (3, 3), c_in=4, c_out=4, groups=4, strides=(2, 2), begins=(1, 1), ends=(1, 1)),
    "depthwise dilated": Case((9, 8), (3, 3), c_in=4, c_out=4, groups=4, dilations=(2, 2), begins=(2, 2), ends=(2, 2)),
    "depthwise with a multiplier": Case((5, 5), (3, 3), c_in=3, c_out=6, groups=3, begins=(1, 1), ends=(1, 1)),
    "depthwise 1x1": Case((5, 5), (1, 1), c_in=4, c_out=4, groups=4),
    "kernel of the image's size": Case((4, 5), (4, 5)),
    "one position": Case((1, 1), (3, 3), begins=(1, 1), ends=(1, 1)),
    "one channel": Case((5, 5), (3, 3), c_in=1, c_out=1),
    "many channels, few positions": Case((2, 2), (3, 3), c_in=24, c_out=32, begins=(1, 1), ends=(1, 1)),
    "a batch of one": Case((5, 6), (3, 3), batch=1, begins=(1, 1), ends=(1, 1)),
    "1-D": Case((9,), (3,), begins=(1,), ends=(1,)),
    "1-D stride 2, a sample left over": Case((10,), (3,), strides=(2,)),
    "1-D dilation, asymmetric": Case((10,), (3,), dilations=(2,), begins=(4,), ends=(0,)),
    "1-D depthwise stride 2": Case((10,), (4,), c_in=4, c_out=4, groups=4, strides=(2,), begins=(1,), ends=(2,)),
    "3-D": Case((4, 3, 5), (3, 2, 3), c_in=2, c_out=3, strides=(2, 1, 1), begins=(1, 0, 1), ends=(1, 0, 1)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_gradients_of_a_convolution_are_pytorchs(name: str, bias: bool) -> None:
    case = CASES[name]
    check(case.body(bias), case.inputs(bias), case.reference)


@pytest.mark.parametrize("name", CASES)
def test_the_input_gradient_of_a_frozen_convolution_is_pytorchs(name: str) -> None:
    case = CASES[name]
    check(case.body(True), case.inputs(True), case.reference, wrt=["x"], fixed=["w", "b"])


@pytest.mark.parametrize("wrt", [["w"], ["b"], ["x", "b"], ["w", "x"]])
def test_a_part_of_the_gradients_is_what_it_is_among_all(wrt: Sequence[str]) -> None:
    case = CASES["stride 2"]
    check(case.body(True), case.inputs(True), case.reference, wrt=wrt)


@pytest.mark.parametrize("name", ["3x3", "stride 2", "stride 2x1", "groups"])
def test_nothing_that_is_not_wanted_is_computed(name: str) -> None:
    case = CASES[name]
    sizes = []
    for wrt in (["x"], ["b"], ["x", "w", "b"]):
        model = graph_of(case.body(True), case.inputs(True), fixed=["w", "b"])
        y = case.reference(*(torch.tensor(v) for v in case.inputs(True).values())).numpy()
        gradients(model, case.inputs(True), wrt, y)
        sizes.append((len(list(model.graph)), len(nodes_of(model.graph, "MatMul"))))
    assert [products for _, products in sizes] == [0, 0, 1]
    assert max(sizes[0][0], sizes[1][0]) < sizes[2][0]


@pytest.mark.parametrize("name", ["3x3", "stride 2", "stride 2x1", "groups", "depthwise", "dilation"])
def test_a_frozen_weight_is_stored_once(name: str) -> None:
    case = CASES[name]
    model = graph_of(case.body(False), case.inputs(False), fixed=["w"])
    y = case.reference(*(torch.tensor(v) for v in case.inputs(False).values())).numpy()
    gradients(model, case.inputs(False), ["x"], y)
    floats = [v.const_value.numpy() for v in model.graph.initializers.values()]
    assert sum(v.size for v in floats if v.dtype == np.float32 and v.ndim) == case.inputs(False)["w"].size


def test_automatic_padding_is_refused_by_name() -> None:
    body = 'y = Conv <auto_pad = "SAME_UPPER"> (x, w)'
    inputs = CASES["3x3"].inputs(False)
    with pytest.raises(ConversionError, match=r"Conv .* pads automatically"):
        gradients(graph_of(body, inputs), inputs, ["x"], normal(2, 6, 5, 6))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rank = draw(st.integers(1, 2))
    each = {
        name: tuple(draw(st.integers(*limits)) for _ in range(rank))
        for name, limits in {
            "size": (1, 9),
            "kernel": (1, 4),
            "strides": (1, 3),
            "dilations": (1, 3),
            "begins": (0, 4),
            "ends": (0, 4),
        }.items()
    }
    for i in range(rank):
        padded = each["size"][i] + each["begins"][i] + each["ends"][i]
        assume(padded > each["dilations"][i] * (each["kernel"][i] - 1))
    groups = draw(st.integers(1, 3))
    c_in, c_out = (groups * draw(st.integers(1, 3)) for _ in range(2))
    return Case(c_in=c_in, c_out=c_out, groups=groups, batch=draw(st.integers(1, 3)), **each)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=cases(), frozen=st.booleans())
def test_the_gradients_of_any_convolution_are_pytorchs(case: Case, frozen: bool) -> None:
    wrt, fixed = (["x"], ["w"]) if frozen else (["x", "w"], [])
    check(case.body(False), case.inputs(False), case.reference, wrt=wrt, fixed=fixed, differences=False)
