"""Adapter files for other libraries: PEFT loads them and answers as our own network does."""

from __future__ import annotations

import copy
import importlib
import json
import warnings
from pathlib import Path

import pytest
import torch
from networks import NAMES, SPEC, touch_adapters, trained
from safetensors.torch import load_file
from torch import nn

from lorac_deploy.adapter_files import save_module_adapter
from lorac_deploy.checkpoint import save_checkpoint
from lorac_deploy.commands.export import main
from lorac_deploy.interchange import Source
from lorac_deploy.interchange.exporting import export_peft, export_state_dict
from lorac_deploy.interchange.importing import import_adapter
from lorac_deploy.lora import attach, select_trainable
from lorac_deploy.models import ModelSpec
from lorac_exporters.plan import LoraConfig
from lorac_runtime.errors import ConversionError

peft = importlib.import_module("peft")  # after ours: it loads torchvision, which we can load without its operators
INPUTS = torch.randn(4, *SPEC.shape, generator=torch.Generator().manual_seed(7))


def answers(net: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = net.eval()(INPUTS)
    return found


class Case:
    """A network's checkpoint folder, an adapter file for it, and what the adapted network answers."""

    def __init__(self, folder: Path, name: str, config: LoraConfig) -> None:
        self.net = trained(name, cifar_stem=name == "resnet18")
        spec = ModelSpec(name, classes=10, cifar_stem=name == "resnet18")
        self.base, self.adapter = folder / "base", folder / "adapter.safetensors"
        save_checkpoint(self.base, self.net, spec, input_spec=SPEC, class_names=NAMES, metrics={})
        adapted = copy.deepcopy(self.net)
        attach(adapted, config)
        touch_adapters(adapted)
        save_module_adapter(self.adapter, adapted, model=name)
        self.expected = answers(adapted)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"), "resnet18", LoraConfig(rank=2, blocks=("layer1", "layer4", "fc")))


def in_peft(case: Case, folder: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of groups, of a base without a name
        return answers(peft.PeftModel.from_pretrained(copy.deepcopy(case.net), str(folder)))


@pytest.mark.parametrize("layout", ["spatial", "paper"])
def test_peft_answers_as_the_adapted_network(layout: str, tmp_path: Path) -> None:
    config = LoraConfig(rank=2, layout=layout, linear=True)  # type: ignore[arg-type]
    made = Case(tmp_path, "resnet18", config)
    found = export_peft(made.base, made.adapter, tmp_path / "peft")
    assert max(fit.error for fit in found.fits) < 1e-6
    given = in_peft(made, tmp_path / "peft")
    assert (given - made.expected).abs().max() <= 1e-4 * made.expected.abs().max()
    assert (answers(made.net) - made.expected).abs().max() > 0.01 * made.expected.abs().max()


def test_the_rank_needed_is_stated_and_smaller_ones_have_an_error(case: Case, tmp_path: Path) -> None:
    exact = export_peft(case.base, case.adapter, tmp_path / "exact")
    ranks = {fit.layer: fit.rank for fit in exact.fits}
    assert ranks["layer1.0.conv1"] == 2 * 3 * 3  # r * k * k
    less = export_peft(case.base, case.adapter, tmp_path / "less", rank=4)
    assert all(fit.rank is not None and fit.rank <= 4 and fit.error > 1e-3 for fit in less.fits if fit.rank == 4)
    away = (in_peft(case, tmp_path / "less") - case.expected).abs().max()
    assert away > (in_peft(case, tmp_path / "exact") - case.expected).abs().max() * 10


def test_there_and_back_again(case: Case, tmp_path: Path) -> None:
    export_peft(case.base, case.adapter, tmp_path / "peft")
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
    assert (answers(net) - case.expected).abs().max() <= 1e-4 * case.expected.abs().max()


def test_grouped_convolutions_go_along_whole(tmp_path: Path) -> None:
    made = Case(tmp_path, "mobilenet_v2", LoraConfig(rank=1, small_layers="adapter", blocks=("features.3",)))
    export_peft(made.base, made.adapter, tmp_path / "peft")
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert "features.3.conv.1.0" in config["modules_to_save"]
    assert (in_peft(made, tmp_path / "peft") - made.expected).abs().max() <= 1e-4 * made.expected.abs().max()


def test_the_folder_has_a_card_and_hashes(case: Case, tmp_path: Path) -> None:
    import hashlib

    found = export_peft(case.base, case.adapter, tmp_path / "peft")
    assert {path.name for path in (tmp_path / "peft").iterdir()} == set(found.files)
    for name, digest in found.files.items():
        assert hashlib.sha256((tmp_path / "peft" / name).read_bytes()).hexdigest() == digest
    card = (tmp_path / "peft/README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert "| layer1.0.conv1 | 18 |" in card


def test_the_command_writes_both(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(case.base), "--adapter", str(case.adapter)]
    assert main([*words, "--to", "peft", "--rank", "4", "--out", str(tmp_path / "peft"), "--json"]) == 0
    fits = json.loads(capsys.readouterr().out)["fits"]
    assert {fit["rank"] for fit in fits if fit["layer"] != "fc"} <= {2, 4}  # 1 x 1 kernels need no more than 2
    assert [fit["rank"] for fit in fits if fit["layer"] == "fc"] == [10]  # it trains in full
    assert main([*words, "--to", "state-dict", "--out", str(tmp_path / "state.safetensors")]) == 0
    assert load_file(tmp_path / "state.safetensors").keys() == case.net.state_dict().keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "peft"], "give one"),
        (["--to", "state-dict", "--adapter", "x", "--rank", "3"], "--rank is for --to peft"),
        (["--to", "peft", "--adapter", "x", "--data", "y"], "--data is not for --to peft"),
        (["--to", "peft", "--adapter", "x", "--weights", "fp16"], "for TFLite only"),
    ],
)
def test_options_that_would_change_nothing_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["base", "--out", "out", *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_statistics_that_changed_are_refused(case: Case, tmp_path: Path) -> None:
    adapted = copy.deepcopy(case.net)
    select_trainable(adapted, "lora-c", LoraConfig(rank=2), bn_policy="batch")
    save_module_adapter(tmp_path / "a.safetensors", adapted, model="resnet18")
    with pytest.raises(ConversionError, match="export the state dict"):
        export_peft(case.base, tmp_path / "a.safetensors", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
