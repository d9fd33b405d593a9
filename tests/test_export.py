"""`export_training_artifact` from a checkpoint and from a user's ONNX file, through to a fused drop-in."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from networks import trained
from shared_export import export_graph

from lorac_deploy.checkpoint import save_checkpoint
from lorac_deploy.commands import export_training_artifact as command
from lorac_deploy.commands import verify as verify_command
from lorac_deploy.export import OnnxSource, export_training_artifact
from lorac_deploy.models import ModelSpec
from lorac_exporters.artifact import ArtifactConfig
from lorac_exporters.base_tflite import TfliteChoice
from lorac_exporters.patch_table import initializer_offsets
from lorac_exporters.plan import LoraConfig
from lorac_exporters.verify import random_inputs, run_onnx, verify
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import load_adapter, save_adapter
from lorac_runtime.errors import ArtifactError, ConversionError
from lorac_runtime.manifest import InputSpec
from lorac_runtime.patch import fuse

SPEC = InputSpec("input", (3, 32, 32), 1 / 255, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
CONFIG = ArtifactConfig(lora=LoraConfig(rank=2))
OLD_ENGINE = ("--engine", "onnxruntime-training")


@functools.cache
def raw_graph() -> ir.Model:
    return export_graph(trained("resnet20"), SPEC.shape)


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    """A user's ONNX file: BN inside, dynamo's own clutter, opset 18."""
    ir.save(raw_graph(), tmp_path / "my_cnn.onnx")
    return tmp_path / "my_cnn.onnx"


def source(path: Path, **more: object) -> OnnxSource:
    return OnnxSource(path, mean=SPEC.mean, std=SPEC.std, **more)  # type: ignore[arg-type]


def adapt(artifact: Path, out: Path, *, touch: float = 0.05) -> Path:
    """What a device does, without training: other numbers in every trainable tensor, fused."""
    file = load_adapter(artifact / mf.ADAPTER)
    rng = np.random.default_rng(0)
    tensors = {k: (v + touch * rng.standard_normal(v.shape)).astype(np.float32) for k, v in file.tensors.items()}
    out.mkdir()
    save_adapter(out / mf.ADAPTER, tensors, file.metadata)
    fuse(artifact, out / "fused.onnx", tensors)
    return out / "fused.onnx"


def test_a_checkpoint_becomes_an_artifact_with_its_input_and_names(tmp_path: Path) -> None:
    names = tuple("abcdefghij")
    net, spec = trained("resnet20"), ModelSpec("resnet20", classes=10)
    save_checkpoint(tmp_path / "base", net, spec, input_spec=SPEC, class_names=names, metrics={})
    report = export_training_artifact(tmp_path / "base", tmp_path / "artifact", config=CONFIG)
    assert (report.manifest.input, report.manifest.class_names) == (SPEC, names)
    images = random_inputs(SPEC, 2, seed=0)
    expected = net(torch.from_numpy(images)).detach().numpy()
    np.testing.assert_allclose(run_onnx(tmp_path / "artifact" / mf.BASE, images), expected, atol=1e-5)


def test_a_users_own_file_is_adapted_and_verify_takes_it_as_the_base(own_file: Path, tmp_path: Path) -> None:
    report = export_training_artifact(source(own_file), tmp_path / "artifact", config=CONFIG)
    assert report.manifest.output.classes == 10
    assert any("folded" in change for change in report.changes)
    fused = adapt(tmp_path / "artifact", tmp_path / "adapted")
    for base, artifact in ((tmp_path / "artifact" / mf.BASE, None), (own_file, tmp_path / "artifact")):
        found = verify(base, fused, artifact=artifact)
        assert found.ok, found
        assert {check.verdict for check in found.checks} == {"pass"}
    without_manifest = verify(own_file, fused)
    assert without_manifest.ok
    assert any("folded" in c.detail for c in without_manifest.checks if c.name == "differences by canonicalization")


def test_the_head_is_kept_or_replaced_by_its_width(own_file: Path, tmp_path: Path) -> None:
    kept = export_training_artifact(source(own_file, num_classes=10), tmp_path / "kept", config=CONFIG)
    new = export_training_artifact(source(own_file, num_classes=3), tmp_path / "new", config=CONFIG)
    images = random_inputs(SPEC, 2, seed=0)
    original = run_onnx(own_file, images)
    np.testing.assert_allclose(run_onnx(tmp_path / "kept" / mf.BASE, images), original, atol=1e-5)
    assert run_onnx(tmp_path / "new" / mf.BASE, images).shape == (2, 3)
    assert (kept.manifest.class_names, new.manifest.class_names) == (tuple("0123456789"), tuple("012"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"class_names": ("cat",)}, "1 class names were given for 10 classes"),
        ({"size": (16, 16)}, "which is not of size"),
    ],
)
def test_contradictions_with_the_file_are_refused(
    own_file: Path, tmp_path: Path, more: dict[str, object], message: str
) -> None:
    with pytest.raises(ConversionError, match=message):
        export_training_artifact(source(own_file, **more), tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


def test_an_open_image_size_is_asked_for_and_then_used(own_file: Path, tmp_path: Path) -> None:
    model = onnx.load(own_file)
    for dim, name in zip(model.graph.input[0].type.tensor_type.shape.dim[2:], "hw", strict=True):
        dim.dim_param = name
    del model.graph.value_info[:]
    onnx.save(model, own_file)
    with pytest.raises(ConversionError, match="--size"):
        export_training_artifact(source(own_file), tmp_path / "artifact")
    report = export_training_artifact(source(own_file, size=(32, 32)), tmp_path / "artifact", config=CONFIG)
    assert report.manifest.input.shape == (3, 32, 32)


def test_a_matmul_and_add_head_is_found_and_replaced(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 13]>
    net (float[1, 3, 8, 8] x) => (float[1, 4] y) {
      h = Conv <kernel_shape = [3, 3]> (x, w)
      r = Relu (h)
      p = GlobalAveragePool (r)
      f = Flatten (p)
      m = MatMul (f, v)
      y = Add (m, b)
    }"""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in (("w", (16, 3, 3, 3)), ("v", (16, 4)), ("b", (4,))):
        values = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, tmp_path / "old.onnx")
    kept = export_training_artifact(source(tmp_path / "old.onnx"), tmp_path / "kept")
    new = export_training_artifact(source(tmp_path / "old.onnx", num_classes=6), tmp_path / "new")
    assert (kept.manifest.output.classes, new.manifest.output.classes) == (4, 6)
    images = rng.standard_normal((1, 3, 8, 8)).astype(np.float32)
    original = run_onnx(tmp_path / "old.onnx", images)
    np.testing.assert_allclose(run_onnx(tmp_path / "kept" / mf.BASE, images), original, atol=1e-5)


def test_mean_and_std_need_a_value_per_channel(own_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="3 channels"):
        export_training_artifact(OnnxSource(own_file, mean=(0.5,), std=(0.5,)), tmp_path / "artifact")


def test_verify_finds_a_fused_file_that_answers_otherwise_than_its_adapter(own_file: Path, tmp_path: Path) -> None:
    export_training_artifact(source(own_file), tmp_path / "artifact", config=CONFIG)
    fused = adapt(tmp_path / "artifact", tmp_path / "adapted")
    other = load_adapter(tmp_path / "adapted" / mf.ADAPTER)
    other.tensors["linear.weight"] += 0.01
    save_adapter(tmp_path / "adapted" / mf.ADAPTER, other.tensors, other.metadata)
    report = verify(tmp_path / "artifact" / mf.BASE, fused)
    assert [c.name for c in report.checks if c.verdict == "fail"] == ["fused against the unfused training graph"]


def test_verify_refuses_a_base_that_is_not_the_manifests(own_file: Path, tmp_path: Path) -> None:
    export_training_artifact(source(own_file), tmp_path / "artifact", config=CONFIG)
    fused = adapt(tmp_path / "artifact", tmp_path / "adapted")
    base = tmp_path / "artifact" / mf.BASE
    content = bytearray(base.read_bytes())
    content[initializer_offsets(base)["linear.weight"][0]] ^= 1  # a tensor of the patch table
    base.write_bytes(content)
    for given in (base, own_file):
        with pytest.raises(ArtifactError, match=r"base\.onnx was altered"):
            verify(given, fused, artifact=tmp_path / "artifact")


def test_verify_refuses_another_network_and_missing_files(own_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    model = onnx.load(own_file)
    model.graph.node[-1].op_type = "MatMul"
    onnx.save(model, other)
    assert not verify(own_file, other).ok
    with pytest.raises(ArtifactError, match="not found"):
        verify(own_file, tmp_path / "gone.onnx")
    (tmp_path / "garbage.onnx").write_bytes(b"not a model")
    with pytest.raises(ArtifactError, match="not an ONNX file"):
        verify(own_file, tmp_path / "garbage.onnx")


def test_the_commands_say_what_they_did_and_exit_by_the_result(
    own_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--onnx", str(own_file), "--mean", "0.5,0.4,0.3", "--std", "0.25,0.2,0.3", "--rank", "2"]
    assert command.main([*options, "--out", str(tmp_path / "artifact")]) == 0
    assert "differences from the model given (--list-changes" in capsys.readouterr().out
    assert command.main([*options, "--list-changes", "--out", str(tmp_path / "artifact")]) == 0
    assert "changed: BatchNormalization" in capsys.readouterr().out
    fused = adapt(tmp_path / "artifact", tmp_path / "adapted")
    base = tmp_path / "artifact" / mf.BASE
    assert verify_command.main([str(base), str(fused)]) == 0
    assert "a drop-in" in capsys.readouterr().out
    content = bytearray(fused.read_bytes())
    content[initializer_offsets(fused)["layer1.0.conv1.bias"][0]] ^= 1  # a frozen tensor
    fused.write_bytes(content)
    assert verify_command.main([str(base), str(fused), "--json"]) == 1
    assert '"ok": false' in capsys.readouterr().out


def test_the_command_writes_base_tflite_as_asked_and_says_so(
    own_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--onnx", str(own_file), "--mean", "0.5,0.4,0.3", "--std", "0.25,0.2,0.3", "--rank", "2"]
    out = ["--out", str(tmp_path / "artifact")]
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "local.npz", images=images, labels=np.arange(12) % 10)
    assert command.main([*options, *out, "--tflite", "int8", "--calibration", str(tmp_path / "local.npz")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("base.tflite", "weights: int8, input float32, output float32", "CONV_2D"):
        assert words in text
    manifest = mf.load(tmp_path / "artifact")
    assert manifest.tflite is not None
    assert manifest.tflite.weights == "int8"
    assert command.main([*options, *out, "--tflite", "none"]) == 0
    assert "no base.tflite: not asked for" in capsys.readouterr().out
    assert not (tmp_path / "artifact" / mf.BASE_TFLITE).exists()
    np.savez(tmp_path / "local.npz", images=images[:, :16], labels=np.arange(12) % 10)
    assert command.main([*options, *out, "--tflite", "int8", "--calibration", str(tmp_path / "local.npz")]) == 1
    assert "expected (N, 32, 32, 3)" in capsys.readouterr().err
    assert mf.load(tmp_path / "artifact").tflite is None


@pytest.mark.parametrize(
    ("calibration", "tflite"),
    [(None, "int8"), (Path("c.npz"), "auto"), (Path("c.npz"), "fp16")],
)
def test_calibration_and_int8_go_together(
    own_file: Path, tmp_path: Path, calibration: Path | None, tflite: TfliteChoice
) -> None:
    config = dataclasses.replace(CONFIG, tflite=tflite)
    with pytest.raises(ValueError, match="go together"):
        export_training_artifact(source(own_file), tmp_path / "artifact", config=config, calibration=calibration)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--onnx", "x.onnx"], 2, "--mean and --std"),
        (["--checkpoint", "x", "--mean", "0.5"], 2, "describes an ONNX file"),
        (["--checkpoint", "x", "--rank", "0"], 2, "rank must be at least 1"),
        (["--checkpoint", "x", "--alpha", "-1"], 2, "alpha must be positive"),
        (
            ["--checkpoint", "x", *OLD_ENGINE, "--optimizer", "sgd", "--weight-decay", "0.1"],
            2,
            "no weight_decay for sgd",
        ),
        (["--checkpoint", "x", "--momentum", "0.9"], 2, "momentum: is an option of sgd"),
        (["--checkpoint", "x", "--betas", "0.9"], 2, "invalid pair value"),
        (["--checkpoint", "x", "--method", "head", "--rank", "2"], 2, "--rank goes with --method lora-c"),
        (["--checkpoint", "x", "--method", "full", "--freeze-a"], 2, "--freeze-a goes with --method lora-c"),
        (["--checkpoint", "x", "--method", "head", "--blocks", "fc"], 2, "--blocks goes with --method lora-c"),
        (["--checkpoint", "x", "--tflite", "int8"], 2, "--tflite int8 needs --calibration"),
        (["--checkpoint", "x", "--calibration", "c.npz"], 2, "--tflite int8 needs --calibration"),
        (["--checkpoint", "x", "--tflite", "int4"], 2, "invalid choice"),
        (["--checkpoint", "missing"], 1, "error: "),
        (["--onnx", "missing.onnx", "--mean", "0", "--std", "1"], 1, "error: "),
    ],
)
def test_wrong_arguments_end_with_one_message(
    arguments: list[str], status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = command.main([*arguments, "--out", str(tmp_path / "out")])
    except SystemExit as err:
        code = err.code  # type: ignore[assignment]
    assert code == status
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
