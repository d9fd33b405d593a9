"""Operators written out for training compute the same, and are gone."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exporter_graphs import assert_same, image, outputs
from operator_bodies import DIFFERENTIABLE, REFUSED, REWRITTEN, operator_model

from lorac_exporters.canonical import canonicalize
from lorac_exporters.graph_tools import nodes_of
from lorac_exporters.preflight import untrainable
from lorac_exporters.rewrites import RULES, rewrite_for_training

ENGINE = "onnxruntime-training"


def feature_maps(model: ir.Model, x: np.ndarray) -> np.ndarray:
    """What flows into the head, element by element: rounding cannot hide in a sum."""
    twin = model.clone()
    value = nodes_of(twin.graph, "Flatten")[-1].outputs[0]
    twin.graph.outputs[:] = [value]
    return outputs(twin, x)


@pytest.mark.parametrize("name", REWRITTEN)
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_the_written_out_form_computes_the_same_number_for_number(name: str, size: float) -> None:
    model = canonicalize(operator_model(REWRITTEN[name])).model
    x = size * image(3, 3, 8, 8)
    before = feature_maps(model, x)
    operator = name.split(",")[0].split(" ")[0]
    changes = rewrite_for_training(model)
    assert len(changes) == 1
    assert changes[0].startswith(f"{operator} ")
    left = [node for node in nodes_of(model.graph, *RULES) if node.op_type != "Pad"]
    assert left == []
    rounding = 1e-6 * max(size, np.abs(before).max())  # of the convolution, whose kernel depends on what follows
    np.testing.assert_allclose(feature_maps(model, x), before, rtol=0, atol=rounding)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize("name", REWRITTEN)
def test_the_written_out_form_can_be_trained_and_the_original_cannot(name: str) -> None:
    model = canonicalize(operator_model(REWRITTEN[name])).model
    assert untrainable(model, ["w"], engine=ENGINE) != ()
    rewrite_for_training(model)
    assert untrainable(model, ["w"], engine=ENGINE) == ()


@pytest.mark.parametrize("name", DIFFERENTIABLE | REFUSED)
def test_other_operators_are_left_alone(name: str) -> None:
    model = canonicalize(operator_model((DIFFERENTIABLE | REFUSED)[name])).model
    before = [node.name for node in model.graph]
    assert rewrite_for_training(model) == ()
    assert [node.name for node in model.graph] == before


def test_every_rule_is_tested_here() -> None:
    assert {name.split(",")[0].split(" ")[0] for name in REWRITTEN} == RULES.keys()


def test_the_base_keeps_its_operators_when_a_copy_is_rewritten() -> None:
    base = canonicalize(operator_model(REWRITTEN["HardSwish"])).model
    copy = base.clone()
    rewrite_for_training(copy)
    assert len(nodes_of(base.graph, "HardSwish")) == 1
    assert_same(outputs(copy, image(2, 3, 8, 8)), outputs(base, image(2, 3, 8, 8)), tolerance=1e-6)


def test_several_nodes_of_one_kind_share_no_name() -> None:
    body = "a = HardSwish (c) b = HardSwish (a) y = HardSwish (b)"
    model = canonicalize(operator_model(body)).model
    expected = outputs(model, image(2, 3, 8, 8))
    assert len(rewrite_for_training(model)) == 3
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    assert_same(outputs(model, image(2, 3, 8, 8)), expected, tolerance=1e-6)
    assert rewrite_for_training(model) == ()
