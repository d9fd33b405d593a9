"""A .tflite file called with raw images, in every type of input and output, beside the ONNX file it was made from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hand_tflite import floats, integers, write
from tflite_pairs import NAMES, SPEC, artifact

from lorac_exporters.references import random_raw, run_onnx
from lorac_exporters.tflite import TfliteConfig, export
from lorac_exporters.tflite.answers import TfliteAnswers
from lorac_exporters.tflite.reading import read_network, weights_of
from lorac_runtime import manifest as mf
from lorac_runtime.data import preprocess
from lorac_runtime.errors import ArtifactError
from lorac_runtime.manifest import InputSpec

IMAGES = random_raw(SPEC, 70, seed=3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifact(tmp_path_factory.mktemp("answers") / "artifact", "none") / mf.BASE


@pytest.mark.parametrize(
    ("config", "bound"),
    [
        (TfliteConfig(), 1e-5),
        (TfliteConfig(input_dtype="uint8"), 1e-5),
        (TfliteConfig("fp16"), 2e-3),
        (TfliteConfig("int8"), 0.1),
        (TfliteConfig("int8", input_dtype="uint8"), 0.1),
        (TfliteConfig("int8", input_dtype="int8"), 0.1),
        (TfliteConfig("int8", output_dtype="int8"), 0.1),
        (TfliteConfig("int8", input_dtype="int8", output_dtype="uint8"), 0.1),
    ],
    ids=str,
)
def test_raw_images_go_in_and_real_logits_come_out(
    base: Path, tmp_path: Path, config: TfliteConfig, bound: float
) -> None:
    path = tmp_path / "m.tflite"
    calibration = IMAGES if config.weights == "int8" else None
    export(ir.load(base), path, config, spec=SPEC, class_names=NAMES, name="net", calibration=calibration)
    expected = run_onnx(base, preprocess(IMAGES, SPEC))
    network = read_network(path)
    assert weights_of(network) == config.weights
    ((name, got),) = TfliteAnswers(path, network, SPEC)(IMAGES).items()
    assert name == mf.load(base.parent).output.name
    assert got.dtype == np.float32
    assert np.max(np.abs(got - expected)) <= bound * max(1, np.abs(expected).max())


def test_a_file_that_takes_one_image_at_a_time_gets_them_so(tmp_path: Path) -> None:
    spec = InputSpec("input", (3, 6, 6), 1 / 255, (0.0,) * 3, (1.0,) * 3)
    free, fixed = floats(), floats()
    for tensor in fixed.tensors():
        tensor.batch_axis = None
    images = random_raw(spec, 5, seed=0)
    answers = []
    for name, network in (("free", free), ("fixed", fixed)):
        path = write(network, tmp_path / f"{name}.tflite")
        answers.append(TfliteAnswers(path, read_network(path), spec)(images)["logits"])
    assert answers[0].shape == answers[1].shape == (5, 4)
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-5)


def test_weights_are_told_by_what_the_file_holds() -> None:
    assert weights_of(floats()) == "float32"
    assert weights_of(integers()) == "int8"


def test_a_file_with_two_inputs_is_refused(tmp_path: Path) -> None:
    network = floats()
    network.inputs.append(network.operators[1].outputs[0])
    with pytest.raises(ArtifactError, match="has 2 inputs, expected one"):
        TfliteAnswers(tmp_path / "m.tflite", network, SPEC)
