"""Scaling and normalising inside the graph."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exporter_graphs import assert_same, from_text, numbers, outputs

from lorac_exporters.canonical import canonicalize
from lorac_exporters.preprocessing import add_preprocessing
from lorac_runtime.errors import ConversionError
from lorac_runtime.manifest import InputSpec

SPEC = InputSpec("x", (3, 8, 10), 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), in_graph=True)
BODY = "c = Conv (x, c.weight) g = GlobalAveragePool (c) f = Flatten (g) y = Gemm <transB = 1> (f, fc.weight, fc.bias)"
WEIGHTS = numbers(c_weight=(6, 3, 3, 3), fc_weight=(5, 6), fc_bias=(5,))


def model(x: str = "float[batch,3,8,10] x") -> ir.Model:
    return canonicalize(from_text(BODY, weights=WEIGHTS, x=x)).model


def test_raw_images_give_what_normalised_ones_gave() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 10, 3), dtype=np.uint8)
    normalised = (pixels / 255 - SPEC.mean) / SPEC.std
    expected = outputs(model(), normalised.transpose(0, 3, 1, 2).astype(np.float32))
    raw = model()
    add_preprocessing(raw, SPEC)
    assert_same(outputs(raw, pixels), expected, tolerance=1e-5)
    assert np.abs(outputs(raw, pixels + 1) - expected).max() > 1e-4


def test_the_input_keeps_its_name_and_says_what_it_takes() -> None:
    raw = model()
    add_preprocessing(raw, SPEC)
    (image,) = raw.graph.inputs
    assert (image.name, image.dtype, str(image.shape)) == ("x", ir.DataType.UINT8, "[batch,8,10,3]")
    assert [n.op_type for n in raw.graph][:5] == ["Cast", "Mul", "Add", "Transpose", "Conv"]
    onnx.checker.check_model(ir.to_proto(raw), full_check=True)


def test_parameters_keep_their_names() -> None:
    raw = model()
    add_preprocessing(raw, SPEC)
    assert set(WEIGHTS) <= set(raw.graph.initializers)


@pytest.mark.parametrize("other", ["float[batch,3,8,8] x", "float[batch,3,8,10] pixels"])
def test_a_graph_with_another_input_is_refused(other: str) -> None:
    body = BODY.replace("(x,", f"({other.split()[1]},")
    graph = canonicalize(from_text(body, weights=WEIGHTS, x=other)).model
    with pytest.raises(ConversionError, match="expected 'x' float"):
        add_preprocessing(graph, SPEC)


def test_adding_it_twice_is_refused() -> None:
    raw = model()
    add_preprocessing(raw, SPEC)
    with pytest.raises(ConversionError, match="takes 'x' uint8"):
        add_preprocessing(raw, SPEC)
