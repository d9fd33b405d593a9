"""Reading users' ONNX files."""

import numpy as np
import onnx
import pytest
from exporter_graphs import assert_same, cnn, image, in_torch, legacy_export, outputs

from lorac_exporters.canonical import canonicalize
from lorac_exporters.onnx_file import read_graph
from lorac_runtime.errors import ConversionError

TEXT = '<ir_version: 8, opset_import: ["": {opset}]> g (float[2,3] x) => (float[2,3] y) {{ {body} }}'


def written(path, *, opset: int = 18, body: str = "y = Relu (x)"):
    onnx.save(onnx.parser.parse_model(TEXT.format(opset=opset, body=body)), path)
    return path


@pytest.mark.parametrize("opset", [7, 11, 13, 18, 20])
def test_files_of_other_opsets_are_converted(tmp_path, opset: int) -> None:
    model = read_graph(written(tmp_path / "m.onnx", opset=opset))
    assert model.opset_imports == {"": 18}
    np.testing.assert_array_equal(outputs(model, image(2, 3)), np.maximum(image(2, 3), 0))


def test_operators_whose_meaning_changed_keep_their_function(tmp_path) -> None:
    body = "a = Unsqueeze <axes = [0]> (x) b = Squeeze <axes = [0]> (a) y = Softmax <axis = 1> (b)"
    path = written(tmp_path / "m.onnx", opset=11, body=body)
    assert_same(outputs(read_graph(path), image(2, 3)), outputs(onnx.load(path), image(2, 3)), tolerance=1e-6)


def test_weights_in_a_file_beside_the_model_are_loaded(tmp_path) -> None:
    net = cnn()
    proto = legacy_export(net, (1, 3, 16, 16), opset_version=18)
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (tmp_path / "weights.bin").stat().st_size > 1000
    canonical = canonicalize(read_graph(tmp_path / "m.onnx"))
    assert_same(outputs(canonical.model, image(2, 3, 16, 16)), in_torch(net, image(2, 3, 16, 16)))


def test_missing_weights_beside_the_model_are_named(tmp_path) -> None:
    proto = legacy_export(cnn(), (1, 3, 16, 16), opset_version=18)
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ConversionError, match=r"weights\.bin"):
        read_graph(tmp_path / "m.onnx")


def test_opsets_that_are_too_old_are_refused_with_advice(tmp_path) -> None:
    with pytest.raises(
        ConversionError, match="uses opset 6, expected 7 or newer: export the model again with opset 18"
    ):
        read_graph(written(tmp_path / "m.onnx", opset=6))


def test_what_the_converter_cannot_do_is_refused_with_both_opsets(tmp_path) -> None:
    path = written(tmp_path / "m.onnx", opset=20, body="y = Gelu (x)")
    with pytest.raises(ConversionError, match="uses opset 20 and cannot be converted to 18"):
        read_graph(path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 64])
def test_files_that_are_no_models_are_refused(tmp_path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ConversionError, match="not an ONNX model"):
        read_graph(tmp_path / "m.onnx")


def test_a_missing_file_and_a_folder_are_refused(tmp_path) -> None:
    with pytest.raises(ConversionError, match=r"none\.onnx not found"):
        read_graph(tmp_path / "none.onnx")
    with pytest.raises(ConversionError, match="cannot be read"):
        read_graph(tmp_path)


def test_a_file_that_was_cut_short_is_refused(tmp_path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(legacy_export(cnn(), (1, 3, 16, 16)), path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ConversionError, match="cut short"):
        read_graph(path)
