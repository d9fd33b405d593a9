"""Names of parameters that an exporter only computed."""

import numpy as np
from exporter_graphs import from_text, numbers

from lorac_exporters.naming import batchnorm_layers, name_computed, parameter_name

MAPS = "float[batch,3,8,8] y"


def test_a_bn_layer_is_named_after_whichever_tensor_is_its_own() -> None:
    weights = numbers(v=(3,), b=(3,), n_running_mean=(3,), w_running_var=(3,))
    graph = from_text("y = BatchNormalization (x, v, b, n.running_mean, v)", weights=weights, y=MAPS).graph
    assert list(batchnorm_layers(graph).values()) == ["n"]


def test_two_bn_never_get_the_same_name() -> None:
    weights = numbers(c_weight=(3, 3, 1, 1), v=(3,))
    body = "a = Conv (x, c.weight) p = BatchNormalization (a, v, v, v, v) q = BatchNormalization (a, v, v, v, v) "
    graph = from_text(body + "y = Add (p, q)", weights=weights, y=MAPS).graph
    assert sorted(batchnorm_layers(graph).values()) == ["c.bn", "c.bn_1"]


def test_only_biases_and_bn_tensors_have_a_name_by_role() -> None:
    weights = numbers(c_weight=(3, 3, 1, 1), c_bias=(3,), v=(3, 1, 1))
    graph = from_text("a = Conv (x, c.weight, c.bias) y = Add (a, v)", weights=weights, y=MAPS).graph
    conv, add = graph
    assert [parameter_name(conv, i, {}) for i in (0, 1, 2)] == [None, None, "c.bias"]
    assert parameter_name(add, 1, {}) is None


def test_computed_parameters_are_renamed_and_the_files_own_are_not() -> None:
    weights = numbers(c_weight=(3, 3, 1, 1), d_weight=(3, 3, 1, 1), own=(3,)) | {"val_3": np.zeros(3, np.float32)}
    body = "a = Conv (x, c.weight, val_3) y = Conv (a, d.weight, own)"
    graph = from_text(body, weights=weights, y=MAPS).graph
    neutral = name_computed(graph, frozenset({"c.weight", "d.weight", "own"}))
    assert neutral == ["c.bias"]
    assert set(graph.initializers) == {"c.weight", "d.weight", "c.bias", "own"}


def test_a_computed_bias_that_is_not_zero_is_a_parameter() -> None:
    weights = numbers(c_weight=(3, 3, 1, 1), v=(3,))
    graph = from_text("y = Conv (x, c.weight, v)", weights=weights, y=MAPS).graph
    assert name_computed(graph, frozenset({"c.weight"})) == []
    assert set(graph.initializers) == {"c.weight", "c.bias"}
