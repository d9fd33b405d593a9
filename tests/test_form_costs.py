"""The estimate that chooses an adapter's form: its counts are those of the graphs, its choices those measured."""

from __future__ import annotations

import dataclasses
import math

import onnx_ir as ir
import pytest
from gradient_cases import graph_of, normal

from lorac_exporters.branches import FORMS, Factors, Form, add_adapters, form_of
from lorac_exporters.form_costs import SECONDS, Work, branch_work, cheaper_form, weight_work
from lorac_exporters.gradients.geometry import Geometry
from lorac_exporters.gradients.reverse import differentiate
from lorac_exporters.gradients.tape import Tape, dims, sizes
from lorac_exporters.graph_tools import convolutions, int_attribute, need
from lorac_runtime.delta import LAYOUTS, Layout, adapter_shapes
from lorac_runtime.manifest import Adapter

WORK = {"branch": branch_work, "weight": weight_work}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution, or with ``kernel`` 0 a fully connected layer."""

    c_in: int
    c_out: int
    size: int
    kernel: int
    rank: int
    stride: int = 1
    groups: int = 1
    pairs: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (self.c_out, self.c_in // self.groups, *([self.kernel] * 2 if self.kernel else []))

    def adapter(self, layout: Layout = "spatial") -> Adapter:
        return Adapter(
            "body", "w", "a", "b", self.shape, self.groups, self.rank, self.rank, 1.0, layout, None, self.pairs
        )

    def model(self) -> ir.Model:
        if not self.kernel:
            tensors = {"x": normal(2, self.c_in), "w": normal(*self.shape)}
            return graph_of("y = Gemm <transB = 1> (x, w)", tensors, fixed=["w"])
        half = self.kernel // 2
        how = f"strides = [{self.stride}, {self.stride}], pads = [{half}, {half}, {half}, {half}]"
        tensors = {"x": normal(2, self.c_in, self.size, self.size), "w": normal(*self.shape)}
        return graph_of(f"y = Conv <{how}, group = {self.groups}> (x, w)", tensors, fixed=["w"])

    def geometry(self) -> Geometry:
        if not self.kernel:
            return Geometry.without_axes(self.c_in, self.c_out)
        (node,) = convolutions(self.model().graph)
        return Geometry.of(node)

    def cheaper(self, batch: int, layout: Layout = "spatial") -> Form:
        return cheaper_form(self.adapter(layout), self.geometry(), batch)


def step(layer: Layer, layout: Layout, form: Form) -> ir.Graph:
    """Forward and the gradients of x and the adapter's tensors."""
    model = layer.model()
    tape = Tape(model.graph)
    shapes = adapter_shapes(layer.shape, layer.rank, layer.pairs)
    a, b = (tape.input(name, shape) for name, shape in zip("ab", shapes, strict=True))
    add_adapters(tape, {"w": layer.adapter(layout)}, {"w": Factors(a, b, 0.5)}, form_of(form))
    y = model.graph.outputs[0]
    differentiate(tape, y, [model.graph.inputs[0], a, b], seed=y)
    return model.graph


def multiplications(graph: ir.Graph, batch: int) -> int:
    """Multiply-adds of its convolutions and matrix products."""

    def numbers(value: ir.Value) -> list[int]:
        return [size if isinstance(size, int) else batch for size in dims(value)]

    def elements(value: ir.Value) -> int:
        return math.prod(numbers(value))

    total = 0
    for node in graph:
        if node.op_type == "Conv":
            total += elements(node.outputs[0]) * math.prod(sizes(need(node.inputs[1]), 1))
        if node.op_type in ("MatMul", "Gemm"):
            inner = -2 if int_attribute(node, "transA", 0) else -1
            total += elements(node.outputs[0]) * numbers(need(node.inputs[0]))[inner]
    return total


COUNTED = {
    "3x3": Layer(6, 10, 7, 3, 4),
    "3x3, fewer channels out": Layer(10, 6, 7, 3, 4),
    "1x1": Layer(6, 10, 7, 1, 4),
    "5x5": Layer(10, 12, 9, 5, 5),
    "groups": Layer(6, 12, 7, 3, 4, groups=2),
    "depthwise": Layer(6, 6, 7, 3, 2, groups=6),
    "fully connected": Layer(6, 10, 0, 0, 4),
}


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_the_estimate_counts_the_multiplications_of_the_graph(name: str, layout: Layout, form: Form) -> None:
    layer = COUNTED[name]
    counted = WORK[form](layer.adapter(layout), layer.geometry(), 3)
    assert counted.constant + counted.narrow + counted.changing == multiplications(step(layer, layout, form), 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_updated_weight_of_several_pairs_costs_as_much_as_that_of_one(layout: Layout) -> None:
    for pairs in (1, 2, 10):
        layer = Layer(6, 10, 7, 3, 4, pairs=pairs)
        counted = weight_work(layer.adapter(layout), layer.geometry(), 3)
        assert counted.changing == multiplications(step(layer, layout, "weight"), 3)


def test_several_pairs_have_one_form_also_where_a_branch_would_be_cheaper() -> None:
    assert NETWORKS["resnet18 64"].cheaper(32) == "branch"
    assert dataclasses.replace(NETWORKS["resnet18 64"], pairs=64).cheaper(32) == "weight"


@pytest.mark.parametrize(
    ("rank", "batch", "form"), [(4, 32, "branch"), (256, 32, "branch"), (4, 1024, "branch"), (256, 1024, "weight")]
)
def test_a_fully_connected_layer_forms_its_update_where_the_batch_outweighs_it(
    rank: int, batch: int, form: Form
) -> None:
    assert Layer(512, 512, 0, 0, rank).cheaper(batch) == form


def test_a_branch_leaves_the_trunk_its_constant_weight() -> None:
    layer = Layer(32, 64, 8, 3, 4, stride=2)
    branch, weight = (WORK[form](layer.adapter(), layer.geometry(), 5) for form in FORMS)
    forward = 5 * 4 * 4 * 64 * 32 * 9
    assert branch.constant == 2 * forward
    assert weight.constant == weight.narrow == branch.narrow == 0
    assert weight.changing == 3 * forward + 3 * 4 * 64 * 32 * 9


def test_groups_of_few_channels_are_counted_apart() -> None:
    layer = Layer(32, 32, 8, 3, 2, groups=32)
    work = branch_work(layer.adapter(), layer.geometry(), 1)
    assert (work.constant, work.narrow) == (0, 2 * 8 * 8 * 32 * 9)


@pytest.mark.parametrize("form", FORMS)
def test_only_work_on_weights_does_not_grow_with_the_batch(form: Form) -> None:
    layer = Layer(32, 32, 8, 3, 4)
    one, two, three = (WORK[form](layer.adapter(), layer.geometry(), batch) for batch in (1, 2, 3))
    assert one.nodes == two.nodes
    assert (three.moved, three.copied, three.calls) == (3 * one.moved, 3 * one.copied, 3 * one.calls)
    assert three.changing - two.changing == two.changing - one.changing > 0


def test_time_is_the_sum_over_kinds_of_work() -> None:
    assert (Work(changing=2, nodes=1) + Work(nodes=2)).seconds(Work(changing=10, nodes=0.5, moved=7)) == 21.5


def test_every_kind_of_work_takes_time() -> None:
    assert all(time > 0 for time in dataclasses.astuple(SECONDS))


NETWORKS = {
    "resnet18 64": Layer(64, 64, 32, 3, 12),
    "resnet18 512": Layer(512, 512, 4, 3, 12),
    "resnet18 down": Layer(256, 512, 8, 3, 4, stride=2),
    "resnet20 16": Layer(16, 16, 32, 3, 4),
    "resnet20 64": Layer(64, 64, 8, 3, 12),
    "mobilenet_v2 64": Layer(64, 384, 14, 1, 4),
    "mobilenet_v2 960": Layer(960, 160, 7, 1, 4),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_branch_is_chosen_where_the_rank_is_low(name: str) -> None:
    assert NETWORKS[name].cheaper(32) == "branch"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "layer",
    [Layer(128, 128, 14, 3, 384), Layer(64, 64, 28, 5, 160), Layer(96, 96, 14, 3, 3, groups=96), Layer(8, 8, 28, 1, 8)],
)
def test_the_weight_is_updated_where_the_rank_is_its_own(layer: Layer, layout: Layout) -> None:
    assert layer.cheaper(32, layout) == "weight"


def test_the_paper_layout_pays_for_the_zeros_of_its_first_convolution() -> None:
    layer = Layer(64, 64, 16, 3, 24)
    assert (layer.cheaper(32, "spatial"), layer.cheaper(32, "paper")) == ("branch", "weight")


def test_the_batch_size_is_part_of_the_choice() -> None:
    layer = Layer(32, 32, 1, 3, 4, stride=2)
    choose = [form_of("auto", batch) for batch in (1, 128)]
    assert [form(layer.adapter("paper"), layer.geometry()) for form in choose] == ["branch", "weight"]
