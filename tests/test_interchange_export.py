"""Adapter files for other libraries: PEFT loads them and answers as our own network does."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from interchange_case import INPUTS, Case, answers, in_peft
from safetensors.torch import load_file

from lorac_deploy.adapter_files import save_module_adapter
from lorac_deploy.commands import _share
from lorac_deploy.commands import import_adapter as import_adapter_command
from lorac_deploy.commands.export import main
from lorac_deploy.export import export_training_artifact
from lorac_deploy.folding import fold_batchnorm
from lorac_deploy.interchange import FORMATS, Source
from lorac_deploy.interchange.exporting import FOLDERS, STATE_DICT, ShareConfig, export_folder, export_state_dict
from lorac_deploy.interchange.folders import Shared
from lorac_deploy.interchange.importing import import_adapter
from lorac_deploy.lora import select_trainable
from lorac_exporters.artifact import ArtifactConfig
from lorac_exporters.plan import LoraConfig
from lorac_runtime.errors import ArtifactError, ConversionError
from lorac_runtime.manifest import BnPolicy


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"), "resnet20", LoraConfig(rank=2, blocks=("layer1", "layer3", "linear")))


def to_peft(case: Case, out: Path, *, rank: int | None = None, source: Path | None = None) -> Shared:
    return export_folder(source or case.base, case.adapter, out, ShareConfig("peft", rank=rank))


@pytest.mark.parametrize("layout", ["spatial", "paper"])
def test_peft_answers_as_the_adapted_network(layout: str, tmp_path: Path) -> None:
    config = LoraConfig(rank=2, layout=layout, linear=True)  # type: ignore[arg-type]
    made = Case(tmp_path, "resnet20", config)
    found = to_peft(made, tmp_path / "peft")
    assert max(fit.error for fit in found.fits) < 1e-6
    assert made.far(in_peft(made.net, tmp_path / "peft")) <= 1e-4
    assert made.far(answers(made.net)) > 0.01


def test_of_an_artifact_peft_wants_the_folded_network(case: Case, tmp_path: Path) -> None:
    found = to_peft(case, tmp_path / "peft", source=case.artifact)
    assert max(fit.error for fit in found.fits) < 1e-6
    assert case.far(in_peft(fold_batchnorm(case.net), tmp_path / "peft")) <= 1e-4
    assert "fold_batchnorm" in (tmp_path / "peft/README.md").read_text()


def test_the_rank_needed_is_stated_and_smaller_ones_have_an_error(case: Case, tmp_path: Path) -> None:
    exact = to_peft(case, tmp_path / "exact")
    ranks = {fit.layer: fit.rank for fit in exact.fits}
    assert ranks["layer1.0.conv1"] == 16  # r * k * k is 18, and there are 16 channels
    assert ranks["layer3.1.conv1"] == 2 * 3 * 3
    less = to_peft(case, tmp_path / "less", rank=4)
    assert all(fit.rank is not None and fit.rank <= 4 and fit.error > 1e-3 for fit in less.fits if fit.rank == 4)
    assert case.far(in_peft(case.net, tmp_path / "less")) > 10 * case.far(in_peft(case.net, tmp_path / "exact"))


def test_there_and_back_again(case: Case, tmp_path: Path) -> None:
    to_peft(case, tmp_path / "peft")
    found = import_adapter(Source(tmp_path / "peft"), case.base, tmp_path / "back.safetensors")
    assert found.output_error < 1e-5
    export_state_dict(case.base, tmp_path / "back.safetensors", tmp_path / "back-state.safetensors")
    export_state_dict(case.base, case.adapter, tmp_path / "state.safetensors")
    one, other = (load_file(tmp_path / name) for name in ("state.safetensors", "back-state.safetensors"))
    assert one.keys() == other.keys() == case.net.state_dict().keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=1e-6, rtol=1e-5)


def test_a_state_dict_is_a_plain_network(case: Case, tmp_path: Path) -> None:
    export_state_dict(case.base, case.adapter, tmp_path / "state.safetensors")
    net = copy.deepcopy(case.net)
    net.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert case.far(answers(net)) <= 1e-4


def test_of_an_artifact_a_state_dict_is_that_of_the_folded_network(case: Case, tmp_path: Path) -> None:
    export_state_dict(case.artifact, case.adapter, tmp_path / "state.safetensors")
    net = fold_batchnorm(case.net)
    net.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert case.far(answers(net)) <= 1e-4


def test_grouped_convolutions_go_along_whole(tmp_path: Path) -> None:
    made = Case(tmp_path, "mobilenet_v2", LoraConfig(rank=1, small_layers="adapter", blocks=("features.3",)))
    to_peft(made, tmp_path / "peft")
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert "features.3.conv.1.0" in config["modules_to_save"]
    assert made.far(in_peft(made.net, tmp_path / "peft")) <= 1e-4


@pytest.mark.parametrize(("method", "policy"), [("lora-c", "batch"), ("paca", "frozen")])
def test_what_is_not_low_rank_goes_along_too(method: str, policy: BnPolicy, case: Case, tmp_path: Path) -> None:
    adapted = copy.deepcopy(case.net)
    report = select_trainable(adapted, method, LoraConfig(rank=2), bn_policy=policy)
    with torch.no_grad():
        for trainable in report.trainables:
            value = adapted.get_parameter(trainable.name)
            value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(3)))
    if policy == "batch":
        adapted.train()(INPUTS)  # moves the running statistics
    save_module_adapter(tmp_path / "a.safetensors", adapted, model="resnet20")
    expected = answers(adapted)
    export_folder(case.base, tmp_path / "a.safetensors", tmp_path / "peft", ShareConfig("peft"))
    found = in_peft(case.net, tmp_path / "peft")
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (answers(case.net) - expected).abs().max() > 0.01 * expected.abs().max()


def test_the_folder_has_a_card_and_hashes(case: Case, tmp_path: Path) -> None:
    import hashlib

    found = to_peft(case, tmp_path / "peft")
    assert {path.name for path in (tmp_path / "peft").iterdir()} == set(found.files)
    for name, digest in found.files.items():
        assert hashlib.sha256((tmp_path / "peft" / name).read_bytes()).hexdigest() == digest
    card = (tmp_path / "peft/README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert "| layer3.1.conv1 | 18 |" in card


def test_the_command_writes_both(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(case.base), "--adapter", str(case.adapter)]
    assert main([*words, "--to", "peft", "--rank", "4", "--out", str(tmp_path / "peft"), "--json"]) == 0
    fits = json.loads(capsys.readouterr().out)["fits"]
    assert {fit["rank"] for fit in fits if fit["layer"] != "linear"} <= {2, 4}  # 1 x 1 kernels need no more than 2
    assert [fit["rank"] for fit in fits if fit["layer"] == "linear"] == [10]  # it trains in full
    assert main([*words, "--to", "state-dict", "--out", str(tmp_path / "state.safetensors")]) == 0
    assert load_file(tmp_path / "state.safetensors").keys() == case.net.state_dict().keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "peft", "--out", "out"], "give one"),
        (["--to", "peft", "--adapter", "x"], "give one of --out and --hub"),
        (["--to", "peft", "--adapter", "x", "--out", "out", "--hub", "me/net"], "give one of --out and --hub"),
        (["--to", "peft", "--adapter", "x", "--hub", "net"], "is no name of a repository"),
        (["--to", "peft", "--adapter", "x", "--hub", "me/.."], "is no name of a repository"),
        (["--to", "peft", "--adapter", "x", "--out", "out", "--rank", "0"], "at least 1"),
        (["--to", "onnx", "--out", "out", "--rank", "2"], "--rank is not for --to onnx"),
        (["--to", "tflite", "--out", "out", "--hub-cache", "c"], "--hub-cache is for --hub"),
        (["--to", "state-dict", "--adapter", "x", "--out", "out", "--rank", "3"], "--rank is for --to peft"),
        (["--to", "peft", "--adapter", "x", "--out", "out", "--name", "a"], "--name is for --to onnx_adapter"),
        (["--to", "peft", "--adapter", "x", "--out", "out", "--data", "y"], "--data is not for --to peft"),
        (["--to", "peft", "--adapter", "x", "--out", "out", "--weights", "fp16"], "for TFLite only"),
        (["--to", "onnx"], "--out is required"),
    ],
)
def test_options_that_would_change_nothing_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["base", *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_layers_that_the_network_lacks_are_refused(case: Case, tmp_path: Path) -> None:
    artifact, out = tmp_path / "artifact", tmp_path / "peft"
    export_training_artifact(case.base, artifact, config=ArtifactConfig(method="attention"))
    with pytest.raises(ConversionError, match="added layers to resnet20"):
        export_folder(artifact, artifact / "adapter.safetensors", out, ShareConfig("peft"))
    assert not out.exists()


def test_the_commands_offer_every_format() -> None:
    assert _share.FOLDERS == FOLDERS
    assert (*FOLDERS, STATE_DICT) == _share.SHARED
    assert import_adapter_command.FORMATS == FORMATS


def test_a_folder_of_neither_kind_is_named(case: Case, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="empty"):
        to_peft(case, tmp_path / "peft", source=tmp_path / "empty")
    assert not (tmp_path / "peft").exists()
