"""The artifact folder: what is written, that it is reproducible, and that a failed export harms nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from small_artifacts import LORA, SPEC, export, network
from torch import nn

from lorac_deploy.adapter_files import save_module_adapter
from lorac_deploy.lora import attach
from lorac_exporters.training_ort import optimizer_problems
from lorac_exporters.verify import random_inputs, run_onnx
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import load_adapter
from lorac_runtime.engines import open_engine
from lorac_runtime.errors import AdapterError, ConversionError, OutputError
from lorac_runtime.manifest import TrainingDefaults


def test_the_folder_holds_what_the_manifest_says(tmp_path: Path) -> None:
    report = export(tmp_path / "artifact")
    manifest = mf.load(tmp_path / "artifact")
    assert manifest == report.manifest
    mf.verify_files(tmp_path / "artifact", manifest)
    present = {p.name for p in (tmp_path / "artifact").iterdir()}
    assert present == set(manifest.files) | {mf.FILE_NAME}
    assert {p.name for p in tmp_path.iterdir()} == {"artifact"}
    for file in (mf.BASE, mf.BASE_TFLITE):
        assert [p.tensor for p in manifest.patches if p.file == file] == ["0.weight", "3.weight", "7.weight"]
    assert manifest.trained_parameters == 16 * 27 + 2 * (48 + 48) + 4 * 16
    assert manifest.model_parameters == sum(p.numel() for p in network().parameters())


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    first = export(tmp_path / "one", network(), bn_policy="recalibrate")
    second = export(tmp_path / "two", network(), bn_policy="recalibrate")
    different = [n for n, entry in first.manifest.files.items() if second.manifest.files[n] != entry]
    assert different == []
    assert (tmp_path / "one" / mf.FILE_NAME).read_bytes() == (tmp_path / "two" / mf.FILE_NAME).read_bytes()


def test_every_onnx_file_is_of_ir_version_9(tmp_path: Path) -> None:
    export(tmp_path / "artifact", bn_policy="recalibrate", engine="both")
    files = sorted((tmp_path / "artifact").glob("*.onnx"))
    assert len(files) == 9  # the base, BN statistics, four step graphs, three of onnxruntime-training
    assert {onnx.load(path).ir_version for path in files} == {9}


def test_raw_uint8_images_may_be_the_input(tmp_path: Path) -> None:
    export(tmp_path / "raw", spec=dataclasses.replace(SPEC, in_graph=True))
    export(tmp_path / "normalised")
    manifest = mf.load(tmp_path / "raw")
    images = random_inputs(manifest.input, 3, seed=0)
    assert images.dtype == np.uint8
    mean, std = np.array(SPEC.mean, np.float32), np.array(SPEC.std, np.float32)
    floats = ((images.astype(np.float32) * np.float32(SPEC.scale) - mean) / std).transpose(0, 3, 1, 2)
    expected = run_onnx(tmp_path / "normalised" / mf.BASE, floats)
    np.testing.assert_allclose(run_onnx(tmp_path / "raw" / mf.BASE, images), expected, atol=1e-5)
    engine = open_engine(tmp_path / "raw", manifest)
    labels = np.array([0, 1, 2])
    np.testing.assert_allclose(engine.eval_step(images, labels)[1], expected, atol=1e-5)
    losses = [engine.train_step(images, labels, 1e-2) for _ in range(5)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "head"),
        ("bn_policy", "batch"),
        ("lora", dataclasses.replace(LORA, layout="paper")),
        ("lora", dataclasses.replace(LORA, rank=3)),
        ("lora", dataclasses.replace(LORA, alpha=1.0)),
        ("lora", dataclasses.replace(LORA, rank_mode="rk", rank=1)),
        ("lora", dataclasses.replace(LORA, learnable_alpha=True)),
        ("lora", dataclasses.replace(LORA, biases="all")),
        ("lora", dataclasses.replace(LORA, seed=1)),
        ("lora", dataclasses.replace(LORA, rank=16, small_layers="full")),
        ("lora", dataclasses.replace(LORA, freeze_a=True)),
        ("lora", dataclasses.replace(LORA, blocks=("3",))),
        ("training", TrainingDefaults(lr=1e-2)),
        ("tflite", "none"),
        ("tflite", "fp16"),
    ],
)
def test_every_setting_changes_the_artifact(tmp_path: Path, field: str, value: object) -> None:
    changed = export(tmp_path / "changed", **{field: value}).manifest
    default = export(tmp_path / "default").manifest
    assert changed.to_json() != default.to_json()


SCHEDULE = {n: getattr(TrainingDefaults(), n) for n in ("lr", "epochs", "batch_size", "warmup")}
SGD = TrainingDefaults(optimizer="sgd", momentum=0.9)


@pytest.mark.parametrize(
    ("default", "value"),
    [
        (TrainingDefaults(), TrainingDefaults(optimizer="sgd")),
        (TrainingDefaults(), TrainingDefaults(clip_norm=0.5)),
        (TrainingDefaults(), TrainingDefaults(weight_decay=0.1)),
        (TrainingDefaults(), TrainingDefaults(betas=(0.8, 0.999))),
        (TrainingDefaults(), TrainingDefaults(betas=(0.9, 0.99))),
        (TrainingDefaults(), TrainingDefaults(eps=1e-6)),
        (TrainingDefaults(), TrainingDefaults(amsgrad=True)),
        (TrainingDefaults(), TrainingDefaults(label_smoothing=0.1)),
        (TrainingDefaults(), TrainingDefaults(loss="mse")),
        (TrainingDefaults(), TrainingDefaults(loss="binary_cross_entropy")),
        (TrainingDefaults(), TrainingDefaults(loss="entropy")),
        (SGD, dataclasses.replace(SGD, momentum=0.0)),
        (SGD, dataclasses.replace(SGD, dampening=0.1)),
        (SGD, dataclasses.replace(SGD, nesterov=True)),
        (SGD, dataclasses.replace(SGD, weight_decay=0.1)),
        (TrainingDefaults(), TrainingDefaults(lr=1e-2)),
        (TrainingDefaults(), TrainingDefaults(epochs=3)),
        (TrainingDefaults(), TrainingDefaults(batch_size=7)),
        (TrainingDefaults(), TrainingDefaults(warmup=0.1)),
    ],
)
def test_every_setting_of_training_changes_the_graphs_unless_the_device_sets_it(
    tmp_path: Path, default: TrainingDefaults, value: TrainingDefaults
) -> None:
    engine, graphs = "onnxruntime", ["train_step.onnx"]
    if not optimizer_problems(default) and not optimizer_problems(value):
        engine, graphs = "both", ["train_step.onnx", "optimizer_model.onnx"]
    found = [export(tmp_path / "a", engine=engine, training=t).manifest for t in (default, value)]
    assert found[0].training != found[1].training
    in_graph = dataclasses.replace(value, **SCHEDULE) != default
    assert [found[0].files[g] != found[1].files[g] for g in graphs] == [in_graph] * len(graphs)


def test_the_optimizer_graph_has_the_settings_of_adamw(tmp_path: Path) -> None:
    training = TrainingDefaults(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.25)
    export(tmp_path / "a", engine="onnxruntime-training", training=training)
    nodes = onnx.load(tmp_path / "a" / "optimizer_model.onnx").graph.node
    (found,) = [{a.name: a.f for a in n.attribute} for n in nodes if n.op_type == "AdamWOptimizer"]
    settings = {"alpha": 0.8, "beta": 0.95, "epsilon": 1e-6, "weight_decay": 0.25}
    assert {name: found[name] for name in settings} == pytest.approx(settings)


def test_an_adapter_trained_in_pytorch_is_the_starting_state(tmp_path: Path) -> None:
    net = network()
    attach(net, LORA)
    with torch.no_grad():
        net[3].lora_b.normal_()
    save_module_adapter(tmp_path / "cloud.safetensors", net, model="net")
    export(tmp_path / "artifact", adapter=tmp_path / "cloud.safetensors")
    engine = open_engine(tmp_path / "artifact", mf.load(tmp_path / "artifact"))
    images = random_inputs(SPEC, 2, seed=1)
    expected = net(torch.from_numpy(images)).detach().numpy()
    np.testing.assert_allclose(engine.eval_step(images, np.array([0, 1]))[1], expected, atol=1e-5)
    assert load_adapter(tmp_path / "artifact" / mf.ADAPTER).metadata["coordinates"] == "folded"


def test_an_adapter_of_another_model_is_refused_and_nothing_is_left_behind(tmp_path: Path) -> None:
    net = network(width=8)
    attach(net, LORA)
    save_module_adapter(tmp_path / "other.safetensors", net, model="net")
    with pytest.raises(AdapterError) as error:
        export(tmp_path / "artifact", adapter=tmp_path / "other.safetensors")
    for name in ("0.weight", "3.lora_a", "3.lora_b", "7.weight"):
        assert name in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["other.safetensors"]


def test_policy_recalibrate_cannot_start_from_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="--bn frozen"):
        export(tmp_path / "artifact", adapter=tmp_path / "any.safetensors", bn_policy="recalibrate")


@pytest.mark.parametrize("policy", ["batch", "recalibrate"])
def test_a_policy_that_needs_bn_is_refused_where_there_is_none(tmp_path: Path, policy: str) -> None:
    with pytest.raises(ConversionError, match="already folded"):
        export(tmp_path / "artifact", network(norm=False), bn_policy=policy)


class Odd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cumsum(x, 1)


def test_operators_without_a_gradient_are_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="CumSum"):
        export(tmp_path / "artifact", network(activation=Odd()))
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_artifact_is_replaced_and_anything_else_is_not(tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    export(out)
    assert export(out, method="head").manifest == mf.load(out)
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(OutputError, match="not a training artifact"):
        export(tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        export(tmp_path / "file")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "sgd", "weight_decay": 0.1}, "no weight_decay for sgd, got 0.1"),
        ({"optimizer": "sgd", "momentum": 0.9}, "no momentum for sgd, got 0.9"),
        ({"optimizer": "sgd", "momentum": 0.9, "dampening": 0.2}, "no dampening for sgd, got 0.2"),
        ({"optimizer": "sgd", "momentum": 0.9, "nesterov": True}, "no nesterov for sgd, got True"),
        ({"amsgrad": True}, "no amsgrad for adamw, got True"),
        ({"loss": "mse"}, "no loss mse; use cross_entropy"),
        ({"label_smoothing": 0.1}, "no label_smoothing, got 0.1"),
    ],
)
def test_settings_that_onnxruntime_training_lacks_are_named(settings: dict[str, Any], message: str) -> None:
    problems = optimizer_problems(TrainingDefaults(**settings))
    assert any(message in problem for problem in problems)
    assert len(problems) == len(set(settings) - {"optimizer"})
    assert all("the engine onnxruntime" in problem for problem in problems)


def test_settings_that_onnxruntime_training_has_are_accepted() -> None:
    assert optimizer_problems(TrainingDefaults(optimizer="sgd", clip_norm=0.5)) == []
    assert optimizer_problems(TrainingDefaults(weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)) == []


@pytest.mark.parametrize("optimizer", ["sgd", "lion"])
def test_an_optimizer_the_engine_does_not_have_is_refused(tmp_path: Path, optimizer: str) -> None:
    training = TrainingDefaults(optimizer=optimizer, weight_decay=0.1)
    with pytest.raises(ValueError, match=optimizer):
        export(tmp_path / "artifact", engine="onnxruntime-training", training=training)
    assert list(tmp_path.iterdir()) == []
