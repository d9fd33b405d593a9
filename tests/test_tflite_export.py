"""`tflite.export`: what it writes answers like PyTorch, in each form, and what it cannot write it refuses by name."""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from networks import trained
from shared_export import export_graph
from torch import nn

from lorac_exporters.canonical import Canonical, canonicalize
from lorac_exporters.graph_tools import set_array
from lorac_exporters.preprocessing import add_preprocessing
from lorac_exporters.tflite import TfliteConfig, TfliteReport, export, ranges_of
from lorac_exporters.tflite.answers import TfliteAnswers
from lorac_exporters.tflite.running import Runner
from lorac_exporters.tflite.schema import from_bytes
from lorac_exporters.verify import run_onnx
from lorac_runtime.data import preprocess
from lorac_runtime.errors import ArtifactError, ConversionError, OutputError
from lorac_runtime.manifest import InputSpec

SPEC = InputSpec("input", (3, 12, 12), 1 / 255, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
RAW = dataclasses.replace(SPEC, in_graph=True)
TEN = tuple("abcdefghij")
NAMES = ("cat", "dog", "owl", "cow")
IMAGES = np.random.default_rng(0).integers(0, 256, (24, 12, 12, 3), dtype=np.uint8)
FLOATS = preprocess(IMAGES, SPEC)  # (24, 3, 12, 12)
CHANNELS_LAST = np.ascontiguousarray(FLOATS.transpose(0, 2, 3, 1))


@functools.cache
def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    with torch.no_grad():
        net[8].weight *= 5
        net.train()(torch.from_numpy(FLOATS))
    return net.eval()


@functools.cache
def canonical() -> Canonical:
    return canonicalize(export_graph(network(), SPEC.shape))


@functools.cache
def expected() -> np.ndarray:
    return network()(torch.from_numpy(FLOATS)).detach().numpy()


def write(
    path: Path,
    config: TfliteConfig | None = None,
    *,
    model: ir.Model | None = None,
    spec: InputSpec = SPEC,
    names: tuple[str, ...] = NAMES,
    calibration: object = None,
) -> TfliteReport:
    return export(
        canonical().model if model is None else model,
        path,
        config,
        spec=spec,
        class_names=names,
        name="net",
        calibration=calibration,  # type: ignore[arg-type]
    )


def raw_model() -> ir.Model:
    """The same network with the normalisation in the graph."""
    model = canonical().model.clone()
    add_preprocessing(model, SPEC)
    return model


def test_a_float32_file_answers_like_pytorch_for_any_batch(tmp_path: Path) -> None:
    report = write(tmp_path / "net.tflite")
    for count in (1, 3, 24):
        (found,) = Runner(tmp_path / "net.tflite").run(CHANNELS_LAST[:count])
        np.testing.assert_allclose(found, expected()[:count], atol=1e-5)
    assert (report.weights, report.input_dtype, report.output_dtype) == ("float32", "float32", "float32")
    assert (report.input_shape, report.output_shape) == ((1, 12, 12, 3), (1, 4))


def test_the_report_is_what_the_file_holds(tmp_path: Path) -> None:
    report = write(tmp_path / "net.tflite")
    content = (tmp_path / "net.tflite").read_bytes()
    found = [operator.kind for operator in from_bytes(content, "net").operators]
    assert report.nbytes == len(content)
    assert {kind: found.count(kind) for kind in found} == report.operators
    assert list(report.operators.values()) == sorted(report.operators.values(), reverse=True)
    assert (report.float_operators, report.overflows, report.changed) == ((), 0, ())
    assert 0 < report.seconds < 10


def test_names_of_inputs_outputs_and_weights_are_those_of_onnx(tmp_path: Path) -> None:
    write(tmp_path / "net.tflite")
    found = from_bytes((tmp_path / "net.tflite").read_bytes(), "net")
    assert (found.input_keys, found.output_keys) == (("input",), ("logits",))
    assert set(canonical().values) <= {tensor.name for tensor in found.constants()}


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for weights in ("float32", "fp16", "int8"):
        for name in ("one", "two"):
            write(tmp_path / name, TfliteConfig(weights), calibration=IMAGES if weights == "int8" else None)
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_fp16_halves_the_weights_and_keeps_the_answers(tmp_path: Path) -> None:
    model = trained("resnet20")
    graph = canonicalize(export_graph(model, (3, 32, 32))).model
    spec = dataclasses.replace(SPEC, shape=(3, 32, 32))
    sizes = {}
    for weights in ("float32", "fp16"):
        sizes[weights] = write(tmp_path / weights, TfliteConfig(weights), model=graph, spec=spec, names=TEN).nbytes
    assert sizes["fp16"] < 0.56 * sizes["float32"]
    images = np.random.default_rng(1).standard_normal((4, 3, 32, 32), dtype=np.float32)
    logits = model(torch.from_numpy(images)).detach().numpy()
    (found,) = Runner(tmp_path / "fp16").run(images.transpose(0, 2, 3, 1).copy())
    assert 0 < np.abs(found - logits).max() < 5e-3 * np.abs(logits).max()


def test_numbers_beyond_fp16_are_counted(tmp_path: Path) -> None:
    model = canonical().model.clone()
    weight = canonical().values["0.weight"].copy()
    weight[0, 0, 0, :2] = (7e4, -1e9)
    set_array(model.graph.initializers["0.weight"], weight)
    assert write(tmp_path / "net.tflite", TfliteConfig("fp16"), model=model).overflows == 2


def test_raw_images_give_the_answers_of_normalised_ones(tmp_path: Path) -> None:
    reports = [
        write(tmp_path / "graph.tflite", model=raw_model(), spec=RAW),
        write(tmp_path / "option.tflite", TfliteConfig(input_dtype="uint8")),
    ]
    for report in reports:
        assert (report.input_dtype, report.input_shape) == ("uint8", (1, 12, 12, 3))
    contents = [(tmp_path / name).read_bytes() for name in ("graph.tflite", "option.tflite")]
    assert contents[0] == contents[1]
    (found,) = Runner(contents[0]).run(IMAGES)
    np.testing.assert_allclose(found, expected(), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_graph_that_takes_raw_images_takes_no_others(tmp_path: Path, dtype: str) -> None:
    config = TfliteConfig("int8", input_dtype=dtype)  # type: ignore[arg-type]
    with pytest.raises(ConversionError, match=f"cannot take {dtype} ones"):
        write(tmp_path / "net.tflite", config, model=raw_model(), spec=RAW, calibration=IMAGES)


@pytest.mark.parametrize(("given", "returned"), [(None, None), ("int8", "int8"), ("uint8", "uint8"), ("int8", None)])
def test_an_int8_file_takes_and_gives_the_types_asked_for(
    tmp_path: Path, given: str | None, returned: str | None
) -> None:
    config = TfliteConfig("int8", input_dtype=given, output_dtype=returned)  # type: ignore[arg-type]
    report = write(tmp_path / "net.tflite", config, calibration=IMAGES)
    assert (report.input_dtype, report.output_dtype) == (given or "float32", returned or "float32")
    file = from_bytes((tmp_path / "net.tflite").read_bytes(), "net")
    (found,) = TfliteAnswers(tmp_path / "net.tflite", file, SPEC)(IMAGES).values()
    assert np.abs(found - expected()).max() < 0.06 * np.abs(expected()).max()
    assert np.abs(found - expected()).max() > 0


def test_an_int8_file_of_a_graph_that_takes_raw_images(tmp_path: Path) -> None:
    write(tmp_path / "net.tflite", TfliteConfig("int8"), model=raw_model(), spec=RAW, calibration=IMAGES)
    (found,) = Runner(tmp_path / "net.tflite").run(IMAGES)
    assert np.abs(found - expected()).max() < 0.06 * np.abs(expected()).max()


class Odd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(x.abs() + 1)


def test_what_stays_in_float32_of_an_int8_file_is_reported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), Odd(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    net = nn.Sequential(*net, nn.Linear(4, 4)).eval()
    graph = canonicalize(export_graph(net, SPEC.shape)).model
    report = write(tmp_path / "net.tflite", TfliteConfig("int8"), model=graph, calibration=IMAGES)
    assert any(label.startswith("SQRT ") for label in report.float_operators)
    assert not any(label.startswith("CONV_2D ") for label in report.float_operators)


def test_the_ranges_of_a_file_make_the_same_file_again(tmp_path: Path) -> None:
    write(tmp_path / "first.tflite", TfliteConfig("int8"), calibration=IMAGES)
    found = ranges_of(tmp_path / "first.tflite")
    low, high = found["input"]
    assert (np.float32(low), np.float32(high)) == (FLOATS.min(), FLOATS.max())
    write(tmp_path / "second.tflite", TfliteConfig("int8"), calibration=found)
    assert (tmp_path / "first.tflite").read_bytes() == (tmp_path / "second.tflite").read_bytes()


def test_files_without_ranges_say_so(tmp_path: Path) -> None:
    write(tmp_path / "float.tflite")
    with pytest.raises(ArtifactError, match="holds no activation ranges"):
        ranges_of(tmp_path / "float.tflite")
    with pytest.raises(ArtifactError, match=r"missing\.tflite cannot be read"):
        ranges_of(tmp_path / "missing.tflite")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES[:, :, :8], r"uint8 \(24, 12, 8, 3\), expected uint8 \(N, 12, 12, 3\)"),
        (IMAGES.transpose(0, 3, 1, 2), r"\(24, 3, 12, 12\), expected"),
        (CHANNELS_LAST, r"float32 \(24, 12, 12, 3\), expected uint8"),
        (IMAGES[:3], "3 calibration images are too few"),
        ({"input": (0.0, 1.0)}, "calibrate the network that is being quantized"),
        (None, "int8 weights need calibration images"),
    ],
)
def test_calibration_that_does_not_fit_is_refused(tmp_path: Path, images: object, message: str) -> None:
    (tmp_path / "net.tflite").write_bytes(b"old")
    with pytest.raises(ConversionError, match=message):
        write(tmp_path / "net.tflite", TfliteConfig("int8"), calibration=images)
    assert (tmp_path / "net.tflite").read_bytes() == b"old"


@pytest.mark.parametrize("weights", ["float32", "fp16"])
def test_calibration_without_int8_is_refused(tmp_path: Path, weights: str) -> None:
    with pytest.raises(ConversionError, match=f"not to {weights}"):
        write(tmp_path / "net.tflite", TfliteConfig(weights), calibration=IMAGES)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": "int4"}, "weights 'int4' are not one of float32, fp16, int8"),
        ({"input_dtype": "float16"}, "input_dtype 'float16' is not one of"),
        ({"output_dtype": "int16"}, "output_dtype 'int16' is not one of"),
        ({"input_dtype": "int8"}, "need weights int8, not float32"),
        ({"weights": "fp16", "output_dtype": "uint8"}, "need weights int8, not fp16"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TfliteConfig(**fields)  # type: ignore[arg-type]


def parsed(body: str, shape: str = "N,3,8,8") -> ir.Model:
    """A graph from x to y, with shapes inferred."""
    text = f'<ir_version: 9, opset_import: ["": 18]> net (float[{shape}] x) => (float[N,D] y) {{ {body} }}'
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))


def test_operators_that_tflite_cannot_do_are_all_named_with_their_nodes(tmp_path: Path) -> None:
    model = parsed("a = Det (x) b = Relu (a) c = Hardmax (b) y = Flatten (c)")
    for i, node in enumerate(model.graph):
        node.name = f"node_{i}"
    with pytest.raises(ConversionError) as error:
        write(tmp_path / "net.tflite", model=model)
    assert "Det 'node_0'" in str(error.value)
    assert "Hardmax 'node_2'" in str(error.value)
    assert "Relu" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_dynamic_shape_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"'x' has shape .*H.*: all sizes but the batch must be known"):
        write(tmp_path / "net.tflite", model=parsed("a = Relu (x) y = Flatten (a)", "N,3,H,8"))


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        write(tmp_path / "file" / "net.tflite")


def test_a_resnet18_is_written_in_less_than_a_second_as_33_operators(tmp_path: Path) -> None:
    graph = canonicalize(export_graph(trained("resnet18", cifar_stem=True), (3, 32, 32))).model
    spec = dataclasses.replace(SPEC, shape=(3, 32, 32))
    seconds = []
    for _ in range(2):
        started = time.process_time()  # this process alone: the machine may be busy
        report = write(tmp_path / "net.tflite", model=graph, spec=spec, names=TEN)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 1
    assert sum(report.operators.values()) == 33
    assert "TRANSPOSE" not in report.operators
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)
    ir.save(graph, tmp_path / "net.onnx")
    logits = run_onnx(tmp_path / "net.onnx", images)
    (found,) = Runner(tmp_path / "net.tflite").run(images.transpose(0, 2, 3, 1).copy())
    np.testing.assert_allclose(found, logits, atol=1e-5 * max(1, np.abs(logits).max()))
