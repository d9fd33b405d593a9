"""Adapters of other libraries: the network answers as the library's own does, and what cannot be is told."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from author_lora import wrapped
from interchange_case import answers, saved, with_small_stem
from networks import trained
from safetensors.torch import load_file, save_file
from torch import nn

from lorac_deploy.adapter_files import attach_adapter
from lorac_deploy.commands.import_adapter import main
from lorac_deploy.interchange import Source, read
from lorac_deploy.interchange.factorise import tensors_of
from lorac_deploy.interchange.importing import import_adapter
from lorac_deploy.lora import fuse
from lorac_runtime.errors import AdapterError

peft = importlib.import_module("peft")  # after ours: it loads torchvision, which we can load without its operators
LAYERS = ("layer1.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0")
Saved = Callable[..., Path]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return with_small_stem()


@pytest.fixture(scope="module")
def base(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(net, tmp_path_factory.mktemp("base") / "base")


def imported(net: nn.Module, path: Path) -> torch.Tensor:
    """What the network answers with an adapter file attached, and then fused."""
    module = copy.deepcopy(net)
    attach_adapter(path, module)
    found = answers(module)
    assert (answers(fuse(module)) - found).abs().max() <= 1e-4 * found.abs().max()
    return found


def peft_folder(net: nn.Module, folder: Path, **settings: Any) -> tuple[Path, torch.Tensor]:
    """An adapter that PEFT made and saved, moved away from its start, and what its own model answers."""
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": list(LAYERS), **settings})
    torch.manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(net), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder, answers(model)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layer2.0.conv2": 5}, "alpha_pattern": {"layer1.0.conv1": 1}},
        {"modules_to_save": ["fc"]},
        {"target_modules": [*LAYERS, "fc"]},
        {"target_modules": ["conv1"]},
    ],
    ids=lambda settings: ",".join(settings) or "plain",
)
def test_a_peft_adapter_answers_as_in_peft(
    net: nn.Module, base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder, expected = peft_folder(net, tmp_path / "peft", **settings)
    found = import_adapter(Source(folder), base, tmp_path / "a.safetensors")
    assert max(fit.error for fit in found.fits) < 1e-6
    assert found.output_error < 1e-5
    given = imported(net, tmp_path / "a.safetensors")
    assert (given - expected).abs().max() <= 1e-4
    assert (answers(net) - expected).abs().max() > 0.1  # it does something


@pytest.mark.parametrize("rank", [1, 2])
def test_too_small_a_rank_is_the_best_approximation_and_says_its_error(
    net: nn.Module, base: Path, tmp_path: Path, rank: int
) -> None:
    folder, _ = peft_folder(net, tmp_path / "peft")
    found = import_adapter(Source(folder), base, tmp_path / "a.safetensors", rank=rank)
    change = read(Source(folder), tensors_of(net))
    for fit in found.fits:
        delta = change.deltas[f"{fit.layer}.weight"]
        rows = delta.transpose(0, 2, 1, 3).reshape(delta.shape[0] * delta.shape[2], -1)
        values = np.linalg.svd(rows, compute_uv=False)
        assert fit.rank == rank * delta.shape[3]
        assert fit.error == pytest.approx(np.linalg.norm(values[fit.rank :]) / np.linalg.norm(values))
    assert found.output_error > 1e-3


@pytest.mark.parametrize("kind", ["lora-c", "full"])
@pytest.mark.parametrize("merged", [False, True])
def test_an_authors_checkpoint_counts_the_change_once(
    net: nn.Module, base: Path, tmp_path: Path, merged: bool, kind: str
) -> None:
    model = wrapped(copy.deepcopy(net), (*LAYERS, "fc"), r=2, alpha=4.0)
    expected = answers(model)
    torch.save(model.train(not merged).state_dict(), tmp_path / "a.pt")
    options = ["--alpha", "4", *(["--whole"] if kind == "full" else [])]
    words = [str(tmp_path / "a.pt"), "--base", str(base), "--out", str(tmp_path / "a.safetensors"), *options]
    assert main(words) == 0
    assert (imported(net, tmp_path / "a.safetensors") - expected).abs().max() <= 1e-4
    notes = read(Source(tmp_path / "a.pt", alpha=4.0), tensors_of(net)).notes
    assert ("merged into 3 of" in notes[0]) == merged
    again = copy.deepcopy(net)
    attach_adapter(tmp_path / "a.safetensors", again)


def test_factors_alone_are_a_loralib_checkpoint_too(net: nn.Module, base: Path, tmp_path: Path) -> None:
    model = wrapped(copy.deepcopy(net), LAYERS, r=2, alpha=4.0)
    state = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    save_file(state, tmp_path / "a.safetensors")
    found = import_adapter(Source(tmp_path / "a.safetensors", alpha=4.0), base, tmp_path / "out.safetensors")
    assert found.notes == ("the file holds no weights but the factors",)
    assert (imported(net, tmp_path / "out.safetensors") - answers(model)).abs().max() <= 1e-4


def test_weights_of_another_network_are_not_taken_for_merged_ones(net: nn.Module, base: Path, tmp_path: Path) -> None:
    model = wrapped(copy.deepcopy(net), LAYERS, r=2, alpha=4.0)
    with torch.no_grad():
        model.get_parameter("layer1.0.conv1.conv.weight").mul_(1.1)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    with pytest.raises(AdapterError, match="neither the base's nor the base's with the change in them") as caught:
        read(Source(tmp_path / "a.pt", alpha=4.0), tensors_of(net))
    assert str(caught.value).count("layer") == 1


def test_the_alpha_of_merged_weights_is_found_out(net: nn.Module, tmp_path: Path) -> None:
    torch.save(wrapped(copy.deepcopy(net), LAYERS, r=2, alpha=4.0).eval().state_dict(), tmp_path / "a.pt")
    with pytest.raises(AdapterError, match="with --alpha 4 it would be the merged one"):
        read(Source(tmp_path / "a.pt", alpha=16.0), tensors_of(net))


def test_a_fine_tuned_state_dict_is_a_change(net: nn.Module, base: Path, tmp_path: Path) -> None:
    tuned = copy.deepcopy(net)
    with torch.no_grad():
        tuned.get_parameter("layer1.0.conv1.weight").add_(0.02)
        tuned.get_parameter("fc.weight").add_(0.05 * torch.randn(10, 512))
        tuned.get_parameter("fc.bias").add_(1.0)
    save_file(tuned.state_dict(), tmp_path / "tuned.safetensors")
    found = import_adapter(Source(tmp_path / "tuned.safetensors"), base, tmp_path / "a.safetensors")
    assert {fit.layer: fit.rank for fit in found.fits} == {"fc": None, "layer1.0.conv1": 3}
    assert (imported(net, tmp_path / "a.safetensors") - answers(tuned)).abs().max() <= 1e-4


def test_a_changed_normalisation_cannot_be_held_and_is_listed(net: nn.Module, base: Path, tmp_path: Path) -> None:
    tuned = copy.deepcopy(net)
    with torch.no_grad():
        tuned.get_parameter("bn1.bias").add_(1.0)
        tuned.get_buffer("layer1.0.bn2.running_mean").add_(1.0)
    save_file(tuned.state_dict(), tmp_path / "tuned.safetensors")
    with pytest.raises(AdapterError) as caught:
        import_adapter(Source(tmp_path / "tuned.safetensors"), base, tmp_path / "a.safetensors")
    assert all(name in str(caught.value) for name in ("bn1", "layer1.0.bn2"))
    assert not (tmp_path / "a.safetensors").exists()


def test_layers_that_the_network_lacks_are_all_listed(net: nn.Module, tmp_path: Path) -> None:
    other = trained("resnet34", cifar_stem=True)
    folder, _ = peft_folder(other, tmp_path / "peft", target_modules=["layer1.2.conv1", "layer3.5.conv2", "fc"])
    with pytest.raises(AdapterError, match="is not an adapter of this network") as caught:
        read(Source(folder), tensors_of(net))
    assert [name in str(caught.value) for name in ("layer1.2.conv1", "layer3.5.conv2", "fc.weight")] == [
        True,
        True,
        False,
    ]


def test_a_prefix_is_hinted_at(net: nn.Module, tmp_path: Path) -> None:
    save_file({"backbone.fc.weight": torch.zeros(10, 512)}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=r"backbone\.fc\.weight is not in the network \(there is fc\.weight\)"):
        read(Source(tmp_path / "a.safetensors"), tensors_of(net))


def without(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


def configured(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def lacking(folder: Path, end: str) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.endswith(end)}
    save_file(kept, folder / "adapter_model.safetensors")


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda f: without(f, "adapter_config.json"), "no PEFT adapter, or was not written to its end"),
    "no weights": (lambda f: without(f, "adapter_model.safetensors"), "holds no adapter_model.safetensors"),
    "half fetched": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.safetensors.incomplete"),
        "adapter_model.safetensors.incomplete: fetch it again",
    ),
    "cut off": (cut, "cannot be read"),
    "no json": (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read"),
    "another method": (lambda f: configured(f, peft_type="LOHA"), "describes 'LOHA'"),
    "dora": (lambda f: configured(f, use_dora=True), "sets use_dora"),
    "moved base": (lambda f: configured(f, init_lora_weights="pissa_niter_4"), "which moved the base's weights"),
    "one factor": (lambda f: lacking(f, "layer1.0.conv1.lora_B.weight"), "layer1.0.conv1.lora_B.weight is missing"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_half_written_folder_says_what_is_missing(
    net: nn.Module, base: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = peft_folder(net, tmp_path / "peft")
    change, expected = DAMAGED[damage]
    change(folder)
    out = tmp_path / "a.safetensors"
    out.write_bytes(b"earlier")
    assert main([str(folder), "--base", str(base), "--out", str(out)]) == 1
    assert expected in capsys.readouterr().err
    assert out.read_bytes() == b"earlier"


def test_code_in_a_checkpoint_is_not_run(net: nn.Module, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.mkdir, (tmp_path / "harm",))

    torch.save({"fc.weight": Harm()}, tmp_path / "a.pt")
    with pytest.raises(AdapterError, match="holds more than tensors"):
        read(Source(tmp_path / "a.pt"), tensors_of(net))
    assert not (tmp_path / "harm").exists()


def test_alpha_is_asked_for_where_it_is_not_said_and_refused_where_it_is(net: nn.Module, tmp_path: Path) -> None:
    torch.save(wrapped(copy.deepcopy(net), LAYERS, r=2, alpha=4.0).state_dict(), tmp_path / "a.pt")
    with pytest.raises(AdapterError, match=r"give it \(--alpha\)"):
        read(Source(tmp_path / "a.pt"), tensors_of(net))
    folder, _ = peft_folder(net, tmp_path / "peft")
    with pytest.raises(AdapterError, match="leave --alpha out"):
        read(Source(folder, alpha=4.0), tensors_of(net))


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_groups_are_refused_where_peft_s_factors_are_no_low_rank_change(tmp_path: Path) -> None:
    net = trained("mobilenet_v2")
    layer = "features.2.conv.1.0"
    folder, _ = peft_folder(net, tmp_path / "peft", target_modules=[layer], r=96)
    with pytest.raises(AdapterError, match=rf"{layer}"):
        read(Source(folder), tensors_of(net))


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--whole", "--rank", "2"], "leave one of them out"), (["--rank", "0"], "rank must be at least 1")],
)
def test_options_that_contradict_are_usage_errors(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["a", "--base", "b", "--out", "c", *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
