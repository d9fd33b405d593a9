"""`lorac-deploy certify`: one network as PyTorch, ONNX and TFLite, base and fused, on the same images."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tflite_pairs import adapted, copies

from lorac_deploy import ArtifactConfig, LoraConfig, OnnxSource, export_training_artifact
from lorac_deploy.certificate import certify
from lorac_deploy.checkpoint import load_checkpoint, save_checkpoint
from lorac_deploy.commands.certify import main
from lorac_deploy.models import ModelSpec, build
from lorac_exporters.tflite import running
from lorac_runtime import manifest as mf
from lorac_runtime.errors import ArtifactError
from lorac_runtime.manifest import InputSpec

SPEC = ModelSpec("resnet20", 4)
INPUT = InputSpec("input", (3, 16, 16), 1 / 255, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
NAMES = ("ant", "bee", "cat", "dog")
PAIRS = ["PyTorch {0} - ONNX {0}", "PyTorch {0} - TFLite {0}", "ONNX {0} - TFLite {0}"]


@dataclasses.dataclass(frozen=True)
class Folders:
    checkpoint: Path
    artifact: Path
    fused: Path
    data: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("certify")
    save(folder / "checkpoint", seed=0)
    config = ArtifactConfig(lora=LoraConfig(rank=1))
    export_training_artifact(folder / "checkpoint", folder / "artifact", config=config)
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "data.npz", images=images, labels=np.arange(40) % 4)
    fused = adapted(folder / "artifact", folder / "adapted", size=0.03)
    return Folders(folder / "checkpoint", folder / "artifact", fused, folder / "data.npz")


def save(folder: Path, *, seed: int, spec: InputSpec = INPUT) -> Path:
    """A network with statistics as after training."""
    module = build(SPEC, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_var.uniform_(0.5, 2.0, generator=generator)
            part.running_mean.normal_(0, 0.2, generator=generator)
    save_checkpoint(folder, module, SPEC, input_spec=spec, class_names=NAMES, metrics={})
    return folder


def again(folders: Folders, out: Path, weights: str, **options: object) -> None:
    """The artifact of the same network with another base.tflite; from base.onnx, which is quicker than from PyTorch."""
    config = ArtifactConfig(lora=LoraConfig(rank=1), tflite=weights)  # type: ignore[arg-type]
    source = OnnxSource(folders.artifact / mf.BASE, INPUT.mean, INPUT.std, class_names=NAMES)
    export_training_artifact(source, out, config=config, **options)  # type: ignore[arg-type]


def run(folders: Folders, out: Path, *options: object, fused: bool = True) -> tuple[int, dict]:
    """The exit status and the JSON of the command."""
    argv = [folders.artifact, "--data", folders.data, "--checkpoint", folders.checkpoint, "--json", out, *options]
    argv += ["--fused", folders.fused] if fused else []
    return main([str(a) for a in argv]), json.loads(out.read_text())


def verdicts(found: dict) -> dict[str, str]:
    return {f"{pair['reference']} - {pair['candidate']}": pair["verdict"] for pair in found["pairs"]}


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The message of a refusal, which is the only thing printed."""
    assert main([str(a) for a in argv]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert "Traceback" not in printed.err
    return " ".join(printed.err.split())


def test_every_pair_of_formats_agrees_base_and_fused(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = run(folders, tmp_path / "c.json")
    assert status == 0
    assert found["ok"]
    assert verdicts(found) == {text.format(group): "pass" for group in ("base", "fused") for text in PAIRS}
    for pair in found["pairs"]:
        (output,) = pair["outputs"]
        assert output["output"] == mf.load(folders.artifact).output.name
        assert 0 <= output["max_rel"] <= 1e-5
        assert output["agreement"] == 1
    assert found["images"] == 40
    assert found["data"] == str(folders.data)
    lines = capsys.readouterr().out.splitlines()
    assert "all 6 pairs agree" in lines
    assert max(map(len, lines)) <= 80
    (row,) = [line for line in lines if line.startswith(PAIRS[1].format("fused"))]
    assert row.split()[-4:] == ["100.00%", "0.0001,", "99.9%", "pass"]


def test_the_certificate_names_every_file_by_its_hash_and_the_versions(folders: Folders, tmp_path: Path) -> None:
    _, found = run(folders, tmp_path / "c.json")
    manifest = mf.load(folders.artifact)
    models = found["models"]
    assert models["TFLite base"]["sha256"] == manifest.files[mf.BASE_TFLITE].sha256
    assert models["ONNX base"]["sha256"] == manifest.files[mf.BASE].sha256
    assert models["TFLite fused"] == {
        "file": str(folders.fused / "fused.tflite"),
        "sha256": mf.sha256(folders.fused / "fused.tflite"),
        "weights": "float32",
    }
    assert {"torch", "lorac-deploy"} <= set(found["versions"])


def test_accuracies_are_those_of_pytorch(folders: Folders, tmp_path: Path) -> None:
    _, found = run(folders, tmp_path / "c.json")
    module = load_checkpoint(folders.checkpoint).module
    data = np.load(folders.data)
    pixels = (data["images"] / 255 - np.array(INPUT.mean)) / np.array(INPUT.std)
    with torch.no_grad():
        answers = module(torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)).argmax(1).numpy()
    expected = float(np.mean(answers == data["labels"]))
    assert {next(iter(found["accuracies"][f"{kind} base"].values())) for kind in ("PyTorch", "ONNX", "TFLite")} == {
        expected
    }


def test_without_a_checkpoint_the_files_are_compared_with_each_other(folders: Folders, tmp_path: Path) -> None:
    argv = [folders.artifact, "--data", folders.data, "--json", tmp_path / "c.json"]
    assert main([str(a) for a in argv]) == 0
    assert verdicts(json.loads((tmp_path / "c.json").read_text())) == {PAIRS[2].format("base"): "pass"}


def test_the_fused_row_comes_with_the_fused_folder_only(folders: Folders, tmp_path: Path) -> None:
    _, found = run(folders, tmp_path / "c.json", fused=False)
    assert set(verdicts(found)) == {text.format("base") for text in PAIRS}


def test_another_adapter_than_the_fused_one_fails_against_pytorch_only(folders: Folders, tmp_path: Path) -> None:
    _, fused = copies(folders.artifact, folders.fused, tmp_path)
    shutil.copy(folders.artifact / mf.ADAPTER, fused)  # of the start: nothing trained
    status, found = run(dataclasses.replace(folders, fused=fused), tmp_path / "c.json")
    assert status == 1
    wrong = {name for name, verdict in verdicts(found).items() if verdict != "pass"}
    assert wrong == {PAIRS[0].format("fused"), PAIRS[1].format("fused")}


def test_one_fused_file_that_was_not_fused_fails(folders: Folders, tmp_path: Path) -> None:
    _, fused = copies(folders.artifact, folders.fused, tmp_path)
    shutil.copy(folders.artifact / mf.BASE_TFLITE, fused / "fused.tflite")
    status, found = run(dataclasses.replace(folders, fused=fused), tmp_path / "c.json")
    assert status == 1
    wrong = {name for name, verdict in verdicts(found).items() if verdict != "pass"}
    assert wrong == {PAIRS[1].format("fused"), PAIRS[2].format("fused")}


def test_a_checkpoint_of_other_weights_fails(folders: Folders, tmp_path: Path) -> None:
    other = save(tmp_path / "other", seed=5)
    status, found = run(dataclasses.replace(folders, checkpoint=other), tmp_path / "c.json", fused=False)
    assert status == 1
    assert verdicts(found) == dict(zip((t.format("base") for t in PAIRS), ("fail", "fail", "pass"), strict=True))


def test_a_tolerance_that_is_not_met_says_inaccurate(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = run(folders, tmp_path / "c.json", "--tolerance", 1e-12, fused=False)
    assert status == 1
    assert set(verdicts(found).values()) == {"inaccurate"}
    assert "NOT certified: 0 pairs fail, 3 are inaccurate" in capsys.readouterr().out


def test_the_least_agreement_decides_between_inaccurate_and_fail(folders: Folders, tmp_path: Path) -> None:
    other = save(tmp_path / "other", seed=5)
    mixed = dataclasses.replace(folders, checkpoint=other)
    _, found = run(mixed, tmp_path / "c.json", "--agreement", 0, fused=False)
    assert sorted(verdicts(found).values()) == ["inaccurate", "inaccurate", "pass"]


def test_as_many_images_as_asked_for_spread_over_the_data(folders: Folders, tmp_path: Path) -> None:
    counts = [run(folders, tmp_path / "c.json", "--count", n, fused=False)[1]["images"] for n in (3, 0, 1000)]
    assert counts == [3, 40, 40]


def test_images_of_other_classes_are_compared_without_accuracies(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = np.load(folders.data)
    np.savez(tmp_path / "d.npz", images=data["images"], labels=np.arange(40) % 9)
    status, found = run(dataclasses.replace(folders, data=tmp_path / "d.npz"), tmp_path / "c.json", fused=False)
    assert status == 0
    assert found["accuracies"] == {}
    assert "no accuracies" in capsys.readouterr().out


@pytest.mark.parametrize("weights", ["float32", "fp16", "int8"])
def test_raw_images_and_every_form_of_weights_are_certified(folders: Folders, tmp_path: Path, weights: str) -> None:
    calibration = folders.data if weights == "int8" else None
    again(folders, tmp_path / "artifact", weights, input_uint8=True, calibration=calibration)
    fused = adapted(tmp_path / "artifact", tmp_path / "adapted", size=0.01)
    raw = dataclasses.replace(folders, artifact=tmp_path / "artifact", fused=fused)
    status, found = run(raw, tmp_path / "c.json")
    assert status == 0, found
    allowed = {f"{p['reference']} - {p['candidate']}": p["tolerance"] for p in found["pairs"]}
    exact = {"relative": 1e-4, "agreement": 0.999}
    wanted = {"fp16": {"relative": 5e-3, "agreement": 0.99}, "int8": {"relative": 0.25, "agreement": 0.95}}
    for group in ("base", "fused"):
        assert allowed[PAIRS[0].format(group)] == exact
        assert allowed[PAIRS[2].format(group)] == wanted.get(weights, exact)
    errors = [p["outputs"][0]["max_rel"] for p in found["pairs"] if "TFLite" in p["candidate"]]
    assert max(errors) <= {"float32": 1e-5, "fp16": 5e-3, "int8": 0.25}[weights]
    assert (max(errors) > 1e-4) == (weights != "float32")


def test_an_artifact_with_nothing_to_compare_is_refused(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again(folders, tmp_path / "artifact", "none")
    error = refused(capsys, tmp_path / "artifact", "--data", folders.data)
    assert "there is only ONNX, so nothing can be compared" in error
    assert "--checkpoint" in error
    with pytest.raises(ArtifactError, match="nothing can be compared"):
        certify(tmp_path / "artifact", np.load(folders.data)["images"])


def test_a_checkpoint_of_another_input_is_refused(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save(tmp_path / "other", seed=0, spec=dataclasses.replace(INPUT, mean=(0.0, 0.0, 0.0)))
    error = refused(capsys, folders.artifact, "--data", folders.data, "--checkpoint", other)
    assert "other is not what the artifact was made from" in error
    assert "mean: (0.0, 0.0, 0.0), the artifact has (0.5, 0.4, 0.3)" in error


def test_a_damaged_base_is_refused(folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, _ = copies(folders.artifact, folders.fused, tmp_path)
    content = bytearray((made / mf.BASE_TFLITE).read_bytes())
    content[5000] ^= 1
    (made / mf.BASE_TFLITE).write_bytes(content)
    assert "base.tflite was altered" in refused(capsys, made, "--data", folders.data)


def test_damaged_fused_files_are_named(folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [folders.artifact, "--data", folders.data, "--fused", tmp_path / "adapted"]
    _, fused = copies(folders.artifact, folders.fused, tmp_path)
    content = (fused / "fused.tflite").read_bytes()
    for broken in (b"", content[: len(content) // 2], (fused / "fused.onnx").read_bytes()):
        (fused / "fused.tflite").write_bytes(broken)
        assert "fused.tflite" in refused(capsys, *argv)
    (fused / "fused.tflite").write_bytes(content)
    (fused / "fused.onnx").write_bytes(b"")
    assert "fused.onnx is not an ONNX file" in refused(capsys, *argv)
    model = onnx.load(folders.fused / "fused.onnx")
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, fused / "fused.onnx")
    assert "fused.onnx is refused by onnxruntime" in refused(capsys, *argv)
    for name in ("fused.onnx", "fused.tflite"):
        (fused / name).unlink()
    assert "holds neither fused.onnx nor fused.tflite" in refused(capsys, *argv)


def test_a_fused_folder_without_its_adapter_is_refused_where_pytorch_needs_it(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, fused = copies(folders.artifact, folders.fused, tmp_path)
    (fused / mf.ADAPTER).unlink()
    argv = [folders.artifact, "--data", folders.data, "--fused", fused]
    assert main([str(a) for a in argv]) == 0
    assert "adapter.safetensors not found" in refused(capsys, *argv, "--checkpoint", folders.checkpoint)


def test_without_a_runtime_the_command_that_installs_one_is_named(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "_RUNTIMES", ("no_such_runtime",))
    assert "pip install 'lorac-deploy[tflite]'" in refused(capsys, folders.artifact, "--data", folders.data)


def test_missing_folders_and_data_are_named(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "manifest.json not found" in refused(capsys, tmp_path, "--data", folders.data)
    assert "gone.npz" in refused(capsys, folders.artifact, "--data", tmp_path / "gone.npz")
    assert "config.json not found" in refused(
        capsys, folders.artifact, "--data", folders.data, "--checkpoint", tmp_path
    )
    assert "cannot write" in refused(
        capsys, folders.artifact, "--data", folders.data, "--json", tmp_path / "no" / "such" / "c.json"
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--tolerance", "-1"], "a tolerance must be 0 or more, got -1.0"),
        (["--tolerance", "nan"], "a tolerance must be 0 or more, got nan"),
        (["--agreement", "1.5"], "between 0 and 1, got 1.5"),
        (["--count", "-1"], "--count must be 0 or more, got -1"),
        (["--data-root", "x"], "--data-root goes with cifar10 and cifar100"),
    ],
)
def test_options_out_of_range_are_usage_mistakes(
    folders: Folders, options: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(folders.artifact), "--data", str(folders.data), *options])
    assert stop.value.code == 2
    assert text in capsys.readouterr().err
