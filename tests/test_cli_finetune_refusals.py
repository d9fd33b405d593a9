"""Bad input on the device's command line ends in one clear message and harms no file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from artifacts import Tiny, build
from cli_runs import Run, arrays, runner
from safetensors.numpy import load_file, save_file
from tiny_network import Recipe

from lorac_runtime.adapter import load_adapter


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("artifact") / "a", Recipe(clip_norm=0.0))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    np.savez(tmp_path / "local.npz", **arrays())
    return tmp_path / "local.npz"


@pytest.fixture
def run(tiny: Tiny, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(tiny.folder, data, tmp_path, capsys=capsys)


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of the artifact that a test may damage."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in tiny.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def edited(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damage_manifest_truncated(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-300])


def damage_manifest_version(folder: Path) -> None:
    edited(folder, schema_version=99)


def damage_manifest_keys(folder: Path) -> None:
    edited(folder, adapters="none", extra=1)


def damage_manifest_missing(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def damage_manifest_escapes(folder: Path) -> None:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    edited(folder, files=files | {"../base.onnx": files["base.onnx"]})


def damage_base(folder: Path) -> None:
    content = bytearray((folder / "base.onnx").read_bytes())
    content[1000] ^= 1
    (folder / "base.onnx").write_bytes(content)


def damage_training_file(folder: Path) -> None:
    (folder / "training_model.onnx").write_bytes(b"")


def damage_file_missing(folder: Path) -> None:
    (folder / "checkpoint").unlink()


DAMAGED = {
    damage_manifest_truncated: "is not valid JSON",
    damage_manifest_version: "schema_version 99, this runtime reads 1",
    damage_manifest_keys: "adapters: expected a list",
    damage_manifest_missing: "is not a training artifact folder",
    damage_manifest_escapes: "names must stay inside the folder",
    damage_base: "base.onnx was altered",
    damage_training_file: "training_model.onnx has 0 bytes",
    damage_file_missing: "checkpoint is missing",
}


@pytest.mark.parametrize("damage", DAMAGED, ids=lambda f: f.__name__)
def test_a_damaged_artifact_is_refused(run: Run, copy: Path, damage: Callable[[Path], None], tmp_path: Path) -> None:
    damage(copy)
    status, stdout, stderr = run(artifact=copy)
    assert (status, stdout) == (1, "")
    assert stderr.startswith("error: ")
    assert DAMAGED[damage] in stderr
    assert not any((tmp_path / "out").glob("*"))


def with_nan(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    images = found["images"].astype(np.float32)
    images[0] = np.nan
    return found | {"images": images}


BAD_DATA = {
    "labels out of range": (lambda a: a | {"labels": a["labels"] + 7}, "labels .* must be 0 to 2"),
    "negative labels": (lambda a: a | {"labels": a["labels"] - 1}, r"-1 \(8 times\)"),
    "float labels": (lambda a: a | {"labels": a["labels"] / 2}, "expected integers 0 to 2"),
    "another size": (lambda a: a | {"images": a["images"][:, :5]}, "have shape .* resize or convert"),
    "another type": (lambda a: a | {"images": a["images"] / 255}, "float64, expected uint8"),
    "NaN": (with_nan, "hold NaN"),
    "empty": (lambda a: {k: v[:0] for k, v in a.items()}, "holds no images"),
    "one class": (lambda a: a | {"labels": a["labels"] * 0}, "are of class 'class 0'"),
    "unequal lengths": (lambda a: a | {"labels": a["labels"][:-1]}, "24 images but 23 labels"),
    "no labels": (lambda a: {"images": a["images"]}, "has no labels"),
    "objects": (lambda a: a | {"labels": np.array([{}] * 24)}, "is not a readable .npz of plain arrays"),
    "too few to hold out": (lambda a: {k: v[:2] for k, v in a.items()}, "too few to hold out"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_data_that_cannot_be_used_is_refused(run: Run, data: Path, case: str) -> None:
    change, message = BAD_DATA[case]
    np.savez(data, **change(arrays()))
    status, _, stderr = run()
    assert status == 1
    told = [line for line in stderr.splitlines() if not line.startswith("warning: ")]
    assert told[0].startswith("error: ")
    assert re.search(message, stderr, re.DOTALL)


def test_files_that_are_no_data_are_refused(run: Run, data: Path) -> None:
    whole = data.read_bytes()
    for content in (b"", b"PK\3\4 nothing", whole[: len(whole) // 2]):
        data.write_bytes(content)
        status, _, stderr = run()
        assert status == 1
        assert "is not a readable .npz" in stderr
    data.unlink()
    status, _, stderr = run()
    assert (status, "cannot be read" in stderr) == (1, True)


def test_an_adapter_that_does_not_fit_is_refused_with_all_mismatches(run: Run, tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    tensors = load_file(tiny.folder / "adapter.safetensors")
    metadata = load_adapter(tiny.folder / "adapter.safetensors").metadata
    tensors["fc.weight"] = np.full_like(tensors["fc.weight"], np.inf)
    del tensors["conv3.lora_b"]
    save_file(tensors, path, metadata=metadata | {"r": "64", "base_sha256": "0" * 64})
    status, _, stderr = run("--adapter", path)
    assert status == 1
    for part in ("fc.weight has 24 values", "conv3.lora_b is missing", "r: the adapter has '64'", "base_sha256"):
        assert part in stderr
    path.write_bytes(path.read_bytes()[:40])
    status, _, stderr = run("--adapter", path)
    assert (status, "is not a whole safetensors file" in stderr) == (1, True)
    status, _, stderr = run("--adapter", tmp_path / "none")
    assert (status, "not found" in stderr) == (1, True)


def test_an_output_folder_that_cannot_be_written_is_refused(run: Run, data: Path) -> None:
    for out in (data, data / "below", Path("/proc/version/out"), Path("/dev/null")):
        status, _, stderr = run(out=out)
        assert (status, stderr.startswith("error: cannot write")) == (1, True), stderr


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(run: Run, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    status, _, stderr = run(out=locked / "out")
    assert (status, "may write to" in stderr) == (1, True)


def test_divergence_advises_and_fails(run: Run, tmp_path: Path) -> None:
    status, _, stderr = run("--lr", "1e38", "--warmup", "0")
    assert status == 1
    assert "training diverged" in stderr
    assert "(--restart) with a lower one, such as --lr 3e+37" in stderr
    assert not (tmp_path / "out" / "fused.onnx").exists()
