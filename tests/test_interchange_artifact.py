"""An imported or trained adapter file becomes a training artifact, which says itself with which settings."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from author_lora import wrapped
from interchange_case import INPUTS, answers, saved, with_small_stem
from networks import SPEC, touch_adapters
from safetensors.torch import save_file
from torch import nn

from lorac_deploy.adapter_files import attach_adapter, save_module_adapter
from lorac_deploy.commands.export_training_artifact import main
from lorac_deploy.commands.import_adapter import main as import_main
from lorac_deploy.lora import attach, fuse, select_trainable
from lorac_exporters.plan import LoraConfig
from lorac_runtime import patch
from lorac_runtime.adapter import load_adapter
from lorac_runtime.manifest import ADAPTER, load

CONVOLUTIONS = ("layer1.0.conv1", "layer2.0.conv2")


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return with_small_stem()


@pytest.fixture(scope="module")
def base(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(net, tmp_path_factory.mktemp("base") / "base")


def started(artifact: Path, fused: Path) -> np.ndarray:
    """What the artifact answers with the adapter that it starts from."""
    patch.fuse(artifact, fused, load_adapter(artifact / ADAPTER).tensors)
    session = onnxruntime.InferenceSession(fused, providers=["CPUExecutionProvider"])
    return session.run(None, {SPEC.name: INPUTS.numpy()})[0]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("source", ["loralib", "weights"])
def test_an_imported_adapter_becomes_an_artifact(
    net: nn.Module, base: Path, tmp_path: Path, source: str, whole: bool
) -> None:
    layers = (*CONVOLUTIONS, "fc") if source == "loralib" else CONVOLUTIONS  # loralib merges no fully connected ones
    model = wrapped(copy.deepcopy(net), layers, r=2, alpha=4.0)
    expected = answers(model).numpy()
    if source == "loralib":
        torch.save(model.state_dict(), tmp_path / "a.pt")
        words = [str(tmp_path / "a.pt"), "--alpha", "4"]
    else:
        merged = {n.replace(".conv.", "."): v for n, v in model.eval().state_dict().items() if "lora_" not in n}
        save_file(merged, tmp_path / "a.safetensors")
        words = [str(tmp_path / "a.safetensors")]
    out = tmp_path / "adapter.safetensors"
    assert import_main([*words, "--base", str(base), "--out", str(out), *(["--whole"] if whole else [])]) == 0
    command = ["--checkpoint", str(base), "--adapter", str(out), "--tflite", "none", "--out", str(tmp_path / "a")]
    assert main(command) == 0
    found = started(tmp_path / "a", tmp_path / "fused.onnx")
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.abs(answers(net).numpy() - expected).max() > 0.1
    manifest = load(tmp_path / "a")
    assert manifest.method == ("full" if whole else "lora-c")
    assert len(manifest.adapters) == (0 if whole else 2)


SETTINGS = {
    "lora-c": LoraConfig(rank=3, alpha=5.0, rank_mode="r", layout="paper", biases="all", small_layers="full"),
    "lora-c, frozen": LoraConfig(rank=1, freeze_a=True, blocks=("layer3",)),
    "bias": LoraConfig(),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_those_of_the_adapter(net: nn.Module, base: Path, tmp_path: Path, name: str) -> None:
    adapted, method = copy.deepcopy(net), name.partition(",")[0]
    select_trainable(adapted, method, SETTINGS[name], bn_policy="frozen")
    touch_adapters(adapted)
    save_module_adapter(tmp_path / "a.safetensors", adapted, model="resnet18")
    command = ["--checkpoint", str(base), "--adapter", str(tmp_path / "a.safetensors"), "--tflite", "none"]
    assert main([*command, "--out", str(tmp_path / "a")]) == 0
    expected = answers(adapted).numpy()
    found = started(tmp_path / "a", tmp_path / "fused.onnx")
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    if method == "lora-c":
        assert {a.r for a in load(tmp_path / "a").adapters} == {SETTINGS[name].rank}


def test_settings_that_are_given_win_and_differences_are_listed(
    net: nn.Module, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted = copy.deepcopy(net)
    attach(adapted, LoraConfig(rank=3, alpha=5.0))
    save_module_adapter(tmp_path / "a.safetensors", adapted, model="resnet18")
    command = ["--checkpoint", str(base), "--adapter", str(tmp_path / "a.safetensors"), "--out", str(tmp_path / "a")]
    assert main([*command, "--rank", "2"]) == 1
    error = capsys.readouterr().err
    assert "r: the adapter has '3', the artifact '2'" in error
    assert "alpha: the adapter has '5.0', the artifact '4.0'" in error
    assert main([*command, "--method", "head"]) == 1
    assert "method: the adapter has 'lora-c', the artifact 'head'" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    plain = copy.deepcopy(net)
    attach_adapter(tmp_path / "a.safetensors", plain)
    assert torch.equal(answers(fuse(plain)), answers(fuse(adapted)))


def test_a_file_of_no_known_method_says_so(net: nn.Module, base: Path, tmp_path: Path) -> None:
    from lorac_deploy.adapter_files import settings_of
    from lorac_runtime.adapter import save_adapter
    from lorac_runtime.errors import AdapterError

    adapted = copy.deepcopy(net)
    attach(adapted, LoraConfig())
    save_module_adapter(tmp_path / "a.safetensors", adapted, model="resnet18")
    file = load_adapter(tmp_path / "a.safetensors")
    save_adapter(tmp_path / "b.safetensors", file.tensors, {**file.metadata, "method": "magic"})
    with pytest.raises(AdapterError, match="its method is 'magic', which is none of"):
        settings_of(tmp_path / "b.safetensors", net)
