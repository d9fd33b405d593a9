""".onnx_adapter files: onnxruntime's own adapters give the answers of the fused file, one model for many adapters."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from interchange_case import INPUTS, Case, answers
from safetensors.numpy import load_file

from lorac_deploy.commands.export import main
from lorac_deploy.interchange.exporting import ShareConfig, export_folder
from lorac_deploy.interchange.onnx_adapter import encoded
from lorac_exporters.plan import LoraConfig
from lorac_exporters.references import adapted_state
from lorac_runtime import manifest as mf
from lorac_runtime import patch
from lorac_runtime.adapter import load_adapter, save_adapter
from lorac_runtime.errors import AdapterError, ArtifactError

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".envs/device/bin/python"
needs_engine = pytest.mark.skipif(not PYTHON.exists(), reason="needs .envs/device (make device-env)")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"), "resnet20", LoraConfig(rank=2, blocks=("conv1", "layer1", "linear")))


def to_folder(case: Case, out: Path, adapter: Path | None = None, *, name: str = "adapter") -> None:
    export_folder(case.artifact, adapter or case.adapter, out, ShareConfig("onnx_adapter", name=name))


def run(folder: Path, *adapters: Path) -> dict[str, np.ndarray]:
    """Answers of the newest onnxruntime."""
    np.save(folder / "x.npy", INPUTS.numpy())
    words = [PYTHON, ROOT / "tests/active_adapters.py", folder / "model.onnx", folder / "x.npy", folder / "y.npz"]
    subprocess.run([*map(str, words), *map(str, adapters)], check=True, capture_output=True)
    with np.load(folder / "y.npz") as found:
        return dict(found)


@needs_engine
def test_an_active_adapter_answers_as_the_fused_file(case: Case, tmp_path: Path) -> None:
    to_folder(case, tmp_path)
    found = run(tmp_path, tmp_path / "adapter.onnx_adapter")
    assert case.far(torch.from_numpy(found["adapted0"])) <= 1e-4
    base = answers(case.net)
    assert (torch.from_numpy(found["plain"]) - base).abs().max() <= 1e-4 * base.abs().max()
    assert case.far(base) > 0.01


@needs_engine
def test_one_model_serves_many_adapters(case: Case, tmp_path: Path) -> None:
    file = load_adapter(case.adapter)
    other = {name: np.asarray(-value if name.endswith("lora_b") else value) for name, value in file.tensors.items()}
    save_adapter(tmp_path / "other.safetensors", other, file.metadata)
    to_folder(case, tmp_path / "one", name="one")
    to_folder(case, tmp_path / "two", tmp_path / "other.safetensors", name="two")
    assert (tmp_path / "one/model.onnx").read_bytes() == (tmp_path / "two/model.onnx").read_bytes()
    found = run(tmp_path / "one", tmp_path / "one/one.onnx_adapter", tmp_path / "two/two.onnx_adapter")
    manifest = mf.load(case.artifact)
    for number, path in enumerate((case.adapter, tmp_path / "other.safetensors")):
        state = adapted_state(case.artifact, manifest, path)
        patch.fuse(case.artifact, tmp_path / f"{number}.onnx", state)
        (tmp_path / str(number)).mkdir()
        (tmp_path / f"{number}.onnx").rename(tmp_path / str(number) / "model.onnx")
        expected = run(tmp_path / str(number))["plain"]
        assert np.abs(found[f"adapted{number}"] - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.abs(found["adapted0"] - found["adapted1"]).max() > 1e-2


@needs_engine
def test_onnxruntime_reads_every_tensor_back(case: Case, tmp_path: Path) -> None:
    to_folder(case, tmp_path)
    found = run(tmp_path, tmp_path / "adapter.onnx_adapter")
    expected = adapted_state(case.artifact, mf.load(case.artifact), case.adapter)
    read = {name[2:]: value for name, value in found.items() if name.startswith("0:")}
    assert read.keys() == expected.keys() >= load_file(case.adapter).keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(read[name], value)


def test_raw_data_is_aligned(tmp_path: Path) -> None:
    marks = {f"t{n}": np.full(n, 1e30 + n * 1e28, np.float32) for n in range(1, 6)}
    content = encoded(marks)
    assert content[4:8] == b"TORT"
    for value in marks.values():
        assert content.index(value.tobytes()) % 8 == 0


def test_the_command_and_its_refusals(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--adapter", str(case.adapter), "--to", "onnx_adapter", "--out", str(tmp_path / "out")]
    assert main([str(case.artifact), *words, "--name", "night"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.onnx", "night.onnx_adapter", "README.md"}
    with pytest.raises(SystemExit) as caught:
        main([str(case.artifact), *words, "--name", "../night"])
    assert caught.value.code == 2
    with pytest.raises(ArtifactError, match="is no training artifact"):
        export_folder(case.base, case.adapter, tmp_path / "no", ShareConfig("onnx_adapter"))


def test_an_adapter_of_another_network_is_refused_tensor_by_tensor(case: Case, tmp_path: Path) -> None:
    file = load_adapter(case.adapter)
    tensors = {name: value for name, value in file.tensors.items() if not name.startswith("layer1.0.conv1")}
    save_adapter(tmp_path / "less.safetensors", tensors, file.metadata)
    with pytest.raises(AdapterError, match=r"layer1.0.conv1.lora_a[\s\S]*layer1.0.conv1.lora_b"):
        to_folder(case, tmp_path / "out", tmp_path / "less.safetensors")
    assert not (tmp_path / "out").exists()
