"""What the how-tos for phones and boards say of files, names and commands."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from small_artifacts import NAMES, SPEC, export

from lorac_runtime.cli import parser
from lorac_runtime.manifest import load

ROWS = re.compile(r"^\| (input|with `--input-uint8`|output) \| (.*?) \| (.*?) \|$", re.M)


@pytest.fixture(scope="module")
def mobile(root: Path) -> str:
    return (root / "docs/howto/mobile.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("raw", [False, True])
def test_models_take_what_the_page_for_phones_says(raw: bool, mobile: str, tmp_path: Path) -> None:
    said = {name: cells for name, *cells in ROWS.findall(mobile)}
    export(tmp_path / "a", spec=dataclasses.replace(SPEC, in_graph=raw))
    (given,), (answer,) = (f(onnxruntime.InferenceSession(tmp_path / "a/base.onnx")) for f in (_inputs, _outputs))
    lite = load(tmp_path / "a").tflite
    assert lite is not None
    if raw:
        assert said["with `--input-uint8`"][0].startswith("`input`, uint8 (1, height, width, channels)")
        assert (given.name, given.type, given.shape[1:]) == ("input", "tensor(uint8)", [10, 10, 3])
        assert (lite.input_dtype, lite.input_shape) == ("uint8", (1, 10, 10, 3))
    else:
        assert said["input"][0].startswith("`input`, float32 (1, channels, height, width)")
        assert said["input"][1].startswith("`input`, float32 (1, height, width, channels)")
        assert (given.name, given.type, given.shape[1:]) == ("input", "tensor(float)", [3, 10, 10])
        assert (lite.input_dtype, lite.input_shape) == ("float32", (1, 10, 10, 3))
    assert said["output"][0].startswith("`logits`, float32 (1, classes)")
    assert (answer.name, answer.type, answer.shape[1:]) == ("logits", "tensor(float)", [len(NAMES)])


def _inputs(session: onnxruntime.InferenceSession) -> list[onnxruntime.NodeArg]:
    return list(session.get_inputs())


def _outputs(session: onnxruntime.InferenceSession) -> list[onnxruntime.NodeArg]:
    return list(session.get_outputs())


def test_programs_for_phones_use_the_names_of_the_files(mobile: str) -> None:
    programs = re.findall(r"^```(?:kotlin|swift)\n(.*?)^```$", mobile, re.M | re.S)
    assert len(programs) == 4
    onnx = [program for program in programs if "onnxruntime" in program.lower()]
    assert len(onnx) == 2
    assert all('"input"' in program and '"logits"' in program for program in onnx)


def test_the_raw_image_of_a_phone_is_answered_as_the_normalised_one(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 10, 10, 3)).astype(np.uint8)
    mean, std = np.float32(SPEC.mean), np.float32(SPEC.std)
    normalised = ((image.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
    answers = []
    for raw, fed in ((True, image), (False, np.ascontiguousarray(normalised))):
        export(tmp_path / str(raw), spec=dataclasses.replace(SPEC, in_graph=raw))
        session = onnxruntime.InferenceSession(tmp_path / str(raw) / "base.onnx")
        answers.append(session.run(["logits"], {"input": fed})[0])
    assert np.abs(answers[0] - answers[1]).max() < 1e-5 * max(1.0, float(np.abs(answers[1]).max()))


def test_the_command_of_the_boards_service_is_one(root: Path) -> None:
    page = (root / "docs/howto/raspberry-pi.md").read_text(encoding="utf-8")
    found = re.search(r"^ExecStart=(.*)$", page, re.M)
    assert found is not None
    _, bundle, *words = shlex.split(found[1])
    assert bundle.endswith("ort_finetune.pyz")
    args = parser(artifact=False).parse_args(words)
    assert (args.keep_if_better, args.threads, args.nice) == (True, 3, 10)
