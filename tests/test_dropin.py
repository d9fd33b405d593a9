"""The drop-in report on small ONNX files, with one promise broken at a time."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from lorac_exporters import dropin
from lorac_exporters.references import rounding_noise
from lorac_runtime.errors import ArtifactError
from lorac_runtime.manifest import Patch

TEXT = """
<ir_version: 9, opset_import: ["" : 18]>
net (float[batch, 3, 8, 8] input) => (float[batch, 4, 6, 6] logits) {
   hidden = Conv <kernel_shape = [3, 3], group = 1> (input, "conv.weight", "conv.bias")
   logits = Relu (hidden)
}
"""


def make(path: Path, edit: Callable[[onnx.ModelProto], None] = lambda _: None, seed: int = 0) -> Path:
    model = onnx.parser.parse_model(TEXT)
    rng = np.random.default_rng(seed)
    for name, shape in (("conv.weight", (4, 3, 3, 3)), ("conv.bias", (4,))):
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    edit(model)
    onnx.save(model, path)
    return path


def weight_patch(path: Path) -> Patch:
    content = path.read_bytes()
    weight = onnx.load(path).graph.initializer[0].raw_data
    return Patch("conv.weight", path.name, content.index(weight), len(weight), "float32", (4, 3, 3, 3))


def verdicts(report: dropin.DropinReport) -> dict[str, str]:
    return {check.name: check.verdict for check in report.checks}


def test_a_file_with_other_numbers_in_the_patched_weight_is_a_drop_in(tmp_path: Path) -> None:
    base = make(tmp_path / "base.onnx")
    patch = weight_patch(base)
    content = bytearray(base.read_bytes())
    content[patch.offset : patch.offset + 8] = np.array([1.5, -2.5], np.float32).tobytes()
    (tmp_path / "fused.onnx").write_bytes(content)
    report = dropin.compare_files(base, tmp_path / "fused.onnx", [patch])
    assert report.ok, report
    assert set(verdicts(report).values()) == {"pass"}
    assert "8 of its 432 bytes changed" in report.checks[-1].detail


def test_a_changed_byte_outside_the_patch_table_is_found(tmp_path: Path) -> None:
    base, fused = make(tmp_path / "base.onnx"), make(tmp_path / "fused.onnx", seed=1)
    report = dropin.compare_files(base, fused, [weight_patch(base)])
    assert verdicts(report)["bytes outside the patch table"] == "fail"
    assert not report.ok


def test_without_a_patch_table_the_bytes_count_as_not_checked(tmp_path: Path) -> None:
    report = dropin.compare_files(make(tmp_path / "base.onnx"), make(tmp_path / "fused.onnx", seed=1))
    assert verdicts(report)["bytes outside the patch table"] == "not checked"
    assert report.ok


def rename_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = model.graph.node[1].output[0] = "scores"


def other_operator(model: onnx.ModelProto) -> None:
    model.graph.node[1].op_type = "Tanh"


def other_attribute(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("strides", [1, 1]))


def other_edge(model: onnx.ModelProto) -> None:
    model.graph.node[0].output[0] = model.graph.node[1].input[0] = "between"


def extra_node(model: onnx.ModelProto) -> None:
    model.graph.node.append(onnx.helper.make_node("Identity", ["hidden"], ["unused"]))


def other_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def other_dtype(model: onnx.ModelProto) -> None:
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0]).astype(np.float16)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "conv.weight"))


def other_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 17


def other_ir(model: onnx.ModelProto) -> None:
    model.ir_version = 10


BREACHES = {
    "outputs": rename_output,
    "operators": other_operator,
    "attributes": other_attribute,
    "edges": other_edge,
    "inputs": other_batch,
    "initializers": other_dtype,
    "opset": other_opset,
    "IR version": other_ir,
    "file size": extra_node,
}


@pytest.mark.parametrize("promise", BREACHES)
def test_each_broken_promise_is_named_and_fails_the_report(tmp_path: Path, promise: str) -> None:
    report = dropin.compare_files(make(tmp_path / "base.onnx"), make(tmp_path / "fused.onnx", BREACHES[promise]))
    assert verdicts(report)[promise] == "fail"
    assert not report.ok


def test_numeric_check_bounds_the_difference_by_the_largest_logit() -> None:
    expected = np.array([[100.0, 0.0]])
    assert dropin.numeric_check("n", expected, expected + 9e-3, 1e-4).verdict == "pass"
    assert dropin.numeric_check("n", expected, expected + 1.1e-2, 1e-4).verdict == "fail"
    assert dropin.numeric_check("n", expected, np.full((1, 2), np.nan), 1e-4).verdict == "fail"
    assert dropin.numeric_check("n", expected[:0], expected[:0], 1e-4).verdict == "fail"


def test_what_rounding_alone_does_is_no_difference() -> None:
    expected = np.array([[1.0, 0.0]])
    assert dropin.numeric_check("n", expected, expected + 1e-3, 1e-4).verdict == "fail"
    assert dropin.numeric_check("n", expected, expected + 1e-3, 1e-4, noise=2e-4).verdict == "pass"
    assert dropin.numeric_check("n", expected, expected + 1e-2, 1e-4, noise=2e-4).verdict == "fail"
    for useless in (np.nan, np.inf):
        assert dropin.numeric_check("n", expected, expected + 1e-3, 1e-4, noise=useless).verdict == "fail"


@pytest.mark.parametrize("gain", [1.0, 1000.0])
def test_the_noise_of_rounding_is_a_last_bit_times_the_networks_gain(tmp_path: Path, gain: float) -> None:
    text = '<ir_version: 9, opset_import: ["" : 18]> net (float[n, 5] x) => (float[n, 5] y) { y = Mul (x, gain) }'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(gain), "gain"))
    onnx.save(model, tmp_path / "gain.onnx")
    images = np.random.default_rng(0).standard_normal((8, 5), dtype=np.float32)
    bit = np.abs(images).max() * np.finfo(np.float32).eps
    assert 0.4 * gain * bit <= rounding_noise(tmp_path / "gain.onnx", images) <= 1.5 * gain * bit
    assert rounding_noise(tmp_path / "gain.onnx", np.zeros((8, 5), np.uint8)) == 0


def test_a_report_that_compared_nothing_is_not_ok() -> None:
    assert not dropin.DropinReport("a", "b", ()).ok
    assert not dropin.DropinReport("a", "b", (dropin.Check("x", "not checked", ""),)).ok


def test_truncated_and_missing_files_are_refused_with_their_name(tmp_path: Path) -> None:
    base = make(tmp_path / "base.onnx")
    (tmp_path / "cut.onnx").write_bytes(base.read_bytes()[:200])
    with pytest.raises(ArtifactError, match=r"cut\.onnx is not an ONNX file"):
        dropin.compare_files(base, tmp_path / "cut.onnx")
    with pytest.raises(ArtifactError, match=r"gone\.onnx not found"):
        dropin.compare_files(base, tmp_path / "gone.onnx")
