"""Reading pretrained weights: formats, prefixes, heads and stems of another shape, damage."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorac_deploy.models import ModelSpec, build
from lorac_deploy.weights import load_imagenet, load_weights, read_weights
from lorac_runtime.errors import CheckpointError


def net(classes: int = 4, *, seed: int = 0, channels: int = 3, kernel: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(channels, 8, kernel), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, classes)
    )


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def differing(module: nn.Module, state: dict[str, Tensor]) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, state[name])}


WRAPPERS: dict[str, Any] = {
    "plain": lambda state: state,
    "nested": lambda state: {"epoch": 3, "state_dict": state},
    "twice": lambda state: {"model": {"state_dict": state}},
    "parallel": lambda state: {f"module.{name}": value for name, value in state.items()},
    "both": lambda state: {"net": {f"module.{name}": value for name, value in state.items()}, "acc": 0.9},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_pytorch_files_are_read_whatever_they_are_wrapped_in(tmp_path: Path, wrapper: str) -> None:
    source, target = net(seed=1), net()
    torch.save(WRAPPERS[wrapper](source.state_dict()), tmp_path / "w.pth")
    report = load_weights(target, tmp_path / "w.pth")
    assert differing(target, snapshot(source)) == set()
    assert set(report.loaded) == set(source.state_dict())
    assert report.fresh == ()


@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors_files_are_read(tmp_path: Path, prefix: str) -> None:
    source, target = net(seed=1), net()
    save_file({prefix + name: value for name, value in source.state_dict().items()}, tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert differing(target, snapshot(source)) == set()


def test_half_precision_weights_are_converted(tmp_path: Path) -> None:
    source, target = net(seed=1).half(), net()
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert target[0].weight.dtype == torch.float32
    assert torch.equal(target[0].weight.half(), source[0].weight)


def test_a_head_of_another_width_keeps_its_fresh_values_and_is_reported(tmp_path: Path) -> None:
    source, target = net(10, seed=1), net(4)
    before = snapshot(target)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    report = load_weights(target, tmp_path / "w.pth")
    assert report.fresh == ("4.weight", "4.bias")
    assert not set(report.fresh) & set(report.loaded)
    assert torch.equal(target[4].weight, before["4.weight"])
    assert torch.equal(target[2].weight, source[2].weight)


@pytest.mark.parametrize("options", [{"kernel": 5}, {"channels": 1}])
def test_a_stem_of_another_kernel_or_input_keeps_its_fresh_values_and_is_reported(
    tmp_path: Path, options: dict[str, int]
) -> None:
    source, target = net(seed=1, **options), net()
    before = snapshot(target)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    assert load_weights(target, tmp_path / "w.pth").fresh == ("0.weight",)
    assert torch.equal(target[0].weight, before["0.weight"])
    assert torch.equal(target[0].bias, source[0].bias)


def test_batch_counters_may_be_absent_as_in_old_files(tmp_path: Path) -> None:
    source, target = net(seed=1), net()
    torch.save({n: v for n, v in source.state_dict().items() if "num_batches" not in n}, tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert torch.equal(target[1].running_var, source[1].running_var)


def test_all_mismatches_are_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    state, target = net(seed=1).state_dict(), net()
    before = snapshot(target)
    del state["1.running_mean"]
    state["2.weight"] = torch.zeros(8, 4, 3, 3)
    state["4.weight"] = torch.zeros(4, 9)  # another width of features, not of classes
    state["9.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError) as error:
        load_weights(target, tmp_path / "w.pth")
    assert str(error.value).splitlines()[1:] == [
        "  - 1.running_mean is missing",
        "  - 9.weight is unexpected",
        "  - 2.weight has shape (8, 4, 3, 3), expected (8, 8, 3, 3)",
        "  - 4.weight has shape (4, 9), expected (4, 8)",
    ]
    assert differing(target, before) == set()


class Harmful:
    """What a malicious file would run on loading."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harmed"),))


def test_code_in_a_file_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Harmful()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="not a file of plain tensors: it is damaged, or loading it would run"):
        load_weights(net(), tmp_path / "w.pth")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 50, 1000, -1])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, keep: int) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(net().state_dict(), path)
    else:
        save_file(net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="is not a"):
        load_weights(net(), path)


@pytest.mark.parametrize("content", [{}, {"a": 1}, [torch.zeros(1)], torch.zeros(1), {"state_dict": {}}])
def test_files_without_a_state_dict_are_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_weights(tmp_path / "w.pth")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent.pth not found: give the path"):
        load_weights(net(), tmp_path / "absent.pth")


def test_names_of_old_densenet_files_are_understood(tmp_path: Path) -> None:
    with torch.device("meta"):
        current = set(build(ModelSpec("densenet121", classes=4)).state_dict())
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): torch.zeros(1) for name in current}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "w.pth")
    assert set(read_weights(tmp_path / "w.pth")) == current


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty download cache, and a proxy that nobody serves: every download fails."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)
    return tmp_path / "hub" / "checkpoints"


def test_imagenet_weights_come_from_the_cache_with_a_fresh_head_and_stem(cache: Path) -> None:
    source = build(ModelSpec("resnet18", classes=1000), seed=1)
    cache.mkdir(parents=True)
    torch.save(source.state_dict(), cache / "resnet18-f37072fd.pth")
    target = build(ModelSpec("resnet18", classes=10, cifar_stem=True))
    assert load_imagenet(target, "resnet18").fresh == ("conv1.weight", "fc.weight", "fc.bias")
    assert torch.equal(target.get_parameter("layer4.1.conv2.weight"), source.get_parameter("layer4.1.conv2.weight"))


def test_a_failed_download_says_what_to_download_and_where_to_put_it(cache: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        load_imagenet(build(ModelSpec("resnet18", classes=10)), "resnet18")
    text = str(error.value)
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in text
    assert f"put the file into {cache} or give its path: --weights resnet18-f37072fd.pth" in text
    assert list(cache.iterdir()) == []


def test_networks_without_imagenet_weights_say_so() -> None:
    with pytest.raises(ValueError, match="no ImageNet weights for resnet20"):
        load_imagenet(build(ModelSpec("resnet20", classes=10)), "resnet20")
