"""Artifacts of the methods skip and attention: files, both engines, both formats, and what reports say of them."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from module_networks import CLASSES, PLAIN_SGD, exported, network, prepared, samples, spec
from networks import touch_adapters
from step_runs import Case
from tflite_agreement import compared
from torch import nn

from lorac_deploy.adapter_files import attach_adapter, save_module_adapter
from lorac_deploy.batchnorm import recalibrate
from lorac_deploy.commands._artifact_table import show
from lorac_deploy.lora import LoraConfig, adapter_tensors, select_trainable
from lorac_exporters.artifact import ArtifactConfig, ExportReport, write_artifact
from lorac_exporters.engine_files import EngineChoice
from lorac_exporters.memory_plan import plan_memory, read_graphs
from lorac_exporters.verify import run_onnx, verify
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import load_adapter, save_adapter
from lorac_runtime.config import FinetuneConfig
from lorac_runtime.engines import open_engine
from lorac_runtime.errors import ArtifactError, ConversionError
from lorac_runtime.manifest import BnPolicy
from lorac_runtime.patch import fuse
from lorac_runtime.session import finetune

METHODS = ("skip", "attention")
LORA = LoraConfig(rank=2, reduction=2)
LR = 0.05


def export(
    folder: Path,
    name: str,
    method: str,
    *,
    policy: BnPolicy = "frozen",
    engine: EngineChoice = "onnxruntime",
    tflite: str = "none",
    adapter: Path | None = None,
    calibration: np.ndarray | None = None,
) -> ExportReport:
    config = ArtifactConfig(
        lora=LORA,
        method=method,
        bn_policy=policy,
        engine=engine,
        tflite=tflite,  # type: ignore[arg-type]
        training=PLAIN_SGD,
    )
    return write_artifact(
        exported(name),
        folder,
        name=name,
        spec=spec(name),
        class_names=tuple("abcd"),
        config=config,
        adapter=adapter,
        calibration=calibration,
    )


def moved(name: str, method: str, policy: BnPolicy = "frozen") -> nn.Module:
    return prepared(name, Case(PLAIN_SGD, policy, LORA, method))


def state_of(net: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in adapter_tensors(net).items()}


def answers(net: nn.Module, values: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return copy.deepcopy(net).eval()(torch.from_numpy(values)).numpy()


def trained_alike(net: nn.Module, folder: Path, engine: EngineChoice) -> dict[str, np.ndarray]:
    """The same steps in PyTorch and in an engine; returns the engine's state."""
    opened = open_engine(folder, mf.load(folder), engine=engine)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=LR)
    for seed in range(3):
        values, labels = samples("residual", 4, seed=seed)
        loss = nn.functional.cross_entropy(net(torch.from_numpy(values)), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert opened.train_step(values, labels, LR) == pytest.approx(loss.item(), rel=1e-5)
    np.testing.assert_allclose(opened.eval_step(values, labels)[1], answers(net, values), atol=2e-5)
    state = opened.state()
    for key, expected in state_of(net).items():
        np.testing.assert_allclose(state[key], expected, atol=1e-5, err_msg=key)
    return state


@pytest.mark.parametrize(
    ("engine", "policy"), [("onnxruntime", "frozen"), ("onnxruntime", "batch"), ("onnxruntime-training", "frozen")]
)
@pytest.mark.parametrize("method", METHODS)
def test_both_engines_train_and_fuse_what_pytorch_trains(
    tmp_path: Path, method: str, policy: BnPolicy, engine: EngineChoice
) -> None:
    net = moved("residual", method, policy)
    save_module_adapter(tmp_path / "start.safetensors", net, model="residual")
    folder = tmp_path / "artifact"
    report = export(folder, "residual", method, policy=policy, engine=engine, adapter=tmp_path / "start.safetensors")
    before = report.manifest.model_parameters
    assert before == sum(p.numel() for p in network("residual").parameters())
    state = trained_alike(net, folder, engine)
    fuse(folder, tmp_path / "fused.onnx", state)
    save_adapter(tmp_path / "adapter.safetensors", state, load_adapter(folder / mf.ADAPTER).metadata)
    values, _ = samples("residual", 5, seed=7)
    np.testing.assert_allclose(run_onnx(tmp_path / "fused.onnx", values), answers(net, values), atol=2e-5)
    verdict = verify(folder / mf.BASE, tmp_path / "fused.onnx")
    assert {check.verdict for check in verdict.checks} == {"pass"}


@pytest.mark.parametrize("method", METHODS)
def test_statistics_that_a_device_estimates_are_pytorchs(tmp_path: Path, method: str) -> None:
    export(tmp_path / "artifact", "residual", method, policy="recalibrate")
    opened = open_engine(tmp_path / "artifact", mf.load(tmp_path / "artifact"))
    parts = [samples("residual", 6, seed=seed)[0] for seed in range(2)]
    opened.recalibrate(parts)
    net = copy.deepcopy(network("residual"))
    recalibrate(net, map(torch.from_numpy, parts))
    select_trainable(net, method, LORA)
    touch_adapters(net, size=0.2)
    opened.load_state(opened.state() | state_of(net))
    values, labels = samples("residual", 5, seed=7)
    np.testing.assert_allclose(opened.eval_step(values, labels)[1], answers(net, values), atol=2e-5)
    fuse(tmp_path / "artifact", tmp_path / "fused.onnx", opened.state())
    np.testing.assert_allclose(run_onnx(tmp_path / "fused.onnx", values), answers(net, values), atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["depthwise", "signals"])
def test_tflite_files_answer_like_pytorch_before_and_after_fusing(tmp_path: Path, name: str, method: str) -> None:
    report = export(tmp_path / "artifact", name, method, tflite="float32")
    assert report.tflite is not None
    net, values = moved(name, method), samples(name, 2)[0]
    for fused, given in ((False, network(name)), (True, net)):
        path = tmp_path / "artifact" / mf.BASE_TFLITE
        if fused:
            path = tmp_path / "fused.tflite"
            fuse(tmp_path / "artifact", path, state_of(net), base=mf.BASE_TFLITE)
        found = compared(path.read_bytes(), values, [answers(given, values)])
        assert not found.wrong, found


@pytest.mark.parametrize("method", METHODS)
def test_int8_is_refused_because_untrained_modules_have_no_ranges(tmp_path: Path, method: str) -> None:
    images = np.zeros((4, 12, 12, 3), np.uint8)
    with pytest.raises(ConversionError, match=f"method {method} does not go with --tflite int8.*use float32 or fp16"):
        export(tmp_path / "artifact", "residual", method, tflite="int8", calibration=images)


@pytest.mark.parametrize("method", METHODS)
def test_reports_say_that_the_file_is_no_drop_in_for_the_original(
    tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = export(tmp_path / "artifact", "residual", method)
    added = mf.load(tmp_path / "artifact").additions
    assert added is not None
    assert added == report.manifest.additions
    show(report, list_changes=False)
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"{added.nodes} nodes" in shown
    assert f"{added.multiply_adds:,} multiply-adds more than" in shown
    assert "no drop-in for it" in shown
    ir.save(exported("residual"), tmp_path / "user.onnx")
    fuse(tmp_path / "artifact", tmp_path / "fused.onnx", state_of(moved("residual", method)))
    verdict = verify(tmp_path / "user.onnx", tmp_path / "fused.onnx", artifact=tmp_path / "artifact")
    failed = {check.name: check.detail for check in verdict.checks if check.verdict == "fail"}
    assert failed.keys() >= {"canonical operators", "added modules"}
    assert failed["added modules"] == str(added)


@pytest.mark.parametrize("method", METHODS)
def test_a_device_run_ends_in_files_that_pytorch_takes_back(tmp_path: Path, method: str) -> None:
    export(tmp_path / "artifact", "residual", method)
    rng = np.random.default_rng(5)
    labels = np.arange(40) % CLASSES
    images = (rng.integers(0, 120, (40, 12, 12, 3)) + 30 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(tmp_path / "local.npz", images=images, labels=labels)
    config = FinetuneConfig(epochs=6, batch_size=8, lr=1.0)
    report = finetune(tmp_path / "artifact", tmp_path / "local.npz", tmp_path / "adapted", config)
    assert report.epoch_losses[-1] < report.epoch_losses[0]
    verdict = verify(tmp_path / "artifact" / mf.BASE, tmp_path / "adapted" / "fused.onnx")
    assert {check.verdict for check in verdict.checks} == {"pass"}
    net, values = copy.deepcopy(network("residual")), samples("residual", 4)[0]
    attach_adapter(tmp_path / "adapted" / mf.ADAPTER, net)
    fused = run_onnx(tmp_path / "adapted" / "fused.onnx", values)
    np.testing.assert_allclose(answers(net, values), fused, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_are_planned_for_the_network_without_its_modules(tmp_path: Path, method: str) -> None:
    export(tmp_path / "artifact", "residual", method)
    bare = read_graphs(tmp_path / "artifact", mf.load(tmp_path / "artifact"))
    assert not [name for name in bare.base.model.graph.initializers if "skip_" in name or "gate_" in name]
    assert [output.name for output in bare.base.model.graph.outputs] == ["logits"]
    plan = plan_memory(tmp_path / "artifact", 1 << 30)
    assert not plan.refused
    assert len(plan.fits) > 5


def test_a_description_of_additions_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    added = export(tmp_path / "artifact", "dense", "skip").manifest.additions
    nodes = 0 if added is None else added.nodes
    text = (tmp_path / "artifact" / mf.FILE_NAME).read_text(encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"additions\.nodes: 0 is below 1"):
        mf.parse(text.replace(f'"nodes": {nodes}', '"nodes": 0'))
