"""One file with runtime and artifact: what is in it, and that a Python with three packages runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from finetune_runs import contents, write_data
from hand_steps import StepRecipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from isolated import run_isolated
from step_artifacts import build_steps

from lorac_deploy.bundle import write_bundle
from lorac_deploy.commands import bundle as command
from lorac_runtime.errors import ArtifactError, OutputError
from lorac_runtime.manifest import load, verify_files
from lorac_runtime.session import FinetuneConfig, finetune
from lorac_runtime.unpacking import unpacked

OPTIONS = ("--epochs", "4", "--lr", "0.01", "--threads", "1", "--keep-if-better")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_steps(tmp_path_factory.mktemp("artifact") / "a", StepRecipe()).folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "local.npz", 300)


@pytest.fixture(scope="module")
def bundle(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "ort_finetune.pyz"
    write_bundle(artifact, path)
    return path


def run(bundle: Path, folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """In a Python that has numpy, safetensors and onnxruntime, and cannot see this project."""
    return run_isolated([bundle, *words], folder / "packages", "onnxruntime", "flatbuffers", "packaging", "google")


def test_a_bundle_adapts_and_its_state_is_looked_after(
    bundle: Path, artifact: Path, data: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    done = run(bundle, tmp_path, "--data", data, "--out", state, *OPTIONS, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)["report"]
    config = FinetuneConfig(epochs=4, lr=0.01, threads=1)
    assert tuple(report["losses"]) == finetune(artifact, data, tmp_path / "plain", config).losses
    for name in ("adapter.safetensors", "fused.onnx"):
        assert (state / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
    assert run(bundle, tmp_path, "rollback", state).returncode == 0
    assert (state / "fused.onnx").read_bytes() == (state / "generations/0000/fused.onnx").read_bytes()
    again = run(bundle, tmp_path, "resume", state)
    assert (again.returncode, "made before" in again.stderr) == (0, True)
    assert report["versions"]["lorac-runtime"] != "not installed"


def test_equal_artifacts_give_equal_bundles(bundle: Path, artifact: Path, tmp_path: Path) -> None:
    write_bundle(artifact, tmp_path / "other.pyz")
    assert (tmp_path / "other.pyz").read_bytes() == bundle.read_bytes()
    assert os.access(bundle, os.X_OK)


def test_the_artifact_is_unpacked_once_and_an_altered_one_again(bundle: Path, data: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    run(bundle, tmp_path, "--data", data, "--out", state, *OPTIONS)
    (home,) = (state / ".artifacts").iterdir()
    times = {path.name: path.stat().st_mtime_ns for path in home.iterdir()}
    run(bundle, tmp_path, "--data", data, "--out", state, *OPTIONS)
    assert {path.name: path.stat().st_mtime_ns for path in home.iterdir()} == times
    whole = contents(home)
    (home / "base.onnx").write_bytes(b"other")
    run(bundle, tmp_path, "--data", data, "--out", state, *OPTIONS)
    assert contents(home) == whole


def test_a_damaged_artifact_is_not_bundled(artifact: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(artifact, tmp_path / "a")
    (tmp_path / "a/base.onnx").write_bytes(b"other")
    with pytest.raises(ArtifactError, match=r"base\.onnx has 5 bytes"):
        write_bundle(tmp_path / "a", tmp_path / "out.pyz")
    assert not (tmp_path / "out.pyz").exists()
    assert command.main([str(tmp_path / "a"), "--out", str(tmp_path / "out.pyz")]) == 1


def test_a_damaged_bundle_says_so(bundle: Path, data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pyz"
    with zipfile.ZipFile(bundle) as source, zipfile.ZipFile(broken, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            target.writestr(entry, content[::-1] if entry.filename.endswith("base.onnx") else content)
    done = run(broken, tmp_path, "--data", data, "--out", tmp_path / "state", *OPTIONS)
    assert done.returncode == 1
    assert "base.onnx was altered" in done.stderr
    assert "Traceback" not in done.stderr


@given(place=st.integers(0, 2**31), other=st.sampled_from([b"\0", b"\xff" * 4, b"PK\3\4", b""]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_a_bundle_is_told_or_does_no_harm(bundle: Path, place: int, other: bytes, tmp_path: Path) -> None:
    content = bytearray(bundle.read_bytes())
    at = place % len(content)
    content[at : at + max(1, len(other))] = other
    (tmp_path / "damaged.pyz").write_bytes(content)
    out = tmp_path / str(place)
    try:
        found = unpacked(tmp_path / "damaged.pyz", out)
    except (ArtifactError, OutputError):
        assert not list(out.glob(".artifacts/[!.]*"))
    else:
        verify_files(found, load(found))
    shutil.rmtree(out, ignore_errors=True)


@pytest.mark.parametrize(("field", "value"), [(10, 8), (10, 12), (10, 14), (10, 99), (8, 1)])
def test_an_archive_that_says_it_is_packed_otherwise_is_damaged(
    bundle: Path, field: int, value: int, tmp_path: Path
) -> None:
    """Deflated, bzip2, lzma, something unknown, encrypted: none of them is how it was written."""
    content = bytearray(bundle.read_bytes())
    name = content.rindex(b"artifact/manifest.json")  # in the directory at the end
    content[content.rindex(b"PK\1\2", 0, name) + field] = value
    (tmp_path / "damaged.pyz").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"damaged\.pyz is damaged \(.*\); copy it again"):
        unpacked(tmp_path / "damaged.pyz", tmp_path / "out")


def test_what_is_missing_on_the_device_is_named(bundle: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-S", bundle], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        "error: numpy is not installed here; this file needs: pip install numpy safetensors onnxruntime\n"
    )
