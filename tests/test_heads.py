"""Finding, normalising and replacing the classifier."""

import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exporter_graphs import assert_same, constants, from_text, image, numbers, outputs

from lorac_exporters.canonical import canonicalize, with_new_head
from lorac_exporters.heads import find_head, remove_softmax, replace_head
from lorac_runtime.errors import ConversionError

BODY = "c = Conv (x, c.weight, c.bias) g = GlobalAveragePool (c) f = Flatten (g) "
WEIGHTS = numbers(c_weight=(6, 3, 1, 1), c_bias=(6,))
GEMM = BODY + "y = Gemm <transB = 1> (f, fc.weight, fc.bias)"
TAILS = {
    "nothing": "y = Gemm <transB = 1> (f, fc.weight, fc.bias)",
    "LogSoftmax": "z = Gemm <transB = 1> (f, fc.weight, fc.bias) y = LogSoftmax <axis = 1> (z)",
    "Reshape": "z = Gemm <transB = 1> (f, fc.weight, fc.bias) y = Reshape (z, shape)",
}


def fc(rows: int = 5, columns: int = 6) -> dict[str, np.ndarray]:
    return WEIGHTS | numbers(fc_weight=(rows, columns), fc_bias=(5,)) | constants(shape=[-1, 5])


@pytest.mark.parametrize("tail", TAILS)
def test_the_head_is_found_behind_what_only_reshapes_or_normalises(tail: str) -> None:
    head = find_head(from_text(BODY + TAILS[tail], weights=fc()))
    assert (head.node.op_type, head.weight, head.bias) == ("Gemm", "fc.weight", "fc.bias")
    assert (head.classes, head.transposed) == (5, False)


def test_the_last_of_two_linear_layers_is_the_head() -> None:
    body = (
        BODY + "h = Gemm <transB = 1> (f, h.weight, h.bias) r = Relu (h) y = Gemm <transB = 1> (r, fc.weight, fc.bias)"
    )
    weights = fc(columns=7) | numbers(h_weight=(7, 6), h_bias=(7,))
    assert find_head(from_text(body, weights=weights)).weight == "fc.weight"


def test_a_pointwise_convolution_before_the_pooling_is_a_head() -> None:
    body = "c = Conv (x, c.weight, c.bias) h = Conv (c, h.weight, h.bias) r = Relu (h) "
    body += "g = GlobalAveragePool (r) y = Flatten (g)"
    weights = WEIGHTS | numbers(h_weight=(5, 6, 1, 1), h_bias=(5,))
    head = find_head(from_text(body, weights=weights))
    assert (head.node.op_type, head.weight, head.classes, head.transposed) == ("Conv", "h.weight", 5, False)


def test_a_weight_stored_features_first_is_said_to_be_transposed() -> None:
    head = find_head(from_text(BODY + "y = Gemm (f, fc.weight, fc.bias)", weights=fc(6, 5)))
    assert (head.classes, head.transposed) == (5, True)


UNFIT = {
    "a sigmoid": ("z = Gemm <transB = 1> (f, fc.weight, fc.bias) y = Sigmoid (z)", "comes from Sigmoid"),
    "no linear layer": ("y = Flatten (f)", "comes from Conv"),
    "a computed weight": ("w = Exp (f) t = Transpose (f) z = MatMul (t, w) y = MatMul (f, z)", "computed by the graph"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_outputs_that_no_classifier_gives_are_refused(name: str) -> None:
    tail, text = UNFIT[name]
    body = BODY.replace("c.weight", "k.weight")
    weights = fc() | numbers(k_weight=(6, 3, 3, 3))
    model = from_text(body + tail, weights=weights, y="float[batch,6] y")
    with pytest.raises(ConversionError, match=text):
        find_head(model)


MATMULS = {
    "Add behind": ("m = MatMul (f, fc.weight) y = Add (m, fc.bias)", {"fc.bias": (5,)}),
    "Add in front": ("m = MatMul (f, fc.weight) y = Add (fc.bias, m)", {"fc.bias": (5,)}),
    "a row as bias": ("m = MatMul (f, fc.weight) y = Add (m, fc.bias)", {"fc.bias": (1, 5)}),
    "a number as bias": ("m = MatMul (f, fc.weight) y = Add (m, fc.bias)", {"fc.bias": ()}),
    "no bias": ("y = MatMul (f, fc.weight)", {}),
    "Gemm without bias": ("y = Gemm (f, fc.weight)", {}),
    "Gemm with a row as bias": ("y = Gemm (f, fc.weight, fc.bias)", {"fc.bias": (1, 5)}),
}


@pytest.mark.parametrize("name", MATMULS)
def test_every_linear_head_becomes_a_gemm_with_a_bias_for_each_class(name: str) -> None:
    tail, shapes = MATMULS[name]
    weights = fc(6, 5)
    del weights["fc.bias"]
    weights |= {k: np.full(v, 0.7, np.float32) for k, v in shapes.items()}
    model = from_text(BODY + tail, weights=weights)
    canonical = canonicalize(model)
    assert [n.op_type for n in canonical.model.graph] == ["Conv", "GlobalAveragePool", "Flatten", "Gemm"]
    head = find_head(canonical.model)
    assert (head.weight, head.bias, head.classes) == ("fc.weight", "fc.bias", 5)
    assert canonical.values["fc.bias"].shape == (5,)
    assert canonical.added == (frozenset() if shapes else {"fc.bias"})
    np.testing.assert_array_equal(canonical.values["fc.weight"], weights["fc.weight"])
    assert_same(outputs(canonical.model, image(3, 3, 8, 8)), outputs(model, image(3, 3, 8, 8)), tolerance=1e-6)


def test_a_product_over_more_than_rows_is_refused() -> None:
    body = "c = Conv (x, c.weight, c.bias) r = Reshape (c, rows) m = MatMul (r, fc.weight) y = Squeeze (m, one)"
    weights = WEIGHTS | numbers(fc_weight=(384, 5)) | constants(rows=[-1, 1, 384], one=[1])
    with pytest.raises(ConversionError, match=r"expected \(batch, features\)"):
        canonicalize(from_text(body, weights=weights))


CONV_HEAD = (
    "c = Conv (x, c.weight, c.bias) h = Conv (c, fc.weight, fc.bias) g = GlobalAveragePool (h) y = Reshape (g, shape)"
)
REPLACED = {
    "Gemm": (GEMM, fc(), (8, 6)),
    "Gemm, features first": (BODY + "y = Gemm (f, fc.weight, fc.bias)", fc(6, 5), (6, 8)),
    "convolution": (CONV_HEAD, fc() | numbers(fc_weight=(5, 6, 1, 1)), (8, 6, 1, 1)),
}


@pytest.mark.parametrize("name", REPLACED)
def test_a_new_head_has_the_new_width_and_starts_like_a_linear_layer(name: str) -> None:
    body, weights, shape = REPLACED[name]
    model = canonicalize(from_text(body, weights=weights)).model
    replace_head(model, 8, seed=3)
    result = outputs(model, image(4, 3, 8, 8))
    assert result.shape == (4, 8)
    assert str(model.graph.outputs[0].shape) == "[batch,8]"
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    values = canonicalize(model).values
    assert values["fc.weight"].shape == shape
    assert np.abs(values["fc.weight"]).max() <= 1 / math.sqrt(6)
    assert values["fc.weight"].std() == pytest.approx(1 / math.sqrt(6 * 3), rel=0.25)
    np.testing.assert_array_equal(values["fc.bias"], np.zeros(8))


def test_both_forms_of_a_network_get_the_same_new_head() -> None:
    norm = numbers(n_weight=(6,), n_bias=(6,), n_running_mean=(6,), n_running_var=(6,))
    tensors = "n.weight, n.bias, n.running_mean, n.running_var"
    body = GEMM.replace("g = Gl", f"d = BatchNormalization (c, {tensors}) g = Gl").replace("(c) f", "(d) f")
    model = from_text(body, weights=fc() | norm)
    forms = [with_new_head(canonicalize(model, fold=fold), 7, seed=5) for fold in (True, False)]
    first, second = (outputs(form.model, image(3, 3, 8, 8)) for form in forms)
    assert first.shape == (3, 7)
    assert_same(first, second, tolerance=1e-5)
    assert forms[0].changes[-1] == "fc.weight: a new classifier for 7 classes"
    np.testing.assert_array_equal(forms[0].values["fc.weight"], forms[1].values["fc.weight"])
    assert forms[0].values["fc.bias"].shape == (7,)
    assert canonicalize(model).values["fc.bias"].shape == (5,)


def test_the_seed_decides_the_new_head() -> None:
    made = []
    for seed in (1, 1, 2):
        model = canonicalize(from_text(GEMM, weights=fc())).model
        replace_head(model, 3, seed=seed)
        made.append(outputs(model, image(2, 3, 8, 8)))
    np.testing.assert_array_equal(made[0], made[1])
    assert np.abs(made[0] - made[2]).max() > 1e-3


def test_a_head_of_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        replace_head(from_text(GEMM, weights=fc()), 1, seed=0)


SOFTMAX = "z = Gemm <transB = 1> (f, fc.weight, fc.bias) y = Softmax <axis = 1> (z)"


def test_probabilities_are_refused_with_what_to_do() -> None:
    with pytest.raises(ConversionError, match=r"made probabilities by Softmax .*: export the model without"):
        find_head(from_text(BODY + SOFTMAX, weights=fc()))


@pytest.mark.parametrize("tail", ["", " p = Reshape (q, shape)"])
def test_a_closing_softmax_can_be_taken_off(tail: str) -> None:
    body = BODY + (SOFTMAX.replace(" y =", " q =") + tail.replace("p =", "y =") if tail else SOFTMAX)
    model = canonicalize(from_text(body, weights=fc())).model
    probabilities = outputs(model, image(3, 3, 8, 8))
    assert remove_softmax(model)
    logits = outputs(model, image(3, 3, 8, 8))
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    assert_same(shifted / shifted.sum(1, keepdims=True), probabilities, tolerance=1e-6)
    assert [v.name for v in model.graph.outputs] == ["y"]
    assert find_head(model).weight == "fc.weight"
    assert not remove_softmax(model)
