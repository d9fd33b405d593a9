"""Adapters as nodes: either form computes the layer with W + delta, and its gradients are that one's."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import onnx_ir as ir
import pytest
import torch
from gradient_cases import graph_of, normal, run
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lorac_exporters.branches import FORM_CHOICES, FORMS, Factors, Form, add_adapters, form_of
from lorac_exporters.gradients.geometry import Geometry
from lorac_exporters.gradients.reverse import differentiate
from lorac_exporters.gradients.tape import Tape, dims
from lorac_exporters.graph_tools import nodes_of
from lorac_runtime.delta import LAYOUTS, Layout, adapter_shapes, delta
from lorac_runtime.errors import ConversionError
from lorac_runtime.manifest import Adapter

R, TOLERANCE = 2, 2e-5
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution, ``kernel`` (k_h, k_w) or (k,); the other tuples have an entry per spatial axis, () for default.

    With ``kernel`` and ``size`` () it is a fully connected layer.
    """

    kernel: tuple[int, ...] = (3, 3)
    size: tuple[int, ...] = (7, 6)
    c_in: int = 4
    c_out: int = 6
    groups: int = 1
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    begins: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    rank: int = 3
    pairs: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (self.c_out, self.c_in // self.groups, *self.kernel)

    def of(self, name: str) -> tuple[int, ...]:
        default = 0 if name in ("begins", "ends") else 1
        return getattr(self, name) or (default,) * len(self.kernel)

    def adapter(self, layout: Layout, *, learnable: bool = False) -> Adapter:
        alpha = "body.lora_alpha" if learnable else None
        names = ("body", "w", "body.lora_a", "body.lora_b")
        return Adapter(*names, self.shape, self.groups, R, self.rank, 3.0, layout, alpha, self.pairs)

    def inputs(self) -> Arrays:
        shape_a, shape_b = adapter_shapes(self.shape, self.rank, self.pairs)
        alpha = np.array([2.5], np.float32)
        frozen = {"x": normal(2, self.c_in, *self.size), "w": normal(*self.shape, seed=1), "b": normal(self.c_out)}
        return {**frozen, "lora_a": normal(*shape_a, seed=2), "lora_b": normal(*shape_b, seed=3), "alpha": alpha}

    def model(self) -> ir.Model:
        """y = Conv(x, w, b) alone, or y = Gemm(x, w, b)."""
        tensors = {name: value for name, value in self.inputs().items() if name in "xwb"}
        if not self.kernel:
            return graph_of("y = Gemm <transB = 1> (x, w, b)", tensors, fixed=["w", "b"])
        pads = list(self.of("begins") + self.of("ends"))
        attributes = {"strides": list(self.of("strides")), "dilations": list(self.of("dilations")), "pads": pads}
        text = ", ".join(f"{name} = {value}" for name, value in attributes.items())
        return graph_of(f"y = Conv <{text}, group = {self.groups}> (x, w, b)", tensors, fixed=["w", "b"])

    def reference(self, t: dict[str, torch.Tensor], layout: Layout, scale: torch.Tensor | float) -> torch.Tensor:
        """The layer with W + delta."""
        weight = t["w"] + delta(t["lora_a"], t["lora_b"], self.shape, scale, layout, pairs=self.pairs)
        if not self.kernel:
            return torch.nn.functional.linear(t["x"], weight, t["b"])
        pads = [p for pair in zip(reversed(self.of("begins")), reversed(self.of("ends")), strict=True) for p in pair]
        function = torch.conv2d if len(self.kernel) == 2 else torch.conv1d
        x = torch.nn.functional.pad(t["x"], pads)
        how = {"stride": self.of("strides"), "dilation": self.of("dilations"), "groups": self.groups}
        return function(x, weight, t["b"], **how)


LAYERS = {
    "3x3": Layer(begins=(1, 1), ends=(1, 1)),
    "1x1": Layer(kernel=(1, 1)),
    "1x1 stride 2": Layer(kernel=(1, 1), strides=(2, 2)),
    "1x3": Layer(kernel=(1, 3), begins=(0, 1), ends=(0, 1)),
    "3x1": Layer(kernel=(3, 1), begins=(1, 0), ends=(1, 0)),
    "5x3, stride 2x1, asymmetric": Layer(kernel=(5, 3), strides=(2, 1), begins=(1, 0), ends=(3, 2)),
    "stride 2": Layer(strides=(2, 2), begins=(1, 1), ends=(1, 1)),
    "dilation 2x1": Layer(dilations=(2, 1), begins=(2, 0), ends=(1, 1)),
    "groups": Layer(groups=2, begins=(1, 1), ends=(1, 1)),
    "depthwise": Layer(c_in=4, c_out=4, groups=4, begins=(1, 1), ends=(1, 1)),
    "rank above the channels": Layer(c_in=2, c_out=2, rank=5),
    "fully connected": Layer(kernel=(), size=(), c_in=7),
    "fully connected, rank above the channels": Layer(kernel=(), size=(), c_out=3, rank=5),
    "1-D": Layer(kernel=(3,), size=(9,), begins=(1,), ends=(1,)),
    "1-D, groups, stride 2": Layer(kernel=(4,), size=(9,), groups=2, strides=(2,), begins=(2,)),
    "1-D, one tap": Layer(kernel=(1,), size=(9,)),
    "shifts": Layer(c_in=9, c_out=10, begins=(1, 1), ends=(1, 1), rank=1),
    "shifts, 5x3, stride 2x1": Layer(
        kernel=(5, 3), c_in=9, c_out=15, strides=(2, 1), begins=(1, 0), ends=(3, 2), rank=1
    ),
    "shifts, stride 2, rank 2": Layer(c_in=9, c_out=8, strides=(2, 2), begins=(1, 1), ends=(1, 1), rank=2),
    "shifts, dilation 2x1": Layer(c_in=16, c_out=17, dilations=(2, 1), begins=(2, 0), ends=(1, 1), rank=2),
    "shifts, 1-D": Layer(kernel=(3,), size=(9,), c_in=8, begins=(1,), ends=(1,), rank=1),
}


def adapted(layer: Layer, adapter: Adapter, form: Form) -> tuple[ir.Model, Tape]:
    """The convolution with its adapter, whose tensors are inputs lora_a, lora_b and, where it is learned, alpha."""
    model, given = layer.model(), layer.inputs()
    tape = Tape(model.graph)
    a, b = (tape.input(name, given[name].shape) for name in ("lora_a", "lora_b"))
    scale: ir.Value | float = adapter.alpha / R
    if adapter.lora_alpha is not None:
        scale = tape.op("Mul", tape.input("alpha", (1,)), 1 / R, shape=(1,))
    add_adapters(tape, {"w": adapter}, {"w": Factors(a, b, scale)}, form_of(form))
    return model, tape


def expected(layer: Layer, adapter: Adapter, wrt: tuple[str, ...]) -> tuple[np.ndarray, Arrays]:
    """PyTorch in float64: the output, and the gradients of sum(y * y) / 2."""
    t = {name: torch.tensor(value, dtype=torch.float64) for name, value in layer.inputs().items()}
    for name in wrt:
        t[name].requires_grad_()
    scale = t["alpha"] / R if adapter.lora_alpha is not None else adapter.alpha / R
    y = layer.reference(t, adapter.arrangement, scale)
    (y * y / 2).sum().backward()
    return y.detach().numpy(), {name: t[name].grad.numpy() for name in wrt}


def check(layer: Layer, layout: Layout, form: Form, *, learnable: bool = False) -> None:
    adapter = layer.adapter(layout, learnable=learnable)
    wrt = ("x", "lora_a", "lora_b", *(("alpha",) if learnable else ()))
    model, tape = adapted(layer, adapter, form)
    y = model.graph.outputs[0]
    inputs = {value.name: value for value in model.graph.inputs}
    gradients = differentiate(tape, y, [inputs[name] for name in wrt], seed=y)
    model.graph.outputs.extend(gradients)
    found = run(model, layer.inputs())
    value, slopes = expected(layer, adapter, wrt)
    for name, got, wanted in zip(("y", *wrt), found, (value, *slopes.values()), strict=True):
        assert got.shape == wanted.shape, name
        assert np.abs(got - wanted).max() <= TOLERANCE * np.abs(wanted).max(), name


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_are_those_of_the_updated_weight(name: str, layout: Layout, form: Form) -> None:
    check(LAYERS[name], layout, form)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_a_learned_alpha_scales_the_adapter_and_gets_its_gradient(layout: Layout, form: Form) -> None:
    check(LAYERS["stride 2"], layout, form, learnable=True)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    axes = draw(st.integers(0, 2))
    limits = {
        "size": (3, 8),
        "kernel": (1, 4),
        "strides": (1, 3),
        "dilations": (1, 2),
        "begins": (0, 3),
        "ends": (0, 3),
    }
    each = {name: tuple(draw(st.integers(*limit)) for _ in range(axes)) for name, limit in limits.items()}
    for i in range(axes):
        assume(each["size"][i] + each["begins"][i] + each["ends"][i] > each["dilations"][i] * (each["kernel"][i] - 1))
    groups, rank = draw(st.integers(1, 3 if axes else 1)), draw(st.integers(1, 4))
    c_in, c_out = (groups * draw(st.integers(1, 3)) for _ in range(2))
    return Layer(c_in=c_in, c_out=c_out, groups=groups, rank=rank, **each)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(layer=layers(), layout=st.sampled_from(LAYOUTS), form=st.sampled_from(FORMS))
def test_any_layer_can_be_adapted_in_either_form(layer: Layer, layout: Layout, form: Form) -> None:
    check(layer, layout, form)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(layer=layers(), layout=st.sampled_from(LAYOUTS), learnable=st.booleans(), data=st.data())
def test_any_layer_can_be_adapted_by_several_pairs_of_factors(
    layer: Layer, layout: Layout, learnable: bool, data: st.DataObject
) -> None:
    divisors = [n for n in range(1, layer.c_out + 1) if layer.c_out % n == 0]
    pairs = data.draw(st.sampled_from(divisors))
    check(dataclasses.replace(layer, pairs=pairs), layout, "weight", learnable=learnable)


@pytest.mark.parametrize("name", ["3x3", "groups", "1-D, groups, stride 2", "fully connected"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_branch_of_several_pairs_is_refused_by_name_and_auto_takes_the_weight(name: str, layout: Layout) -> None:
    layer = dataclasses.replace(LAYERS[name], pairs=LAYERS[name].c_out)
    with pytest.raises(ConversionError, match=r"form branch: body has an adapter of 6 pairs.*take form weight or auto"):
        adapted(layer, layer.adapter(layout), "branch")
    assert form_of("auto")(layer.adapter(layout), Geometry.without_axes(4, 6)) == "weight"


def test_the_branch_of_a_fully_connected_layer_never_forms_a_matrix_of_the_weights_shape() -> None:
    layer = Layer(kernel=(), size=(), c_in=16, c_out=12)
    model, _ = adapted(layer, layer.adapter("spatial"), "branch")
    trunk, down, up = nodes_of(model.graph, "Gemm")
    assert (trunk.inputs[1].name, trunk.inputs[1].const_value is None) == ("w", False)
    assert (dims(down.outputs[0]), dims(up.outputs[0])) == (("batch", 3), ("batch", 12))
    assert [o.name for node in model.graph for o in node.outputs if dims(o) == layer.shape] == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name",
    ["3x3", "1x1 stride 2", "5x3, stride 2x1, asymmetric", "groups", "1-D, groups, stride 2", "fully connected"],
)
def test_every_value_has_the_shape_that_the_graph_says(name: str, layout: Layout) -> None:
    layer = LAYERS[name]
    kernel_wise = dataclasses.replace(layer, pairs=layer.c_out)
    for form, chosen in (*((form, layer) for form in FORMS), ("weight", kernel_wise)):
        model, _ = adapted(chosen, chosen.adapter(layout), form)
        values = [output for node in model.graph for output in node.outputs]
        model.graph.outputs[:] = values
        for value, found in zip(values, run(model, chosen.inputs()), strict=True):
            assert tuple(2 if d == "batch" else d for d in dims(value)) == found.shape, value.name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_branch_never_forms_the_update_of_the_weight(layout: Layout) -> None:
    layer = Layer(c_in=16, c_out=16, begins=(1, 1), ends=(1, 1))
    computed = {}
    for form in FORMS:
        model, _ = adapted(layer, layer.adapter(layout), form)
        computed[form] = [o.name for node in model.graph for o in node.outputs if dims(o) == layer.shape]
    assert computed["branch"] == []
    assert len(computed["weight"]) >= 2  # the update, and its sum with the weight


def test_the_trunk_keeps_its_constant_weight_beside_thin_convolutions() -> None:
    layer = LAYERS["3x3"]
    model, _ = adapted(layer, layer.adapter("spatial"), "branch")
    trunk, down, up = nodes_of(model.graph, "Conv")
    assert (trunk.inputs[1].name, trunk.inputs[1].const_value is None) == ("w", False)
    assert (dims(down.inputs[1]), dims(up.inputs[1])) == ((3, 4, 1, 3), (6, 3, 3, 1))


@pytest.mark.parametrize("form", FORMS)
def test_only_the_named_layers_change(form: Form) -> None:
    tensors = {"x": normal(2, 4, 5, 5), "w": normal(4, 4, 3, 3, seed=1), "v": normal(4, 4, 3, 3, seed=2)}
    model = graph_of("h = Conv (x, v)\n y = Conv (h, w)", tensors, fixed=["w", "v"])
    layer = Layer(c_out=4)
    tape = Tape(model.graph)
    a, b = (tape.constant(layer.inputs()[name]) for name in ("lora_a", "lora_b"))
    add_adapters(tape, {"w": layer.adapter("paper")}, {"w": Factors(a, b, 0.5)}, form_of(form))
    change = delta(layer.inputs()["lora_a"], layer.inputs()["lora_b"], (4, 4, 3, 3), 0.5, "paper")
    hidden = torch.conv2d(*(torch.tensor(tensors[name]) for name in "xv"))
    wanted = torch.conv2d(hidden, torch.tensor(tensors["w"] + change)).numpy()
    np.testing.assert_allclose(run(model, tensors)[0], wanted, atol=1e-4 * np.abs(wanted).max())


def test_weights_that_no_layer_uses_are_named() -> None:
    layer = LAYERS["3x3"]
    model = layer.model()
    adapters = {name: layer.adapter("paper") for name in ("w", "lost.weight", "gone.weight")}
    with pytest.raises(ConversionError, match=r"no layer of the graph uses gone\.weight, lost\.weight"):
        add_adapters(Tape(model.graph), adapters, {}, form_of("branch"))


@pytest.mark.parametrize("choice", FORM_CHOICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_form_is_the_one_asked_for_and_auto_picks_one(choice: str, layout: Layout) -> None:
    layer = LAYERS["3x3"]
    geometry = Geometry.of(nodes_of(layer.model().graph, "Conv")[0])
    found = functools.partial(form_of, choice)()(layer.adapter(layout), geometry)
    assert found in (FORMS if choice == "auto" else (choice,))
