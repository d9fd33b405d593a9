"""Artifacts that train in part (``freeze_a``, ``blocks``): one step against PyTorch, and what their files hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import touch_adapters
from shared_export import export_graph
from torch import nn

from lorac_deploy.adapter_files import attach_adapter, load_module_adapter, save_module_adapter
from lorac_deploy.lora import adapter_tensors, fuse, select_trainable
from lorac_exporters.artifact import ArtifactConfig, ExportReport, write_artifact
from lorac_exporters.engine_files import EngineChoice
from lorac_exporters.plan import LoraConfig
from lorac_exporters.verify import random_inputs, run_onnx
from lorac_runtime import FinetuneConfig, finetune
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import check_adapter, load_adapter, save_adapter
from lorac_runtime.engines import open_engine
from lorac_runtime.errors import AdapterError, ConversionError
from lorac_runtime.expected import fixed_tensors, state_problems
from lorac_runtime.manifest import InputSpec, TrainingDefaults
from lorac_runtime.patch import fuse as fuse_file

SPEC = InputSpec("input", (3, 10, 10), 1 / 255, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
NAMES = ("a", "b", "c", "d")
LR = 0.5
FROZEN_A = LoraConfig(rank=2, freeze_a=True, learnable_alpha=True)
LATE = LoraConfig(rank=2, blocks=("late",))
BOTH = LoraConfig(rank=2, freeze_a=True, blocks=("late.1", "early"), biases="all")


class Net(nn.Sequential):
    """A stem, two blocks of convolutions and a head; smooth, so that float32 steps agree."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.early = nn.Conv2d(3, 8, 3)
        self.mid = nn.Sequential(nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1), nn.Tanh())
        self.late = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3, groups=2), nn.Tanh())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(16, 4)


def export(
    out: Path,
    lora: LoraConfig,
    *,
    method: str = "lora-c",
    engine: EngineChoice = "auto",
    adapter: Path | None = None,
    **training: Any,
) -> ExportReport:
    config = ArtifactConfig(lora=lora, method=method, engine=engine, training=TrainingDefaults(**training))
    graph = export_graph(Net().eval(), SPEC.shape)
    return write_artifact(graph, out, name="net", spec=SPEC, class_names=NAMES, config=config, adapter=adapter)


def prepared(method: str, lora: LoraConfig) -> nn.Module:
    """The network as PyTorch trains it, its trainable tensors away from their start."""
    net = Net().eval()
    select_trainable(net, method, lora)
    touch_adapters(net, size=0.2)
    return net


def step(net: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """One of torch.optim.SGD."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=LR)
    loss = nn.functional.cross_entropy(net(torch.from_numpy(images)), torch.from_numpy(labels))
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize(
    ("method", "lora"),
    [("lora-c", FROZEN_A), ("lora-c", LATE), ("lora-c", BOTH), ("full", LoraConfig(blocks=("late", "mid")))],
)
def test_a_step_of_the_artifact_is_pytorchs(tmp_path: Path, method: str, lora: LoraConfig) -> None:
    net = prepared(method, lora)
    start = adapter_tensors(net)
    save_module_adapter(tmp_path / "cloud.safetensors", net, model="net")
    report = export(
        tmp_path / "artifact",
        lora,
        method=method,
        engine="both",
        adapter=tmp_path / "cloud.safetensors",
        optimizer="sgd",
        clip_norm=0.0,
    )
    images, labels = random_inputs(SPEC, 6, seed=0), np.array([0, 1, 2, 3, 0, 1])
    loss = step(net, images, labels)
    learning = {n for n, p in net.named_parameters() if p.requires_grad}
    assert {t.name for t in report.manifest.trainables} == learning
    expected = {n: v.numpy() for n, v in adapter_tensors(net).items()}
    logits = net(torch.from_numpy(images)).detach().numpy()
    assert set(report.manifest.engines) == {"onnxruntime", "onnxruntime-training"}
    for name in report.manifest.engines:
        engine = open_engine(tmp_path / "artifact", report.manifest, engine=name)
        assert engine.train_step(images, labels, LR) == pytest.approx(loss, rel=1e-5)
        found = engine.state()
        assert found.keys() == expected.keys()
        for tensor, value in expected.items():
            np.testing.assert_allclose(found[tensor], value, rtol=1e-4, atol=1e-6, err_msg=tensor)
            moved = np.abs(value - start[tensor].numpy()).max()
            assert moved > 1e-4 if tensor in learning else moved == 0
        np.testing.assert_allclose(engine.eval_step(images, labels)[1], logits, atol=1e-5)


@pytest.mark.parametrize("lora", [FROZEN_A, BOTH])
def test_the_adapter_file_holds_the_frozen_a_and_the_manifest_does_not_count_it(
    tmp_path: Path, lora: LoraConfig
) -> None:
    manifest = export(tmp_path / "artifact", lora).manifest
    names = {a.lora_a for a in manifest.adapters}
    assert names == fixed_tensors(manifest.adapters, manifest.trainables).keys()
    assert manifest == mf.load(tmp_path / "artifact")
    assert not names & {t.name for t in manifest.trainables}
    file = load_adapter(tmp_path / "artifact" / mf.ADAPTER)
    assert (file.metadata["freeze_a"], file.metadata["blocks"]) == ("true", ",".join(lora.blocks))
    assert set(file.tensors) == names | {t.name for t in manifest.trainables}
    assert all(np.abs(file.tensors[name]).max() > 0 for name in names)
    check_adapter(manifest, file)
    short = {n: v for n, v in file.tensors.items() if n not in names}
    assert sorted(state_problems(manifest, short)) == [f"{name} is missing" for name in sorted(names)]


def test_trained_parameters_are_counted_by_the_formula(tmp_path: Path) -> None:
    rank, head = 2 * 3, 16 * 4  # rank mode rk
    middle, late = 8 * 3 * rank, 16 * 3 * rank + 16 * 3 * rank
    stem = 8 * 27
    counts = {
        LoraConfig(rank=2, freeze_a=True): stem + middle + late + head,
        LoraConfig(rank=2, freeze_a=True, blocks=("late",)): late,
        LATE: late + (8 * 3 + 8 * 3) * rank,
        LoraConfig(rank=2, blocks=("late", "head")): late + (8 * 3 + 8 * 3) * rank + head,
        LoraConfig(rank=2, blocks=("early",)): stem,
    }
    for number, (lora, count) in enumerate(counts.items()):
        assert export(tmp_path / str(number), lora).manifest.trained_parameters == count


def test_layers_outside_keep_their_bytes_and_the_exporter_says_why(tmp_path: Path) -> None:
    report = export(tmp_path / "artifact", LATE)
    outside = "outside of the trained blocks"
    assert report.frozen == (("early", outside), ("mid.1", outside), ("fc", outside))
    assert {p.tensor for p in report.manifest.patches} == {"late.0.weight", "late.1.weight"}


@pytest.mark.parametrize("method", ["lora-c", "full", "head"])
def test_blocks_that_fit_neither_network_nor_method_leave_nothing_behind(tmp_path: Path, method: str) -> None:
    text = "head trains the head alone" if method == "head" else "'layer4' holds no layer .* early, mid, late, fc"
    with pytest.raises(ConversionError, match=text):
        export(tmp_path / "artifact", LoraConfig(blocks=("layer4",)), method=method)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("method", "lora"), [("lora-c", BOTH), ("full", LoraConfig(blocks=("late", "mid")))])
def test_a_device_adapter_gives_pytorch_the_fused_network(tmp_path: Path, method: str, lora: LoraConfig) -> None:
    manifest = export(tmp_path / "artifact", lora, method=method).manifest
    file = load_adapter(tmp_path / "artifact" / mf.ADAPTER)
    rng = np.random.default_rng(1)
    trained = {t.name for t in manifest.trainables}
    moved = {n: v + 0.1 * rng.standard_normal(v.shape) * (n in trained) for n, v in file.tensors.items()}
    state = {n: v.astype(np.float32) for n, v in moved.items()}
    save_adapter(tmp_path / "device.safetensors", state, file.metadata)
    fuse_file(tmp_path / "artifact", tmp_path / "fused.onnx", state)
    net = Net().eval()
    report = attach_adapter(tmp_path / "device.safetensors", net)
    assert report.trained_parameters == manifest.trained_parameters
    images = random_inputs(SPEC, 3, seed=2)
    expected = fuse(net)(torch.from_numpy(images)).detach().numpy()
    np.testing.assert_allclose(run_onnx(tmp_path / "fused.onnx", images), expected, atol=1e-5)
    assert np.abs(run_onnx(tmp_path / "artifact" / mf.BASE, images) - expected).max() > 1e-2


def test_an_adapter_of_other_blocks_is_refused(tmp_path: Path) -> None:
    save_module_adapter(tmp_path / "cloud.safetensors", prepared("lora-c", LATE), model="net")
    with pytest.raises(AdapterError, match=r"mid\.1\.lora_b is missing"):
        export(tmp_path / "artifact", LoraConfig(rank=2), adapter=tmp_path / "cloud.safetensors")
    other = prepared("lora-c", LoraConfig(rank=2))
    with pytest.raises(AdapterError, match=r"mid\.1\.lora_b is missing"):
        load_module_adapter(tmp_path / "cloud.safetensors", other)


def local_images(path: Path) -> Path:
    """Images of four classes, told apart by their brightness."""
    rng = np.random.default_rng(0)
    labels = np.arange(24) % 4
    images = rng.integers(0, 60, (24, 10, 10, 3)) + 60 * labels[:, None, None, None]
    np.savez(path, images=images.astype(np.uint8), labels=labels)
    return path


def test_a_device_fine_tunes_beside_its_frozen_a_and_hands_it_on(tmp_path: Path) -> None:
    artifact, data = tmp_path / "artifact", local_images(tmp_path / "data.npz")
    manifest = export(artifact, BOTH).manifest
    report = finetune(artifact, data, tmp_path / "out", FinetuneConfig(epochs=2, batch_size=8))
    assert report.trained_parameters == manifest.trained_parameters
    before, after = (load_adapter(folder / mf.ADAPTER) for folder in (artifact, tmp_path / "out"))
    names = {a.lora_a for a in manifest.adapters}
    assert {n for n in before.tensors if np.array_equal(before.tensors[n], after.tensors[n])} == names
    assert (after.metadata["freeze_a"], after.metadata["blocks"]) == ("true", "late.1,early")
    net = Net().eval()
    attach_adapter(tmp_path / "out" / mf.ADAPTER, net)
    images = random_inputs(SPEC, 3, seed=2)
    expected = net(torch.from_numpy(images)).detach().numpy()
    np.testing.assert_allclose(run_onnx(tmp_path / "out" / "fused.onnx", images), expected, atol=1e-5)


def test_a_device_whose_graphs_hold_the_frozen_a_refuses_an_adapter_with_another(tmp_path: Path) -> None:
    artifact, data = tmp_path / "artifact", local_images(tmp_path / "data.npz")
    export(artifact, BOTH)
    file, config = load_adapter(artifact / mf.ADAPTER), FinetuneConfig(epochs=1, engine="onnxruntime")
    starts = {}
    for leaf in ("lora_a", "lora_b"):
        moved = {f"late.1.{leaf}": file.tensors[f"late.1.{leaf}"] + np.float32(1e-3)}
        starts[leaf] = tmp_path / f"{leaf}.safetensors"
        save_adapter(starts[leaf], file.tensors | moved, file.metadata)
    with pytest.raises(AdapterError, match=r"late\.1\.lora_a .*export the artifact again"):
        finetune(artifact, data, tmp_path / "out", config, adapter=starts["lora_a"])
    finetune(artifact, data, tmp_path / "out", config, adapter=starts["lora_b"])


@pytest.mark.parametrize("policy", ["batch", "recalibrate"])
@pytest.mark.parametrize("engine", ["onnxruntime", "onnxruntime-training"])
def test_other_policies_of_batch_normalisation_train_in_part_too(
    tmp_path: Path, policy: mf.BnPolicy, engine: EngineChoice
) -> None:
    net = Net()
    net.mid[0] = nn.BatchNorm2d(8)
    lora = LoraConfig(rank=2, freeze_a=True, blocks=("mid",))
    config = ArtifactConfig(lora=lora, bn_policy=policy, engine=engine)
    graph = export_graph(net.eval(), SPEC.shape)
    write_artifact(graph, tmp_path / "artifact", name="net", spec=SPEC, class_names=NAMES, config=config)
    data = local_images(tmp_path / "data.npz")
    finetune(tmp_path / "artifact", data, tmp_path / "out", FinetuneConfig(epochs=2, batch_size=8))
    before, after = (load_adapter(tmp_path / name / mf.ADAPTER).tensors for name in ("artifact", "out"))
    assert {n for n in before if np.array_equal(before[n], after[n])} == {"mid.1.lora_a"}
    attach_adapter(tmp_path / "out" / mf.ADAPTER, net)
    images = random_inputs(SPEC, 3, seed=2)
    expected = net.eval()(torch.from_numpy(images)).detach().numpy()
    np.testing.assert_allclose(run_onnx(tmp_path / "out" / "fused.onnx", images), expected, atol=1e-4)
