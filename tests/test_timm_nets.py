"""timm's networks by name: names, weights, what their weights were trained on, and the way to a drop-in file."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from training_cases import dataset

from benchmarks.timm import families
from benchmarks.timm_page import page
from benchmarks.timm_row import Row
from benchmarks.timm_way import go
from lorac_deploy import timm_nets
from lorac_deploy.checkpoint import load_checkpoint
from lorac_deploy.commands.train import main, parser
from lorac_deploy.models import ModelSpec, build, load_imagenet, load_weights
from lorac_deploy.structure import describe
from lorac_exporters.engine_files import chosen
from lorac_exporters.graphs import build_graphs
from lorac_exporters.plan import LoraConfig
from lorac_exporters.torch_graph import export_graph
from lorac_runtime.errors import CheckpointError, ConversionError
from lorac_runtime.manifest import InputSpec, TrainingDefaults

timm: Any = pytest.importorskip("timm")
SMALL = "timm/lcnet_035"


def test_a_network_is_timms_own_with_the_tasks_classes_and_channels() -> None:
    net = build(ModelSpec(SMALL, classes=7, channels=1), seed=3).eval()
    torch.manual_seed(3)
    theirs = timm.create_model("lcnet_035", num_classes=7, in_chans=1).eval()
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(net(x), theirs(x))
    assert net(x).shape == (2, 7)


def test_the_convolution_called_first_is_the_stem() -> None:
    from timm.models.byobnet import MobileOneBlock

    net = nn.Sequential(MobileOneBlock(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    assert describe(net).convs[0].name == "0.conv_kxk.0.conv"
    names = list(net.state_dict())
    timm_nets.stem_first(net, (3, 8, 8))
    assert describe(net).convs[0].name == "0.conv_scale.conv"
    assert sorted(net.state_dict()) == sorted(names)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("timm/resnet19", "timm has no network 'resnet19'; close to it are resnet18, "),
        ("timm/", "timm has no network ''; timm.list_models.. lists all"),
        ("timm/hf-hub:somebody/thing", "timm has no network 'hf-hub:somebody/thing'"),
        ("timm/resnet18.mine", "timm has no weights 'mine' of resnet18; choose one of a1_in1k, "),
        ("resnet19", "model 'resnet19' is not known; choose one of resnet18, .*, or one of timm's: timm/NAME"),
    ],
)
def test_names_that_do_not_exist_are_answered_with_some_that_do(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ModelSpec(name, 2)


def test_without_timm_the_message_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "timm" else find(name, *a))
    with pytest.raises(ValueError, match=r"not installed here: pip install 'lorac-deploy\[timm\]'"):
        ModelSpec(SMALL, 2)
    with pytest.raises(SystemExit) as caught:
        main(["--data", "digits", "--model", SMALL, "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert "pip install 'lorac-deploy[timm]'" in capsys.readouterr().err


def test_what_a_network_cannot_be_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"has no CIFAR stem to swap in \(timm's networks keep theirs\)"):
        ModelSpec("timm/resnet18", 2, cifar_stem=True)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_timms_own_weights_come_from_the_hubs_cache_and_the_head_starts_fresh(hub: Path) -> None:
    torch.manual_seed(1)
    source = timm.create_model("resnet10t")
    folder = hub / "models--timm--resnet10t.c3_in1k"
    (folder / "snapshots" / "0" / "x").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0")
    safetensors.torch.save_file(source.state_dict(), folder / "snapshots" / "0" / "model.safetensors")
    net = build(ModelSpec("timm/resnet10t.c3_in1k", 4))
    report = load_imagenet(net, "timm/resnet10t.c3_in1k")
    assert report.fresh == ("fc.weight", "fc.bias")
    assert torch.equal(net.state_dict()["layer4.0.conv2.weight"], source.state_dict()["layer4.0.conv2.weight"])


def test_weights_that_are_nowhere_are_named_with_what_to_do(hub: Path) -> None:
    net = build(ModelSpec(SMALL, 4))
    with pytest.raises(ValueError, match="timm offers no weights for timm/lcnet_035"):
        load_imagenet(net, SMALL)
    net = build(ModelSpec("timm/lcnet_050", 4))
    with pytest.raises(CheckpointError, match=r"of timm/lcnet_050\.ra2_in1k elsewhere .* --weights model.safetensors"):
        load_imagenet(net, "timm/lcnet_050")


def test_a_file_of_a_standardizing_network_is_loaded_as_what_its_convolutions_compute(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = timm.create_model("nf_regnet_b0", num_classes=3).eval()
    for name, value in source.named_parameters():
        if name.endswith("gain"):
            nn.init.uniform_(value, 0.5, 1.5)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "w.safetensors")
    net = build(ModelSpec("timm/nf_regnet_b0", 3)).eval()
    report = load_weights(net, tmp_path / "w.safetensors", name="timm/nf_regnet_b0")
    x = torch.randn(2, 3, 32, 32)
    assert report.fresh == ()
    assert torch.allclose(net(x), source(x), atol=1e-5)


def test_trained_from_a_file_with_the_size_and_normalisation_of_timms_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset(12)
    np.savez(tmp_path / "local.npz", images=data.images, labels=data.labels)
    torch.save(timm.create_model("lcnet_035").state_dict(), tmp_path / "w.pth")
    monkeypatch.setattr(timm_nets, "size", lambda name: (40, 48))
    options = ["--data", tmp_path / "local.npz", "--model", SMALL, "--epochs", 1, "--batch-size", 8, "--size", "model"]
    assert main([*map(str, options), "--weights", str(tmp_path / "w.pth"), "--out", str(tmp_path / "base")]) == 0
    saved = load_checkpoint(tmp_path / "base")
    assert (saved.spec.name, saved.input.shape) == (SMALL, (3, 40, 48))
    assert (saved.input.mean, saved.input.std) == timm_nets.statistics(SMALL)
    assert "these tensors start fresh: classifier.weight, classifier.bias" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("option", ["--size", "--normalize"])
def test_only_timms_networks_say_what_their_weights_were_trained_on(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--data", "digits", "--model", "resnet20", option, "model", "--out", str(tmp_path)])
    assert f"{option} model goes with one of timm's networks: --model timm/NAME" in capsys.readouterr().err


def test_the_commands_of_the_page_are_commands_and_those_without_downloads_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (root / "docs" / "models.md").read_text(encoding="utf-8")
    lines = re.findall(r"^(?: {4})?lorac-deploy train .*$", text, re.MULTILINE)
    parsed = [parser().parse_args(shlex.split(line)[2:]).model for line in lines]
    assert parsed == [SMALL, "timm/mobilenetv4_conv_small", "timm/resnet18.a1_in1k"]
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(lines[0])[2:]) == 0
    assert load_checkpoint(Path("base")).spec.name == SMALL


def test_it_goes_the_whole_way() -> None:
    row = go("lcnet_035", "lcnet", 32)
    assert row.whole, str(row)
    assert row.adapters == 18
    assert row.tflite == ""


class Sorted(nn.Module):
    """An operator without a gradient rule."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sort(x, -1).values


def test_a_network_with_an_operator_that_cannot_be_trained_is_refused_by_operator_and_layer() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Sorted(), nn.Flatten(), nn.Linear(8 * 36, 3))
    spec = InputSpec("input", (3, 8, 8), 1 / 255, (0.5,) * 3, (0.25,) * 3)
    settings: dict[str, Any] = {"spec": spec, "classes": 3, "new_head": False, "policy": "frozen"}
    graphs = build_graphs(export_graph(net, spec.shape), method="full", lora=LoraConfig(), **settings)
    with pytest.raises(ConversionError, match=r"TopK '\w+': TopK has no gradient"):
        chosen("onnxruntime", graphs, TrainingDefaults())


def test_the_page_is_that_of_the_results(root: Path) -> None:
    rows = [Row(**row) for row in json.loads((root / "docs" / "results" / "timm.json").read_text(encoding="utf-8"))]
    assert (root / "docs" / "timm.md").read_text(encoding="utf-8") == page(rows)
    assert len({row.family for row in rows if row.whole}) >= 25
    assert {row.name for row in rows} <= families().keys()


def test_a_step_that_differs_is_not_passed_off_as_equal() -> None:
    row = Row("a", "f", 32, attach="", export="", fuse="", dropin="", loss_error=0.0, step_error=2e-3, torch_error=1e-5)
    assert not row.whole
    assert "no: 2e-03 (1e-05)" in page([row])
    assert "step differs" in page([row])
