"""`lorac-deploy web`: what it writes, what it refuses by name, and where onnxruntime-web comes from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import tarfile
from pathlib import Path

import pytest
from hand_steps import StepRecipe
from step_artifacts import build_steps
from web_pages import STATIC

from lorac_deploy.commands import web as command
from lorac_deploy.web import engine_files
from lorac_deploy.web.site import unsupported, write_site
from lorac_runtime import manifest as mf
from lorac_runtime.errors import ArtifactError, EngineError, OutputError
from lorac_runtime.tasks import Task

CONTENT = {name: f"content of {name}".encode() for name in engine_files.FILES}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_steps(tmp_path_factory.mktemp("artifact") / "a", StepRecipe()).folder


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the npm package, and its hashes in place of the pinned ones."""
    builds = {
        build: {name: hashlib.sha256(CONTENT[name]).hexdigest() for name in files}
        for build, files in engine_files.BUILDS.items()
    }
    monkeypatch.setattr(engine_files, "BUILDS", builds)
    monkeypatch.setattr(engine_files, "FILES", {n: d for files in builds.values() for n, d in files.items()})
    return package(tmp_path / "onnxruntime-web")


def package(folder: Path) -> Path:
    (folder / "dist").mkdir(parents=True)
    for name, content in CONTENT.items():
        (folder / "dist" / name).write_bytes(content)
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_site_holds_the_page_the_engine_and_the_artifact_with_hashes(
    artifact: Path, engine: Path, tmp_path: Path
) -> None:
    site = write_site(artifact, tmp_path / "site", engine=engine)
    graphs = {f"artifact/{n}" for n in mf.load(artifact).engines["onnxruntime"].files}
    own = {f"artifact/{n}" for n in ("manifest.json", "base.onnx", "adapter.safetensors")}
    ort = {f"ort/{n}" for n in engine_files.BUILDS["wasm"]}
    assert names(site.folder) == graphs | own | ort | names(STATIC) | {"site.json"}
    described = json.loads((site.folder / "site.json").read_text(encoding="utf-8"))
    assert (described["engines"], described["formats"]) == (["wasm"], ["onnx"])
    for name, entry in described["files"].items():
        content = (site.folder / "artifact" / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "nbytes": len(content)}
    assert site.nbytes == sum((site.folder / n).stat().st_size for n in names(site.folder))


def test_an_older_page_is_replaced_and_anything_else_is_kept(artifact: Path, engine: Path, tmp_path: Path) -> None:
    out = tmp_path / "site"
    write_site(artifact, out, engine=engine, webgpu=True)
    assert (out / "ort" / "ort.webgpu.min.mjs").is_file()
    write_site(artifact, out, engine=engine)
    assert not (out / "ort" / "ort.webgpu.min.mjs").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="something else than a page"):
        write_site(artifact, tmp_path / "mine", engine=engine)
    with pytest.raises(OutputError, match="never modified"):
        write_site(artifact, artifact / "site", engine=engine)
    assert names(tmp_path / "mine") == {"thesis.txt"}


def test_what_a_page_cannot_do_is_named(artifact: Path) -> None:
    manifest = mf.load(artifact)
    assert unsupported(manifest) == []
    signal = dataclasses.replace(manifest.input, dtype="float32", shape=(256,))
    wide = dataclasses.replace(manifest.input, shape=(5, 8, 8))
    entropy = dataclasses.replace(manifest.training, loss="entropy")
    cases: list[tuple[dict[str, object], str]] = [
        ({"engines": {}}, "no files for the engine onnxruntime"),
        ({"input": signal}, "signals of shape (256,)"),
        ({"input": wide}, "5 channels"),
        ({"trainables": (), "method": "recalibrate"}, "nothing trains (method recalibrate)"),
        ({"bn_policy": "batch"}, "policy is batch"),
        ({"task": Task("regression", (), ())}, "its task is regression"),
        ({"coordinates": "unfolded", "method": "bn"}, "method bn trains batch normalisations"),
        ({"training": entropy}, "the loss entropy is for images without labels"),
    ]
    for change, text in cases:
        (line,) = unsupported(dataclasses.replace(manifest, **change))  # type: ignore[arg-type]
        assert text in line


def test_the_command_refuses_in_one_message(tmp_path: Path, engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch = build_steps(tmp_path / "batch", StepRecipe(bn_policy="batch")).folder
    argv = [str(batch), "--out", str(tmp_path / "site"), "--onnxruntime-web", str(engine)]
    assert command.main(argv) == 1
    assert "cannot be adapted in a browser:\n  - the batch normalisation policy is batch" in capsys.readouterr().err
    assert not (tmp_path / "site").exists()


def test_the_command_says_what_it_weighs(
    artifact: Path, tmp_path: Path, engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(artifact), "--out", str(tmp_path / "site"), "--onnxruntime-web", str(engine / "dist"), "--webgpu"]
    assert command.main(argv) == 0
    megabytes = sum((tmp_path / "site" / n).stat().st_size for n in names(tmp_path / "site")) / 1e6
    assert f"site: {megabytes:.1f} MB" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main([*argv, "--to", "gif"])


def test_formats_that_the_artifact_lacks_are_refused(artifact: Path, engine: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no base\.tflite"):
        write_site(artifact, tmp_path / "site", to=("onnx", "tflite"), engine=engine)


def test_another_version_of_the_engine_is_refused_by_file(engine: Path) -> None:
    (engine / "dist" / "ort.wasm.min.mjs").write_text("other")
    (engine / "dist" / "ort-wasm-simd-threaded.wasm").unlink()
    with pytest.raises(EngineError) as caught:
        engine_files.found(engine)
    assert "ort.wasm.min.mjs is of another version" in str(caught.value)
    assert "ort-wasm-simd-threaded.wasm is missing" in str(caught.value)
    assert engine_files.PINNED in str(caught.value)


def fake_npm(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of that name before all others on PATH."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_npm_fetches_the_pinned_release_once_into_the_cache(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / "x.tgz", "w:gz") as archive:
        archive.add(engine, "package")
    script = f'echo "$@" >> {tmp_path}/asked; for last; do :; done; cp {tmp_path}/x.tgz "$last/"'
    fake_npm(tmp_path / "bin", script, monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        assert engine_files.found() == tmp_path / "cache" / "lorac-deploy" / f"onnxruntime-web-{engine_files.VERSION}"
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 1
    assert asked[0].startswith(f"pack {engine_files.PINNED} ")


def test_without_npm_or_with_a_failing_one_the_message_says_what_to_do(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake_npm(tmp_path / "bin", "echo no network >&2; exit 1", monkeypatch)
    with pytest.raises(EngineError, match="failed: no network"):
        engine_files.found()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match=r"there is no npm here.*--onnxruntime-web"):
        engine_files.found()


def test_the_pages_own_files_name_no_other_place() -> None:
    for name in names(STATIC):
        text = (STATIC / name).read_text(encoding="utf-8")
        hosts = set(re.findall(r"https?://([\w.-]+)", text))
        assert hosts <= {"localhost", "www.w3.org"}, name  # the second is the name of SVG, not an address
        assert "eval(" not in text
        assert "innerHTML" not in text
